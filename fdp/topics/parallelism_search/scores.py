"""What hold-outs say of the cost model. Metrics are taken per landscape (one model, number of
chips, batch and software) and averaged over landscapes, so that a large sweep does not outvote the
rest."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from fdp.price import fit
from fdp.topics.parallelism_search.validate import HoldOut, error

RANKED = 8  # least plans of a landscape whose order is judged


@dataclass(frozen=True)
class Scores:
    """Per landscape: mean error (%), rank correlation, top-1 regret (%); the latter two where it
    has RANKED plans."""

    errors: list[float]
    correlations: list[float]
    regrets: list[float]


def score(o: HoldOut, which: str = "hybrid") -> Scores:
    """Scores of the hybrid, analytic or learned prediction."""
    found = Scores([], [], [])
    for here in o.timed.landscapes:
        own = {"hybrid": here.hybrid.time, "analytic": here.hybrid.analytic}
        y, p = here.measured, own.get(which, here.learned)
        found.errors.append(error(p, y))
        if len(y) >= RANKED:
            found.correlations.append(float(spearmanr(p, y).statistic))
            found.regrets.append(float(100 * (y[p.argmin()] / y.min() - 1)))
    return found


def coverage(outcomes: Sequence[HoldOut]) -> float:
    """Share (%) of measured times inside 90 % intervals, every case weighing the same.

    The width of a case's intervals is set by the other cases alone (cross-conformal, Vovk 2015):
    what a fit says of its own rows is too narrow for a model it has not seen. One case has no
    others and keeps the width of the fit."""
    inside, timed = [], [o.timed for o in outcomes]
    for i, o in enumerate(timed):
        factor = _width(timed[:i] + timed[i + 1 :])
        time = o.hybrid.time
        low, high = (time * (end / time) ** factor for end in (o.hybrid.low, o.hybrid.high))
        inside.append(np.mean((o.measured >= low) & (o.measured <= high)))
    return float(100 * np.mean(inside))


def _width(outcomes: Sequence[HoldOut]) -> float:
    """The factor on log interval widths that covers 90 % of the outcomes' rows."""
    if not outcomes:
        return 1.0
    needed = []
    for o in outcomes:
        time, off = o.hybrid.time, np.log(o.measured / o.hybrid.time)
        end = np.where(off > 0, np.log(o.hybrid.high / time), np.log(time / o.hybrid.low))
        needed.append(np.abs(off) / end)
    return _quantile(needed)


def _quantile(parts: Sequence[np.ndarray]) -> float:
    """Not exceeded by 90 % of the values, every part weighing the same."""
    weight = np.concatenate([np.full(len(part), 1 / len(part)) for part in parts])
    return fit.weighted_quantile(np.concatenate(parts), weight, fit.INTERVAL)


def memory_coverage(outcomes: Sequence[HoldOut]) -> tuple[float, int]:
    """(share (%) of measured peaks below their 90 % quantile, hold-outs judged), cross-conformal as
    above."""
    errors = [(np.log(o.memory) - np.log(o.hybrid.memory))[np.isfinite(o.memory)] for o in outcomes]
    errors = [own for own in errors if len(own)]
    if len(errors) < 2:
        return float("nan"), 0
    rest = [errors[:i] + errors[i + 1 :] for i in range(len(errors))]
    inside = [np.mean(own <= _quantile(r)) for own, r in zip(errors, rest, strict=True)]
    return float(100 * np.mean(inside)), len(inside)


def memory_alarm(o: HoldOut) -> tuple[float, float]:
    """(recall of failed runs, false alarms among those that ran), %, where feasibility below one
    half is an alarm."""
    alarm = o.hybrid.feasible < 0.5
    return float(100 * alarm[o.failed].mean()), float(100 * alarm[~o.failed].mean())
