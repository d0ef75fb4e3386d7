"""Which positions of the sequence each device of cp holds: contiguous, zig-zag or striped.

The slot of a position is device · N + index on that device.

Legend: S length of the global sequence, N = S/cp positions per device."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.collectives import index, size

KINDS = ("contiguous", "zigzag", "striped")


@dataclass(frozen=True)
class SequenceLayout:
    """`contiguous`: device i holds [iN, (i+1)N). `zigzag`: chunks i and 2cp-1-i of 2cp. `striped`:
    blocks of `block` positions dealt round-robin.

    Contiguous keeps neighbours together, but gives the last device about twice the mean causal
    work; zig-zag and striped balance it. Sources: Liu et al. 2023 (Ring Attention), Llama 3 2024
    §3.3.2, Brandon et al. 2023 (Striped Attention). Raises ValueError for an unknown kind, for a
    block without striping, and for a block below 1."""

    kind: str = "contiguous"
    block: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"sequence layout {self.kind!r} is unknown: {' or '.join(KINDS)}")
        if self.block < 1 or (self.block > 1 and self.kind != "striped"):
            raise ValueError(
                f"block = {self.block} must be at least 1, and 1 unless the layout is striped"
            )

    def unit(self, cp: int) -> tuple[int, str]:
        """What must divide the sequence length on `cp` devices, as (number, equation)."""
        if self.kind == "zigzag":
            return 2 * cp, f"2·cp = {2 * cp} (zig-zag)"
        if self.kind == "striped":
            return cp * self.block, f"cp·block = {cp}·{self.block} = {cp * self.block} (striped)"
        return cp, f"cp = {cp} (contiguous)"


CONTIGUOUS, ZIGZAG = SequenceLayout("contiguous"), SequenceLayout("zigzag")


def check_length(layout: SequenceLayout, seq_len: int, cp: int) -> None:
    """Raises ValueError unless `seq_len` positions divide among `cp` devices."""
    unit, equation = layout.unit(cp)
    if seq_len < 1 or seq_len % unit:
        fix = max(1, -(-seq_len // unit)) * unit
        raise ValueError(
            f"sequence length {seq_len} is not divisible by {equation}: set data.seq_len={fix}"
        )


def held(layout: SequenceLayout, length: int, cp: int, device: Any, xp: Any = np) -> Any:
    """Global positions int32 [length] on `device` (0 … cp-1, may be traced with xp=jnp), in the
    order of the device."""
    place = xp.arange(length, dtype=xp.int32)
    if layout.kind == "contiguous":
        return device * length + place
    if layout.kind == "striped":
        return (place // layout.block * cp + device) * layout.block + place % layout.block
    half = length // 2
    return xp.where(
        place < half, device * half + place, (2 * cp - 1 - device) * half + place - half
    )


def positions(layout: SequenceLayout, length: int) -> jax.Array:
    """Global positions int32 [length] of this device; all positions in order where cp is unbound.
    Raises ValueError when length · cp does not fit the layout."""
    cp = size("cp")
    check_length(layout, length * cp, cp)
    return held(layout, length, cp, index("cp"), jnp).astype(jnp.int32)


def permutation(layout: SequenceLayout, seq_len: int, cp: int) -> np.ndarray:
    """Global position of each slot, int32 [S]: `x[permutation]` is the order to be cut into cp
    shards. Raises ValueError when the length does not fit the layout."""
    check_length(layout, seq_len, cp)
    return np.concatenate([held(layout, seq_len // cp, cp, i) for i in range(cp)]).astype(np.int32)


def block_order(layout: SequenceLayout, W: int, block: int, cp: int) -> np.ndarray:
    """Which of W blocks of `block` positions is stored at each slot, int [W]. Raises ValueError
    when the layout divides a block."""
    blocks = layout
    if layout.kind == "striped":
        if layout.block % block:
            raise ValueError(
                f"striped({layout.block}) divides blocks of {block}: use a multiple of {block}"
            )
        blocks = SequenceLayout("striped", layout.block // block)
    unit, equation = blocks.unit(cp)
    if W % unit:
        raise ValueError(f"{W} blocks of {block} are not divisible by {equation}")
    return permutation(blocks, W, cp)


def owners(layout: SequenceLayout, W: int, block: int, cp: int) -> np.ndarray:
    """Device that holds each block, int [W]. Raises ValueError as `block_order`."""
    return inverse(block_order(layout, W, block, cp)).astype(np.int64) // (W // cp)


def inverse(permutation_S: np.ndarray) -> np.ndarray:
    """Slot of each global position, int32 [S]: undoes `permutation`."""
    out = np.empty_like(permutation_S)
    out[permutation_S] = np.arange(len(permutation_S), dtype=permutation_S.dtype)
    return out


def permute(batch: Any, layout: SequenceLayout, cp: int, dim: int = 1, undo: bool = False) -> Any:
    """Every array of `batch` with its `dim` in the order of the layout (`undo`: back in the order
    of positions).

    For global arrays, outside shard_map, before they are placed on devices. Inputs, targets and
    weights must be permuted together, AFTER the shift to the next token: in the new order a
    neighbour is not the next token. Raises ValueError for arrays of different lengths, without that
    dim, or of a length that does not fit."""
    leaves = jax.tree.leaves(batch)
    if any(x.ndim <= dim for x in leaves):
        raise ValueError(
            f"shapes {[x.shape for x in leaves]}: every array needs a sequence dim {dim}"
        )
    lengths = {x.shape[dim] for x in leaves}
    if len(lengths) != 1:
        raise ValueError(
            f"sequence lengths {sorted(lengths)} differ inside one batch: permute what belongs "
            "together"
        )
    order = permutation(layout, lengths.pop(), cp)
    order = inverse(order) if undo else order
    return jax.tree.map(lambda x: x[(slice(None),) * dim + (order,)], batch)
