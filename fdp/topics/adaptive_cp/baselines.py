"""What an adaptive plan is compared with, on the same masks: every method that could have been used
instead.

Sources: Liu et al. 2023 (ring), Llama 3 2024 §3.3.2 (zig-zag, all-gather), Fang & Zhao 2024 (USP),
MTraining (striped ring, saves compute and sends every key), MagiAttention (sends a key only where
it is needed)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from fdp.parallel.context.layouts import ZIGZAG, SequenceLayout
from fdp.parallel.context.plan import CommPlan
from fdp.topics.adaptive_cp import planner
from fdp.topics.adaptive_cp.planner import ModelPlan, best_uniform, model_value, uniform
from fdp.topics.adaptive_cp.price import block_bytes
from fdp.topics.adaptive_cp.problem import Masks, Problem, dense, sparse


@dataclass(frozen=True)
class Baseline:
    """`bytes` on the wire per device, forward and backward, `seconds` (None: a bound, not a
    program) and max/mean FLOPs of all layers; `what` tells the plan, or why there is none (bytes
    then NaN)."""

    name: str
    bytes: float
    seconds: float | None
    imbalance: float
    what: str


def describe(plan: CommPlan) -> str:
    """ "usp u=4 hops 1,2 zigzag"."""
    parts = [plan.kind, f"u={plan.head_split}" if plan.head_split > 1 else ""]
    parts.append("" if plan.hops is None else f"hops {','.join(map(str, plan.hops)) or 'none'}")
    parts.append(f"c={plan.capacity}" if plan.capacity else "")
    return " ".join(part for part in (*parts, plan.layout.kind) if part)


def summary(found: ModelPlan) -> str:
    """Plans of a model with the number of layers that run each, the most frequent first."""
    names = [describe(plan) for plan in found.plans]
    return ", ".join(
        f"{names.count(n)}× {n}" for n in sorted(set(names), key=lambda n: (-names.count(n), n))
    )


def uniform_dense(problem: Problem) -> ModelPlan:
    """The best plan that sends all keys in every layer. Raises ValueError when none can run."""
    return best_uniform(
        problem, [plan for layout in problem.places for plan in dense(layout, problem.shape.cp)]
    )


def uniform_sparse(problem: Problem) -> ModelPlan | str:
    """The best plan with one set of hops or one capacity for all layers, or why there is none."""
    layers = range(problem.layers)
    plans = [plan for layout in problem.places for plan in sparse(problem, layout, layers)]
    try:
        return best_uniform(problem, plans)
    except ValueError as error:
        return str(error)


def uniform_any(problem: Problem) -> ModelPlan:
    """The best uniform plan of all kinds: the bar of every claim."""
    both = (uniform_dense(problem), uniform_sparse(problem))
    return min((f for f in both if isinstance(f, ModelPlan)), key=lambda f: model_value(problem, f))


def need_only_bytes(problem: Problem, layout: SequenceLayout, padded: bool = False) -> float:
    """Forward and backward bytes when a device receives exactly the blocks that it needs, mean over
    devices.

    A bound for plans that fetch keys, which static shapes cannot reach; a head split may send less
    than any of them. padded: one static size for each ring offset, the most that any device needs
    over it (one permute an offset), which lies between this bound and the gather. Gradients in the
    type of the keys, as the gather's; ids are not counted."""
    blocks = 0.0
    for layer in range(problem.layers):
        remote_JxDxO = problem.counts(layer, layout).remote_JxDxO
        per_offset = remote_JxDxO.max((0, 1)) if padded else remote_JxDxO.mean((0, 1))
        blocks += float(per_offset.sum())
    return 2 * blocks * block_bytes(problem.shape, problem.block)


def baselines(problem: Problem) -> list[Baseline]:
    """All of them, and last the adaptive plans. Raises ValueError when no layout lets every layer
    run.
    """
    striped = SequenceLayout("striped", problem.block)
    everything = replace(problem, masks=_visible(problem))
    rows = [
        _row("ring, dense attention", _one(everything, [CommPlan("ring", layout=ZIGZAG)])),
        _row("ring", _one(problem, [CommPlan("ring", layout=ZIGZAG)])),
        _row(
            "all-gather",
            _one(problem, [CommPlan("all_gather", layout=at) for at in problem.places]),
        ),
        _row("striped ring (as MTraining)", _one(problem, [CommPlan("ring", layout=striped)])),
        _row("best uniform dense", uniform_dense(problem)),
        _row("best uniform sparse", uniform_sparse(problem)),
        _row("adaptive", planner.plan(problem)),
        _row("adaptive, moving tokens", planner.plan_moving(problem)),
    ]
    for name, padded in (
        ("gather padded by offset (bound)", True),
        ("need only (as MagiAttention, bound)", False),
    ):
        least = {layout: need_only_bytes(problem, layout, padded) for layout in problem.places}
        best = min(least, key=least.__getitem__)
        rows.append(Baseline(name, least[best], None, float("nan"), best.kind))
    return rows


def _one(problem: Problem, plans: Iterable[CommPlan]) -> ModelPlan | str:
    found = [uniform(problem, plan) for plan in plans if plan.layout in problem.places]
    runs = [f for f in found if isinstance(f, ModelPlan)]
    if runs:
        return min(runs, key=lambda f: model_value(problem, f))
    return "; ".join(map(str, found)) or "its layout divides blocks"


def _row(name: str, found: ModelPlan | str) -> Baseline:
    if isinstance(found, str):
        return Baseline(name, float("nan"), None, float("nan"), found)
    return Baseline(name, found.bytes, found.seconds, found.imbalance, summary(found))


def _visible(problem: Problem) -> Masks:
    """Masks without sparsity: causal where all of them are, else full."""
    masks_LxJxWxW = problem.masks.masks_LxJxWxW
    L, _, W = problem.masks.size
    causal = not np.triu(masks_LxJxWxW, 1).any()
    return Masks(
        np.broadcast_to(np.tri(W, dtype=bool) if causal else np.ones((W, W), bool), (L, W, W))
    )
