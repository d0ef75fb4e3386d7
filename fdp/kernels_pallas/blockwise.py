"""Exact attention one block of keys at a time, and the merge of partial results: the XLA path of
attention kernels.

Memory is O(S · block) forward and backward: the backward pass recomputes the probabilities from the
saved log-sum-exp. A partial result is (out, lse): softmax-normalised over the keys seen so far,
with the logarithm of its normaliser. Rows that saw no key have out 0 and lse -inf. Matmuls
accumulate in float32 whatever the input type.

Legend: B sequences, N queries, M keys, H query heads, K key/value heads, G = H/K, C head_dim, R =
G·N rows, T keys of a block."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdp.collectives import in_shard_map, vary, vary_like
from fdp.kernels_pallas.masks import Mask, allowed

Array = jax.Array

# keys of one block: scores of 512 keys stay near the cores, and the scan's overhead below 1 %
BLOCK = 512


class Labels(NamedTuple):
    """Where queries and keys stand: int positions [N] or [B, N], and [M] or [B, M]; segment ids for
    packed masks.
    """

    q_position: Array
    k_position: Array
    q_segment: Array | None = None
    k_segment: Array | None = None

    def keys(self, part: slice) -> "Labels":
        """The same queries, a part of the keys."""
        segment = None if self.k_segment is None else self.k_segment[..., part]
        return self._replace(k_position=self.k_position[..., part], k_segment=segment)


def attention_lse(
    q_BxNxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    mask: Mask,
    q_position_N: Array,
    k_position_M: Array,
    q_segment: Array | None = None,
    k_segment: Array | None = None,
    block: int = BLOCK,
    out_type: Any = None,
) -> tuple[Array, Array]:
    """Masked softmax attention and its log-sum-exp: (out_BxNxHxC, lse_BxHxN float32, natural log).

    Scores are q·k/√C. Positions may also be [B, N] and [B, M], which segment ids for a packed mask
    are. Rows without a key give out 0 and lse -inf, and no gradient. Differentiable in q, k, v
    through both results. More than `block` keys are scanned. `out_type` defaults to q's; float32
    keeps partial results exact until they are merged. Raises ValueError for shapes that do not fit.
    Source: Rabe & Staats 2021; Dao et al. 2022 (FlashAttention), alg. 1."""
    labels = Labels(q_position_N, k_position_M, q_segment, k_segment)
    _check(q_BxNxHxC, k_BxMxKxC, v_BxMxKxC, mask, labels, block)
    # Inside shard_map a custom_vjp must return cotangents that vary exactly like its arguments.
    q, k, v = vary_alike((q_BxNxHxC, k_BxMxKxC, v_BxMxKxC), labels)
    return _attention(mask, block, jnp.dtype(out_type or q.dtype), q, k, v, labels)


def attention_backward(
    q_BxNxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    out_BxNxHxC: Array,
    lse_BxHxN: Array,
    dout_BxNxHxC: Array,
    mask: Mask,
    q_position_N: Array,
    k_position_M: Array,
    q_segment: Array | None = None,
    k_segment: Array | None = None,
    block: int = BLOCK,
    dlse_BxHxN: Array | None = None,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) in float32 that these keys contribute, given each query's GLOBAL `out` and `lse`
    over all keys.

    dlse: cotangent of the global lse, None for zero. Shapes and errors as in `attention_lse`; the
    sum over disjoint sets of keys is the whole gradient, which is what a ring needs. Source: Dao et
    al. 2022, alg. 4."""
    labels = Labels(q_position_N, k_position_M, q_segment, k_segment)
    _check(q_BxNxHxC, k_BxMxKxC, v_BxMxKxC, mask, labels, block)
    arrays = (q_BxNxHxC, k_BxMxKxC, v_BxMxKxC, out_BxNxHxC, lse_BxHxN, dout_BxNxHxC)
    q, k, v, out, lse, dout = vary_alike(arrays, labels)
    return _backward(mask, block, q, k, v, labels, out, lse, dout, dlse_BxHxN)


def merge_lse(
    o1_BxNxHxC: Array, l1_BxHxN: Array, o2_BxNxHxC: Array, l2_BxHxN: Array
) -> tuple[Array, Array]:
    """Partial results over two disjoint sets of keys → the one over their union (out in o1's type,
    lse float32).

    Associative and commutative with (0, -inf) as identity, so that rings, trees and gathers agree.
    Source: Milakov & Gimelshein 2018, eq. 4."""
    top = jax.lax.stop_gradient(jnp.maximum(l1_BxHxN, l2_BxHxN))  # its gradient cancels
    top = jnp.where(top == -jnp.inf, 0.0, top)  # exp(-inf - -inf) would be NaN
    w1, w2 = jnp.exp(l1_BxHxN - top), jnp.exp(l2_BxHxN - top)
    total = w1 + w2
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    rows = lambda w_BxHxN: jnp.moveaxis(w_BxHxN / safe, 1, 2)[..., None]
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
    if labels.q_position.shape not in ((N,), (B, N)) or labels.k_position.shape not in (
        (M,),
        (B, M),
    ):
        raise ValueError(
            f"positions {labels.q_position.shape} and {labels.k_position.shape} must be [N={N}] "
            f"and [M={M}], "
            f"or one row for each of the B={B} sequences"
        )
    if mask.packed and (labels.q_segment is None or labels.k_segment is None):
        raise ValueError("a packed mask needs the segment ids of queries and keys")
    if block < 1:
        raise ValueError(f"block = {block} must be at least 1 key")


def vary_alike(arrays: Any, *others: Any) -> Any:
    """`arrays`, each marked as varying over every mesh axis over which any of them or of `others`
    does.
    """
    if not in_shard_map():
        return arrays
    axes = {axis for x in jax.tree.leaves((arrays, others)) for axis in jax.typeof(x).mat.varying}
    return vary(arrays, tuple(axes))


# Heads lead, so that every matmul below is a plain batched one and no score is ever transposed
# -----------------------


def _query_rows(x_BxNxHxC: Array, K: int) -> Array:
    """[B, N, H, C] → [B, K, G·N, C]: the G query heads of a key head are rows of one matmul; keys
    are not repeated.
    """
    B, N, H, C = x_BxNxHxC.shape
    return jnp.moveaxis(x_BxNxHxC, 1, 2).reshape(B, K, H // K * N, C)


def _from_query_rows(x_BxKxRxC: Array, N: int) -> Array:
    B, K, R, C = x_BxKxRxC.shape
    return jnp.moveaxis(x_BxKxRxC.reshape(B, K * R // N, N, C), 2, 1)


def _scores(mask: Mask, q_BxKxRxC: Array, k_BxKxTxC: Array, labels: Labels) -> Array:
    """float32 [B, K, R, T] scores of scaled queries, -inf where a key may not be seen."""
    s_BxKxRxT = jnp.einsum(
        "bkrc,bktc->bkrt", q_BxKxRxC, k_BxKxTxC, preferred_element_type=jnp.float32
    )
    if mask.everything:
        return s_BxKxRxT
    seen = allowed(mask, *labels)  # [N, T], or [B, N, T] with segments
    B, K, R, T = s_BxKxRxT.shape
    N = seen.shape[-2]
    seen = seen.reshape(-1, 1, 1, N, T)
    return jnp.where(seen, s_BxKxRxT.reshape(B, K, R // N, N, T), -jnp.inf).reshape(B, K, R, T)


def _over_blocks(
    step: Callable[..., Any], carry: Any, block: int, k: Array, v: Array, labels: Labels
) -> Any:
    """Fold `step(carry, k_BxKxTxC, v_BxKxTxC, labels) -> (carry, y)` over blocks of keys; ys joined
    along dim 2.

    Whole blocks are scanned; what is left over, or the only block, is one more step.
    """
    B, K, M, C = k.shape
    n = M // block
    whole = n * block if n > 1 else 0
    ys = []
    if whole:
        cut = lambda x, i: jax.lax.dynamic_slice_in_dim(x, i * block, block, 2)
        label = lambda x, i: jax.lax.dynamic_slice_in_dim(x, i * block, block, -1)

        def body(carry: Any, i: Array) -> tuple[Any, Any]:
            segment = None if labels.k_segment is None else label(labels.k_segment, i)
            part = labels._replace(k_position=label(labels.k_position, i), k_segment=segment)
            return step(carry, cut(k, i), cut(v, i), part)

        carry, y = jax.lax.scan(body, carry, jnp.arange(n))
        ys.append(jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2).reshape(B, K, whole, C), y))
    if whole < M:
        carry, y = step(carry, k[:, :, whole:], v[:, :, whole:], labels.keys(slice(whole, None)))
        ys.append(y)
    return carry, jax.tree.map(lambda *a: jnp.concatenate(a, 2) if len(a) > 1 else a[0], *ys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(
    mask: Mask, block: int, out_type: Any, q: Array, k: Array, v: Array, labels: Labels
) -> tuple[Array, Array]:
    return _forward(mask, block, out_type, q, k, v, labels)


def _forward(
    mask: Mask, block: int, out_type: Any, q: Array, k: Array, v: Array, labels: Labels
) -> tuple[Array, Array]:
    (B, N, H, C), K = q.shape, k.shape[2]
    q_BxKxRxC = _query_rows(q * jnp.asarray(C**-0.5, q.dtype), K)
    k_BxKxMxC, v_BxKxMxC = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    zero = vary_like(jnp.zeros(q_BxKxRxC.shape, jnp.float32), q)

    def step(carry: Any, k_BxKxTxC: Array, v_BxKxTxC: Array, part: Labels) -> tuple[Any, None]:
        top, total, sum_BxKxRxC = carry
        s_BxKxRxT = _scores(mask, q_BxKxRxC, k_BxKxTxC, part)
        new_top = jnp.maximum(top, s_BxKxRxT.max(-1))
        safe = jnp.where(
            new_top == -jnp.inf, 0.0, new_top
        )  # no key yet: exp(-inf - 0) = 0, never NaN
        p_BxKxRxT = jnp.exp(s_BxKxRxT - safe[..., None])
        shrink = jnp.exp(top - safe)
        product = jnp.einsum(
            "bkrt,bktc->bkrc",
            p_BxKxRxT.astype(v.dtype),
            v_BxKxTxC,
            preferred_element_type=jnp.float32,
        )
        return (
            new_top,
            total * shrink + p_BxKxRxT.sum(-1),
            sum_BxKxRxC * shrink[..., None] + product,
        ), None

    start = (zero[..., 0] - jnp.inf, zero[..., 0], zero)
    (top, total, sum_BxKxRxC), _ = _over_blocks(step, start, block, k_BxKxMxC, v_BxKxMxC, labels)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = _from_query_rows((sum_BxKxRxC / total[..., None]).astype(out_type), N)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return out, lse.reshape(B, H, N)


def _backward(
    mask: Mask,
    block: int,
    q: Array,
    k: Array,
    v: Array,
    labels: Labels,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Any,
) -> tuple[Array, Array, Array]:
    (B, N, H, C), K = q.shape, k.shape[2]
    scale = C**-0.5
    rows = lambda x_BxHxN: x_BxHxN.reshape(B, K, H // K * N)[..., None]
    delta_BxHxN = jnp.einsum("bnhc,bnhc->bhn", dout, out, preferred_element_type=jnp.float32)
    delta = rows(delta_BxHxN if dlse is None else delta_BxHxN - dlse)
    lse = rows(jnp.where(lse == -jnp.inf, jnp.inf, lse))  # rows without a key: exp(s - inf) = 0
    q_BxKxRxC = _query_rows(q * jnp.asarray(scale, q.dtype), K)
    dout_BxKxRxC = _query_rows(dout.astype(v.dtype), K)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def step(
        dq_BxKxRxC: Array, k_BxKxTxC: Array, v_BxKxTxC: Array, part: Labels
    ) -> tuple[Array, Any]:
        p_BxKxRxT = jnp.exp(_scores(mask, q_BxKxRxC, k_BxKxTxC, part) - lse)
        dp_BxKxRxT = dot("bkrc,bktc->bkrt", dout_BxKxRxC, v_BxKxTxC)
        ds_BxKxRxT = (p_BxKxRxT * (dp_BxKxRxT - delta)).astype(q.dtype)
        dv_BxKxTxC = dot("bkrt,bkrc->bktc", p_BxKxRxT.astype(v.dtype), dout_BxKxRxC)
        dk_BxKxTxC = dot("bkrt,bkrc->bktc", ds_BxKxRxT, q_BxKxRxC)
        return dq_BxKxRxC + dot("bkrt,bktc->bkrc", ds_BxKxRxT, k_BxKxTxC), (dk_BxKxTxC, dv_BxKxTxC)

    start = vary_like(jnp.zeros(q_BxKxRxC.shape, jnp.float32), q)
    dq_BxKxRxC, (dk, dv) = _over_blocks(
        step, start, block, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), labels
    )
    return _from_query_rows(dq_BxKxRxC * scale, N), jnp.moveaxis(dk, 2, 1), jnp.moveaxis(dv, 2, 1)


def _attention_forward(
    mask: Mask, block: int, out_type: Any, q: Array, k: Array, v: Array, labels: Labels
) -> Any:
    out, lse = _forward(mask, block, out_type, q, k, v, labels)
    return (out, lse), (q, k, v, labels, out, lse)


def _attention_backward(
    mask: Mask, block: int, out_type: Any, residuals: Any, cotangents: Any
) -> tuple[Any, ...]:
    q, k, v, labels, out, lse = residuals
    dq, dk, dv = _backward(mask, block, q, k, v, labels, out, lse, *cotangents)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)
