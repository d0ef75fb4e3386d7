"""The cheapest path through the layers of a model: a plan of each, in a layout of each, under a
limit on imbalance.

Without the limit this is Viterbi's algorithm over layouts. With it, a path is also judged by what
its busiest devices compute in all, so every layout keeps the paths that none beats in both cost and
compute: exact while there are at most MOST of them, which thins out the near ties beyond."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.planner_price import Price
from fdp.parallel.context.planner_problem import Priced, Problem

MOST = 2000
ROUNDING = 1e-9
Cost = tuple[float, float]  # the objective, and what decides between equals
Choice = TypeVar("Choice", bound=Hashable)
# What a layer may run in one layout: its cost, and seconds of its busiest device where these are
# limited (else 0).
Options = Mapping[Choice, tuple[Cost, float]]


@dataclass(frozen=True)
class _Path(Generic[Choice]):
    cost: Cost
    busy: float  # seconds of the busiest device in every layer, added up; 0 where there is no limit
    at: int
    choice: Choice | None
    before: "_Path[Choice] | None"


def best_path(
    problem: Problem, options: list[list[Priced]], between: Mapping[tuple[int, int], Cost]
) -> list[tuple[int, CommPlan]]:
    """(layout, plan) of every layer, at the least cost.

    options[layer][layout]: priced plans; between[a, b]: cost of going from layout a to b between
    two layers. Raises ValueError when some layer can run nothing, or no path keeps to
    `problem.balance`."""
    runs = [[_runs(priced) for priced in layer] for layer in options]
    for layer, places in enumerate(runs):
        if not any(places):
            reasons = sorted(
                {f"{p.kind}: {why}" for priced in options[layer] for p, why in priced.items()}
            )
            raise ValueError(f"layer {layer} can run nothing: {'; '.join(reasons)}")
    limited = problem.balance < float("inf")

    def busy(found: Price) -> float:
        return float(found.compute_N[0]) if limited else 0.0

    every = [[found for at in layer for found in at.values()] for layer in runs]
    mean = sum(busy(found[0]) / found[0].imbalance for found in every)
    limit = problem.balance * mean * (1 + ROUNDING) if limited else 0.0
    judged = [
        [{plan: (problem.value(one), busy(one)) for plan, one in at.items()} for at in layer]
        for layer in runs
    ]
    found = cheapest(judged, between, limit)
    if found is None:
        least = sum(min(map(busy, of_layer)) for of_layer in every)
        raise ValueError(
            f"max/mean FLOPs are at least {least / mean:.2f}, more than {problem.balance:.2f}"
        )
    return found


def cheapest(
    options: Sequence[Sequence[Options[Choice]]],
    between: Mapping[tuple[int, int], Cost],
    limit: float = 0.0,
) -> list[tuple[int, Choice]] | None:
    """(layout, choice) of every layer, at the least cost; None where every path is busier than
    `limit`.

    options[layer][layout], of every layer some; between[a, b]: as in `best_path`, 0 where it is
    left out."""
    least = [min(busy for at in layer for _, busy in at.values()) for layer in options]
    paths: list[_Path[Choice]] = [_Path((0.0, 0.0), 0.0, -1, None, None)]
    for layer, places in enumerate(options):
        room = limit - sum(least[layer + 1 :])
        grown = []
        for at, found in enumerate(places):
            arrived = [_step(path, at, between.get((path.at, at), (0.0, 0.0))) for path in paths]
            added = (
                _Path(_add(path.cost, cost), path.busy + busy, at, choice, path.before)
                for path in _undominated(arrived)
                for choice, (cost, busy) in found.items()
            )
            grown += _undominated(path for path in added if path.busy <= room)
        paths = grown
    return _unwind(min(paths, key=lambda path: path.cost)) if paths else None


def _runs(priced: Priced) -> dict[CommPlan, Price]:
    return {plan: found for plan, found in priced.items() if isinstance(found, Price)}


def _add(a: Cost, b: Cost) -> Cost:
    return a[0] + b[0], a[1] + b[1]


def _step(path: _Path[Choice], at: int, cost: Cost) -> _Path[Choice]:
    """`path` before a layer in layout `at`."""
    before = path if path.choice is not None else None
    return _Path(_add(path.cost, cost), path.busy, at, None, before)


def _undominated(paths: Iterable[_Path[Choice]]) -> list[_Path[Choice]]:
    """Paths that none beats in cost and compute, the cheapest first."""
    kept: list[_Path[Choice]] = []
    for path in sorted(paths, key=lambda path: (path.cost, path.busy)):
        if not kept or path.busy < kept[-1].busy:
            kept.append(path)
    return (
        kept
        if len(kept) <= MOST
        else [kept[i * (len(kept) - 1) // (MOST - 1)] for i in range(MOST)]
    )


def _unwind(path: _Path[Choice]) -> list[tuple[int, Choice]]:
    found = []
    step: _Path[Choice] | None = path
    while step is not None and step.choice is not None:
        found.append((step.at, step.choice))
        step = step.before
    return found[::-1]
