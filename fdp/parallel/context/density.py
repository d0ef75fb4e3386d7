"""How sparse attention is, measured on some of its query rows: mass of key blocks and density.

Written per shard of the sequence (over cp): each device holds its queries and keys with their
global positions, in any layout that divides no key block. Rows are on all devices and keys stay in
place: logits are local, and row statistics are reduced by psum and pmax. With cp unbound the same
code is the single-device reference, and every cp gives the same result. The suffixes n and t are
the local tokens and key blocks.

Legend: B sequences, H query heads, K key/value heads, C head_dim, R query rows, M tokens of a
block."""

import jax
import jax.numpy as jnp
from jax import lax

from fdp.collectives import pmax, psum, size, vary_like
from fdp.parallel.masks import Mask, allowed

Array = jax.Array

BISECTIONS = (
    16  # of log mass: from (1 - tau)/T to 1 that is a resolution of about 2e-4 of a block's mass
)


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


def _whole_blocks(n: int, block: int) -> None:
    if block < 1 or n % block:
        raise ValueError(
            f"{n} local tokens are not a multiple of block {block}: choose a divisor of {n}"
        )


def _above(mass_BxHxRxt: Array, threshold_BxHxR: Array) -> tuple[Array, Array]:
    """(mass, number) of the local blocks at or above the threshold: f32 [B, H, R] each."""
    above = mass_BxHxRxt >= threshold_BxHxR[..., None]
    return jnp.where(above, mass_BxHxRxt, 0.0).sum(-1), above.sum(-1).astype(jnp.float32)
