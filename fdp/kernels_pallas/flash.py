"""Flash attention, forward and backward, with the log-sum-exp that merges partial results.

`flash_attention` returns (out, lse) on every platform; `attention` returns out alone and takes
cuDNN where it can.

Legend: B batch, N queries, M keys, H query heads, K key/value heads, G = H/K, C head_dim.
"""

import jax
import jax.numpy as jnp

from fdp.kernels_pallas import core, tiles
from fdp.kernels_pallas.masks import Mask, allowed

Array = jax.Array
EVERYTHING = Mask()


def reference(
    q_BxNxHxC: Array, k_BxMxKxC: Array, v_BxMxKxC: Array, seen_NxM: Array
) -> tuple[Array, Array]:
    """The oracle: softmax attention with the whole score matrix, f32. seen bool, broadcastable to
    [B, H, N, M].

    Returns (out f32 [B, N, H, C], lse f32 [B, H, N]); a row that sees nothing has out = 0, lse =
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


def tile_sizes(backend: str, rows: int, keys: int, C: int, dtype) -> tuple[int, int]:
    """(X, Y): rows and keys of a tile. Triton: powers of two that leave two stages in an H100's
    shared memory.
    """
    if backend == "tpu":
        return min(512, 16 * tiles.ceil_div(rows, 16)), min(512, 128 * tiles.ceil_div(keys, 128))
    small = dtype == jnp.float32 or C > 128
    X, Y = (64, 32) if small else (128, 64)
    return min(X, tiles.power_of_two(rows, 16)), min(Y, tiles.power_of_two(keys, 16))


def flash_attention(
    q_BxNxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    mask: Mask = EVERYTHING,
    q_position_N: Array | None = None,
    k_position_M: Array | None = None,
    q_segment_N: Array | None = None,
    k_segment_M: Array | None = None,
    *,
    backend: str | None = None,
    interpret: object = False,
) -> tuple[Array, Array]:
    """Softmax attention softmax(q kᵀ/√C) v without the score matrix → (out [B, N, H, C], lse f32
    [B, H, N]).

    Positions (default 0, 1, …) and segments: int [length] or [B, length], any order; tiles that the
    mask excludes by their least and greatest position are skipped. A row that sees no key has out =
    0, lse = -inf and zero gradients. Differentiable by out and lse in q, k and v; accumulates in
    f32. backend None: kernels on TPU ("tpu", Mosaic) and GPU ("gpu", Triton),
    `blockwise.attention_lse` ("xla") elsewhere. interpret: as `pl.pallas_call` takes it, for tests.
    Raises ValueError for shapes, dtypes, masks and backends that do not fit. Source: Dao 2023
    (FlashAttention-2), algorithms 1 and 2."""
    core.check_arrays(q_BxNxHxC, k_BxMxKxC, v_BxMxKxC)
    (B, N, H, C), (M, K) = q_BxNxHxC.shape, k_BxMxKxC.shape[1:3]
    q_tags = core.gather_tags(mask, "q", (B, N), q_position_N, q_segment_N)
    k_tags = core.gather_tags(mask, "k", (B, M), k_position_M, k_segment_M)
    backend = core.choose_backend(backend)
    if backend == "xla":
        return _on_xla(q_BxNxHxC, k_BxMxKxC, v_BxMxKxC, mask, q_tags, k_tags)
    width = tiles.power_of_two(C, 16)
    q, k, v = (tiles.pad_dim(x, 3, width) for x in (q_BxNxHxC, k_BxMxKxC, v_BxMxKxC))
    X, Y = tile_sizes(backend, N * (H // K), M, width, q.dtype)
    spec = tiles.Spec(mask, C**-0.5, M, backend, interpret)
    q_tiles, k_tiles = tiles.tile_tags(q_tags, H // K, X, B), tiles.tile_tags(k_tags, 1, Y, B)
    rows = tiles.range_walk(mask, q_tiles, k_tiles, True)
    keys = tiles.range_walk(mask, k_tiles, q_tiles, False)
    q, k, v = (
        tiles.fold_queries(q, K, X),
        tiles.tile_keys(k, Y, backend),
        tiles.tile_keys(v, Y, backend),
    )
    o_ZxIxXxC, lse_ZxIx1xX = core.attend(spec, q, k, v, q_tiles, k_tiles, rows, keys)
    out = tiles.unfold_queries(o_ZxIxXxC, B, N, H)[..., :C]
    return out, tiles.unfold_queries(lse_ZxIx1xX.swapaxes(2, 3), B, N, H)[..., 0].swapaxes(1, 2)


def _on_xla(q, k, v, mask: Mask, q_tags, k_tags) -> tuple[Array, Array]:
    from fdp.kernels_pallas.blockwise import attention_lse

    spread = lambda x: jnp.broadcast_to(x, (q.shape[0], x.shape[-1]))
    q_segment, k_segment = (spread(tags[1]) if mask.packed else None for tags in (q_tags, k_tags))
    if q_tags[0].ndim == k_tags[0].ndim == 1:
        return attention_lse(q, k, v, mask, q_tags[0], k_tags[0], q_segment, k_segment)

    # It takes one order of tokens for the whole batch: one call a sequence.
    def one(arrays, q_position, k_position, segments):
        q, k, v, *segments = jax.tree.map(lambda x: x[None], (*arrays, *segments))
        return attention_lse(q, k, v, mask, q_position, k_position, *segments)

    arguments = (q, k, v), spread(q_tags[0]), spread(k_tags[0]), (q_segment, k_segment)
    return jax.tree.map(lambda x: x[:, 0], jax.vmap(one)(*arguments))


def cudnn_covers(q_BxNxHxC: Array, k_BxMxKxC: Array, mask: Mask, backend: str) -> bool:
    """Whether cuDNN computes this case on the GPU of this process: 16 bit, no positions, segments
    or window.

    It counts causal from the first token of both sides, and cannot be compiled for a GPU that is
    absent."""
    here = backend == "gpu" and jax.default_backend() == "gpu"
    (_, N, _, C), M = q_BxNxHxC.shape, k_BxMxKxC.shape[1]
    plain = not mask.window and not mask.packed and (mask.kind == "bidirectional" or N == M)
    return here and plain and q_BxNxHxC.dtype == jnp.bfloat16 and C % 8 == 0 and C <= 128


def attention(
    q_BxNxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    mask: Mask = EVERYTHING,
    q_position_N: Array | None = None,
    k_position_M: Array | None = None,
    q_segment_N: Array | None = None,
    k_segment_M: Array | None = None,
) -> Array:
    """`flash_attention` without the lse: → out [B, N, H, C]. Leave positions out where they are 0,
    1, …: on a GPU, cuDNN then takes the plain causal and bidirectional cases in bfloat16. Raises as
    `flash_attention` does."""
    core.check_arrays(q_BxNxHxC, k_BxMxKxC, v_BxMxKxC)
    counted = q_position_N is None and k_position_M is None
    if counted and cudnn_covers(q_BxNxHxC, k_BxMxKxC, mask, core.choose_backend(None)):
        causal = mask.kind == "causal"
        return jax.nn.dot_product_attention(
            q_BxNxHxC, k_BxMxKxC, v_BxMxKxC, is_causal=causal, implementation="cudnn"
        )
    return flash_attention(
        q_BxNxHxC, k_BxMxKxC, v_BxMxKxC, mask, q_position_N, k_position_M, q_segment_N, k_segment_M
    )[0]


def seen_by(mask: Mask, q_tags: tuple[Array, ...], k_tags: tuple[Array, ...]) -> Array:
    """`allowed` in the shape that `reference` takes: bool [1 or B, 1, N, M]."""
    seen = allowed(mask, q_tags[0], k_tags[0], *(x[1] for x in (q_tags, k_tags) if mask.packed))
    return seen.reshape(-1, 1, *seen.shape[-2:])
