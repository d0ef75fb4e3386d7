"""Zero-bubble schedules that are built from times: the automatic one on p stages and the V.

Both play the pipeline while they build it. They take the times of one device and one microbatch,
equal everywhere, as their papers do.

Legend: p devices, m microbatches, i a device, c a chunk."""

import itertools
from collections import deque
from dataclasses import dataclass, field
from math import inf

from fdp.parallel.pipeline.orders import Op, Order, build
from fdp.parallel.pipeline.placement import looped, wave

SLACK = 1e-9  # of an activation: sums of the same parts in another order fit the same memory


@dataclass(frozen=True)
class Times:
    """Seconds of F, B, W of a whole device and of a message."""

    F: float
    B: float
    W: float
    send: float = 0.0


@dataclass
class _Builder:
    """What a device has run so far."""

    now: float = 0.0
    held: float = 0.0  # activations; B gives back 1 − stash of one, W the stash
    bubble: float = 0.0  # idle seconds since its first F
    ops: list[Op] = field(default_factory=list)
    count: dict[tuple[str, int], int] = field(default_factory=dict)
    waiting: deque[Op] = field(default_factory=deque)  # W that have not run

    def done(self, kind: str, c: int = 0) -> int:
        return self.count.get((kind, c), 0)


class _Pipeline:
    """Devices and the ends of their operations. A chunk has 1/v of a device's times and bytes."""

    def __init__(self, p: int, m: int, v: int, times: Times, memory: float, stash: float) -> None:
        if p < 1 or m < 1:
            raise ValueError(f"a pipeline needs p ≥ 1 and m ≥ 1, got p={p}, m={m}")
        if memory < 1:
            raise ValueError(
                f"memory={memory} activations: every device needs at least 1, all chunks of one "
                "microbatch"
            )
        self.p, self.m, self.v, self.memory = p, m, v, memory + SLACK
        self.send = times.send
        self.seconds = {"F": times.F / v, "B": times.B / v, "W": times.W / v}
        self.takes = {"F": 1 / v, "B": (stash - 1) / v, "W": -stash / v}
        self.devices = [_Builder() for _ in range(p)]
        self.widest = 0.0  # bubble of any device
        self.end: dict[tuple[str, int, int, int], float] = {}  # kind, device, chunk, microbatch

    def source(self, kind: str, i: int, c: int) -> int | None:
        """The device before in the way of F (of B on the same chunk); None at the chunk's start."""
        j = i - 1 if (kind == "F") == (c == 0) else i + 1
        return j if 0 <= j < self.p else None

    def arrival(self, kind: str, i: int, c: int = 0) -> float | None:
        """When the input of device i's next operation is there; None if it comes from itself or has
        not been run."""
        j = self.source(kind, i, c)
        k = self.devices[i].done(kind, c)
        ended = None if j is None else self.end.get((kind, j, c, k))
        return None if ended is None else ended + self.send

    def fits(self, i: int, kind: str) -> bool:
        return self.devices[i].held + self.takes[kind] <= self.memory

    def put(self, kind: str, i: int, c: int = 0) -> None:
        d = self.devices[i]
        begin = max(d.now, self.arrival(kind, i, c) or 0.0)
        if d.done("F"):
            d.bubble += begin - d.now
            self.widest = max(self.widest, d.bubble)
        k = d.done(kind, c)
        d.now = begin + self.seconds[kind]
        self.end[kind, i, c, k] = d.now
        d.held += self.takes[kind]
        d.ops.append(Op(kind, k, c))
        d.count[kind, c] = k + 1
        if kind == "B":
            d.waiting.append(Op("W", k, c))

    def put_w(self, i: int) -> None:
        self.put("W", i, self.devices[i].waiting.popleft().chunk)

    def make_room(self, i: int, kind: str) -> None:
        while not self.fits(i, kind):
            if not self.devices[i].waiting:
                raise _Full
            self.put_w(i)

    def fill(self, i: int, until: float | None, spare: float, last: bool) -> None:
        """W's that end before `until`; then, with `last` or where waiting would exceed the spare
        bubble, one that does not."""
        d = self.devices[i]
        if until is None:
            return
        while d.waiting and d.now + self.seconds["W"] <= until:
            self.put_w(i)
        if d.waiting and d.now < until and (last or until - d.now > spare):
            self.put_w(i)

    def span(self) -> float:
        """The longest time from the start of a device's first operation to its last end."""
        first = [self.end["F", i, 0, 0] - self.seconds["F"] for i in range(self.p)]
        return max(d.now - a for d, a in zip(self.devices, first, strict=True))

    def finish(self) -> None:
        for i, d in enumerate(self.devices):
            while d.waiting:
                self.put_w(i)


class _Full(Exception):
    """No W waits that could make room."""


def zb_heuristic(
    p: int, m: int, times: Times, memory: float | None = None, stash: float = 0.5
) -> Order:
    """The heuristic of Qi et al. 2023 (arXiv 2401.10241 §3.1): the shortest span of eight variants.

    memory: activations a device may hold, p for ZB-1p (default), 2p for ZB-2p. stash: share of an
    activation that B leaves to W. Raises ValueError where no variant fits the memory."""
    limit = p if memory is None else memory
    found: list[tuple[float, int, _Pipeline]] = []
    for flags in itertools.product((True, False), repeat=3):
        line = _Pipeline(p, m, 1, times, limit, stash)
        try:
            _line(line, *flags)
        except _Full:
            continue
        found.append((line.span(), len(found), line))
    if not found:
        raise ValueError(
            f"no variant of zb_heuristic fits memory={limit} activations, stash={stash}"
        )
    best = min(found)[2]
    return build(looped(p), lambda i: best.devices[i].ops)


def _line(line: _Pipeline, late_first_b: bool, b_first: bool, greedy: bool) -> None:
    """late_first_b: warm-up forwards may not delay the first B; b_first: a device far ahead of the
    next one waits for its B; greedy: a W fills even a wait that the widest bubble would hide."""
    p, m = line.p, line.m
    _warm_up(line, late_first_b)
    for i in reversed(range(p)):
        line.put("B", i)
    for _ in range(1, m):
        go = [_runs_f(line, i, b_first) for i in range(p)]
        for i in reversed(range(p - 1)):  # nobody runs ahead of the device behind
            go[i] = go[i] and go[i + 1]
        for i in range(p):
            if go[i]:
                line.make_room(i, "F")
                _fill(line, "F", i, greedy)
                line.put("F", i)
        for i in reversed(range(p)):
            line.make_room(i, "B")
            _fill(line, "B", i, greedy)
            if i == 0 and line.devices[0].done("F") == m:
                while line.devices[0].waiting:
                    line.put_w(0)
            line.put("B", i)
    line.finish()


def _fill(line: _Pipeline, kind: str, i: int, greedy: bool) -> None:
    line.fill(i, line.arrival(kind, i), line.widest - line.devices[i].bubble, greedy)


def _warm_up(line: _Pipeline, late_first_b: bool) -> None:
    """Forwards of every device before its first B: as many as end before that B can start and fit
    the memory, falling from device to device."""
    p, m, f = line.p, line.m, line.seconds["F"]
    for i in range(p):
        line.put("F", i)
    more = [0] * p
    b_ends = line.devices[-1].now + line.seconds["B"]
    for i in reversed(range(p - 1)):
        d, arrives = line.devices[i], b_ends + line.send
        held, now = d.held, d.now
        while 1 + more[i] < m and held + line.takes["F"] <= line.memory:
            if now + f > arrives if late_first_b else now >= arrives:
                break
            held, now, more[i] = held + line.takes["F"], now + f, more[i] + 1
        b_ends = max(now, arrives) + line.seconds["B"]
    for i in range(1, p):
        if 1 + more[i] < m:
            more[i] = max(0, min(more[i], more[i - 1] - 1))
    for i in range(p):
        for _ in range(more[i]):
            line.put("F", i)


def _runs_f(line: _Pipeline, i: int, b_first: bool) -> bool:
    """Whether device i runs an F in this round."""
    d = line.devices[i]
    if d.done("F") >= line.m:
        return False
    if not b_first or i + 1 == line.p:
        return True
    behind = line.devices[i + 1]
    if d.done("F") < behind.done("F") + 2:
        return True
    back = behind.now + line.seconds["F"] + line.seconds["B"] + line.send  # its next B arrives
    if d.now >= back:
        return False
    room, w = d.held + line.takes["F"], 0
    while room > line.memory and w < len(d.waiting):
        room, w = room + line.takes["W"], w + 1
    if d.now + line.seconds["F"] + w * line.seconds["W"] <= back:
        return True
    return back - d.now > line.widest - d.bubble


def zbv_heuristic(
    p: int, m: int, times: Times, memory: float | None = None, stash: float = 0.5
) -> Order:
    """ZB-V from times (Qi et al. 2023, arXiv 2401.10241 §6, and the schedule search published with
    it): the smallest bubble of four variants, each tried again with the bubbles it has found.

    memory: activations a device may hold, p by default. Raises ValueError where none fits it."""
    limit = p if memory is None else memory
    found: list[tuple[float, int, _Pipeline]] = []
    for fill_b, fill_f in itertools.product((True, False), repeat=2):
        best, spare = None, [0.0] * p
        while True:
            v = _Pipeline(p, m, 2, times, limit, stash)
            try:
                _valley(v, fill_f, fill_b, spare)
            except _Full:
                break
            if best is not None and v.widest >= best.widest:
                break
            best, spare = v, [d.bubble for d in v.devices]
        if best is not None:
            found.append((best.widest, len(found), best))
    if not found:
        raise ValueError(
            f"no variant of zbv_heuristic fits memory={limit} activations, stash={stash}"
        )
    chosen = min(found)[2]
    return build(wave(p), lambda i: chosen.devices[i].ops)


def _valley(v: _Pipeline, fill_f: bool, fill_b: bool, spare: list[float]) -> None:
    """One V. spare: bubbles of a run before; up to the widest of them a device may wait without
    loss."""

    def room(i: int) -> float:
        return max(v.widest, max(spare) - spare[i]) - v.devices[i].bubble

    _descend(v)
    for _ in range(2 * v.m):
        for i in range(v.p):
            v.make_room(i, "B")
        for i, c in _backwards(v):
            arrives = v.arrival("B", i, c)
            v.fill(i, arrives, room(i) if fill_b or not c else inf, False)
            v.put("B", i, c)
        for i in range(v.p):
            chunk = _next_f(v, i)
            if chunk is None:
                continue
            v.make_room(i, "F")
            arrives = v.arrival("F", i, chunk)
            v.fill(i, arrives, room(i) if fill_f else inf, False)
            v.put("F", i, chunk)
    v.finish()


def _descend(v: _Pipeline) -> None:
    """The forwards before the first B: the first microbatch goes down the V and up again; while it
    is away a device takes in others."""
    p, m, f = v.p, v.m, v.seconds["F"]
    for i in range(p):
        v.put("F", i)
    for i in reversed(range(p)):
        back = v.arrival("F", i, 1)
        if back is not None:
            d = v.devices[i]
            while (
                d.held + v.takes["F"] * (2 + 2 * i) <= v.memory
                and d.now + f <= back
                and d.done("F") < m
            ):
                for j in range(i + 1):
                    v.put("F", j)
        v.put("F", i, 1)
    c = 0
    for i in range(1, p):
        ahead, d = v.devices[i - 1], v.devices[i]
        while d.done("F", 0) + d.done("F", 1) < ahead.done("F", 0) + ahead.done("F", 1) or (
            d.done("F", 1) <= ahead.done("F", 1) < m
        ):
            for j in reversed(range(i, p)):
                if v.devices[j].done("F", c) < m:
                    v.put("F", j, c)
            c = 1 - c


def _backwards(v: _Pipeline) -> list[tuple[int, int]]:
    """(device, chunk) of one B each: those of chunk 0, which come up the V, from the last device,
    then those of chunk 1."""
    up: list[int] = []
    down: list[int] = []
    for i, d in enumerate(v.devices):
        ready = i + 1 == v.p or v.arrival("B", i, 0) is not None or d.done("B", 1) >= v.m
        (up if d.done("B", 0) < d.done("B", 1) and ready else down).append(i)
    return [(i, 0) for i in reversed(up)] + [(i, 1) for i in down]


def _next_f(v: _Pipeline, i: int) -> int | None:
    """The chunk whose F device i runs next; None for none."""
    d = v.devices[i]
    if d.done("F", 1) >= v.m:
        return None
    if d.done("F", 1) >= d.done("F", 0):
        return 0
    if i + 1 == v.p or v.arrival("F", i, 1) is not None:
        return 1
    ready = i == 0 or v.arrival("F", i, 0) is not None
    return 0 if d.done("F", 0) < v.m and ready else None
