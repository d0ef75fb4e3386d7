"""Fixed schedules against closed forms, published tables and each other."""

import itertools

import numpy as np
import pytest

from fdp.parallel.pipeline import published
from fdp.parallel.pipeline.controllable import v_half, v_min
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.fixed import (
    dualpipe_v,
    gpipe,
    interleaved,
    interleaved_zero_bubble,
    one_f_one_b,
    skip_wave,
    zb_h1,
    zb_h2,
    zbv,
)
from fdp.parallel.pipeline.heuristics import Times, zb_heuristic, zbv_heuristic
from fdp.parallel.pipeline.orders import recompute, relabel, repeat, split_backward
from fdp.parallel.pipeline.placement import looped, wave
from fdp.price.simulate import MODES

pytestmark = pytest.mark.fast

PLAIN = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb_h1": zb_h1, "zb_h2": zb_h2}
# T_F, T_B, T_W: integers, so that results are exact
TIMES = list(itertools.product((1, 2, 3, 5), repeat=3))
HELD = {"activation": 1, "stash": 0.5}


def run(order, *times, send=0.0, mode="asynchronous", **memory):
    return evaluate(order, Costs(*times, send=send, **memory), mode)


def idle(r):
    """Idle seconds of every device until the makespan; all do equal work in these tests."""
    (value,) = {r.makespan - busy for busy in r.busy}
    return value


def span_idle(r):
    """The bubble of the zero-bubble papers: longest idle time within one device's own span."""
    return max(span - busy for span, busy in zip(r.spans, r.busy, strict=True))


def rates(r):
    """(makespan, span) bubble rates, as the papers' tables give them."""
    return round(r.bubble, 4), round(r.span_bubble, 4)


# Closed forms


@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 5), (2, 1), (2, 4), (4, 3), (4, 8), (7, 20)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b(name, p, m):
    for times in TIMES[::3]:
        r = run(PLAIN[name](p, m), *times)
        assert idle(r) == (p - 1) * sum(times)
        assert r.makespan == (m + p - 1) * sum(times)


@pytest.mark.parametrize(
    ("p", "v", "m"), [(1, 2, 3), (2, 2, 2), (2, 4, 6), (4, 2, 4), (4, 2, 8), (4, 4, 12), (8, 2, 16)]
)
def test_bubble_of_interleaved_is_divided_by_chunks(p, v, m):
    for f, b, w in [(4, 4, 4), (4, 8, 4), (8, 12, 4), (4, 12, 8)]:
        assert idle(run(interleaved(p, m, v), f, b, w)) == (p - 1) * (f + b + w) / v
        if w <= f <= b:
            r = run(interleaved_zero_bubble(p, m, v), 4, 4, 4)
            assert idle(r) == (p - 1) * 4 / v


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 2), (2, 7), (4, 4), (4, 12), (8, 16)])
def test_bubble_of_zb_h1(p, m):
    """The paper's form where T_W ≤ min(T_F, T_B); W of any length fills no more than min(T_F, T_B)
    of a bubble.
    """
    for f, b, w in TIMES[::2]:
        got = idle(run(zb_h1(p, m), f, b, w))
        assert got == (p - 1) * (f + b - min(f, b, w))
        if w <= min(f, b):
            assert got == (p - 1) * (f + b - w)


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 3), (2, 8), (4, 7), (4, 12), (8, 16)])
def test_bubble_of_zb_h2(p, m):
    """The paper's form is of the span; the makespan also has the stagger of one F per stage. m ≥ 2p
    − 1.
    """
    for f, b, w in TIMES[::2]:
        r = run(zb_h2(p, m), f, b, w)
        assert span_idle(r) == (p - 1) * max(0, b - f, f + b - 2 * w)
        assert idle(r) == (p - 1) * max(f, b - f, f + b - 2 * w)
        if f == b == w:
            assert span_idle(r) == 0 and idle(r) == (p - 1) * f


@pytest.mark.parametrize("model", published.ZERO_BUBBLE, ids=lambda x: f"{x.model}-{x.m}")
def test_bubble_rates_of_the_zero_bubble_paper(model):
    found, p = published.zero_bubble_results(model), model.p
    assert [rates(r) for r in found] == list(zip(model.makespans, model.spans, strict=True))
    limits = (p, p, 2 * p - 1, p, 2 * p, p)
    assert all(max(r.peak_bytes) <= limit + 1e-6 for r, limit in zip(found, limits, strict=True))


# Makespan bubbles for p = 8, m = 16 in the three modes, from an evaluator written apart from this
# one: 1F1B, H1, H2, ZBV.
SYNCHRONOUS = {
    (1, 1, 1): ((0.304, 0.429, 0.429), *[(0.127,) * 3] * 2, (0.068,) * 3),
    (1, 1.07, 0.96): (
        (0.304, 0.431, 0.431),
        (0.138, 0.159, 0.167),
        (0.126, 0.155, 0.156),
        (0.072, 0.094, 0.103),
    ),
    (1, 2, 1): (
        (0.304, 0.475, 0.475),
        (0.179, 0.312, 0.366),
        (0.099, 0.312, 0.319),
        (0.099, 0.224, 0.319),
    ),
    (1, 2.28, 0.36): (
        (0.304, 0.462, 0.462),
        (0.260, 0.435, 0.486),
        (0.235, 0.409, 0.416),
        (0.185, 0.377, 0.464),
    ),
}


@pytest.mark.parametrize("times", SYNCHRONOUS)
def test_what_synchronous_exchange_costs(times):
    orders = (one_f_one_b(8, 16), zb_h1(8, 16), zb_h2(8, 16), zbv_heuristic(8, 16, Times(*times)))
    for order, want in zip(orders, SYNCHRONOUS[times], strict=True):
        got = [run(order, *times, mode=mode).bubble for mode in MODES]
        np.testing.assert_allclose(got, want, atol=6e-4)


@pytest.mark.parametrize("m", [8, 16])
def test_two_operations_a_backward_save_1f1b_its_w(m):
    """A gradient goes on before W: (p − 1)(T_F + T_B) idle. Rounds of one length cost no wait."""
    order = split_backward(one_f_one_b(8, m))
    for times in ((2, 3, 1), (1, 1, 1)):
        assert idle(run(order, *times)) == 7 * (times[0] + times[1])
    assert idle(run(order, 1, 1, 1, mode="lock-step")) == 14
    assert idle(run(one_f_one_b(8, m), 1, 1, 1, mode="neighbour")) > 21


@pytest.mark.parametrize("name", published.TORCH)
def test_orders_of_torch(name):
    order, (equal, half, held) = published.torch_orders()[name], published.TORCH[name]
    r = run(order, 1, 1, 1, **HELD)
    assert (round(r.bubble, 4), max(r.peak_bytes)) == (equal, held)
    assert round(run(order, 1, 1, 0.5).bubble, 4) == half


def test_zbv_has_no_bubble_of_the_span():
    for p, m in ((2, 4), (4, 8), (8, 16)):
        r = run(zbv(p, m), 1, 1, 1)
        assert span_idle(r) == 0 and idle(r) == (p - 1) / 2


def test_bubbles_and_memory_of_controllable_schedules():
    """Qi et al. 2024 (arXiv 2405.15362) at p = 8: 8.5 and 13.5 forwards idle, 5 and 4 microbatches
    held, whatever m."""
    for m in (16, 24, 32):
        for build, lost, held in ((v_half, 8.5, 5), (v_min, 13.5, 4)):
            r = run(build(8, m), 1, 1, 1, **HELD)
            assert (idle(r), max(r.peak_bytes)) == (lost, held)


SHAPE_SPANS = {  # H2, ZB-2p, ZBV
    "DiT-XL/2 256 px": (0.014, 0.007, 0.012),
    "DiT-XL/2 512 px": (0.046, 0.011, 0.030),
    "MMDiT 1024 px": (0.074, 0.026, 0.052),
    "video 32k": (0.170, 0.144, 0.132),
    "video 115k": (0.196, 0.182, 0.153),
}


@pytest.mark.parametrize("shape", published.SHAPES)
def test_bubbles_of_diffusion_shapes(shape):
    ratio, want = published.SHAPES[shape]
    p, m, t = 8, 24, published.shape_times(ratio)
    found = published.shape_results(ratio)
    assert [round(r.bubble, 3) for r in found[: len(want)]] == list(want)
    np.testing.assert_allclose([r.span_bubble for r in found[1:4]], SHAPE_SPANS[shape], atol=6e-4)
    for order, bubble in ((one_f_one_b(p, m), 0.226), (interleaved(p, m, 2), 0.127)):
        assert run(order, t.F, t.B, t.W).bubble == pytest.approx(bubble, abs=6e-4)
    assert run(interleaved(p, m, 3), t.F, t.B, t.W).bubble == pytest.approx(0.089, abs=6e-4)


# 16 microbatches of cost 1 and 16 of ¼, p = 8: (makespan, span) bubbles of sequences.
COSTS = np.r_[np.full(16, 0.25), np.ones(16)]


@pytest.mark.parametrize(
    ("build", "ascending", "descending"),
    [
        (one_f_one_b, (0.259, 0.259), (0.259, 0.259)),
        (zb_h1, (0.104, 0.104), (0.104, 0.104)),
        (zb_h2, (0.055, 0.028), (0.104, 0.080)),
        (lambda p, m: zbv_heuristic(p, m, Times(1, 1, 1)), (0.055, 0.042), (0.080, 0.068)),
    ],
)
def test_sequences_of_unlike_microbatches(build, ascending, descending):
    for costs, want in ((COSTS, ascending), (COSTS[::-1], descending)):
        r = run(build(8, 32), *[costs[None]] * 3)
        assert rates(r) == pytest.approx(want, abs=6e-4)


def test_equalised_microbatches():
    """32 microbatches of .625 in place of 16 + 16: the bubble is that of equal costs."""
    known = Times(1, 1, 1)
    for order, want in (
        (one_f_one_b(8, 32), 0.180),
        (zb_h1(8, 32), 0.068),
        (zbv_heuristic(8, 32, known), 0.035),
    ):
        assert run(order, 0.625, 0.625, 0.625).bubble == pytest.approx(want, abs=6e-4)


def test_alternating_costs_are_the_worst_of_1f1b():
    alternate = np.where(np.arange(32) % 2, 0.25, 1.0)
    assert run(one_f_one_b(8, 32), *[alternate[None]] * 3).bubble == pytest.approx(0.476, abs=6e-4)
    h1 = run(zb_h1(8, 32), *[alternate[None]] * 3)
    assert h1.bubble == pytest.approx(0.330, abs=6e-4)


def test_steps_without_a_barrier():
    """Bubbles after 1, 2, 4, 8 steps at F = B = W, p = 8, m = 16: what only the stagger of a
    makespan costs is paid once."""
    want = {
        one_f_one_b: (0.304, 0.304, 0.304, 0.304),
        zb_h1: (0.127, 0.127, 0.127, 0.127),
        zb_h2: (0.127, 0.068, 0.035, 0.018),
        zbv: (0.068, 0.035, 0.018, 0.009),
    }
    for build, bubbles in want.items():
        got = [run(repeat(build(8, 16), steps), 1, 1, 1).bubble for steps in (1, 2, 4, 8)]
        np.testing.assert_allclose(got, bubbles, atol=6e-4)


# Memory


@pytest.mark.parametrize(("p", "m"), [(1, 4), (4, 2), (4, 4), (4, 9), (8, 16)])
def test_activations_in_flight(p, m):
    def peaks(build):
        return run(build(p, m), 1, 1, 1, activation=1).peak_bytes

    assert peaks(gpipe) == [m] * p
    assert peaks(one_f_one_b) == peaks(zb_h1) == [min(p - i, m) for i in range(p)]
    assert peaks(zb_h2) == [min(2 * (p - i) - 1, m) for i in range(p)]
    assert max(peaks(skip_wave)) <= p


@pytest.mark.parametrize(("p", "v"), [(2, 2), (4, 2), (8, 2), (4, 4)])
def test_activations_in_flight_of_interleaved(p, v):
    """p + (p − 1)/v on the first device (Korthikanti et al. 2022, arXiv 2205.05198); two chunks
    less per device. With W apart, p on the first."""
    r = run(interleaved(p, 2 * p, v), 1, 1, 1, activation=v)
    assert r.peak_bytes == [v * p + p - 1 - 2 * i for i in range(p)]
    r = run(interleaved_zero_bubble(p, 2 * p, v), 1, 1, 1, activation=v)
    assert max(r.peak_bytes) == r.peak_bytes[0] == v * p


def test_stash_is_held_until_the_weight_gradient():
    """Device i of ZB-H1 delays i weight gradients: even if nothing is freed before W, no device
    holds more than p.
    """
    p, m = 4, 12
    for kept in (0, 1, 3, 4):
        r = run(zb_h1(p, m), 1, 1, 1, activation=4, stash=kept)
        assert r.peak_bytes == [4 * (p - i) + kept * i for i in range(p)]
    r = run(one_f_one_b(p, m), 1, 1, 1, activation=4, stash=4)
    assert r.peak_bytes == [4 * (p - i) for i in range(p)]


def test_recomputing_holds_what_f_saved():
    """A quarter of every activation in flight, and one whole one between R and the backward."""
    order = recompute(one_f_one_b(4, 8))
    r = run(order, 1, 1, 1, activation=1, saved=0.25)
    assert r.peak_bytes == [0.25 * (4 - i) + 0.75 for i in range(4)]
    with_r = evaluate(order, Costs(1, 1, 1, R=1))
    assert with_r.makespan == (8 + 3) * 4 - 3  # R runs while the first backwards are on their way
    assert with_r.busy == [8 * 4.0] * 4


# Relations


@pytest.mark.parametrize("name", PLAIN)
def test_long_runs_cost_the_slowest_stage(name):
    """T / (m · max_i T_i) falls to 1 as m grows, whatever the other stages do."""
    times = [[2, 3, 5, 1]] * 3
    ratios = [run(PLAIN[name](4, m), *times).makespan / (m * 15) for m in (4, 16, 64, 256)]
    assert ratios == sorted(ratios, reverse=True) and 1 < ratios[-1] < 1.05
    assert 1 < run(interleaved(4, 256, 2), *times).makespan / (256 * 15) < 1.05


def test_a_sequence_moves_costs_with_their_microbatches():
    up = list(range(16, 32)) + list(range(16))
    order = zb_h2(8, 32)
    moved = run(relabel(order, up), *[COSTS[::-1][None]] * 3)
    assert moved.makespan != run(order, *[COSTS[::-1][None]] * 3).makespan
    assert moved.makespan == run(order, *[COSTS[None]] * 3).makespan
    with pytest.raises(ValueError, match="must name each of m=32"):
        relabel(order, up[1:])


# Placements


def test_placements():
    assert looped(3, 2).devices == (0, 1, 2, 0, 1, 2)
    assert wave(3, 2).devices == (0, 1, 2, 2, 1, 0)
    assert wave(2, 4).devices == (0, 1, 1, 0, 0, 1, 1, 0)
    assert wave(3).stages == ((0, 5), (1, 4), (2, 3)) and wave(3).chunks == (0, 0, 0, 1, 1, 1)
    assert (wave(3).p, wave(3).v) == (3, 2)
    with pytest.raises(ValueError, match=r"per device: \[2, 1\]"):
        type(wave(3))((0, 1, 0))


def test_transfers_of_a_u_vit():
    """Depth 28 on 4 devices: skips cross whole stages in a line, and no boundary in a V. With
    stages of 6, 8, 9 and 6 blocks a relay needs 58 messages."""
    line, first = looped(4), (0, 6, 14, 23)
    stage = [sum(block >= start for start in first) - 1 for block in range(29)]
    skips = [(stage[block], stage[28 - block]) for block in range(14)]
    assert line.transfers() == 6 and line.transfers(skips) == 34
    assert line.transfers(skips, relayed=True) == 58
    assert wave(4).transfers([(u, 7 - u) for u in (0, 0, 1, 2, 3)]) == 12
    assert looped(4, 2).transfers() == 14


def test_orders_by_hand():
    def names(order, device):
        ops = order.ops[device]
        return " ".join(
            f"{op.kind}{op.microbatch}" + (f".{op.chunk}" if op.chunk else "") for op in ops
        )

    assert names(gpipe(2, 2), 0) == "F0 F1 BW0 BW1"
    assert names(one_f_one_b(2, 3), 0) == "F0 F1 BW0 F2 BW1 BW2"
    assert names(one_f_one_b(2, 3), 1) == "F0 BW0 F1 BW1 F2 BW2"
    assert names(split_backward(one_f_one_b(2, 2)), 1) == "F0 B0 W0 F1 B1 W1"
    assert names(zb_h1(2, 3), 0) == "F0 F1 B0 W0 F2 B1 W1 B2 W2"
    assert names(zb_h1(2, 3), 1) == "F0 B0 F1 B1 W0 F2 B2 W1 W2"
    assert names(zb_h2(2, 4), 0) == "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3"
    assert names(zb_h2(2, 4), 1) == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"
    assert names(interleaved(2, 2, 2), 0) == "F0 F1 F0.1 F1.1 BW0.1 BW1.1 BW0 BW1"
    assert names(interleaved(2, 2, 2), 1) == "F0 F1 F0.1 BW0.1 F1.1 BW1.1 BW0 BW1"
    assert names(repeat(gpipe(1, 1), 2), 0) == "F0 BW0 U0 F1 BW1 U1"
    assert interleaved(3, 5, 1) == one_f_one_b(3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gpipe(0, 1), "p=0, m=1"),
        (lambda: zb_h2(2, 0), "p=2, m=0"),
        (lambda: interleaved(4, 6, 2), "m % p = 6 % 4 = 2, must be 0: set m=8"),
        (lambda: interleaved_zero_bubble(4, 6, 2), "m % p = 6 % 4 = 2, must be 0: set m=8"),
        (lambda: interleaved(4, 8, 0), "got v=0"),
        (lambda: dualpipe_v(4, 7), "m ≥ 2p = 8 microbatches, got m=7"),
        (lambda: zb_heuristic(4, 8, Times(1, 1, 1), 0.5), "every device needs at least 1"),
        (lambda: repeat(repeat(gpipe(1, 1), 2), 2), "repeat an order of 1 step"),
        (lambda: wave(0), "p=0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
