"""Measured landscapes, searched by every algorithm from the same seeds; priors come from fits
without the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fdp.price.fit import FitData
from fdp.price.measurements import Measurement
from fdp.topics.parallelism_search import search
from fdp.topics.parallelism_search.validate import HoldOut, landscapes

WITHIN = 0.05
CLOSE = 0.01  # a search ends there
LEAST = 20  # plans: fewer are no search
ALGORITHMS = {
    "random": search.random,
    "expert": search.expert,
    "tpe": search.tpe,
    "cma_es": search.cma_es,
    "evolution": search.evolution,
    "bayes_flat": search.bayes_flat,
    "bayes": search.bayes,
}


@dataclass(frozen=True)
class Searches:
    """Per landscape and algorithm: runs needed to come within 5 % (one per seed), and regret after
    each run (mean).
    """

    needed: dict[str, dict[str, np.ndarray]]
    regret: dict[str, dict[str, np.ndarray]]


def _plan(m: Measurement) -> dict[str, int]:
    p = m.job.plan
    return {"tp": p.tp, "pp": p.pp, "dp": p.dp, "mbs": p.microbatch, "zero": p.zero}


def _landscape(
    data: FitData, outcome: HoldOut, rows: np.ndarray, name: str
) -> tuple[search.Landscape, search.Prior]:
    """Distinct plans of `rows` with their times; a plan measured twice keeps its faster run."""
    found: dict[tuple[tuple[str, int], ...], int] = {}
    for row in rows:
        key = tuple(_plan(data.measurements[row]).items())
        if key not in found or _time(data, row) < _time(data, found[key]):
            found[key] = int(row)
    kept = np.array(list(found.values()))
    times = np.array([_time(data, row) for row in kept])
    p = outcome.hybrid
    prior = search.Prior(np.log(p.time[kept]), p.log_std[kept], np.clip(p.feasible[kept], 0.0, 1.0))
    return search.Landscape(name, tuple(dict(key) for key in found), times), prior


def _time(data: FitData, row: int) -> float:
    m = data.measurements[row]
    return float("inf") if m.failed or not np.isfinite(m.step_time) else m.step_time


def compare(data: FitData, outcomes: Sequence[HoldOut], seeds: int) -> Searches:
    """Search every landscape of at least `LEAST` plans at 64 GPUs and more of the outcomes' unseen
    models.
    """
    needed: dict[str, dict[str, np.ndarray]] = {}
    regret: dict[str, dict[str, np.ndarray]] = {}
    for outcome in (o for o in outcomes if o.case.kind == "model"):
        for places in landscapes(data, outcome.at).values():
            rows = outcome.at[places]
            chips = data.measurements[rows[0]].job.plan.chips
            if len(rows) < LEAST or not np.isfinite([_time(data, r) for r in rows]).any():
                continue
            name = f"{outcome.case.name} on {chips}"
            landscape, prior = _landscape(data, outcome, rows, name)
            runs = {
                a: [_run(landscape, f, s, prior) for s in range(seeds)]
                for a, f in ALGORITHMS.items()
            }
            count = len(landscape.plans)
            needed[name] = {
                a: np.array(
                    [min(search.evaluations_to(t.order, landscape, WITHIN), count) for t in traces]
                )
                for a, traces in runs.items()
            }
            regret[name] = {
                a: np.mean([_padded(t.regret_E, count) for t in ts], 0) for a, ts in runs.items()
            }
    return Searches(needed, regret)


def _run(
    landscape: search.Landscape, algorithm: search.Algorithm, seed: int, prior: search.Prior
) -> search.Trace:
    return search.run(landscape, algorithm, seed, prior, within=CLOSE)


def _padded(regret_E: np.ndarray, count: int) -> np.ndarray:
    """Regret after each of `count` runs; infinite (nothing ran yet) becomes the largest finite one
    of the curve.
    """
    full = np.concatenate([regret_E, np.full(count - len(regret_E), regret_E[-1])])
    worst = full[np.isfinite(full)].max(initial=0.0)
    return np.where(np.isfinite(full), full, worst)
