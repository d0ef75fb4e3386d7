"""Anchors: closed forms of the Gaussian process, what it must not do, and numbers that are no
measurement.
"""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.price.anchors import correct, correlation, posterior
from fdp.price.hardware import chip
from fdp.price.hybrid import BOTTLENECKS, PricedJobs
from fdp.price.shapes import PUBLISHED
from fdp.price.workload import Job, Plan
from tests.price.planning_jobs import with_plan

pytestmark = pytest.mark.fast

LLAMA = Job(
    PUBLISHED["llama3-8b"],
    Plan(tp=2, pp=2, dp=16),
    chip("h100"),
    256,
    4096,
    stack="a/b/1",
    cluster="a",
)
NEIGHBOUR = with_plan(LLAMA, tp=4, dp=8)
OTHER_MODEL = replace(LLAMA, shape=PUBLISHED["llama3-70b"])
ELSEWHERE = replace(OTHER_MODEL, chip=chip("a100"), stack="c/d/1", cluster="c")
JOBS = [LLAMA, NEIGHBOUR, OTHER_MODEL, ELSEWHERE]


def prediction(n, time=2.0, log_std=0.2, feasible=0.7):
    memory, terms = (50e9, 60e9), {name: np.full(n, 1.0) for name in BOTTLENECKS}
    values = (time, time / 1.4, time * 1.6, log_std, *memory, feasible, 0.0, time)
    return PricedJobs(*(np.full(n, value) for value in values), terms)


def mean_of(jobs, known, errors, std=0.2):
    return posterior(
        jobs, np.full(len(jobs), std), known, np.full(len(known), std), np.array(errors)
    )


def test_without_anchors_nothing_changes():
    before = prediction(4)
    after = correct(before, JOBS, [], prediction(0), np.zeros(0))
    for field in dataclasses.fields(PricedJobs):
        if field.name != "terms":
            np.testing.assert_array_equal(getattr(after, field.name), getattr(before, field.name))


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("log_std", [0.05, 0.1, 0.35, 1.2])
def test_an_anchor_moves_its_own_row_to_the_measurement(factor, log_std):
    before = prediction(1, log_std=log_std)
    after = correct(before, [LLAMA], [LLAMA], before, np.array([2.0 * factor]))
    assert after.time[0] == pytest.approx(2.0 * factor, rel=0.05)


def test_what_resembles_the_anchor_moves_more():
    mean, _ = mean_of(JOBS, [LLAMA], [0.2])
    assert mean[0] > mean[1] > mean[2] > mean[3] == 0.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1.0),
        ({"stack": "a/b/2"}, 1 - 0.01),
        ({"stack": "", "cluster": ""}, 1 - 0.02),
        ({"chip": chip("h200")}, 0.03),
        ({"shape": PUBLISHED["llama3-70b"]}, 0.02),
    ],
)
def test_correlation_is_the_sum_of_what_is_shared(changes, expected):
    total = 3 * 0.1**2 + 0.12**2 + 0.06**2 + 0.2**2
    lost = total - (1 - expected) if expected > 0.5 else expected
    assert correlation([replace(LLAMA, **changes)], [LLAMA])[0, 0] == pytest.approx(lost / total)


def test_correlation_falls_with_the_distance_of_plans():
    # tp ×2 and dp ÷2: a squared distance of 2 in log2, same GPUs.
    total = 3 * 0.1**2 + 0.12**2 + 0.06**2 + 0.2**2
    near = 0.04 * np.exp(-2 / (2 * 1.5**2))
    assert correlation([NEIGHBOUR], [LLAMA])[0, 0] == pytest.approx((total - 0.04 + near) / total)


def test_two_models_of_one_name_are_not_the_same():
    small = replace(LLAMA, shape=replace(LLAMA.shape, layers=16))
    assert correlation([small], [LLAMA])[0, 0] < 0.5


def test_one_anchor_in_closed_form():
    # One anchor's `own` variance settles at (ν·own² + error²)/(ν + 1): its leave-one-out residual
    # is its error.
    error, std = 0.15, 0.2
    shared = std**2 - 0.1**2
    shared, own = max(shared, 0.2**2), (3 * 0.1**2 + error**2) / 4
    expected = shared * correlation([OTHER_MODEL], [LLAMA])[0, 0] / (shared + own + 0.03**2) * error
    assert mean_of([OTHER_MODEL], [LLAMA], [error], std)[0][0] == pytest.approx(expected, rel=1e-9)


def test_interval_shrinks_and_keeps_its_shape():
    before = prediction(4)
    after = correct(before, JOBS, [LLAMA], prediction(1), np.array([2.2]))
    assert (np.diff(after.log_std) > 0).all() and after.log_std[3] == pytest.approx(0.2)
    share = after.log_std / before.log_std
    np.testing.assert_allclose(np.log(after.time / after.low), share * np.log(1.4))
    np.testing.assert_allclose(np.log(after.high / after.time), share * np.log(1.6))


def test_more_anchors_leave_less_doubt():
    plans = [with_plan(LLAMA, tp=t, dp=64 // (t * p), pp=p) for t in (1, 4, 8) for p in (1, 2, 4)]
    stds = [mean_of([LLAMA], plans[:n], [0.1] * n)[1][0] for n in range(1, 10)]
    assert (np.diff(stds) < 1e-12).all() and stds[-1] < 0.7 * stds[0]


def test_duplicates_do_not_break_the_factorisation():
    mean, std = mean_of(JOBS, [LLAMA] * 60 + [NEIGHBOUR] * 60, [0.3] * 60 + [0.25] * 60)
    assert np.isfinite(mean).all() and (std > 0).all()
    assert mean[0] == pytest.approx(0.3, abs=0.01) and mean[1] == pytest.approx(0.25, abs=0.01)


def test_two_runs_of_one_configuration_count_as_their_mean():
    twice = mean_of(JOBS, [LLAMA, NEIGHBOUR, LLAMA], [0.2, 0.1, 0.3])[0]
    once = mean_of(JOBS, [LLAMA, NEIGHBOUR], [0.25, 0.1])[0]
    np.testing.assert_allclose(twice, once, atol=0.005)


def test_measured_twice_is_surer_but_never_surer_than_the_noise():
    stds = [mean_of([LLAMA], [LLAMA] * n, [0.1] * n)[1][0] for n in (1, 2, 500)]
    assert stds[0] >= stds[1] >= stds[2] == pytest.approx(0.03)
    assert mean_of([LLAMA], [LLAMA] * 500, [0.1] * 500)[0][0] == pytest.approx(0.1, rel=1e-3)
    assert mean_of([LLAMA], [LLAMA], [0.0])[1][0] == pytest.approx(0.03, rel=0.1)


def test_conflicting_duplicates_are_averaged():
    assert mean_of([LLAMA], [LLAMA, LLAMA], [0.1, 0.3])[0][0] == pytest.approx(0.2, abs=0.02)


def test_anchors_that_scatter_widen_the_interval_of_the_others():
    known = [with_plan(LLAMA, tp=t, dp=32 // t) for t in (1, 4, 8)]
    _, calm = mean_of([LLAMA, known[0]], known, [0.1, 0.1, 0.1])
    _, torn = mean_of([LLAMA, known[0]], known, [-0.5, 0.1, 0.7])
    assert calm[0] < 0.2 < torn[0]
    assert torn[1] < 0.05  # measured itself


def test_a_stalled_run_speaks_for_itself_only():
    known = [with_plan(LLAMA, tp=t, dp=32 // t) for t in (1, 4, 8)] + [with_plan(LLAMA, pp=8, dp=4)]
    clean = mean_of([LLAMA], known, [0.1, 0.1, 0.1, 0.1])[0][0]
    broken, _ = mean_of([LLAMA, known[-1]], known, [0.1, 0.1, 0.1, 2.1])
    assert broken[0] - clean < 0.2  # 2.0 further away, a quarter of the anchors
    assert broken[1] == pytest.approx(2.1, abs=0.06)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3]), st.floats(-2, 2)),
        max_size=12,
    )
)
def test_order_does_not_matter_and_nothing_overshoots(drawn):
    known = [with_plan(LLAMA, tp=t, pp=p, dp=8) for t, p, _ in drawn]
    errors = [e for _, _, e in drawn]
    mean, std = mean_of(JOBS, known, errors)
    again, _ = mean_of(JOBS, known[::-1], errors[::-1])
    np.testing.assert_allclose(mean, again, atol=1e-7)
    assert (std > 0).all() and std[3] == pytest.approx(0.2)
    assert (np.abs(mean) <= 1.5 * max(map(abs, errors), default=0.0) + 1e-12).all()
    np.testing.assert_allclose(mean_of(JOBS, known, [-e for e in errors])[0], -mean, atol=1e-9)


def test_memory_moves_and_feasibility_follows():
    before = prediction(2)
    after = correct(
        before,
        [LLAMA, ELSEWHERE],
        [LLAMA],
        prediction(1),
        np.array([np.nan]),
        np.array([70e9]),
        12.0,
    )
    np.testing.assert_array_equal(after.time, before.time)
    assert after.memory[0] == pytest.approx(70e9, rel=0.05) and after.memory[1] == before.memory[1]
    np.testing.assert_allclose(after.memory_high / after.memory, before.memory_high / before.memory)
    # The logistic of the cost model in log memory, moved by what was measured.
    odds = 0.7 / 0.3 * np.exp(-12 * np.log(after.memory[0] / 50e9))
    assert after.feasible[0] == pytest.approx(odds / (1 + odds)) and after.feasible[
        1
    ] == pytest.approx(0.7)


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf])
def test_what_is_no_measurement_is_refused(value):
    with pytest.raises(ValueError, match=r"time_M\[0\] = .* is no measurement"):
        correct(prediction(1), [LLAMA], [LLAMA], prediction(1), np.array([value]))


@pytest.mark.parametrize(
    ("std", "error", "named"),
    [(0.0, 0.1, "std_N"), (np.nan, 0.1, "std_N"), (0.2, np.nan, "error_M")],
)
def test_posterior_names_what_is_not_finite(std, error, named):
    with pytest.raises(ValueError, match=named):
        posterior([LLAMA], np.array([std]), [LLAMA], np.array([0.2]), np.array([error]))


def test_no_jobs_give_nothing():
    mean, std = mean_of([], [LLAMA], [0.1])
    assert mean.shape == std.shape == (0,)
