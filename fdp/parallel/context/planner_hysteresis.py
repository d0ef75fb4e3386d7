"""Plans as integers for a compiled program, and when to switch them: hysteresis over windows of
training steps.

A program compiles a static list of branches (`lax.switch`), all in one layout; a plan is int32 [L],
the branch of each layer. Every host computes it from the same masks, so all of them agree."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.planner import LayerPlan, ModelPlan, model_value, plan_among
from fdp.parallel.context.planner_price import Price
from fdp.parallel.context.planner_problem import Problem
from fdp.parallel.context.planner_search import ROUNDING


def check_branches(branches: Sequence[CommPlan]) -> None:
    """Raises ValueError for no branches, one twice, several layouts, or none that runs any mask."""
    if not branches or len(set(branches)) < len(branches):
        raise ValueError(f"branches must be at least one and all different: {list(branches)}")
    if len({branch.layout for branch in branches}) > 1:
        raise ValueError(
            "branches share one layout of the sequence, not "
            f"{sorted({b.layout.kind for b in branches})}"
        )
    if all(branch.capacity or branch.hops is not None for branch in branches):
        raise ValueError(
            "some branch must send all keys (hops=None, capacity=0), for masks that outgrow the "
            "others"
        )


def encode(plans: Sequence[CommPlan], branches: Sequence[CommPlan]) -> np.ndarray:
    """Index of each layer's plan in `branches`: int32 [L]. Raises ValueError for a plan that is not
    there.
    """
    check_branches(branches)
    at = {branch: i for i, branch in enumerate(branches)}
    if missing := [f"layer {i}: {p}" for i, p in enumerate(plans) if p not in at]:
        raise ValueError(f"plans that no branch runs: {'; '.join(missing)}")
    return np.array([at[p] for p in plans], np.int32)


def decode(plan_L: np.ndarray, branches: Sequence[CommPlan], layers: int) -> tuple[CommPlan, ...]:
    """Plan of each layer from its indices. Raises ValueError for a wrong length, type or index."""
    check_branches(branches)
    plan_L = np.asarray(plan_L)
    if plan_L.shape != (layers,) or not np.issubdtype(plan_L.dtype, np.integer):
        raise ValueError(
            f"a plan is one integer for each of {layers} layers, not {plan_L.dtype} "
            f"{list(plan_L.shape)}"
        )
    if wrong := [(i, int(b)) for i, b in enumerate(plan_L) if not 0 <= b < len(branches)]:
        raise ValueError(
            f"(layer, branch) {wrong} not in the {len(branches)} branches 0 … {len(branches) - 1}"
        )
    return tuple(branches[int(b)] for b in plan_L)


@dataclass
class Scheduler:
    """Keeps a running plan until another has been better by more than `gain` (share of the
    objective) for `windows` consecutive windows; a plan that no longer sends all that a mask needs
    is replaced at once.

    State for a checkpoint: `current` int32 [L] (None before the first window) and `streak`, windows
    won in a row. Raises ValueError for bad branches, and for gain outside [0, 1) or windows below
    1."""

    branches: tuple[CommPlan, ...]
    gain: float = 0.05
    windows: int = 3
    current: np.ndarray | None = None
    streak: int = 0

    def __post_init__(self) -> None:
        check_branches(self.branches)
        if not 0 <= self.gain < 1 or self.windows < 1:
            raise ValueError(
                f"gain = {self.gain} must be in [0, 1) and windows = {self.windows} at least 1"
            )

    def observe(self, problem: Problem) -> np.ndarray:
        """The plan to run in the next window, int32 [L], from the masks of the last one.

        Raises ValueError when a layer can run no branch, or the running plan has another number of
        layers."""
        priced = [problem.priced(layer, self.branches) for layer in range(problem.layers)]
        best, running = plan_among(problem, priced), self._running(problem)
        if running is not None:
            won = model_value(problem, best)[0] < (1 - self.gain) * model_value(problem, running)[0]
            self.streak = self.streak + 1 if won else 0
        if running is None or self.streak >= self.windows:
            self.current, self.streak = encode(best.plans, self.branches), 0
        assert self.current is not None
        return self.current

    def _running(self, problem: Problem) -> ModelPlan | None:
        """The running plan under the new masks; None when there is none, or it is no longer exact
        or even.
        """
        if self.current is None:
            return None
        plans = decode(self.current, self.branches, problem.layers)
        layers = []
        for layer, plan in enumerate(plans):
            found = problem.price(layer, plan)
            if not isinstance(found, Price):
                return None
            layers.append(LayerPlan(plan, found))
        model = ModelPlan(tuple(layers))
        return model if model.imbalance <= problem.balance * (1 + ROUNDING) else None
