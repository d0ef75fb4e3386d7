"""Attention of a few new queries over a long key/value cache, split along the keys.

A handful of rows cannot fill an accelerator: the cache is cut into chunks, each chunk is a program
of its own, and the partial (out, lse) are merged. All T·G rows of a key head share one read of its
keys. Inference only: no gradient.

Legend: B batch, T new queries, H query heads, K key/value heads, G = H/K, C head_dim, M slots of
the cache, U chunks."""

import jax
import jax.numpy as jnp

from fdp.kernels_pallas import core, tiles
from fdp.kernels_pallas.masks import Mask

Array = jax.Array
MOST_QUERIES = 16
CHUNK = 4096  # keys of a chunk: at 128K keys, 32 chunks for each sequence and head


def decode_attention(
    q_BxTxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    length_B: Array,
    *,
    window: int = 0,
    chunk: int = CHUNK,
    backend: str | None = None,
    interpret: object = False,
) -> tuple[Array, Array]:
    """Causal attention of the last T ≤ 16 tokens over a cache → (out [B, T, H, C] like q, lse f32
    [B, H, T]).

    length_B int: valid slots 0 … length-1 of each sequence, the T new tokens included, so that
    query t stands at length - T + t; slots past the length may hold any finite value. A query
    before the start (length < T - t) has out = 0 and lse = -inf. window w > 0: the last w keys
    only. chunk: keys per partial result, cut down to whole tiles; a multiple of it as M avoids a
    padded copy of the cache. Raises ValueError for shapes that do not fit and more than 16 queries
    (use `flash_attention`). Source: Dao et al. 2023 (Flash-Decoding)."""
    core.check_arrays(q_BxTxHxC, k_BxMxKxC, v_BxMxKxC)
    B, T = q_BxTxHxC.shape[:2]
    if T > MOST_QUERIES:
        raise ValueError(
            f"T = {T} queries exceed the {MOST_QUERIES} of a decode step: use flash_attention"
        )
    if length_B.shape != (B,) or not jnp.issubdtype(length_B.dtype, jnp.integer):
        raise ValueError(
            f"length_B is {length_B.dtype} {length_B.shape} but must be int [B] with B = {B}"
        )
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} must be at least 1 key")
    mask = Mask("causal", window=window)
    q_position_BxT = length_B[:, None].astype(jnp.int32) + jnp.arange(-T, 0)
    backend = core.choose_backend(backend)
    if backend == "xla":
        return _on_xla(q_BxTxHxC, k_BxMxKxC, v_BxMxKxC, mask, q_position_BxT)
    return _on_kernel(
        q_BxTxHxC, k_BxMxKxC, v_BxMxKxC, mask, q_position_BxT, chunk, backend, interpret
    )


def _on_xla(q_BxTxHxC, k_BxMxKxC, v_BxMxKxC, mask, q_position_BxT) -> tuple[Array, Array]:
    from fdp.kernels_pallas.flash import flash_attention

    return flash_attention(q_BxTxHxC, k_BxMxKxC, v_BxMxKxC, mask, q_position_BxT, backend="xla")


def _on_kernel(q_BxTxHxC, k_BxMxKxC, v_BxMxKxC, mask, q_position_BxT, chunk, backend, interpret):
    (B, T, H, C), (M, K) = q_BxTxHxC.shape, k_BxMxKxC.shape[1:3]
    width = tiles.power_of_two(C, 16)
    X = tiles.power_of_two(T * (H // K), 16)
    Y = min(512 if backend == "tpu" else 64, tiles.power_of_two(M, 128 if backend == "tpu" else 16))
    per_chunk = max(1, min(chunk, M) // Y)  # tiles
    U = tiles.ceil_div(M, per_chunk * Y)
    q, k, v = (tiles.pad_dim(x, 3, width) for x in (q_BxTxHxC, k_BxMxKxC, v_BxMxKxC))
    k, v = (tiles.pad_dim(x, 1, U * per_chunk * Y) for x in (k, v))
    # A chunk is a sequence of its own: [B·U, per_chunk·Y, K, C], with the queries of its sequence.
    k, v = (tiles.tile_keys(x.reshape(B * U, per_chunk * Y, K, width), Y, backend) for x in (k, v))
    q_ZxIxXxC = tiles.fold_queries(q, K, X)
    each = lambda x: jnp.broadcast_to(x[:, None], (B, U, *x.shape[1:])).reshape(B * U, *x.shape[1:])
    rows = each(q_ZxIxXxC.reshape(B, K, 1, X, width)).reshape(B * U * K, 1, X, width)
    q_tags = tiles.tile_tags((each(q_position_BxT),), H // K, X, B * U)
    slots = jnp.arange(U * per_chunk * Y).reshape(U, per_chunk * Y)
    k_tags = tiles.tile_tags((jnp.tile(slots, (B, 1)),), 1, Y, B * U)
    # No key is padding to the kernel: what lies past the length is in the future of every query.
    spec = tiles.Spec(mask, C**-0.5, per_chunk * Y, backend, interpret, partial=True)
    walk = tiles.range_walk(mask, q_tags, k_tags, True)
    o, lse = core.forward(spec, rows, k, v, q_tags, k_tags, walk)
    out, lse = _merge(o.reshape(B, U, K, X, width), lse.reshape(B, U, K, X, 1))
    out, lse = (tiles.unfold_queries(x.reshape(B * K, 1, X, -1), B, T, H) for x in (out, lse))
    return out[..., :C].astype(q_BxTxHxC.dtype), lse[..., 0].swapaxes(1, 2)


def _merge(o_BxUxKxXxC: Array, lse_BxUxKxXx1: Array) -> tuple[Array, Array]:
    """Partial results of disjoint keys → f32 (out [B, K, X, C], lse [B, K, X, 1]); -inf marks a
    chunk with no key.
    """
    top = lse_BxUxKxXx1.max(1, keepdims=True)
    weight = jnp.exp(lse_BxUxKxXx1 - jnp.where(top == -jnp.inf, 0.0, top))
    total = weight.sum(1)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    out = (weight * o_BxUxKxXxC).sum(1) / safe
    return out, jnp.where(some, top[:, 0] + jnp.log(safe), -jnp.inf)
