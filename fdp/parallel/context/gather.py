"""Block-sparse attention over a sequence that is sharded over cp: devices fetch the key blocks that
they need, once.

Each device asks every other one for the union of the blocks on its lists, at most `capacity` blocks
a pair of devices, and attends to its own and the fetched ones. When a union does not fit, all
devices of the cp group gather all keys instead, so the result is the attention asked for, whatever
the capacity. Blocks are found by position: any layout that divides none of them will do. Bytes,
exactly: fdp.count.gather.

Memory: fetched blocks are kept for the backward pass, gathered keys are not (they are gathered
again); but the compiled program reserves room for them, as the compiler cannot know that they will
not be needed.

Legend: B sequences, N local positions, S all positions, H query heads, K key/value heads, C
head_dim; D devices of cp, I = J blocks of a device of Y = block positions, W = D·J all blocks; L
width of a list, b = 1 or B and k = 1 or K lists of a query block, R = b·k; A sequences after heads
with lists of their own became sequences, B or B·K; E capacity; T blocks attended to. A slot says
where a block lives: device · J + place."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdp.collectives import all_gather, all_to_all, index, psum, size, vary
from fdp.kernels_pallas import walks
from fdp.kernels_pallas.block_sparse import block_lists, block_sparse_attention
from fdp.kernels_pallas.blockwise import vary_alike
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, SequenceLayout
from fdp.parallel.masks import Mask

Array = jax.Array
SCOPE = "gather_attend"  # of the lax.cond: branch 0 fetches blocks, branch 1 gathers all keys


def gather_attend(
    q_BxNxHxC: Array,
    k_BxNxKxC: Array,
    v_BxNxKxC: Array,
    block_ids_bxkxIxL: Array,
    capacity: int,
    block: int,
    mask: Mask,
    q_position_N: Array,
    segment_BxN: Array | None = None,
) -> tuple[Array, Array]:
    """Attention of each local query block to the key blocks on its list → (out [B, N, H, C],
    overflow int32 []).

    block_ids: key blocks, counted along the whole sequence, of every block of local queries; -1 =
    unused, a repeated id counts once; shared by sequences if b = 1 and by heads if k = 1. Of a
    listed block a query sees what `mask` allows at the global positions `q_position_N`,
    `layouts.positions(layout, N)`, and segments; no key: out 0, no gradient. capacity: blocks that
    a device can fetch from each other one, 0 … N/block.

    overflow, the same on all devices of cp: blocks that did not fit, plus ids outside 0 … W-1,
    which mean no block. Unless 0, all keys were gathered and the result is exact nevertheless. At
    capacity N/block nothing can overflow, and no other path is compiled. Where cp is unbound this
    is the reference.

    A NaN in a key or value reaches only queries whose block lists its block. Positions that are not
    whole blocks of a sequence 0 … S-1 (a layout that divides blocks) give NaN everywhere. Raises
    ValueError for shapes, a block or a capacity that do not fit. Source of lists shared by a group
    of heads: Yuan et al. 2025 (NSA), section 3.4."""
    J = check_shapes(
        q_BxNxHxC, k_BxNxKxC, v_BxNxKxC, block_ids_bxkxIxL, capacity, block, q_position_N
    )
    id_W, slot_W = places(q_position_N, block)
    segment_BxS = (
        all_gather(segment_BxN, "cp", dim=1) if mask.packed and segment_BxN is not None else None
    )
    q, kv, ids_RxIxL, segment_AxS = _fold_heads(
        q_BxNxHxC, k_BxNxKxC, v_BxNxKxC, block_ids_bxkxIxL, segment_BxS
    )
    slots_RxIxL, outside = wanted(ids_RxIxL, slot_W)
    request_RxDxE, index_RxW, missing = _requests(slots_RxIxL, J, capacity)
    overflow = psum(outside + missing, "cp")
    # A branch must not differentiate by a value that does not vary as its result does: the
    # transpose would be a psum inside the branch, over devices that may not all have taken it.
    q, kv = vary(vary_alike((q, kv), ids_RxIxL, id_W, q_position_N, segment_AxS), "cp")
    task = _Task(
        q,
        kv.reshape(len(kv), J, block, *kv.shape[2:]),
        slots_RxIxL,
        request_RxDxE,
        index_RxW,
        id_W,
        q_position_N,
        segment_AxS,
    )

    def fetch(task: _Task) -> Array:
        return _attend_fetched(mask, task)

    if capacity == J or size("cp") == 1:
        out = fetch(task)
    else:
        with jax.named_scope(SCOPE):
            # Rematerialised, or the zeros that stand for all gathered keys would be kept in every
            # layer.
            out = lax.cond(
                overflow > 0, jax.checkpoint(lambda task: _attend_all(mask, task)), fetch, task
            )
    out = jnp.where((slot_W >= 0).all(), out, jnp.nan)
    return _unfold_heads(out, q_BxNxHxC.shape), overflow


def block_ids(
    mask_WxW: np.ndarray,
    block: int,
    layout: SequenceLayout = CONTIGUOUS,
    cp: int = 1,
    width: int | None = None,
) -> np.ndarray:
    """The block mask bool [W, W] (rows: query blocks), or one for each key head [K, W, W], as ids
    for `gather_attend`.

    int32 [1, 1 or K, W, width], -1 unused, ids ascending; rows in the order in which `layout` deals
    them to cp devices, ready to be sharded. width None: the longest row. Raises ValueError for
    another shape or type, a width that does not hold a row (nothing is ever dropped), and a layout
    that divides blocks."""
    mask_KxWxW = np.asarray(mask_WxW)
    mask_KxWxW = mask_KxWxW[None] if mask_KxWxW.ndim == 2 else mask_KxWxW
    W = mask_KxWxW.shape[-1]
    if (
        mask_KxWxW.dtype != bool
        or mask_KxWxW.ndim != 3
        or mask_KxWxW.shape[1] != W
        or not mask_KxWxW.size
    ):
        raise ValueError(
            f"a block mask is bool [W, W] or [K, W, W], not {mask_KxWxW.dtype} {np.shape(mask_WxW)}"
        )
    longest = int(mask_KxWxW.sum(-1).max())
    width = max(longest, 1) if width is None else width
    if width < max(longest, 1):
        raise ValueError(
            f"width = {width} < {max(longest, 1)} blocks of the longest row: set "
            f"width={max(longest, 1)}"
        )
    ids_KxWxW = np.where(mask_KxWxW, np.arange(W), W)
    ids_KxWxW.sort(-1)
    ids_KxWxL = np.full((*ids_KxWxW.shape[:2], width), -1, np.int32)
    used = min(width, W)
    ids_KxWxL[..., :used] = np.where(ids_KxWxW == W, -1, ids_KxWxW)[..., :used]
    return ids_KxWxL[None, :, block_order(W, block, layout, cp)]


def block_order(W: int, block: int, layout: SequenceLayout, cp: int) -> np.ndarray:
    """Which block lives at each slot, int [W]. Raises ValueError when the layout divides a
    block.
    """
    position_WxY = layouts.permutation(layout, W * block, cp).reshape(W, block)
    if (position_WxY != position_WxY[:, :1] // block * block + np.arange(block)).any():
        raise ValueError(
            f"{layout} of {W} blocks of {block} on cp = {cp} divides blocks: W must be a multiple "
            "of 2·cp (zig-zag) or "
            f"cp, and the block of a striped layout a multiple of {block}"
        )
    return position_WxY[:, 0] // block


# Before any key moves: who needs what
# --------------------------------------------------------------------------------


def check_shapes(
    q: Array, k: Array, v: Array, ids: Array, capacity: int, block: int, position: Array
) -> int:
    """J, after the checks."""
    walks.check_arrays(q, k, v)
    (B, N), K = q.shape[:2], k.shape[2]
    if k.shape[1] != N or position.shape != (N,):
        raise ValueError(
            f"{N} local queries, keys {k.shape}, positions {position.shape}: all need the same "
            "positions"
        )
    if block < 1 or N % block:
        raise ValueError(
            f"N = {N} positions of a device are not divisible by block = {block}: N mod block = "
            f"{N % block if block > 0 else 'undefined'}; choose a block that divides S/cp"
        )
    J = N // block
    if not 0 <= capacity <= J:
        raise ValueError(
            f"capacity = {capacity} is not in 0 … N/block = {N}/{block} = {J}: no device holds "
            "more blocks"
        )
    if (
        ids.ndim != 4
        or ids.shape[0] not in (1, B)
        or ids.shape[1] not in (1, K)
        or ids.shape[2] != J
    ):
        raise ValueError(
            f"block_ids {ids.shape} must be [1 or B = {B}, 1 or K = {K}, N/block = {J}, width]: "
            "the lists of the "
            f"{J} query blocks of this device"
        )
    if not ids.shape[3] or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"block_ids {ids.dtype} {ids.shape}: needs integers and a width of at least 1, all -1 "
            "if empty"
        )
    return J


def places(position_N: Array, block: int) -> tuple[Array, Array]:
    """(global id of the block in each slot, slot of each global id), int32 [W]; -1 where there is
    no whole block.
    """
    position_JxY = position_N.astype(jnp.int32).reshape(-1, block)
    id_J = position_JxY[:, 0] // block
    whole_J = (position_JxY == id_J[:, None] * block + jnp.arange(block)).all(1)
    id_W = all_gather(jnp.where(whole_J, id_J, -1), "cp", dim=0)
    W = len(id_W)
    slot_W = (
        jnp.full(W, -1, jnp.int32).at[jnp.where(id_W < 0, W, id_W)].set(jnp.arange(W), mode="drop")
    )
    return id_W, slot_W


def _fold_heads(
    q: Array, k: Array, v: Array, ids_bxkxIxL: Array, segment_BxS: Array | None
) -> tuple:
    """(q [A, N, ·, C], kv [A, N, 2, ·, C], ids [R, I, L], segment [A, S]): a list of its own makes
    a head a sequence.

    Heads that fetch different blocks need different positions, which attention takes by sequence.
    """
    (B, N, H, C), K = q.shape, k.shape[2]
    kv_BxNx2xKxC = jnp.stack([k, v], 2)
    if ids_bxkxIxL.shape[1] == 1:
        return q, kv_BxNx2xKxC, ids_bxkxIxL[:, 0], segment_BxS
    q_AxNxGxC = q.reshape(B, N, K, H // K, C).swapaxes(1, 2).reshape(B * K, N, H // K, C)
    kv_AxNx2x1xC = jnp.moveaxis(kv_BxNx2xKxC, 3, 1).reshape(B * K, N, 2, 1, C)
    segment_AxS = None if segment_BxS is None else jnp.repeat(segment_BxS, K, 0)
    return q_AxNxGxC, kv_AxNx2x1xC, ids_bxkxIxL.reshape(-1, *ids_bxkxIxL.shape[2:]), segment_AxS


def _unfold_heads(out_AxNxGxC: Array, shape: tuple[int, ...]) -> Array:
    """The output in the shape of the queries that `_fold_heads` was given."""
    B, N, _, C = shape
    return out_AxNxGxC.reshape(B, -1, *out_AxNxGxC.shape[1:]).swapaxes(1, 2).reshape(B, N, -1, C)


def wanted(ids_RxIxL: Array, slot_W: Array) -> tuple[Array, Array]:
    """(slots of the listed blocks, ascending and distinct, W where unused, [R, I, L]; number of
    impossible ids).
    """
    W = len(slot_W)
    inside = (ids_RxIxL >= 0) & (ids_RxIxL < W)
    slots = jnp.sort(jnp.where(inside, slot_W[jnp.where(inside, ids_RxIxL, 0)], W), -1)
    repeated = jnp.pad(slots[..., 1:] == slots[..., :-1], ((0, 0), (0, 0), (1, 0)))
    outside = (~inside & (ids_RxIxL != -1)).sum(dtype=jnp.int32)
    return jnp.sort(jnp.where(repeated, W, slots), -1), outside


def _requests(slots_RxIxL: Array, J: int, capacity: int) -> tuple[Array, Array, Array]:
    """(places asked of each device [R, D, E], -1 unused; index of each slot among the blocks
    attended to [R, W]; blocks that do not fit).

    Blocks attended to: one of zeros, the J own ones, E of each device.
    """
    R, D = len(slots_RxIxL), size("cp")
    row_Rx1x1 = jnp.arange(R)[:, None, None]
    listed_RxW = jnp.zeros((R, D * J), bool).at[row_Rx1x1, slots_RxIxL].set(True, mode="drop")
    device_Dx1, place_J = jnp.arange(D)[:, None], jnp.arange(J)
    own_Dx1 = device_Dx1 == index("cp")
    needed_RxDxJ = listed_RxW.reshape(R, D, J) & ~own_Dx1
    rank_RxDxJ = jnp.cumsum(needed_RxDxJ, -1, dtype=jnp.int32) - 1
    fits_RxDxJ = needed_RxDxJ & (rank_RxDxJ < capacity)
    at = row_Rx1x1, device_Dx1, jnp.where(fits_RxDxJ, rank_RxDxJ, capacity)
    request_RxDxE = jnp.full((R, D, capacity), -1, jnp.int32).at[at].set(place_J, mode="drop")
    index_RxDxJ = jnp.where(own_Dx1, 1 + place_J, 1 + J + device_Dx1 * capacity + rank_RxDxJ)
    return (
        request_RxDxE,
        index_RxDxJ.reshape(R, D * J),
        (needed_RxDxJ & ~fits_RxDxJ).sum(dtype=jnp.int32),
    )


# The two ways to the keys
# --------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """What both branches read; see the legend and what makes each."""

    q_AxNxHxC: Array
    kv_AxJxYx2xKxC: Array
    slots_RxIxL: Array
    request_RxDxE: Array
    index_RxW: Array
    id_W: Array
    q_position_N: Array
    segment_AxS: Array | None


def _attend_fetched(mask: Mask, task: _Task) -> Array:
    """Over own and fetched blocks: right if all that is needed was asked for."""
    R, D, E = task.request_RxDxE.shape
    J, W = task.kv_AxJxYx2xKxC.shape[1], len(task.id_W)
    # In float32, so that the gradients that come back from several devices are added in float32.
    # They travel rounded.
    wide = task.kv_AxJxYx2xKxC.astype(jnp.float32)
    parts, sources = [wide.astype(task.kv_AxJxYx2xKxC.dtype)], [index("cp") * J + jnp.arange(J)]
    if D > 1 and E:
        parts.append(_fetch(wide, task.request_RxDxE, task.kv_AxJxYx2xKxC.dtype))
        source_RxDxE = jnp.arange(D)[:, None] * J + jnp.maximum(task.request_RxDxE, 0)
        sources.append(source_RxDxE.reshape(R, D * E))
    source_RxT = jnp.concatenate([jnp.broadcast_to(s, (R, s.shape[-1])) for s in sources], 1)
    listed = jnp.where(task.slots_RxIxL < W, task.slots_RxIxL, 0)
    return _attend(mask, task, jnp.concatenate(parts, 1), source_RxT, _pick(task.index_RxW, listed))


def _fetch(wide_AxJxYx2xKxC: Array, request_RxDxE: Array, dtype) -> Array:
    """The requested blocks [A, D·E, Y, 2, K, C], from device 0 first. Two dependent all-to-alls;
    backward one.
    """
    A = len(wide_AxJxYx2xKxC)
    asked_RxDxE = all_to_all(request_RxDxE, "cp", 1, 1)
    asked_RxDxE = jnp.maximum(asked_RxDxE, 0)  # unused: answered with a block that nobody reads
    reply_AxDxEx = _pick(wide_AxJxYx2xKxC, _spread(asked_RxDxE, A))
    got_AxDxEx = all_to_all(reply_AxDxEx.astype(dtype), "cp", 1, 1)
    return got_AxDxEx.reshape(A, -1, *wide_AxJxYx2xKxC.shape[2:])


def _attend_all(mask: Mask, task: _Task) -> Array:
    """Over the blocks of all devices, in the order of slots."""
    kv_AxWxYx2xKxC = all_gather(task.kv_AxJxYx2xKxC, "cp", dim=1)
    return _attend(
        mask, task, kv_AxWxYx2xKxC, jnp.arange(len(task.id_W))[None], 1 + task.slots_RxIxL
    )


def _attend(mask: Mask, task: _Task, kv: Array, source_RxT: Array, entries_RxIxL: Array) -> Array:
    """Attention of q to blocks kv [A, T, Y, 2, K, C] that came from slots source_RxT; entries count
    from 1.

    Entry 0 is a block of zeros: unused places of a list read it, and a NaN in a real block would
    reach every query."""
    A, T, Y = kv.shape[:3]

    def before(x: Array) -> Array:
        """With entries for the block of zeros."""
        return jnp.pad(x, ((0, 0), (Y, 0)))

    used = task.slots_RxIxL < len(task.id_W)
    listed, counts = jnp.where(used, entries_RxIxL, 0), used.sum(-1, dtype=jnp.int32)
    if len(used) > 1:  # what all sequences and heads share stays one list
        source_RxT, listed, counts = (_spread(x, A) for x in (source_RxT, listed, counts))
    lists = block_lists(listed[:, None], counts[:, None], 1 + T)
    k_position = before((task.id_W[source_RxT][..., None] * Y + jnp.arange(Y)).reshape(-1, T * Y))
    q_segment = k_segment = None
    if task.segment_AxS is not None:
        N = task.q_AxNxHxC.shape[1]
        q_segment = lax.dynamic_slice_in_dim(task.segment_AxS, index("cp") * N, N, 1)
        segment_AxWxY = task.segment_AxS.reshape(A, -1, Y)
        k_segment = before(_pick(segment_AxWxY, _spread(source_RxT, A)).reshape(A, T * Y))
    kv = jnp.pad(kv, ((0, 0), (1, 0), *((0, 0),) * 4)).reshape(A, (1 + T) * Y, *kv.shape[3:])
    tags = task.q_position_N, k_position, q_segment, k_segment
    return block_sparse_attention(
        task.q_AxNxHxC, kv[:, :, 0], kv[:, :, 1], lists, Y, Y, mask, *tags
    )[0]


def _pick(x_AxW: Array, at_Ax: Array) -> Array:
    """Of each row of x [A, W, …] the entries at [A, …]."""
    return jax.vmap(lambda x_W, at: x_W[at])(x_AxW, at_Ax)


def _spread(x_Rx: Array, A: int) -> Array:
    """The row of each of A sequences: R = 1 for all; K, where heads became sequences of B equal
    ones; or A.
    """
    return jnp.tile(x_Rx, (A // len(x_Rx), *(1,) * (x_Rx.ndim - 1)))
