"""The simulator against slow oracles, bounds that hold for every schedule, and Graham's published
anomalies.
"""

import dataclasses
import itertools
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.price.simulate import MODES, RULES, Resource, TimedTask, dispatch, list_schedule, simulate

pytestmark = pytest.mark.fast

R = [Resource("a"), Resource("b"), Resource("c")]
LINE = {"a": ["b"], "b": ["a", "c"], "c": ["b"]}
quick = settings(max_examples=150, deadline=None)


def run(tasks, mode="asynchronous", resources=R):
    return simulate(tasks, resources, mode, LINE if mode == "neighbour" else None)


@st.composite
def graphs(draw, most=12, release=True):
    """Tasks in an order that respects their dependencies; integer seconds, so that sums are
    exact.
    """
    tasks = []
    for n in range(draw(st.integers(1, most))):
        after = draw(st.lists(st.integers(0, n - 1), max_size=3, unique=True)) if n else []
        size, late = draw(st.integers(0, 5)), draw(st.integers(0, 9)) if release else 0
        device, held = draw(st.sampled_from("abc")), draw(st.integers(0, 4))
        memory = (((device, held),), ((device, held),)) if held else ((), ())
        tasks.append(
            TimedTask(
                n,
                draw(st.sampled_from("abc")),
                size,
                tuple(after),
                *memory,
                late,
                draw(st.integers(0, 3)),
            )
        )
    return tasks


def longest_chain(tasks):
    """Longest path through dependencies alone, release times included."""
    end = {}
    for t in tasks:
        end[t.id] = max([t.release, *(end[d] for d in t.after)]) + t.size
    return max(end.values())


def peak_by_scan(tasks, r, device):
    """Bytes held in the open interval after every event; only tasks that last hold anything
    there.
    """
    times = sorted({*r.start.values(), *r.end.values()})
    middles = [(x + y) / 2 for x, y in itertools.pairwise(times)]
    return max(
        (
            sum(
                b
                for t in tasks
                if r.start[t.id] < x < r.end[t.id]
                for d, b in t.allocates
                if d == device
            )
            for x in middles
        ),
        default=0,
    )


# One task, one resource


@pytest.mark.parametrize("mode", MODES)
def test_cost_is_overhead_plus_per_unit_times_size(mode):
    link = [Resource("x", overhead=2.0, per_unit=0.5)]
    tasks = [TimedTask("m", "x", 6.0), TimedTask("n", "x", 0.0)]
    r = simulate(tasks, link, mode, {} if mode == "neighbour" else None)
    assert (r.start, r.end) == ({"m": 0.0, "n": 5.0}, {"m": 5.0, "n": 7.0})
    assert (r.makespan, r.critical_path, r.wait) == (7.0, ["m", "n"], 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_do(mode):
    r = run([], mode)
    assert (r.makespan, r.critical_path, r.busy, r.span) == (
        0.0,
        [],
        dict.fromkeys("abc", 0),
        dict.fromkeys("abc", 0),
    )
    assert list_schedule([], R).makespan == 0.0


def test_queue_is_kept_even_when_a_later_task_is_ready():
    tasks = [
        TimedTask("slow", "a", 5),
        TimedTask("blocked", "b", 1, ("slow",)),
        TimedTask("ready", "b", 2),
    ]
    r = run(tasks)
    assert r.start == {"slow": 0, "blocked": 5, "ready": 6} and r.makespan == 8
    free = dispatch(tasks, {x.name: [x] for x in R})
    assert free.start == {"slow": 0, "ready": 0, "blocked": 5} and free.makespan == 6


def test_release_is_the_wait_of_the_critical_path():
    r = run(
        [
            TimedTask("early", "a", 1),
            TimedTask("late", "a", 2, release=4),
            TimedTask("last", "b", 3, ("late",)),
        ]
    )
    assert (r.critical_path, r.wait, r.makespan) == (["late", "last"], 4, 9)


# Modes


def test_the_three_modes_by_hand():
    """Durations by round, a: 1 1 1, b: 1 1, c: 4 1. c delays b in round 1 and a in round 2, or both
    in round 1.
    """
    tasks = [
        TimedTask(n, n[0], s)
        for n, s in (("a0", 1), ("a1", 1), ("a2", 1), ("b0", 1), ("b1", 1), ("c0", 4), ("c1", 1))
    ]
    assert run(tasks).start == {"a0": 0, "a1": 1, "a2": 2, "b0": 0, "b1": 1, "c0": 0, "c1": 4}
    assert run(tasks, "neighbour").start == {
        "a0": 0,
        "a1": 1,
        "a2": 5,
        "b0": 0,
        "b1": 4,
        "c0": 0,
        "c1": 4,
    }
    r = run(tasks, "lock-step")
    assert r.start == {"a0": 0, "a1": 4, "a2": 5, "b0": 0, "b1": 4, "c0": 0, "c1": 4}
    assert r.critical_path[0] == "c0" and r.makespan == 6


def test_an_idle_round_passes_the_delay_on():
    """b has nothing to do after its first task; c's delay still reaches a through it."""
    tasks = [TimedTask(("a", k), "a", 1) for k in range(4)] + [
        TimedTask("b", "b", 1),
        TimedTask("c", "c", 10),
    ]
    assert [run(tasks, "neighbour").start["a", k] for k in range(4)] == [0, 1, 10, 11]
    assert [run(tasks, "lock-step").start["a", k] for k in range(4)] == [0, 10, 11, 12]


@pytest.mark.parametrize(("link", "makespan"), [(True, 3 + 2 + 5), (False, 5 + 2 + 5)])
def test_a_message_belongs_to_the_round_of_its_sender(link, makespan):
    """As a link a's message overlaps the 5 s of b's first task; as a device it has a round of its
    own.
    """
    tasks = [
        TimedTask("send", "a", 3),
        TimedTask("busy", "b", 5),
        TimedTask("message", "x", 2, ("send",)),
        TimedTask("receive", "b", 5, ("message",)),
    ]
    resources = [*R, Resource("x", link=True) if link else Resource("x")]
    assert run(tasks, "lock-step", resources).makespan == makespan
    prefetch = [
        TimedTask("fetched", "x", 9),
        *tasks,
    ]  # a message that nobody sends goes in the first round
    assert run(prefetch, "lock-step", resources).start["receive"] == 9 + 2


@quick
@given(graphs())
def test_modes_are_ordered(tasks):
    spans = [run(tasks, mode) for mode in MODES]
    assert spans[0].makespan <= spans[1].makespan <= spans[2].makespan
    for task in tasks:
        assert spans[0].start[task.id] <= spans[1].start[task.id] <= spans[2].start[task.id]


@quick
@given(graphs())
def test_neighbours_of_all_is_lock_step_and_of_none_is_asynchronous(tasks):
    everyone = simulate(tasks, R, "neighbour", {x: [y for y in "abc" if y != x] for x in "abc"})
    assert everyone.start == run(tasks, "lock-step").start
    assert simulate(tasks, R, "neighbour", {}).start == run(tasks).start


# Oracles and bounds


@quick
@given(graphs())
def test_asynchronous_starts_are_the_least_fixed_point(tasks):
    """Raise every start until all constraints hold: Bellman-Ford, knowing nothing of topological
    orders.
    """
    start = {t.id: float(t.release) for t in tasks}
    size = {t.id: t.size for t in tasks}
    queue = {
        t.id: [s.id for s in tasks[:n] if s.resource == t.resource] for n, t in enumerate(tasks)
    }
    for _ in tasks:
        for t in tasks:
            start[t.id] = max(
                [start[t.id], *(start[d] + size[d] for d in (*t.after, *queue[t.id]))]
            )
    assert run(tasks).start == start


@quick
@given(graphs(release=False))
def test_lock_step_is_a_sum_of_maxima(tasks):
    """A round per task, found by itself; the makespan is the sum over rounds of the longest
    task.
    """
    rounds = {}
    for n, t in enumerate(tasks):
        before = [s.id for s in tasks[:n] if s.resource == t.resource]
        rounds[t.id] = 1 + max((rounds[d] for d in (*t.after, *before)), default=-1)
    longest = [
        max(t.size for t in tasks if rounds[t.id] == k) for k in range(1 + max(rounds.values()))
    ]
    assert run(tasks, "lock-step").makespan == sum(longest)


@quick
@given(graphs(), st.sampled_from([*MODES, *RULES]))
def test_every_schedule_is_valid_and_explained(tasks, how):
    r = run(tasks, how) if how in MODES else dispatch(tasks, {x.name: [x] for x in R}, how)
    by_id = {t.id: t for t in tasks}
    assert all(r.start[t.id] >= max([t.release, *(r.end[d] for d in t.after)]) for t in tasks)
    for one, two in itertools.combinations(tasks, 2):
        if one.resource == two.resource:
            assert r.end[one.id] <= r.start[two.id] or r.end[two.id] <= r.start[one.id]
    work = {x: sum(t.size for t in tasks if t.resource == x) for x in "abc"}
    assert r.busy == work and r.makespan >= max(*work.values(), longest_chain(tasks))
    assert all(r.busy[x] + r.idle[x] == r.makespan >= r.span[x] >= r.busy[x] for x in "abc")
    assert r.wait + sum(by_id[n].size for n in r.critical_path) == r.makespan == max(r.end.values())
    assert r.start[r.critical_path[0]] == r.wait == by_id[r.critical_path[0]].release
    assert all(r.end[x] == r.start[y] for x, y in itertools.pairwise(r.critical_path))
    if how not in ("neighbour", "lock-step"):
        linked = [
            x in by_id[y].after or r.ran_on[x] == r.ran_on[y]
            for x, y in itertools.pairwise(r.critical_path)
        ]
        assert all(linked)


@quick
@given(graphs(), st.sampled_from(MODES))
def test_twice_the_speed_halves_every_time(tasks, mode):
    slow = [Resource(r.name, 3.0, 2.0) for r in R]
    fast = [Resource(r.name, 1.5, 1.0) for r in R]
    tasks = [dataclasses.replace(t, release=0.0) for t in tasks]
    one, two = run(tasks, mode, slow), run(tasks, mode, fast)
    assert {
        t: x / 2 for t, x in one.start.items()
    } == two.start and one.makespan == 2 * two.makespan


@quick
@given(graphs(), st.data(), st.sampled_from(MODES))
def test_longer_tasks_never_end_earlier_in_a_given_order(tasks, data, mode):
    n = data.draw(st.integers(0, len(tasks) - 1))
    longer = [*tasks[:n], dataclasses.replace(tasks[n], size=tasks[n].size + 1), *tasks[n + 1 :]]
    before, after = run(tasks, mode), run(longer, mode)
    assert all(before.end[t.id] <= after.end[t.id] for t in tasks)


@quick
@given(graphs(), st.data())
def test_an_added_task_never_shortens_an_asynchronous_order(tasks, data):
    n = data.draw(st.integers(0, len(tasks)))
    added = TimedTask("new", data.draw(st.sampled_from("abc")), data.draw(st.integers(0, 5)))
    before, after = run(tasks), run([*tasks[:n], added, *tasks[n:]])
    assert all(before.end[t.id] <= after.end[t.id] for t in tasks)


def test_an_added_task_can_shorten_lock_step():
    """An empty first round on a moves its long task beside b's: the claim above is true of no other
    mode.
    """
    tasks = [TimedTask("a0", "a", 10), TimedTask("b0", "b", 1), TimedTask("b1", "b", 10)]
    assert run(tasks, "lock-step").makespan == 20
    assert run([TimedTask("empty", "a", 0), *tasks], "lock-step").makespan == 11


# Greedy choice


@quick
@given(graphs(), st.sampled_from(RULES), st.integers(1, 3))
def test_dispatch_is_greedy_and_picks_by_its_rule(tasks, rule, width):
    """A task waits only while all machines of its pool are taken, and whoever goes first there has
    the better key.
    """
    tasks = [
        dataclasses.replace(t, size=t.size + 1) for t in tasks
    ]  # an empty task lets others in at the same time
    pools = {x: [Resource(f"{x}{k}") for k in range(width)] for x in "abc"}
    r = dispatch(tasks, pools, rule)
    ready = {t.id: max([t.release, *(r.end[d] for d in t.after)]) for t in tasks}
    key = {t.id: {"ready": ready[t.id], "list": 0, "priority": -t.priority}[rule] for t in tasks}
    for t in tasks:
        peers = [s for s in tasks if s.resource == t.resource and s.id != t.id]
        if ready[t.id] < r.start[t.id]:
            at = r.start[t.id] - 0.5
            assert sum(r.start[s.id] <= at < r.end[s.id] for s in peers) == width
        for s in peers:
            if ready[t.id] <= r.start[s.id] < r.start[t.id]:
                assert (key[s.id], s.id) < (key[t.id], t.id)
    assert all(r.ran_on[t.id][0] == t.resource for t in tasks)


@quick
@given(graphs(most=16, release=False), st.integers(1, 4))
def test_graham_bound(tasks, m):
    r = list_schedule(tasks, [Resource(f"machine {k}") for k in range(m)])
    work, chain = sum(t.size for t in tasks), longest_chain(tasks)
    assert max(chain, work / m) <= r.makespan
    assert m * r.makespan <= work + (m - 1) * chain <= (2 * m - 1) * max(chain, work / m) + 1e-9


@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_graham_bound_is_reached(m):
    """m(m−1) tasks of 1 s before one of m s: 2m − 1 seconds, the optimum is m."""
    short = [TimedTask(n, "", 1) for n in range(m * (m - 1))]
    machines = [Resource(str(k)) for k in range(m)]
    assert list_schedule([*short, TimedTask("long", "", m)], machines).makespan == 2 * m - 1
    assert list_schedule([TimedTask("long", "", m), *short], machines).makespan == m


def test_graham_anomalies():
    """Graham 1969, fig. 2-5: nine tasks take 12 s; more machines, shorter tasks or fewer
    dependencies take longer.
    """
    size = dict(zip(range(1, 10), (3, 2, 2, 2, 4, 4, 4, 4, 9), strict=True))
    after = {9: (1,), 5: (4,), 6: (4,), 7: (4,), 8: (4,)}

    def makespan(machines, size=size, after=after):
        tasks = [TimedTask(n, "", s, after.get(n, ())) for n, s in size.items()]
        return list_schedule(tasks, [Resource(str(k)) for k in range(machines)]).makespan

    assert makespan(3) == 12
    assert makespan(4) == 15
    assert makespan(3, size={n: s - 1 for n, s in size.items()}) == 13
    assert makespan(3, after={n: d for n, d in after.items() if n > 6}) == 16


def test_priority_and_machines_of_two_speeds():
    tasks = [TimedTask("low", "p", 4), TimedTask("high", "p", 4, priority=1)]
    tasks += [TimedTask("late", "p", 4, priority=-1), TimedTask("last", "p", 1, priority=-2)]
    r = dispatch(tasks, {"p": [Resource("fast", 0, 1), Resource("slow", 1, 2)]}, "priority")
    assert r.ran_on == {"high": "fast", "low": "slow", "late": "fast", "last": "fast"}
    assert r.end == {"high": 4, "low": 9, "late": 8, "last": 9}


# Memory


def test_memory_lives_from_the_allocating_start_to_the_freeing_end():
    tasks = [
        TimedTask("f0", "a", 1, (), (("d", 5),)),
        TimedTask("f1", "a", 1, (), (("d", 7),)),
        TimedTask("b0", "a", 1, ("f0",), (), (("d", 5),)),
        TimedTask("f2", "a", 1, (), (("d", 4),)),
    ]
    r = run(tasks)
    assert (r.peak_bytes, r.held_bytes) == ({"d": 12}, {"d": 11})


def test_what_ends_frees_before_what_starts_allocates():
    swap = [
        TimedTask("old", "a", 2, (), (("d", 8),), (("d", 8),)),
        TimedTask("new", "b", 2, ("old",), (("d", 8),), (("d", 8),)),
    ]
    assert run(swap).peak_bytes == {"d": 8}
    instant = [
        TimedTask("old", "a", 0, (), (("d", 8),)),
        TimedTask("new", "b", 0, ("old",), (("d", 3),), (("d", 11),)),
    ]
    assert run(instant).peak_bytes == run(instant[::-1]).peak_bytes == {"d": 11}


@quick
@given(graphs(), st.sampled_from(MODES))
def test_peak_memory_is_what_a_scan_finds(tasks, mode):
    tasks = [dataclasses.replace(t, size=t.size + 1) for t in tasks]
    r = run(tasks, mode)
    for device in "abc":
        assert r.peak_bytes.get(device, 0) == peak_by_scan(tasks, r, device)
    assert not any(r.held_bytes.values())


# Errors


@pytest.mark.parametrize(
    "solve", [run, lambda tasks: list_schedule(tasks, R)], ids=["simulate", "list_schedule"]
)
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([TimedTask("x", "a", 1), TimedTask("x", "b", 1)], "task 'x' is given twice"),
        ([TimedTask("x", "a", 1, ("y",))], "task 'x' depends on unknown task 'y'"),
        ([TimedTask("x", "a", -1)], "task 'x': size=-1"),
        ([TimedTask("x", "a", math.nan)], "task 'x': size=nan"),
        ([TimedTask("x", "a", 1, release=-2)], "release=-2"),
        ([TimedTask("x", "a", 1, release=math.inf)], "release=inf"),
        ([TimedTask("x", "a", 1, (), (("d", -3),))], "task 'x': -3 bytes on 'd'"),
        (
            [TimedTask("x", "a", 1, (), (), (("d", 3),))],
            "'d' holds 0.0 bytes at 1.* task 'x' frees 3",
        ),
        ([TimedTask("x", "a", 1, ("x",))], "dependency cycle: 'x' after 'x'"),
        (
            [
                TimedTask("u", "a"),
                TimedTask("x", "a", 1, ("y",)),
                TimedTask("y", "b", 1, ("z",)),
                TimedTask("z", "c", 1, ("x",)),
            ],
            "dependency cycle: 'x' after 'y' after 'z' after 'x'",
        ),
    ],
)
def test_bad_tasks(solve, tasks, message):
    with pytest.raises(ValueError, match=message):
        solve(tasks)


def test_an_order_that_deadlocks_names_who_waits_for_whom():
    """Each device wants to receive before it sends."""
    tasks = [
        TimedTask("a gets", "a", 1, ("b sends",)),
        TimedTask("a sends", "a", 1),
        TimedTask("b gets", "b", 1, ("a sends",)),
        TimedTask("b sends", "b", 1),
    ]
    with pytest.raises(ValueError, match="queue order deadlocks") as e:
        run(tasks)
    for part in (
        "'a gets' waits for 'b sends' (dependency)",
        "'b sends' waits for 'b gets' (before it in the queue",
    ):
        assert part in str(e.value)
    assert dispatch(tasks, {x.name: [x] for x in R}).makespan == 2


@quick
@given(graphs(), st.randoms(use_true_random=False))
def test_any_order_runs_or_is_reported(tasks, random):
    """Brute force: play the queues by hand until nothing moves; the verdict must be the same."""
    random.shuffle(tasks)
    queues = {x: [t for t in tasks if t.resource == x] for x in "abc"}
    done = set()
    while moving := [q for q in queues.values() if q and set(q[0].after) <= done]:
        done.add(moving[0].pop(0).id)
    if len(done) == len(tasks):
        assert len(run(tasks).end) == len(tasks)
    else:
        with pytest.raises(ValueError, match="queue order deadlocks"):
            run(tasks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: run([TimedTask("x", "gpu")]),
            "'x' names unknown resource 'gpu': known are a, b, c",
        ),
        (
            lambda: run([], "sync"),
            "unknown mode 'sync': choose one of asynchronous, neighbour, lock-step",
        ),
        (lambda: simulate([], R, "neighbour"), "give neighbours with mode 'neighbour' only"),
        (lambda: simulate([], R, "lock-step", {}), "give neighbours with mode 'neighbour' only"),
        (lambda: simulate([], R, "neighbour", {"a": ["z"]}), "unknown resource 'z'"),
        (lambda: simulate([], [R[0], R[0]]), "resource 'a' is given twice"),
        (lambda: simulate([], [Resource("x", -1.0)]), "resource 'x': seconds = -1.0"),
        (lambda: simulate([], [Resource("x", 0.0, math.inf)]), "must be finite"),
        (
            lambda: dispatch([], {"p": R}, "fifo"),
            "unknown rule 'fifo': choose one of ready, list, priority",
        ),
        (lambda: dispatch([], {"p": []}), r"pools without machines: \['p'\]"),
        (lambda: dispatch([TimedTask("x", "q")], {"p": R}), "'x' names unknown resource 'q'"),
        (lambda: list_schedule([], []), "at least one machine"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_hundred_thousand_tasks_take_seconds():
    tasks = [TimedTask(n, "abc"[n % 3], 1.0, (n - 1,) if n else ()) for n in range(100_000)]
    for solve in (run, lambda t: dispatch(t, {x.name: [x] for x in R})):
        begun = time.process_time()
        r = solve(tasks)
        assert r.makespan == len(r.critical_path) == 100_000
        assert (
            time.process_time() - begun < 5
        )  # about 0.6 s on one 2020s core: no quadratic step hides here
