"""Runs the switch for real: refresh steps on one mesh, reuse steps on another, over the same
devices.

The weights lie in both layouts, the cache moves between them after every refresh by one all-to-all,
and ids depend on neither. The finer mesh orders the devices so that its shards of heads lie inside
the coarser one's. Groups of k devices then trade sequences for heads, and each sends (k-1)/k of its
cache.

Legend: B sequences, L positions, k ranks of the exchange; coarse = the phase with the smaller tp.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fdp import process, sharding
from fdp.arm import Arm
from fdp.collectives import all_to_all, shard_map
from fdp.count import hlo, jaxpr
from fdp.mesh import AXES, BATCH_AXES, make_mesh
from fdp.models import module
from fdp.price import inference
from fdp.price.inference import Degrees
from fdp.sampling.cached import BlockDecoder, refresh_period, start_state
from fdp.topics.parallel_dlm.switching import KINDS, SamplingJob, exchange_ranks, moved_cache_bytes

P = PartitionSpec
STATE, CACHE = P(BATCH_AXES), P(None, "dp", None, "tp", None)
MOVE = "move"  # the axis of the exchange
# The cache of (coarse, fine) tp on the mesh (dp, move, tp): sequences over `move`, or heads.
LAYOUTS = (P(None, ("dp", MOVE), None, "tp", None), P(None, "dp", None, ("tp", MOVE), None))


@dataclass(frozen=True)
class PhaseMeshes:
    """The same devices as each phase and the exchange see them."""

    refresh: Mesh
    reuse: Mesh
    exchange: Mesh

    @classmethod
    def of(
        cls, refresh: Degrees, reuse: Degrees, devices: Sequence[jax.Device] | None = None
    ) -> "PhaseMeshes":
        """Meshes whose finer shards of heads nest in the coarser ones'.

        Raises ValueError where the phases differ in devices, or one tp does not divide the other.
        """
        coarse, fine = sorted((refresh, reuse))
        if refresh.tp * refresh.dp != reuse.tp * reuse.dp or fine.tp % coarse.tp:
            raise ValueError(
                f"refresh tp·dp = {refresh.tp}·{refresh.dp} and reuse tp·dp = "
                f"{reuse.tp}·{reuse.dp} must be equal (the phases share devices), and the smaller "
                f"tp must divide the other: {fine.tp} % {coarse.tp} = {fine.tp % coarse.tp}"
            )
        whole = make_mesh(_axes(coarse), devices)
        grid = whole.devices.reshape(fine.dp, exchange_ranks(refresh, reuse), coarse.tp)
        nested = make_mesh(_axes(fine), list(grid.transpose(0, 2, 1).ravel()))
        exchange = Mesh(grid, ("dp", MOVE, "tp"), axis_types=whole.axis_types[:3])
        return cls(*((whole, nested) if refresh == coarse else (nested, whole)), exchange)

    @property
    def finer(self) -> bool:
        """Whether the reuse phase has the larger tp."""
        return self.reuse.shape["tp"] > self.refresh.shape["tp"]


def _axes(degrees: Degrees) -> dict[str, int]:
    return dict.fromkeys(AXES, 1) | {"dp": degrees.dp, "tp": degrees.tp}


def exchange(meshes: PhaseMeshes) -> Any:
    """The jitted all-to-all of a cache tree from the refresh to the reuse layout, global shapes in
    and out.
    """
    # Dims of [layers, B, S, K, C]: heads for sequences, or back.
    split, concat = (3, 1) if meshes.finer else (1, 3)
    before, after = LAYOUTS if meshes.finer else LAYOUTS[::-1]

    def move(cache: Any) -> Any:
        return jax.tree.map(lambda x: all_to_all(x, MOVE, split, concat), cache)

    return jax.jit(shard_map(move, meshes.exchange, (before,), after))


def relabelled(x: jax.Array, to: NamedSharding) -> jax.Array:
    """The same blocks on the same devices under another mesh's name for that layout; nothing moves.

    Raises ValueError where the layouts differ.
    """
    wanted = to.devices_indices_map(x.shape)
    if x.sharding.devices_indices_map(x.shape) != wanted:
        raise ValueError(f"{x.sharding} and {to} hold other blocks: move the array instead")
    held = {shard.device: shard.data for shard in x.addressable_shards}
    return jax.make_array_from_single_device_arrays(x.shape, to, [held[d] for d in wanted])


@dataclass(frozen=True)
class SwitchedRun:
    """What a run gave: ids int32 [B, L]; moves of the cache and the bytes a device sent in each,
    counted in the jaxpr and by `moved_cache_bytes`; compilations of each program (1: nothing was
    compiled again)."""

    ids: np.ndarray
    moves: int
    counted_bytes: float
    formula_bytes: float
    compilations: dict[str, int]


@functools.lru_cache(maxsize=32)  # runs share what they have in common
def _phase(decoder: BlockDecoder, kind: str, mesh: Mesh, length: int) -> tuple[Any, Any]:
    """The jitted step of `kind` on its mesh, and the specs of its parameters."""
    noised = {"inputs": jnp.zeros((1, length), jnp.int32), "noise": jnp.zeros(1)}
    specs = module.abstract(decoder.model, noised)[1]["params"]
    cache, rest = decoder.model.decode_state(1, length)[1], (P(), STATE, STATE, P(), P())
    step, given = (
        (decoder.refresh, (specs, *rest))
        if kind == "refresh"
        else (decoder.reuse, (specs, cache, *rest))
    )
    program = jax.jit(
        shard_map(step, mesh, given, (STATE, cache)),
        out_shardings=(NamedSharding(mesh, P("dp")), NamedSharding(mesh, CACHE)),
        compiler_options=hlo.QUICK,  # a few steps of one job
    )
    return program, specs


class _Programs:
    """Compiled programs and both layouts of the weights."""

    def __init__(
        self, decoder: BlockDecoder, params: Any, key: jax.Array, length: int, meshes: PhaseMeshes
    ):
        self.decoder, self.meshes, self.key = decoder, meshes, key
        self.phase, self.params, self.state = {}, {}, {}
        for kind in KINDS:
            mesh = getattr(meshes, kind)
            self.phase[kind], specs = _phase(decoder, kind, mesh, length)
            self.params[kind] = process.place(params, sharding.shardings(mesh, specs))
            self.state[kind] = NamedSharding(mesh, P("dp"))
        self.exchange = exchange(meshes)

    def run(self, kind: str, ids_B: Any, z_BxL: Any, cache: Any, step: int) -> tuple[Any, Any]:
        """One step of `kind`: new ids and cache."""
        start = step // self.decoder.steps * self.decoder.block
        ids_B, z_BxL = process.place((ids_B, z_BxL), self.state[kind])
        given = (self.params[kind],) if kind == "refresh" else (self.params[kind], cache)
        numbers = jnp.int32(step), jnp.int32(start)
        # Many queued multi-device programs deadlock on virtual CPU devices: wait for each.
        return jax.block_until_ready(self.phase[kind](*given, self.key, ids_B, z_BxL, *numbers))

    def move(self, cache: Any) -> Any:
        """The cache in the layout of the reuse phase."""
        before = NamedSharding(self.meshes.exchange, LAYOUTS[0 if self.meshes.finer else 1])
        moved = self.exchange(jax.tree.map(lambda x: relabelled(x, before), cache))
        after = NamedSharding(self.meshes.reuse, CACHE)
        return jax.tree.map(lambda x: relabelled(x, after), moved)


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
) -> SwitchedRun:
    """Sample `requests` sequences with refresh and reuse steps at their own {tp, dp}: ids as those
    of `cached.sample`.

    Equal degrees are the fixed plan: nothing moves. Raises ValueError for lengths that are not
    whole blocks, degrees that do not divide the model or the requests, and meshes as
    `PhaseMeshes.of`."""
    shape, period = decoder.model.shape, refresh_period(decoder, refresh_every)
    n = refresh.tp * refresh.dp
    job = SamplingJob(shape, length, requests, period - 1, decoder.block, devices=n)
    for kind, d in zip(KINDS, (refresh, reuse), strict=True):
        inference.check(shape, job.work(kind), d)
        if requests % d.dp:
            raise ValueError(
                f"{kind}: requests % dp = {requests} % {d.dp} = {requests % d.dp}: sample "
                f"{-(-requests // d.dp) * d.dp} requests, or choose a dp that divides them"
            )
    meshes, ids_B = PhaseMeshes.of(refresh, reuse, devices), jnp.arange(requests)
    programs = _Programs(decoder, params, key, length, meshes)
    z_BxL, moves, counted = start_state(decoder, ids_B, length), 0, 0.0
    cache: Any = None
    for step in range(decoder.steps * decoder.blocks(length)):
        kind = "refresh" if step % decoder.steps % period == 0 else "reuse"
        z_BxL, cache = programs.run(kind, ids_B, z_BxL, cache, step)
        if kind == "refresh" and refresh != reuse and period > 1:
            cache, moves = programs.move(cache), moves + 1
    if moves:
        found = jaxpr.collectives(jax.make_jaxpr(programs.exchange)(cache), meshes.exchange.shape)
        counted = sum(one.wire_bytes * one.count for one in found)
    jitted = {**programs.phase, "exchange": programs.exchange}
    sizes = {name: f._cache_size() for name, f in jitted.items()}
    formula = moved_cache_bytes(job, refresh, reuse)
    return SwitchedRun(process.fetch(z_BxL), moves, counted, formula, sizes)


def fixed_and_switched(arm: Arm, requests: int) -> tuple[SwitchedRun, SwitchedRun]:
    """Samples of the arm with fixed degrees dp1·tp8, and with dp4·tp2 in refresh steps and dp1·tp8
    in reuse steps.
    """
    length, fine = arm.data.seq_len, Degrees(tp=8, dp=1)
    decoder = BlockDecoder(arm.model, arm.objective.n_ids, block=length // 4)
    given = decoder, arm.trained_on_host.params, jax.random.key(arm.seed), requests, length
    coarse = Degrees(tp=2, dp=4)
    # The fixed run on the devices in the order of the switched one's: they share a program.
    devices = list(PhaseMeshes.of(coarse, fine).reuse.devices.ravel())
    return execute(*given, fine, fine, devices=devices), execute(*given, coarse, fine)
