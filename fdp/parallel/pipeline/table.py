"""A schedule as a static table: what each device does in each tick, and in which slots its
messages, residuals and stashes lie.

A tick lasts as long as its longest operation. What a device sends in a tick is read in a later one.
Slots are intervals of ticks, coloured greedily: as few as ever live at once.

Legend: p devices, T ticks, u virtual stages."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fdp.parallel.pipeline.orders import Order

BRANCHES = 7  # of a tick
IDLE, FIRST_F, F, B, FIRST_B, LAST_B, W = range(BRANCHES)
FIELDS = (
    "kind",
    "microbatch",
    "chunk",
    "stage",
    "input",
    "residual",
    "stash",
    "send",
    "plus",
    "minus",
    "own",
)
NEXT, PREVIOUS, OWN = 1, 2, 3  # where the result goes: the device after, before, or this one


class Slots(NamedTuple):
    """Slots that the fullest device needs."""

    messages: int
    residuals: int
    stashes: int


@dataclass(frozen=True)
class Table:
    """rows int16 [T, p, len(FIELDS)]; a slot that is not used is the last one, whose content is
    never read. stage: virtual stage of the operation."""

    rows: np.ndarray
    slots: Slots
    stages: int

    @property
    def ticks(self) -> int:
        """T."""
        return len(self.rows)


def table(order: Order) -> Table:
    """The table of an order of F, B and W, or BW for B and then W.

    Raises ValueError, naming the operation, for an order that waits for ever, and for virtual
    stages that follow each other on devices that are no neighbours."""
    place = order.placement
    p, stages = place.p, len(place.devices)
    stage = {(i, c): u for i, own in enumerate(place.stages) for c, u in enumerate(own)}
    queues = [[(k, op.microbatch, op.chunk) for op in ops for k in op.kind] for ops in order.ops]
    done = _ticks(queues, stage, stages)
    total = 1 + max(done.values())
    rows = np.zeros((total, p, len(FIELDS)), np.int16)
    box, kept, stashed = ([_Colours() for _ in range(p)] for _ in range(3))
    column = {name: i for i, name in enumerate(FIELDS)}
    unused: dict[str, list[_Colours]] = {
        "input": box,
        "plus": box,
        "minus": box,
        "own": box,
        "residual": kept,
        "stash": stashed,
    }
    for name in unused:
        rows[:, :, column[name]] = -1

    def put(tick: int, device: int, name: str, value: int) -> None:
        rows[tick, device, column[name]] = value

    for (kind, u, k), t in sorted(done.items(), key=lambda item: item[1]):
        i, chunk = place.devices[u], place.chunks[u]
        for name, value in (
            ("kind", _branch(kind, u, stages)),
            ("microbatch", k),
            ("chunk", chunk),
            ("stage", u),
        ):
            put(t, i, name, value)
        if kind == "F":
            slot = kept[i].take(t, done["B", u, k])
            put(t, i, "residual", slot)
            put(done["B", u, k], i, "residual", slot)
        if kind == "B":
            slot = stashed[i].take(t, done["W", u, k])
            put(t, i, "stash", slot)
            put(done["W", u, k], i, "stash", slot)
        reader = _reader(kind, u, k, stages)
        if reader is None:
            continue
        j, until = place.devices[reader[1]], done[reader]
        slot = box[j].take(t, until)
        put(until, j, "input", slot)
        way = OWN if i == j else NEXT if (i + 1) % p == j else PREVIOUS
        if way == PREVIOUS and (i - 1) % p != j:
            raise ValueError(
                f"virtual stages {u} and {reader[1]} lie on devices {i} and {j} of {p}, which are "
                "no neighbours: place them on one device or on two that follow each other"
            )
        put(t, i, "send", way)
        put(t, j, {NEXT: "plus", PREVIOUS: "minus", OWN: "own"}[way], slot)
    slots = Slots(*(max(c.count for c in colours) for colours in (box, kept, stashed)))
    for name, size in zip(
        ("input", "plus", "minus", "own", "residual", "stash"),
        (*[slots.messages] * 4, slots.residuals, slots.stashes),
        strict=True,
    ):
        values = rows[:, :, column[name]]
        values[values < 0] = size
    return Table(rows, slots, stages)


@dataclass
class _Colours:
    """Slots of one device, taken for intervals of ticks in order of their starts."""

    free_at: list[int] = field(default_factory=list)

    def take(self, start: int, end: int) -> int:
        """A slot that is written at the end of tick `start` and last read in tick `end`."""
        for slot, free in enumerate(self.free_at):
            if free <= start:
                self.free_at[slot] = end
                return slot
        self.free_at.append(end)
        return len(self.free_at) - 1

    @property
    def count(self) -> int:
        return len(self.free_at)


def _branch(kind: str, u: int, stages: int) -> int:
    if kind == "F":
        return F if u else FIRST_F
    if kind == "B":
        return FIRST_B if u == 0 else LAST_B if u == stages - 1 else B
    return W


def _reader(kind: str, u: int, k: int, stages: int) -> tuple[str, int, int] | None:
    """The operation that reads the result of one. The last stage keeps its own output."""
    if kind == "F":
        return ("F", u + 1, k) if u + 1 < stages else ("B", u, k)
    return ("B", u - 1, k) if kind == "B" and u else None


def _inputs(kind: str, u: int, k: int, stages: int) -> list[tuple[str, int, int]]:
    if kind == "F":
        return [("F", u - 1, k)] if u else []
    if kind == "W":
        return [("B", u, k)]
    return [("F", u, k), *([("B", u + 1, k)] if u + 1 < stages else [])]


def _ticks(
    queues: list[list[tuple[str, int, int]]], stage: dict[tuple[int, int], int], stages: int
) -> dict[tuple[str, int, int], int]:
    """(kind, virtual stage, microbatch) → tick, each device doing its operations in order."""
    done: dict[tuple[str, int, int], int] = {}
    at, t = [0] * len(queues), 0
    while any(n < len(q) for n, q in zip(at, queues, strict=True)):
        now = {}
        for i, queue in enumerate(queues):
            if at[i] == len(queue):
                continue
            kind, k, chunk = queue[at[i]]
            task = kind, stage[i, chunk], k
            if all(x in done for x in _inputs(*task, stages)):
                now[task] = t
                at[i] += 1
        if not now:
            waiting = [
                (i, q[n]) for i, (n, q) in enumerate(zip(at, queues, strict=True)) if n < len(q)
            ]
            i, (kind, k, chunk) = waiting[0]
            raise ValueError(
                f"the order waits for ever: device {i}, operation {at[i]}: {kind} of microbatch "
                f"{k}, chunk {chunk}"
            )
        done |= now
        t += 1
    return done
