"""Searches the order, the placement and the sequence of microbatches of a pipeline.

Fixed schedules on several sequences; list scheduling with a few knobs, which are then climbed; and a
local search on the best orders of both. Everything is priced by `evaluate` under one memory cap, so
the result is never slower than a fixed schedule that keeps it.

Legend: p devices, m microbatches, v chunks of a device."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import numpy as np

from fdp.parallel.pipeline import controllable, fixed, zero_bubble
from fdp.parallel.pipeline.bound import check_caps, lower_bound, needed_bytes
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.evaluate import Evaluation, evaluate
from fdp.parallel.pipeline.greedy import Knobs, Line
from fdp.parallel.pipeline.orders import Order, relabel
from fdp.parallel.pipeline.placement import Placement, looped, wave
from fdp.parallel.pipeline.polish import polish

SLACK = 1e-9  # relative: sums of the same bytes in another order fit the same cap


@dataclass(frozen=True)
class Candidate:
    """A schedule on a sequence of microbatches. lost: why it cannot be chosen, empty if it can."""

    name: str
    sequence: str
    order: Order | None = None
    result: Evaluation | None = None
    lost: str = ""

    @property
    def makespan(self) -> float:
        return inf if self.result is None or self.lost else self.result.makespan


@dataclass(frozen=True)
class Found:
    """best: the fastest candidate. rivals: the fixed schedules, the fastest first. bound: seconds that
    no order of any searched placement can beat."""

    best: Candidate
    rivals: list[Candidate]
    bound: float

    @property
    def gap(self) -> float:
        """Of the bound below the makespan, as a share of the makespan."""
        return 1 - self.bound / self.best.makespan


@dataclass(frozen=True)
class Problem:
    p: int
    m: int
    costs: Costs
    memory: float | Sequence[float] | None  # bytes a device may hold; None for any

    @cached_property
    def caps(self) -> list[float]:
        limit = inf if self.memory is None else self.memory
        return [float(x) for x in np.broadcast_to(limit, (self.p,))]

    @cached_property
    def chunks(self) -> int | None:
        """v where the costs name virtual stages."""
        names = ("F", "B", "W", "BW", "activation", "stash")
        shapes = [np.shape(getattr(self.costs, name)) for name in names]
        rows = {shape[0] for shape in shapes if shape} - {1, self.p}
        return max(1, max(rows) // self.p) if rows else None

    @cached_property
    def seconds_m(self) -> np.ndarray:
        """Of each microbatch, over all stages."""
        table = self.costs.on(looped(self.p, self.chunks or 1), self.m)
        return np.sum([table.F, table.B, table.W], axis=(0, 1))

    def fits(self, result: Evaluation) -> str:
        """Empty, or which device holds too much."""
        for i, (peak, cap) in enumerate(zip(result.peak_bytes, self.caps, strict=True)):
            if peak > cap * (1 + SLACK):
                return f"stage {i} holds {peak:g} bytes, {peak - cap:g} over the cap"
        return ""

    def sequences(self) -> dict[str, list[int]]:
        """Orders of the microbatches worth trying with every schedule; one where all cost alike."""
        given = list(range(self.m))
        if np.ptp(self.seconds_m) <= SLACK * self.seconds_m.max():
            return {"given": given}
        up = sorted(given, key=lambda k: self.seconds_m[k])
        return {
            "given": given,
            "ascending": up,
            "descending": up[::-1],
            "small edges": up[::2] + up[1::2][::-1],
        }


def search(
    p: int,
    m: int,
    costs: Costs,
    memory: float | Sequence[float] | None = None,
    placements: Sequence[Placement] | None = None,
    effort: float = 1.0,
    seed: int = 0,
) -> Found:
    """The fastest order of F, B, W found for the asynchronous mode.

    memory: bytes that a device may hold, one number or [p]. placements: by default looped with 1, 2
    and 3 chunks and the V, or those with the number of virtual stages that the costs name. effort: 1
    takes about ten seconds at p = 8, m = 32; 0 tries the fixed schedules and one round of list
    schedules.

    Raises ValueError for bad costs and where the memory is less than any schedule needs, with the
    stage and the amount."""
    problem = Problem(p, m, costs, memory)
    if placements is None:
        placements = default_placements(problem)
    for placement in placements:
        check_caps(placement, m, costs, problem.caps)
    rivals = sorted(fixed_candidates(problem), key=lambda c: c.makespan)
    climbed = _climb(problem, placements, effort, random.Random(seed))
    first = sorted([*climbed, *rivals[:3]], key=lambda c: c.makespan)
    best = min(_polished(problem, first, effort, seed), key=lambda c: c.makespan)
    everywhere = {c.order.placement for c in (*rivals, best) if c.order is not None} | {*placements}
    bound = min(lower_bound(x, m, costs, problem.caps) for x in everywhere)
    return Found(best, rivals, bound)


def default_placements(problem: Problem) -> list[Placement]:
    p, v = problem.p, problem.chunks
    if v is None:
        return [looped(p), looped(p, 2), looped(p, 3), wave(p)]
    return [looped(p, v), wave(p, v)] if v > 1 else [looped(p)]


def fixed_schedules(problem: Problem) -> Iterator[tuple[str, int, Callable[[], Order]]]:
    """(name, v, builder) of every fixed schedule. Those built from times take the mean ones, and the
    memory of their names or, where that is less, the cap."""
    p, m = problem.p, problem.m
    table = problem.costs.on(looped(p, problem.chunks or 1), m)
    times = zero_bubble.Times(*(float(np.sum(x)) / (p * m) for x in (table.F, table.B, table.W)), table.send)
    held, kept = (float(np.sum(x)) / (p * m) for x in (table.activation, table.stash))
    room = max(1.0, min(problem.caps) / held) if held else inf
    share = kept / held if held else 0.5
    yield "gpipe", 1, lambda: fixed.gpipe(p, m)
    yield "1f1b", 1, lambda: fixed.one_f_one_b(p, m)
    yield "zb-h1", 1, lambda: fixed.zb_h1(p, m)
    yield "zb-h2", 1, lambda: fixed.zb_h2(p, m)
    for n in (1, 2):
        limit = min(n * p, room)
        yield f"zb-{n}p", 1, lambda limit=limit: zero_bubble.zb_heuristic(p, m, times, limit, share)
    for v in (2, 3):
        yield f"interleaved v={v}", v, lambda v=v: fixed.interleaved(p, m, v)
        yield f"interleaved zero bubble v={v}", v, lambda v=v: fixed.interleaved_zero_bubble(p, m, v)
    yield "zbv", 2, lambda: fixed.zbv(p, m)
    limit = min(p, room)
    yield "zbv from times", 2, lambda: zero_bubble.zbv_heuristic(p, m, times, limit, share)
    yield "v-half", 2, lambda: controllable.v_half(p, m)
    yield "v-min", 2, lambda: controllable.v_min(p, m)
    yield "dualpipe-v", 2, lambda: fixed.dualpipe_v(p, m)
    yield "skip wave", 2, lambda: fixed.skip_wave(p, m, limit)


def fixed_candidates(problem: Problem) -> list[Candidate]:
    """Every fixed schedule on its best sequence, with the reason where it cannot run."""
    found = []
    for name, v, build in fixed_schedules(problem):
        if problem.chunks not in (None, v):
            continue
        try:
            order = build()
        except ValueError as error:
            found.append(Candidate(name, "given", lost=str(error)))
            continue
        tried = [
            _priced(problem, name, sequence, relabel(order, ks))
            for sequence, ks in problem.sequences().items()
        ]
        found.append(min(tried, key=lambda c: c.makespan))
    return found


def _priced(problem: Problem, name: str, sequence: str, order: Order) -> Candidate:
    result = evaluate(order, problem.costs)
    return Candidate(name, sequence, order, result, problem.fits(result))


@dataclass(frozen=True)
class _Point:
    """One list schedule."""

    placement: Placement
    sequence: tuple[int, ...]
    knobs: Knobs


def _climb(
    problem: Problem, placements: Sequence[Placement], effort: float, choose: random.Random
) -> list[Candidate]:
    """The best list schedules of a grid of knobs, the best of them climbed."""
    p = problem.p
    tables = {x: problem.costs.on(x, problem.m) for x in placements}

    def seconds(point: _Point) -> float:
        line = Line(point.placement, tables[point.placement], problem.caps, point.sequence)
        return line.run(point.knobs)[0]

    starts = []
    for placement, (name, ks) in itertools.product(placements, problem.sequences().items()):
        tried = [
            _Point(placement, tuple(ks), Knobs(ahead, (patience,) * p, (hold,) * p))
            for ahead in (0.75, 1.0, 1.3)
            for patience in (0.0, 0.5, 1.0)
            for hold in (0.0, 0.3)
        ]
        starts.append((*min(((seconds(x), n) for n, x in enumerate(tried))), name, tried))
    starts.sort(key=lambda x: x[0])
    found = []
    for best, n, name, tried in starts[:4]:
        point = tried[n]
        for _ in range(round(120 * effort)):
            other = _changed(problem, point, choose)
            time = seconds(other)
            if time <= best:
                best, point = time, other
        line = Line(point.placement, tables[point.placement], problem.caps, point.sequence)
        found.append(_priced(problem, "searched", name, line.order(line.run(point.knobs)[1])))
    return found


def _changed(problem: Problem, point: _Point, choose: random.Random) -> _Point:
    """One knob or the place of one microbatch, at random."""
    knobs, what = point.knobs, choose.random()
    if what < 0.4 and np.ptp(problem.seconds_m) > 0:
        ks = list(point.sequence)
        a, b = choose.sample(range(problem.m), 2)
        if choose.random() < 0.5:
            ks[a], ks[b] = ks[b], ks[a]
        else:
            ks.insert(b, ks.pop(a))
        return replace(point, sequence=tuple(ks))
    if what < 0.55:
        return replace(point, knobs=replace(knobs, ahead=knobs.ahead * choose.lognormvariate(0, 0.2)))
    if what < 0.6:
        return replace(point, knobs=replace(knobs, deep=not knobs.deep))
    if what < 0.65:
        return replace(point, knobs=replace(knobs, late=not knobs.late))
    name = "patience" if what < 0.85 else "hold"
    values = list(getattr(knobs, name))
    value = choose.choice((0.0, choose.uniform(0, 1.5)))
    for i in range(problem.p) if choose.random() < 0.3 else (choose.randrange(problem.p),):
        values[i] = value
    return replace(point, knobs=replace(knobs, **{name: tuple(values)}))


def _polished(
    problem: Problem, first: Sequence[Candidate], effort: float, seed: int
) -> Iterator[Candidate]:
    """The candidates, and the best four after local search."""
    for n, candidate in enumerate(first):
        yield candidate
        if n < 4 and candidate.order is not None and not candidate.lost:
            order = polish(candidate.order, problem.costs, problem.caps, round(600 * effort), seed)
            yield _priced(problem, "searched", candidate.sequence, order)
