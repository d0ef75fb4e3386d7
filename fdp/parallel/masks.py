"""Attention masks as data, which every attention path (XLA, Pallas, ring, sparse) reads the same
way.

Positions are global token indices that are passed with queries and keys. A mask therefore holds for
any order of tokens: zig-zag or striped shards, gathered blocks, the result of an all-to-all.

Legend: N queries, M keys, I tiles of queries, J tiles of keys."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax

KINDS = ("bidirectional", "causal")


@runtime_checkable
class Rule(Protocol):
    """A condition on (query, key) indices, for masks that `Mask` has no field for. Rules are
    hashable; equal rules mean the same condition.

    Both methods take integers or integer arrays of NumPy or JAX that broadcast, and use operators
    only, so they run before tracing, in a program and inside kernels."""

    def __call__(self, q_index: Any, k_index: Any) -> Any:
        """Whether query q may see key k: bool."""
        ...

    def meets(self, q_least: Any, q_most: Any, k_least: Any, k_most: Any) -> Any:
        """bool: False only where no query in q_least … q_most sees a key in k_least … k_most."""
        ...


@dataclass(frozen=True)
class Mask:
    """`kind` is bidirectional or causal (k ≤ q). `window` w > 0 keeps |q - k| < w. `packed`:
    queries see keys of their own segment only. `rule` must allow the pair as well.

    Raises ValueError for an unknown kind, a negative window or something that is no rule."""

    kind: str = "bidirectional"
    window: int = 0
    packed: bool = False
    rule: Rule | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask kind {self.kind!r} is unknown: {' or '.join(KINDS)}")
        if self.window < 0:
            raise ValueError(f"window = {self.window} must be 0 (no limit) or positive")
        if self.rule is not None and not isinstance(self.rule, Rule):
            raise ValueError(
                f"rule = {self.rule!r} needs the methods __call__ and meets of masks.Rule"
            )

    @property
    def orders(self) -> bool:
        """Whether the mask reads positions."""
        return self.kind == "causal" or self.window > 0 or self.rule is not None

    @property
    def everything(self) -> bool:
        """Whether every query sees every key."""
        return not self.orders and not self.packed


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
    q_Nx1, k_1xM = q_position_N[..., :, None], k_position_M[..., None, :]
    difference_NxM = q_Nx1 - k_1xM
    seen_NxM = difference_NxM >= 0 if mask.kind == "causal" else difference_NxM == difference_NxM
    if mask.window:
        seen_NxM &= (difference_NxM < mask.window) & (difference_NxM > -mask.window)
    if mask.rule is not None:
        seen_NxM &= mask.rule(q_Nx1, k_1xM)
    if mask.packed:
        if q_segment_N is None or k_segment_M is None:
            raise ValueError("a packed mask needs the segment ids of queries and keys")
        seen_NxM &= q_segment_N[..., :, None] == k_segment_M[..., None, :]
    return seen_NxM


def tiles_meet(
    mask: Mask, q_least: Any, q_most: Any, k_least: Any, k_most: Any, segments: Any = None
) -> Any:
    """Whether a query of one tile may see a key of another, judged from their least and greatest
    positions: bool. It may be True for tiles without a visible pair, but is never False where there
    is one.

    Arrays of NumPy or JAX that broadcast, such as [I, 1] and [1, J]. segments: the same four bounds
    of segment ids, for a packed mask."""
    low, high = q_least - k_most, q_most - k_least  # of query minus key
    live = low <= high
    if mask.kind == "causal":
        live &= high >= 0
    if mask.window:
        live &= (low < mask.window) & (high > -mask.window)
    if mask.rule is not None:
        live &= mask.rule.meets(q_least, q_most, k_least, k_most)
    if mask.packed and segments is not None:
        q_low, q_high, k_low, k_high = segments
        live &= (q_low <= k_high) & (q_high >= k_low)
    return live
