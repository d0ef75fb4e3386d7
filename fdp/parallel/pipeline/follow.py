"""The F and B of a given order, with W wherever a device would wait.

Legend: p devices, i one of them, k a microbatch."""

import random
from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from math import inf

from fdp.parallel.pipeline.costs import SLACK, Costs
from fdp.parallel.pipeline.orders import Op, Order, relabel, split_backward
from fdp.parallel.pipeline.program import compiled


class Follower:
    """An order of one step whose W are placed anew. caps [p]: bytes.

    Raises ValueError, from `check`, for an order that does not run."""

    def __init__(self, order: Order, costs: Costs, caps: Sequence[float]) -> None:
        self.base, self.costs, self.given = split_backward(order), costs, caps
        table = costs.on(order.placement, order.microbatches)
        program = compiled(self.base, table)
        self.send, self.slots, self.links = table.send, program.plain, len(program.links)
        self.caps = [cap * (1 + SLACK) for cap in caps]
        named = [list(zip(self.base.ops[i], ops, strict=True)) for i, ops in enumerate(program.ops)]
        self.main = [[x for x in ops if x[0].kind != "W"] for ops in named]
        self.weights = [{x[0][1:]: x for x in ops if x[0].kind == "W"} for ops in named]

    def run(self, patience: Sequence[float]) -> tuple[float, list[list[Op]]]:
        """(makespan, operations), makespan inf where memory or the order itself is a dead end.

        A W runs where a device waits for at least patience·T_W, or where F would not fit the
        cap."""
        arrived, waiter = [-1.0] * self.slots, [-1] * self.slots
        free = [0.0] * self.links
        out: list[list[Op]] = [[] for _ in self.main]
        devices = [_Following() for _ in self.main]
        todo = list(range(len(devices)))
        while todo:
            i = todo.pop()
            d, ops, main = devices[i], out[i], self.main[i]
            while d.next < len(main):
                name, (seconds, waits, gives, link, takes, leaves) = main[d.next]
                came = arrived[waits] if waits >= 0 else 0.0
                if came < 0:
                    waiter[waits] = i
                    break
                d.weights_until(came * (1 + SLACK), patience[i], ops)
                while d.held + takes > self.caps[i]:
                    if not d.waiting:
                        return inf, out
                    d.weight(ops)
                d.now = (came if came > d.now else d.now) + seconds
                d.held += takes - leaves
                d.next += 1
                ops.append(name)
                if name.kind == "B":
                    d.waiting.append(self.weights[i][name[1:]])
                if gives >= 0:
                    end = d.now
                    if link >= 0:
                        end = free[link] = (end if end > free[link] else free[link]) + self.send
                    arrived[gives] = end
                    if waiter[gives] >= 0:
                        todo.append(waiter[gives])
        if any(d.next < len(main) for d, main in zip(devices, self.main, strict=True)):
            return inf, out
        for d, ops in zip(devices, out, strict=True):
            while d.waiting:
                d.weight(ops)
        return max(d.now for d in devices), out

    def relabelled(self, sequence: Sequence[int]) -> "Follower":
        """With microbatch sequence[k] in the place of k."""
        ops = [
            [name for name, _ in main] + [name for name, _ in weights.values()]
            for main, weights in zip(self.main, self.weights, strict=True)
        ]
        return Follower(relabel(self.order(ops), sequence), self.costs, self.given)

    def order(self, ops: Sequence[Sequence[Op]]) -> Order:
        return replace(self.base, ops=tuple(map(tuple, ops)))

    def exchanged(self, choose: random.Random) -> "Follower":
        """With two neighbours of one device exchanged, at random; itself where those two belong to
        one microbatch and chunk."""
        i = choose.randrange(len(self.main))
        ops = self.main[i]
        n = choose.randrange(len(ops) - 1)
        if ops[n][0][1:] == ops[n + 1][0][1:]:
            return self
        other = copy(self)
        other.main = [
            *self.main[:i],
            [*ops[:n], ops[n + 1], ops[n], *ops[n + 2 :]],
            *self.main[i + 1 :],
        ]
        return other


class _Following:
    def __init__(self) -> None:
        self.now = self.held = 0.0
        self.next = 0  # of the F and B
        self.waiting: deque = deque()  # W, the oldest first

    def weights_until(self, time: float, patience: float, ops: list[Op]) -> None:
        while (
            self.waiting and time - self.now >= patience * self.waiting[0][1][0] and time > self.now
        ):
            self.weight(ops)

    def weight(self, ops: list[Op]) -> None:
        name, (seconds, _, _, _, _, leaves) = self.waiting.popleft()
        self.now += seconds
        self.held -= leaves
        ops.append(name)
