"""Measured landscapes, searched by every algorithm from the same seeds; priors come from fits
without the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fdp.price.fit import FitData
from fdp.price.measurements import MeasuredRun
from fdp.topics.parallelism_search import search
from fdp.topics.parallelism_search.validate import HoldOut, Published, gathered

WITHIN = 0.05
CLOSE = 0.01  # a search ends there
LEAST = 20  # plans: fewer are no search
ALGORITHMS: dict[str, search.Algorithm] = {
    name: getattr(search, name)
    for name in ("random", "expert", "tpe", "cma_es", "evolution", "bayes_flat", "bayes")
}


@dataclass(frozen=True)
class Searched:
    """A landscape, for each algorithm: runs needed to come within 5 % (one per seed), and regret
    after each run (mean)."""

    name: str
    needed: dict[str, np.ndarray]
    regret: dict[str, np.ndarray]


def compare(data: Published, o: HoldOut, seeds: int) -> list[Searched]:
    """Search every landscape of an unseen model that has at least `LEAST` plans."""
    found = []
    for here in o.landscapes:
        if len(here.index) < LEAST or not np.isfinite(here.measured).any():
            continue
        landscape, prior = _landscape(gathered(data), here)
        count, result = len(landscape.plans), Searched(landscape.name, {}, {})
        for name, algorithm in ALGORITHMS.items():
            runs = (search.run(landscape, algorithm, i, prior, within=CLOSE) for i in range(seeds))
            traces = list(runs)
            needed = [search.evaluations_to(t.order, landscape, WITHIN) for t in traces]
            result.needed[name] = np.minimum(needed, count)
            result.regret[name] = np.mean([_padded(t.regret_E, count) for t in traces], 0)
        found.append(result)
    return found


def needed(found: Sequence[Sequence[Searched]]) -> dict[str, dict[str, np.ndarray]]:
    """For the file of raw numbers: runs to within 5 %."""
    return {s.name: s.needed for many in found for s in many}


def _plan(m: MeasuredRun) -> dict[str, int]:
    p = m.job.plan
    return {"tp": p.tp, "pp": p.pp, "dp": p.dp, "mbs": p.microbatch, "zero": p.zero}


def _time(m: MeasuredRun) -> float:
    return float("inf") if m.failed or not np.isfinite(m.step_time) else m.step_time


def _landscape(data: FitData, o: HoldOut) -> tuple[search.Landscape, search.Prior]:
    """Distinct plans with their times; a plan measured twice keeps its faster run."""
    runs = [data.measurements[i] for i in o.index]
    found: dict[tuple[tuple[str, int], ...], int] = {}
    for i, m in enumerate(runs):
        key = tuple(_plan(m).items())
        if key not in found or _time(m) < _time(runs[found[key]]):
            found[key] = i
    kept, name = list(found.values()), f"{o.name} on {runs[0].job.plan.chips}"
    p = o.hybrid.at(np.array(kept))
    prior = search.Prior(np.log(p.time), p.log_std, np.clip(p.feasible, 0.0, 1.0))
    times = np.array([_time(runs[i]) for i in kept])
    return search.Landscape(name, tuple(dict(key) for key in found), times), prior


def _padded(regret_E: np.ndarray, count: int) -> np.ndarray:
    """Regret after each of `count` runs; infinite (nothing ran yet) becomes the largest finite one
    of the curve."""
    full = np.concatenate([regret_E, np.full(count - len(regret_E), regret_E[-1])])
    worst = full[np.isfinite(full)].max(initial=0.0)
    return np.where(np.isfinite(full), full, worst)
