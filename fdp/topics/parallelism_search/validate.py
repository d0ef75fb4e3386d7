"""Hold-outs: fits of the cost model that do not see a model, a cluster, a length or a release, and
what measured points of it add.

A case names the rows that the fit may not see and those that are judged. Everything here is kept by
the study; what follows from it alone is in `scores`.

Legend: N published rows, J judged rows of a case, K features."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from fdp.config import UserError
from fdp.price import anchors, fit, hybrid
from fdp.price.hybrid import PricedJobs
from fdp.price.measurements import Malformed, MeasuredRun, published
from fdp.topics.parallelism_search import settings

Choice = Callable[[MeasuredRun], bool]
POINTS = DRAWS = 5  # measured points of a landscape, and how often they are drawn


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


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


# Published measurements
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A folder of published measurements and the hash of what its tables hold."""

    folder: str
    sha256: str

    @classmethod
    def of(cls, folder: Path) -> "Published":
        """The folder as it is now."""
        digest = hashlib.sha256()
        for path in sorted(folder.glob("*.csv")):
            digest.update(path.name.encode() + path.read_bytes())
        return cls(str(folder), digest.hexdigest())


@functools.cache
def gathered(data: Published) -> fit.FitData:
    """The folder's rows. Raises UserError for a malformed file; rows that cannot be priced are
    counted, three shown."""
    try:
        priced, refused = published(Path(data.folder))
    except Malformed as error:
        raise UserError(f"plan.measurements: {error}") from error
    print(f"measured  {len(priced)} rows priced, {len(refused)} refused")
    for reason in refused[:3]:
        print(f"  {reason}")
    with _precise():
        return fit.gather(priced)


@functools.cache
def _fitter(data: Published) -> fit.Fitter:
    """Its losses are compiled once for all cases."""
    return fit.Fitter(gathered(data))


@contextlib.contextmanager
def _precise() -> Iterator[None]:
    """Float64, and one thread for many small factorisations: more would wait for each other."""
    with jax.enable_x64(True), threadpool_limits(1, "blas"):
        yield


def judged_rows(data: fit.FitData, case: Case) -> np.ndarray:
    """(N,) bool: failed runs included, as whether they fail is judged too."""
    return np.array([case.unseen(m) and case.judged(m) for m in data.measurements])


def present(data: Published) -> list[Case]:
    """The cases of which a judged row has a time."""
    rows = gathered(data)
    return [case for case in CASES if (judged_rows(rows, case) & rows.timed).any()]


# Fits
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HoldOut:
    """The judged rows of a case (their places in FitData and landscapes), what was measured and
    what three models say of them: arrays (J,), seconds and bytes; NaN where nothing was measured.
    """

    name: str
    kind: str
    index: np.ndarray
    task: np.ndarray
    measured: np.ndarray
    memory: np.ndarray
    failed: np.ndarray
    hybrid: PricedJobs
    learned: np.ndarray

    def at(self, places: np.ndarray) -> "HoldOut":
        """Those rows alone."""
        names = "index", "task", "measured", "memory", "failed", "learned"
        arrays = {name: getattr(self, name)[places] for name in names}
        return dataclasses.replace(self, hybrid=self.hybrid.at(places), **arrays)

    @property
    def timed(self) -> "HoldOut":
        """The rows with a step time."""
        return self.at(np.flatnonzero(np.isfinite(self.measured)))

    @property
    def landscapes(self) -> "list[HoldOut]":
        """One for each task: configurations that may be ranked against each other."""
        return [self.at(np.flatnonzero(self.task == name)) for name in np.unique(self.task)]


def run_case(data: Published, name: str, steps: int) -> HoldOut:
    """Fit without the unseen rows of a case and price the judged ones."""
    rows, case = gathered(data), _case(name)
    unseen = np.array([case.unseen(m) for m in rows.measurements])
    at = np.flatnonzero(judged_rows(rows, case))
    with _precise():
        priced = hybrid.predict(_fitter(data).fit(~unseen, steps), rows.x).at(at)
        learned = learned_only(rows, ~unseen)[at]
    measured = np.where(rows.timed, np.exp(rows.log_time), np.nan)[at]
    known = measured, np.exp(rows.log_memory[at]), rows.failed[at]
    return HoldOut(name, case.kind, at, rows.tasks[at].astype(str), *known, priced, learned)


def learned_only(data: fit.FitData, keep: np.ndarray, seed: int = 0) -> np.ndarray:
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
    features_NxK = np.stack([*columns, *hybrid.family_code(data.groups).T], -1).astype(float)
    timed, target = keep & data.timed, data.log_time - ideal
    middle, weight = float(np.median(target[timed])), data.weight[timed]
    seen = features_NxK[timed], target[timed] - middle, weight, data.tasks[timed]
    parts = fit.ensemble(*seen, seed, ridge=0.1)
    return np.exp(ideal + middle + hybrid.corrections(features_NxK, parts).mean(0))


# Measured points
# -------------------------------------------------------------------------------------------------


def error(predicted: Any, measured: Any) -> float:
    """Mean absolute error in percent of the measured value."""
    return float(100 * np.mean(np.abs(predicted / measured - 1)))


def five_points(data: Published, o: HoldOut) -> list[tuple[float, float]]:
    """(mean error in % of the other rows once POINTS random ones are measured, without them) per
    landscape of at least twice as many, means over DRAWS."""
    found = []
    for here in o.timed.landscapes:
        count = len(here.index)
        if count >= 2 * POINTS:
            rngs = map(np.random.default_rng, range(DRAWS))
            drawn = [rng.choice(count, POINTS, replace=False) for rng in rngs]
            after, before = np.mean([_errors(data, here, known) for known in drawn], 0)
            found.append((float(after), float(before)))
    return found


def one_point(data: Published, o: HoldOut) -> list[float]:
    """Mean error (%) of all other rows once one row of every (model, chip) is measured, one value
    per draw."""
    o = o.timed
    jobs = [gathered(data).measurements[i].job for i in o.index]
    keys = np.array([f"{job.shape.name}|{job.chip.name}" for job in jobs])
    names = sorted(set(keys))
    if len(names) == len(keys):
        return []
    rngs = map(np.random.default_rng, range(DRAWS))
    drawn = [[rng.choice(np.flatnonzero(keys == key)) for key in names] for rng in rngs]
    return [_errors(data, o, np.array(known))[0] for known in drawn]


def _errors(data: Published, o: HoldOut, known: np.ndarray) -> tuple[float, float]:
    """Mean errors (%) of the rows that are not at the places `known`: with those measured, and
    without."""
    told, rest = o.at(known), o.at(np.setdiff1d(np.arange(len(o.index)), known))
    runs = gathered(data).measurements
    new, old = (([runs[i].job for i in part.index], part.hybrid.log_std) for part in (rest, told))
    with _precise():
        mean, _ = anchors.posterior(*new, *old, np.log(told.measured / told.hybrid.time))
    corrected = rest.hybrid.time * np.exp(mean)
    return error(corrected, rest.measured), error(rest.hybrid.time, rest.measured)


def copied(data: Published, o: HoldOut) -> list[tuple[float, float]]:
    """(error of the model, error of a copy) in percent, of rows whose configuration was measured in
    another release too.

    Of several releases the one whose name sorts last, the newest. The strongest baseline of an
    unseen release: most of its rows repeat an older row with other software."""
    runs, unseen, o = gathered(data).measurements, _case(o.name).unseen, o.timed

    def key(m: MeasuredRun) -> object:
        return dataclasses.replace(m.job, stack="")

    seen: dict[object, tuple[str, float]] = {}
    for m in runs:
        if not unseen(m) and not m.failed and np.isfinite(m.step_time):
            seen[key(m)] = max(seen.get(key(m), ("", 0.0)), (m.job.stack, m.step_time))
    keys = [key(runs[i]) for i in o.index]
    seconds = {i: seen[k][1] for i, k in enumerate(keys) if k in seen}
    pairs = ((o.hybrid.time[i], copy, o.measured[i]) for i, copy in seconds.items())
    return [(error(ours, measured), error(copy, measured)) for ours, copy, measured in pairs]
