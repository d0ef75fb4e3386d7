"""Which keys a query may see, as data that every attention path (XLA, Pallas, ring, sparse) reads
the same way.

Positions are global token indices and travel with queries and keys, so a mask is right for any
order of tokens: zig-zag or striped shards, gathered blocks, what an all-to-all leaves behind.
Legend: N queries, M keys."""

from dataclasses import dataclass

import jax

KINDS = ("bidirectional", "causal")


@dataclass(frozen=True)
class Mask:
    """`kind` bidirectional or causal (k ≤ q); `window` w > 0 keeps |q - k| < w; `packed` asks for
    segment ids.

    Raises ValueError for an unknown kind or a negative window.
    """

    kind: str = "bidirectional"
    window: int = 0
    packed: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask kind {self.kind!r} is unknown: {' or '.join(KINDS)}")
        if self.window < 0:
            raise ValueError(f"window = {self.window} must be 0 (no limit) or positive")

    @property
    def everything(self) -> bool:
        """Whether every query sees every key."""
        return self.kind == "bidirectional" and not self.window and not self.packed


def allowed(
    mask: Mask,
    q_position_N: jax.Array,
    k_position_M: jax.Array,
    q_segment_N: jax.Array | None = None,
    k_segment_M: jax.Array | None = None,
) -> jax.Array:
    """Whether query n may see key m: int [..., N], int [..., M] → bool [..., N, M].

    Segment ids (equal inside a document) are needed for a packed mask. Raises ValueError without
    them."""
    difference_NxM = q_position_N[..., :, None] - k_position_M[..., None, :]
    seen_NxM = difference_NxM >= 0 if mask.kind == "causal" else difference_NxM == difference_NxM
    if mask.window:
        seen_NxM &= (difference_NxM < mask.window) & (difference_NxM > -mask.window)
    if mask.packed:
        if q_segment_N is None or k_segment_M is None:
            raise ValueError("a packed mask needs the segment ids of queries and keys")
        seen_NxM &= q_segment_N[..., :, None] == k_segment_M[..., None, :]
    return seen_NxM
