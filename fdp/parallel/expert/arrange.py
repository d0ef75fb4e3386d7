"""Where the rows of (token, expert) pairs lie: integer arrays that the permutations read.

Legend: N rows with K pairs each, E experts, P pairs, R rows of a buffer, X destinations, C rows of
a buffer for each destination."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdp.kernels_pallas.grouped import Groups, choose_block, make_groups

Array = jax.Array


class Places(NamedTuple):
    """A partial matching of N·K pairs with R rows: `source_R` is the row of N behind a row of the
    buffer, `slots_NxK` the row of the buffer of a pair; -1 for none. Each is the other's
    inverse."""

    source_R: Array
    slots_NxK: Array


def ranks(id_P: Array, n: int) -> tuple[Array, Array]:
    """(place of each pair among the pairs of its id, pairs of each id [n]); ids outside 0..n-1
    count nowhere."""
    id_P = jnp.where((id_P >= 0) & (id_P < n), id_P, n)
    order_P = jnp.argsort(id_P, stable=True)
    sizes = jnp.bincount(id_P, length=n + 1).astype(jnp.int32)
    first = jnp.cumsum(sizes) - sizes
    rank_sorted = jnp.arange(len(id_P), dtype=jnp.int32) - first[id_P[order_P]]
    return jnp.zeros_like(order_P, jnp.int32).at[order_P].set(rank_sorted), sizes[:n]


def places(slot_NxK: Array, rows: int) -> Places:
    """The matching in which a pair lies in row `slot`, of `rows`; slots outside lie nowhere."""
    held = (slot_NxK >= 0) & (slot_NxK < rows)
    N, K = slot_NxK.shape
    owner_P = jnp.repeat(jnp.arange(N, dtype=jnp.int32), K)
    at_P = jnp.where(held, slot_NxK, rows).reshape(-1)
    source_R = jnp.full(rows, -1, jnp.int32).at[at_P].set(owner_P, mode="drop")
    return Places(source_R, jnp.where(held, slot_NxK, -1).astype(jnp.int32))


def grouped(id_NxK: Array, experts: int, pairs: int) -> tuple[Groups, Places]:
    """Block-aligned groups of the pairs of each expert; at most `pairs` of them have one."""
    rank_P, sizes_E = ranks(id_NxK.reshape(-1), experts)
    groups = make_groups(sizes_E, pairs, choose_block(pairs, experts))
    valid = (id_NxK >= 0) & (id_NxK < experts)
    start = groups.starts_E[jnp.clip(id_NxK, 0, experts - 1)]
    slot_NxK = jnp.where(valid, start + rank_P.reshape(id_NxK.shape), -1)
    return groups, places(slot_NxK, groups.rows)


def compact(wanted_NxX: Array, rows: int) -> tuple[Places, Array]:
    """(matching, rows wanted by each destination [X]): the rows that a destination wants, in order,
    at the start of its `rows` rows of a buffer."""
    rank_NxX = jnp.cumsum(wanted_NxX, axis=0, dtype=jnp.int32) - 1
    X = wanted_NxX.shape[1]
    held = wanted_NxX & (rank_NxX < rows)
    slot_NxX = jnp.where(held, jnp.arange(X, dtype=jnp.int32) * rows + rank_NxX, -1)
    return places(slot_NxX, X * rows), wanted_NxX.sum(0, dtype=jnp.int32)
