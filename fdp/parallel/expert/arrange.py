"""Where the rows of (token, expert) pairs lie: integer arrays that the permutations read.

Legend: N rows with K pairs each, E experts, P pairs, R rows of a buffer, X destinations, C rows of
a buffer for each destination."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdp.kernels_pallas.grouped import Groups, choose_block, make_groups

Array = jax.Array
RUN = 64  # pairs that are compared with one another


class Places(NamedTuple):
    """A partial matching of N·K pairs with R rows: `source_R` is the row of N behind a row of the
    buffer, `slots_NxK` the row of the buffer of a pair; -1 for none. Each is the other's
    inverse."""

    source_R: Array
    slots_NxK: Array


def ranks(id_P: Array, n: int) -> tuple[Array, Array]:
    """(place of each pair among the pairs of its id, pairs of each id [n]); ids outside 0..n-1
    count nowhere.

    Ids are counted in runs of RUN pairs, and compared within a run: a sort of many pairs takes a
    TPU's compiler most of a minute."""
    P = len(id_P)
    X = -(-P // RUN)
    valid_P = (id_P >= 0) & (id_P < n)
    id_XxY = jnp.pad(jnp.where(valid_P, id_P, n), (0, X * RUN - P), constant_values=n)
    id_XxY = id_XxY.reshape(X, RUN)
    same_XxYxY = id_XxY[:, :, None] == id_XxY[:, None, :]
    earlier = jnp.arange(RUN)[None, :] < jnp.arange(RUN)[:, None]
    within_XxY = (same_XxYxY & earlier).sum(-1, dtype=jnp.int32)
    chosen_XxYxN = id_XxY[..., None] == jnp.arange(n)
    size_XxN = chosen_XxYxN.sum(1, dtype=jnp.int32)
    before_XxN = jnp.cumsum(size_XxN, axis=0) - size_XxN
    before_XxY = jnp.where(chosen_XxYxN, before_XxN[:, None], 0).sum(-1)
    return (before_XxY + within_XxY).reshape(-1)[:P], size_XxN.sum(0)


def places(slot_NxK: Array, rows: int) -> Places:
    """The matching in which a pair lies in row `slot`, of `rows`; slots outside lie nowhere."""
    held = (slot_NxK >= 0) & (slot_NxK < rows)
    owner_NxK = jax.lax.broadcasted_iota(jnp.int32, slot_NxK.shape, 0)
    at_NxK = jnp.where(held, slot_NxK, rows)
    # Not flattened: a scatter by flattened indices takes a TPU's compiler ten times as long.
    source_R = jnp.full(rows, -1, jnp.int32).at[at_NxK].set(owner_NxK, mode="drop")
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
