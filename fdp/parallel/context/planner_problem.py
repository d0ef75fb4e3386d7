"""What is planned: masks of all layers, one attention shape, a machine and limits; and the
candidates of a layer.

Legend: L layers, J lists of a layer (1, or one a key head), W blocks of the sequence.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from fdp.count import context as cost
from fdp.count.blocks import BlockCounts
from fdp.count.context import AttentionShape
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout, owners
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.planner_price import BLOCKS, Price, Refused, price
from fdp.parallel.context.planner_time import Machine

OBJECTIVES = ("seconds", "bytes")
Priced = dict[CommPlan, Price | str]  # a price, or why the plan cannot run


class Masks:
    """Key blocks that each query block attends to: bool [L, W, W] (all heads united) or [L, J, W,
    W], rows queries.

    Keeps what it counted, for pricing many machines and lengths. Raises ValueError for another
    shape or type, and for a query block without any key."""

    def __init__(self, masks: np.ndarray):
        masks = np.asarray(masks)
        if (
            masks.dtype != bool
            or masks.ndim not in (3, 4)
            or masks.shape[-1] != masks.shape[-2]
            or not masks.size
        ):
            raise ValueError(
                f"masks {masks.dtype} {list(masks.shape)} must be bool [L, W, W] or [L, J, W, W]"
            )
        self.masks_LxJxWxW = masks[:, None] if masks.ndim == 3 else masks
        if not (seen := self.masks_LxJxWxW.any(-1)).all():
            layer, head, row = np.argwhere(~seen)[0]
            raise ValueError(
                f"layer {layer}, list {head}: query block {row} attends to no key block"
            )
        self._counts: dict[tuple[int, int, bytes], BlockCounts] = {}

    @property
    def size(self) -> tuple[int, int, int]:
        """(L, J, W)."""
        return self.masks_LxJxWxW.shape[:3]

    def counts(self, layer: int, owner_W: np.ndarray, cp: int) -> BlockCounts:
        """BlockCounts of a layer where device owner_W[w] holds block w."""
        key = (layer, cp, owner_W.tobytes())
        if key not in self._counts:
            self._counts[key] = BlockCounts.of(self.masks_LxJxWxW[layer], owner_W, cp)
        return self._counts[key]


@dataclass(frozen=True, eq=False)
class Problem:
    """What is planned. `grid`: gather capacities are multiples of so many blocks (fewer programs);
    `memory` bytes limits each layer; `balance` the max/mean FLOPs of the model, the busiest device
    of every layer added up; `layouts`: None = contiguous, zig-zag, striped by block. Raises
    ValueError for sizes that do not fit."""

    masks: Masks
    shape: AttentionShape
    machine: Machine
    grid: int = 1
    memory: float = float("inf")
    balance: float = float("inf")
    objective: str = "seconds"
    layouts: tuple[SequenceLayout, ...] | None = None
    _prices: dict[tuple[int, CommPlan], Price | str] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        (_, J, W), s = self.masks.size, self.shape
        if s.cp < 2 or s.seq_len % W or W % s.cp:
            raise ValueError(
                f"sequence {s.seq_len}, {W} blocks, cp = {s.cp}: cp ≥ 2 must divide the blocks, "
                "and they the sequence"
            )
        if J not in (1, s.kv_heads):
            raise ValueError(
                f"{J} lists a layer: 1 for all heads, or one of each of the kv_heads = {s.kv_heads}"
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective {self.objective!r} is unknown: {' or '.join(OBJECTIVES)}")
        if self.grid < 1 or self.memory <= 0 or self.balance < 1:
            raise ValueError(
                f"grid {self.grid} ≥ 1, memory {self.memory} > 0, balance {self.balance} ≥ 1 must "
                "hold"
            )

    @property
    def layers(self) -> int:
        """L."""
        return self.masks.size[0]

    @property
    def block(self) -> int:
        """Positions of a block."""
        return self.shape.seq_len // self.masks.size[2]

    @cached_property
    def places(self) -> dict[SequenceLayout, np.ndarray]:
        """Owner of each block in every layout that keeps blocks whole. Raises ValueError when none
        does.
        """
        found, refused = {}, []
        for layout in self.layouts or (CONTIGUOUS, ZIGZAG, SequenceLayout("striped", self.block)):
            try:
                found[layout] = owners(layout, self.masks.size[2], self.block, self.shape.cp)
            except ValueError as error:
                refused.append(str(error))
        if not found:
            raise ValueError("; ".join(refused))
        return found

    def counts(self, layer: int, layout: SequenceLayout) -> BlockCounts:
        """BlockCounts of one layer in one layout."""
        return self.masks.counts(layer, self.places[layout], self.shape.cp)

    def price(self, layer: int, plan: CommPlan) -> Price | str:
        """Price of a plan at a layer, or why it cannot run there."""
        if (layer, plan) not in self._prices:
            self._prices[layer, plan] = self._price(layer, plan)
        return self._prices[layer, plan]

    def _price(self, layer: int, plan: CommPlan) -> Price | str:
        try:
            found = price(
                self.counts(layer, plan.layout), plan, self.shape, self.block, self.machine
            )
        except Refused as error:
            return str(error)
        if found.memory > self.memory:
            return f"holds {found.memory / 1e6:,.0f} MB, more than {self.memory / 1e6:,.0f} MB"
        return found

    def value(self, found: Price) -> tuple[float, float]:
        """What is minimised, and what decides between equals."""
        return self.ordered(found.seconds, found.wire)

    def ordered(self, seconds: float, wire: float) -> tuple[float, float]:
        """The objective first."""
        return (seconds, wire) if self.objective == "seconds" else (wire, seconds)

    def priced(self, layer: int, plans: Iterable[CommPlan]) -> Priced:
        """Prices of plans at a layer."""
        return {plan: self.price(layer, plan) for plan in plans}


# Candidates
# -------------------------------------------------------------------------------------------------


def dense(layout: SequenceLayout, cp: int) -> list[CommPlan]:
    """Plans that send all keys."""
    return [replace(plan, layout=layout) for plan in cost.plans(cp)]


def sparse(problem: Problem, layout: SequenceLayout, layers: Iterable[int]) -> list[CommPlan]:
    """Plans that send no more than some layers need, one set of hops or capacity for all of
    them.
    """
    counts, cp = [problem.counts(layer, layout) for layer in layers], problem.shape.cp
    found = []
    for plan in dense(layout, cp):
        r = plan.ring_degree(cp)
        hops = tuple(sorted(set().union(*(c.hops(plan.head_split) for c in counts))))
        if len(hops) < r - 1:
            found.append(replace(plan, hops=hops))
    needed = -(-max(c.capacity for c in counts) // problem.grid) * problem.grid
    if needed:  # no more than a device holds
        found.append(
            CommPlan(BLOCKS, capacity=min(needed, problem.masks.size[2] // cp), layout=layout)
        )
    return found


def candidates(problem: Problem, layer: int, layout: SequenceLayout) -> list[CommPlan]:
    """All plans of a layer, with those that would be the same in every layer."""
    own, shared = sparse(problem, layout, [layer]), sparse(problem, layout, range(problem.layers))
    return list(dict.fromkeys([*dense(layout, problem.shape.cp), *own, *shared]))
