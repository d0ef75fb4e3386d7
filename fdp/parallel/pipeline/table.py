"""A schedule as a static table: what each device does in each tick, and in which slots its
messages, residuals and stashes lie.

A tick lasts as long as its longest operation. What a device sends in a tick is read in a later one.
Slots are intervals of ticks, coloured greedily: as few as ever live at once. S of a microbatch
takes a tick of all devices.

Legend: p devices, T ticks, u virtual stages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fdp.parallel.pipeline.check import check
from fdp.parallel.pipeline.orders import Op, Order
from fdp.parallel.pipeline.placement import Placement

BRANCHES = 7  # of a tick
IDLE, FIRST_F, F, B, FIRST_B, LAST_B, W = range(BRANCHES)
FOLDED = 13  # branches of a model in two halves: after those of the first half and LAST_B these
TURN_F, FALL_F, FALL_B, TURN_B, FALL_W, TURN_W = range(BRANCHES, FOLDED)
FIELDS = (
    "kind",
    "microbatch",
    "chunk",
    "input",
    "residual",
    "stash",
    "send",
    "plus",
    "minus",
    "own",
)
SLOTTED = {  # fields that hold a slot, and of what
    "input": "messages",
    "plus": "messages",
    "minus": "messages",
    "own": "messages",
    "residual": "residuals",
    "stash": "stashes",
    "skip": "skips",
}
EXECUTED = ("F", "B", "W", "BW", "S")
STEPPED = ("F", "B", "W", "BW", "U")
Task = tuple[str, int, int]  # kind, virtual stage, microbatch; of U its step
NEXT, PREVIOUS, OWN = 1, 2, 3  # where the result goes: the device after, before, or this one


class Slots(NamedTuple):
    """Slots that the fullest device needs."""

    messages: int
    residuals: int
    stashes: int


@dataclass(frozen=True)
class TickTable:
    """rows int16 [T, p, len(fields)]; a slot that is not used is the last one, whose content is
    never read. stages: virtual ones. heads int16 [T]: the microbatch whose S runs in a tick, −1 for
    none; None where the order has no S. halves: of a model in two halves the slots of either, whose
    sum is `slots`, and skips: of skips and their gradients."""

    rows: np.ndarray
    slots: Slots
    stages: int
    heads: np.ndarray | None = None
    halves: tuple[Slots, ...] = ()
    skips: int = 0

    @property
    def parts(self) -> tuple[Slots, ...]:
        """Slots of each half, or of the whole model."""
        return self.halves or (self.slots,)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the columns."""
        return (*FIELDS, "skip") if self.halves else FIELDS

    @property
    def branches(self) -> int:
        """Branches of a tick."""
        return FOLDED if self.halves else BRANCHES

    @property
    def ticks(self) -> int:
        """T."""
        return len(self.rows)


def table(order: Order, halves: bool = False) -> TickTable:
    """The table of an order of F, B and W, or BW for B and then W, with or without S. halves: of a
    model in two, where skips lead from virtual stage u to V − 1 − u on the same device.

    Raises ValueError as `ticks`, and for virtual stages that follow each other on devices that are
    no neighbours."""
    place, done = order.placement, ticks(order)
    shared = has_head(order)
    layout = _Layout(place, 1 + max(done.values()), shared, 1 + halves)
    branch = _branch_of_half if halves else _branch
    for (kind, u, k), t in done.items():
        i = place.devices[u]
        if kind == "S":
            layout.heads[t] = k
        else:
            layout.put(t, i, "kind", branch(kind, u, len(place.devices), shared))
            layout.put(t, i, "microbatch", k)
            layout.put(t, i, "chunk", place.chunks[u])
        if kind in ("F", "B"):
            name, until = ("residual", "B") if kind == "F" else ("stash", "W")
            layout.keep(u, name, t, done[until, u, k])
        if halves and (kind, layout.part(u)) in (("F", 0), ("B", 1)):
            layout.keep(u, "skip", t, done[kind, len(place.devices) - 1 - u, k])
        reader = _reader(kind, u, k, len(place.devices), shared)
        if reader is not None:
            layout.send(u, reader[1], t, done[reader])
    return layout.table()


def has_head(order: Order) -> bool:
    """Whether all devices share the output head, in operations S."""
    return any(op.kind == "S" for ops in order.ops for op in ops)


class _Layout:
    """Rows and slots of a table while they are filled in."""

    def __init__(self, place: Placement, ticks: int, shared: bool, parts: int) -> None:
        self.place, self.shared, self.parts = place, shared, parts
        self.heads = np.full(ticks, -1, np.int16)
        self.fields = FIELDS if parts == 1 else (*FIELDS, "skip")
        self.rows = np.zeros((ticks, place.p, len(self.fields)), np.int16)
        self.slotted = [name for name in self.fields if name in SLOTTED]
        self.rows[:, :, [self.fields.index(name) for name in self.slotted]] = -1
        kinds = [(SLOTTED[name], part) for name in self.slotted for part in range(parts)]
        self.slots = {kind: [_Colours() for _ in range(place.p)] for kind in kinds}

    def part(self, u: int) -> int:
        """Which part of the model a virtual stage belongs to."""
        return u * self.parts // len(self.place.devices)

    def put(self, tick: int, device: int, name: str, value: int) -> None:
        self.rows[tick, device, self.fields.index(name)] = value

    def keep(self, u: int, name: str, start: int, end: int) -> None:
        """What the device of virtual stage u keeps from one operation to another. Each part has
        residuals and stashes of its own."""
        i, part = self.place.devices[u], 0 if name == "skip" else self.part(u)
        slot = self.slots[SLOTTED[name], part][i].take(start, end)
        self.put(start, i, name, slot)
        self.put(end, i, name, slot)

    def send(self, u: int, reader: int, start: int, end: int) -> None:
        """The result of virtual stage u, which another one or itself reads."""
        p, i, j = self.place.p, self.place.devices[u], self.place.devices[reader]
        slot = self.slots["messages", 0][j].take(start, end)
        way = OWN if i == j else NEXT if (i + 1) % p == j else PREVIOUS
        if way == PREVIOUS and (i - 1) % p != j:
            raise ValueError(
                f"virtual stages {u} and {reader} lie on devices {i} and {j} of {p}, which are no "
                "neighbours: place them on one device or on two that follow each other"
            )
        self.put(start, i, "send", way)
        self.put(start, j, {NEXT: "plus", PREVIOUS: "minus", OWN: "own"}[way], slot)
        self.put(end, j, "input", slot)

    def table(self) -> TickTable:
        counts = {kind: max(c.count for c in colours) for kind, colours in self.slots.items()}
        part_TxP = self.rows[:, :, self.fields.index("chunk")] % self.parts
        for name in self.slotted:
            values, kind = self.rows[:, :, self.fields.index(name)], SLOTTED[name]
            own = kind in ("residuals", "stashes")
            unused = [counts[kind, n if own else 0] for n in range(self.parts)]
            values[values < 0] = np.array(unused)[part_TxP][values < 0]
        halves = tuple(
            Slots(counts["messages", 0], counts["residuals", n], counts["stashes", n])
            for n in range(self.parts)
        )
        stages, heads = len(self.place.devices), self.heads if self.shared else None
        if self.parts == 1:
            return TickTable(self.rows, halves[0], stages, heads)
        both = Slots(counts["messages", 0], *(sum(h[n] for h in halves) for n in (1, 2)))
        return TickTable(self.rows, both, stages, heads, halves, counts["skips", 0])


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


def _branch(kind: str, u: int, stages: int, shared: bool) -> int:
    """shared: S computes the loss, not the last stage's B."""
    if kind == "F":
        return F if u else FIRST_F
    if kind == "B":
        return FIRST_B if u == 0 else LAST_B if u == stages - 1 and not shared else B
    return W


def _branch_of_half(kind: str, u: int, stages: int, shared: bool) -> int:
    """As `_branch`, where the first stage of the second half has more to run than the others."""
    turn, last = u == stages // 2, u == stages - 1
    if u < stages // 2:
        return _branch(kind, u, stages, shared)
    if kind == "F":
        return TURN_F if turn else FALL_F
    if kind == "B":
        return LAST_B if last else TURN_B if turn else FALL_B
    return TURN_W if turn else FALL_W


def _reader(kind: str, u: int, k: int, stages: int, shared: bool) -> Task | None:
    """The operation that reads the result of one. The last stage keeps its own output, and the
    gradient of it that S computes."""
    if kind == "F":
        return ("F", u + 1, k) if u + 1 < stages else ("S" if shared else "B", u, k)
    if kind == "S":
        return "B", u, k
    return ("B", u - 1, k) if kind == "B" and u else None


def _inputs(kind: str, u: int, k: int, stages: int, shared: bool) -> list[Task]:
    if kind == "F":
        return [("F", u - 1, k)] if u else []
    if kind == "W":
        return [("B", u, k)]
    if u + 1 < stages:
        return [("F", u, k), ("B", u + 1, k)]
    return [("S", u, k)] if shared and kind == "B" else [("F", u, k)]


def ticks(order: Order, kinds: Sequence[str] = EXECUTED, barrier: bool = False) -> dict[Task, int]:
    """The tick of every operation, the first ones first: each device does its own in order, BW as B
    and then W, each as soon as its inputs are there. S of a microbatch is one task, of the last
    virtual stage, as soon as it is next on every device. barrier: a U waits for the last W of its
    step on every stage.

    Raises ValueError, naming the operation, for an order that does not run and for operations that
    are none of `kinds`, those that the executor has."""
    check(order)
    place = order.placement
    for i, ops in enumerate(order.ops):
        for row, op in enumerate(ops):
            if op.kind not in kinds:
                raise ValueError(
                    f"stage {i}, row {row}: {op}: this executor runs {', '.join(kinds)}; remove it"
                )
    last, shared = len(place.devices) - 1, has_head(order)
    queues = [
        [
            (kind, last if kind == "S" else own[op.chunk], op.microbatch)
            for op in ops
            for kind in op.kind
        ]
        for ops, own in zip(order.ops, place.stages, strict=True)
    ]
    done: dict[Task, int] = {}
    m = order.microbatches // order.steps

    def ready(task: Task) -> bool:
        kind, _, k = task
        if kind == "U":
            steps = range(k * m, k * m + m) if barrier else ()
            return all(("W", u, n) in done for u in range(last + 1) for n in steps)
        return all(x in done for x in _inputs(*task, last + 1, shared))

    at, t = [0] * place.p, 0
    while any(n < len(q) for n, q in zip(at, queues, strict=True)):
        heads = [q[n] if n < len(q) else None for n, q in zip(at, queues, strict=True)]
        now = {}
        for i, task in enumerate(heads):
            if task is None or (task[0] == "S" and heads.count(task) < place.p):
                continue
            if ready(task):
                now[task] = t
                at[i] += 1
        if not now:
            raise ValueError(_out_of_step(order, heads))
        done |= now
        t += 1
    return done


def _out_of_step(order: Order, heads: Sequence[Task | None]) -> str:
    """Why no device goes on: one waits for an S that another will run later, or with a barrier for
    a W behind its own U."""
    for i, task in enumerate(heads):
        if task and task[0] == "U":
            op = Op("U", task[2], order.placement.chunks[task[1]])
            return (
                f"stage {i}, row {order.ops[i].index(op)}: {op} waits for the last W of its step "
                "on all stages, one of which waits for it: move every U to the end of its step"
            )
    i, waits = next((i, x) for i, x in enumerate(heads) if x and x[0] == "S")
    j = next(j for j, x in enumerate(heads) if x != waits)
    op = Op("S", waits[2])
    rows = [order.ops[n].index(op) for n in (i, j)]
    return (
        f"stage {i}, row {rows[0]}: {op} runs on all stages in one tick, but stage {j} has it in "
        f"row {rows[1]}, behind what waits for stage {i}: give S the same sequence on every stage, "
        "as `with_head` does"
    )
