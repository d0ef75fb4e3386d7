"""An order with its costs, ready to be played: operations that wait for slots and fill slots.

Slot u·m + k is the input of F(u, k), slot (V + u)·m + k the gradient that B(u, k) waits for.

Legend: p devices, V virtual stages, u one of them, m microbatches, k one of them."""

from dataclasses import dataclass
from typing import NamedTuple

from fdp.parallel.pipeline.check import check
from fdp.parallel.pipeline.costs import CostTable
from fdp.parallel.pipeline.orders import Order


class Timed(NamedTuple):
    """One operation of a device. Programs hold plain tuples of these fields: making objects would
    be half of the work."""

    seconds: float
    waits: int  # slot whose arrival it needs, negative for none
    gives: int  # slot that it fills, or a key of `fans` or `joins`; negative for none
    link: int  # that carries what it gives, −1 for none
    takes: float  # bytes held more from its start
    leaves: float  # bytes held less from its end


NONE = -(1 << 40)  # a slot base so far below 0 that no microbatch makes it a slot
START, KEPT, DONE = 1, 2, 4  # states of a (u, k): F has run; so has B; so has W; 0 is none of them
DROPPED = 3  # F has run, but R must come before the backward


@dataclass(frozen=True)
class Program:
    ops: list[list[tuple]]  # [p][N] of `Timed`
    links: list[tuple[int, int]]  # (sender, receiver)
    plain: int  # slots that one arrival fills; ids from here on are keys of the next two
    fans: dict[int, list[tuple[int, int]]]  # several (slot, link) at once, to the heads
    joins: dict[int, tuple[int, int]]  # (slot, arrivals that fill it), from the heads


def compiled(order: Order, table: CostTable) -> Program:
    """Raises ValueError, from `check`, for an operation that is missing, repeated, unknown or
    before its own input on its device."""
    compiler = _Compiler(order, table)
    try:
        ops = [compiler.device(i) for i in range(order.placement.p)]
    except (IndexError, KeyError):  # an operation of no microbatch, chunk or kind
        raise refused(order) from None
    if not compiler.valid():
        raise refused(order)
    return Program(ops, list(compiler.links), compiler.plain, compiler.fans, compiler.joins)


def refused(order: Order) -> Exception:
    """The error of `check` for an order that cannot be played."""
    try:
        check(order)
    except ValueError as error:
        return error
    return AssertionError("check accepts an order that does not run")


class _Compiler:
    def __init__(self, order: Order, table: CostTable) -> None:
        self.order, self.table = order, table
        self.m = order.microbatches
        self.last = len(order.placement.devices) - 1
        self.links: dict[tuple[int, int], int] = {}
        self.fans: dict[int, list[tuple[int, int]]] = {}
        self.joins: dict[int, tuple[int, int]] = {}
        self.plain = (2 * (self.last + 1) + order.placement.p) * self.m
        self.state = bytearray(len(order.placement.devices) * self.m)
        self.heads: set[tuple[int, int]] = set()
        self.updates: set[tuple[int, int]] = set()
        self.fillers: set[tuple[int, int, int]] = set()
        self.wrong = len(order.ops) != order.placement.p or self.m % max(order.steps, 1) != 0
        kinds = {op.kind for ops in order.ops for op in ops}
        self.shared_head = "S" in kinds
        self.dropped = (
            {
                (op.chunk, op.microbatch, i)
                for i, ops in enumerate(order.ops)
                for op in ops
                if op.kind == "R"
            }
            if "R" in kinds
            else set()
        )

    def valid(self) -> bool:
        p, v, steps = self.order.placement.p, self.order.placement.v, self.order.steps
        heads = p * self.m if self.shared_head else 0
        updates = p * v * steps if steps > 1 else len(self.updates)
        done = self.state.count(DONE) == len(self.state) > 0
        return done and not self.wrong and (len(self.heads), len(self.updates)) == (heads, updates)

    def link(self, sender: int, receiver: int) -> int:
        """−1 on one device."""
        if sender == receiver:
            return -1
        return self.links.setdefault((sender, receiver), len(self.links))

    def device(self, i: int) -> list[tuple]:
        rows = {
            (kind, c): self._row(kind, i, u)
            for c, u in enumerate(self.order.placement.stages[i])
            for kind in ("F", "R", "B", "W", "BW")
        }
        out: list[tuple] = []
        state, stages, m = self.state, self.order.placement.stages[i], self.m
        plain = not self.dropped
        for op in self.order.ops[i]:
            kind, k, c = op
            if (kind, c) not in rows:
                out.append(self._other(i, kind, k, c))
                continue
            seconds, waits, gives, link, takes, leaves, before, after = rows[kind, c]
            s = stages[c] * m + k
            if k < 0 or state[s] != before:
                self.wrong = True
            state[s] = after
            takes = takes[k]
            if not plain and kind == "F" and (c, k, i) in self.dropped:
                state[s], takes = DROPPED, self.table.saved[stages[c]][k]
            out.append((seconds[k], waits + k, gives + k, link, takes, leaves[k]))
        self.wrong |= not self._steps_kept(i)
        return out

    def _row(self, kind: str, i: int, u: int) -> tuple:
        """Bases, to which k is added, and columns, from which k chooses, of a kind on virtual stage
        u, with the states before and after it."""
        t, m, last = self.table, self.m, self.last
        devices = self.order.placement.devices
        zero, held, kept = [0.0] * m, t.activation[u], t.stash[u]
        freed = [a - b for a, b in zip(held, kept, strict=True)]
        if kind == "F":
            gives, link = (u + 1) * m, -1
            if u < last:
                link = self.link(i, devices[u + 1])
            elif self.shared_head:
                gives = self.plain
            else:
                gives = (2 * last + 1) * m
            return t.F[u], u * m if u else NONE, gives, link, held, zero, 0, START
        if kind == "R":
            more = [a - b for a, b in zip(held, t.saved[u], strict=True)]
            return t.R[u], NONE, NONE, -1, more, zero, DROPPED, START
        if kind == "W":
            return t.W[u], NONE, NONE, -1, zero, kept, KEPT, DONE
        waits = (last + 1 + u) * m
        gives, link = (waits - m, self.link(i, devices[u - 1])) if u else (NONE, -1)
        if kind == "B":
            return t.B[u], waits, gives, link, zero, freed, START, KEPT
        return t.BW[u], waits, gives, link, zero, held, START, DONE

    def _other(self, i: int, kind: str, k: int, c: int) -> tuple:
        """U, S and AUX."""
        t, m = self.table, self.m
        if kind == "AUX":
            self.wrong |= (i, k, c) in self.fillers
            self.fillers.add((i, k, c))
            return t.AUX[c], NONE, NONE, -1, 0.0, 0.0
        if kind == "U":
            u, each = self.order.placement.stages[i][c], m // self.order.steps
            begun = u * m + k * each
            done = self.state[begun : begun + each].count(DONE) == each
            self.wrong |= not done or (u, k) in self.updates or not 0 <= k < self.order.steps
            self.updates.add((u, k))
            return t.U[u][0], NONE, NONE, -1, 0.0, 0.0
        if kind != "S" or c or not 0 <= k < m:
            raise KeyError(kind)
        self.wrong |= (i, k) in self.heads
        self.heads.add((i, k))
        end = self.order.placement.devices[-1]
        slot = (2 * (self.last + 1) + i) * m + k
        self.fans.setdefault(self.plain + k, []).append((slot, self.link(end, i)))
        self.joins[self.plain + m + k] = ((2 * self.last + 1) * m + k, self.order.placement.p)
        return t.S[i][k], slot, self.plain + m + k, self.link(i, end), 0.0, 0.0

    def _steps_kept(self, i: int) -> bool:
        """Whether every F of a step comes after the U of the step before."""
        each, done = self.m // max(self.order.steps, 1), {}
        if self.order.steps == 1:
            return True
        for kind, k, c in self.order.ops[i]:
            if kind == "U":
                done[c] = k + 1
            elif kind == "F" and k // each > done.get(c, 0):
                return False
        return True
