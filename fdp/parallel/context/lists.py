"""Attention to lists of key blocks over cp, by any plan that can use lists. The result is the same
for all; the bytes differ.

The gather fetches the listed blocks (fdp.parallel.context.gather). Ulysses and the all-gather send
all keys, as for dense attention, and compute only the listed blocks. A ring computes its hops
whole, so it takes no lists. Lists of width L may be shared by sequences (b = 1, else B) and by
heads (k = 1, else K).

Legend: B sequences, N local positions, S all positions, H query heads, K key/value heads, C
head_dim, I query blocks of a device, W all blocks."""

import jax
import jax.numpy as jnp
from jax import lax

from fdp.collectives import all_gather, all_to_all, index, psum, size
from fdp.kernels_pallas.block_sparse import block_lists, block_sparse_attention
from fdp.parallel.context import requests
from fdp.parallel.context.gather import gather_attend
from fdp.parallel.context.plan import GATHER, LISTED, CommPlan
from fdp.parallel.masks import Mask

Array = jax.Array


def attend_blocks(
    q_BxNxHxC: Array,
    k_BxNxKxC: Array,
    v_BxNxKxC: Array,
    block_ids_bxkxIxL: Array,
    block: int,
    mask: Mask,
    plan: CommPlan,
    q_position_N: Array,
    segment_BxN: Array | None = None,
) -> tuple[Array, Array]:
    """Attention of each local query block to the key blocks on its list → (out [B, N, H, C],
    overflow int32 []).

    Arguments and overflow are those of `gather_attend`, with `plan.capacity` for a gather. Other
    plans have room for every block, so their overflow only counts ids that exist nowhere. Where cp
    is unbound this is the reference. Raises ValueError for a plan without lists, for heads that
    Ulysses cannot divide, and for what `gather_attend` refuses."""
    check_listed(plan, cp=size("cp"), heads=q_BxNxHxC.shape[2], kv_heads=k_BxNxKxC.shape[2])
    tensors = q_BxNxHxC, k_BxNxKxC, v_BxNxKxC, block_ids_bxkxIxL
    blocks = q_BxNxHxC.shape[1] // block if block > 0 else 0
    if plan.kind == GATHER or size("cp") == 1:
        capacity = plan.capacity if plan.kind == GATHER and size("cp") > 1 else blocks
        return gather_attend(*tensors, capacity, block, mask, q_position_N, segment_BxN)
    requests.check_shapes(*tensors, blocks, block, q_position_N)
    id_W, slot_W = requests.block_slots(q_position_N, block)
    slots_bxkxIxL, outside = _slots(block_ids_bxkxIxL, slot_W)
    position_S = all_gather(q_position_N, "cp", dim=0)
    segment_BxS = (
        all_gather(segment_BxN, "cp", dim=1) if mask.packed and segment_BxN is not None else None
    )
    if plan.kind == "all_gather":
        kv = all_gather(jnp.stack([k_BxNxKxC, v_BxNxKxC]), "cp", dim=2)
        labels = q_position_N, position_S, segment_BxN if mask.packed else None, segment_BxS
        out = _listed(q_BxNxHxC, kv, slots_bxkxIxL, block, mask, labels)
    else:
        labels = position_S, position_S, segment_BxS, segment_BxS
        out = _by_heads(
            q_BxNxHxC, jnp.stack([k_BxNxKxC, v_BxNxKxC]), slots_bxkxIxL, block, mask, labels
        )
    return jnp.where((id_W >= 0).all(), out, jnp.nan), psum(outside, "cp")


def topk_ids(
    q_BxNxHxC: Array, k_BxNxKxC: Array, block: int, width: int, q_position_N: Array
) -> Array:
    """Lists chosen from the input → ids int32 [B, K, I, width], -1 unused, as `attend_blocks` takes
    them.

    Each local query block is scored against every key block that begins no later: the softmax of
    mean query · mean key, summed over the G query heads of a key head. The `width` best blocks are
    listed; the first block and the own block are always among them.

    Any sequence layout will do. A mean key of each block is sent, 1/(2·block) of an all-gather of
    keys and values. Selection is not differentiated. Source: MInference, Jiang et al. 2024, arXiv
    2407.02490, Alg. 3. Raises ValueError for a block that does not divide the local positions, and
    for a width outside 2 … W."""
    (B, N, H, C), K = q_BxNxHxC.shape, k_BxNxKxC.shape[2]
    if block < 1 or N % block:
        raise ValueError(
            f"N = {N} positions of a device are not divisible by block = {block}: use a divisor of "
            f"{N}"
        )
    id_W, _ = requests.block_slots(q_position_N, block)
    if not 2 <= width <= len(id_W):
        raise ValueError(
            f"width = {width} is not in 2 … {len(id_W)} blocks: own and first block are always "
            "listed"
        )
    q_BxIxKxGxC = lax.stop_gradient(q_BxNxHxC).reshape(B, N // block, block, K, H // K, C).mean(2)
    k_BxJxKxC = lax.stop_gradient(k_BxNxKxC).reshape(B, N // block, block, K, C).mean(2)
    k_BxWxKxC = all_gather(k_BxJxKxC, "cp", dim=1)
    row_Ix1 = (q_position_N[::block] // block)[:, None]
    logits = jnp.einsum("bikgc,bwkc->bkgiw", q_BxIxKxGxC, k_BxWxKxC).astype(jnp.float32) / C**0.5
    logp_BxKxGxIxW = jax.nn.log_softmax(jnp.where(id_W <= row_Ix1, logits, -jnp.inf), -1)
    # log Σ_G p orders as Σ_G p does, and keeps blocks apart whose probability underflows.
    score_BxKxIxW = jax.nn.logsumexp(logp_BxKxGxIxW, 2)
    score_BxKxIxW = jnp.where(
        (id_W == 0) | (id_W == row_Ix1), jnp.finfo(jnp.float32).max, score_BxKxIxW
    )
    best, slot_BxKxIxL = lax.top_k(score_BxKxIxW, width)
    return jnp.where(jnp.isneginf(best), -1, id_W[slot_BxKxIxL]).astype(jnp.int32)


def check_listed(plan: CommPlan, *, cp: int, heads: int, kv_heads: int) -> None:
    """Raises ValueError, with equation, values and fix, for a plan that cannot attend to lists of
    blocks."""
    if plan.kind not in LISTED or plan.hops is not None:
        raise ValueError(
            f"context plan {plan.kind!r}{' with hops' if plan.hops is not None else ''} has no "
            "lists of blocks: use "
            f"{', '.join(LISTED)}"
        )
    if plan.kind != GATHER and plan.capacity:
        raise ValueError(
            f"capacity = {plan.capacity}: plan {plan.kind} has room for every block, set capacity=0"
        )
    split = cp if plan.kind == "ulysses" else 1
    if plan.head_split != split:
        raise ValueError(
            f"plan {plan.kind} with lists needs head_split = {split}, not {plan.head_split}"
        )
    if heads % split or (kv_heads % split and split % kv_heads):
        raise ValueError(
            f"heads = {heads} and kv_heads = {kv_heads} cannot be shared out by head_split = cp = "
            f"{split}: heads % cp "
            f"= {heads % split}, and kv_heads and cp must divide one another; use the gather or "
            "the all-gather"
        )


def _slots(ids_bxkxIxL: Array, slot_W: Array) -> tuple[Array, Array]:
    """`requests.listed_slots` for lists with two leading dims."""
    b, k = ids_bxkxIxL.shape[:2]
    slots_RxIxL, outside = requests.listed_slots(
        ids_bxkxIxL.reshape(b * k, *ids_bxkxIxL.shape[2:]), slot_W
    )
    return slots_RxIxL.reshape(ids_bxkxIxL.shape), outside


def _by_heads(
    q: Array, kv: Array, slots_bxkxIxL: Array, block: int, mask: Mask, labels: tuple
) -> Array:
    """All-to-all to whole sequences of some heads, attention with the lists of all query blocks,
    and all-to-all back."""
    u, K = size("cp"), kv.shape[3]
    slots_bxkxWxL = all_gather(slots_bxkxIxL, "cp", dim=2)
    if u > K:
        kv = jnp.repeat(kv, u // K, axis=3)
    if slots_bxkxWxL.shape[1] > 1:  # of the key heads of this device
        slots_bxkxWxL = jnp.repeat(slots_bxkxWxL, max(u // K, 1), axis=1)
        held = slots_bxkxWxL.shape[1] // u
        slots_bxkxWxL = lax.dynamic_slice_in_dim(slots_bxkxWxL, index("cp") * held, held, 1)
    q, kv = all_to_all(q, "cp", 2, 1), all_to_all(kv, "cp", 3, 2)
    out = _listed(q, kv, slots_bxkxWxL, block, mask, labels)
    return all_to_all(out, "cp", 1, 2)


def _listed(
    q: Array, kv: Array, slots_bxkxIxL: Array, block: int, mask: Mask, labels: tuple
) -> Array:
    """Attention of query blocks to the listed blocks of all keys, which are ordered by slot."""
    W = kv.shape[2] // block
    used = slots_bxkxIxL < W
    lists = block_lists(jnp.where(used, slots_bxkxIxL, 0), used.sum(-1, dtype=jnp.int32), W)
    return block_sparse_attention(q, kv[0], kv[1], lists, block, block, mask, *labels)[0]
