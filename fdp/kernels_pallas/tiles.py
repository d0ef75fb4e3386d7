"""What all attention kernels share: the arithmetic of one tile, the order in which tiles are
visited, and the memory layout.

Grouped heads are folded into rows: row n·G + g is query n of head g of its group, G = H/K. A kernel
then sees one head, reads each key once for all G heads, and sums dk and dv over the group itself. A
walk is the sequence of tiles that one tile meets. Other suffixes: Z = B·K; R = N·G rows; I tiles of
X rows, J tiles of Y keys; W = C or K·C columns; A tags (position, then segment if packed); S
leading size of a table (1, B or Z); T most tiles in a walk.

Legend: B batch, N queries, M keys, H query heads, K key/value heads, C head_dim."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdp.parallel.masks import Mask, allowed, tiles_meet

Array = jax.Array
GPU_STAGES = 2  # of loads in flight; more does not fit shared memory in f32
State = tuple[
    Array, Array, Array
]  # running maximum [X, 1], sum [X, 1] and output [X, C] of the softmax, f32


class Walk(NamedTuple):
    """Which tiles each tile meets: the range first … first + count - 1, or the first `count`
    entries of a list.

    table int32 [S, I] (first tile) or [S, I, T] (tile ids, padded with valid ids), counts int32 [S,
    I]."""

    table: Array
    counts: Array


@dataclass(frozen=True)
class Spec:
    """What a kernel knows at compile time.

    mask. scale of the scores. keys: how many of the J·Y keys exist. split: row tiles per entry of
    the lists, whose blocks have split·X rows. partial: results are summands and stay f32. backend
    "tpu" or "gpu". interpret: as `pl.pallas_call` takes it, False on hardware."""

    mask: Mask
    scale: float
    keys: int
    backend: str
    interpret: object = False
    split: int = 1
    partial: bool = False

    def dtype(self, like: Array):
        """Dtype of a result of the kind of `like`: out and dq like q, dk like k, dv like v."""
        return jnp.float32 if self.partial else like.dtype


@dataclass(frozen=True)
class Stride:
    """How a walk is read: tile i uses entry i // up, and each entry stands for `down` tiles.
    `most`: longest walk."""

    most: int
    up: int = 1
    down: int = 1


def row_stride(spec: Spec, walk: Walk, n_tiles: int) -> Stride:
    """Walks of row tiles over key tiles: several row tiles share the list of their block; a range
    may reach all `n_tiles` key tiles."""
    return Stride(walk.table.shape[2] if walk.table.ndim == 3 else n_tiles, up=spec.split)


def key_stride(spec: Spec, walk: Walk, n_tiles: int) -> Stride:
    """Walks of key tiles over row tiles: each entry of a list is a block of `split` row tiles."""
    if walk.table.ndim == 2:
        return Stride(n_tiles)
    return Stride(walk.table.shape[2] * spec.split, down=spec.split)


def split_index(i: Array | int, by: int) -> tuple[Array | int, Array | int]:
    """(i // by, i % by) of i ≥ 0. Plain `//` handles the signs of its operands, which costs time
    and which Mosaic may refuse."""
    return (i, 0) if by == 1 else (lax.div(i, jnp.int32(by)), lax.rem(i, jnp.int32(by)))


def lead(z: Array, n_heads: int, size: int) -> Array | int:
    """Row of a table with `size` = 1, B or Z leading entries that belongs to head z of Z = B·K."""
    return 0 if size == 1 else split_index(z, n_heads // size)[0]


def walk_length(counts_ref, stride: Stride, row, i) -> Array:
    """How many tiles tile i meets."""
    return counts_ref[row, split_index(i, stride.up)[0]] * stride.down


def walk_tile(table_ref, stride: Stride, row, i, t) -> Array:
    """The t-th tile that tile i meets."""
    if len(table_ref.shape) == 2:
        return table_ref[row, i] + t
    entry, part = split_index(t, stride.down)
    return table_ref[row, split_index(i, stride.up)[0], entry] * stride.down + part


# One tile
# -------------------------------------------------------------------------------------------------


def matmul(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """a · b over one dim of each, f32 result; f32 operands are not rounded to tf32 or bf16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def visible(
    spec: Spec, q_tags: tuple[Array, ...], k_tags: tuple[Array, ...], j: Array | int
) -> Array | None:
    """Whether row x sees key y of key tile j: bool [X, Y]; None = all of them. Keys past
    `spec.keys` are padding.

    q_tags int [X] and k_tags int [Y]: positions and, for a packed mask, segments.
    """
    (X,), (Y,) = q_tags[0].shape, k_tags[0].shape
    seen_XxY = None
    if not spec.mask.everything:
        seen_XxY = allowed(
            spec.mask, q_tags[0], k_tags[0], *(x[1] for x in (q_tags, k_tags) if spec.mask.packed)
        )
    if spec.keys % Y:
        real_XxY = j * Y + lax.broadcasted_iota(jnp.int32, (X, Y), 1) < spec.keys
        seen_XxY = real_XxY if seen_XxY is None else seen_XxY & real_XxY
    return seen_XxY


def scores(q_XxC: Array, k_YxC: Array, scale: float, seen_XxY: Array | None) -> Array:
    """scale · q kᵀ, -inf where not seen: f32 [X, Y]."""
    s_XxY = matmul(q_XxC, k_YxC, (1, 1)) * scale
    return s_XxY if seen_XxY is None else jnp.where(seen_XxY, s_XxY, -jnp.inf)


def begin(X: int, C: int) -> State:
    """The state of the softmax over no keys."""
    return (
        jnp.full((X, 1), -jnp.inf, jnp.float32),
        jnp.zeros((X, 1), jnp.float32),
        jnp.zeros((X, C), jnp.float32),
    )


def absorb(state: State, s_XxY: Array, v_YxC: Array) -> State:
    """The state of the softmax after Y more keys. Source: Milakov & Gimelshein 2018, algorithm
    3."""
    m_Xx1, l_Xx1, acc_XxC = state
    top_Xx1 = jnp.maximum(m_Xx1, s_XxY.max(1, keepdims=True))
    safe_Xx1 = jnp.where(
        top_Xx1 == -jnp.inf, 0.0, top_Xx1
    )  # a row that has seen nothing: exp(-inf - 0), not -inf + inf
    p_XxY = jnp.exp(s_XxY - safe_Xx1)
    keep_Xx1 = jnp.exp(m_Xx1 - safe_Xx1)
    acc_XxC = acc_XxC * keep_Xx1 + matmul(p_XxY.astype(v_YxC.dtype), v_YxC, (1, 0))
    return top_Xx1, l_Xx1 * keep_Xx1 + p_XxY.sum(1, keepdims=True), acc_XxC


def finish(state: State) -> tuple[Array, Array]:
    """(out f32 [X, C], lse f32 [X, 1]) of the keys so far. A row that saw none has out = 0 and lse
    = -inf."""
    m_Xx1, l_Xx1, acc_XxC = state
    some_Xx1 = l_Xx1 > 0
    l_Xx1 = jnp.where(some_Xx1, l_Xx1, 1.0)
    return acc_XxC / l_Xx1, jnp.where(some_Xx1, m_Xx1 + jnp.log(l_Xx1), -jnp.inf)


def score_gradients(
    q_XxC: Array,
    k_YxC: Array,
    v_YxC: Array,
    do_XxC: Array,
    lse_Xx1: Array,
    delta_Xx1: Array,
    scale: float,
    seen_XxY,
) -> tuple[Array, Array]:
    """(P, dS) f32 [X, Y]: P = exp(S - lse), dS = scale · P (dO Vᵀ - delta) with delta = Σ dO·O -
    dlse.

    Rows that saw no key have lse = +inf, hence P = 0. Source: Dao 2023 (FlashAttention-2),
    algorithm 2; the term dlse follows from ∂lse/∂S = P."""
    p_XxY = jnp.exp(scores(q_XxC, k_YxC, scale, seen_XxY) - lse_Xx1)
    dp_XxY = matmul(do_XxC, v_YxC, (1, 1))
    return p_XxY, p_XxY * (dp_XxY - delta_Xx1) * scale


# Layout
# -------------------------------------------------------------------------------------------------


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two ≥ n and ≥ least."""
    return max(least, 1 << max(0, n - 1).bit_length())


def pad_dim(x: Array, dim: int, length: int, mode: str = "constant") -> Array:
    """`x` lengthened to `length` along `dim`, with zeros or (mode "edge") its last entry."""
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, length - x.shape[dim])
    return jnp.pad(x, widths, mode=mode) if widths[dim][1] else x


def fold_queries(q_BxNxHxC: Array, n_kv: int, X: int) -> Array:
    """[B, N, H, C] → [Z, I, X, C], rows padded with zeros to whole tiles."""
    B, N, H, C = q_BxNxHxC.shape
    x = (
        q_BxNxHxC.reshape(B, N, n_kv, H // n_kv, C)
        .swapaxes(1, 2)
        .reshape(B * n_kv, N * (H // n_kv), C)
    )
    tiles = ceil_div(x.shape[1], X)
    return pad_dim(x, 1, tiles * X).reshape(B * n_kv, tiles, X, C)


def unfold_queries(x_ZxIxXxC: Array, B: int, N: int, H: int) -> Array:
    """The inverse of `fold_queries`: → [B, N, H, C]."""
    Z, I, X, C = x_ZxIxXxC.shape
    n_kv = Z // B
    G = H // n_kv
    x = x_ZxIxXxC.reshape(B, n_kv, I * X, C)[:, :, : N * G]
    return x.reshape(B, n_kv, N, G, C).swapaxes(1, 2).reshape(B, N, H, C)


def keeps_columns(backend: str, K: int, C: int) -> bool:
    """Whether a kernel reads the C columns of its head out of K·C columns; a TPU reads columns in
    groups of 128."""
    return backend == "gpu" or (backend == "tpu" and (K == 1 or C % 128 == 0))


def tile_keys(k_BxMxKxC: Array, Y: int, backend: str) -> Array:
    """[B, M, K, C] → [B, J, Y, K·C], which is no transpose, where `keeps_columns`, else [Z, J, Y,
    C].

    Keys are padded with zeros to whole tiles.
    """
    B, M, K, C = k_BxMxKxC.shape
    tiles = ceil_div(M, Y)
    k_BxMxKxC = pad_dim(k_BxMxKxC, 1, tiles * Y)
    if keeps_columns(backend, K, C):
        return k_BxMxKxC.reshape(B, tiles, Y, K * C)
    return k_BxMxKxC.swapaxes(1, 2).reshape(B * K, tiles, Y, C)


def untile_keys(x: Array, B: int, M: int, K: int) -> Array:
    """The inverse of `tile_keys`: [B or Z, J, Y, ·] → [B, M, K, C]."""
    if x.shape[0] == B:
        return x.reshape(B, -1, K, x.shape[3] // K)[:, :M]
    return x.reshape(B, K, -1, x.shape[3]).swapaxes(1, 2)[:, :M]


def tile_tags(tags: tuple[Array, ...], repeat: int, size: int, B: int) -> Array:
    """Tags int [length] or [B, length], each entry `repeat` times → int32 [1 or B, tiles, A, size].

    The last tile is padded with the last entry, which never widens the range of a tile."""
    S = B if any(tag.shape[:-1] == (B,) for tag in tags) else 1
    x_SxAxR = jnp.stack(
        [jnp.broadcast_to(tag, (S, tag.shape[-1])).astype(jnp.int32) for tag in tags], 1
    )
    x_SxAxR = jnp.repeat(x_SxAxR, repeat, axis=2)
    tiles = ceil_div(x_SxAxR.shape[2], size)
    x_SxAxR = pad_dim(x_SxAxR, 2, tiles * size, "edge")
    return x_SxAxR.reshape(S, len(tags), tiles, size).swapaxes(1, 2)


def range_walk(mask: Mask, tags_SxIxAxX: Array, other_SxJxAxY: Array, rows_first: bool) -> Walk:
    """For every tile of `tags`, the range of tiles of `other` that the mask does not exclude as a
    whole.

    rows_first: `tags` belong to rows and `other` to keys, or the reverse. Tiles are judged by their
    least and greatest tags, so a tile inside the range may be empty, but no tile outside is needed.
    """
    own = [x[:, :, None] for x in (tags_SxIxAxX.min(3), tags_SxIxAxX.max(3))]
    met = [x[:, None] for x in (other_SxJxAxY.min(3), other_SxJxAxY.max(3))]
    ends = own + met if rows_first else met + own  # of queries, then of keys: int [S, I, J, A]
    position, *segment = ([x[..., a] for x in ends] for a in range(tags_SxIxAxX.shape[2]))
    live_SxIxJ = tiles_meet(mask, *position, *segment)
    first_SxI = jnp.argmax(live_SxIxJ, 2).astype(jnp.int32)
    last_SxI = live_SxIxJ.shape[2] - 1 - jnp.argmax(live_SxIxJ[:, :, ::-1], 2).astype(jnp.int32)
    return Walk(first_SxI, jnp.where(live_SxIxJ.any(2), last_SxI - first_SxI + 1, 0))


def result(shape: tuple[int, ...], dtype, like: Array) -> jax.ShapeDtypeStruct:
    """Type of a kernel's result, varying over the mesh axes over which `like` varies."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).mat)
