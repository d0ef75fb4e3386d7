"""Hold-outs: fits of the cost model that do not see a model, a cluster, a length or a release, and
what measured points of it add.

A case names the rows that the fit may not see and those that are judged. Everything here is kept by
the study; what follows from it alone is in `scores`.

Legend: N published rows, J judged rows of a case, K features.
"""

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
    counted, three shown.
    """
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
    with _precise():
        return hold_out(_fitter(data), next(c for c in CASES if c.name == name), steps)


def hold_out(fitter: fit.Fitter, case: Case, steps: int, seed: int = 0) -> HoldOut:
    """As `run_case`, of any case that has judged rows."""
    data = fitter.data
    unseen = np.array([case.unseen(m) for m in data.measurements])
    at = np.flatnonzero(judged_rows(data, case))
    model = fitter.fit(~unseen, steps, seed)
    return HoldOut(
        case.name,
        case.kind,
        at,
        data.tasks[at].astype(str),
        np.where(data.timed, np.exp(data.log_time), np.nan)[at],
        np.exp(data.log_memory[at]),
        data.failed[at],
        hybrid.predict(model, data.x).at(at),
        learned_only(data, ~unseen, seed)[at],
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
    """(mean error in % of the other rows once five random ones are measured, without them) per
    landscape of at least ten."""
    with _precise():
        return with_anchors(gathered(data), o, POINTS, DRAWS)


def with_anchors(
    data: fit.FitData, o: HoldOut, count: int, draws: int
) -> list[tuple[float, float]]:
    """As `five_points`, of `count` of them, means over `draws`."""
    found = []
    for here in o.timed.landscapes:
        if len(here.index) < 2 * count:
            continue
        pairs = []
        for draw in range(draws):
            known = np.random.default_rng(draw).choice(len(here.index), count, replace=False)
            pairs.append(_errors(data, here, known))
        after, before = zip(*pairs, strict=True)
        found.append((float(np.mean(after)), float(np.mean(before))))
    return found


def one_point(data: Published, o: HoldOut) -> list[float]:
    """Mean error (%) of all other rows once one row of every (model, chip) is measured, one value
    per draw.
    """
    o, rows = o.timed, gathered(data)
    jobs = [rows.measurements[i].job for i in o.index]
    keys = np.array([f"{job.shape.name}|{job.chip.name}" for job in jobs])
    errors = []
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        known = np.array([rng.choice(np.flatnonzero(keys == key)) for key in sorted(set(keys))])
        if len(known) < len(keys):
            with _precise():
                errors.append(_errors(rows, o, known)[0])
    return errors


def _errors(data: fit.FitData, o: HoldOut, known: np.ndarray) -> tuple[float, float]:
    """Mean errors (%) of the rows that are not at the places `known`: with those measured, and
    without."""
    told, rest = o.at(known), o.at(np.setdiff1d(np.arange(len(o.index)), known))
    jobs, known_jobs = ([data.measurements[i].job for i in part.index] for part in (rest, told))
    deviation = np.log(told.measured / told.hybrid.time)
    stds = rest.hybrid.log_std, told.hybrid.log_std
    mean, _ = anchors.posterior(jobs, stds[0], known_jobs, stds[1], deviation)
    corrected = rest.hybrid.time * np.exp(mean)
    return error(corrected, rest.measured), error(rest.hybrid.time, rest.measured)


def copied(data: Published, o: HoldOut) -> list[tuple[float, float]]:
    """(error of the model, error of a copy) in percent, of rows whose configuration was measured in
    another release too."""
    return copies(gathered(data), o, next(c for c in CASES if c.name == o.name))


def copies(data: fit.FitData, o: HoldOut, case: Case) -> list[tuple[float, float]]:
    """As `copied`. Of several releases the one whose name sorts last, the newest. The strongest
    baseline of an unseen release: most of its rows repeat an older row with other software."""

    def key(m: MeasuredRun) -> object:
        return dataclasses.replace(m.job, stack="")

    seen: dict[object, tuple[str, float]] = {}
    for m in data.measurements:
        if not case.unseen(m) and not m.failed and np.isfinite(m.step_time):
            seen[key(m)] = max(seen.get(key(m), ("", 0.0)), (m.job.stack, m.step_time))
    o = o.timed
    keys = [key(data.measurements[i]) for i in o.index]
    return [
        (error(o.hybrid.time[i], o.measured[i]), error(seen[k][1], o.measured[i]))
        for i, k in enumerate(keys)
        if k in seen
    ]
