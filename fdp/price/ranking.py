"""The ten fastest of all valid parallel plans of a job, each with its reasons, or why there is
none.

Legend: N plans of the space, K of them ranked; seconds, bytes, joules."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from fdp.keys import UserError
from fdp.price import hybrid, ranking_text
from fdp.price.hardware import GIB, Cluster
from fdp.price.hybrid import Model, PricedJobs
from fdp.price.space import (
    CP_SHARE,
    Space,
    columns_of,
    degrees_of,
    keep,
    name_of,
    plan_at,
    shared_columns,
    size_of,
    space,
    trainable,
)
from fdp.price.traffic import AXES, joules, traffic
from fdp.price.workload import Job, Plan, domain_of, weakest

# plans priced at once: radial basis functions of a member take 1 MB
CHUNK = 2048
KEPT = 10
LIKELY = 0.5  # least probability of running that is ranked
# Most that the compiler takes for a step of this code base, over `footprint.memory` of the same
# plan: float32 gradients and the FFN's float32 intermediates. Compiled for v5p and H100 by the
# ahead-of-time tests.
OWN_MEMORY = 1.5


def price(model: Model, job: Job, points: Space) -> PricedJobs:
    """Prices (N,) of the space, in chunks whose radial basis functions stay in a cache. N ≥ 1."""

    def part(start: int) -> PricedJobs:
        chunk = keep(points, slice(start, start + CHUNK))
        return hybrid.predict(model, shared_columns(job, chunk), single=True)

    # One thread a chunk: those of the BLAS would wait for each other on such small products.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor() as pool:
        return hybrid.joined(list(pool.map(part, range(0, size_of(points), CHUNK))))


@dataclass(frozen=True)
class Ranked:
    """One plan: seconds a step with a 90 % interval, bytes a device, joules a step (nan: power not
    published).
    """

    plan: Plan
    time: float
    low: float
    high: float
    memory: float
    feasible: float  # probability that it runs
    joules: float
    tokens_per_joule: float
    traffic: dict[str, float]  # bytes a device sends per step, by axis
    bottleneck: str
    terms: dict[str, float]  # seconds; "correction" is what the learned residual adds
    why: str  # against the first


@dataclass(frozen=True)
class Ranking:
    """The fastest plans, best first, out of `valid` ones of which `feasible` probably run."""

    job: Job
    cluster: Cluster
    valid: int
    feasible: int
    plans: tuple[Ranked, ...]
    # the fastest that this code base can train, priced as it runs: attention is not fused
    trainable: Ranked | None

    def __str__(self) -> str:
        """The table, and why each plan lost to the first."""
        return ranking_text.describe(self)


def why(terms: Mapping[str, float], best: Mapping[str, float]) -> str:
    """The terms that explain a plan's distance to the best one, in % of the best time, largest
    first.
    """
    whole = sum(best.values())
    delta = {k: 100 * (terms[k] - best[k]) / whole for k in best}
    told = [k for k in sorted(delta, key=lambda k: -abs(delta[k])) if abs(delta[k]) >= 0.5][:4]
    names = hybrid.BOTTLENECKS | {"correction": "learned correction"}
    return ", ".join(
        f"{'+' if delta[k] > 0 else '−'}{abs(delta[k]):.0f} % {names[k]}" for k in told
    )


def _terms_at(p: PricedJobs, i: int) -> dict[str, float]:
    terms = {k: float(v[i]) for k, v in p.terms.items()}
    return terms | {"correction": float(p.time[i]) - sum(terms.values())}


def _ranked(model: Model, job: Job, cluster: Cluster, points: Space, p: PricedJobs) -> list[Ranked]:
    """The plans of a small space in its order, explained against its first."""
    x = columns_of(job, points)
    spent, moved, slow = joules(model, job, cluster, x, p), traffic(x), p.bottleneck()
    terms = [_terms_at(p, i) for i in range(size_of(points))]
    return [
        Ranked(
            plan_at(points, i),
            float(p.time[i]),
            float(p.low[i]),
            float(p.high[i]),
            float(p.memory[i]),
            float(p.feasible[i]),
            float(spent[i]),
            job.batch * job.seq / float(spent[i]),
            {a: float(moved[a][i]) for a in AXES},
            slow[i],
            terms[i],
            why(terms[i], terms[0]) or "as fast within 0.5 % in every term" if i else "fastest",
        )
        for i in range(size_of(points))
    ]


def rank(model: Model, job: Job, cluster: Cluster) -> Ranking:
    """Price every valid plan of the job on all chips of the cluster and keep the ten fastest that
    probably run.

    The job's chip and domain are those of the cluster: of a mixed one the weakest, see `weakest`.
    Raises UserError with the binding constraint and the nearest relaxation where no plan is valid
    or none fits into memory."""
    job = dataclasses.replace(job, chip=weakest(cluster), domain=domain_of(cluster))
    points = space(job.shape, cluster.size, job.batch, job.seq)
    if not size_of(points):
        raise UserError(_indivisible(job, cluster))
    p = price(model, job, points)
    likely = np.flatnonzero(p.feasible >= LIKELY)
    if not len(likely):
        raise UserError(_too_large(model, job, cluster, points, p))
    order = likely[np.argsort(p.time[likely], kind="stable")][:KEPT]
    plans = _ranked(model, job, cluster, keep(points, order), p.at(order))
    return Ranking(
        job, cluster, size_of(points), len(likely), tuple(plans), _own(model, job, cluster, points)
    )


def _own(model: Model, job: Job, cluster: Cluster, points: Space) -> Ranked | None:
    """The fastest plan that this code base trains: its XLA attention keeps its scores, as software
    before 2022 did.
    """
    job, ours = dataclasses.replace(job, modern=False), trainable(job, points)
    if not ours.any():
        return None
    points = keep(points, ours)
    p = price(model, job, points)
    fits = np.flatnonzero(p.memory * OWN_MEMORY <= job.chip.hbm_bytes)
    if not len(fits):
        return None
    first = fits[[p.time[fits].argmin()]]
    return _ranked(model, job, cluster, keep(points, first), p.at(first))[0]


def _indivisible(job: Job, cluster: Cluster) -> str:
    """Why no plan is structurally valid, with the nearest batch and number of chips for which one
    is.

    dp = chips is always open to the model, so it is the batch that none of the possible dp divides.
    """
    chips, batch = cluster.size, job.batch
    dp = np.unique(degrees_of(job.shape, chips, job.seq)["dp"])
    larger = int((-(-batch // dp) * dp).min())
    fewer = next(n for n in range(chips - 1, 0, -1) if size_of(space(job.shape, n, batch, job.seq)))
    shown = ", ".join(map(str, dp[:8])) + (", …" if len(dp) > 8 else "")
    a = job.shape
    return (
        f"no plan uses all {chips} chips of {cluster.name}: tp·pp·cp·dp = {chips} with tp | "
        f"{a.heads} heads, pp ≤ "
        f"{a.layers} layers and tp·cp | {job.seq} tokens leaves dp in {{{shown}}}, and none "
        f"divides the batch {batch}: "
        f"set batch={larger} or use {fewer} chips"
    )


def _too_large(model: Model, job: Job, cluster: Cluster, points: Space, p: PricedJobs) -> str:
    """Which plan comes closest to fitting, and what would: more nodes of the weakest group, or
    shorter sequences.
    """
    i = int(p.memory.argmin())
    least, hbm = p.memory[i] / GIB, job.chip.hbm_bytes / GIB
    offers = [o for o in (_more_chips(model, job, cluster), _shorter(model, job, cluster)) if o]
    nothing = (
        f"no cluster up to {MOST_CHIPS} such chips fits it either; take chips with more memory"
    )
    return (
        f"{job.shape.name} fits no plan on {cluster.size} chips of {cluster.name}: the "
        "smallest footprint is "
        f"{least:.1f} GiB a device ({name_of(plan_at(points, i))}), where {hbm:.0f} GiB of HBM "
        "leave room for about "
        f"{hbm * np.exp(model.fit['margin']):.1f}: {' or '.join(offers) or nothing}"
    )


MOST_CHIPS = 16384


def _fits(model: Model, job: Job, chips: int, seq: int) -> bool:
    points = space(job.shape, chips, job.batch, seq)
    if not size_of(points):
        return False
    return bool((price(model, dataclasses.replace(job, seq=seq), points).feasible >= LIKELY).any())


def _more_chips(model: Model, job: Job, cluster: Cluster) -> str:
    """The fewest chips, in whole nodes, that hold a plan: doubled until one fits, then every count
    below it.
    """
    group = next(g for g in cluster.groups if g.chip.name == job.chip.name)
    low = high = -(-cluster.size // group.chips)
    while not _fits(model, job, high * group.chips, job.seq):
        low, high = high, 2 * high
        if high * group.chips > MOST_CHIPS:
            return ""
    nodes = next(
        (n for n in range(low + 1, high) if _fits(model, job, n * group.chips, job.seq)), high
    )
    return f"use {nodes * group.chips} {job.chip.name}"


def _shorter(model: Model, job: Job, cluster: Cluster) -> str:
    """The longest halving of the sequence that fits."""
    halves = (
        job.seq >> i for i in range(1, 5) if job.seq % (1 << i) == 0 and job.seq >> i >= CP_SHARE
    )
    seq = next((s for s in halves if _fits(model, job, cluster.size, s)), None)
    return f"set seq_len={seq}" if seq else ""
