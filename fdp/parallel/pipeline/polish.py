"""Local search on an order: only a change on the critical path can shorten it.

Legend: p devices, i one of them, n a position in its list, u a virtual stage, k a microbatch."""

import random
from collections.abc import Sequence
from dataclasses import replace

from fdp.parallel.pipeline.costs import SLACK, Costs
from fdp.parallel.pipeline.evaluate import peak, play
from fdp.parallel.pipeline.orders import Op, Order
from fdp.parallel.pipeline.program import compiled

RANK = {"F": 0, "R": 1, "B": 2, "BW": 2, "W": 3}  # of the operations of one microbatch and chunk
Block = tuple[int, int, int]  # (device, first, last): operations that follow without a gap


def polish(order: Order, costs: Costs, caps: Sequence[float], plays: int, seed: int = 0) -> Order:
    """The best order found in `plays` plays. A move takes an operation of a critical block to its
    front or its end, or a W into a gap; it stays where every device keeps its cap [p] in bytes and
    the makespan is not above the best by more than a threshold, which falls to 0.

    Operations F, B, W, BW of one step. The result is never slower than the order."""
    work = _Work(order, costs, caps)
    best, kept = work.makespan, work.order()
    choose = random.Random(seed)
    seconds = [op[0] for ops in work.program.ops for op in ops]
    worse = 0.5 * sum(seconds) / len(seconds)  # what a move may cost at first: half an operation
    for n in range(plays):
        moves = work.moves()
        if not moves:
            break
        i, source, target = choose.choice(moves)
        work.try_move(i, source, target, best + worse * (1 - n / plays))
        if work.makespan < best * (1 - 1e-12):
            best, kept = work.makespan, work.order()
    return kept


class _Work:
    """An order that changes."""

    def __init__(self, order: Order, costs: Costs, caps: Sequence[float]) -> None:
        table = costs.on(order.placement, order.microbatches)
        self.base, self.send = order, table.send
        self.program = compiled(order, table)
        self.names: list[list[Op]] = [list(ops) for ops in order.ops]
        self.caps = [cap * (1 + SLACK) for cap in caps]
        self.filler = {
            op[2]: i for i, ops in enumerate(self.program.ops) for op in ops if op[2] >= 0
        }
        start = play(self.program, self.send)
        assert start is not None
        self._took(start)

    def order(self) -> Order:
        return replace(self.base, ops=tuple(map(tuple, self.names)))

    def _took(self, start: list[list[float]]) -> None:
        self.start = start
        ends = [s[-1] + ops[-1][0] for s, ops in zip(start, self.program.ops, strict=True)]
        self.makespan = max(ends)
        self.last = ends.index(self.makespan)

    def blocks(self) -> list[Block]:
        """The critical path, from its end to its start."""
        found = []
        i, n = self.last, len(self.start[self.last]) - 1
        while True:
            end, start, ops = n, self.start[i], self.program.ops[i]
            while n and start[n - 1] + ops[n - 1][0] >= start[n]:
                n -= 1
            found.append((i, n, end))
            slot = ops[n][1]
            if start[n] == 0 or slot < 0:
                return found
            j = self.filler[slot]
            i, n = j, next(k for k, op in enumerate(self.program.ops[j]) if op[2] == slot)

    def moves(self) -> list[tuple[int, int, int]]:
        """(device, from, to)."""
        found = set()
        for i, first, last in self.blocks():
            names = self.names[i]
            if first < last:
                found |= {(i, first, first + 1), (i, last, last - 1), (i, last, first)}
                found |= {(i, first, last)}
            for n in range(first, last + 1):
                if names[n].kind == "W":
                    found |= {(i, n, last), (i, n, self._gap(i, n))}
        return sorted((i, a, b) for i, a, b in found if a != b)

    def _gap(self, i: int, n: int) -> int:
        """The position behind the last gap before a W, where its B allows it, else its own."""
        start, ops, names = self.start[i], self.program.ops[i], self.names[i]
        for k in range(n - 1, 0, -1):
            if _needs(names[n], names[k]):
                return n
            if start[k - 1] + ops[k - 1][0] < start[k]:
                return k
        return n

    def try_move(self, i: int, source: int, target: int, limit: float) -> None:
        """Makes the move where the order still runs, fits the cap and takes no more than
        `limit`."""
        names, ops = self.names[i], self.program.ops[i]
        op = names[source]
        low, high = sorted((source, target))
        for other in names[low : high + 1]:
            if _needs(op, other) or _needs(other, op):
                return
        self._shift(i, source, target)
        start = play(self.program, self.send) if peak(ops) <= self.caps[i] else None
        if start is not None:
            ends = [s[-1] + x[-1][0] for s, x in zip(start, self.program.ops, strict=True)]
            if max(ends) <= limit:
                self._took(start)
                return
        self._shift(i, target, source)

    def _shift(self, i: int, source: int, target: int) -> None:
        names, ops = self.names[i], self.program.ops[i]
        names.insert(target, names.pop(source))
        ops.insert(target, ops.pop(source))


def _needs(later: Op, sooner: Op) -> bool:
    """Whether two operations of a device belong to one microbatch and chunk, in this order."""
    same = later.microbatch == sooner.microbatch and later.chunk == sooner.chunk
    return same and RANK[later.kind] > RANK[sooner.kind]
