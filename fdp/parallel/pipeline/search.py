"""Searches the order, the placement and the sequence of microbatches of a pipeline.

Fixed schedules on several sequences; list scheduling with a few knobs, which are then climbed; and
a local search on the best orders of both. Everything is priced by `evaluate` under one memory cap,
so the result is never slower than a fixed schedule that keeps it.

Legend: p devices, m microbatches, v chunks of a device."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf
from typing import Protocol

import numpy as np

from fdp.parallel.pipeline import controllable, fixed, heuristics
from fdp.parallel.pipeline.bound import check_caps, lower_bound
from fdp.parallel.pipeline.costs import SLACK, Costs, CostTable
from fdp.parallel.pipeline.evaluate import Evaluation, evaluate
from fdp.parallel.pipeline.follow import Follower
from fdp.parallel.pipeline.greedy import Knobs, Line
from fdp.parallel.pipeline.orders import Order, relabel
from fdp.parallel.pipeline.placement import Placement, looped, wave
from fdp.parallel.pipeline.polish import polish

CLIMBED, CHANGES, POLISHED, PLAYS = 5, 120, 3, 500  # starts and steps of each climb at effort 1


@dataclass(frozen=True)
class Candidate:
    """A schedule on a sequence of microbatches. lost: why it cannot be chosen, empty if it can."""

    name: str
    sequence: str
    order: Order | None = None
    result: Evaluation | None = None
    lost: str = ""
    plain: Order | None = None  # a fixed schedule before its microbatches were put in sequence

    @property
    def makespan(self) -> float:
        return inf if self.result is None or self.lost else self.result.makespan


@dataclass(frozen=True)
class SearchResult:
    """best: the fastest candidate. rivals: the fixed schedules, the fastest first. bound:
    seconds that no order of any searched placement can beat."""

    best: Candidate
    rivals: list[Candidate]
    bound: float

    @property
    def gap(self) -> float:
        """Of the bound below the makespan, as a share of the makespan."""
        return 1 - self.bound / self.best.makespan


@dataclass(frozen=True)
class PipelineProblem:
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

    @property
    def uneven(self) -> bool:
        """Whether microbatches differ."""
        return bool(np.ptp(self.seconds_m) > SLACK * self.seconds_m.max())

    @property
    def ease(self) -> float:
        """Small pipelines are cheap to play, so they get more tries, up to six times."""
        return min(6.0, max(1.0, 256 / (self.p * self.m)))

    @cached_property
    def seconds_m(self) -> np.ndarray:
        """Of each microbatch, over all stages."""
        table = self.costs.on(looped(self.p, self.chunks or 1), self.m)
        return np.sum([table.F, table.B, table.W], axis=(0, 1))

    @cached_property
    def _tables(self) -> dict[Placement, CostTable]:
        return {}

    def table(self, placement: Placement) -> CostTable:
        """The costs on a placement, made once."""
        if placement not in self._tables:
            self._tables[placement] = self.costs.on(placement, self.m)
        return self._tables[placement]

    def fits(self, result: Evaluation) -> str:
        """Empty, or which device holds too much."""
        for i, (peak, cap) in enumerate(zip(result.peak_bytes, self.caps, strict=True)):
            if peak > cap * (1 + SLACK):
                return f"stage {i} holds {peak:g} bytes, {peak - cap:g} over the cap"
        return ""

    def sequences(self) -> dict[str, list[int]]:
        """Orders of the microbatches worth trying with every schedule; one where all cost alike."""
        given = list(range(self.m))
        if not self.uneven:
            return {"given": given}
        up = sorted(given, key=lambda k: self.seconds_m[k])
        named = {
            "ascending": up,
            "descending": up[::-1],
            "small edges": up[::2] + up[1::2][::-1],
            "given": given,
        }
        return {
            name: ks for name, ks in named.items() if name != "given" or ks not in (up, up[::-1])
        }


def search(
    p: int,
    m: int,
    costs: Costs,
    memory: float | Sequence[float] | None = None,
    placements: Sequence[Placement] | None = None,
    effort: float = 1.0,
    seed: int = 0,
) -> SearchResult:
    """The fastest order of F, B, W found for the asynchronous mode.

    memory: bytes that a device may hold, one number or [p]. placements: by default looped with 1, 2
    and 3 chunks and the V, or those with the number of virtual stages that the costs name. effort:
    1 takes about ten seconds at p = 8, m = 32; 0 tries the fixed schedules and one round of list
    schedules. The result is never slower than a fixed schedule of these placements.

    Raises ValueError for bad costs and where the memory is less than any schedule needs, with
    the stage and the amount."""
    problem = PipelineProblem(p, m, costs, memory)
    if placements is None:
        placements = default_placements(problem)
    for placement in placements:
        check_caps(placement, m, costs, problem.caps)
    rivals = sorted(fixed_candidates(problem, placements), key=lambda c: c.makespan)
    bound = min(lower_bound(x, m, costs, problem.caps) for x in placements)
    found = rivals[:1]
    for candidate in _searched(problem, placements, rivals, effort, random.Random(seed)):
        found.append(candidate)
        if candidate.makespan <= bound * (1 + SLACK):
            break
    best = min(found, key=lambda c: c.makespan)
    if best.lost:
        raise AssertionError(f"no schedule fits the cap that check_caps accepts: {best.lost}")
    return SearchResult(best, rivals, bound)


def default_placements(problem: PipelineProblem) -> list[Placement]:
    p, v = problem.p, problem.chunks
    if v is None:
        return [looped(p), looped(p, 2), looped(p, 3), wave(p)]
    return [looped(p, v), wave(p, v)] if v > 1 else [looped(p)]


def fixed_schedules(problem: PipelineProblem) -> Iterator[tuple[str, int, Callable[[], Order]]]:
    """(name, v, builder) of every fixed schedule. Those built from times take the mean ones, and
    the memory of their names or, where that is less, the cap."""
    p, m = problem.p, problem.m
    table = problem.costs.on(looped(p, problem.chunks or 1), m)
    f, b, w = (float(np.sum(x)) / (p * m) for x in (table.F, table.B, table.W))
    times = heuristics.Times(f, b, w, table.send)
    held, kept = (float(np.sum(x)) / (p * m) for x in (table.activation, table.stash))
    room = max(1.0, min(problem.caps) / held) if held else inf
    share = kept / held if held else 0.5
    one, two = min(p, room), min(2 * p, room)
    yield "gpipe", 1, partial(fixed.gpipe, p, m)
    yield "1f1b", 1, partial(fixed.one_f_one_b, p, m)
    yield "zb-h1", 1, partial(fixed.zb_h1, p, m)
    yield "zb-h2", 1, partial(fixed.zb_h2, p, m)
    yield "zb-1p", 1, partial(heuristics.zb_heuristic, p, m, times, one, share)
    yield "zb-2p", 1, partial(heuristics.zb_heuristic, p, m, times, two, share)
    for v in (2, 3):
        yield f"interleaved v={v}", v, partial(fixed.interleaved, p, m, v)
        name = f"interleaved zero bubble v={v}"
        yield name, v, partial(fixed.interleaved_zero_bubble, p, m, v)
    yield "zbv", 2, partial(fixed.zbv, p, m)
    yield "zbv from times", 2, partial(heuristics.zbv_heuristic, p, m, times, one, share)
    yield "v-half", 2, partial(controllable.v_half, p, m)
    yield "v-min", 2, partial(controllable.v_min, p, m)
    yield "dualpipe-v", 2, partial(fixed.dualpipe_v, p, m)
    yield "skip wave", 2, partial(fixed.skip_wave, p, m, one)


def fixed_candidates(problem: PipelineProblem, placements: Sequence[Placement]) -> list[Candidate]:
    """Every fixed schedule of the placements on its best sequence, with the reason where it cannot
    run."""
    found = []
    for name, v, build in fixed_schedules(problem):
        if problem.chunks not in (None, v):
            continue
        try:
            order = build()
        except ValueError as error:
            found.append(Candidate(name, "given", lost=str(error)))
            continue
        if order.placement not in placements:
            continue
        tried = [
            _priced(problem, name, sequence, relabel(order, ks))
            for sequence, ks in problem.sequences().items()
        ]
        found.append(replace(min(tried, key=lambda c: c.makespan), plain=order))
    return found


def _priced(problem: PipelineProblem, name: str, sequence: str, order: Order) -> Candidate:
    result = evaluate(order, problem.costs)
    return Candidate(name, sequence, order, result, problem.fits(result))


class Point(Protocol):
    """A schedule that a few numbers describe."""

    def seconds(self) -> float: ...
    def order(self) -> Order: ...
    def changed(self, choose: random.Random) -> "Point":
        """One of its numbers changed at random."""


@dataclass(frozen=True)
class ListPoint:
    """A list schedule."""

    problem: PipelineProblem
    placement: Placement
    sequence: tuple[int, ...]
    knobs: Knobs

    @cached_property
    def _line(self) -> Line:
        table = self.problem.table(self.placement)
        return Line(self.placement, table, self.problem.caps, self.sequence)

    def seconds(self) -> float:
        return self._line.run(self.knobs)[0]

    def order(self) -> Order:
        return self._line.order(self._line.run(self.knobs)[1])

    def changed(self, choose: random.Random) -> "ListPoint":
        knobs, p = self.knobs, self.problem.p
        what = choose.random()
        if what < 0.4 and self.problem.uneven:
            return replace(self, sequence=_moved(self.sequence, choose))
        if what < 0.55:
            ahead = knobs.ahead * choose.lognormvariate(0, 0.2)
            return replace(self, knobs=replace(knobs, ahead=ahead))
        if what < 0.6:
            return replace(self, knobs=replace(knobs, rounds=p - knobs.rounds))
        if what < 0.65:
            returns = p if knobs.returns == 1 else 1
            return replace(self, knobs=replace(knobs, returns=returns))
        if what < 0.85:
            return replace(self, knobs=replace(knobs, patience=_shaken(knobs.patience, choose)))
        return replace(self, knobs=replace(knobs, hold=_shaken(knobs.hold, choose)))


@dataclass(frozen=True)
class FollowPoint:
    """The F and B of an order, with W placed by patience."""

    problem: PipelineProblem
    follower: Follower
    patience: tuple[float, ...]

    def seconds(self) -> float:
        return self.follower.run(self.patience)[0]

    def order(self) -> Order:
        return self.follower.order(self.follower.run(self.patience)[1])

    def changed(self, choose: random.Random) -> "FollowPoint":
        what = choose.random()
        if what < 0.3 and self.problem.uneven:
            moved = _moved(tuple(range(self.problem.m)), choose)
            return replace(self, follower=self.follower.relabelled(moved))
        if what < 0.6:
            return replace(self, follower=self.follower.exchanged(choose))
        return replace(self, patience=_shaken(self.patience, choose))


def _moved(sequence: tuple[int, ...], choose: random.Random) -> tuple[int, ...]:
    """Two microbatches exchanged, or one of them moved to the place of the other."""
    ks = list(sequence)
    if len(ks) > 1:
        a, b = choose.sample(range(len(ks)), 2)
        if choose.random() < 0.5:
            ks[a], ks[b] = ks[b], ks[a]
        else:
            ks.insert(b, ks.pop(a))
    return tuple(ks)


def _shaken(values: tuple[float, ...], choose: random.Random) -> tuple[float, ...]:
    """Another value for one device or for all."""
    value = choose.choice((0.0, choose.uniform(0, 1.5)))
    if choose.random() < 0.3:
        return (value,) * len(values)
    i = choose.randrange(len(values))
    return (*values[:i], value, *values[i + 1 :])


def _starts(
    problem: PipelineProblem, placements: Sequence[Placement], rivals: Sequence[Candidate]
) -> list[tuple[float, int, str, Point]]:
    """(seconds, rank, sequence, point): the best list schedule of each placement and sequence, and
    the best way to place the W of each rival."""
    p = problem.p
    points: list[tuple[str, list[Point]]] = []
    for placement, (name, ks) in itertools.product(placements, problem.sequences().items()):
        ways = ((0, 1), (0, p), (p, p)) if placement.v > 1 else ((0, 1),)
        grid = itertools.product((1.0, 1.4), (0.0, 0.5, 1.0), (0.0, 0.3), ways)
        listed: list[Point] = [
            ListPoint(problem, placement, tuple(ks), Knobs(x, (a,) * p, (h,) * p, *way))
            for x, a, h, way in grid
        ]
        points.append((name, listed))
    for rival, (name, ks) in itertools.product(rivals, problem.sequences().items()):
        if rival.plain is not None:
            follower = Follower(relabel(rival.plain, ks), problem.costs, problem.caps)
            spread = (0.0, 0.3, 0.6, 1.0)
            points.append((name, [FollowPoint(problem, follower, (a,) * p) for a in spread]))
    best = []
    for n, (name, tried) in enumerate(points):
        seconds, _, point = min((x.seconds(), k, x) for k, x in enumerate(tried))
        best.append((seconds, n, name, point))
    return sorted(best, key=lambda x: x[:2])


def _searched(
    problem: PipelineProblem,
    placements: Sequence[Placement],
    rivals: Sequence[Candidate],
    effort: float,
    choose: random.Random,
) -> Iterator[Candidate]:
    """The best starts, each climbed: a change stays where it costs nothing. Then the best of them
    and of the fixed schedules after local search."""
    climbed: list[Candidate] = []
    known: set[float] = set()
    for best, _, name, point in _starts(problem, placements, rivals):
        if best == inf or best in known or len(climbed) == CLIMBED:
            continue  # equal makespans are nearly always one schedule under two names
        known.add(best)
        for _ in range(round(CHANGES * effort * problem.ease)):
            other = point.changed(choose)
            seconds = other.seconds()
            if seconds <= best:
                best, point = seconds, other
        climbed.append(_priced(problem, "searched", name, point.order()))
        yield climbed[-1]
    runs = [c for c in (*climbed, *rivals[:2]) if c.makespan < inf]
    for n, candidate in enumerate(sorted(runs, key=lambda c: c.makespan)[:POLISHED]):
        assert candidate.order is not None
        plays = round(PLAYS * effort * problem.ease)
        order = polish(candidate.order, problem.costs, problem.caps, plays, n)
        yield _priced(problem, "searched", candidate.sequence, order)
