"""The cheapest comm plan of every layer, given the key blocks that each layer really attends to.

In a notebook, for layers of a named model on eight H100 in eight nodes:

    from fdp.parallel.context import planner, planner_machine
    problem = planner_machine.problem("llama3-8b", masks_LxWxW, seq_len=131_072, cp=8)
    print(planner.plan(problem))

`masks_LxWxW`: bool, key blocks that each query block attends to. What is planned stands in
`planner_problem`, prices in `planner_price` and `planner_time`, one plan for all layers in
`planner_uniform`, switching plans while a model trains in `planner_hysteresis`.

All layers of a model share one layout of the sequence, unless moving the hidden states between two
layers is paid for (`plan_moving`). Layers do not overlap one another, so a model's cost is the sum
of theirs and the best plan is the best one of each layer, in the best layout. Whatever runs in
all layers alike is among every layer's candidates: the adaptive plan is never worse than a uniform
one in the objective that it minimises.

Legend: N draws of an uncertain machine.
"""

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from fdp.count.counts import EXCHANGE
from fdp.parallel.context import planner_search as search
from fdp.parallel.context.layouts import SequenceLayout
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.planner_price import Price
from fdp.parallel.context.planner_problem import Priced, Problem, candidates


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """The plan of one layer and its price; `lost`: every alternative in its layout, with the
    reason.
    """

    plan: CommPlan
    price: Price
    lost: dict[CommPlan, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ModelPlan:
    """A plan for every layer. `moved`, `moved_N`: wire bytes and seconds [N] of hidden states put
    in another layout between layers, forward and backward. `lost`: other layouts, with the
    reason."""

    layers: tuple[LayerPlan, ...]
    moved: float = 0.0
    moved_N: np.ndarray = field(default_factory=lambda: np.zeros(1))
    lost: dict[SequenceLayout, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """What its layers run, bytes and seconds."""
        cost = f"{self.bytes / 1e6:,.1f} MB sent per device, {1e3 * self.seconds:.3g} ms"
        return f"{summary(self)}: {cost}"

    @property
    def plans(self) -> tuple[CommPlan, ...]:
        """One plan a layer."""
        return tuple(layer.plan for layer in self.layers)

    @property
    def bytes(self) -> float:
        """Wire bytes per device of all layers, forward and backward."""
        return self.moved + sum(layer.price.wire for layer in self.layers)

    @property
    def total_N(self) -> np.ndarray:
        """Seconds [N] of all layers, forward and backward."""
        return self.moved_N + np.sum([layer.price.total_N for layer in self.layers], axis=0)

    @property
    def seconds(self) -> float:
        """Nominal seconds of all layers, forward and backward."""
        return float(self.total_N[0])

    @property
    def steps(self) -> int:
        """Dependent collectives of all layers, forward and backward, without moves."""
        return sum(sum(layer.price.steps) for layer in self.layers)

    @property
    def imbalance(self) -> float:
        """Σ over layers of the busiest device's FLOPs over that of the mean: devices meet in every
        layer.
        """
        busiest = np.array([layer.price.compute_N[0] for layer in self.layers])
        return float(
            busiest.sum() / (busiest / [layer.price.imbalance for layer in self.layers]).sum()
        )


def model_value(problem: Problem, found: ModelPlan) -> tuple[float, float]:
    """`Problem.value` of a model."""
    return problem.ordered(found.seconds, found.bytes)


def plan(problem: Problem) -> ModelPlan:
    """The best plan of every layer in the best single layout. Raises ValueError when no layout lets
    every layer run.
    """
    found, lost = {}, {}
    for layout in problem.places:
        try:
            found[layout] = plan_among(problem, _options(problem, layout))
        except ValueError as error:
            lost[layout] = str(error)
    if not found:
        raise ValueError("; ".join(f"{layout.kind}: {reason}" for layout, reason in lost.items()))
    best = min(found, key=lambda layout: model_value(problem, found[layout]))
    least = model_value(problem, found[best])[0]
    for layout in found.keys() - {best}:
        lost[layout] = f"+{model_value(problem, found[layout])[0] - least:.3g} {problem.objective}"
    return replace(found[best], lost=lost)


def plan_among(problem: Problem, options: list[Priced]) -> ModelPlan:
    """The best choice of each layer among its priced plans. Raises ValueError when a layer or the
    limits allow none.
    """
    path = search.best_path(problem, [[priced] for priced in options], {(0, 0): (0.0, 0.0)})
    return ModelPlan(
        tuple(
            _layer_plan(problem, priced, at) for priced, (_, at) in zip(options, path, strict=True)
        )
    )


def plan_moving(problem: Problem) -> ModelPlan:
    """The best plan where hidden states may change layout between layers, at the price of `move`.

    The first layer's layout is free (the batch is permuted on the host) and so is the last one's
    (so are the labels). Raises ValueError when a layer or the limits allow none."""
    layouts = list(problem.places)
    moves = {
        (i, j): move(problem, a, b) for i, a in enumerate(layouts) for j, b in enumerate(layouts)
    }
    between = {
        at: problem.ordered(float(seconds_N[0]), wire) for at, (wire, seconds_N) in moves.items()
    }
    options = [_options(problem, layout) for layout in layouts]
    path = search.best_path(
        problem, [list(of_layer) for of_layer in zip(*options, strict=True)], between
    )
    chosen = tuple(
        _layer_plan(problem, options[i][layer], at) for layer, (i, at) in enumerate(path)
    )
    made = [moves[a, b] for (a, _), (b, _) in itertools.pairwise(path)]
    return ModelPlan(
        chosen, sum(m[0] for m in made), np.sum([np.zeros(1), *(m[1] for m in made)], axis=0)
    )


def move(
    problem: Problem, before: SequenceLayout, after: SequenceLayout
) -> tuple[float, np.ndarray]:
    """(wire bytes, seconds [N]) of hidden states of width heads·head_dim put in another layout,
    forward and backward.

    One all-to-all each way, in which every pair of devices sends as much as the busiest pair does.
    """
    s, a, b = problem.shape, problem.places[before], problem.places[after]
    blocks_DxD = np.zeros((s.cp, s.cp), int)
    np.add.at(blocks_DxD, (a, b), 1)
    np.fill_diagonal(blocks_DxD, 0)
    row = s.batch * s.heads * s.head_dim * s.itemsize
    wire = float((s.cp - 1) * blocks_DxD.max() * problem.block * row)
    return 2 * wire, 2 * problem.machine.send(EXCHANGE, wire, s.cp)


def _options(problem: Problem, layout: SequenceLayout) -> list[Priced]:
    return [
        problem.priced(layer, candidates(problem, layer, layout)) for layer in range(problem.layers)
    ]


def _layer_plan(problem: Problem, priced: Priced, best: CommPlan) -> LayerPlan:
    """A plan with the reasons against the others: what they cost more, or that they are too
    uneven to be afforded.
    """
    mine = priced[best]
    assert isinstance(mine, Price)

    def reason(found: Price | str) -> str:
        if isinstance(found, str):
            return found
        more = problem.value(found)[0] - problem.value(mine)[0]
        uneven = (
            f", max/mean FLOPs {found.imbalance:.2f}" if found.imbalance > mine.imbalance else ""
        )
        return f"{more:+.3g} {problem.objective}{uneven}"

    return LayerPlan(
        best, mine, {plan: reason(found) for plan, found in priced.items() if plan != best}
    )


# In words
# -------------------------------------------------------------------------------------------------


def describe(plan: CommPlan) -> str:
    """ "usp u=4 hops 1,2 zigzag"."""
    parts = [plan.kind, f"u={plan.head_split}" if plan.head_split > 1 else ""]
    parts.append("" if plan.hops is None else f"hops {','.join(map(str, plan.hops)) or 'none'}")
    parts.append(f"c={plan.capacity}" if plan.capacity else "")
    return " ".join(part for part in (*parts, plan.layout.kind) if part)


def summary(found: ModelPlan) -> str:
    """Plans of a model with the number of layers that run each, the most frequent first."""
    count = Counter(map(describe, found.plans))
    return ", ".join(f"{count[n]}× {n}" for n in sorted(count, key=lambda n: (-count[n], n)))
