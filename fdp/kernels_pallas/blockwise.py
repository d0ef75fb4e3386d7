"""Exact attention computed tile by tile in XLA, and the merge of partial results.

Tiles that the mask hides are skipped, forward and backward. Where positions are known before
tracing (NumPy), the loop has as many steps as there are visible tiles, and its FLOPs can be
counted. With traced positions or segments this is decided at run time, and the loop states an upper
bound of its steps.

Memory is O(N + M) and one tile of scores: the backward pass recomputes the probabilities from the
saved log-sum-exp. A partial result is (out, lse): out is normalised over the keys seen so far, and
lse is the logarithm of its normaliser. Rows that saw no key have out 0 and lse -inf. Matmuls
accumulate in float32 for any input type. A tile has X queries and Y keys; I and J number the tiles,
and R = H/K·X are the rows of a tile.

Legend: B sequences, N queries, M keys, H query heads, K key/value heads, C head_dim, X queries of a
tile, Y keys of a tile."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdp.collectives import in_shard_map, vary, vary_like
from fdp.parallel.masks import Mask, allowed, tiles_meet

Array = jax.Array

# Queries and keys of one tile: scores of a head stay near its core, and a step costs more than its
# overhead.
BLOCK = 256
AT_MOST = "at_most"  # scope of a loop whose steps are data: at_most_36 takes 36 steps or fewer


class Labels(NamedTuple):
    """Positions of queries and keys: int [N] or [B, N], and [M] or [B, M]; segment ids for packed
    masks. NumPy positions are known before tracing."""

    q_position: Any
    k_position: Any
    q_segment: Any = None
    k_segment: Any = None


@dataclass(frozen=True)
class Tiling:
    """What is known before tracing: the mask, X and Y, and the pairs (i, j) of tiles that may meet.
    decided: whether all of these pairs do meet, so that nothing is decided at run time."""

    mask: Mask
    queries: int
    keys: int
    pairs: tuple[tuple[int, int], ...]
    decided: bool


def attention_lse(
    q_BxNxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    mask: Mask,
    q_position_N: Any,
    k_position_M: Any,
    q_segment: Any = None,
    k_segment: Any = None,
    block: int = BLOCK,
    out_type: Any = None,
) -> tuple[Array, Array]:
    """Masked softmax attention and its log-sum-exp: (out_BxNxHxC, lse_BxHxN float32, natural log).

    Scores are q·k/√C. Positions may be [B, N] and [B, M]; segment ids for a packed mask always are.
    Rows without a key have out 0, lse -inf and no gradient. Differentiable in q, k, v through both
    results. A tile has at most `block` queries and keys. `out_type` defaults to q's; float32 keeps
    partial results exact until they are merged. Raises ValueError for shapes that do not fit.
    Source: Rabe & Staats 2021; Dao et al. 2022 (FlashAttention), alg. 1."""
    labels = Labels(q_position_N, k_position_M, q_segment, k_segment)
    _check(q_BxNxHxC, k_BxMxKxC, v_BxMxKxC, mask, labels, block)
    tiling = tile(mask, labels, q_BxNxHxC.shape[1], k_BxMxKxC.shape[1], block)
    labels = Labels(*jax.tree.map(jnp.asarray, labels))
    # Inside shard_map a custom_vjp must return cotangents that vary exactly like its arguments.
    q, k, v = vary_alike((q_BxNxHxC, k_BxMxKxC, v_BxMxKxC), labels)
    return _attention(tiling, jnp.dtype(out_type or q.dtype), q, k, v, labels)


def attention_backward(
    q_BxNxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    out_BxNxHxC: Array,
    lse_BxHxN: Array,
    dout_BxNxHxC: Array,
    mask: Mask,
    q_position_N: Any,
    k_position_M: Any,
    q_segment: Any = None,
    k_segment: Any = None,
    block: int = BLOCK,
    dlse_BxHxN: Array | None = None,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) in float32: the contributions of these keys, given the GLOBAL `out` and `lse` of
    each query over all keys.

    Summed over disjoint sets of keys they are the whole gradient, as a ring needs it. dlse:
    cotangent of the global lse, None for zero. Shapes and errors as in `attention_lse`. Source: Dao
    et al. 2022, alg. 4."""
    labels = Labels(q_position_N, k_position_M, q_segment, k_segment)
    _check(q_BxNxHxC, k_BxMxKxC, v_BxMxKxC, mask, labels, block)
    tiling = tile(mask, labels, q_BxNxHxC.shape[1], k_BxMxKxC.shape[1], block)
    labels = Labels(*jax.tree.map(jnp.asarray, labels))
    arrays = (q_BxNxHxC, k_BxMxKxC, v_BxMxKxC, out_BxNxHxC, lse_BxHxN, dout_BxNxHxC)
    q, k, v, out, lse, dout = vary_alike(arrays, labels)
    return _backward(tiling, q, k, v, labels, out, lse, dout, dlse_BxHxN)


def merge_lse(
    o1_BxNxHxC: Array, l1_BxHxN: Array, o2_BxNxHxC: Array, l2_BxHxN: Array
) -> tuple[Array, Array]:
    """Merge partial results over two disjoint sets of keys (out in o1's type, lse float32).

    Associative and commutative with (0, -inf) as identity, so rings, trees and gathers give the
    same result. Source: Milakov & Gimelshein 2018, eq. 4."""
    top = lax.stop_gradient(jnp.maximum(l1_BxHxN, l2_BxHxN))  # its gradient cancels
    top = jnp.where(top == -jnp.inf, 0.0, top)  # exp(-inf - -inf) would be NaN
    w1, w2 = jnp.exp(l1_BxHxN - top), jnp.exp(l2_BxHxN - top)
    total = w1 + w2
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)

    def rows(w_BxHxN: Array) -> Array:
        return jnp.moveaxis(w_BxHxN / safe, 1, 2)[..., None]

    out = rows(w1) * o1_BxNxHxC.astype(jnp.float32) + rows(w2) * o2_BxNxHxC.astype(jnp.float32)
    return out.astype(o1_BxNxHxC.dtype), jnp.where(empty, -jnp.inf, top + jnp.log(safe))


def _check(q: Array, k: Array, v: Array, mask: Mask, labels: Labels, block: int) -> None:
    (B, N, H, C), (_, M, K, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape != (B, M, K, C):
        raise ValueError(
            f"k {k.shape} and v {v.shape} must both be [B={B}, M, K, C={C}], as q is {q.shape}"
        )
    if H % K:
        raise ValueError(f"{H} query heads are not divisible by {K} key/value heads")
    q_shape, k_shape = labels.q_position.shape, labels.k_position.shape
    if q_shape not in ((N,), (B, N)) or k_shape not in ((M,), (B, M)):
        raise ValueError(
            f"positions {q_shape} and {k_shape} must be [N={N}] and [M={M}], or one row for each "
            f"of the B={B} sequences"
        )
    if mask.packed and (labels.q_segment is None or labels.k_segment is None):
        raise ValueError("a packed mask needs the segment ids of queries and keys")
    if block < 1:
        raise ValueError(f"block = {block} must be at least 1 key")


def vary_alike(arrays: Any, *others: Any) -> Any:
    """`arrays`, each marked as varying over every mesh axis over which any of them or of `others`
    varies."""
    if not in_shard_map():
        return arrays
    axes = {axis for x in jax.tree.leaves((arrays, others)) for axis in jax.typeof(x).mat.varying}
    return vary(arrays, tuple(axes))


# Which tiles meet
# -------------------------------------------------------------------------------------------------


def tile(mask: Mask, labels: Labels, N: int, M: int, block: int = BLOCK) -> Tiling:
    """The tiles of N queries and M keys: equal tiles of at most `block`, the last one padded. Pairs
    of tiles are judged here for NumPy positions, at run time for others."""
    X, Y = (-(-length // -(-length // block)) for length in (N, M))
    I, J = -(-N // X), -(-M // Y)
    positions = labels.q_position, labels.k_position
    known = not mask.orders or all(isinstance(x, np.ndarray) for x in positions)
    live_IxJ = np.ones((I, J), bool)
    if known and mask.orders:
        live_IxJ &= _meet(mask, labels, X, Y, np)
    pairs = tuple((int(i), int(j)) for i, j in np.argwhere(live_IxJ))
    decided = (known and not mask.packed) or I * J == 1
    return Tiling(mask, X, Y, pairs, decided)


def tiles_computed(mask: Mask, q_position_N: Any, k_position_M: Any, block: int = BLOCK) -> int:
    """Number of tiles of `block` queries and keys that the program computes at these positions, by
    the same rule as at run time, in NumPy."""
    labels = Labels(np.asarray(q_position_N), np.asarray(k_position_M))
    return len(tile(mask, labels, len(q_position_N), len(k_position_M), block).pairs)


def _meet(mask: Mask, labels: Labels, X: int, Y: int, xp: Any) -> Any:
    """Whether a pair of tiles meets in any sequence: bool [I, J]."""

    def ends(label: Any, size: int, keys: int) -> tuple[Any, Any]:
        """(least, greatest) of each tile, over all sequences: [I, 1] or [1, J]."""
        tiled = _tiled(label, -1, size, xp, mode="edge")
        least, most = tiled.min(-1), tiled.max(-1)
        least, most = (x if x.ndim == 1 else f(x, 0) for x, f in ((least, xp.min), (most, xp.max)))
        return xp.expand_dims(least, 1 - keys), xp.expand_dims(most, 1 - keys)

    q_position, k_position, q_segment, k_segment = labels
    position = *ends(q_position, X, 0), *ends(k_position, Y, 1)
    segments = None
    if mask.packed and xp is jnp:
        segments = *ends(q_segment, X, 0), *ends(k_segment, Y, 1)
    return tiles_meet(mask, *position, segments)


def _over_tiles(step: Callable[..., Any], carry: Any, tiling: Tiling, labels: Labels) -> Any:
    """Fold step(carry, i, j) over the pairs of tiles that meet.

    A single pair is computed without a loop. Decided pairs are scanned. Otherwise the pairs that
    meet are sorted to the front, and the loop runs over these."""
    if tiling.decided and len(tiling.pairs) == 1:
        return step(carry, *tiling.pairs[0])
    pairs_Px2 = jnp.asarray(np.array(tiling.pairs, np.int32).reshape(-1, 2))
    if tiling.decided:
        return lax.scan(lambda c, pair: (step(c, pair[0], pair[1]), None), carry, pairs_Px2)[0]
    live_P = _meet(tiling.mask, labels, tiling.queries, tiling.keys, jnp)
    live_P = live_P[pairs_Px2[:, 0], pairs_Px2[:, 1]]
    pairs_Px2 = pairs_Px2[jnp.argsort(~live_P, stable=True)]

    def body(t: Array, carry: Any) -> Any:
        return step(carry, *lax.dynamic_index_in_dim(pairs_Px2, t, keepdims=False))

    with jax.named_scope(f"{AT_MOST}_{len(tiling.pairs)}"):
        return lax.fori_loop(0, live_P.sum(dtype=jnp.int32), body, carry)


# Tiles lead, then heads, so that every matmul below is a plain batched one
# -------------------------------------------------------------------------------------------------


def _tiled(x: Any, dim: int, size: int, xp: Any = jnp, **padding: Any) -> Any:
    """`dim` of x as (tiles, size), padded to whole tiles."""
    dim %= x.ndim
    missing = -x.shape[dim] % size
    if missing:
        x = xp.pad(x, [(0, missing if d == dim else 0) for d in range(x.ndim)], **padding)
    return x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :])


def _query_tiles(x_BxNxHxC: Array, K: int, X: int) -> Array:
    """[B, N, H, C] → [I, B, K, R, C]: the query heads of a key head become rows of one matmul, so
    keys are not repeated."""
    x = _tiled(x_BxNxHxC, 1, X)
    B, I, _, H, C = x.shape
    x = x.reshape(B, I, X, K, H // K, C).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(I, B, K, H // K * X, C)


def _from_query_tiles(x_IxBxKxRxC: Array, N: int, X: int) -> Array:
    """[I, B, K, R, C] → [B, N, H, C]."""
    I, B, K, R, C = x_IxBxKxRxC.shape
    x = x_IxBxKxRxC.reshape(I, B, K, R // X, X, C).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, I * X, K * R // X, C)[:, :N]


def _key_tiles(x_BxMxKxC: Array, Y: int) -> Array:
    """[B, M, K, C] → [J, B, K, Y, C]."""
    return _tiled(x_BxMxKxC, 1, Y).transpose(1, 0, 3, 2, 4)


def _from_key_tiles(x_JxBxKxYxC: Array, M: int) -> Array:
    J, B, K, Y, C = x_JxBxKxYxC.shape
    return x_JxBxKxYxC.transpose(1, 0, 3, 2, 4).reshape(B, J * Y, K, C)[:, :M]


def _row_tiles(x_BxHxN: Array, K: int, X: int) -> Array:
    """[B, H, N] → [I, B, K, R]."""
    return _query_tiles(jnp.moveaxis(x_BxHxN, 1, 2)[..., None], K, X)[..., 0]


def _at(x: Any, i: Any) -> Any:
    """Tile i of every array."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), x)


def _put(x: Any, tile: Any, i: Any) -> Any:
    """Every array with tile i replaced."""
    return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, i, 0), x, tile)


def _sight(tiling: Tiling, labels: Labels, M: int) -> Callable[..., Array | None]:
    """(i, j) → which keys of tile j the rows of tile i see, bool [1 or B, 1, 1, X, Y]; None =
    all."""
    mask, X, Y = tiling.mask, tiling.queries, tiling.keys

    def tags(label: Any, size: int) -> Any:
        return None if label is None else jnp.moveaxis(_tiled(label, -1, size), -2, 0)

    q_tags, k_tags = (
        (tags(position, size), tags(segment if mask.packed else None, size))
        for position, segment, size in (
            (labels.q_position, labels.q_segment, X),
            (labels.k_position, labels.k_segment, Y),
        )
    )

    def seen(i: Any, j: Any) -> Array | None:
        see = None
        if not mask.everything:
            (q_position, q_segment), (k_position, k_segment) = _at(q_tags, i), _at(k_tags, j)
            see = allowed(mask, q_position, k_position, q_segment, k_segment)
        if M % Y:
            real = jnp.broadcast_to(j * Y + jnp.arange(Y) < M, (X, Y))
            see = real if see is None else see & real
        return None if see is None else see.reshape(-1, 1, 1, X, Y)

    return seen


def _scores(q_BxKxRxC: Array, k_BxKxYxC: Array, seen: Array | None) -> Array:
    """float32 [B, K, R, Y] scores of scaled queries, -inf where a key may not be seen."""
    s_BxKxRxY = _dot("bkrc,bkyc->bkry", q_BxKxRxC, k_BxKxYxC)
    if seen is None:
        return s_BxKxRxY
    B, K, R, Y = s_BxKxRxY.shape
    X = seen.shape[-2]
    s = jnp.where(seen, s_BxKxRxY.reshape(B, K, R // X, X, Y), -jnp.inf)
    return s.reshape(B, K, R, Y)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    tiling: Tiling, out_type: Any, q: Array, k: Array, v: Array, labels: Labels
) -> tuple[Array, Array]:
    return _forward(tiling, out_type, q, k, v, labels)


def _forward(
    tiling: Tiling, out_type: Any, q: Array, k: Array, v: Array, labels: Labels
) -> tuple[Array, Array]:
    (_, N, _, C), (_, M, K, _) = q.shape, k.shape
    X, Y = tiling.queries, tiling.keys
    q_IxBxKxRxC = _query_tiles(q * jnp.asarray(C**-0.5, q.dtype), K, X)
    keys = _key_tiles(k, Y), _key_tiles(v, Y)
    seen = _sight(tiling, labels, M)

    def step(state: Any, i: Any, j: Any) -> Any:
        top, total, sum_BxKxRxC = _at(state, i)
        k_BxKxYxC, v_BxKxYxC = _at(keys, j)
        s_BxKxRxY = _scores(_at(q_IxBxKxRxC, i), k_BxKxYxC, seen(i, j))
        new_top = jnp.maximum(top, s_BxKxRxY.max(-1))
        safe = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # no key yet: exp(-inf - 0) = 0
        p_BxKxRxY = jnp.exp(s_BxKxRxY - safe[..., None])
        shrink = jnp.exp(top - safe)
        product = _dot("bkry,bkyc->bkrc", p_BxKxRxY.astype(v.dtype), v_BxKxYxC)
        total = total * shrink + p_BxKxRxY.sum(-1)
        return _put(state, (new_top, total, sum_BxKxRxC * shrink[..., None] + product), i)

    zero = vary_like(jnp.zeros(q_IxBxKxRxC.shape, jnp.float32), q)
    start = (zero[..., 0] - jnp.inf, zero[..., 0], zero)
    top, total, sum_IxBxKxRxC = _over_tiles(step, start, tiling, labels)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = _from_query_tiles((sum_IxBxKxRxC / total[..., None]).astype(out_type), N, X)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return out, jnp.moveaxis(_from_query_tiles(lse[..., None], N, X)[..., 0], 1, 2)


def _backward(
    tiling: Tiling,
    q: Array,
    k: Array,
    v: Array,
    labels: Labels,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Any,
) -> tuple[Array, Array, Array]:
    (_, N, _, C), (_, M, K, _) = q.shape, k.shape
    X, Y = tiling.queries, tiling.keys
    scale = C**-0.5
    delta_BxHxN = jnp.einsum("bnhc,bnhc->bhn", dout, out, preferred_element_type=jnp.float32)
    delta_BxHxN = delta_BxHxN if dlse is None else delta_BxHxN - dlse
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # rows without a key: exp(s - inf) = 0
    queries = (
        _query_tiles(q * jnp.asarray(scale, q.dtype), K, X),
        _query_tiles(dout.astype(v.dtype), K, X),
        _row_tiles(lse, K, X)[..., None],
        _row_tiles(delta_BxHxN, K, X)[..., None],
    )
    keys = _key_tiles(k, Y), _key_tiles(v, Y)
    seen = _sight(tiling, labels, M)

    def step(sums: Any, i: Any, j: Any) -> Any:
        q_BxKxRxC, dout_BxKxRxC, lse, delta = _at(queries, i)
        k_BxKxYxC, v_BxKxYxC = _at(keys, j)
        p_BxKxRxY = jnp.exp(_scores(q_BxKxRxC, k_BxKxYxC, seen(i, j)) - lse)
        dp_BxKxRxY = _dot("bkrc,bkyc->bkry", dout_BxKxRxC, v_BxKxYxC)
        ds_BxKxRxY = (p_BxKxRxY * (dp_BxKxRxY - delta)).astype(q.dtype)
        dq = _at(sums[0], i) + _dot("bkry,bkyc->bkrc", ds_BxKxRxY, k_BxKxYxC)
        dk = _at(sums[1], j) + _dot("bkry,bkrc->bkyc", ds_BxKxRxY, q_BxKxRxC)
        dv = _at(sums[2], j) + _dot("bkry,bkrc->bkyc", p_BxKxRxY.astype(v.dtype), dout_BxKxRxC)
        return _put(sums[0], dq, i), _put(sums[1], dk, j), _put(sums[2], dv, j)

    start = tuple(vary_like(jnp.zeros(x.shape, jnp.float32), x) for x in (queries[0], *keys))
    dq, dk, dv = _over_tiles(step, start, tiling, labels)
    return (_from_query_tiles(dq * scale, N, X), _from_key_tiles(dk, M), _from_key_tiles(dv, M))


def _attention_forward(
    tiling: Tiling, out_type: Any, q: Array, k: Array, v: Array, labels: Labels
) -> Any:
    out, lse = _forward(tiling, out_type, q, k, v, labels)
    return (out, lse), (q, k, v, labels, out, lse)


def _attention_backward(
    tiling: Tiling, out_type: Any, residuals: Any, cotangents: Any
) -> tuple[Any, ...]:
    q, k, v, labels, out, lse = residuals
    dq, dk, dv = _backward(tiling, q, k, v, labels, out, lse, *cotangents)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)
