"""How one attention layer communicates over cp, as data, and every check that can be made before a
program is built.

A plan splits cp = r · u: the trailing sub-axes (u devices) exchange heads or sequences for
positions, the others form a ring of r."""

import itertools
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, SequenceLayout
from fdp.parallel.masks import Mask

ATTEND = ("ring", "ulysses", "usp", "all_gather", "batch")  # whole sequences: training, prefill
DECODE = ("tree", "helix")  # few replicated queries against a sharded cache
RINGS = ("ring", "usp", "batch")
GATHER = "gather"  # of the key blocks that lists ask for
LISTED = (
    GATHER,
    "ulysses",
    "all_gather",
)  # of those with lists of key blocks: fdp.parallel.context.lists
MASKS = ("bidirectional", "causal", "bidirectional window", "causal window", "packed", "rule")


@dataclass(frozen=True)
class CommPlan:
    """kind: ring | ulysses | usp | all_gather | batch for whole sequences, gather for lists of key
    blocks, tree | helix for decoding.

    head_split: u, the devices that share heads (ulysses: all of cp; usp) or sequences (batch); 1
    otherwise. hops: ring offsets whose keys are fetched besides the local ones, such as (1,) for a
    window; None is the whole ring. capacity: for gather, the key blocks that a device can fetch
    from each other device; 0 otherwise. layout: which positions each device holds."""

    kind: str = "ring"
    head_split: int = 1
    hops: tuple[int, ...] | None = None
    capacity: int = 0
    layout: SequenceLayout = field(default=CONTIGUOUS)

    def ring_degree(self, cp: int) -> int:
        """r: devices of one ring (1 for plans without a ring)."""
        return cp // self.head_split if self.kind in RINGS else 1

    def tails(self, mask: Mask, length: int) -> tuple[int, ...]:
        """How many of the `length` positions of a ring member each hop fetches: all, but under a
        causal window, where a member holds consecutive positions, only the last that it reaches."""
        whole = self.layout != CONTIGUOUS or mask.kind != "causal" or not mask.window
        hops, reach = self.hops or (), mask.window - 1
        return tuple(
            length if whole else max(min(length, reach - (o - 1) * length), 0) for o in hops
        )


_REFUSED = {
    (
        "packed",
        "tree",
        None,
    ): "a row of a cache is one sequence, it has no segments: use a causal mask",
    (
        "packed",
        "helix",
        None,
    ): "a row of a cache is one sequence, it has no segments: use a causal mask",
    (
        None,
        "tree",
        "zigzag",
    ): "zig-zag needs the final length and a cache grows: use striped (append round-robin)",
    (
        None,
        "helix",
        "zigzag",
    ): "zig-zag needs the final length and a cache grows: use striped (append round-robin)",
}


def _reason(mask: str, kind: str, layout: str) -> str:
    keys = itertools.product((mask, None), (kind,), (layout, None))
    return next((_REFUSED[key] for key in keys if key in _REFUSED), "")


# (mask kind, plan kind, layout kind) → why it is not supported; "" = supported and tested.
SUPPORT: dict[tuple[str, str, str], str] = {
    key: _reason(*key) for key in itertools.product(MASKS, (*ATTEND, *DECODE), layouts.KINDS)
}


def mask_kind(mask: Mask) -> str:
    """The mask's row of SUPPORT."""
    if mask.packed or mask.rule is not None:
        return "packed" if mask.packed else "rule"
    return f"{mask.kind} window" if mask.window else mask.kind


def check(
    plan: CommPlan, mask: Mask, *, seq_len: int, cp: int, heads: int, kv_heads: int, batch: int
) -> None:
    """Raises ValueError, with equation, values and fix, for a plan that could not run or would not
    be exact.

    seq_len: global positions; heads, kv_heads: of one tp shard; batch: sequences on one device and
    microbatch."""
    if plan.kind == GATHER:
        raise ValueError(
            "context plan 'gather' needs lists of key blocks: "
            "fdp.parallel.context.lists.attend_blocks"
        )
    if plan.kind not in (*ATTEND, *DECODE):
        raise ValueError(f"context plan {plan.kind!r} is unknown: {', '.join((*ATTEND, *DECODE))}")
    if reason := SUPPORT[mask_kind(mask), plan.kind, plan.layout.kind]:
        raise ValueError(
            f"{mask_kind(mask)} mask, plan {plan.kind}, {plan.layout.kind} layout: {reason}"
        )
    if plan.capacity:
        raise ValueError(
            f"capacity = {plan.capacity}: plan {plan.kind} gathers no blocks, set capacity=0"
        )
    layouts.check_length(plan.layout, seq_len, cp)
    if mask.window > seq_len:
        raise ValueError(
            f"window = {mask.window} > sequence length {seq_len}: set window=0 for no limit"
        )
    if heads % kv_heads:
        raise ValueError(
            f"heads = {heads} is not divisible by kv_heads = {kv_heads}: no whole groups"
        )
    _check_split(plan, cp, heads, kv_heads, batch)
    _check_hops(plan, mask, seq_len, cp)


def _check_split(plan: CommPlan, cp: int, heads: int, kv_heads: int, batch: int) -> None:
    u = plan.head_split
    if plan.kind == "ulysses" and u != cp:
        raise ValueError(
            f"ulysses splits heads over all of cp = {cp}, not {u}: set head_split={cp}, or use usp"
        )
    if plan.kind not in ("ulysses", "usp", "batch") and u != 1:
        raise ValueError(f"plan {plan.kind} splits no heads: head_split = {u} must be 1")
    if u < 1 or cp % u:
        fix = f"set head_split={cp}" if cp & (cp - 1) else f"use a power of two up to {cp}"
        raise ValueError(f"cp = {cp} is not divisible by head_split = {u}: {fix}")
    if 1 < u < cp and cp & (cp - 1):
        raise ValueError(
            f"cp = {cp} is no power of two, so the mesh does not split it into head_split = {u} "
            f"and rings of {cp // u}: set head_split={cp}, or use plan ring"
        )
    if plan.kind == "batch":
        if batch % u:
            raise ValueError(
                f"{batch} sequence(s) on a device are not divisible by head_split = {u}: a device "
                "must hold a multiple "
                f"of {u}, lower head_split or raise train.batch"
            )
        return
    split, name = (cp, "cp") if plan.kind == "helix" else (u, "head_split")
    if heads % split:
        raise ValueError(
            f"heads = {heads} (per tp shard) is not divisible by {name} = {split}: at most {heads} "
            "devices can share "
            f"out {heads} heads, use a smaller head_split or plan ring"
        )
    if plan.kind != "helix" and kv_heads % u and u % kv_heads:
        raise ValueError(
            f"kv_heads = {kv_heads} and head_split = {u}: one must divide the other, so that a "
            "device holds whole "
            f"key heads or each is repeated equally often"
        )


def _check_hops(plan: CommPlan, mask: Mask, seq_len: int, cp: int) -> None:
    if plan.hops is None:
        return
    r = plan.ring_degree(cp)
    if plan.kind not in RINGS or r == 1:
        raise ValueError(
            f"plan {plan.kind} with head_split = {plan.head_split} has no ring: set hops=None"
        )
    if len(set(plan.hops)) < len(plan.hops) or any(not 0 < o < r for o in plan.hops):
        raise ValueError(
            f"hops = {plan.hops} must be distinct ring offsets in 1…{r - 1} (ring of cp/head_split "
            f"= {r})"
        )
    needed = needed_hops(mask, plan.layout, seq_len, cp, plan.head_split)
    if missing := sorted(set(needed) - set(plan.hops)):
        raise ValueError(
            f"hops = {plan.hops} miss offsets {missing} that the {mask_kind(mask)} mask needs in "
            "the "
            f"{plan.layout.kind} layout: set hops={needed}"
        )


@lru_cache
def needed_hops(
    mask: Mask, layout: SequenceLayout, seq_len: int, cp: int, head_split: int = 1
) -> tuple[int, ...]:
    """Ring offsets o such that some device needs keys of the device o places before it. Segments
    are not considered; they could only remove offsets.

    The ring is that of cp/head_split devices, each with the positions of head_split neighbours."""
    r = cp // head_split
    reach = mask.window - 1 if mask.window else seq_len
    slots = layouts.inverse(layouts.permutation(layout, seq_len, cp))
    owner_S = slots // (seq_len // r)
    # Runs of consecutive positions of one owner, and from each to the one `far` runs on.
    first_R = np.flatnonzero(np.diff(owner_S, prepend=-1))
    last_R, owner_R = np.append(first_R[1:], seq_len) - 1, owner_S[first_R]
    found: set[int] = set()
    for far in range(1, len(first_R)):
        near = first_R[far:] - last_R[:-far] <= reach
        if not near.any() or len(found) == r - 1:
            break
        before = np.unique((owner_R[far:] - owner_R[:-far])[near] % r)
        found |= {int(o) for o in before if o}
        if mask.kind != "causal":
            found |= {int(-o % r) for o in before if o}
    return tuple(sorted(found))
