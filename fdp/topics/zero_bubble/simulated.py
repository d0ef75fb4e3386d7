"""The searched schedule against fixed ones, on simulated devices: shapes of diffusion models times
laws of what a microbatch costs.

Every contest holds the same work in as many microbatches, so makespans compare as samples a second.
Memory counts microbatches: a static program holds a slot of equal size for each.

Legend: p devices, m microbatches."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fdp.parallel.pipeline import fixed
from fdp.parallel.pipeline.certificate import certificate
from fdp.parallel.pipeline.costs import STASH, Costs
from fdp.parallel.pipeline.evaluate import Evaluation, evaluate
from fdp.parallel.pipeline.orders import relabel, split_backward
from fdp.parallel.pipeline.placement import looped
from fdp.parallel.pipeline.search import Candidate, PipelineProblem, SearchResult, search

EQUAL, PIXELS, VIDEO = "1:1:1", "512 px 1:1.26:.87", "video 1:2.28:.36"
SHAPES = {  # seconds of F, B, W of a device
    EQUAL: (1.0, 1.0, 1.0),
    PIXELS: (1.0, 1.26, 0.87),
    VIDEO: (1.0, 2.28, 0.36),
}
MEASURED = "measured"
HALVES, NORMAL = "half cost 1 and half ¼", "log-normal σ .6"
LAWS = HALVES, NORMAL
RANDOM = 20  # orders drawn of the microbatches

Seconds = Sequence[float] | float  # of a device, or of each


class ContestCase(NamedTuple):
    """times: seconds of F, B, W, a number or [p] each. law: of the microbatches' costs. held:
    microbatches that a device may hold."""

    name: str
    times: tuple[Seconds, Seconds, Seconds]
    law: str
    p: int
    m: int
    held: float
    effort: float


class FoundSchedule(NamedTuple):
    """A schedule: its name, the sequence of its microbatches, seconds and shares of them."""

    name: str
    sequence: str
    makespan: float
    bubble: float


class Contest(NamedTuple):
    """One case. equal_*: on microbatches of equal costs and the same work. bound: seconds that no
    order can beat."""

    name: str
    p: int
    m: int
    held: float
    searched: FoundSchedule
    fixed: FoundSchedule
    equal_searched: FoundSchedule
    equal_fixed: FoundSchedule
    sorted_1f1b: FoundSchedule
    split_1f1b: FoundSchedule
    random_1f1b: FoundSchedule
    bound: float

    @property
    def possible(self) -> float:
        """Samples a second over those of the best fixed order that the bound leaves open."""
        return self.fixed.makespan / self.bound

    def over(self, other: str) -> float:
        """Samples a second of the searched schedule over those of a field."""
        return getattr(self, other).makespan / self.searched.makespan


def cases(
    p: int = 8,
    m: int = 32,
    effort: float = 0.25,
    shapes: Sequence[str] = tuple(SHAPES),
    more: Sequence[str] = (VIDEO,),
    laws: Sequence[str] = LAWS,
    measured: tuple[Sequence[float], Sequence[float], Sequence[float]] | None = None,
) -> list[ContestCase]:
    """Shapes times laws at p microbatches held; those of `more` also at p + (p − 1)/3, what
    interleaved 1F1B of three chunks holds. measured: seconds of F, B, W by stage [p], which give
    a case a law beside them."""
    chosen: list[tuple[str, Any, int, float]]
    chosen = [(shape, SHAPES[shape], p, float(p)) for shape in shapes]
    if measured is not None:
        times = tuple(tuple(map(float, x)) for x in measured)
        stages = len(times[0])
        chosen.append((f"{MEASURED} on {stages} stages", times, stages, float(stages)))
    chosen += [(shape, SHAPES[shape], p, p + (p - 1) / 3) for shape in more]
    return [
        ContestCase(f"{shape}, {law}, {held:.4g} held", times, law, stages, m, held, effort)
        for shape, times, stages, held in chosen
        for law in laws
    ]


def shares(law: str, m: int) -> np.ndarray:
    """Costs of m microbatches, in the order in which they were drawn, with mean 1."""
    rng = np.random.default_rng(0)
    if law == HALVES:
        drawn = rng.permutation(np.where(np.arange(m) % 2, 0.25, 1.0))
    elif law == NORMAL:
        drawn = rng.lognormal(0, 0.6, m)
    else:
        drawn = np.ones(m)
    return drawn / drawn.mean()


def costs_of(times: tuple[Seconds, Seconds, Seconds], share_m: np.ndarray) -> Costs:
    """A microbatch takes its share of the times; activations count microbatches."""
    f, b, w = (np.atleast_1d(np.asarray(t, float))[:, None] * share_m for t in times)
    return Costs(f, b, w, activation=1.0, stash=STASH)


def contest(case: ContestCase) -> Contest:
    """The searched schedule and its rivals. A fixed one has the best of the sequences of the
    search, ascending, descending and small ones at the edges among them."""
    costs = costs_of(case.times, shares(case.law, case.m))
    found = search(case.p, case.m, costs, case.held, effort=case.effort)
    even, even_fixed = _equalised(case.times, case.p, case.m, case.held, case.effort)
    best = _found(found.best), _found(found.rivals[0])
    ones = _one_f_one_b(PipelineProblem(case.p, case.m, costs, case.held))
    at = case.name, case.p, case.m, case.held
    return Contest(*at, *best, even, even_fixed, *ones, found.bound)


def _found(c: Candidate) -> FoundSchedule:
    assert c.result is not None
    name = f"{c.name}, {_where(c)}" if c.name == "searched" else c.name
    return FoundSchedule(name, c.sequence, c.makespan, c.result.bubble)


def _where(c: Candidate) -> str:
    assert c.order is not None
    at = c.order.placement
    shape = "looped" if at == looped(at.p, at.v) else "V"
    return f"{shape} v={at.v}"


@cache
def _equalised(
    times: Any, p: int, m: int, held: float, effort: float
) -> tuple[FoundSchedule, FoundSchedule]:
    """(searched, best fixed) on microbatches of one cost."""
    found: SearchResult = search(p, m, costs_of(times, np.ones(m)), held, effort=effort)
    return _found(found.best), _found(found.rivals[0])


def _one_f_one_b(problem: PipelineProblem) -> tuple[FoundSchedule, FoundSchedule, FoundSchedule]:
    """1F1B on its best sequence, the same with B and W as two operations, and the median of random
    sequences."""
    order, costs = fixed.one_f_one_b(problem.p, problem.m), problem.costs

    def best(name: str, order: Any) -> FoundSchedule:
        tried = {n: evaluate(relabel(order, ks), costs) for n, ks in problem.sequences().items()}
        sequence = min(tried, key=lambda n: tried[n].makespan)
        return FoundSchedule(name, sequence, tried[sequence].makespan, tried[sequence].bubble)

    rng = np.random.default_rng(1)
    drawn = [rng.permutation(problem.m).tolist() for _ in range(RANDOM)]
    random = sorted((evaluate(relabel(order, ks), costs) for ks in drawn), key=_makespan)
    middle = random[RANDOM // 2]
    return (
        best("1f1b", order),
        best("1f1b, B and W apart", split_backward(order)),
        FoundSchedule("1f1b", "random", middle.makespan, middle.bubble),
    )


def _makespan(result: Evaluation) -> float:
    return result.makespan


# How far from the optimum
# -------------------------------------------------------------------------------------------------


class Proof(NamedTuple):
    """gap: of what HiGHS proves for any order and sequence below the searched makespan, as a share
    of it."""

    name: str
    p: int
    m: int
    bubble: float
    gap: float


def proofs(
    p: int,
    m: int,
    seconds: float = 3.0,
    effort: float = 0.25,
    shapes: Sequence[str] = tuple(SHAPES),
) -> list[Proof]:
    """Searched orders of one chunk a device and p microbatches held against the optimum, for every
    shape and law and for equal costs. p·m ≤ 32. HiGHS ends within 1 %, or after so many
    seconds on each."""
    found, placement = [], looped(p)
    for shape in shapes:
        for law in (*LAWS, "equal costs"):
            costs = costs_of(SHAPES[shape], shares(law, m))
            best = search(p, m, costs, p, [placement], effort).best
            caps = [float(p)] * p
            given = placement, m, costs, caps, best.makespan
            proof = certificate(*given, seconds=seconds, gap=0.01)
            assert best.result is not None
            gap = 0.0 if proof.proven else proof.gap
            found.append(Proof(f"{shape}, {law}", p, m, best.result.bubble, gap))
    return found


# Memory
# -------------------------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """Bubbles by memory, C caps. fixed: {name: (most microbatches held, bubble)}, each on its best
    sequence. best_fixed, searched, bound [C]."""

    name: str
    caps: tuple[float, ...]
    searched: list[float]
    best_fixed: list[float]
    bound: list[float]
    fixed: dict[str, tuple[float, float]]


def sweep(shape: str, law: str, caps: tuple[float, ...], p: int, m: int) -> Sweep:
    """What more memory buys: searched and fixed schedules at caps in microbatches."""
    costs = costs_of(SHAPES[shape], shares(law, m))
    found = [search(p, m, costs, cap, effort=0.0) for cap in sorted(caps)]
    work = _work(found[0].best)
    runs: dict[str, tuple[float, float]] = {}
    for c in (c for f in found for c in f.rivals if not c.lost):
        assert c.result is not None
        if c.result.bubble < runs.get(c.name, (0.0, 1.0))[1]:
            runs[c.name] = max(c.result.peak_bytes), c.result.bubble
    name = f"{shape}, {law}, p = {p}, m = {m}"
    searched, best_fixed = (
        (1 - work / np.minimum.accumulate(x)).tolist()  # what fits less memory fits more
        for x in ([f.best.makespan for f in found], [f.rivals[0].makespan for f in found])
    )
    bound = [1 - work / f.bound for f in found]
    return Sweep(name, tuple(sorted(caps)), searched, best_fixed, bound, runs)


def _work(c: Candidate) -> float:
    """Busy seconds of a mean device."""
    assert c.result is not None
    return float(np.mean(c.result.busy))


# Pictures of schedules
# -------------------------------------------------------------------------------------------------


class Bars(NamedTuple):
    """A schedule to draw: [N] device, start and seconds of every operation, and its kind."""

    bubble: float
    held: float
    device: list[int]
    start: list[float]
    seconds: list[float]
    kind: list[str]

    @classmethod
    def of(cls, result: Evaluation) -> "Bars":
        rows = [
            (i, begun, timed[0], op.kind)
            for i, ops in enumerate(result.order.ops)
            for op, begun, timed in zip(ops, result.start[i], result.program.ops[i], strict=True)
        ]
        device, start, seconds, kind = (list(x) for x in zip(*rows, strict=True))
        return cls(result.bubble, max(result.peak_bytes), device, start, seconds, kind)


def schedules(
    times: tuple[Seconds, Seconds, Seconds], law: str, p: int = 4, m: int = 8, effort: float = 0.25
) -> dict[str, Bars]:
    """Every fixed schedule on its best sequence, whatever it holds, and the searched one at p
    microbatches."""
    costs = costs_of(times, shares(law, m))
    free = search(p, m, costs, None, effort=0.0)
    best = search(p, m, costs, float(p), effort=effort).best
    found = {c.name: Bars.of(c.result) for c in free.rivals if c.result is not None}
    assert best.result is not None
    named = sorted(found.items(), key=lambda x: -x[1].bubble)
    return dict(named) | {f"searched, {_where(best)}": Bars.of(best.result)}
