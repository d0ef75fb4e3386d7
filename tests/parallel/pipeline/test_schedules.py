"""Pipeline schedules against closed forms, the tables of the zero-bubble paper and each other."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.parallel.pipeline.schedules import (
    Op,
    gpipe,
    interleaved,
    one_f_one_b,
    tasks_of,
    zb_h1,
    zb_h2,
)
from fdp.price.simulate import MODES, simulate

pytestmark = pytest.mark.fast

PLAIN = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb_h1": zb_h1, "zb_h2": zb_h2}
TIMES = list(
    itertools.product((1, 2, 3, 5), repeat=3)
)  # T_F, T_B, T_W: integers, so that results are exact


def run(order, f, b, w, send=0.0, mode="asynchronous", **memory):
    s = tasks_of(order, f, b, w, send, **memory)
    return simulate(s.tasks, s.resources, mode, s.neighbours if mode == "neighbour" else None)


def idle(r):
    """Idle seconds of every stage until the makespan; all stages do equal work in these tests."""
    (value,) = {t for name, t in r.idle.items() if ">" not in name}
    return value


def span_idle(r):
    """The bubble of the zero-bubble papers: longest idle time within one stage's own span."""
    return max(r.span[x] - r.busy[x] for x in r.span if ">" not in x)


def rates(r, p, work):
    """(makespan, span) bubble rates, as the papers' tables give them."""
    return round(1 - work / r.makespan, 4), round(
        1 - work / max(r.span[str(i)] for i in range(p)), 4
    )


# Closed forms


@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 5), (2, 1), (2, 4), (4, 3), (4, 8), (7, 20)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b(name, p, m):
    for f, b, w in TIMES:
        r = run(PLAIN[name](p, m), f, b, w)
        assert idle(r) == (p - 1) * (f + b + w)
        assert r.makespan == (m + p - 1) * (f + b + w)


@pytest.mark.parametrize(
    ("p", "v", "m"), [(1, 2, 3), (2, 2, 2), (2, 4, 6), (4, 2, 4), (4, 2, 8), (4, 4, 12), (8, 2, 16)]
)
def test_bubble_of_interleaved_is_divided_by_chunks(p, v, m):
    for f, b, w in [(4, 4, 4), (4, 8, 4), (8, 12, 4), (4, 12, 8)]:
        r = run(interleaved(p, m, v), f, b, w)
        assert idle(r) == (p - 1) * (f + b + w) / v


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 2), (2, 7), (4, 4), (4, 12), (8, 16)])
def test_bubble_of_zb_h1(p, m):
    """The paper's form where T_W ≤ min(T_F, T_B); W of any length fills no more than min(T_F, T_B)
    of a bubble.
    """
    for f, b, w in TIMES:
        got = idle(run(zb_h1(p, m), f, b, w))
        assert got == (p - 1) * (f + b - min(f, b, w))
        if w <= min(f, b):
            assert got == (p - 1) * (f + b - w)


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 3), (2, 8), (4, 7), (4, 12), (8, 16)])
def test_bubble_of_zb_h2(p, m):
    """The paper's form is of the span; the makespan also has the stagger of one F per stage. m ≥ 2p
    − 1.
    """
    for f, b, w in TIMES:
        r = run(zb_h2(p, m), f, b, w)
        assert span_idle(r) == (p - 1) * max(0, b - f, f + b - 2 * w)
        assert idle(r) == (p - 1) * max(f, b - f, f + b - 2 * w)
        if b <= f and 2 * w <= f + b:
            assert span_idle(r) == (p - 1) * (f + b - 2 * w)
        if f == b == w:
            assert span_idle(r) == 0 and idle(r) == (p - 1) * f


# Qi et al. 2023 (arXiv 2401.10241): T_F, T_B, T_W, T_comm in ms as profiled there, and bubble rates
# to four digits. 1F1B, H1 and H2 by span are the paper's table; H2 by makespan, the last column, is
# what a step with a barrier pays.
PAPER = [
    (8, 24, (18.522, 18.086, 9.337, 0.601), 0.2431, 0.1585, 0.1083, 0.1083),
    (8, 64, (18.546, 18.097, 9.321, 0.762), 0.1240, 0.0674, 0.0444, 0.0444),
    (8, 24, (29.718, 29.444, 19.927, 0.527), 0.2347, 0.1323, 0.0698, 0.1003),
    (8, 32, (29.802, 29.428, 19.530, 0.577), 0.1898, 0.1045, 0.0559, 0.0778),
    (16, 48, (11.347, 11.248, 8.132, 0.377), 0.2552, 0.1397, 0.0672, 0.1065),
    (32, 96, (10.419, 10.207, 7.715, 0.408), 0.2646, 0.1421, 0.0641, 0.1098),
]


@pytest.mark.parametrize(("p", "m", "times", "f1b1", "h1", "h2", "h2_makespan"), PAPER)
def test_bubble_rates_of_the_zero_bubble_paper(p, m, times, f1b1, h1, h2, h2_makespan):
    work = m * sum(times[:3])
    assert rates(run(one_f_one_b(p, m), *times), p, work) == (f1b1, f1b1)
    assert rates(run(zb_h1(p, m), *times), p, work) == (h1, h1)
    assert rates(run(zb_h2(p, m), *times), p, work) == (h2_makespan, h2)


# Makespan bubbles for p = 8, m = 16 in the three modes, from an evaluator written apart from this
# one.
SYNCHRONOUS = [
    ((1, 1, 1), (0.304, 0.429, 0.429), (0.127, 0.127, 0.127), (0.127, 0.127, 0.127)),
    ((1, 1.07, 0.96), (0.304, 0.431, 0.431), (0.138, 0.159, 0.167), (0.126, 0.155, 0.156)),
    ((1, 2, 1), (0.304, 0.475, 0.475), (0.179, 0.312, 0.366), (0.099, 0.312, 0.319)),
    ((1, 2.28, 0.36), (0.304, 0.462, 0.462), (0.260, 0.435, 0.486), (0.235, 0.409, 0.416)),
]


@pytest.mark.parametrize(("times", "f1b1", "h1", "h2"), SYNCHRONOUS)
def test_what_synchronous_exchange_costs(times, f1b1, h1, h2):
    for build, want in ((one_f_one_b, f1b1), (zb_h1, h1), (zb_h2, h2)):
        got = [
            1 - 16 * sum(times) / run(build(8, 16), *times, mode=mode).makespan for mode in MODES
        ]
        np.testing.assert_allclose(got, want, atol=6e-4)


# Memory


def peaks(r, p):
    return [r.peak_bytes[str(i)] for i in range(p)]


@pytest.mark.parametrize(("p", "m"), [(1, 4), (4, 2), (4, 4), (4, 9), (8, 16)])
def test_activations_in_flight(p, m):
    one = {"activation": 1}
    assert peaks(run(gpipe(p, m), 1, 1, 1, **one), p) == [m] * p
    assert peaks(run(one_f_one_b(p, m), 1, 1, 1, **one), p) == [min(p - i, m) for i in range(p)]
    assert peaks(run(zb_h1(p, m), 1, 1, 1, **one), p) == [min(p - i, m) for i in range(p)]
    assert peaks(run(zb_h2(p, m), 1, 1, 1, **one), p) == [min(2 * (p - i) - 1, m) for i in range(p)]


@pytest.mark.parametrize(("p", "v"), [(2, 2), (4, 2), (8, 2), (4, 4)])
def test_activations_in_flight_of_interleaved(p, v):
    """p + (p − 1)/v on the first stage (Korthikanti et al. 2022, arXiv 2205.05198); two chunks less
    per stage.
    """
    r = run(interleaved(p, 2 * p, v), 1, 1, 1, activation=v)
    assert peaks(r, p) == [v * p + p - 1 - 2 * i for i in range(p)]


def test_stash_is_held_until_the_weight_gradient():
    """Stage i of ZB-H1 delays i weight gradients: even if nothing is freed before W, no stage holds
    more than p.
    """
    p, m = 4, 12
    for kept in (0, 1, 3, 4):
        r = run(zb_h1(p, m), 1, 1, 1, activation=4, stash=kept)
        assert peaks(r, p) == [4 * (p - i) + kept * i for i in range(p)]
        assert not any(r.held_bytes.values())
    r = run(one_f_one_b(p, m), 1, 1, 1, activation=4, stash=4)
    assert peaks(r, p) == [4 * (p - i) for i in range(p)]


# Relations


@pytest.mark.parametrize("name", PLAIN)
def test_long_runs_cost_the_slowest_stage(name):
    """T / (m · max_i T_i) falls to 1 as m grows, whatever the other stages do."""
    f, b, w = [2, 3, 5, 1], [2, 3, 5, 1], [2, 3, 5, 1]
    ratios = [run(PLAIN[name](4, m), f, b, w).makespan / (m * 15) for m in (4, 16, 64, 256)]
    assert ratios == sorted(ratios, reverse=True) and 1 < ratios[-1] < 1.05
    one = run(interleaved(4, 256, 2), f, b, w).makespan / (256 * 15)
    assert 1 < one < 1.05


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([*PLAIN, "interleaved"]), st.integers(1, 5), st.integers(1, 8))
def test_any_times_run_in_every_mode(data, name, p, m):
    """No deadlock, modes ordered, memory returned, and no less than each stage's own work and one
    microbatch's way.
    """
    m = m if name in PLAIN else p * -(-m // p)
    order = PLAIN[name](p, m) if name in PLAIN else interleaved(p, m, 2)
    f, b, w = (
        np.array(data.draw(st.lists(st.integers(0, 9), min_size=p, max_size=p))) * 2
        for _ in range(3)
    )
    send = data.draw(st.sampled_from([0, 1, 3]))
    spans = []
    for mode in MODES:
        r = run(order, f, b, w, send, mode, activation=2, stash=1)
        assert not any(r.held_bytes.values())
        assert all(r.busy[str(i)] == m * (f + b + w)[i] for i in range(p))
        assert r.makespan >= max(m * (f + b + w).max(), (f + b).sum() + 2 * (p - 1) * send)
        spans.append(r.makespan)
    assert spans == sorted(spans)


def test_times_per_microbatch():
    """Sorting equal-sum microbatches by cost shortens 1F1B: idle time is that of the most expensive
    one alone.
    """
    p, m = 8, 32
    cost = np.where(np.arange(m) % 2, 0.25, 1.0)
    alternate = run(one_f_one_b(p, m), *[np.tile(cost, (p, 1))] * 3)
    ordered = run(one_f_one_b(p, m), *[np.tile(np.sort(cost), (p, 1))] * 3)
    assert rates(alternate, p, 3 * cost.sum())[0] == pytest.approx(0.476, abs=6e-4)
    assert rates(ordered, p, 3 * cost.sum())[0] == pytest.approx(0.259, abs=6e-4)
    assert idle(ordered) == (p - 1) * 3 * 1.0


def test_messages_delay_but_do_not_occupy_stages():
    """One microbatch through p stages: two messages per boundary on the way; stages do only their
    own work.
    """
    r = run(one_f_one_b(4, 1), 1, 1, 1, send=0.5)
    assert r.makespan == 4 * 3 + 6 * 0.5
    assert r.busy["0"] == 3 and r.busy["0>1"] == r.busy["1>0"] == 0.5
    kinds = [task[0] for task in r.critical_path]
    assert kinds == [*["F", "send"] * 3, "F", *["BW", "send"] * 3, "BW"]


def test_interleaved_wraps_from_the_last_stage_to_the_first():
    s = tasks_of(interleaved(4, 4, 2), 1, 1, 1, send=0.25)
    assert {r.name for r in s.resources if r.link} == {
        "0>1",
        "1>2",
        "2>3",
        "3>0",
        "1>0",
        "2>1",
        "3>2",
        "0>3",
    }
    assert set(s.neighbours["0"]) == {"1", "3", "0>1", "1>0", "3>0", "0>3"}
    assert tasks_of(one_f_one_b(3, 3), 1, 1, 1).neighbours == {
        "0": ["1"],
        "1": ["0", "2"],
        "2": ["1"],
    }


def test_orders_by_hand():
    def names(ops):
        return " ".join(
            f"{op.kind}{op.microbatch}" + (f".{op.chunk}" if op.chunk else "") for op in ops
        )

    assert names(gpipe(2, 2)[0]) == "F0 F1 BW0 BW1"
    assert names(one_f_one_b(2, 3)[0]) == "F0 F1 BW0 F2 BW1 BW2"
    assert names(one_f_one_b(2, 3)[1]) == "F0 BW0 F1 BW1 F2 BW2"
    assert names(zb_h1(2, 3)[0]) == "F0 F1 B0 W0 F2 B1 W1 B2 W2"
    assert names(zb_h1(2, 3)[1]) == "F0 B0 F1 B1 W0 F2 B2 W1 W2"
    assert names(zb_h2(2, 4)[0]) == "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3"
    assert names(zb_h2(2, 4)[1]) == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"
    assert names(interleaved(2, 2, 2)[0]) == "F0 F1 F0.1 F1.1 BW0.1 BW1.1 BW0 BW1"
    assert names(interleaved(2, 2, 2)[1]) == "F0 F1 F0.1 BW0.1 F1.1 BW1.1 BW0 BW1"
    assert interleaved(3, 5, 1) == one_f_one_b(3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gpipe(0, 1), "p=0, m=1"),
        (lambda: zb_h2(2, 0), "p=2, m=0"),
        (lambda: interleaved(4, 6, 2), "m % p = 6 % 4 = 2, must be 0: set m=8"),
        (lambda: interleaved(4, 8, 0), "got v=0"),
        (lambda: tasks_of([], 1, 1, 1), "at least one stage"),
        (lambda: tasks_of([[Op("G", 0)]], 1, 1, 1), "stage 0: unknown operation"),
        (lambda: tasks_of([[Op("F", 0)]], 1, 1, 1), "stage 0 must run F, B and W once"),
        (
            lambda: tasks_of(
                [[Op("F", 0), Op("BW", 0)], [Op("F", 0), Op("BW", 0), Op("W", 0)]], 1, 1, 1
            ),
            "stage 1 must",
        ),
        (
            lambda: tasks_of(gpipe(3, 2), [1, 1], 1, 1),
            r"shape \(2,\): give a number, \[p\] = \[3\]",
        ),
        (lambda: tasks_of(gpipe(3, 2), 1, 1, 1, send=-1), "send=-1 s"),
        (lambda: tasks_of(gpipe(3, 2), 1, 1, 1, activation=2, stash=3), "stash 3 > activation 2"),
        (lambda: run(gpipe(2, 2), 1, -1, 0), "size=-1.0"),
        (lambda: run([[Op("BW", 0), Op("F", 0)]], 1, 1, 1), "queue order deadlocks: .*'BW'.*'F'"),
        (
            lambda: run([[Op("F", 0), Op("W", 0), Op("B", 0)]], 1, 1, 1),
            "queue order deadlocks: .*'W'.*'B'",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
