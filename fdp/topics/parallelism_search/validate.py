"""Hold-outs: what the cost model says of models, clusters, lengths and releases that its fit has
not seen.

A case names the rows that the fit may not see and those that are judged. Metrics are taken per
landscape (one model, number of chips, batch and software) and averaged over landscapes, so that a
large sweep does not outvote the rest."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from fdp.price import anchors, fit, hybrid
from fdp.price.measurements import MeasuredRun
from fdp.topics.parallelism_search import settings

Choice = Callable[[MeasuredRun], bool]


class NothingToJudge(ValueError):
    """The measurements hold no timed row of a hold-out."""


@dataclass(frozen=True)
class Case:
    """Rows that the fit may not see, and those of them that are judged."""

    name: str
    kind: str  # model | moe | long | release | cluster
    unseen: Choice
    judged: Choice = lambda m: True


def _named(name: str) -> Choice:
    return lambda m: m.job.shape.name == name


def _mid_size(m: MeasuredRun) -> bool:
    return 64 <= m.job.plan.chips <= 512


CASES = (
    *(Case(name, "model", _named(name), _mid_size) for name in settings.MODELS),
    *(Case(name, "moe", _named(name)) for name in settings.MIXTURES),
    Case(settings.LONG, "long", lambda m: m.job.seq >= 16_384),
    Case(settings.RELEASE, "release", lambda m: m.job.stack.endswith("/26.04.01")),
    Case(settings.CLUSTER, "cluster", lambda m: m.job.cluster == "dgxc"),
)


@dataclass(frozen=True)
class HoldOut:
    """One case: the judged rows (place in FitData) and what three models say of them, seconds and
    bytes.
    """

    case: Case
    rows: np.ndarray
    measured: np.ndarray
    hybrid: hybrid.PricedJobs
    learned: np.ndarray
    at: np.ndarray  # rows of the case in the whole prediction, failed ones included
    failed: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """Seconds by the hybrid model, (rows,)."""
        return self.hybrid.time[self.rows]


def run_case(fitter: fit.Fitter, case: Case, steps: int, seed: int = 0) -> HoldOut:
    """Fit without the unseen rows and price the judged ones. Raises NothingToJudge."""
    data = fitter.data
    unseen = np.array([case.unseen(m) for m in data.measurements])
    judged = unseen & np.array([case.judged(m) for m in data.measurements])
    timed = judged & data.timed
    if not timed.any():
        raise NothingToJudge(f"hold-out {case.name!r}: no measured row to judge")
    model = fitter.fit(~unseen, steps, seed)
    prediction = hybrid.predict(model, data.x)
    rows = np.flatnonzero(timed)
    learned = learned_only(data, ~unseen, seed)
    return HoldOut(
        case,
        rows,
        np.exp(data.log_time[rows]),
        prediction,
        learned[rows],
        np.flatnonzero(judged),
        data.failed,
    )


def learned_only(data: fit.FitData, keep: np.ndarray, seed: int) -> np.ndarray:
    """Seconds (N,) of the same ensemble without any physics but the FLOPs: the ablation that pure
    learning would be.

    It learns log(time·chips·peak/FLOPs), an inverse utilisation, from log degrees, sizes and the
    chip's rates, and from the code of the software's family that the hybrid's residual is given
    too."""
    x, jobs = data.x, [m.job for m in data.measurements]
    forward = [j.shape.forward_flops(j.seq, j.causal) * j.batch * j.seq for j in jobs]
    ideal = np.log(3 * np.array(forward) / (x["tp"] * x["pp"] * x["dp"] * x["cp"] * x["peak"]))
    sizes = "tp pp dp cp ep virtual microbatch microbatches width layers seq batch peak hbm up "
    kinds = "full modern lora fp8 fp4 fp16"
    stalls = np.isin(data.groups["cluster"].astype(str), hybrid.STALLING)
    columns = [np.log2(x[n]) for n in (sizes + "out_bw domain").split()]
    columns += [x[n] for n in kinds.split()] + [x["zero"] == 0, x["zero"] >= 3, stalls]
    features = np.stack([*columns, *hybrid.family_code(data.groups).T], -1).astype(float)
    timed, target = keep & data.timed, data.log_time - ideal
    middle, weight = float(np.median(target[timed])), data.weight[timed]
    seen = features[timed], target[timed] - middle, weight, data.tasks[timed]
    parts = fit.ensemble(*seen, seed, ridge=0.1)
    return np.exp(ideal + middle + hybrid.corrections(features, parts).mean(0))


def landscapes(data: fit.FitData, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Places within `rows` of every task."""
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for i, row in enumerate(rows):
        groups[data.measurements[row].task].append(i)
    return {name: np.array(places) for name, places in sorted(groups.items())}


def error(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Mean absolute error in percent of the measured value."""
    return float(100 * np.mean(np.abs(predicted / measured - 1)))


@dataclass(frozen=True)
class Scores:
    """Per landscape: mean error (%), rank correlation, top-1 regret (%); the latter two where it
    has 8 plans.
    """

    errors: list[float]
    correlations: list[float]
    regrets: list[float]

    def raw(self) -> dict[str, list[float]]:
        """For the file of raw numbers."""
        names = ("errors_pct", "spearman", "regret_pct")
        return dict(zip(names, (self.errors, self.correlations, self.regrets), strict=True))


def score(data: fit.FitData, o: HoldOut, which: str = "hybrid") -> Scores:
    """Scores of one hold-out by its hybrid, analytic or learned prediction."""
    predicted = {
        "hybrid": o.predicted,
        "analytic": o.hybrid.analytic[o.rows],
        "learned": o.learned,
    }[which]
    found = Scores([], [], [])
    for places in landscapes(data, o.rows).values():
        y, p = o.measured[places], predicted[places]
        found.errors.append(error(p, y))
        if len(places) >= 8:
            found.correlations.append(float(spearmanr(p, y).statistic))
            found.regrets.append(float(100 * (y[p.argmin()] / y.min() - 1)))
    return found


def scores(data: fit.FitData, outcomes: Sequence[HoldOut]) -> Scores:
    """Hybrid scores of several hold-outs, one after the other."""
    each = [score(data, o) for o in outcomes]
    return Scores(
        [e for s in each for e in s.errors],
        [c for s in each for c in s.correlations],
        [r for s in each for r in s.regrets],
    )


def with_anchors(
    data: fit.FitData, outcome: HoldOut, count: int, draws: int
) -> tuple[list[float], list[float]]:
    """Mean error (%) per landscape of the other rows, (once `count` rows drawn at random are
    measured, without them).

    Landscapes of fewer than twice as many rows are left out.
    """
    errors, before = [], []
    for places in landscapes(data, outcome.rows).values():
        if len(places) < 2 * count:
            continue
        drawn, plain = [], []
        for draw in range(draws):
            rng = np.random.default_rng(draw)
            known = rng.choice(places, count, replace=False)
            rest = np.setdiff1d(places, known)
            drawn.append(error(_corrected(data, outcome, known, rest), outcome.measured[rest]))
            plain.append(error(outcome.predicted[rest], outcome.measured[rest]))
        errors.append(float(np.mean(drawn)))
        before.append(float(np.mean(plain)))
    return errors, before


def one_anchor_each(data: fit.FitData, outcome: HoldOut, draws: int) -> list[float]:
    """Mean error (%) of all other rows once one row of every (model, chip) is measured, one value
    per draw.
    """
    jobs = [data.measurements[row].job for row in outcome.rows]
    keys = np.array([f"{job.shape.name}|{job.chip.name}" for job in jobs])
    errors = []
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        known = np.array([rng.choice(np.flatnonzero(keys == key)) for key in sorted(set(keys))])
        rest = np.setdiff1d(np.arange(len(keys)), known)
        if rest.size:
            errors.append(error(_corrected(data, outcome, known, rest), outcome.measured[rest]))
    return errors


def _corrected(
    data: fit.FitData, outcome: HoldOut, known: np.ndarray, rest: np.ndarray
) -> np.ndarray:
    def part(places: np.ndarray) -> tuple[list, np.ndarray, np.ndarray]:
        rows = outcome.rows[places]
        jobs = [data.measurements[row].job for row in rows]
        return jobs, outcome.hybrid.time[rows], outcome.hybrid.log_std[rows]

    jobs, time, std = part(rest)
    known_jobs, known_time, known_std = part(known)
    mean, _ = anchors.posterior(
        jobs, std, known_jobs, known_std, np.log(outcome.measured[known] / known_time)
    )
    return time * np.exp(mean)


def copied(data: fit.FitData, outcome: HoldOut) -> tuple[np.ndarray, np.ndarray]:
    """(places within `outcome.rows`, seconds) by copying the run of the same configuration in
    another release.

    Of several releases the one whose name sorts last, the newest. The strongest baseline of an
    unseen release: most of its rows repeat an older row with other software."""

    def key(m: MeasuredRun) -> object:
        return dataclasses.replace(m.job, stack="")

    seen: dict[object, tuple[str, float]] = {}
    for m in data.measurements:
        if not outcome.case.unseen(m) and not m.failed and np.isfinite(m.step_time):
            seen[key(m)] = max(seen.get(key(m), ("", 0.0)), (m.job.stack, m.step_time))
    twins = [
        (i, seen[key(data.measurements[row])][1])
        for i, row in enumerate(outcome.rows)
        if key(data.measurements[row]) in seen
    ]
    places, seconds = zip(*twins, strict=True) if twins else ((), ())
    return np.array(places, int), np.array(seconds, float)


def coverage(outcomes: Sequence[HoldOut]) -> float:
    """Share (%) of measured times inside 90 % intervals, every case weighing the same.

    The width of a case's intervals is set by the other cases alone (cross-conformal, Vovk 2015):
    what a fit says of its own rows is too narrow for a model it has not seen. One case has no
    others and keeps the width of the fit."""
    inside = []
    for i, o in enumerate(outcomes):
        factor = _width([other for j, other in enumerate(outcomes) if j != i])
        time = o.hybrid.time[o.rows]
        low, high = (time * (end[o.rows] / time) ** factor for end in (o.hybrid.low, o.hybrid.high))
        inside.append(np.mean((o.measured >= low) & (o.measured <= high)))
    return float(100 * np.mean(inside))


def memory_coverage(data: fit.FitData, outcomes: Sequence[HoldOut]) -> tuple[float, int]:
    """(share (%) of measured peaks below their 90 % quantile, hold-outs judged), cross-conformal as
    above.
    """
    errors = []
    for o in outcomes:
        rows = o.at[np.isfinite(data.log_memory[o.at])]
        if len(rows):
            errors.append(data.log_memory[rows] - np.log(o.hybrid.memory[rows]))
    inside = []
    for i, own in enumerate(errors):
        others = errors[:i] + errors[i + 1 :]
        if others:
            weight = np.concatenate([np.full(len(e), 1 / len(e)) for e in others])
            inside.append(
                np.mean(own <= fit.weighted_quantile(np.concatenate(others), weight, fit.INTERVAL))
            )
    return float(100 * np.mean(inside)) if inside else float("nan"), len(inside)


def _width(outcomes: Sequence[HoldOut]) -> float:
    """The factor on log interval widths that covers 90 % of the outcomes' rows, every outcome
    weighing the same.
    """
    if not outcomes:
        return 1.0
    needed, weight = [], []
    for o in outcomes:
        time = o.hybrid.time[o.rows]
        error = np.log(o.measured / time)
        end = np.where(
            error > 0, np.log(o.hybrid.high[o.rows] / time), np.log(time / o.hybrid.low[o.rows])
        )
        needed.append(np.abs(error) / end)
        weight.append(np.full(len(time), 1 / len(time)))
    return fit.weighted_quantile(np.concatenate(needed), np.concatenate(weight), fit.INTERVAL)


def memory_alarm(outcome: HoldOut) -> tuple[float, float]:
    """(recall of failed runs, false alarms among those that ran), %, where feasibility below one
    half is an alarm.
    """
    alarm = outcome.hybrid.feasible[outcome.at] < 0.5
    failed = outcome.failed[outcome.at]
    return float(100 * alarm[failed].mean()), float(100 * alarm[~failed].mean())
