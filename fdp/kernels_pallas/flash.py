"""Flash attention by TPU and GPU kernels, forward and backward, with the log-sum-exp that is needed
to merge partial results; and the oracle of all attention.

Call `fdp.kernels_pallas.attend` instead, which checks arguments and chooses the platform.

Legend: B batch, N queries, M keys, H query heads, K key/value heads, C head_dim."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdp.kernels_pallas import tiles, walks
from fdp.parallel.masks import Mask, allowed

Array = jax.Array
Tags = tuple[Array, ...]  # positions, and segments for a packed mask: see `walks.gather_tags`


def reference(
    q_BxNxHxC: Array, k_BxMxKxC: Array, v_BxMxKxC: Array, seen_NxM: Array
) -> tuple[Array, Array]:
    """The oracle: softmax attention with the whole score matrix, f32. seen: bool, broadcastable to
    [B, H, N, M].

    Returns (out f32 [B, N, H, C], lse f32 [B, H, N]). A row that sees nothing has out = 0, lse =
    -inf and no gradient."""
    q, k, v = (x.astype(jnp.float32) for x in (q_BxNxHxC, k_BxMxKxC, v_BxMxKxC))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    s_BxHxNxM = jnp.einsum("bnhc,bmhc->bhnm", q, k, precision="highest") * q.shape[3] ** -0.5
    seen = jnp.broadcast_to(seen_NxM, s_BxHxNxM.shape)
    some_BxHxN = seen.any(-1)
    # Masking before and after the exponential keeps -inf, and with it NaN, out of the gradient.
    s_BxHxNxM = jnp.where(seen, s_BxHxNxM, -1e30)
    top_BxHxN = jax.lax.stop_gradient(s_BxHxNxM.max(-1))
    p_BxHxNxM = jnp.where(seen, jnp.exp(s_BxHxNxM - top_BxHxN[..., None]), 0.0)
    l_BxHxN = jnp.where(some_BxHxN, p_BxHxNxM.sum(-1), 1.0)
    out = jnp.einsum("bhnm,bmhc->bnhc", p_BxHxNxM / l_BxHxN[..., None], v, precision="highest")
    return out, jnp.where(some_BxHxN, top_BxHxN + jnp.log(l_BxHxN), -jnp.inf)


def seen_by(mask: Mask, q_tags: Tags, k_tags: Tags) -> Array:
    """`allowed` in the shape that `reference` takes: bool [1 or B, 1, N, M]."""
    seen = allowed(mask, q_tags[0], k_tags[0], *(x[1] for x in (q_tags, k_tags) if mask.packed))
    return seen.reshape(-1, 1, *seen.shape[-2:])


def tile_sizes(backend: str, rows: int, keys: int, C: int, dtype) -> tuple[int, int]:
    """(X, Y): rows and keys of a tile. Triton: powers of two that leave two stages in an H100's
    shared memory.
    """
    if backend == "tpu":
        return min(512, 16 * tiles.ceil_div(rows, 16)), min(512, 128 * tiles.ceil_div(keys, 128))
    small = dtype == jnp.float32 or C > 128
    X, Y = (64, 32) if small else (128, 64)
    return min(X, tiles.power_of_two(rows, 16)), min(Y, tiles.power_of_two(keys, 16))


class Folded(NamedTuple):
    """The arguments of the kernels: rows and keys in tiles, their tags, and both walks; see
    `walks`."""

    q: Array
    k: Array
    v: Array
    q_tags: Array
    k_tags: Array
    rows: tiles.Walk
    keys: tiles.Walk


def _fold(q, k, v, mask: Mask, q_tags: Tags, k_tags: Tags, backend: str) -> Folded:
    (B, N, H, C), (M, K) = q.shape, k.shape[1:3]
    width = tiles.power_of_two(C, 16)
    X, Y = tile_sizes(backend, N * (H // K), M, width, q.dtype)
    q_tiles, k_tiles = tiles.tile_tags(q_tags, H // K, X, B), tiles.tile_tags(k_tags, 1, Y, B)
    q, k, v = (tiles.pad_dim(x, 3, width) for x in (q, k, v))
    return Folded(
        tiles.fold_queries(q, K, X),
        tiles.tile_keys(k, Y, backend),
        tiles.tile_keys(v, Y, backend),
        q_tiles,
        k_tiles,
        tiles.range_walk(mask, q_tiles, k_tiles, True),
        tiles.range_walk(mask, k_tiles, q_tiles, False),
    )


def flash_attention(
    q_BxNxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    mask: Mask,
    q_tags: Tags,
    k_tags: Tags,
    *,
    backend: str,
    interpret: object = False,
    partial: bool = False,
) -> tuple[Array, Array]:
    """Softmax attention softmax(q kᵀ/√C) v without the score matrix → (out [B, N, H, C], lse f32
    [B, H, N]), differentiable through both.

    partial: out stays f32. Tiles that the mask excludes by their least and greatest tags are
    skipped. Accumulates in f32. interpret: as `pl.pallas_call` takes it. Source: Dao 2023
    (FlashAttention-2), algorithms 1 and 2."""
    (B, N, H, C), M = q_BxNxHxC.shape, k_BxMxKxC.shape[1]
    spec = tiles.Spec(mask, C**-0.5, M, backend, interpret, partial=partial)
    folded = _fold(q_BxNxHxC, k_BxMxKxC, v_BxMxKxC, mask, q_tags, k_tags, backend)
    o_ZxIxXxC, lse_ZxIx1xX = walks.attend(spec, *folded)
    out = tiles.unfold_queries(o_ZxIxXxC, B, N, H)[..., :C]
    return out, tiles.unfold_queries(lse_ZxIx1xX.swapaxes(2, 3), B, N, H)[..., 0].swapaxes(1, 2)


def flash_gradients(
    q_BxNxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    out_BxNxHxC: Array,
    lse_BxHxN: Array,
    dout_BxNxHxC: Array,
    mask: Mask,
    q_tags: Tags,
    k_tags: Tags,
    *,
    backend: str,
    interpret: object = False,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) f32: the contributions of these keys, given the out and lse of each query over
    ALL keys."""
    (B, N, H, C), (M, K) = q_BxNxHxC.shape, k_BxMxKxC.shape[1:3]
    spec = tiles.Spec(mask, C**-0.5, M, backend, interpret, partial=True)
    folded = _fold(q_BxNxHxC, k_BxMxKxC, v_BxMxKxC, mask, q_tags, k_tags, backend)
    X, width = folded.q.shape[2:]
    out, dout = (
        tiles.fold_queries(tiles.pad_dim(x, 3, width), K, X) for x in (out_BxNxHxC, dout_BxNxHxC)
    )
    lse = tiles.fold_queries(lse_BxHxN.swapaxes(1, 2)[..., None], K, X).swapaxes(2, 3)
    dq, dk, dv = walks.gradients(spec, *folded, out, lse, dout)
    dk, dv = (tiles.untile_keys(x, B, M, K)[..., :C] for x in (dk, dv))
    return tiles.unfold_queries(dq, B, N, H)[..., :C], dk, dv
