"""When a pipeline is worth having: the best plan of a training job with and without pp at equal
devices, over models, lengths, clusters, batches and links.

Plans and prices are the planner's. It prices a pipeline as interleaved 1F1B; here its bubble is
also that of a searched schedule of the same stages, chunks, microbatches and memory, and none.

Legend: N plans, p stages, v chunks of a stage, m microbatches, D width."""

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fdp.models.shape import ModelShape
from fdp.parallel.pipeline.bound import lower_bound
from fdp.parallel.pipeline.costs import STASH, Costs
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.fixed import interleaved_zero_bubble
from fdp.parallel.pipeline.greedy import Knobs, Line
from fdp.parallel.pipeline.placement import looped
from fdp.parallel.pipeline.published import shape_times
from fdp.price import hardware, hybrid, ranking, space, step_time
from fdp.price.hybrid import PricedJobs
from fdp.price.ranking import LIKELY
from fdp.price.space import Space, keep, name_of, plan_at, size_of
from fdp.price.workload import RECOMPUTE, Job, job_on

ENOUGH = 4  # microbatches a stage beyond which a looped schedule idles no longer


class Workload(NamedTuple):
    """tokens: of a sample. batches: samples of a step, the small and the large one."""

    name: str
    shape: ModelShape
    tokens: int
    batches: tuple[int, int]


class Cell(NamedTuple):
    """One cell of the map. link: bytes/s a chip between nodes."""

    name: str
    workload: Workload
    nodes: int
    batch: int
    link: float


class Worth(NamedTuple):
    """Seconds a step of the best plans: without pp; with it at the bubble of interleaved 1F1B, of
    the searched schedule, and none (of plans with m ≥ p). nan where no plan fits. bubble: share
    that the searched one leaves idle."""

    name: str
    model: str
    tokens: int
    chips: int
    batch: int
    link: float
    without: float
    interleaved: float
    searched: float
    free: float
    bubble: float
    plan_without: str
    plan_searched: str

    @property
    def gain(self) -> float:
        """Samples a second with the searched pipeline over those without pp."""
        return self.without / self.searched

    @property
    def decides(self) -> bool:
        """Whether interleaved 1F1B loses, and a pipeline without bubble would win."""
        return self.free < self.without <= self.interleaved

    @property
    def flips(self) -> bool:
        """Whether interleaved 1F1B loses, and the searched schedule wins."""
        return self.searched < self.without <= self.interleaved


def transformer(name: str, layers: int, width: int) -> ModelShape:
    """A DiT as the planner sees it: heads of 128, a plain FFN of 4 D, next to no vocabulary."""
    heads, ffn = width // 128, 4 * width
    sizes = (layers, width, heads, heads, 128, ffn, 64)
    return ModelShape(*sizes, gated=False, name=name, dtype="bfloat16")


WORKLOADS = (
    Workload("2B 256 px", transformer("2B", 40, 2048), 256, (256, 2048)),
    Workload("12B 512 px", transformer("12B", 40, 5120), 1024, (256, 2048)),
    Workload("12B 1024 px", transformer("12B", 40, 5120), 4096, (256, 2048)),
    Workload("14B video 32K", transformer("14B", 44, 5120), 32768, (64, 256)),
    Workload("14B video 75K", transformer("14B", 44, 5120), 76800, (64, 256)),
    Workload("30B 1024 px", transformer("30B", 48, 7168), 4096, (256, 2048)),
)
NODES = (8, 32, 64)  # of eight H100
LINKS = (50e9, 12.5e9)  # bytes/s of a chip between nodes


def cells(few: bool = False) -> list[Cell]:
    """The map; `few`: four cells of it."""
    found = [
        Cell(
            f"{w.name}, {8 * nodes} chips, batch {batch}, {link / 1e9:g} GB/s",
            w,
            nodes,
            batch,
            link,
        )
        for w in WORKLOADS
        for nodes in NODES
        for batch in w.batches
        for link in LINKS
    ]
    return found[:: len(found) // 4] if few else found


def worths(found: Sequence[Cell]) -> list[Worth]:
    """`worth` of every cell: as one measurement, as a cell takes a tenth of a second."""
    return [worth(cell) for cell in found]


def worth(cell: Cell) -> Worth:
    """The best plans of a cell."""
    w, here = cell.workload, hardware.cluster(f"h100:{cell.nodes}x8")
    job = job_on(w.shape, here, cell.batch, w.tokens, causal=False)
    job = dataclasses.replace(job, scale_out=cell.link)
    points = space.space(w.shape, here.size, cell.batch, w.tokens)
    priced = ranking.price(hybrid.shipped(), job, points)
    runs = priced.feasible >= LIKELY
    alone, staged = (_where(points, priced, runs & x) for x in _split(points))
    given = (cell.name, w.shape.name, w.tokens, here.size, cell.batch, cell.link)
    first = int(alone[1].argmin()) if len(alone[1]) else -1
    without, plan = (alone[1][first], _name(alone[0], first)) if first >= 0 else (np.nan, "")
    nothing = np.nan, np.nan, np.nan, np.nan, ""
    *seconds, idle, named = _pipelines(job, *staged) if len(staged[1]) else nothing
    interleaved, searched, free = map(float, seconds)
    return Worth(*given, float(without), interleaved, searched, free, float(idle), plan, named)


def _split(points: Space) -> tuple[np.ndarray, np.ndarray]:
    return points["pp"] == 1, points["pp"] > 1


def _where(points: Space, priced: PricedJobs, mask: np.ndarray) -> tuple[Space, np.ndarray]:
    """(plans, seconds) of a part of the space."""
    return keep(points, mask), priced.time[mask]


def _name(points: Space, i: int) -> str:
    return name_of(plan_at(points, i))


def _pipelines(job: Job, points: Space, time_N: np.ndarray) -> tuple[Any, ...]:
    """(interleaved, searched, free, bubble of the searched, its plan): the best seconds a step.

    Plans are looked at in the order of the seconds that the lower bound of their schedules leaves,
    until none can beat the best."""
    share_N = bubble_share(job, points)
    m_N = job.batch // (points["dp"] * points["microbatch"])
    busy_N = time_N * (1 - share_N)
    enough = m_N >= points["pp"]
    free = busy_N[enough].min() if enough.any() else np.inf
    r = job.seq / job.shape.width
    full = points["recompute"] == RECOMPUTE.index("full")

    def left(i: int, idle: Any) -> float:
        """Seconds where a share of the bubble of interleaved 1F1B is left."""
        p, v, m = (int(x[i]) for x in (points["pp"], points["virtual"], m_N))
        kept = 1.0 if full[i] else idle(p, v, min(m, ENOUGH * p), r)
        return float(busy_N[i] + share_N[i] * time_N[i] * kept)

    best, at = np.inf, -1
    # No schedule idles less than the bound, none of a plan more than 1F1B.
    for i in np.argsort(busy_N, kind="stable"):
        if busy_N[i] >= best:
            break
        if left(i, least_idle) < best and (seconds := left(i, searched_idle)) < best:
            best, at = seconds, int(i)
    return time_N.min(), best, min(free, best), 1 - busy_N[at] / best, _name(points, at)


def bubble_share(job: Job, points: Space) -> np.ndarray:
    """(N,): what of the planner's seconds a step is the bubble of interleaved 1F1B."""
    model, x = hybrid.shipped(), space.columns_of(job, points)
    groups = hybrid.groups_of(x)
    known = model.effects.get("scale|family", {})
    groups["family"] = hybrid.resolved(groups["family"], known.keys())
    inputs = hybrid.numeric(x)
    k = hybrid.time_coefficients(inputs, model.time, hybrid.shifts(model.effects, groups))
    whole, rest = (
        np.broadcast_to(step_time.step_time(inputs, c)["total"], (size_of(points),))
        for c in (k, k | {"bubble": 0 * k["bubble"]})
    )
    return 1 - rest / whole


# Schedules of equal microbatches
# -------------------------------------------------------------------------------------------------


def _problem(p: int, v: int, m: int, r: float) -> tuple[Costs, float, float]:
    """(costs, memory in microbatches of a device, idle seconds of interleaved 1F1B): as much memory
    as 1F1B of v chunks holds."""
    t = shape_times(r)
    costs = Costs(t.F, t.B, t.W, activation=1.0, stash=STASH)
    held = min(p, m) * (1 + (p - 1) / (p * v) if v > 1 else 1.0)
    return costs, max(held, 1.0), (p - 1) * (t.F + t.B + t.W) / v


@cache
def least_idle(p: int, v: int, m: int, r: float) -> float:
    """What no schedule can idle less, over what interleaved 1F1B idles."""
    costs, held, idle = _problem(p, v, m, r)
    work = m * (costs.F + costs.B + costs.W)
    return max(0.0, lower_bound(looped(p, v), m, costs, [held] * p) - work) / idle


@cache
def searched_idle(p: int, v: int, m: int, r: float) -> float:
    """What the best list schedule, or interleaved zero bubble, idles over interleaved 1F1B."""
    costs, held, idle = _problem(p, v, m, r)
    placement, none = looped(p, v), (0.0,) * p
    line = Line(placement, costs.on(placement, m), [held] * p, range(m))
    found = [idle + m * (costs.F + costs.B + costs.W)]
    for rounds, returns in ((p, p), (0, p), (0, 1)) if v > 1 else ((0, 1),):
        for patience in (0.0, 0.5, 1.0):
            for ahead in (1.0, 1.4):
                knobs = Knobs(ahead, (patience,) * p, none, rounds, returns)
                found.append(line.run(knobs)[0])
    if v == 1 or m % p == 0:
        found.append(evaluate(interleaved_zero_bubble(p, m, v), costs).makespan)
    return max(0.0, min(found) - m * (costs.F + costs.B + costs.W)) / idle
