"""Runs the switch for real: refresh steps on one mesh, reuse steps on another, over the same
devices.

The weights lie in both layouts, the cache moves between them after every refresh by one all-to-all,
and ids depend on neither. The finer mesh orders the devices so that its shards of heads lie inside
the coarser one's: groups of k devices then trade sequences for heads, and each sends (k-1)/k of its
cache.

Legend: B sequences, L positions, n devices, k ranks of the exchange; coarse = the phase with the
smaller tp."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fdp import sharding
from fdp.collectives import all_to_all, shard_map
from fdp.count import hlo, jaxpr
from fdp.mesh import AXES, BATCH_AXES, make_mesh
from fdp.models import module
from fdp.price import inference
from fdp.price.inference import Degrees
from fdp.sampling.cached import BlockDecoder, refresh_period, start_state
from fdp.topics.parallel_dlm.switching import Job, exchange_ranks, moved_cache_bytes

P = PartitionSpec
STATE = P(BATCH_AXES)
MOVE = "move"  # the axis of the exchange
# The cache of (coarse, fine) tp on the mesh (dp, move, tp): sequences over `move`, or heads.
LAYOUTS = (P(None, ("dp", MOVE), None, "tp", None), P(None, "dp", None, ("tp", MOVE), None))


@dataclass(frozen=True)
class Meshes:
    """The same devices as each phase and the exchange see them."""

    refresh: Mesh
    reuse: Mesh
    exchange: Mesh

    @classmethod
    def of(
        cls, refresh: Degrees, reuse: Degrees, devices: Sequence[jax.Device] | None = None
    ) -> "Meshes":
        """Meshes whose finer shards of heads nest in the coarser ones'.

        Raises ValueError where the phases differ in devices, or one tp does not divide the other.
        """
        coarse, fine = sorted((refresh, reuse))
        if refresh.tp * refresh.dp != reuse.tp * reuse.dp or fine.tp % coarse.tp:
            raise ValueError(
                f"refresh tp·dp = {refresh.tp}·{refresh.dp} and reuse tp·dp = "
                f"{reuse.tp}·{reuse.dp} must be equal "
                f"(the phases share devices), and the smaller tp must divide the other: {fine.tp} "
                f"% {coarse.tp} = "
                f"{fine.tp % coarse.tp}"
            )
        k = exchange_ranks(refresh, reuse)
        degrees = lambda d: dict.fromkeys(AXES, 1) | {"dp": d.dp, "tp": d.tp}
        whole = make_mesh(degrees(coarse), devices)
        grid = whole.devices.reshape(fine.dp, k, coarse.tp)
        nested = make_mesh(degrees(fine), list(grid.transpose(0, 2, 1).ravel()))
        exchange = Mesh(grid, ("dp", MOVE, "tp"), axis_types=whole.axis_types[:3])
        return cls(*((whole, nested) if refresh == coarse else (nested, whole)), exchange)


def exchange(meshes: Meshes) -> Any:
    """The jitted all-to-all of a cache tree from the refresh to the reuse layout, global shapes in
    and out.
    """
    finer = meshes.reuse.shape["tp"] > meshes.refresh.shape["tp"]
    split, concat = (
        (3, 1) if finer else (1, 3)
    )  # dims of [layers, B, S, K, C]: heads for sequences, or back
    before, after = LAYOUTS if finer else LAYOUTS[::-1]

    def move(cache: Any) -> Any:
        return jax.tree.map(lambda x: all_to_all(x, MOVE, split, concat), cache)

    return jax.jit(shard_map(move, meshes.exchange, (before,), after))


def relabelled(x: jax.Array, to: NamedSharding) -> jax.Array:
    """The same shards on the same devices under another mesh's name for that layout; nothing moves.

    Raises ValueError where the layouts differ.
    """
    wanted = to.devices_indices_map(x.shape)
    held = {shard.device: shard for shard in x.addressable_shards}
    full = lambda index: tuple(s.indices(n) for s, n in zip(index, x.shape, strict=True))
    for device, index in wanted.items():
        if full(held[device].index) != full(index):
            raise ValueError(
                f"{device} holds {held[device].index} and should hold {index}: move the array "
                "instead"
            )
    return jax.make_array_from_single_device_arrays(x.shape, to, [held[d].data for d in wanted])


@dataclass(frozen=True)
class Execution:
    """What a run gave: ids int32 [B, L]; moves of the cache and the bytes a device sent in each,
    counted in the jaxpr and by `moved_cache_bytes`; compilations of each program (1: nothing was
    compiled again)."""

    ids: np.ndarray
    moves: int
    counted_bytes: float
    formula_bytes: float
    compilations: dict[str, int]


class _Phases:
    """Compiled programs and both layouts of the weights."""

    def __init__(
        self, decoder: BlockDecoder, params: Any, key: jax.Array, length: int, meshes: Meshes
    ):
        self.decoder, self.meshes, self.key = decoder, meshes, key
        noised = {"inputs": jnp.zeros((1, length), jnp.int32), "noise": jnp.zeros(1)}
        specs = module.abstract(decoder.model, noised)[1]["params"]
        place = lambda mesh: jax.device_put(params, sharding.shardings(mesh, specs))
        self.params = {"refresh": place(meshes.refresh), "reuse": place(meshes.reuse)}
        self.state = {n: NamedSharding(getattr(meshes, n), P("dp")) for n in ("refresh", "reuse")}
        self.cache = {
            n: NamedSharding(getattr(meshes, n), P(None, "dp", None, "tp", None))
            for n in self.state
        }
        _, cache = decoder.model.decode_state(1, length)
        scalar, outs = P(), (STATE, cache)
        build = lambda name, f, specs: jax.jit(
            shard_map(f, getattr(meshes, name), specs, outs),
            out_shardings=(self.state[name], self.cache[name]),
            compiler_options=hlo.QUICK,  # a few steps of one job
        )
        self.refresh = build(
            "refresh", decoder.refresh, (specs, scalar, STATE, STATE, scalar, scalar)
        )
        self.reuse = build(
            "reuse", decoder.reuse, (specs, cache, scalar, STATE, STATE, scalar, scalar)
        )
        self.exchange = exchange(meshes)

    def arguments(self, name: str, ids_B: Any, z_BxL: Any, step: int) -> tuple:
        """Key, ids, state, step and block start, on the mesh of phase `name`."""
        start = step // self.decoder.steps * self.decoder.block
        ids_B, z_BxL = jax.device_put((ids_B, z_BxL), self.state[name])
        return self.key, ids_B, z_BxL, jnp.int32(step), jnp.int32(start)

    def move(self, cache: Any) -> Any:
        """The cache in the layout of the reuse phase."""
        finer = self.meshes.reuse.shape["tp"] > self.meshes.refresh.shape["tp"]
        before = NamedSharding(self.meshes.exchange, LAYOUTS[0 if finer else 1])
        moved = self.exchange(jax.tree.map(lambda x: relabelled(x, before), cache))
        return jax.tree.map(lambda x: relabelled(x, self.cache["reuse"]), moved)


def execute(
    decoder: BlockDecoder,
    params: Any,
    key: jax.Array,
    requests: int,
    length: int,
    refresh: Degrees,
    reuse: Degrees,
    refresh_every: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Execution:
    """Sample `requests` sequences with refresh and reuse steps at their own {tp, dp}: ids as those
    of `cached.sample`.

    Equal degrees are the fixed plan: nothing moves. Raises ValueError for lengths that are not
    whole blocks, degrees that do not divide the model or the requests, and meshes as `Meshes.of`.
    """
    shape, period = decoder.model.shape, refresh_period(decoder, refresh_every)
    job = Job(shape, requests, length, period - 1, decoder.block, devices=refresh.tp * refresh.dp)
    for kind, d in (("refresh", refresh), ("reuse", reuse)):
        inference.check(shape, job.work(kind), d)
        if requests % d.dp:
            raise ValueError(
                f"{kind}: requests % dp = {requests} % {d.dp} = {requests % d.dp}: sample "
                f"{-(-requests // d.dp) * d.dp} requests, or choose a dp that divides them"
            )
    meshes, ids_B = Meshes.of(refresh, reuse, devices), jnp.arange(requests)
    phases = _Phases(decoder, params, key, length, meshes)
    z_BxL, moves, moved, counted = start_state(decoder, ids_B, length), 0, refresh != reuse, 0.0
    cache: Any = None
    for step in range(decoder.steps * decoder.blocks(length)):
        if step % decoder.steps % period == 0:
            z_BxL, cache = phases.refresh(
                phases.params["refresh"], *phases.arguments("refresh", ids_B, z_BxL, step)
            )
            if moved and period > 1:
                cache, moves = phases.move(cache), moves + 1
        else:
            arguments = phases.arguments("reuse", ids_B, z_BxL, step)
            z_BxL, cache = phases.reuse(phases.params["reuse"], cache, *arguments)
        jax.block_until_ready(
            z_BxL
        )  # many queued multi-device programs deadlock on virtual CPU devices
    if moves:
        found = jaxpr.collectives(jax.make_jaxpr(phases.exchange)(cache), meshes.exchange.shape)
        counted = sum(one.wire_bytes * one.count for one in found)
    programs = {"refresh": phases.refresh, "reuse": phases.reuse, "exchange": phases.exchange}
    sizes = {name: f._cache_size() for name, f in programs.items()}
    return Execution(
        np.asarray(z_BxL), moves, counted, moved_cache_bytes(job, refresh, reuse), sizes
    )
