"""List scheduling of a pipeline: a device that is free takes the best operation that is ready.

Every virtual stage runs its F and its B in the sequence of the microbatches, so two counters a
virtual stage say what is ready. Times are integers: equal times then compare equal, whatever sums
they came from.

Legend: p devices, V = p·v virtual stages, u one of them, m microbatches, k a position in their
sequence, i a device."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil, inf

from fdp.parallel.pipeline.costs import SLACK, CostTable
from fdp.parallel.pipeline.orders import Op, Order
from fdp.parallel.pipeline.placement import Placement

GRID = 1 << 24  # steps of the longest operation: rounding moves a makespan by less than 1e-4


@dataclass(frozen=True)
class Knobs:
    """ahead: at most ⌈ahead·(V − u)⌉ microbatches lie between F and B of u. patience [p]: W
    starts only if nothing else arrives within patience·T_W; hold [p]: F, only if no B does
    within hold·T_F. rounds: microbatches go through the chunks in rounds of so many, the F of a
    round chunk after chunk; 0 takes the F that is farthest on. returns: the same for B, from the
    last chunk down. fused: W at once after its B."""

    ahead: float
    patience: tuple[float, ...]
    hold: tuple[float, ...]
    rounds: int = 0
    returns: int = 1
    fused: bool = False


class Line:
    """A pipeline whose microbatches go in one sequence. caps [p]: bytes."""

    def __init__(
        self, placement: Placement, table: CostTable, caps: Sequence[float], sequence: Sequence[int]
    ) -> None:
        self.placement, self.caps, self.sequence = placement, tuple(caps), tuple(sequence)
        longest = max(max(max(row) for row in rows) for rows in (table.F, table.B, table.W))
        self.unit = max(longest, table.send, 1e-300) / GRID

        def whole(rows: list) -> list[list[int]]:
            return [[round(row[k] / self.unit) for k in sequence] for row in rows]

        self.F, self.B, self.W = whole(table.F), whole(table.B), whole(table.W)
        self.send = round(table.send / self.unit)
        self.held = [[row[k] for k in sequence] for row in table.activation]
        self.kept = [[row[k] for k in sequence] for row in table.stash]
        self.alike = all(min(row) == max(row) for row in self.held)

    def run(self, knobs: Knobs) -> tuple[float, list[list[tuple[str, int, int]]]]:
        """(makespan in seconds, [p] lists of (kind, k, u))."""
        return _ListRun(self, knobs).play()

    def order(self, ops: list[list[tuple[str, int, int]]]) -> Order:
        chunks = self.placement.chunks
        named = (tuple(Op(kind, self.sequence[k], chunks[u]) for kind, k, u in x) for x in ops)
        return Order(self.placement, tuple(named))


class _ListRun:
    """One list schedule."""

    def __init__(self, line: Line, knobs: Knobs) -> None:
        self.line, self.knobs = line, knobs
        self.devices = line.placement.devices
        self.stages = line.placement.stages
        count, p = len(self.devices), line.placement.p
        self.m = len(line.sequence)
        self.next_f, self.next_b = [0] * count, [0] * count  # positions that have not run yet
        self.have_f, self.have_b = [0] * count, [0] * count  # how many inputs have arrived
        self.have_f[0] = self.m
        self.limit = [max(1, ceil(knobs.ahead * (count - u))) for u in range(count)]
        self.bytes = [0.0] * p
        self.waiting: list[deque[tuple[int, int]]] = [deque() for _ in range(p)]
        self.coming_f: list[list[tuple[int, int]]] = [[] for _ in range(p)]  # (time, u)
        self.coming_b: list[list[tuple[int, int]]] = [[] for _ in range(p)]
        self.free = [[0] * p for _ in range(p)]  # of the link from a device to another
        self.works = [False] * p  # else it waits until `wake`
        self.wake: list[float] = [0] * p
        self.events: list[tuple[float, int]] = [(0, i) for i in range(p)]
        self.ops: list[list[tuple[str, int, int]]] = [[] for _ in range(p)]
        self.caps = [cap * (1 + SLACK) for cap in line.caps]

    def play(self) -> tuple[float, list[list[tuple[str, int, int]]]]:
        events, wake, ends = self.events, self.wake, 0.0
        while events:
            now, i = heappop(events)
            if now != wake[i]:
                continue  # something earlier has woken it since
            end = self._turn(i, now)
            wake[i] = end
            if end < inf:
                heappush(events, (end, i))
                if end > ends and self.works[i]:
                    ends = end
        done = all(n == self.m for n in self.next_b) and not any(self.waiting)
        return (ends * self.line.unit if done else inf), self.ops  # else memory is a dead end

    def _turn(self, i: int, now: float) -> float:
        """Starts an operation. When device i wants its next turn."""
        self.works[i] = True
        coming_f, coming_b = self.coming_f[i], self.coming_b[i]
        while coming_f and coming_f[0][0] <= now:
            self.have_f[heappop(coming_f)[1]] += 1
        while coming_b and coming_b[0][0] <= now:
            self.have_b[heappop(coming_b)[1]] += 1
        u = self._ready_b(i)
        if u >= 0:
            return self._run_b(i, u, now)
        next_b = coming_b[0][0] if coming_b else inf
        u, full = self._ready_f(i)
        if u >= 0 and next_b - now >= self.knobs.hold[i] * self.line.F[u][self.next_f[u]]:
            return self._run_f(i, u, now)
        soon = next_b
        if not full and coming_f and coming_f[0][0] < soon:
            soon = coming_f[0][0]
        waiting = self.waiting[i]
        if waiting:
            w, k = waiting[0]
            seconds = self.line.W[w][k]
            if full or soon - now >= self.knobs.patience[i] * seconds:
                waiting.popleft()
                self.bytes[i] -= self.line.kept[w][k]
                self.ops[i].append(("W", k, w))
                return now + seconds
        self.works[i] = False
        first_f = coming_f[0][0] if coming_f else inf
        return next_b if next_b < first_f else first_f

    def _ready_b(self, i: int) -> int:
        """The virtual stage whose B device i would run; −1 for none."""
        best, key, returns = -1, (0, 0), self.knobs.returns
        for u in self.stages[i]:
            k = self.next_b[u]
            if k < self.have_b[u]:
                rank = (k // returns, -u) if returns else (u, 0)
                if best < 0 or rank < key:
                    best, key = u, rank
        return best

    def _ready_f(self, i: int) -> tuple[int, bool]:
        """(the virtual stage whose F device i would run or −1, whether one waits for memory)."""
        best, key, full, rounds = -1, (0, 0), False, self.knobs.rounds
        for u in self.stages[i]:
            k = self.next_f[u]
            if k < self.have_f[u] and k - self.next_b[u] < self.limit[u]:
                if not self._fits(i, u, k):
                    full = True
                    continue
                rank = (k // rounds, u) if rounds else (-u, 0)
                if best < 0 or rank < key:
                    best, key = u, rank
        return best, full

    def _fits(self, i: int, u: int, k: int) -> bool:
        """Whether F fits, and with it all that its device has begun can still end, the oldest
        microbatch first: so memory never deadlocks."""
        stages, held = self.stages[i], self.line.held
        room = self.caps[i] - self.bytes[i] - held[u][k]
        if room < 0 or len(stages) == 1:
            return room >= 0
        room += sum([self.line.kept[w][n] for w, n in self.waiting[i]])
        oldest, newest = self.next_b[stages[0]], max(k, self.next_f[stages[0]] - 1)
        for n in range(oldest, newest + 1):
            rest = back = 0.0
            for other in stages:
                if n < self.next_f[other] or (n == k and other == u):
                    if n >= self.next_b[other]:
                        back += held[other][n]
                else:
                    rest += held[other][n]
            if rest > room:
                return False
            if self.line.alike:
                break  # the next ones need no more than the oldest gives back
            room += back
        return True

    def _run_f(self, i: int, u: int, now: float) -> float:
        k = self.next_f[u]
        self.next_f[u] = k + 1
        self.bytes[i] += self.line.held[u][k]
        self.ops[i].append(("F", k, u))
        end = now + self.line.F[u][k]
        if u + 1 < len(self.devices):
            self._deliver(i, u + 1, end, self.coming_f)
        else:
            self._deliver(i, u, end, self.coming_b)
        return end

    def _run_b(self, i: int, u: int, now: float) -> float:
        k = self.next_b[u]
        self.next_b[u] = k + 1
        end = now + self.line.B[u][k]
        if self.knobs.fused:
            end += self.line.W[u][k]
            self.bytes[i] -= self.line.held[u][k]
            self.ops[i].append(("BW", k, u))
        else:
            self.bytes[i] -= self.line.held[u][k] - self.line.kept[u][k]
            self.waiting[i].append((u, k))
            self.ops[i].append(("B", k, u))
        if u:
            self._deliver(i, u - 1, end, self.coming_b)
        return end

    def _deliver(self, i: int, u: int, end: float, coming: list) -> None:
        """The output of device i for virtual stage u; it wakes a device that waits."""
        j = self.devices[u]
        if j != i:
            free = self.free[i]
            end = free[j] = (end if end > free[j] else free[j]) + self.line.send
        heappush(coming[j], (end, u))
        if j != i and not self.works[j] and end < self.wake[j]:
            self.wake[j] = end
            heappush(self.events, (end, j))
