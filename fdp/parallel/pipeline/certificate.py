"""How far a searched order can be from the optimum of its placement: a mixed integer program for
small pipelines, solved with HiGHS.

Variables: the start of every operation, the makespan, and for each pair of operations of a device
which goes first. Besides the usual big-M rows, every operation starts after the work of all that
precede it on its device and leaves room for all that follow, which is what makes the relaxation
tight.

Legend: p devices, V virtual stages, u one of them, m microbatches, k one of them, N operations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from fdp.parallel.pipeline.bound import check_caps, lower_bound
from fdp.parallel.pipeline.costs import SLACK, Costs, CostTable
from fdp.parallel.pipeline.placement import Placement

MOST = 32  # p·m: beyond, the program has too many pairs
Name = tuple[str, int, int]  # kind, virtual stage, microbatch


@dataclass(frozen=True)
class Certificate:
    """bound: seconds that no order of the placement, and of the sequence if one was given, can
    beat. proven: whether `makespan` is optimal."""

    makespan: float
    bound: float

    @property
    def gap(self) -> float:
        return max(0.0, 1 - self.bound / self.makespan)

    @property
    def proven(self) -> bool:
        return self.gap < 1e-6


def certificate(
    placement: Placement,
    m: int,
    costs: Costs,
    caps: Sequence[float],
    makespan: float,
    sequence: Sequence[int] | None = None,
    seconds: float = 60.0,
    gap: float = 1e-4,
) -> Certificate:
    """The bound that HiGHS proves within `seconds`, or as soon as it is within `gap` of its best
    solution. makespan: of an order that keeps the caps. sequence: of the microbatches on every
    virtual stage, by F, by B and by W; without one the bound holds for all of them, and unlike
    costs make that far harder. Messages wait for no other on their link, which can only lower
    the bound. Raises ValueError for p·m > 32, bad costs or caps."""
    p = placement.p
    if p * m > MOST:
        raise ValueError(f"certificate: p·m = {p}·{m} = {p * m} > {MOST}: use `lower_bound`")
    check_caps(placement, m, costs, caps)
    least = lower_bound(placement, m, costs, caps)
    if least >= makespan * (1 - gap):
        return Certificate(makespan, min(least, makespan))
    program = _IntegerProgram(placement, m, costs.on(placement, m), caps, makespan, sequence)
    program.write(least)
    solved = program.solve(seconds, gap)
    return Certificate(makespan, min(makespan, max(least, solved)))


@dataclass
class _IntegerProgram:
    placement: Placement
    m: int
    table: CostTable
    caps: Sequence[float]
    most: float  # a makespan that is reached
    sequence: Sequence[int] | None
    names: list[Name] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float]] = field(
        default_factory=list
    )  # Σ coefficient·x ≥ least
    pairs: dict[tuple[Name, Name], int] = field(default_factory=dict)

    def write(self, least: float) -> None:
        stages = range(len(self.placement.devices))
        self.names = [(kind, u, k) for u in stages for k in range(self.m) for kind in "FBW"]
        self.at = {name: n for n, name in enumerate(self.names)}
        self.end = len(self.names)  # the makespan
        self.columns = self.end + 1
        self.reach = self._closure()
        self.rows.append(({self.end: 1.0}, least))
        for before, after, wait in self._precedence():
            self.rows.append(
                ({self.at[after]: 1.0, self.at[before]: -1.0}, self.seconds(before) + wait)
            )
        for i, mine in enumerate(self.placement.stages):
            ops = [name for name in self.names if name[1] in mine]
            for a, b in combinations(ops, 2):
                if self.known(a, b) is None:
                    self.pairs[a, b] = self.columns
                    self.columns += 1
            for a, b in combinations(ops, 2):
                self._disjunction(a, b)
            head = min(self._head(mine[0], k) for k in range(self.m))
            for a in ops:
                self._machine(a, ops, head)
                if a[0] == "F" and np.isfinite(self.caps[i]):
                    self._memory(a, ops, self.caps[i])

    def seconds(self, name: Name) -> float:
        kind, u, k = name
        return getattr(self.table, kind)[u][k]

    def _send(self, u: int) -> float:
        """Seconds from virtual stage u to u + 1."""
        devices = self.placement.devices
        return self.table.send if devices[u] != devices[u + 1] else 0.0

    def _head(self, u: int, k: int) -> float:
        return sum(self.table.F[w][k] + self._send(w) for w in range(u))

    def _followers(self) -> Iterator[tuple[int, int]]:
        """Microbatches that keep their order on every virtual stage: neighbours in the sequence or,
        without one, those of the same costs, which any schedule can be renamed to do."""
        if self.sequence is not None:
            yield from pairwise(self.sequence)
            return
        t, stages = self.table, range(len(self.placement.devices))
        rows = (t.F, t.B, t.W, t.activation, t.stash)
        columns = [tuple(row[u][k] for row in rows for u in stages) for k in range(self.m)]
        for k, column in enumerate(columns):
            after = next((n for n in range(k + 1, self.m) if columns[n] == column), None)
            if after is not None:
                yield k, after

    def _precedence(self) -> Iterator[tuple[Name, Name, float]]:
        """(before, after, seconds between)."""
        last = len(self.placement.devices) - 1
        for k in range(self.m):
            for u in range(last):
                yield ("F", u, k), ("F", u + 1, k), self._send(u)
                yield ("B", u + 1, k), ("B", u, k), self._send(u)
            yield ("F", last, k), ("B", last, k), 0.0
            for u in range(last + 1):
                yield ("B", u, k), ("W", u, k), 0.0
        for k, after in self._followers():
            for u in range(last + 1):
                for kind in "FBW":
                    yield (kind, u, k), (kind, u, after), 0.0

    def known(self, a: Name, b: Name) -> bool | None:
        """Whether a precedes b in every schedule that is looked at; None where both can be
        first."""
        if self.reach[self.at[a], self.at[b]]:
            return True
        return False if self.reach[self.at[b], self.at[a]] else None

    def _closure(self) -> np.ndarray:
        """[N, N]: whether a chain of precedences leads from one operation to another."""
        reach = np.zeros((self.end, self.end), bool)
        for before, after, _ in self._precedence():
            reach[self.at[before], self.at[after]] = True
        for n in range(self.end):
            reach |= np.outer(reach[:, n], reach[n])
        return reach

    def before(self, a: Name, b: Name) -> tuple[dict[int, float], float]:
        """Whether a precedes b, as (coefficients, constant)."""
        if (known := self.known(a, b)) is not None:
            return {}, float(known)
        if (a, b) in self.pairs:
            return {self.pairs[a, b]: 1.0}, 0.0
        return {self.pairs[b, a]: -1.0}, 1.0

    def _disjunction(self, a: Name, b: Name) -> None:
        """Where y = 1, a ends before b starts; where y = 0, b before a."""
        if (a, b) not in self.pairs:
            return
        y, big = self.pairs[a, b], self.most
        s, t = self.at[a], self.at[b]
        self.rows.append(({t: 1.0, s: -1.0, y: -big}, self.seconds(a) - big))
        self.rows.append(({s: 1.0, t: -1.0, y: big}, self.seconds(b)))

    def _machine(self, a: Name, ops: Sequence[Name], head: float) -> None:
        first, last = {self.at[a]: 1.0}, {self.end: 1.0, self.at[a]: -1.0}
        least, room = head, self.seconds(a)
        for b in ops:
            if b == a:
                continue
            terms, constant = self.before(b, a)
            least += constant * self.seconds(b)
            room += (1 - constant) * self.seconds(b)
            for y, sign in terms.items():
                first[y] = -sign * self.seconds(b)
                last[y] = sign * self.seconds(b)
        self.rows += [(first, least), (last, room)]

    def _memory(self, a: Name, ops: Sequence[Name], cap: float) -> None:
        """What a device holds while F runs is at most its cap."""
        held, constant = {}, 0.0
        for b in ops:
            t, (kind, u, k) = self.table, b
            amount = {
                "F": t.activation[u][k],
                "B": t.stash[u][k] - t.activation[u][k],
                "W": -t.stash[u][k],
            }[kind]
            terms, known = ({}, 1.0) if b == a else self.before(b, a)
            constant += known * amount
            for y, sign in terms.items():
                held[y] = -sign * amount
        self.rows.append((held, constant - cap * (1 + SLACK)))

    def solve(self, seconds: float, gap: float) -> float:
        """The proven bound."""
        entries = [(r, c, x) for r, (row, _) in enumerate(self.rows) for c, x in row.items()]
        r, c, x = (np.array(part) for part in zip(*entries, strict=True))
        matrix = coo_array((x, (r, c)), shape=(len(self.rows), self.columns)).tocsr()
        cost = np.zeros(self.columns)
        cost[self.end] = 1.0
        whole = np.arange(self.columns) > self.end
        upper = np.where(whole, 1.0, self.most * (1 + SLACK))
        result = milp(
            cost,
            constraints=LinearConstraint(matrix, np.array([least for _, least in self.rows])),
            integrality=whole.astype(int),
            bounds=Bounds(np.zeros(self.columns), upper),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        if result.status == 2:
            if self.sequence is not None:
                return self.most  # reached by an order that leaves the sequence
            raise AssertionError(f"a makespan of {self.most} s is reached, but HiGHS finds none")
        return 0.0 if result.mip_dual_bound is None else float(result.mip_dual_bound)
