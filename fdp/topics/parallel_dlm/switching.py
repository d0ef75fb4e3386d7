"""A tensor degree for each denoising phase: price each kind of step at every {tp, dp}, choose one
per phase, and map where that pays.

One period is a refresh step over all rows, then reuse steps over one block (`fdp.sampling.cached`).
Compute is the same for every {tp, dp}. What differs is that tp pays for all-reduces of rows·D while
dp reads every weight on every device. So a refresh, with many rows, wants dp, and a reuse of few
rows wants tp. A switched plan holds the weights in both layouts and moves the cache from one to the
other after each refresh. All times are simulated (`fdp.price.inference`, which states its errors);
`switching_run` runs the switch.

Legend: N draws, n devices, k ranks of an exchange; seconds and bytes are per device and period.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from fdp.models.shape import ModelShape
from fdp.price import hardware, inference, network
from fdp.price.inference import BOUND, LLADA_8B, Degrees, ForwardPass, PassTime
from fdp.price.network import collective_time
from fdp.study import uncertainty
from fdp.study.grid import Grid

KINDS = ("refresh", "reuse")
LARGE = "network from 1 MiB"  # the term of inference.BOUND that moving a cache belongs to
# 90 % quantile of |error| where nothing was measured here; assumed, wide on purpose.
ASSUMED_ERROR = {"attention": 0.5, "elementwise": 0.5, "launch": 1.0}
AXES = ("positions", "requests", "reuse steps a refresh")  # of the region

_priced = functools.lru_cache(maxsize=4096)(inference.fastest)
_factors = functools.lru_cache(maxsize=1024)(uncertainty.factors)
_collective_time = functools.lru_cache(maxsize=4096)(collective_time)


@dataclass(frozen=True)
class SamplingJob:
    """What is sampled: sequences of `length` in blocks of `block`, `reuse_steps` after every
    refresh.
    """

    shape: ModelShape
    length: int
    requests: int
    reuse_steps: int
    block: int = 32
    chip: str = "h100"
    devices: int = 8

    def work(self, kind: str) -> ForwardPass:
        """The rows of one step of `kind`; only the block's rows reach the head."""
        rows = self.length if kind == "refresh" else self.block
        return ForwardPass(self.requests, rows, self.length, self.block)

    def cache(self, degrees: Degrees) -> int:
        """Bytes of keys and values of a device."""
        return inference.cache_bytes(self.shape, self.requests, self.length, degrees)

    def degrees(self) -> list[Degrees]:
        """Every {tp, dp} with tp·dp = devices, dp ≤ requests, tp dividing the model. Raises
        ValueError if none does.
        """
        found, refused = [], []
        for tp in (t for t in range(1, self.devices + 1) if self.devices % t == 0):
            degrees = Degrees(tp, self.devices // tp)
            try:
                for kind in KINDS:
                    inference.check(self.shape, self.work(kind), degrees)
                found.append(degrees)
            except ValueError as error:
                refused.append(f"{degrees}: {error}")
        if not found:
            raise ValueError(f"no {{tp, dp}} with tp·dp = {self.devices}: " + "; ".join(refused))
        return found

    def steps(self) -> dict[tuple[str, Degrees], PassTime]:
        """Priced time of each kind of step at every allowed {tp, dp}."""
        return {
            (kind, d): _priced(self.shape, self.work(kind), d, self.chip)
            for kind in KINDS
            for d in self.degrees()
        }


# Plan
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhasePlan:
    """{tp, dp} of each phase and seconds of one period, the switch included."""

    refresh: Degrees
    reuse: Degrees
    seconds: float
    switch_seconds: float

    def __str__(self) -> str:
        return f"{self.refresh} → {self.reuse}"

    @property
    def switches(self) -> bool:
        """Whether the phases differ."""
        return self.refresh != self.reuse


@dataclass(frozen=True)
class BestPlans:
    """The fastest plan of all, and the fastest with one {tp, dp} for both phases."""

    best: PhasePlan
    fixed: PhasePlan

    @property
    def speedup(self) -> float:
        """Seconds of the best fixed degrees over those of the best plan, at least 1."""
        return self.fixed.seconds / self.best.seconds


def needed_memory(job: SamplingJob, refresh: Degrees, reuse: Degrees) -> int:
    """Bytes of the fullest device; a cache that moves is there twice.

    Raises ValueError, with the equation, where they exceed the usable HBM."""
    shape, chip, gib = job.shape, hardware.chip(job.chip), hardware.GIB
    held = [inference.weight_bytes(shape, t) for t in sorted({refresh.tp, reuse.tp})]
    copies, cache = len({refresh, reuse}), max(job.cache(refresh), job.cache(reuse))
    steps = zip(KINDS, (refresh, reuse), strict=True)
    space = max(inference.workspace_bytes(shape, job.work(kind), d) for kind, d in steps)
    needed = sum(held) + copies * cache + space
    if needed > int(inference.USABLE * chip.hbm_bytes):
        raise ValueError(
            f"refresh {refresh}, reuse {reuse}: weights "
            f"{' + '.join(f'{w / gib:.1f}' for w in held)} + cache {copies}·{cache / gib:.1f} + "
            f"activations {space / gib:.1f} GiB = {needed / gib:.1f} GiB > {inference.USABLE:g}·"
            f"{chip.hbm_bytes / gib:.0f} GiB of {chip.name}: raise the smaller tp or sample fewer "
            "requests at once"
        )
    return needed


def exchange_ranks(refresh: Degrees, reuse: Degrees) -> int:
    """Devices of a group inside which the cache moves, 1 for equal degrees."""
    return max(refresh.tp, reuse.tp) // min(refresh.tp, reuse.tp)


def moved_cache_bytes(job: SamplingJob, refresh: Degrees, reuse: Degrees) -> float:
    """Bytes of the cache that a device sends when its layout changes: (k-1)/k of what it holds, k =
    ratio of the tp.

    Sequences and heads trade places in groups of k devices: `switching_run` nests the shards so."""
    k = exchange_ranks(refresh, reuse)
    return (k - 1) / k * job.cache(refresh)


def switch_terms(job: SamplingJob, refresh: Degrees, reuse: Degrees) -> dict[str, float]:
    """Seconds of one switch there and back: all-to-all of the cache with a copy before and after,
    all-gather of the ids."""
    k, chip = exchange_ranks(refresh, reuse), hardware.chip(job.chip)
    if k == 1:
        return {"cache": 0.0, "copies": 0.0, "ids": 0.0}
    cache = max(job.cache(refresh), job.cache(reuse))
    ids = 4 * max(d.sequences(job.requests) for d in (refresh, reuse)) * job.length
    return {
        "cache": float(_collective_time("all_to_all", cache, k, k, job.chip)),
        "copies": 4 * cache / (chip.hbm_bandwidth * inference.coefficient("hbm", job.chip)),
        "ids": float(_collective_time("all_gather", ids, k, k, job.chip)),
    }


def candidates(job: SamplingJob) -> list[PhasePlan]:
    """Every pair of {tp, dp} that fits, fastest first. Raises ValueError, with its equation, if no
    fixed one does.
    """
    found, error, steps = [], None, job.steps()
    for refresh in job.degrees():
        for reuse in job.degrees():
            try:
                needed_memory(job, refresh, reuse)
            except ValueError as refused:
                error = refused
                continue
            switch = sum(switch_terms(job, refresh, reuse).values())
            period = _period(job, refresh, reuse, {k: s.seconds for k, s in steps.items()})
            found.append(PhasePlan(refresh, reuse, period + switch, switch))
    if all(p.switches for p in found):
        raise ValueError(f"no plan fits {job.devices} × {job.chip}; the last: {error}")
    return sorted(found, key=lambda p: p.seconds)


def _period(job: SamplingJob, refresh: Degrees, reuse: Degrees, seconds: Any) -> Any:
    """One refresh and its reuses; `seconds` by (kind, degrees), numbers or arrays [N]."""
    return seconds["refresh", refresh] + job.reuse_steps * seconds["reuse", reuse]


def plan(job: SamplingJob) -> BestPlans:
    """Argmin over {tp, dp} of each phase with the cost of switching, beside the best fixed degrees.

    Raises ValueError where no fixed degrees fit the memory.
    """
    found = candidates(job)
    return BestPlans(found[0], next(p for p in found if not p.switches))


# Where it pays
# -------------------------------------------------------------------------------------------------


def spread(chip: str) -> dict[str, float]:
    """Standard deviation of the log of each term's error, from |error| at its 90 % quantile.

    Raises ValueError for a chip whose matmuls or collectives were not measured."""
    p90 = {"matmul": inference.matmul_error(chip)[1], **ASSUMED_ERROR}
    for term in BOUND:
        if term.startswith("network"):
            p90[term] = network.held_out_error(chip, small="below" in term)[1]
    return {t: uncertainty.sigma(p90[t] if t in p90 else p90[t.split()[0]]) for t in BOUND}


def possible_seconds(
    kind: str, tp: int, step: PassTime, sigma: dict[str, float], draws: int, seed: int
) -> np.ndarray:
    """Seconds [N] of one step under the model's errors: one factor of a collective for every tp, of
    a matmul for every tp and kind, one in all for launches, attention and elementwise kernels."""
    total = np.zeros(draws)
    for term, seconds in step.terms.items():
        member = {"network": (tp,), "matmul": (tp, kind)}.get(term.split()[0], ())
        total += seconds * _factors((term, *member), sigma[term], draws, seed)
    return total


def interval(
    job: SamplingJob, chosen: BestPlans, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the speed-up under the model's errors.

    The plan is the one chosen from nominal times. In every draw it meets the best fixed degrees OF
    THAT DRAW, so errors work against it and the interval may lie below 1."""
    sigma, best = spread(job.chip), chosen.best
    time = {
        (kind, d): possible_seconds(kind, d.tp, step, sigma, draws, seed)
        for (kind, d), step in job.steps().items()
    }
    fixed = [_period(job, p.refresh, p.reuse, time) for p in candidates(job) if not p.switches]
    what = (LARGE, "switch", best.refresh.tp, best.reuse.tp)
    switch = best.switch_seconds * _factors(what, sigma[LARGE], draws, seed)
    ratio_N = np.min(fixed, axis=0) / (_period(job, best.refresh, best.reuse, time) + switch)
    return uncertainty.interval(ratio_N, level)


def region(
    shape: ModelShape = LLADA_8B,
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096),
    requests: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    reuse_steps: tuple[int, ...] = (1, 3, 7, 15, 31),
    draws: int = 1000,
) -> Grid:
    """Speed-up of the best plan over the best fixed degrees ("value") with its interval, for every
    job that fits a node of eight H100."""

    def gain(**at: int) -> dict[str, float] | None:
        job = SamplingJob(shape, at[AXES[0]], at[AXES[1]], at[AXES[2]])
        try:
            chosen = plan(job)
        except ValueError:  # nothing fits
            return None
        low, high = interval(job, chosen, draws)
        return {"value": chosen.speedup, "low": low, "high": high}

    return Grid.over(gain, **dict(zip(AXES, (lengths, requests, reuse_steps), strict=True)))


def best_job(region: Grid) -> SamplingJob:
    """The job of LLaDA-8B that gains most."""
    return SamplingJob(LLADA_8B, *region.best().values())
