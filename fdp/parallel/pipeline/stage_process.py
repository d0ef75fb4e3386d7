"""One process for every stage of a pipeline: what a schedule takes where no stage waits for a tick.

Each process plays its stage's operations in order and sends what they give to the neighbour, tagged
by operation. A thread of each receives, so two stages that send more than a pipe holds to each
other do not block. The parent watches: a stage that dies, fails or hangs ends the run, named.

No jax here: what the operations compute is the caller's.

Legend: p stages, u a virtual stage, k a microbatch."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from threading import Condition, Thread
from typing import Any, NamedTuple

from fdp.parallel.pipeline.check import check
from fdp.parallel.pipeline.orders import Order

Operation = Callable[[int, int, Any], Any]
# (stage, order) → operations by kind; picklable. An operation takes (u, k, message) and returns the
# message of its reader. Message None: the data, or the own output of the last virtual stage; where
# a stage plays alone, an example. "result", where given, is called after a run, for what to return.
Make = Callable[[int, Order], Mapping[str, Any]]

IDLE, WAITS, RUNS, SENDS = range(4)
SAYS = ("is idle before", "waits for the input of", "runs", "sends the result of")


class StageError(RuntimeError):
    """A stage died, failed or hung."""


class Ran(NamedTuple):
    """One operation. begin, end: seconds from the start of the run."""

    stage: int
    kind: str
    virtual: int
    microbatch: int
    begin: float
    end: float


class StageRun(NamedTuple):
    """results: of each stage, None where it has none."""

    ran: list[Ran]
    results: list[Any]

    @property
    def makespan(self) -> float:
        """Last end − first begin."""
        return max(r.end for r in self.ran) - min(r.begin for r in self.ran)


@dataclass(frozen=True)
class Sleeping:
    """Emulated operations: they sleep. seconds: by kind. size: bytes of a message. They show that
    the runtime keeps to an order, and nothing about computing."""

    seconds: Mapping[str, float]
    size: int = 0

    def __call__(self, stage: int, order: Order) -> dict[str, Operation]:
        """As `Make`."""

        def operation(seconds: float) -> Operation:
            def sleep(u: int, k: int, message: Any) -> bytes:
                time.sleep(seconds)
                return bytes(self.size)

            return sleep

        return {kind: operation(seconds) for kind, seconds in self.seconds.items()}


# A stage
# -------------------------------------------------------------------------------------------------


class _Mail:
    """Messages by tag, received by a thread of its own."""

    def __init__(self, incoming: Sequence[Connection]):
        self._box: dict[Any, Any] = {}
        self._came = Condition()
        self._parent = os.getppid()
        Thread(target=self._receive, args=(list(incoming),), daemon=True).start()

    def _receive(self, left: list[Any]) -> None:
        while left:
            ready: list[Any] = wait(left)
            for source in ready:
                try:
                    self.put(*source.recv())
                except (EOFError, OSError):
                    left.remove(source)

    def put(self, tag: Any, message: Any) -> None:
        with self._came:
            self._box[tag] = message
            self._came.notify()

    def take(self, tag: Any) -> Any:
        """Waits as long as the parent lives: it knows when to give up."""
        with self._came:
            while tag not in self._box:
                self._came.wait(1.0)
                if os.getppid() != self._parent:
                    raise SystemExit(1)
            return self._box.pop(tag)


class _Stage:
    """What the process of a stage does."""

    def __init__(self, stage: int, make: Make, orders: Mapping[str, Order], links: Any, now: Any):
        self.stage, self.make, self.orders, self.now = stage, make, orders, now
        incoming, self.outgoing = links
        self.mail = _Mail(incoming)
        self.made: dict[str, Mapping[str, Any]] = {}

    def prepare(self, name: str) -> None:
        """Make the operations of an order, once."""
        if name in self.made:
            return
        order = self.orders[name]
        self.note(-1, RUNS)
        ops = self.made[name] = self.make(self.stage, order)
        missing = {op.kind for op in order.ops[self.stage]} - ops.keys() - {"BW"}
        if missing:
            raise ValueError(
                f"no operation for {', '.join(sorted(missing))}: {name} needs it, given are "
                f"{', '.join(sorted(ops))}"
            )

    def play(self, name: str, run: int, start: float, alone: bool) -> tuple[list[Ran], Any]:
        """All operations of this stage. alone: without messages."""
        ops, order = self.made[name], self.orders[name]
        place, found = order.placement, []
        last = len(place.devices) - 1
        time.sleep(max(0.0, start - time.monotonic()))
        for row, kind, u, k in _rows(order, self.stage, ops):
            reads = {"F": u - 1, "B": u + 1, "BW": u + 1}.get(kind, -1)
            letter = kind[:1]
            message = None
            if not alone and 0 <= reads <= last:
                self.note(row, WAITS)
                message = self.mail.take((run, letter, reads, k))
            self.note(row, RUNS)
            begin = time.monotonic()
            out = ops[kind](u, k, message)
            found.append(Ran(self.stage, kind, u, k, begin - start, time.monotonic() - start))
            to = {"F": u + 1, "B": u - 1, "BW": u - 1}.get(kind, -1)
            if not alone and 0 <= to <= last:
                self.note(row, SENDS)
                self.send(place.devices[to], (run, letter, u, k), out)
        self.note(0, IDLE)
        return found, ops.get("result", _nothing)()

    def send(self, to: int, tag: Any, message: Any) -> None:
        if to == self.stage:
            self.mail.put(tag, message)
        else:
            self.outgoing[to].send((tag, message))

    def bounce(self, run: int, to: int, first: bool, message: Any, times: int) -> float:
        """Seconds of one message of a round trip."""
        begin = time.monotonic()
        for n in range(times):
            if first:
                self.send(to, (run, n, self.stage), message)
            message = self.mail.take((run, n, to))
            if not first:
                self.send(to, (run, n, self.stage), message)
        return (time.monotonic() - begin) / (2 * times)

    def note(self, row: int, state: int) -> None:
        """Tell the parent what this stage is at."""
        at = 3 * self.stage
        self.now[at : at + 3] = [row, state, time.monotonic()]


def _rows(order: Order, stage: int, ops: Mapping[str, Any]) -> Iterator[tuple[int, str, int, int]]:
    """(row, kind, virtual stage, microbatch); BW as B and then W where there is none of its own."""
    for row, op in enumerate(order.ops[stage]):
        for kind in (op.kind,) if op.kind in ops else op.kind:
            yield row, kind, order.placement.stages[stage][op.chunk], op.microbatch


def _nothing() -> None:
    return None


def _serve(control: Connection, core: int | None, stage: int, *rest: Any) -> None:
    """The process of a stage: one command after the other until it is told to stop."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    me = _Stage(stage, *rest)
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            command, *given = control.recv()
            if command == "stop":
                return
            try:
                control.send((True, getattr(me, command)(*given)))
            except Exception as error:
                control.send((False, f"{type(error).__name__}: {error}"))
                return


# The parent
# -------------------------------------------------------------------------------------------------


class StageProcesses:
    """The processes of the stages of some orders, all of p stages; a context manager.

    timeout: seconds that an operation may take, and that all stages may wait. start: seconds that a
    process may take until its operations are made. environment: variables of the processes. pin:
    each process keeps to one core, where the system has such a call.

    Raises ValueError for an order that does not run, and StageError, after which all processes are
    ended, for a stage that dies, fails or hangs."""

    def __init__(
        self,
        orders: Mapping[str, Order],
        make: Make,
        timeout: float = 60.0,
        start: float = 300.0,
        environment: Mapping[str, str] | None = None,
        pin: bool = False,
    ):
        self.orders, self.timeout, self.start = dict(orders), timeout, start
        self.p = _stages(self.orders)
        self._number = 0
        context = get_context("spawn")
        self._now = context.RawArray("d", 3 * self.p)
        pairs = {link for order in orders.values() for link in _links(order)}
        if self.p > 1:
            pairs |= {(0, 1), (1, 0)}
        pipes = {pair: context.Pipe(duplex=False) for pair in sorted(pairs)}
        self._controls, self._processes = [], []
        cores = sorted(os.sched_getaffinity(0)) if pin and hasattr(os, "sched_setaffinity") else []
        try:
            with _environment(environment or {}):
                for i in range(self.p):
                    here, there = context.Pipe()
                    links = (
                        [pipes[pair][0] for pair in pipes if pair[1] == i],
                        {pair[1]: pipes[pair][1] for pair in pipes if pair[0] == i},
                    )
                    core = cores[i % len(cores)] if cores else None
                    given = (there, core, i, make, self.orders, links, self._now)
                    process = context.Process(target=_serve, args=given, daemon=True)
                    self._controls.append(here)
                    self._processes.append(process)
                    process.start()
                    there.close()
        except BaseException:
            self.close()
            raise
        finally:
            for ends in pipes.values():
                for end in ends:
                    end.close()

    def __enter__(self) -> "StageProcesses":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def prepare(self, name: str) -> None:
        """Make the operations of an order in all processes. `run` and `alone` do so where it was
        not done."""
        self._all(name, "prepare", [(name,)] * self.p, self.start)

    def run(self, name: str) -> StageRun:
        """All stages play an order together."""
        self.prepare(name)
        start = self._next()
        given = (name, self._number, start, False)
        found = self._all(name, "play", [given] * self.p, self.timeout)
        return StageRun([r for ran, _ in found for r in ran], [result for _, result in found])

    def alone(self, name: str, stage: int) -> StageRun:
        """One stage plays its operations while the others idle, without messages."""
        self.prepare(name)
        given: list[Any] = [None] * self.p
        given[stage] = (name, self._number, self._next(), True)
        found = self._all(name, "play", given, self.timeout)[stage]
        return StageRun(found[0], [found[1]])

    def message_seconds(self, message: Any, times: int = 20) -> float:
        """Seconds of a message between stages 0 and 1, the mean of round trips."""
        self._next()
        given: list[Any] = [None] * self.p
        given[0] = (self._number, 1, True, message, times)
        given[1] = (self._number, 0, False, message, times)
        return self._all(next(iter(self.orders)), "bounce", given, self.timeout)[0]

    def close(self) -> None:
        """End all processes."""
        for control in self._controls:
            with suppress(OSError):
                control.send(("stop",))
        for end in ("join", "terminate", "kill"):
            for process in self._processes:
                if process.pid is not None and process.is_alive():
                    getattr(process, end)(*((1.0,) if end == "join" else ()))
                    process.join(1.0)
        for control in self._controls:
            control.close()
        self._controls, self._processes = [], []

    def _next(self) -> float:
        """A new number for the tags, and the time at which its run begins."""
        self._number += 1
        return time.monotonic() + 0.02

    def _all(self, name: str, command: str, given: Sequence[Any], limit: float) -> list[Any]:
        """One command of some stages; their answers."""
        if not self._processes:
            raise StageError("the processes have ended: make new ones")
        now = time.monotonic()
        asked = [i for i, args in enumerate(given) if args is not None]
        for i in asked:
            self._now[3 * i : 3 * i + 3] = [-1, RUNS if command == "prepare" else IDLE, now]
        try:
            for i in asked:
                with suppress(OSError):  # a dead one is found below
                    self._controls[i].send((command, *given[i]))
            return self._answers(name, asked, limit)
        except BaseException:
            for process in self._processes:
                process.terminate()
            self.close()
            raise

    def _answers(self, name: str, asked: list[int], limit: float) -> list[Any]:
        answers: list[Any] = [None] * self.p
        left = dict.fromkeys(asked)
        while left:
            wait([self._controls[i] for i in left], min(0.2, limit / 4))
            for i in [i for i in left if self._controls[i].poll()]:
                try:
                    good, answers[i] = self._controls[i].recv()
                except (EOFError, OSError):
                    self._processes[i].join(1.0)
                    code = self._processes[i].exitcode
                    raise StageError(f"{self._at(name, i)}: died, exit code {code}") from None
                if not good:
                    raise StageError(f"{self._at(name, i)}: {answers[i]}")
                del left[i]
            self._overdue(name, list(left), limit)
        return answers

    def _overdue(self, name: str, left: list[int], limit: float) -> None:
        """Raises StageError for an operation that takes too long, or where none goes on."""
        age = {i: time.monotonic() - self._now[3 * i + 2] for i in left}
        state = {i: int(self._now[3 * i + 1]) for i in left}
        hung = [i for i in left if age[i] > limit and state[i] == RUNS]
        if left and min(age.values()) > limit:
            hung = hung or sorted(left, key=lambda i: -state[i])
        if hung:
            raise StageError(
                f"{self._at(name, hung[0])}: for {age[hung[0]]:.1f} s > timeout = {limit:g} s; it "
                "hangs, or needs a longer timeout"
            )

    def _at(self, name: str, i: int) -> str:
        """Where stage i is."""
        row, state = int(self._now[3 * i]), int(self._now[3 * i + 1])
        ops = self.orders[name].ops[i]
        if row < 0 or not ops:
            return f"stage {i} of {name} starts"
        return f"stage {i} of {name} {SAYS[state]} {ops[row]} (row {row})"


def _stages(orders: Mapping[str, Order]) -> int:
    counts = {name: order.placement.p for name, order in orders.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"orders of {counts} stages: processes need at least one order, of equal p"
        )
    for order in orders.values():
        check(order)
    return next(iter(counts.values()))


def _links(order: Order) -> set[tuple[int, int]]:
    """(sender, receiver) of all messages."""
    devices = order.placement.devices
    steps = set(pairwise(devices))
    return {pair for a, b in steps if a != b for pair in ((a, b), (b, a))}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that processes started here inherit."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
