"""Dispatch of tokens to the experts of other devices of ep, and the way back.

"flat" sends a row for each (token, expert) pair. "two_level" sends one copy to each node that a
token needs, there one to each device, and adds results up in the node before the way back
(DeepEP's scheme). "gather" all-gathers all tokens and reduce-scatters the results. Buffers are
static: rows of real tokens come first, the rest is zero.

Legend: T tokens of a device, K pairs of a token, E experts (e of a device), D width, R rows of a
buffer, S = ep devices, M nodes of G devices each, C rows of a buffer for each destination."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdp.collectives import (
    all_gather,
    all_to_all,
    index,
    ragged_all_to_all,
    reduce_scatter,
    size,
    split,
)
from fdp.kernels_pallas.grouped import Groups, choose_block, make_groups
from fdp.kernels_pallas.permute import combine, permute, unpermute
from fdp.parallel.expert.arrange import Places, compact, grouped, places, ranks
from fdp.parallel.expert.ragged import Pieces, before, pieces
from fdp.parallel.wire import Wire, exchange, ragged

Array = jax.Array
Ffn = Callable[[Array, Groups], Array]  # the experts of this device on block-aligned groups


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Load:
    """What a device of ep has for the others. ids: int32 [T, K], -1 for none. gates: f32 [T, K].
    pairs: most of them with an expert. each: most of one expert. experts: E."""

    ids: Array
    gates: Array
    pairs: int = field(metadata={"static": True})
    each: int = field(metadata={"static": True})
    experts: int = field(metadata={"static": True})

    def part(self, tokens: int, n: int) -> "Load":
        """The load of one n-th of the tokens, with the ids and gates of all."""
        some = tokens // n
        return replace(
            self, pairs=min(self.pairs, some * self.ids.shape[-1]), each=min(self.each, some)
        )


class Moved(NamedTuple):
    """Summands of this device, f32. dropped: pairs without a result. between, within: rows sent to
    another node and to another device of the node. Only two_level knows nodes: of other plans all
    rows that are sent are within one."""

    dropped: Array
    between: Array
    within: Array


class Bounds(NamedTuple):
    """Rows of the static buffers: those that go to one device (to one node, with two levels), those
    that go from a device to one of its node, and pairs that reach a device."""

    first: int
    second: int
    pairs: int


def local(x_RxD: Array, id_RxK: Array, gates_RxK: Array, n: int, pairs: int, ffn: Ffn) -> Array:
    """Σ_k gates · expert(x) over the experts 0..n-1 of this device: [R, D]."""
    if n < id_RxK.shape[1]:  # a column for each expert is less to look through
        chosen_RxKxN = id_RxK[..., None] == jnp.arange(n, dtype=jnp.int32)
        gates_RxK = jnp.where(chosen_RxKxN, gates_RxK[..., None], 0.0).sum(1)
        id_RxK = jnp.where(chosen_RxKxN.any(1), jnp.arange(n, dtype=jnp.int32), -1)
    groups, at = grouped(id_RxK, n, pairs)
    return unpermute(ffn(permute(x_RxD, *at), groups), gates_RxK, at.slots_NxK, at.source_R)


def flat(x_TxD: Array, load: Load, ffn: Ffn, wire: Wire, b: Bounds, cut: int = 0) -> tuple:
    """([T, D], Moved). With `cut` > 0 an expert takes at most so many pairs of each device."""
    S, e, C = size("ep"), load.experts // size("ep"), b.first
    id_P = load.ids.reshape(-1)
    rank_P, sizes_E = ranks(id_P, load.experts)
    dropped = jnp.zeros((), jnp.int32)
    if cut:
        dropped = jnp.maximum(sizes_E - cut, 0).sum()
        rank_P = jnp.where(rank_P < cut, rank_P, -S * C - load.pairs)
        sizes_E = jnp.minimum(sizes_E, cut)
    if S == 1:
        kept = jnp.where(rank_P.reshape(load.ids.shape) >= 0, load.ids, -1)
        y_TxD = local(x_TxD, kept, load.gates, e, load.pairs, ffn)
        return y_TxD, _moved(dropped)
    others = sizes_E.sum() - sizes_E.reshape(S, e)[index("ep")].sum()
    moved = _moved(dropped, within=others)
    if ragged():
        return _sorted(x_TxD, load, ffn, wire, b, rank_P, sizes_E), moved
    first_Sxe = before(sizes_E.reshape(S, e), 1)
    start_E = (jnp.arange(S, dtype=jnp.int32)[:, None] * C + first_Sxe).reshape(-1)
    slot_P = jnp.where(id_P >= 0, start_E[jnp.maximum(id_P, 0)] + rank_P, -1)
    out = places(slot_P.reshape(load.ids.shape), S * C)
    sizes_Sxe = all_to_all(sizes_E.reshape(S, e), "ep", 0, 0)  # what each device sends to mine
    rows_RxD = exchange(permute(x_TxD, *out), "ep", wire)
    end_Sxe = jnp.cumsum(sizes_Sxe, 1)
    id_SxC = (jnp.arange(C)[:, None] >= end_Sxe[:, None]).sum(-1, dtype=jnp.int32)
    groups, at = grouped(id_SxC.reshape(-1, 1), e, b.pairs)
    done = ffn(permute(rows_RxD, *at), groups)
    back = permute(done, at.slots_NxK[:, 0], at.source_R[:, None])  # the inverse permutation
    back = exchange(back, "ep", wire)
    y_TxD = unpermute(back, load.gates, out.slots_NxK, out.source_R)
    return y_TxD, moved


def _sorted(
    x_TxD: Array, load: Load, ffn: Ffn, wire: Wire, b: Bounds, rank_P: Array, sizes_E: Array
) -> Array:
    """`flat` by a ragged all-to-all: rows sorted by expert go straight to their groups."""
    id_P = load.ids.reshape(-1)
    held = (id_P >= 0) & (rank_P >= 0)
    slot_P = jnp.where(held, before(sizes_E, 0)[jnp.maximum(id_P, 0)] + rank_P, -1)
    at = places(slot_P.reshape(load.ids.shape), load.pairs)
    sizes_SxE = all_gather(sizes_E[None], "ep", 0)
    e = load.experts // size("ep")
    block = choose_block(b.pairs, e)
    out, back = pieces(sizes_SxE, index("ep"), block)
    groups = make_groups(out.receive.reshape(-1, e).sum(0), b.pairs, block)

    def move(rows: Array, n: int, by: Pieces) -> Array:
        def send(a: Array) -> Array:
            return ragged_all_to_all(a, "ep", n, by.here, by.there)

        return wire.decode(jax.tree.map(send, wire.encode(rows)), rows.dtype)

    done = ffn(move(permute(x_TxD, *at), groups.rows, out), groups)
    return unpermute(move(done, load.pairs, back), load.gates, at.slots_NxK, at.source_R)


def two_level(
    x_TxD: Array, load: Load, ffn: Ffn, wire: Wire, b: Bounds, inner: int
) -> tuple[Array, Moved]:
    """([T, D], Moved) over nodes of `inner` devices."""
    outer, within = split("ep", inner)
    M, G = size(outer), inner
    e = load.experts // (M * G)
    near_TxM = visits(load.ids, e * G, M)
    to_node, copies_M = compact(near_TxM, b.first)

    def send(x: Array, at: Places, axes: tuple[str, ...]) -> Array:
        return all_to_all(permute(x, *at), axes, 0, 0)

    sizes_M = copies_M, all_to_all(copies_M, outer, 0, 0)
    rows_RxD = exchange(permute(x_TxD, *to_node), outer, wire, sizes_M)
    gates_RxK = send(load.gates, to_node, outer)
    ids_RxK = all_to_all(_copied(load.ids, to_node, e * G, b.first), outer, 0, 0)
    here_RxG = visits(ids_RxK, e, G)
    to_device, copies_G = compact(here_RxG, b.second)
    sizes_G = copies_G, all_to_all(copies_G, within, 0, 0)
    arrived = exchange(permute(rows_RxD, *to_device), within, wire, sizes_G)
    gates = send(gates_RxK, to_device, within)
    ids = all_to_all(_copied(ids_RxK, to_device, e, b.second), within, 0, 0)
    done = local(arrived, ids, gates, e, b.pairs, ffn)
    done = exchange(done, within, wire, sizes_G[::-1])
    done = combine(done, to_device.slots_NxK, to_device.source_R)
    done = exchange(done, outer, wire, sizes_M[::-1])
    y_TxD = combine(done, to_node.slots_NxK, to_node.source_R)
    return y_TxD, _moved(
        0,
        between=copies_M.sum() - copies_M[index(outer)],
        within=copies_G.sum() - copies_G[index(within)],
    )


def gather(x_TxD: Array, load: Load, ffn: Ffn, b: Bounds) -> tuple[Array, Moved]:
    """([T, D], Moved): each device computes its experts' share of all tokens of ep."""
    S, e = size("ep"), load.experts // size("ep")
    x, ids, gates = (all_gather(a, "ep", 0) for a in (x_TxD, load.ids, load.gates))
    mine = ids - index("ep") * e
    y_RxD = local(x, jnp.where((ids >= 0) & (mine < e), mine, -1), gates, e, b.pairs, ffn)
    sent = jnp.asarray(len(x_TxD) * (S - 1))
    return reduce_scatter(y_RxD, "ep", 0), _moved(0, within=sent)


def _moved(dropped: Array | int, between: Array | int = 0, within: Array | int = 0) -> Moved:
    return Moved(*(jnp.asarray(x, jnp.float32) for x in (dropped, between, within)))


def visits(id_NxK: Array, per: int, n: int) -> Array:
    """Whether a row has a pair with an expert of destination 0..n-1, each with `per` experts: bool
    [N, n]."""
    return ((id_NxK >= 0)[..., None] & (id_NxK[..., None] // per == jnp.arange(n))).any(1)


def _copied(id_NxK: Array, at: Places, per: int, rows: int) -> Array:
    """Ids of every row of a buffer, counted from the first expert of its destination; -1 for
    experts of others."""
    rows_RxK = jnp.where(at.source_R[:, None] >= 0, id_NxK[jnp.maximum(at.source_R, 0)], -1)
    first_R = (jnp.arange(len(at.source_R)) // rows * per)[:, None]
    inside = (rows_RxK >= first_R) & (rows_RxK < first_R + per)
    return jnp.where(inside, rows_RxK - first_R, -1).astype(jnp.int32)
