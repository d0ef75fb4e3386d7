"""Searched schedules: bounds, certificates, legality, and what list scheduling finds unaided."""

import itertools
import math
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.parallel.pipeline.bound import lower_bound, needed_bytes
from fdp.parallel.pipeline.certificate import certificate
from fdp.parallel.pipeline.check import check
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.fixed import gpipe, interleaved_zero_bubble, one_f_one_b, zb_h1, zbv
from fdp.parallel.pipeline.follow import Follower
from fdp.parallel.pipeline.greedy import Knobs, Line
from fdp.parallel.pipeline.orders import Op, Order
from fdp.parallel.pipeline.placement import looped, wave
from fdp.parallel.pipeline.polish import polish
from fdp.parallel.pipeline.search import search

fast = pytest.mark.fast
HALVES = np.r_[np.full(16, 0.25), np.ones(16)]  # microbatch costs


def scaled(times, shares):
    return Costs(*[t * np.asarray(shares)[None] for t in times], activation=1, stash=0.4)


def uneven(rng, p, v, m):
    """Unlike virtual stages and microbatches, in whole seconds and bytes."""
    F, B, W = (rng.integers(0, 9, (p * v, m)) for _ in range(3))
    activation = rng.integers(2, 6, (p * v, m))
    stash = activation // 2
    return Costs(F, B, W, send=float(rng.integers(0, 2)), activation=activation, stash=stash)


@fast
@pytest.mark.parametrize(
    ("placement", "bubble"), [(looped(8), 0.0886), (wave(8), 0.0464), (looped(8, 3), 0.0314)]
)
def test_list_scheduling_finds_known_schedules(placement, bubble):
    """At equal costs and the memory of 1F1B, p = 8, m = 24: the bubbles of ZB-H1, of ZBV and of
    interleaved zero bubble with 3 chunks."""
    p, m = 8, 24
    costs = Costs(activation=1, stash=0.5)
    line = Line(placement, costs.on(placement, m), [p] * p, range(m))
    seconds, ops = line.run(Knobs(1.0, (0.0,) * p, (0.0,) * p))
    r = evaluate(line.order(ops), costs)
    assert (round(r.bubble, 4), max(r.peak_bytes)) == (bubble, pytest.approx(p))
    assert seconds == pytest.approx(r.makespan)
    fixed = {1: zb_h1(p, m), 2: zbv(p, m), 3: interleaved_zero_bubble(p, m, 3)}[placement.v]
    assert r.makespan == evaluate(fixed, costs).makespan


PLACEMENTS = st.sampled_from([looped, wave])


@fast
@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**16), PLACEMENTS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_list_schedules_are_legal_within_any_possible_cap(seed, place, p, v, m):
    """Even at the least memory nothing deadlocks, with any knobs and any sequence."""
    rng = np.random.default_rng(seed)
    placement, costs = place(p, v), uneven(rng, p, v, m)
    caps = np.array(needed_bytes(placement, m, costs)) + rng.integers(0, 9, p)
    patience, hold = (tuple(rng.choice([0.0, 0.5, 1.5], p)) for _ in range(2))
    knobs = Knobs(
        rng.uniform(0, 2), patience, hold, int(rng.integers(0, 3)), int(rng.integers(0, 3))
    )
    line = Line(placement, costs.on(placement, m), caps, rng.permutation(m).tolist())
    seconds, ops = line.run(knobs)
    order = line.order(ops)
    check(order)
    r = evaluate(order, costs)
    assert (np.array(r.peak_bytes) <= caps + 1e-6).all()
    least = lower_bound(placement, m, costs, caps)
    assert least <= r.makespan * (1 + 1e-9) and r.makespan <= seconds * (1 + 1e-4) + 1e-9
    better = polish(order, costs, caps, 20, seed)
    check(better)
    s = evaluate(better, costs)
    assert s.makespan <= r.makespan and (np.array(s.peak_bytes) <= caps + 1e-6).all()


@fast
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 6))
def test_followers_keep_the_order_of_f_and_b(seed, p, m):
    rng = np.random.default_rng(seed)
    order = [one_f_one_b, gpipe, zb_h1, zbv][seed % 4](p, m)
    costs = uneven(rng, p, order.placement.v, m)
    caps = evaluate(order, costs).peak_bytes
    follower = Follower(order, costs, caps)
    seconds, ops = follower.run(tuple(rng.choice([0.0, 0.5, 1.0], p)))
    if seconds == math.inf:
        return  # a stash that waits can make a cap too small
    found = follower.order(ops)
    check(found)
    r = evaluate(found, costs)
    assert r.makespan == pytest.approx(seconds)
    assert all(a <= b + 1e-6 for a, b in zip(r.peak_bytes, caps, strict=True))
    main = [[op for op in ops if op.kind != "W"] for ops in found.ops]
    assert main == [[op._replace(kind=op.kind[0]) for op in x if op.kind != "W"] for x in order.ops]
    moved = follower.relabelled(rng.permutation(m).tolist()).exchanged(random.Random(seed))
    assert moved.run((0.0,) * p)[0] > 0 or seconds == 0


@fast
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_searched_is_no_slower_than_any_fixed_order_and_keeps_its_cap(seed, p, m, staged):
    rng = np.random.default_rng(seed)
    v = int(rng.integers(1, 4)) if staged else 1
    costs = uneven(rng, p, v, m)
    cap = max(needed_bytes(looped(p, v), m, costs)) + float(rng.integers(0, 20))
    found = search(p, m, costs, cap, effort=0.02, seed=seed)
    best = found.best
    check(best.order)
    r = evaluate(best.order, costs)
    assert r.makespan == best.makespan and max(r.peak_bytes) <= cap + 1e-6
    for rival in found.rivals:
        assert rival.lost or best.makespan <= rival.makespan
        assert rival.lost or max(rival.result.peak_bytes) <= cap + 1e-6
    assert found.bound <= best.makespan * (1 + 1e-9)


@fast
def test_certificate_of_a_sequence_that_the_order_leaves():
    """No order of the sequence reaches the makespan, so nothing of it can beat it."""
    costs = scaled((1, 1, 1), [1.0, 4.0])
    best = search(2, 2, costs, 2, [looped(2)], effort=0.1).best.makespan
    slow = certificate(looped(2), 2, costs, [2, 2], best, [1, 0])
    assert slow.proven and slow.bound == best
    assert certificate(looped(2), 2, costs, [2, 2], best).proven


def every_order(p, m):
    """All orders of one chunk that keep the microbatches in sequence by kind."""
    lists = []
    for kinds in set(itertools.permutations("F" * m + "B" * m + "W" * m)):
        count = dict.fromkeys("FBW", 0)
        ops = []
        for kind in kinds:
            ops.append(Op(kind, count[kind]))
            count[kind] += 1
            if not count["F"] >= count["B"] >= count["W"]:
                break
        else:
            lists.append(tuple(ops))
    return [Order(looped(p), choice) for choice in itertools.product(lists, repeat=p)]


@fast
@pytest.mark.parametrize(("times", "cap"), [((1, 2, 1), 2), ((2, 3, 2), 1), ((1, 1, 3), 1.4)])
def test_certificate_is_the_least_of_all_orders(times, cap):
    """Two devices, two microbatches: all orders, brute force."""
    costs = Costs(*times, activation=1, stash=0.4)
    makespans = []
    for order in every_order(2, 2):
        try:
            r = evaluate(order, costs)
        except ValueError:
            continue  # deadlock
        if max(r.peak_bytes) <= cap + 1e-9:
            makespans.append(r.makespan)
    proof = certificate(looped(2), 2, costs, [cap] * 2, min(makespans))
    assert proof.bound == pytest.approx(min(makespans)) and proof.proven
    loose = certificate(looped(2), 2, costs, [cap] * 2, max(makespans) + 1)
    assert loose.bound == pytest.approx(min(makespans)) and not loose.proven


@fast
@pytest.mark.parametrize(
    ("p", "m", "times", "shares"),
    [
        (4, 8, (1, 1, 1), [1] * 8),
        (4, 8, (1, 2.28, 0.36), [1] * 8),
        (2, 8, (1, 1.26, 0.87), [1] * 8),
        (2, 4, (1, 1.26, 0.87), [0.25, 0.25, 1, 1]),
        (3, 5, (1, 1, 1), [0.25, 1, 0.5, 0.25, 1]),
    ],
)
def test_search_is_within_two_percent_of_the_optimum(p, m, times, shares):
    """Proven by HiGHS for every sequence of the microbatches."""
    costs = scaled(times, shares)
    found = search(p, m, costs, p, [looped(p)], effort=0.3)
    proof = certificate(looped(p), m, costs, [p] * p, found.best.makespan, gap=0.01, seconds=20.0)
    assert found.bound <= proof.bound * (1 + 1e-9) and proof.gap <= 0.02


@fast
def test_costs_of_virtual_stages_fix_their_number():
    p, m = 2, 4
    each = [[1.0] * m, [2.0] * m, [2.0] * m, [1.0] * m]
    found = search(p, m, Costs(each, each, each), effort=0)
    assert len(found.best.order.placement.devices) == 4
    assert {c.order.placement for c in found.rivals if c.order} == {looped(2, 2), wave(2)}


@fast
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: search(4, 4, Costs(activation=[1, 1, 3, 1]), 2.5),
            "stage 2 may hold 2.5 bytes, but any schedule holds the 1 chunks .* 3; 0.5 more",
        ),
        (lambda: search(2, 2, Costs(F=float("nan"))), "F = nan: must be finite"),
        (lambda: search(2, 2, Costs(W=-1)), "W = -1.0: must be finite and ≥ 0"),
        (lambda: search(0, 2, Costs()), "p=0"),
        (lambda: certificate(looped(8), 8, Costs(), [9.0] * 8, 99.0), r"8·8 = 64 > 32"),
        (
            lambda: certificate(looped(2), 2, Costs(activation=1), [1.0] * 3, 99.0),
            "3 memory caps for p=2",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("times", "shares", "bubble"),
    [
        ((1, 1, 1), HALVES, 0.014),
        ((1, 1.26, 0.87), HALVES, 0.023),
        ((1, 2.28, 0.36), HALVES, 0.100),
        ((1, 1.26, 0.87), None, 0.033),
        ((1, 2.28, 0.36), None, 0.088),
    ],
)
def test_search_of_32_microbatches_on_8_devices(times, shares, bubble):
    """At most 8 microbatches held: no more than the bubbles of the first trial, in 15 s of CPU.
    None: costs e^(0.6 n), n normal."""
    if shares is None:
        shares = np.exp(0.6 * np.random.default_rng(0).standard_normal(32))
    begun = time.process_time()
    found = search(8, 32, scaled(times, shares), 8.0)
    assert time.process_time() - begun < 15
    assert found.best.result.bubble <= bubble


def test_a_start_that_memory_stops_is_no_schedule() -> None:
    """List schedules of three chunks run into a dead end where 3 of 8 microbatches fit."""
    share = np.array([1.0, 0.25] * 16)[None]
    costs = Costs(share, 1.26 * share, 0.87 * share, activation=1.0, stash=0.4)
    found = search(8, 32, costs, 3.0, effort=0.0)
    assert max(found.best.result.peak_bytes) <= 3.0 + 1e-6
