"""What every method would send on the same masks: the bars, and the bounds, of a plan for every
layer.

Sources: Liu et al. 2023 (ring), Llama 3 2024 §3.3.2 (zig-zag, all-gather), Fang & Zhao 2024 (USP),
MTraining (striped ring, saves compute and sends every key), MagiAttention (sends a key only where
it is needed).

Legend: L and N layers, W blocks of a sequence, D devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fdp.parallel.context import planner
from fdp.parallel.context.layouts import ZIGZAG, SequenceLayout
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.planner import ModelPlan, summary
from fdp.parallel.context.planner_problem import Masks, Problem
from fdp.parallel.context.planner_uniform import (
    best_or_why,
    need_only_bytes,
    uniform_dense,
    uniform_sparse,
)


@dataclass(frozen=True)
class Method:
    """`bytes` on the wire per device, forward and backward, `seconds` (None: a bound, not a
    program) and max/mean FLOPs of all layers; `kind`: fixed, uniform, adaptive or bound; `what`
    tells the plan, or why there is none (bytes then NaN)."""

    name: str
    kind: str
    bytes: float
    seconds: float | None
    imbalance: float
    what: str

    @classmethod
    def of(cls, name: str, kind: str, found: ModelPlan | str) -> "Method":
        """A plan, or why there is none."""
        if isinstance(found, str):
            return cls(name, kind, float("nan"), None, float("nan"), found)
        return cls(name, kind, found.bytes, found.seconds, found.imbalance, summary(found))


def methods(problem: Problem) -> list[Method]:
    """All of them, on the same masks. Raises ValueError when no layout lets every layer run."""
    ring = CommPlan("ring", layout=ZIGZAG)
    striped = CommPlan("ring", layout=SequenceLayout("striped", problem.block))
    everything = replace(problem, masks=_visible(problem))
    gathers = [CommPlan("all_gather", layout=layout) for layout in problem.places]
    found: list[tuple[str, str, ModelPlan | str]] = [
        ("ring, dense attention", "fixed", best_or_why(everything, [ring])),
        ("ring", "fixed", best_or_why(problem, [ring])),
        ("all-gather", "fixed", best_or_why(problem, gathers)),
        ("striped ring (as MTraining)", "fixed", best_or_why(problem, [striped])),
        ("best uniform dense", "uniform", uniform_dense(problem)),
        ("best uniform sparse", "uniform", uniform_sparse(problem)),
        ("adaptive", "adaptive", planner.plan(problem)),
        ("adaptive, moving tokens", "adaptive", planner.plan_moving(problem)),
    ]
    bounds = {"gather padded by offset": True, "need only (as MagiAttention)": False}
    return [*(Method.of(*row) for row in found), *(_bound(problem, *b) for b in bounds.items())]


def _bound(problem: Problem, name: str, padded: bool) -> Method:
    least = {layout: need_only_bytes(problem, layout, padded) for layout in problem.places}
    best = min(least, key=least.__getitem__)
    return Method(f"{name}, bound", "bound", least[best], None, float("nan"), best.kind)


def _visible(problem: Problem) -> Masks:
    """Masks without sparsity: causal where all of them are, else full."""
    L, _, W = problem.masks.size
    causal = not np.triu(problem.masks.masks_LxJxWxW, 1).any()
    visible_WxW = np.tri(W, dtype=bool) if causal else np.ones((W, W), bool)
    return Masks(np.broadcast_to(visible_WxW, (L, W, W)))


def needs(found: Problem, lengths: Sequence[int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """(share [N, D, D] of each device's keys that each one needs, zig-zag; what each layer needs in
    every layout).

    A line of the table: units of keys and values that a device receives (mean), the most of any
    pair, max/mean work, and the bytes of the mean at `lengths` in the shape that is planned."""
    s, units, table = found.shape, [], []
    for layer in range(found.layers):
        for layout in found.places:
            need = found.counts(layer, layout)
            remote_DxD = np.where(np.eye(s.cp, dtype=bool), 0.0, need.units_DxD)
            received = float(remote_DxD.sum(1).mean())
            line: dict[str, Any] = {"layer": layer, "layout": layout.kind, "units": received}
            line |= {"most of a pair": float(remote_DxD.max())}
            line |= {"max/mean work": need.imbalance}
            line |= {"bytes": {n: received * replace(s, seq_len=n).unit for n in lengths}}
            table.append(line)
            if layout == ZIGZAG:
                units.append(need.units_DxD)
    return np.stack(units), table
