"""Softmax attention on every platform: (out, lse) of queries over keys under a mask, by the fastest
implementation where the program will run.

- cuDNN: on a GPU of this process, bfloat16, positions 0, 1, …, bidirectional or causal;
- our flash kernels (Mosaic, Triton): otherwise on TPU and GPU; few queries split the keys;
- XLA with the whole score matrix: short sequences in order;
- XLA tile by tile: all other cases.

Splash attention (jax.experimental.pallas.ops.tpu) is not used. It takes its mask before tracing,
while positions over cp are data, and it has no gradient where it returns the lse.

Legend: B batch, N queries, M keys, H query heads, K key/value heads, C head_dim, U parts of the
keys."""

from typing import Any

import jax
import jax.numpy as jnp

from fdp.kernels_pallas import blockwise, flash, walks
from fdp.parallel.masks import Mask

Array = jax.Array
EVERYTHING = walks.EVERYTHING
# Use tiles from this many queries; below it XLA's attention with whole scores is as fast.
LONG = 1024
FEW = 16  # queries that cannot fill an accelerator: their keys are split …
PART = 4096  # … into parts of about so many keys, each of them a sequence of its own


def attend(
    q_BxNxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    mask: Mask = EVERYTHING,
    q_position: Any = None,
    k_position: Any = None,
    q_segment: Array | None = None,
    k_segment: Array | None = None,
    *,
    out_type: Any = None,
    backend: str | None = None,
    interpret: object = False,
) -> tuple[Array, Array]:
    """Softmax attention softmax(q kᵀ/√C) v under `mask` → (out [B, N, H, C], lse f32 [B, H, N]).

    Positions (None: 0, 1, …) and segments (for a packed mask) are int [length] or [B, length] in
    any order; the mask reads them. Tiles that the mask hides are skipped; with NumPy positions that
    is decided before tracing. A row that sees no key has out = 0, lse = -inf and zero gradients.
    Differentiable in q, k, v through out and lse (cuDNN: through out only). Accumulates in f32.
    `out_type`: that of q, or float32 for partial results that will be merged. backend: "tpu", "gpu"
    or "xla", None by platform. interpret: as `pl.pallas_call` takes it, for tests.

    Raises ValueError for shapes, dtypes, masks and backends that do not fit."""
    q, k, v = q_BxNxHxC, k_BxMxKxC, v_BxMxKxC
    walks.check_arrays(q, k, v)
    backend = walks.choose_backend(backend)
    q_tags = walks.gather_tags(mask, "q", q.shape[:2], q_position, q_segment)
    k_tags = walks.gather_tags(mask, "k", k.shape[:2], k_position, k_segment)
    out_type = jnp.dtype(out_type or q.dtype)
    counted = q_position is None and k_position is None and out_type == q.dtype
    if counted and cudnn_covers(q, k, mask, backend):
        return _cudnn(q, k, v, mask)
    if counted and q.shape[1] == k.shape[1] < LONG and not interpret:
        return _whole(q, k, v, mask, q_tags, k_tags)
    if backend == "xla":
        labels = _labels(q, k, mask, q_tags, k_tags)
        return blockwise.attention_lse(q, k, v, mask, *labels, blockwise.BLOCK, out_type)
    how = {"backend": backend, "interpret": interpret, "partial": out_type == jnp.float32}
    return _kernel(q, k, v, mask, q_tags, k_tags, **how)


def attend_backward(
    q_BxNxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    out_BxNxHxC: Array,
    lse_BxHxN: Array,
    dout_BxNxHxC: Array,
    mask: Mask,
    q_position: Any = None,
    k_position: Any = None,
    q_segment: Array | None = None,
    k_segment: Array | None = None,
    *,
    backend: str | None = None,
    interpret: object = False,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) f32: the contributions of these keys, given the out and lse of each query over
    ALL keys.

    Summed over disjoint sets of keys they are the whole gradient, as a ring needs it. Arguments and
    errors as in `attend`. Source: Dao et al. 2022, alg. 4."""
    q, k, v = q_BxNxHxC, k_BxMxKxC, v_BxMxKxC
    walks.check_arrays(q, k, v)
    walks.check_results(q, out_BxNxHxC, lse_BxHxN, dout_BxNxHxC)
    backend = walks.choose_backend(backend)
    q_tags = walks.gather_tags(mask, "q", q.shape[:2], q_position, q_segment)
    k_tags = walks.gather_tags(mask, "k", k.shape[:2], k_position, k_segment)
    arrays = q, k, v, out_BxNxHxC, lse_BxHxN, dout_BxNxHxC
    if backend == "xla":
        labels = _labels(q, k, mask, q_tags, k_tags)
        return blockwise.attention_backward(*arrays, mask, *labels, blockwise.BLOCK)
    tags = _arrays(q_tags), _arrays(k_tags)
    return flash.flash_gradients(*arrays, mask, *tags, backend=backend, interpret=interpret)


def cudnn_covers(q_BxNxHxC: Array, k_BxMxKxC: Array, mask: Mask, backend: str) -> bool:
    """Whether cuDNN computes this case on the GPU of this process: 16 bit, no segments, window or
    rule, positions 0, 1, ….

    cuDNN aligns its causal mask at the first token of both sides. It cannot be compiled for a GPU
    that is absent."""
    here = backend == "gpu" and jax.default_backend() == "gpu"
    (_, N, _, C), M = q_BxNxHxC.shape, k_BxMxKxC.shape[1]
    plain = mask == Mask() or (mask == Mask("causal") and N == M)
    return here and plain and q_BxNxHxC.dtype == jnp.bfloat16 and C % 8 == 0 and C <= 128


def _cudnn(q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    causal = mask.kind == "causal"
    out, lse_BxNxH = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, implementation="cudnn", return_residual=True
    )
    return out, _constant(lse_BxNxH.swapaxes(1, 2).astype(jnp.float32))


@jax.custom_vjp
def _constant(lse: Array) -> Array:
    return lse


def _constant_backward(_: None, dlse: Array) -> tuple[Array]:
    raise ValueError("cuDNN's lse has no gradient: pass positions, which take our kernel")


_constant.defvjp(lambda lse: (lse, None), _constant_backward)


def _whole(q, k, v, mask: Mask, q_tags, k_tags) -> tuple[Array, Array]:
    """With the whole score matrix; the lse costs nothing unless it is used. Every row must see a
    key."""
    seen = None
    if mask.orders or mask.packed:
        seen = flash.seen_by(mask, *map(_arrays, (q_tags, k_tags)))
    if mask == Mask("causal"):
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    else:
        out = jax.nn.dot_product_attention(q, k, v, mask=seen)
    (B, N, H, C), K = q.shape, k.shape[2]
    s_BxKxGxNxM = jnp.einsum(
        "bnkgc,bmkc->bkgnm", q.reshape(B, N, K, H // K, C), k, preferred_element_type=jnp.float32
    ).reshape(B, H, N, -1)
    s_BxHxNxM = s_BxKxGxNxM * C**-0.5
    return out, jax.nn.logsumexp(s_BxHxNxM, axis=-1, where=seen)


def _kernel(q, k, v, mask: Mask, q_tags, k_tags, **how: Any) -> tuple[Array, Array]:
    """Our kernels. For few queries over many keys, the keys are cut into U parts, which are
    computed in parallel and merged; all query rows of a key head read a part once. Source: Dao et
    al. 2023 (Flash-Decoding)."""
    (B, N, H, C), M = q.shape, k.shape[1]
    q_tags, k_tags = _arrays(q_tags), _arrays(k_tags)
    most = M // PART if N <= FEW else 1
    U = next((u for u in range(most, 1, -1) if M % u == 0), 1)
    if U == 1:
        return flash.flash_attention(q, k, v, mask, q_tags, k_tags, **how)

    def each(x: Array) -> Array:
        return jnp.repeat(x, U, 0)

    def cut(x: Array) -> Array:
        return x.reshape(B * U, M // U, *x.shape[2:])

    q_tags = tuple(each(jnp.broadcast_to(x, (B, N))) for x in q_tags)
    k_tags = tuple(cut(jnp.broadcast_to(x, (B, M))) for x in k_tags)
    arguments = each(q), cut(k), cut(v), mask, q_tags, k_tags
    o, lse = flash.flash_attention(*arguments, **how | {"partial": True})
    out, lse = merge_parts(o.reshape(B, U, N, H, C), lse.reshape(B, U, H, N))
    return out.astype(jnp.float32 if how["partial"] else q.dtype), lse


def merge_parts(o_BxUxNxHxC: Array, lse_BxUxHxN: Array) -> tuple[Array, Array]:
    """Merge partial results over U disjoint sets of keys → f32 (out [B, N, H, C], lse [B, H,
    N])."""
    some_BxHxN = (lse_BxUxHxN > -jnp.inf).any(1)
    lse_BxHxN = jax.nn.logsumexp(jnp.where(some_BxHxN[:, None], lse_BxUxHxN, 0.0), axis=1)
    weight_BxUxHxN = jnp.exp(lse_BxUxHxN - lse_BxHxN[:, None])
    out = jnp.einsum("buhn,bunhc->bnhc", weight_BxUxHxN, o_BxUxNxHxC)
    return out, jnp.where(some_BxHxN, lse_BxHxN, -jnp.inf)


def _arrays(tags: tuple[Any, ...]) -> tuple[Array, ...]:
    return tuple(jnp.asarray(x) for x in tags)


def _labels(q: Array, k: Array, mask: Mask, q_tags: Any, k_tags: Any) -> blockwise.Labels:
    """Positions [length] or [B, length] and segments [B, length], as `blockwise` takes them."""
    q_position, k_position = (
        x[0] if x.ndim == 2 and len(x) == 1 else x for x in (q_tags[0], k_tags[0])
    )
    if not mask.packed:
        return blockwise.Labels(q_position, k_position)
    q_segment, k_segment = (
        jnp.broadcast_to(tags[1], x.shape[:2]) for tags, x in ((q_tags, q), (k_tags, k))
    )
    return blockwise.Labels(q_position, k_position, q_segment, k_segment)
