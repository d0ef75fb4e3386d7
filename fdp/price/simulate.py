"""Discrete-event simulation: tasks with dependencies on serial resources (compute streams, links).

A task of size n on a resource takes overhead + per_unit · n seconds. `simulate` runs every
resource's queue in the order in which the tasks are given, in one of three modes; `dispatch` lets
free machines choose among ready tasks.

Legend: N tasks, in the order given; a private list indexed by task carries the suffix.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

MODES = ("asynchronous", "neighbour", "lock-step")
RULES = ("ready", "list", "priority")


@dataclass(frozen=True, slots=True)
class Resource:
    """Runs one task at a time. overhead: seconds per task; per_unit: seconds per unit of size.

    A link's tasks are messages: in the synchronous modes they belong to the round of the task that
    sends them."""

    name: str
    overhead: float = 0.0
    per_unit: float = 1.0
    link: bool = False

    def seconds(self, size: float) -> float:
        return self.overhead + self.per_unit * size


@dataclass(frozen=True, slots=True)
class TimedTask:
    """Work of `size` units on `resource` (for `dispatch`: on a machine of that pool) once the tasks
    `after` have ended.

    allocates, frees: (device, bytes), taken when the task starts and given back when it ends.
    release: earliest start in seconds. priority: the highest goes first where `dispatch` is asked
    for rule "priority"."""

    id: Hashable
    resource: str
    size: float = 0.0
    after: tuple[Hashable, ...] = ()
    allocates: tuple[tuple[str, float], ...] = ()
    frees: tuple[tuple[str, float], ...] = ()
    release: float = 0.0
    priority: float = 0.0


@dataclass(frozen=True)
class Result:
    """Seconds and bytes of one simulation.

    The tasks of the critical path follow each other without a gap, so wait + sum of their durations
    = makespan; wait is the release time of the first of them, 0 where nothing is released late."""

    start: dict[Hashable, float]
    end: dict[Hashable, float]
    ran_on: dict[Hashable, str]  # task → resource, or the machine `dispatch` chose
    makespan: float
    busy: dict[str, float]  # resource → sum of its durations
    idle: dict[str, float]  # makespan − busy
    span: dict[
        str, float
    ]  # last end − first start: bubble rates of the zero-bubble papers are (span − busy) / span
    peak_bytes: dict[str, float]  # only devices on which some task allocates
    held_bytes: dict[str, float]  # per device at the end; 0 where all that was allocated was freed
    critical_path: list[Hashable]
    wait: float


def simulate(
    tasks: Sequence[TimedTask],
    resources: Sequence[Resource],
    mode: str = "asynchronous",
    neighbours: Mapping[str, Sequence[str]] | None = None,
) -> Result:
    """Every resource runs its tasks in the order in which they stand in `tasks`.

    asynchronous: a task starts when its dependencies and the task before it on its resource have
    ended. lock-step: as one SPMD program that scans over ticks with a collective permute in each. A
    task's round is one after the latest of its dependencies and of the task before it on its
    resource (a link's task: the same round), and a round starts when all tasks of the round before
    have ended. neighbour: the same rounds, but a resource starts its round k when itself and
    `neighbours[resource]` have ended round k − 1 (give links among the neighbours too); a resource
    without a task in a round still takes part in it, so delays travel one neighbour a round. This
    is a permute that synchronises only the devices that exchange. For the same tasks the makespans
    are ordered asynchronous ≤ neighbour ≤ lock-step: each mode adds constraints. In every mode
    longer tasks never end earlier; an added task never shortens the asynchronous makespan, but can
    shorten the other two, because it moves later tasks to other rounds.

    Raises ValueError for a dependency cycle, a queue order that deadlocks (both name the tasks), an
    unknown or repeated name, a negative or infinite number, a device that frees more than it holds,
    `neighbours` without its mode."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
    if (neighbours is not None) != (mode == "neighbour"):
        raise ValueError(
            f"mode {mode!r} with neighbours={neighbours}: give neighbours with mode 'neighbour' "
            "only"
        )
    deps_N = _dependencies(tasks)
    index = _index_resources(resources)
    on_N = [_lookup(index, t.resource, t.id) for t in tasks]
    preds_N = _with_queues(deps_N, on_N)
    order = _topological(preds_N)
    if len(order) < len(tasks):
        _raise_cycle(tasks, deps_N, preds_N)
    seconds_N = [resources[r].seconds(t.size) for r, t in zip(on_N, tasks, strict=True)]
    reach = _reach(mode, neighbours or {}, index)
    rounds = (
        [order]
        if mode == "asynchronous"
        else _rounds(order, preds_N, [resources[r].link for r in on_N])
    )
    start_N, by_N = _play(rounds, tasks, preds_N, seconds_N, on_N, reach)
    played = [n for members in rounds for n in members]
    return _result(tasks, resources, on_N, seconds_N, start_N, by_N, played)


def dispatch(
    tasks: Sequence[TimedTask], pools: Mapping[str, Sequence[Resource]], rule: str = "ready"
) -> Result:
    """Greedy, work-conserving: whenever a machine of a task's pool is free and a task is ready, one
    starts.

    rule: "ready" takes the task that has been ready longest, "list" the first in `tasks`,
    "priority" the highest priority; ties go to the first in `tasks`, and to the first free machine
    of the pool. Makespans of greedy schedules are not monotone: a machine more, shorter tasks or
    fewer dependencies can make them longer (Graham 1969, SIAM J. Appl. Math. 17(2)). Raises
    ValueError as `simulate`, and for a pool without machines."""
    empty = [name for name, machines in pools.items() if not machines]
    if empty:
        raise ValueError(
            f"pools without machines: {empty}: a task there would never run, give at least one "
            "Resource"
        )
    index = {name: k for k, name in enumerate(pools)}
    return _greedy(
        tasks, [_lookup(index, t.resource, t.id) for t in tasks], list(pools.values()), rule
    )


def list_schedule(tasks: Sequence[TimedTask], machines: Sequence[Resource]) -> Result:
    """Graham's list scheduling: any machine may run any task (`task.resource` is not read), first
    ready in the list.

    On M identical machines makespan ≤ work / M + (1 − 1/M) · critical path ≤ (2 − 1/M) · optimum
    (Graham 1969), where the critical path is the longest chain of dependencies. Raises ValueError
    as `dispatch`."""
    if not machines:
        raise ValueError("list_schedule needs at least one machine")
    return _greedy(tasks, [0] * len(tasks), [machines], "list")


def _greedy(
    tasks: Sequence[TimedTask], pool_N: list[int], pools: Sequence[Sequence[Resource]], rule: str
) -> Result:
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: choose one of {', '.join(RULES)}")
    machines = [machine for pool in pools for machine in pool]
    _index_resources(machines)
    deps_N = _dependencies(tasks)
    if len(_topological(deps_N)) < len(tasks):
        _raise_cycle(tasks, deps_N, deps_N)
    keys: dict[str, Callable[[int, float], float]] = {
        "ready": lambda n, now: now,
        "list": lambda n, now: 0.0,
        "priority": lambda n, now: -tasks[n].priority,
    }
    firsts = [sum(len(pool) for pool in pools[:k]) for k in range(len(pools))]
    free = [
        list(range(first, first + len(pool))) for first, pool in zip(firsts, pools, strict=True)
    ]
    return _events(tasks, deps_N, pool_N, machines, free, keys[rule])


def _events(
    tasks: Sequence[TimedTask],
    deps_N: list[list[int]],
    pool_N: list[int],
    machines: Sequence[Resource],
    free: list[list[int]],
    key: Callable[[int, float], float],
) -> Result:
    """Event loop of `dispatch`: what is ready or ends at one time is taken in before any machine
    chooses.
    """
    count = len(tasks)
    start_N, end_N, by_N, on_N = [0.0] * count, [0.0] * count, [-1] * count, [-1] * count
    after_N, missing_N = _successors(deps_N)
    enabler_N, last, order = [-1] * count, [-1] * len(machines), []
    queues: list[list[tuple[float, int]]] = [[] for _ in free]
    events = [
        (tasks[n].release, 0, n) for n in range(count) if not missing_N[n]
    ]  # kind 0: is ready, 1: has ended
    heapq.heapify(events)
    while events:
        now, touched = events[0][0], set()
        while events and events[0][0] == now:
            _, ended, n = heapq.heappop(events)
            touched.add(pool_N[n])
            if not ended:
                heapq.heappush(queues[pool_N[n]], (key(n, now), n))
                continue
            heapq.heappush(free[pool_N[n]], on_N[n])
            for s in after_N[n]:
                missing_N[s] -= 1
                if not missing_N[s]:
                    enabler_N[s] = n
                    heapq.heappush(events, (max(now, tasks[s].release), 0, s))
        for pool in sorted(touched):
            while queues[pool] and free[pool]:
                n, machine = heapq.heappop(queues[pool])[1], heapq.heappop(free[pool])
                causes = [c for c in (enabler_N[n], last[machine]) if c >= 0 and end_N[c] == now]
                start_N[n], by_N[n], on_N[n] = now, causes[0] if causes else -1, machine
                end_N[n], last[machine] = now + machines[machine].seconds(tasks[n].size), n
                order.append(n)
                heapq.heappush(events, (end_N[n], 1, n))
    seconds_N = [machines[k].seconds(t.size) for k, t in zip(on_N, tasks, strict=True)]
    return _result(tasks, machines, on_N, seconds_N, start_N, by_N, order)


def _dependencies(tasks: Sequence[TimedTask]) -> list[list[int]]:
    """Indices of every task's dependencies; checks ids and numbers."""
    index = {t.id: n for n, t in enumerate(tasks)}
    if len(index) < len(tasks):
        twice = next(t.id for n, t in enumerate(tasks) if index[t.id] != n)
        raise ValueError(f"task {twice!r} is given twice: ids must be unique")
    deps_N = []
    for t in tasks:
        if not (0 <= t.size < math.inf and 0 <= t.release < math.inf and math.isfinite(t.priority)):
            raise ValueError(
                f"task {t.id!r}: size={t.size}, release={t.release}, priority={t.priority}: "
                "size and release must be finite and ≥ 0, priority finite"
            )
        for device, amount in (*t.allocates, *t.frees):
            if not 0 <= amount < math.inf:
                raise ValueError(
                    f"task {t.id!r}: {amount} bytes on {device!r}: bytes must be finite and ≥ 0"
                )
        unknown = [d for d in t.after if d not in index]
        if unknown:
            raise ValueError(
                f"task {t.id!r} depends on unknown task {unknown[0]!r}: add it or remove it from "
                "`after`"
            )
        deps_N.append([index[d] for d in t.after])
    return deps_N


def _index_resources(resources: Sequence[Resource]) -> dict[str, int]:
    for r in resources:
        if not (0 <= r.overhead < math.inf and 0 <= r.per_unit < math.inf):
            raise ValueError(
                f"resource {r.name!r}: seconds = {r.overhead} + {r.per_unit} · size: both must be "
                "finite and ≥ 0"
            )
    index = {r.name: k for k, r in enumerate(resources)}
    if len(index) < len(resources):
        twice = next(r.name for k, r in enumerate(resources) if index[r.name] != k)
        raise ValueError(f"resource {twice!r} is given twice: names must be unique")
    return index


def _lookup(index: Mapping[str, int], name: str, user: Hashable) -> int:
    if name not in index:
        raise ValueError(
            f"{user!r} names unknown resource {name!r}: known are {', '.join(list(index)[:20])}"
        )
    return index[name]


def _with_queues(deps_N: list[list[int]], on_N: list[int]) -> list[list[int]]:
    """Predecessors: the task before on the same resource, then the dependencies; these win ties of
    critical paths.
    """
    last: dict[int, int] = {}
    preds_N = []
    for n, (deps, resource) in enumerate(zip(deps_N, on_N, strict=True)):
        preds_N.append([last[resource], *deps] if resource in last else deps)
        last[resource] = n
    return preds_N


def _successors(preds_N: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """(successors, number of predecessors) of every task."""
    after_N: list[list[int]] = [[] for _ in preds_N]
    for n, preds in enumerate(preds_N):
        for d in preds:
            after_N[d].append(n)
    return after_N, [len(preds) for preds in preds_N]


def _topological(preds_N: list[list[int]]) -> list[int]:
    """Tasks after their predecessors (Kahn); what lies on or behind a cycle is missing."""
    after_N, missing_N = _successors(preds_N)
    order = [n for n, k in enumerate(missing_N) if not k]
    for n in order:
        for s in after_N[n]:
            missing_N[s] -= 1
            if not missing_N[s]:
                order.append(s)
    return order


def _raise_cycle(
    tasks: Sequence[TimedTask], deps_N: list[list[int]], preds_N: list[list[int]]
) -> None:
    """Names one cycle of the dependencies or, where they have none, of dependencies and queues
    together.
    """
    in_deps = len(_topological(deps_N)) < len(tasks)
    graph_N = deps_N if in_deps else preds_N
    stuck = set(range(len(tasks))) - set(_topological(graph_N))
    path: list[int] = []
    seen: dict[int, int] = {}
    n = min(stuck)
    while n not in seen:  # a stuck task has a stuck predecessor, so the walk must meet itself
        seen[n] = len(path)
        path.append(n)
        n = next(d for d in graph_N[n] if d in stuck)
    cycle = [*path[seen[n] :], n]
    if in_deps:
        raise ValueError("dependency cycle: " + " after ".join(repr(tasks[k].id) for k in cycle))
    waits = [
        f"{tasks[a].id!r} waits for {tasks[b].id!r} "
        + (
            "(dependency)"
            if b in deps_N[a]
            else f"(before it in the queue of {tasks[a].resource!r})"
        )
        for a, b in itertools.pairwise(cycle)
    ]
    raise ValueError(
        f"queue order deadlocks: {', '.join(waits)}: reorder these tasks, or use dispatch"
    )


def _reach(
    mode: str, neighbours: Mapping[str, Sequence[str]], index: Mapping[str, int]
) -> list[list[int]] | None:
    """Resources whose previous round each resource waits for; None: all of them."""
    if mode != "neighbour":
        return None
    reach = [[k] for k in range(len(index))]
    for name, others in neighbours.items():
        reach[_lookup(index, name, "neighbours")] += [
            _lookup(index, o, "neighbours") for o in others
        ]
    return reach


def _rounds(order: list[int], preds_N: list[list[int]], link_N: list[bool]) -> list[list[int]]:
    """Tasks by round, each round in topological order."""
    round_N = [0] * len(order)
    rounds: list[list[int]] = []
    for n in order:
        latest = max((round_N[d] for d in preds_N[n]), default=0 if link_N[n] else -1)
        round_N[n] = latest if link_N[n] else latest + 1
        while len(rounds) <= round_N[n]:
            rounds.append([])
        rounds[round_N[n]].append(n)
    return rounds


def _play(
    rounds: list[list[int]],
    tasks: Sequence[TimedTask],
    preds_N: list[list[int]],
    seconds_N: list[float],
    on_N: list[int],
    reach: list[list[int]] | None,
) -> tuple[list[float], list[int]]:
    """(start, the task whose end it waited for or −1) of every task."""
    start_N, end_N, by_N = [0.0] * len(tasks), [0.0] * len(tasks), [-1] * len(tasks)
    resources = range(max(on_N, default=-1) + 1 if reach is None else len(reach))
    gate = done = [
        (0.0, -1) for _ in resources
    ]  # (seconds, task): when a resource may start, when it has ended
    for members in rounds:
        done = list(gate)
        for n in members:
            begin, by = gate[on_N[n]]
            if tasks[n].release > begin:
                begin, by = tasks[n].release, -1
            for d in preds_N[n]:
                if end_N[d] >= begin:
                    begin, by = end_N[d], d
            start_N[n], end_N[n], by_N[n] = begin, begin + seconds_N[n], by
            done[on_N[n]] = max(done[on_N[n]], (end_N[n], n))
        latest = max(done, default=(0.0, -1))
        gate = (
            [latest] * len(done)
            if reach is None
            else [max(done[k] for k in waits) for waits in reach]
        )
    return start_N, by_N


def _result(
    tasks: Sequence[TimedTask],
    resources: Sequence[Resource],
    on_N: list[int],
    seconds_N: list[float],
    start_N: list[float],
    by_N: list[int],
    order: list[int],
) -> Result:
    end_N = [a + b for a, b in zip(start_N, seconds_N, strict=True)]
    makespan = max(end_N, default=0.0)
    busy = [0.0] * len(resources)
    first, last = [math.inf] * len(resources), [0.0] * len(resources)
    for k, a, b, s in zip(on_N, start_N, end_N, seconds_N, strict=True):
        busy[k] += s
        first[k], last[k] = min(first[k], a), max(last[k], b)
    path = [end_N.index(makespan)] if tasks else []
    while path and by_N[path[-1]] >= 0:
        path.append(by_N[path[-1]])
    path.reverse()
    peak, held = _memory(tasks, start_N, end_N, order)
    ids, names = [t.id for t in tasks], [r.name for r in resources]
    return Result(
        start=dict(zip(ids, start_N, strict=True)),
        end=dict(zip(ids, end_N, strict=True)),
        ran_on={t: names[k] for t, k in zip(ids, on_N, strict=True)},
        makespan=makespan,
        busy=dict(zip(names, busy, strict=True)),
        idle={name: makespan - b for name, b in zip(names, busy, strict=True)},
        span={name: max(0.0, b - a) for name, a, b in zip(names, first, last, strict=True)},
        peak_bytes=peak,
        held_bytes=held,
        critical_path=[ids[n] for n in path],
        wait=start_N[path[0]] if path else 0.0,
    )


def _memory(
    tasks: Sequence[TimedTask], start_N: list[float], end_N: list[float], order: list[int]
) -> tuple[dict[str, float], dict[str, float]]:
    """(peak, held at the end) bytes per device. What ends at a time frees before what starts then
    allocates.
    """
    events: dict[str, list[tuple[float, bool, int, float]]] = {}
    for rank, n in enumerate(order):
        for device, amount in tasks[n].allocates:
            events.setdefault(device, []).append((start_N[n], True, 2 * rank, amount))
        for device, amount in tasks[n].frees:
            # A task without duration frees in causal order among the starts, never before its own
            # allocation.
            events.setdefault(device, []).append(
                (end_N[n], start_N[n] == end_N[n], 2 * rank + 1, -amount)
            )
    peak, held = {}, {}
    for device, changes in events.items():
        now, most = 0.0, 0.0
        for time, _, rank, amount in sorted(changes):
            if now + amount < -1e-9 * most:
                task = tasks[order[rank // 2]].id
                raise ValueError(
                    f"{device!r} holds {now} bytes at {time} s, but task {task!r} frees {-amount}"
                )
            now += amount
            most = max(most, now)
        peak[device], held[device] = most, now
    return peak, held
