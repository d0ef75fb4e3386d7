"""How sparse attention is, measured on sampled query rows: density, mass by ring offset, blocks
that devices share.

Written per shard of the sequence (over cp): each device holds its queries and keys with their
global positions, in any layout that divides no key block. Rows are gathered and keys stay in place:
logits are local, and row statistics are reduced by psum and pmax. With cp unbound the same code is
the single-device reference, and every cp gives the same result. `rank_T` describes a layout as
data: the ring rank of every key block of the sequence, for a ring that need not exist. The suffixes
n and t are the local tokens and key blocks, J the lists of a sequence (H or K), I ring ranks.

Legend: B sequences, H query heads, K key/value heads, C head_dim, R sampled rows, T key blocks, N
local query blocks, M tokens of a block."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdp.collectives import all_gather, pmax, psum, size, vary_like
from fdp.parallel.masks import Mask, allowed

Array = jax.Array

BISECTIONS = (
    16  # of log mass: from (1 - tau)/T to 1 that is a resolution of about 2e-4 of a block's mass
)


def sample_rows(q_BxnxHxC: Array, position_n: Array, rows: int, seed: int) -> tuple[Array, Array]:
    """`rows` query rows, one from each of as many equal strata, gathered from all devices: [B, R,
    H, C], positions [R].

    Each device divides its tokens, in their local order, into rows/cp strata. It takes from each
    the token at an offset that depends on `seed` and the position of the stratum. Contiguous
    shards, and zig-zag shards when rows % (2·cp) = 0, therefore sample the same rows for every cp;
    other layouts sample equally spread rows. Raises ValueError when rows is not divisible by cp, or
    the local tokens not by rows/cp."""
    n, cp = position_n.shape[0], size("cp")
    if rows < 1 or rows % cp or n % (rows // cp):
        raise ValueError(
            f"rows = {rows} must be a multiple of cp = {cp}, and the {n} local tokens of rows/cp = "
            f"{rows}/{cp}: "
            f"set rows={cp * math.gcd(n, max(rows // cp, 1))}"
        )
    length = n * cp // rows
    jitter_R = jnp.asarray(np.random.default_rng(seed).integers(0, length, rows))
    first = jnp.arange(rows // cp) * length
    local = first + jitter_R[position_n[first] // length]
    return all_gather(q_BxnxHxC[:, local], "cp", dim=1), all_gather(position_n[local], "cp", dim=0)


def block_mass(
    q_BxRxHxC: Array,
    row_position_R: Array,
    k_BxnxKxC: Array,
    position_n: Array,
    mask: Mask,
    block: int,
) -> Array:
    """Softmax mass of every row in each local key block, exact over the keys of all devices: f32
    [B, H, R, t]. Rows that see no key have mass 0. Raises ValueError when the local tokens are no
    whole blocks."""
    (B, R, H, C), (_, n, K, _) = q_BxRxHxC.shape, k_BxnxKxC.shape
    _whole_blocks(n, block)
    q_BxRxKxGxC = q_BxRxHxC.reshape(B, R, K, H // K, C)
    logits = (
        jnp.einsum("brkgc,bnkc->bkgrn", q_BxRxKxGxC, k_BxnxKxC, preferred_element_type=jnp.float32)
        * C**-0.5
    )
    logits_BxHxRxn = jnp.where(allowed(mask, row_position_R, position_n), logits, -jnp.inf).reshape(
        B, H, R, n
    )
    top_BxHxR = pmax(logits_BxHxRxn.max(-1), "cp")
    p_BxHxRxn = jnp.exp(
        logits_BxHxRxn - jnp.where(jnp.isneginf(top_BxHxR), 0.0, top_BxHxR)[..., None]
    )
    mass_BxHxRxt = p_BxHxRxn.reshape(B, H, R, n // block, block).sum(-1)
    total_BxHxR = psum(mass_BxHxRxt.sum(-1), "cp")
    return mass_BxHxRxt / jnp.maximum(total_BxHxR, jnp.finfo(jnp.float32).tiny)[..., None]


def blocks_needed(mass_BxHxRxt: Array, tau: float) -> Array:
    """Smallest number of key blocks that holds a share `tau` of a row's mass: int32 [B, H, R].

    Instead of sorting all blocks on one device, bisection finds the threshold above which blocks
    hold tau of the mass; each step is one psum of a scalar per row. Blocks within 2e-4 of each
    other at the threshold count as equal, so the result is exact but for near ties of many blocks.
    A row of mass 0 needs 1. Raises ValueError for tau outside (0, 1)."""
    if not 0 < tau < 1:
        raise ValueError(
            f"tau = {tau} must lie between 0 and 1: it is the share of attention mass to keep, "
            "such as 0.95"
        )
    blocks = mass_BxHxRxt.shape[-1] * size("cp")
    # Blocks below (1 - tau)/T cannot sum to 1 - tau, so those above this bound always reach tau.
    # None reaches `high`.
    low = 0.5 * (1 - tau) / blocks
    high_BxHxR = jnp.maximum(1.001 * pmax(mass_BxHxRxt.max(-1), "cp"), 2 * low)
    low_BxHxR = vary_like(jnp.full_like(high_BxHxR, low), high_BxHxR)

    def halve(bounds: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bounds
        middle = jnp.sqrt(low * high)
        enough = psum(_above(mass_BxHxRxt, middle)[0], "cp") >= tau
        return (jnp.where(enough, middle, low), jnp.where(enough, high, middle)), None

    (low_BxHxR, high_BxHxR), _ = lax.scan(halve, (low_BxHxR, high_BxHxR), None, length=BISECTIONS)
    both = jnp.stack([*_above(mass_BxHxRxt, low_BxHxR), *_above(mass_BxHxRxt, high_BxHxR)])
    mass_low, n_low, mass_high, n_high = psum(both, "cp")
    # The blocks between the bounds are as good as equal: as many of them as fill the gap.
    between, n_between = mass_low - mass_high, n_low - n_high
    fill = jnp.ceil(
        (tau - mass_high) * n_between / jnp.maximum(between, jnp.finfo(jnp.float32).tiny)
    )
    return jnp.maximum(n_high + jnp.clip(fill, jnp.minimum(n_between, 1), n_between), 1).astype(
        jnp.int32
    )


def blocks_visible(row_position_R: Array, position_n: Array, mask: Mask, block: int) -> Array:
    """Key blocks in which a row sees at least one key, over all devices: int32 [R]. Raises as
    `block_mass`.
    """
    _whole_blocks(position_n.shape[0], block)
    seen_RxtxM = allowed(mask, row_position_R, position_n).reshape(
        row_position_R.shape[0], -1, block
    )
    return psum(seen_RxtxM.any(-1).sum(-1, dtype=jnp.int32), "cp")


def density(needed_BxHxR: Array, visible_R: Array) -> Array:
    """delta_tau of every head, f32 [H]: blocks needed over blocks visible, both summed over rows
    and sequences.

    This ratio of sums is the share of the visible blocks that a kernel computes. A mean of ratios
    would overweight the first rows, which need all of their one or two blocks."""
    B = needed_BxHxR.shape[0]
    return needed_BxHxR.sum((0, 2)) / (B * visible_R.sum()).astype(jnp.float32)


def hop_mass(
    mass_BxHxRxt: Array,
    row_position_R: Array,
    position_n: Array,
    rank_T: Array,
    ranks: int,
    block: int,
) -> Array:
    """Attention mass by ring offset (query's rank - key's rank) mod ranks: f32 [H, ranks], which
    sums to 1 over offsets.

    Mean over rows and sequences. Offset 0 is the mass on the local keys, offset i that on the keys
    of hop i. `rank_T` int [T]: the rank that holds each block of the sequence, in any ring."""
    rank_T = jnp.asarray(rank_T)
    row_rank_R, key_rank_t = rank_T[row_position_R // block], rank_T[position_n[::block] // block]
    offset_Rxt = (row_rank_R[:, None] - key_rank_t) % ranks
    at_RxtxI = (offset_Rxt[..., None] == jnp.arange(ranks)).astype(jnp.float32)
    B, _, R, _ = mass_BxHxRxt.shape
    return psum(jnp.einsum("bhrt,rti->hi", mass_BxHxRxt, at_RxtxI), "cp") / (B * R)


def union_size(
    ids_BxJxNxA: Array, q_block_N: Array, rank_T: Array, ranks: int, kv_heads: int
) -> Array:
    """U[r, s]: number of key blocks of rank s that any query block of rank r needs, int32 [B, K,
    ranks, ranks].

    Gathering blocks sends U[r, s]·block·2·C elements per key/value head from s to r; a ring sends
    all blocks. ids: lists of this device's query blocks, -1 unused; `q_block_N`: their block
    numbers. Lists of query heads that share a key/value head are united. All query blocks of a rank
    must be on one device, as they are in the ring that `rank_T` describes and in every smaller ring
    nested in it. The row of a rank that is spread over several devices is -1."""
    B, J, N, _ = ids_BxJxNxA.shape
    rank_T = jnp.asarray(rank_T)
    T = rank_T.shape[0]
    if J % kv_heads:
        raise ValueError(
            f"{J} lists a sequence are not a multiple of kv_heads = {kv_heads}: one a head or one "
            "a group"
        )
    ids = jnp.where(ids_BxJxNxA < 0, T, ids_BxJxNxA)
    needed_BxJxNxT = jnp.put_along_axis(
        vary_like(jnp.zeros((B, J, N, T + 1), bool), ids), ids, True, axis=-1, inplace=False
    )[..., :T]
    needed_BxKxNxT = needed_BxJxNxT.reshape(B, kv_heads, J // kv_heads, N, T).any(2)
    mine_IxN = jnp.arange(ranks)[:, None] == rank_T[q_block_N]
    union_BxKxIxT = (
        jnp.einsum(
            "in,bknt->bkit", mine_IxN.astype(jnp.float32), needed_BxKxNxT.astype(jnp.float32)
        )
        > 0
    )
    count = jnp.einsum(
        "bkit,ts->bkis", union_BxKxIxT.astype(jnp.float32), rank_T[:, None] == jnp.arange(ranks)
    )
    holders_I = psum(mine_IxN.any(-1).astype(jnp.int32), "cp")
    return jnp.where(holders_I[:, None] > 1, -1, psum(count.astype(jnp.int32), "cp"))


def estimator_bytes(
    batch: int,
    rows: int,
    heads: int,
    head_dim: int,
    cp: int,
    itemsize: int,
    ranks: int,
    kv_heads: int,
) -> dict[str, float]:
    """Bytes that a device sends over cp in each estimator, by the ring algorithm
    (`fdp.count.hlo.wire_bytes`).

    heads: query heads on this device; itemsize: bytes of an element of q. sample: rows and their
    positions; density: `block_mass`, `blocks_needed` and `blocks_visible`; hops: `hop_mass`; union:
    `union_size`. They do not depend on the length of the sequence, while one pass of the ring grows
    with it."""
    gather, reduce = (cp - 1) / cp, 2 * (cp - 1) / cp
    a_row = 4 * batch * heads * rows
    # Two statistics of the softmax; the largest block, one sum a bisection, and four at the end.
    statistics = 2 + 1 + BISECTIONS + 4
    return {
        "sample": gather * rows * (batch * heads * head_dim * itemsize + 4),
        "density": reduce * (statistics * a_row + 4 * rows),
        "hops": reduce * 4 * heads * ranks,
        "union": reduce * 4 * (ranks + batch * kv_heads * ranks**2),
    }


def _whole_blocks(n: int, block: int) -> None:
    if block < 1 or n % block:
        raise ValueError(
            f"{n} local tokens are not a multiple of block {block}: choose a divisor of {n}"
        )


def _above(mass_BxHxRxt: Array, threshold_BxHxR: Array) -> tuple[Array, Array]:
    """(mass, number) of the local blocks at or above the threshold: f32 [B, H, R] each."""
    above = mass_BxHxRxt >= threshold_BxHxR[..., None]
    return jnp.where(above, mass_BxHxRxt, 0.0).sum(-1), above.sum(-1).astype(jnp.float32)
