"""Block-sparse attention over a sequence that is sharded over cp: devices fetch the key blocks that
they need, once.

Each device asks every other one for the union of the blocks on its lists, at most `capacity` blocks
for each pair of devices. It attends to its own and the fetched blocks. Where a union does not fit,
all devices of the cp group gather all keys instead, so the result is exact for any capacity. Which
blocks are asked for: fdp.parallel.context.requests, whose symbols are used here too. Exact bytes:
fdp.count.gather.

Memory: fetched blocks are kept for the backward pass; gathered keys are gathered again. The
compiled program reserves room for both, because the compiler cannot know which path will be taken.

Legend: B sequences, N local positions, S all positions, H query heads, K key/value heads, C
head_dim, A sequences after heads with lists of their own became sequences (B or B·K), T blocks
attended to, of Y positions each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdp.collectives import all_gather, all_to_all, index, psum, size, vary
from fdp.kernels_pallas.block_sparse import block_lists, block_sparse_attention
from fdp.kernels_pallas.blockwise import vary_alike
from fdp.parallel.context.requests import block_slots, check_shapes, listed_slots, requests
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

    block_ids: for every block of local queries, ids of key blocks, counted along the whole
    sequence. -1 is unused; a repeated id counts once. b = 1: lists shared by all sequences; k = 1:
    by all heads. A query sees those tokens of a listed block that `mask` allows at the global
    positions `q_position_N` (`layouts.positions(layout, N)`) and segments. Without a visible key
    out is 0, without gradient. capacity: blocks that a device can fetch from each other device, 0 …
    N/block.

    overflow, equal on all devices of cp: number of blocks that did not fit, plus number of ids
    outside 0 … W-1, which stand for no block. Unless it is 0, all keys were gathered, and the
    result is exact nevertheless. At capacity N/block nothing can overflow, and the other path is
    not compiled. Where cp is unbound this is the reference.

    A NaN in a key or value reaches only queries whose block lists its block. Positions that are not
    whole blocks of a sequence 0 … S-1 (a layout that divides blocks) give NaN everywhere. Raises
    ValueError for shapes, a block or a capacity that do not fit. Source of lists shared by a group
    of heads: Yuan et al. 2025 (NSA), section 3.4."""
    J = check_shapes(
        q_BxNxHxC, k_BxNxKxC, v_BxNxKxC, block_ids_bxkxIxL, capacity, block, q_position_N
    )
    id_W, slot_W = block_slots(q_position_N, block)
    segment_BxS = (
        all_gather(segment_BxN, "cp", dim=1) if mask.packed and segment_BxN is not None else None
    )
    q, kv, ids_RxIxL, segment_AxS = _fold_heads(
        q_BxNxHxC, k_BxNxKxC, v_BxNxKxC, block_ids_bxkxIxL, segment_BxS
    )
    slots_RxIxL, outside = listed_slots(ids_RxIxL, slot_W)
    request_RxDxE, index_RxW, missing = requests(slots_RxIxL, J, capacity)
    overflow = psum(outside + missing, "cp")
    # A branch must not differentiate by a value that does not vary as its result does: the
    # transpose would be a psum inside the branch, over devices that may not all have taken it.
    q, kv = vary(vary_alike((q, kv), ids_RxIxL, id_W, q_position_N, segment_AxS), "cp")
    task = _Gathering(
        q,
        kv.reshape(len(kv), J, block, *kv.shape[2:]),
        slots_RxIxL,
        request_RxDxE,
        index_RxW,
        id_W,
        q_position_N,
        segment_AxS,
    )

    def fetch(task: _Gathering) -> Array:
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


def _fold_heads(
    q: Array, k: Array, v: Array, ids_bxkxIxL: Array, segment_BxS: Array | None
) -> tuple:
    """(q [A, N, ·, C], kv [A, N, 2, ·, C], ids [R, I, L], segment [A, S]): heads with lists of
    their own become sequences.

    Heads that fetch different blocks need different positions, and attention takes positions per
    sequence."""
    (B, N, H, C), K = q.shape, k.shape[2]
    kv_BxNx2xKxC = jnp.stack([k, v], 2)
    if ids_bxkxIxL.shape[1] == 1:
        return q, kv_BxNx2xKxC, ids_bxkxIxL[:, 0], segment_BxS
    q_AxNxGxC = q.reshape(B, N, K, H // K, C).swapaxes(1, 2).reshape(B * K, N, H // K, C)
    kv_AxNx2x1xC = jnp.moveaxis(kv_BxNx2xKxC, 3, 1).reshape(B * K, N, 2, 1, C)
    segment_AxS = None if segment_BxS is None else jnp.repeat(segment_BxS, K, 0)
    return q_AxNxGxC, kv_AxNx2x1xC, ids_bxkxIxL.reshape(-1, *ids_bxkxIxL.shape[2:]), segment_AxS


def _unfold_heads(out_AxNxGxC: Array, shape: tuple[int, ...]) -> Array:
    """The output, in the shape of the queries that `_fold_heads` was given."""
    B, N, _, C = shape
    return out_AxNxGxC.reshape(B, -1, *out_AxNxGxC.shape[1:]).swapaxes(1, 2).reshape(B, N, -1, C)


# The two ways to the keys
# --------------------------------------------------------------------------------------------


class _Gathering(NamedTuple):
    """The inputs of both paths, as `gather_attend` makes them."""

    q_AxNxHxC: Array
    kv_AxJxYx2xKxC: Array
    slots_RxIxL: Array
    request_RxDxE: Array
    index_RxW: Array
    id_W: Array
    q_position_N: Array
    segment_AxS: Array | None


def _attend_fetched(mask: Mask, task: _Gathering) -> Array:
    """Attention to own and fetched blocks; correct if all needed blocks were asked for."""
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
    """The requested blocks [A, D·E, Y, 2, K, C], those of device 0 first. Two dependent
    all-to-alls; one in the backward pass."""
    A = len(wide_AxJxYx2xKxC)
    asked_RxDxE = all_to_all(request_RxDxE, "cp", 1, 1)
    asked_RxDxE = jnp.maximum(asked_RxDxE, 0)  # unused: answered with a block that nobody reads
    reply_AxDxEx = _pick(wide_AxJxYx2xKxC, _spread(asked_RxDxE, A))
    got_AxDxEx = all_to_all(reply_AxDxEx.astype(dtype), "cp", 1, 1)
    return got_AxDxEx.reshape(A, -1, *wide_AxJxYx2xKxC.shape[2:])


def _attend_all(mask: Mask, task: _Gathering) -> Array:
    """Attention to the blocks of all devices, in the order of slots."""
    kv_AxWxYx2xKxC = all_gather(task.kv_AxJxYx2xKxC, "cp", dim=1)
    return _attend(
        mask, task, kv_AxWxYx2xKxC, jnp.arange(len(task.id_W))[None], 1 + task.slots_RxIxL
    )


def _attend(
    mask: Mask, task: _Gathering, kv: Array, source_RxT: Array, entries_RxIxL: Array
) -> Array:
    """Attention of q to blocks kv [A, T, Y, 2, K, C] from slots source_RxT; entries count from 1.

    Entry 0 is a block of zeros, which unused entries of a list read: a NaN in a real block would
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
    """The entries at [A, …] of each row of x [A, W, …]."""
    return jax.vmap(lambda x_W, at: x_W[at])(x_AxW, at_Ax)


def _spread(x_Rx: Array, A: int) -> Array:
    """The row of each of A sequences. R is 1 (for all), K (where the heads of B sequences with
    equal lists became sequences), or A."""
    return jnp.tile(x_Rx, (A // len(x_Rx), *(1,) * (x_Rx.ndim - 1)))
