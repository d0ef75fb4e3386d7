"""What an order costs: time in three modes, idle time by cause, memory, messages.

Legend: p devices, V virtual stages, m microbatches, R rounds, N operations of one device."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.orders import Order
from fdp.parallel.pipeline.program import Program, compiled, refused
from fdp.price.simulate import MODES

CAUSES = ("start", "input", "memory", "send", "neighbour", "drain")


@dataclass(frozen=True)
class Evaluation:
    """Seconds and bytes of an order. Lists are per device."""

    order: Order
    program: Program
    send: float
    start: list[list[float]]
    busy: list[float]
    peak_bytes: list[float]
    sent_bytes: list[float]
    makespan: float

    @cached_property
    def spans(self) -> list[float]:
        """Last end − first start of each device."""
        return [
            s[-1] + ops[-1][0] - s[0] if ops else 0.0
            for s, ops in zip(self.start, self.program.ops, strict=True)
        ]

    @property
    def span(self) -> float:
        """The longest span of a device: the bubble rates of the zero-bubble papers are (span −
        busy) / span."""
        return max(self.spans)

    @property
    def bubble(self) -> float:
        """Share of the makespan that the mean device idles: what a step with a barrier pays."""
        return 1 - float(np.mean(self.busy)) / self.makespan if self.makespan else 0.0

    @property
    def span_bubble(self) -> float:
        """Share of the longest span, as the zero-bubble papers state it."""
        return 1 - float(np.mean(self.busy)) / self.span if self.span else 0.0

    @cached_property
    def idle(self) -> dict[str, list[float]]:
        """Idle seconds by cause, which add up to makespan − busy.

        start: before a device's first operation; input: what it needs is not computed yet; memory:
        the same, while the device's next F could run but for its peak, which it would raise; send:
        what it needs is on the way; neighbour: a synchronous mode waits for others; drain: after
        its last operation."""
        found = {cause: [0.0] * len(self.start) for cause in CAUSES}
        arrival, produced = _messages(self.program, self.start, self.send)
        for i in range(len(self.start)):
            for cause, seconds in self._gaps(i, arrival[i], produced[i]):
                found[cause][i] += seconds
        return found

    def _gaps(self, i: int, arrival: list[float], produced: list[float]) -> list[tuple[str, float]]:
        ops, start = self.program.ops[i], self.start[i]
        if not ops:
            return [("drain", self.makespan)]
        found = [("start", start[0])]
        held, before = ops[0][4], start[0] + ops[0][0]
        for n in range(1, len(ops)):
            held -= ops[n - 1][5]
            if start[n] > before:
                computed = min(max(before, produced[n]), start[n])
                here = min(max(computed, arrival[n]), start[n])
                full = max(before, min(self._could_run(i, n, held, arrival), computed))
                found += [
                    ("input", full - before),
                    ("memory", computed - full),
                    ("send", here - computed),
                    ("neighbour", start[n] - here),
                ]
            held += ops[n][4]
            before = start[n] + ops[n][0]
        return [*found, ("drain", self.makespan - before)]

    def _could_run(self, i: int, n: int, held: float, arrival: list[float]) -> float:
        """When the next F of device i from position n on had its input, where running it at once
        would raise the peak; infinite otherwise."""
        for later in range(n, len(arrival)):
            if self.order.ops[i][later].kind == "F":
                full = held + self.program.ops[i][later][4] > self.peak_bytes[i]
                return arrival[later] if full else np.inf
        return np.inf


def evaluate(order: Order, costs: Costs, mode: str = "asynchronous") -> Evaluation:
    """Plays an order: a device starts its next operation once its input has arrived.

    costs: of the microbatches of one step. mode: "asynchronous"; "neighbour" or "lock-step", where
    operations run in rounds as in one SPMD program, as `fdp.price.simulate.simulate` defines them.
    The makespans are ordered as the modes. Tests hold the result equal to that of `simulate`, which
    is slower.

    Raises ValueError for an unknown mode, for bad costs (see `Costs`) and, from `check`, for an
    order that does not run."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
    table = costs.on(order.placement, order.microbatches, order.steps)
    program = compiled(order, table)
    start = play(program, table.send)
    if start is None:
        raise refused(order)
    if mode != "asynchronous":
        start = _rounds(program, table.send, mode)
    ends = [s[-1] + ops[-1][0] for s, ops in zip(start, program.ops, strict=True) if ops]
    return Evaluation(
        order=order,
        program=program,
        send=table.send,
        start=start,
        busy=[sum([op[0] for op in ops]) for ops in program.ops],
        peak_bytes=[peak(ops) for ops in program.ops],
        sent_bytes=[table.message * _sends(program, ops) for ops in program.ops],
        makespan=max(ends, default=0.0),
    )


def play(program: Program, send: float) -> list[list[float]] | None:
    """Start of every operation, [p][N], in mode "asynchronous"; None where the order deadlocks."""
    return _play(program, [[op[0] for op in ops] for ops in program.ops], send)


class _Board:
    """Slots, links and who waits for what, while an order is played."""

    def __init__(self, program: Program, send: float) -> None:
        self.arrived, self.left = [-1.0] * program.plain, [0.0] * program.plain
        self.waiter = [-1] * program.plain
        self.free = [0.0] * len(program.links)
        self.program, self.send = program, send
        self.joined: dict[int, list[tuple[float, float]]] = {}

    def fill(self, gives: int, link: int, now: float) -> list[int]:
        """What ended at `now` fills its slots. The devices that it wakes."""
        if gives < 0:
            return []
        if gives < self.program.plain:
            return self._put(gives, self._sent(link, now), now)
        if gives in self.program.fans:
            ways = self.program.fans[gives]
            return [i for slot, way in ways for i in self._put(slot, self._sent(way, now), now)]
        slot, count = self.program.joins[gives]
        came = self.joined.setdefault(gives, [])
        came.append((self._sent(link, now), now))
        return self._put(slot, *map(max, zip(*came, strict=True))) if len(came) == count else []

    def _sent(self, link: int, now: float) -> float:
        if link < 0:
            return now
        self.free[link] = max(now, self.free[link]) + self.send
        return self.free[link]

    def _put(self, slot: int, came: float, left: float) -> list[int]:
        self.arrived[slot], self.left[slot] = came, left
        return [self.waiter[slot]] if self.waiter[slot] >= 0 else []


def _play(program: Program, seconds: list[list], send: float) -> list[list[float]] | None:
    board = _Board(program, send)
    arrived, waiter, free, plain = board.arrived, board.waiter, board.free, program.plain
    start: list[list[float]] = [[] for _ in program.ops]
    clock = [0.0] * len(start)
    todo = list(range(len(start)))
    while todo:
        i = todo.pop()
        now, starts, times, n = clock[i], start[i], seconds[i], len(start[i])
        for _, waits, gives, link, _, _ in program.ops[i][n:]:
            if waits >= 0:
                came = arrived[waits]
                if came < 0:
                    waiter[waits] = i
                    break
                if came > now:
                    now = came
            starts.append(now)
            now += times[n]
            n += 1
            if gives >= plain:
                todo += board.fill(gives, link, now)
            elif gives >= 0:
                if link < 0:
                    arrived[gives] = now
                else:
                    came = free[link]
                    arrived[gives] = free[link] = (now if now > came else came) + send
                if waiter[gives] >= 0:
                    todo.append(waiter[gives])
        clock[i] = now
    done = all(len(a) == len(ops) for a, ops in zip(start, program.ops, strict=True))
    return start if done else None


def _rounds(program: Program, send: float, mode: str) -> list[list[float]]:
    """Start of every operation in a synchronous mode. Its round is its start where every operation
    takes 1 and a message nothing."""
    turns = _play(program, [[1] * len(ops) for ops in program.ops], 0.0)
    assert turns is not None  # the caller has played the order
    round_ = [[int(r) for r in x] for x in turns]
    count = 1 + max((r[-1] for r in round_ if r), default=-1)
    seconds_Rxp = np.zeros((count, len(round_)))
    sends_RxL = np.zeros((count, len(program.links)), bool)
    for i, (ops, rounds) in enumerate(zip(program.ops, round_, strict=True)):
        seconds_Rxp[rounds, i] = [op[0] for op in ops]
        used = [(r, op[3]) for op, r in zip(ops, rounds, strict=True) if op[3] >= 0]
        for op, r in zip(ops, rounds, strict=True) if program.fans else ():
            used += [(r, link) for _, link in program.fans.get(op[2], ()) if link >= 0]
        if used and send > 0:
            sends_RxL[tuple(zip(*used, strict=True))] = True
    gate_Rxp = _gates(program, seconds_Rxp, sends_RxL, send, mode)
    return [gate_Rxp[rounds, i].tolist() for i, rounds in enumerate(round_)]


def _gates(
    program: Program, seconds_Rxp: np.ndarray, sends_RxL: np.ndarray, send: float, mode: str
) -> np.ndarray:
    """[R, p]: when each device may start each round."""
    p, links = seconds_Rxp.shape[1], len(program.links)
    from_L = [a for a, _ in program.links]
    waits = np.eye(p, p + links, dtype=bool)  # whose last end a device waits for
    for link, (a, b) in enumerate(program.links):
        waits[[a, b], [b, a]] = waits[[a, b], p + link] = True
    if mode == "lock-step":
        waits[:] = True
    reach = [np.flatnonzero(row) for row in waits]
    reach_px = np.array([np.resize(x, max(map(len, reach))) for x in reach])
    gate_p, free_L = np.zeros(p), np.zeros(links)
    gates = []
    for seconds_p, sends_L in zip(seconds_Rxp, sends_RxL, strict=True):
        gates.append(gate_p)
        done_p = gate_p + seconds_p
        free_L = np.where(sends_L, np.maximum(free_L, done_p[from_L]) + send, free_L)
        gate_p = np.concatenate([done_p, free_L])[reach_px].max(1)
    return np.array(gates)


def _messages(
    program: Program, start: list[list[float]], send: float
) -> tuple[list[list[float]], list[list[float]]]:
    """(arrival, produced) of what every operation waits for, from the starts of all."""
    board = _Board(program, send)
    for starts, ops in zip(start, program.ops, strict=True):
        for begun, (seconds, _, gives, link, _, _) in zip(starts, ops, strict=True):
            board.fill(gives, link, begun + seconds)
    waits = [[op[1] for op in ops] for ops in program.ops]
    arrival, produced = (
        [[x[n] if n >= 0 else 0.0 for n in slots] for slots in waits]
        for x in (board.arrived, board.left)
    )
    return arrival, produced


def peak(ops: list[tuple]) -> float:
    """A device's memory follows its own order alone."""
    held = most = 0.0
    for _, _, _, _, takes, leaves in ops:
        held += takes
        if held > most:
            most = held
        held -= leaves
    return most


def _sends(program: Program, ops: list[tuple]) -> int:
    """Messages that a device sends."""
    sent = sum([op[3] >= 0 for op in ops])
    for op in ops if program.fans else ():
        sent += sum(link >= 0 for _, link in program.fans.get(op[2], ()))
    return sent
