"""Which key blocks the devices of cp need from one another, before any key is sent.

Blocks are found by their positions, so any layout that divides no block will do. A slot says where
a block is stored: device · J + index on that device. A list has ids of key blocks, -1 where it is
unused; lists may be shared by sequences (b = 1, else B) and by heads (k = 1, else K), and R = b·k.

Legend: N local positions, D devices of cp, I = J blocks of a device, W = D·J all blocks, L width of
a list, R lists of a query block, E capacity.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fdp.collectives import all_gather, index, size
from fdp.kernels_pallas import walks
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, SequenceLayout

Array = jax.Array


def block_ids(
    mask_WxW: np.ndarray,
    block: int,
    layout: SequenceLayout = CONTIGUOUS,
    cp: int = 1,
    width: int | None = None,
) -> np.ndarray:
    """The block mask bool [W, W] (rows: query blocks), or one for each key head [K, W, W], as ids
    for `gather.gather_attend`.

    int32 [1, 1 or K, W, width], -1 unused, ids ascending. Rows are in the order in which `layout`
    deals them to cp devices, ready to be sharded. width None: the longest row. Raises ValueError
    for another shape or type, a width that does not hold a row (nothing is ever dropped), and a
    layout that divides blocks."""
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
    return ids_KxWxL[None, :, layouts.block_order(layout, W, block, cp)]


def check_shapes(
    q: Array, k: Array, v: Array, ids: Array, capacity: int, block: int, position: Array
) -> int:
    """J. Raises ValueError for shapes, a block or a capacity that do not fit."""
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


def block_slots(position_N: Array, block: int) -> tuple[Array, Array]:
    """(global id of the block in each slot, slot of each global id), int32 [W]; -1 where a slot
    holds no whole block."""
    position_JxY = position_N.astype(jnp.int32).reshape(-1, block)
    id_J = position_JxY[:, 0] // block
    whole_J = (position_JxY == id_J[:, None] * block + jnp.arange(block)).all(1)
    id_W = all_gather(jnp.where(whole_J, id_J, -1), "cp", dim=0)
    W = len(id_W)
    slot_W = (
        jnp.full(W, -1, jnp.int32).at[jnp.where(id_W < 0, W, id_W)].set(jnp.arange(W), mode="drop")
    )
    return id_W, slot_W


def listed_slots(ids_RxIxL: Array, slot_W: Array) -> tuple[Array, Array]:
    """(slots of the listed blocks, ascending and distinct, W where unused, [R, I, L]; number of ids
    that exist nowhere)."""
    W = len(slot_W)
    inside = (ids_RxIxL >= 0) & (ids_RxIxL < W)
    slots = jnp.sort(jnp.where(inside, slot_W[jnp.where(inside, ids_RxIxL, 0)], W), -1)
    repeated = jnp.pad(slots[..., 1:] == slots[..., :-1], ((0, 0), (0, 0), (1, 0)))
    outside = (~inside & (ids_RxIxL != -1)).sum(dtype=jnp.int32)
    return jnp.sort(jnp.where(repeated, W, slots), -1), outside


def requests(slots_RxIxL: Array, J: int, capacity: int) -> tuple[Array, Array, Array]:
    """(indices of blocks asked of each device [R, D, E], -1 unused; index of each slot among the
    blocks attended to [R, W]; number of blocks that do not fit).

    The blocks attended to are one of zeros, the J own ones, and E of each device."""
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
