"""Attention over a sequence that is sharded over cp, by any communication plan. Where cp is unbound
it is the single-device reference.

If the mask reads positions (or segment ids), every plan gathers those of all devices once. The
result therefore equals that of one device for any layout of the sequence. A plan splits cp into u =
`head_split` devices that exchange heads (or sequences) for positions, and rings of r = cp/u
devices; L = u·N.

Legend: B sequences, N local positions, S all positions, L positions after the exchange, T new
tokens of a decode step, M cache slots, H and K query and key/value heads, C head_dim."""

import jax
import jax.numpy as jnp
from jax import lax

from fdp.collectives import all_gather, all_to_all, index, pmax, psum, size, split
from fdp.kernels_pallas import attend as front
from fdp.parallel.context import layouts
from fdp.parallel.context.plan import (
    ATTEND,
    DECODE,
    SUPPORT,
    CommPlan,
    check,
    mask_kind,
    needed_hops,
)
from fdp.parallel.context.ring import Ring, RingLabels, ring_attention
from fdp.parallel.masks import Mask

__all__ = [
    "ATTEND",
    "DECODE",
    "SUPPORT",
    "CommPlan",
    "attend",
    "check",
    "decode",
    "mask_kind",
    "needed_hops",
]

Array = jax.Array


def attend(
    q_BxNxHxC: Array,
    k_BxNxKxC: Array,
    v_BxNxKxC: Array,
    mask: Mask,
    plan: CommPlan,
    q_position_N: Array | None = None,
    segment_BxN: Array | None = None,
) -> Array:
    """Softmax attention of the local queries to the keys of all devices of cp: [B, N, H, C], in q's
    type.

    q_position_N: global positions of the local tokens; they are gathered. None: the positions of
    `plan.layout`, known without communication. segment_BxN: document ids for a packed mask. Raises
    ValueError for what `check` refuses.

    Sources: Liu et al. 2023 (ring), Jacobs et al. 2023 (Ulysses), Fang & Zhao 2024 (USP), Llama 3
    2024 (all-gather)."""
    cp, (B, N, H, _), K = size("cp"), q_BxNxHxC.shape, k_BxNxKxC.shape[2]
    if plan.kind in DECODE:
        raise ValueError(
            f"plan {plan.kind} is for few replicated queries: call decode, or use "
            f"{', '.join(ATTEND)}"
        )
    segment_BxN = segment_BxN if mask.packed else None
    if cp == 1:
        labels = (q_position_N, q_position_N, segment_BxN, segment_BxN)
        return front.attend(q_BxNxHxC, k_BxNxKxC, v_BxNxKxC, mask, *labels)[0]
    check(plan, mask, seq_len=N * cp, cp=cp, heads=H, kv_heads=K, batch=B)
    q_position_N, position_S = _positions(mask, plan, q_position_N, N)
    segment_BxS = None if segment_BxN is None else all_gather(segment_BxN, "cp", dim=1)
    kv = jnp.stack([k_BxNxKxC, v_BxNxKxC])
    if plan.kind == "all_gather":
        k_BxSxKxC, v_BxSxKxC = all_gather(kv, "cp", dim=2)
        labels = (q_position_N, position_S, segment_BxN, segment_BxS)
        return front.attend(q_BxNxHxC, k_BxSxKxC, v_BxSxKxC, mask, *labels)[0]
    return _exchange_and_ring(q_BxNxHxC, kv, mask, plan, position_S, segment_BxS)


def _positions(
    mask: Mask, plan: CommPlan, q_position_N: Array | None, N: int
) -> tuple[Array | None, Array | None]:
    """Positions of (the local queries, the tokens of all devices); None where the mask reads
    none."""
    if not mask.orders:
        return None, None
    if q_position_N is not None:
        return q_position_N, all_gather(q_position_N, "cp", dim=0)
    cp = size("cp")
    held = jax.vmap(lambda device: layouts.held(plan.layout, N, cp, device, jnp))
    return layouts.positions(plan.layout, N), held(jnp.arange(cp)).reshape(-1)


def _exchange_and_ring(
    q_BxNxHxC: Array,
    kv: Array,
    mask: Mask,
    plan: CommPlan,
    position_S: Array | None,
    segment_BxS: Array | None,
) -> Array:
    """All-to-all over the inner sub-axes (heads or sequences for positions), ring over the outer
    ones, and all-to-all back."""
    u = plan.head_split
    ring_axes, split_axes = split("cp", u)
    B, K = q_BxNxHxC.shape[0], kv.shape[3]
    dim = 0 if plan.kind == "batch" else 2
    if dim == 2 and u > K:
        kv = jnp.repeat(
            kv, u // K, axis=3
        )  # fewer key heads than devices: each travels u/K times (rho)
    q_BxLxHxC = all_to_all(q_BxNxHxC, split_axes, dim, 1)
    kv = all_to_all(kv, split_axes, dim + 1, 2)
    r = size(ring_axes)
    if segment_BxS is not None:
        if dim == 0:
            segment_BxS = lax.dynamic_slice_in_dim(
                segment_BxS, index(split_axes) * (B // u), B // u, 0
            )
        segment_BxS = segment_BxS.reshape(segment_BxS.shape[0], r, -1)
    if r > 1:
        position_rxL = None if position_S is None else position_S.reshape(r, -1)
        members = RingLabels(position_rxL, segment_BxS)
        ring = Ring(mask, ring_axes, plan.hops, plan.tails(mask, kv.shape[2]))
        out_BxLxHxC = ring_attention(ring, q_BxLxHxC, kv, members)
    else:
        segment = None if segment_BxS is None else segment_BxS[:, 0]
        labels = position_S, position_S, segment, segment
        out_BxLxHxC = front.attend(q_BxLxHxC, kv[0], kv[1], mask, *labels)[0]
    return all_to_all(out_BxLxHxC, split_axes, 1, dim)


def decode(
    q_BxTxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    mask: Mask,
    plan: CommPlan,
    q_position_T: Array,
    k_position_M: Array,
) -> Array:
    """Attention of few queries, replicated over cp, to a key/value cache that is sharded over cp in
    any order. Forward only; for decoding with a cache sharded over cp.

    plan tree: [B, T, H, C], replicated, by two all-reduces. plan helix: the heads of this device,
    [B, T, H/cp, C], by one all-to-all. Helix sends the fewest bytes and suits an output projection
    that is sharded by heads. Each key is stored on ONE device; an empty slot has a position after
    that of every query. Raises ValueError for what `check` refuses.

    Sources: Shyam et al. 2024 (Tree Attention), Bhatia et al. 2025 (Helix Parallelism)."""
    cp, (B, _, H, C) = size("cp"), q_BxTxHxC.shape
    if plan.kind not in DECODE:
        raise ValueError(
            f"plan {plan.kind} is for whole sequences: call attend, or use {' or '.join(DECODE)}"
        )
    if mask.kind != "causal":
        raise ValueError(
            f"mask {mask.kind}: decoding needs a causal mask, which hides the empty slots of the "
            "cache"
        )
    labels = (q_position_T, k_position_M)
    out, lse_BxHxT = front.attend(
        q_BxTxHxC, k_BxMxKxC, v_BxMxKxC, mask, *labels, out_type=jnp.float32
    )
    if cp == 1:
        return out.astype(q_BxTxHxC.dtype)
    check(
        plan,
        mask,
        seq_len=k_BxMxKxC.shape[1] * cp,
        cp=cp,
        heads=H,
        kv_heads=k_BxMxKxC.shape[2],
        batch=B,
    )
    lse = jnp.moveaxis(lse_BxHxT, 1, 2)[..., None]
    if plan.kind == "tree":
        top = pmax(lse, "cp")
        weight = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
        summed = psum(jnp.concatenate([weight * out, weight], -1), "cp")  # one all-reduce for both
    else:
        pieces = all_to_all(
            jnp.concatenate([out, lse], -1)[None], "cp", 3, 0
        )  # [cp, B, T, H/cp, C+1]
        out, lse = pieces[..., :C], pieces[..., C:]
        top = lse.max(0)
        weight = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
        summed = jnp.concatenate([weight * out, weight], -1).sum(0)
    total = summed[..., C:]
    return (summed[..., :C] / jnp.where(total == 0, 1.0, total)).astype(q_BxTxHxC.dtype)
