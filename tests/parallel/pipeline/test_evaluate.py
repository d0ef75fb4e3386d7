"""Evaluation against the simulator, bounds of every schedule, hand-made cases."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.fixed import (
    gpipe,
    interleaved,
    interleaved_zero_bubble,
    one_f_one_b,
    zb_h1,
    zbv,
)
from fdp.parallel.pipeline.orders import Op, Order
from fdp.parallel.pipeline.placement import looped, wave
from fdp.price.simulate import MODES, simulate
from tests.parallel.pipeline.families import costs, orders
from tests.parallel.pipeline.tasks import tasks_of

pytestmark = pytest.mark.fast


def simulated(order, prices, mode):
    t = tasks_of(order, prices)
    return simulate(t.tasks, t.resources, mode, t.neighbours if mode == "neighbour" else None)


def with_heads(p, m):
    """GPipe whose head runs on every device, between all F and all B."""
    heads = tuple(Op("S", k) for k in range(m))
    return Order(looped(p), tuple((*x[:m], *heads, *x[m:]) for x in gpipe(p, m).ops))


@settings(max_examples=120, deadline=None)
@given(st.data(), orders(), st.sampled_from(MODES))
def test_evaluation_is_simulation(data, order, mode):
    """The same starts, makespan, memory and idle time, from code that shares nothing but costs."""
    prices = data.draw(costs(order))
    r, s = evaluate(order, prices, mode), simulated(order, prices, mode)
    for i, ops in enumerate(order.ops):
        for op, begun in zip(ops, r.start[i], strict=True):
            assert begun == s.start[op.kind, i, op.microbatch, op.chunk]
    assert r.makespan == s.makespan
    assert r.spans == [s.span[str(i)] for i in range(order.placement.p)]
    assert r.peak_bytes == [s.peak_bytes.get(str(i), 0) for i in range(order.placement.p)]
    assert not any(s.held_bytes.values())
    idle = np.sum(list(r.idle.values()), axis=0)
    assert idle.tolist() == [s.idle[str(i)] for i in range(order.placement.p)]
    assert min(min(x) for x in r.idle.values()) >= 0
    if prices.send:
        sent = sum(1 for name in s.start if name[0] == "send")
        assert sum(r.sent_bytes) == sent


@settings(max_examples=60, deadline=None)
@given(st.data(), orders())
def test_bounds_and_modes(data, order):
    """No less than the busiest device, a microbatch's way and each other."""
    prices = data.draw(costs(order))
    found = [evaluate(order, prices, mode) for mode in MODES]
    times = [r.makespan for r in found]
    assert times == sorted(times)
    assert times[0] >= max(found[0].busy)
    table = prices.on(order.placement, order.microbatches, order.steps)
    ways = np.sum(table.F, axis=0) + np.sum(table.B, axis=0)
    cut = sum(a != b for a, b in itertools.pairwise(order.placement.devices))
    assert times[0] >= ways.max() + 2 * cut * prices.send
    assert found[0].span <= times[0] and found[0].span >= max(found[0].busy)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from(MODES), st.sampled_from([0.0, 1.0]))
def test_heads_on_every_device(p, m, mode, send):
    """S waits for F of the last stage, and its B for the S of all: as simulated."""
    order = with_heads(p, m)
    prices = Costs(2, 3, 1, S=[[1 + (i + k) % 3 for k in range(m)] for i in range(p)], send=send)
    r, s = evaluate(order, prices, mode), simulated(order, prices, mode)
    assert r.makespan == s.makespan and r.busy == [s.busy[str(i)] for i in range(p)]
    assert all(
        r.start[i][n] == s.start[op.kind, i, op.microbatch, op.chunk]
        for i, ops in enumerate(order.ops)
        for n, op in enumerate(ops)
    )


def test_messages_delay_but_do_not_occupy_stages():
    """One microbatch through p stages: two messages per boundary on the way; stages do only their
    own work.
    """
    r = evaluate(one_f_one_b(4, 1), Costs(1, 1, 1, send=0.5, message=7.0))
    assert r.makespan == 4 * 3 + 6 * 0.5
    assert r.busy == [3.0] * 4 and r.sent_bytes == [7.0, 14.0, 14.0, 7.0]
    path = simulated(one_f_one_b(4, 1), Costs(1, 1, 1, send=0.5), "asynchronous").critical_path
    kinds = [task[0] for task in path]
    assert kinds == [*["F", "send"] * 3, "F", *["BW", "send"] * 3, "BW"]


def test_links_of_placements():
    """A looped placement wraps from the last stage to the first, a V turns there without one."""
    t = tasks_of(interleaved(4, 4, 2), Costs(send=0.25))
    forth, back = ["0>1", "1>2", "2>3", "3>0"], ["1>0", "2>1", "3>2", "0>3"]
    assert {r.name for r in t.resources if r.link} == {*forth, *back}
    assert set(t.neighbours["0"]) == {"1", "3", "0>1", "1>0", "3>0", "0>3"}
    t = tasks_of(zbv(4, 4), Costs(send=0.25))
    assert {r.name for r in t.resources if r.link} == {*forth[:3], *back[:3]}
    assert tasks_of(one_f_one_b(3, 3), Costs()).neighbours == {
        "0": ["1"],
        "1": ["0", "2"],
        "2": ["1"],
    }


def test_idle_time_by_cause():
    """1F1B on two devices, F = 1, BW = 2, a message of ½; an F more would raise the peak."""
    r = evaluate(one_f_one_b(2, 3), Costs(1, 1, 1, send=0.5, activation=1))
    # device 0: F0 F1 | waits for B0, whose device ends it at 4.5, half a second more on the way
    assert r.start[0][:3] == [0, 1, 5]
    assert r.idle["start"] == [0, 1.5]
    assert r.idle["drain"][0] == 0 and r.idle["drain"][1] == 2.5
    assert r.idle["memory"][0] == 2.5 and r.idle["send"][0] >= 0.5
    free = evaluate(gpipe(2, 3), Costs(1, 1, 1, activation=1))
    assert not any(free.idle["memory"]) and not any(free.idle["send"])
    locked = evaluate(one_f_one_b(2, 3), Costs(1, 1, 1), "lock-step")
    assert sum(locked.idle["neighbour"]) > 0


def test_costs_by_virtual_stage_or_by_device():
    """A device's numbers are shared by its chunks; a virtual stage's are its own."""
    order = zbv(2, 3)
    whole = evaluate(order, Costs([2, 4], [2, 4], [2, 4]))
    each = evaluate(order, Costs(*[[1, 2, 2, 1]] * 3))
    assert whole.makespan == each.makespan and whole.busy == each.busy == [18, 36]
    uneven = evaluate(order, Costs(*[[[1] * 3, [2] * 3, [3] * 3, [4] * 3]] * 3))
    assert uneven.busy == [3 * 3 * 5.0] * 2
    assert evaluate(gpipe(2, 3), Costs(BW=5)).busy == [18.0] * 2


def test_200_orders_a_second_of_2300_operations():
    order = interleaved_zero_bubble(8, 32, 3)
    prices = Costs(1, 1.26, 0.87, send=0.02, activation=1, stash=0.4)
    assert len(order) == 2304
    best = 1.0
    for _ in range(200):
        begun = time.process_time()
        evaluate(order, prices)
        best = min(best, time.process_time() - begun)
        if best < 1 / 200:
            return
    pytest.fail(f"{1 / best:.0f} orders/s")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate(gpipe(2, 2), Costs(), "sync"), "unknown mode 'sync'"),
        (lambda: evaluate(gpipe(3, 2), Costs([1, 1])), r"F has shape \(2,\).*\(3,\), \(3, 2\)"),
        (lambda: evaluate(gpipe(3, 2), Costs(send=-1)), r"send = -1.0: must be finite"),
        (lambda: evaluate(gpipe(2, 2), Costs(B=float("nan"))), "B = nan"),
        (lambda: evaluate(gpipe(2, 2), Costs(W=[[1, 1], [1, -2]])), r"W\[1\]\[1\] = -2.0"),
        (
            lambda: evaluate(zb_h1(3, 2), Costs(activation=2, stash=3)),
            "stash 3.0 > activation 2.0 on virtual stage 0",
        ),
        (
            lambda: evaluate(Order(looped(1), ((Op("BW", 0), Op("F", 0)),)), Costs()),
            "stage 0, row 0: BW0 of chunk 0 is too early",
        ),
        (lambda: evaluate(Order(wave(1), ()), Costs()), "0 stages, its placement p=1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
