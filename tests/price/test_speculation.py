"""Simulated seconds: identities of the schedules, closed forms, and the price of states."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.keys import UserError
from fdp.price import simulate, speculation
from fdp.price.inference import LLADA_8B
from fdp.price.simulate import Resource, TimedTask
from fdp.price.speculation import Decoding, Schedule, Split, played

pytestmark = pytest.mark.fast

SECONDS = st.floats(0.01, 4.0)
PATHS = st.tuples(st.integers(0, 99), st.integers(1, 3), st.floats(0, 1)).map(
    lambda given: speculation.drawn(given[2], 24, given[1], given[0])
)


@given(SECONDS, SECONDS, SECONDS, st.integers(1, 9), PATHS)
@settings(max_examples=60, deadline=None)
def test_overlap_lies_between_sequential_and_the_longer_of_both(draft, verify, first, k, right):
    """Also path by path; more windows in flight and more verifiers never take longer."""
    plain = Schedule(draft, verify, k)
    early = replace(plain, flying=2, first=min(first, verify))
    plans = [early, replace(plain, flying=2), replace(plain, flying=2, replicas=2)]
    sequential = played(plain, right).seconds
    for plan in plans:
        found = played(plan, right)
        least = found.windows * max(min(k * draft, verify), verify / plan.replicas)
        assert found.seconds <= sequential * (1 + 1e-9)
        assert found.seconds >= least * (1 - 1e-9)
    overlapped = played(plans[1], right)
    assert overlapped.seconds >= overlapped.windows * max(k * draft, verify) * (1 - 1e-9)
    assert played(plans[2], right).seconds <= overlapped.seconds * (1 + 1e-9)


@given(SECONDS, SECONDS, st.integers(1, 9), st.integers(1, 4), PATHS)
@settings(max_examples=30, deadline=None)
def test_no_resource_runs_two_things_at_once(draft, verify, k, replicas, right):
    plan = Schedule(draft, verify, k, replicas + 1, replicas, verify / 2)
    found = played(plan, right)
    for name in found.busy():
        runs = sorted(run[1:] for run in found.runs if run[0] == name)
        assert all(a <= b for a, b in runs)
        assert all(before[1] <= after[0] + 1e-9 for before, after in itertools.pairwise(runs))
        assert runs[-1][1] <= found.seconds * (1 + 1e-9)
    assert set(found.busy()) <= {"draft", *(f"verifier {r}" for r in range(replicas))}


def test_one_window_in_flight_is_sequential():
    right = speculation.drawn(0.7, 40, 2)
    plain = Schedule(0.3, 1.0, 4)
    found = played(plain, right)
    assert found.seconds == pytest.approx(found.windows * (4 * 0.3 + 1.0))
    assert played(replace(plain, replicas=3), right).runs == found.runs


def test_a_right_draft_without_cost_gives_a_whole_window_a_round():
    for k, steps in ((3, 40), (7, 64), (7, 61)):
        found = played(Schedule(0.0, 1.0, k), np.ones((2, steps), bool))
        assert found.seconds == found.windows == math.ceil(steps / (k + 1))


@pytest.mark.parametrize(("a", "k"), [(0.0, 4), (0.5, 1), (0.77, 8), (0.95, 16), (1.0, 3)])
def test_mean_progress_is_the_closed_form(a, k):
    steps = 4000
    found = played(Schedule(0.0, 1.0, k), speculation.drawn(a, steps))
    assert steps / found.windows == pytest.approx(speculation.tokens_a_round(a, k), rel=0.05)


def test_progress_without_the_correction_is_another():
    """Negative control: drafts alone, without the verifier's own step."""
    found = played(Schedule(0.0, 1.0, 8), speculation.drawn(0.77, 4000))
    alone = speculation.tokens_a_round(0.77, 8) - 1
    assert 4000 / found.windows != pytest.approx(alone, rel=0.2)


def test_a_draft_that_is_never_right_costs_a_round_a_step():
    wrong = np.zeros((1, 12), bool)
    assert played(Schedule(0.1, 1.0, 4), wrong).seconds == pytest.approx(12 * 1.4)
    # Judging the first state alone finds each of them out before the window is drafted.
    early = played(Schedule(0.5, 1.0, 4, flying=2, first=0.8), wrong)
    assert (early.windows, early.seconds) == (0, pytest.approx(12 * 0.8))


@pytest.mark.parametrize(("flying", "replicas"), [(2, 1), (2, 2), (3, 2), (4, 3)])
def test_schedules_are_those_of_the_event_simulation(flying, replicas):
    """Ten windows without a rejection as tasks of `price.simulate`."""
    draft, verify, k, windows = 0.25, 3.0, 4, 10
    tasks = []
    for i in range(windows):
        judged = (("verify", i - flying),) if i >= flying else ()
        size = (k + 1 if i else k) * draft
        tasks.append(TimedTask(("draft", i), "draft", size, judged))
        tasks.append(TimedTask(("verify", i), "verifier", verify, (("draft", i),)))
    pools = {"draft": [Resource("d")], "verifier": [Resource(f"v{r}") for r in range(replicas)]}
    right = np.ones((1, windows * (k + 1)), bool)
    found = played(Schedule(draft, verify, k, flying, replicas), right)
    assert found.windows == windows
    assert found.seconds == pytest.approx(simulate.dispatch(tasks, pools).makespan)


def test_drafts_ahead_need_the_step_that_the_verifier_takes():
    """Two windows of three states, drafted in 0.5 s and verified in 1 s; the second is there at
    1.25 s unless its first step, the third of all, is not what the verifier takes."""
    plan, right = Schedule(0.25, 1.0, 2, flying=2), np.ones((1, 6), bool)
    assert played(plan, right).seconds == 2.5
    right[0, 2] = False
    assert played(plan, right).seconds == 3.0 == played(replace(plan, flying=1), right).seconds


def test_a_first_state_that_is_right_ends_nothing():
    plan = Schedule(0.5, 1.0, 2, flying=2, first=0.8)
    found = played(plan, np.ones((1, 3), bool))
    assert (found.seconds, found.windows, found.firsts) == (2.0, 1, 1)


def test_the_error_of_the_prices_is_said():
    assert "median 9%, 90 % quantile 24%" in speculation.calibration()
    assert speculation.calibration("v5p").startswith("not calibrated: no measured matmuls")


def test_counted_rounds_give_the_path_back():
    right, k = speculation.drawn(0.6, 30, 3), 31
    taken, done = [], np.zeros(3, int)
    while done.min() < 30:
        runs = [
            next((i for i in range(30 - p) if not row[p + i]), 30 - p) if p < 30 else 0
            for p, row in zip(done, right, strict=True)
        ]
        taken.append(runs)
        done = np.minimum(done + np.asarray(runs) + 1, 30)
    assert (speculation.counted(np.asarray(taken), k, 30) == right).all()


def test_states_of_a_window_cost_less_than_passes_and_the_trial_is_reproduced():
    block, whole = Decoding("", 32, 4096), Decoding("", 256)
    ms = [1e3 * speculation.priced(LLADA_8B, block, n).seconds for n in (1, 9, 17, 65)]
    np.testing.assert_allclose(ms, [3.3, 4.6, 5.8, 11.4], rtol=0.02)
    ms = [1e3 * speculation.priced(LLADA_8B, whole, n).seconds for n in (1, 9, 17, 65)]
    np.testing.assert_allclose(ms, [4.5, 13.4, 20.0, 57], rtol=0.08)
    draft = speculation.priced(speculation.draft_shape(16), block).seconds
    assert 1e3 * draft == pytest.approx(1.2, rel=0.06)
    seconds = [speculation.priced(LLADA_8B, block, n).seconds for n in range(1, 20)]
    assert seconds == sorted(seconds)


def test_products_turn_compute_bound_at_the_knee():
    rows = speculation.knee(LLADA_8B, 1, 8)
    assert speculation.knee(LLADA_8B, 32, 8) == pytest.approx(rows / 32)
    assert 200 < rows < 400


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Split(2, 4, 2), r"2 \+ 2 · 4 = 10 exceed the 8 that exist"),
        (lambda: Split(0, 4), "draft = 0.*at least 1"),
        (lambda: Schedule(0.1, 1.0, 0), "k = 0.*holds one drafted step"),
        (lambda: Schedule(-0.1, 1.0, 2), "draft = -0.1.*0 ≤ seconds"),
        (lambda: speculation.tokens_a_round(1.2, 3), "a = 1.2: 0 ≤ a ≤ 1"),
        (lambda: speculation.priced(LLADA_8B, speculation.BLOCKS[0], 0), "states = 0 on 8 devices"),
    ],
)
def test_what_cannot_be_simulated_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
