"""TP-degree switching between denoising phases: profile each kind of step at every {tp, dp}, choose
one per phase.

One period is a refresh step over all rows, then reuse steps over one block (`fdp.sampling.cached`).
Compute is the same for every {tp, dp}; what differs is that tp pays for sums of rows·D while dp
reads every weight on every device. So a refresh, with many rows, wants dp, and a reuse of few rows
wants tp. A switched plan moves the cache between the two layouts after each refresh, and holds the
weights twice or gathers them again. All times are simulated (`fdp.price.inference`, which states
its errors); `switching_region` maps the gain, `switching_run` runs the switch.

Legend: B requests, L positions, n devices, k ranks of an exchange; seconds and bytes are per device
and period."""

import functools
from dataclasses import dataclass

from fdp.models.shape import ModelShape
from fdp.price import hardware, inference
from fdp.price.inference import Degrees, ForwardPass, PassTime
from fdp.price.network import collective_time

KINDS = ("refresh", "reuse")


@dataclass(frozen=True)
class Job:
    """What is sampled: `requests` sequences of `length` in blocks of `block`, `reuse_steps` after
    every refresh.
    """

    shape: ModelShape
    requests: int
    length: int
    reuse_steps: int
    block: int = 32
    chip: str = "h100"
    devices: int = 8

    def work(self, kind: str) -> ForwardPass:
        """The rows of one step of `kind`; only the block's rows reach the head."""
        rows = self.length if kind == "refresh" else self.block
        return ForwardPass(self.requests, rows, self.length, self.block)

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


# Profile
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One kind of step at {tp, dp}: counted FLOPs and bytes sent over tp, priced time."""

    kind: str
    degrees: Degrees
    flops: int
    tp_bytes: float
    step: PassTime


@functools.lru_cache(maxsize=4096)
def _entry(shape: ModelShape, work: ForwardPass, kind: str, degrees: Degrees, chip: str) -> Entry:
    step = inference.fastest(shape, work, degrees, chip)
    found = inference.collectives(shape, work, degrees, step.sequence_parallel)
    wire = inference.wire_bytes(found, degrees.tp)
    return Entry(kind, degrees, inference.flops(shape, work, degrees), wire, step)


def profile(job: Job) -> list[Entry]:
    """The table that plans are chosen from: every kind of step at every allowed {tp, dp}."""
    return [
        _entry(job.shape, job.work(kind), kind, d, job.chip)
        for kind in KINDS
        for d in job.degrees()
    ]


# Plan
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """{tp, dp} of each phase, and seconds of one period with the switch in them.

    `weights`: "one layout", "held twice" or "gathered again"; `memory`: bytes of the fullest
    device."""

    refresh: Degrees
    reuse: Degrees
    seconds: float
    switch_seconds: float
    weights: str
    memory: int

    @property
    def switches(self) -> bool:
        """Whether the phases differ."""
        return self.refresh != self.reuse


def memory(job: Job, refresh: Degrees, reuse: Degrees, weights: str) -> tuple[int, str]:
    """Bytes of the fullest device, and the equation. The cache is there twice while it moves."""
    shape, gib = job.shape, hardware.GIB
    held = [inference.weight_bytes(shape, t) for t in sorted({refresh.tp, reuse.tp})]
    kept = sum(held) if weights == "held twice" else max(held)
    cache = max(inference.cache_bytes(shape, job.requests, job.length, d) for d in (refresh, reuse))
    copies = 1 if refresh == reuse else 2
    steps = zip(KINDS, (refresh, reuse), strict=True)
    space = max(inference.workspace_bytes(shape, job.work(kind), d) for kind, d in steps)
    terms = " + ".join(f"{w / gib:.1f}" for w in (held if weights == "held twice" else [kept]))
    text = f"weights {terms} + cache {copies}·{cache / gib:.1f} + activations {space / gib:.1f} GiB"
    return kept + copies * cache + space, text


def check_memory(job: Job, refresh: Degrees, reuse: Degrees, weights: str) -> int:
    """Bytes of the fullest device. Raises ValueError, with the equation, where they exceed the
    usable HBM.
    """
    chip = hardware.chip(job.chip)
    limit = int(inference.USABLE * chip.hbm_bytes)
    needed, text = memory(job, refresh, reuse, weights)
    if needed > limit:
        raise ValueError(
            f"refresh {refresh}, reuse {reuse}, weights {weights}: {text} = "
            f"{needed / hardware.GIB:.1f} GiB > "
            f"{inference.USABLE:g}·{chip.hbm_bytes / hardware.GIB:.0f} GiB of {chip.name}: raise "
            "the smaller tp, "
            "gather the weights again instead of holding them twice, or sample fewer requests at "
            "once"
        )
    return needed


def exchange_ranks(refresh: Degrees, reuse: Degrees) -> int:
    """Devices of a group inside which the cache moves, 1 for equal degrees."""
    return max(refresh.tp, reuse.tp) // min(refresh.tp, reuse.tp)


def moved_cache_bytes(job: Job, refresh: Degrees, reuse: Degrees) -> float:
    """Bytes of the cache that a device sends when its layout changes: (k-1)/k of what it holds, k =
    ratio of the tp.

    Sequences and heads trade places inside groups of k devices: `switching_run.Meshes` nests the
    shards so."""
    k = exchange_ranks(refresh, reuse)
    return (k - 1) / k * inference.cache_bytes(job.shape, job.requests, job.length, refresh)


def switch_terms(job: Job, refresh: Degrees, reuse: Degrees, weights: str) -> dict[str, float]:
    """Seconds of one switch there and back: all-to-all of the cache with a copy before and after,
    ids, weights.
    """
    chip = hardware.chip(job.chip)
    k = exchange_ranks(refresh, reuse)
    if k == 1:
        return {"cache": 0.0, "copies": 0.0, "ids": 0.0, "weights": 0.0}
    cache = max(
        inference.cache_bytes(job.shape, job.requests, job.length, d) for d in (refresh, reuse)
    )
    ids = 4 * max(d.sequences(job.requests) for d in (refresh, reuse)) * job.length
    timed = lambda op, nbytes: float(collective_time(op, nbytes, k, k, job.chip))
    # The coarser weights hold the finer ones (nested shards): one gather a period, and dropping the
    # rest is free.
    gathered = (
        inference.weight_bytes(job.shape, min(refresh.tp, reuse.tp))
        if weights == "gathered again"
        else 0
    )
    return {
        "cache": timed("all_to_all", cache),
        "copies": 4 * cache / (chip.hbm_bandwidth * inference.coefficient("hbm", job.chip)),
        "ids": timed("all_gather", ids),
        "weights": timed("all_gather", gathered) if gathered else 0.0,
    }


def candidates(job: Job) -> list[Plan]:
    """Every pair of {tp, dp} that fits, fastest first. Raises ValueError, with its equation, if no
    fixed one does.
    """
    allowed, found, errors = job.degrees(), [], []
    seconds = {(e.kind, e.degrees): e.step.seconds for e in profile(job)}
    for refresh in allowed:
        for reuse in allowed:
            for weights in (
                ("one layout",) if refresh == reuse else ("held twice", "gathered again")
            ):
                try:
                    needed = check_memory(job, refresh, reuse, weights)
                except ValueError as error:
                    errors.append(str(error))
                    continue
                switch = sum(switch_terms(job, refresh, reuse, weights).values())
                steps = seconds["refresh", refresh] + job.reuse_steps * seconds["reuse", reuse]
                found.append(Plan(refresh, reuse, steps + switch, switch, weights, needed))
    if all(p.switches for p in found):
        raise ValueError(f"no plan fits {job.devices} × {job.chip}; the last: {errors[-1]}")
    return sorted(found, key=lambda p: p.seconds)


@dataclass(frozen=True)
class Choice:
    """The fastest plan of all, and the fastest with one {tp, dp} for both phases."""

    best: Plan
    fixed: Plan

    @property
    def speedup(self) -> float:
        """Seconds of the best fixed degrees over those of the best plan, at least 1."""
        return self.fixed.seconds / self.best.seconds


def plan(job: Job) -> Choice:
    """Argmin over {tp, dp} of each phase with the cost of switching, beside the best fixed degrees.

    Raises ValueError where no fixed degrees fit the memory.
    """
    found = candidates(job)
    return Choice(found[0], next(p for p in found if not p.switches))
