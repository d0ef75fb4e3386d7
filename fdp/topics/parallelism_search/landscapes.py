"""Measured landscapes, searched by every algorithm from the same seeds; priors come from fits
without the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fdp.price.fit import FitData
from fdp.price.measurements import MeasuredRun
from fdp.topics.parallelism_search import search
from fdp.topics.parallelism_search.validate import HoldOut, landscapes

WITHIN = 0.05
CLOSE = 0.01  # a search ends there
LEAST = 20  # plans: fewer are no search
ALGORITHMS: dict[str, search.Algorithm] = {
    name: getattr(search, name)
    for name in ("random", "expert", "tpe", "cma_es", "evolution", "bayes_flat", "bayes")
}


@dataclass(frozen=True)
class Searches:
    """Per landscape and algorithm: runs needed to come within 5 % (one per seed), and regret after
    each run (mean).
    """

    needed: dict[str, dict[str, np.ndarray]]
    regret: dict[str, dict[str, np.ndarray]]


def _plan(m: MeasuredRun) -> dict[str, int]:
    p = m.job.plan
    return {"tp": p.tp, "pp": p.pp, "dp": p.dp, "mbs": p.microbatch, "zero": p.zero}


def _time(m: MeasuredRun) -> float:
    return float("inf") if m.failed or not np.isfinite(m.step_time) else m.step_time


def _landscape(
    data: FitData, o: HoldOut, rows: np.ndarray, name: str
) -> tuple[search.Landscape, search.Prior]:
    """Distinct plans of `rows` with their times; a plan measured twice keeps its faster run."""
    runs = data.measurements
    found: dict[tuple[tuple[str, int], ...], int] = {}
    for row in rows:
        key = tuple(_plan(runs[row]).items())
        if key not in found or _time(runs[row]) < _time(runs[found[key]]):
            found[key] = int(row)
    kept, p = np.array(list(found.values())), o.hybrid
    times = np.array([_time(runs[row]) for row in kept])
    prior = search.Prior(np.log(p.time[kept]), p.log_std[kept], np.clip(p.feasible[kept], 0.0, 1.0))
    return search.Landscape(name, tuple(dict(key) for key in found), times), prior


def compare(data: FitData, outcomes: Sequence[HoldOut], seeds: int) -> Searches:
    """Search every landscape of at least `LEAST` plans at 64 GPUs and more of the outcomes' unseen
    models.
    """
    found = Searches({}, {})
    for o in (o for o in outcomes if o.case.kind == "model"):
        for places in landscapes(data, o.at).values():
            rows = o.at[places]
            if len(rows) < LEAST or np.isinf([_time(data.measurements[r]) for r in rows]).all():
                continue
            name = f"{o.case.name} on {data.measurements[rows[0]].job.plan.chips}"
            landscape, prior = _landscape(data, o, rows, name)
            found.needed[name], found.regret[name] = {}, {}
            for algorithm, function in ALGORITHMS.items():
                traces = [
                    search.run(landscape, function, seed, prior, within=CLOSE)
                    for seed in range(seeds)
                ]
                count = len(landscape.plans)
                needed = [search.evaluations_to(t.order, landscape, WITHIN) for t in traces]
                found.needed[name][algorithm] = np.minimum(needed, count)
                curves = [_padded(t.regret_E, count) for t in traces]
                found.regret[name][algorithm] = np.mean(curves, 0)
    return found


def _padded(regret_E: np.ndarray, count: int) -> np.ndarray:
    """Regret after each of `count` runs; infinite (nothing ran yet) becomes the largest finite one
    of the curve.
    """
    full = np.concatenate([regret_E, np.full(count - len(regret_E), regret_E[-1])])
    worst = full[np.isfinite(full)].max(initial=0.0)
    return np.where(np.isfinite(full), full, worst)
