"""The schedule of adaptive context plans: plans as integers, hysteresis.

Legend: L layers, W blocks.
"""

from dataclasses import replace

import numpy as np
import pytest

from fdp.parallel.context.layouts import ZIGZAG
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.planner_hysteresis import Scheduler, decode, encode
from fdp.parallel.context.planner_price import BLOCKS
from fdp.parallel.context.planner_problem import Masks, Problem
from tests.parallel.context.planner_problems import FULL, OWN, SHAPE, SLOW

pytestmark = pytest.mark.fast

BRANCHES = (
    CommPlan("ring"),
    CommPlan("ulysses", 4),
    CommPlan("ring", hops=()),
    CommPlan(BLOCKS, capacity=2),
)


def test_plans_as_integers() -> None:
    plans = (BRANCHES[3], BRANCHES[0], BRANCHES[3])
    plan_L = encode(plans, BRANCHES)
    assert (
        plan_L.dtype == np.int32
        and plan_L.tolist() == [3, 0, 3]
        and decode(plan_L, BRANCHES, 3) == plans
    )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([0, 1], "not int64 .2."),
        ([0, 1, 4], r"\(2, 4\)"),
        ([0, -1, 1], r"\(1, -1\)"),
        ([0.0, 1.0, 2.0], "float64"),
        ([[0, 1, 2]], "one integer for each of 3"),
    ],
)
def test_bad_integers(plan: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(np.array(plan), BRANCHES, 3)


def test_bad_branches() -> None:
    for branches, message in [
        ((), "at least one"),
        ((BRANCHES[0], BRANCHES[0]), "all different"),
        ((BRANCHES[0], CommPlan("ring", layout=ZIGZAG)), "one layout"),
        (BRANCHES[2:], "some branch must send all keys"),
    ]:
        with pytest.raises(ValueError, match=message):
            Scheduler(branches)
    with pytest.raises(ValueError, match="layer 1: CommPlan"):
        encode((BRANCHES[0], CommPlan("all_gather")), BRANCHES)
    with pytest.raises(ValueError, match="gain = 1"):
        Scheduler(BRANCHES, gain=1.0)
    with pytest.raises(ValueError, match="windows = 0"):
        Scheduler(BRANCHES, windows=0)


def problem_of(*masks: np.ndarray) -> Problem:
    return Problem(Masks(np.stack(masks)), SHAPE, SLOW, objective="bytes")


def test_scheduler_waits_for_consecutive_wins() -> None:
    s = Scheduler(BRANCHES, gain=0.05, windows=3)
    assert s.observe(problem_of(FULL, FULL)).tolist() == [1, 1]
    assert s.observe(problem_of(OWN, FULL)).tolist() == [1, 1] and s.streak == 1
    assert s.observe(problem_of(FULL, FULL)).tolist() == [1, 1] and s.streak == 0
    for streak in (1, 2):
        assert s.observe(problem_of(OWN, FULL)).tolist() == [1, 1] and s.streak == streak
    resumed = replace(s)
    for one in (s, resumed):
        assert one.observe(problem_of(OWN, FULL)).tolist() == [2, 1] and one.streak == 0


def test_scheduler_ignores_small_gains() -> None:
    # Ulysses to no hops in one of two layers saves exactly half of the bytes.
    for gain, switches in [(0.5, False), (0.499, True)]:
        s = Scheduler(BRANCHES, gain=gain, windows=1)
        s.observe(problem_of(FULL, FULL))
        assert (s.observe(problem_of(OWN, FULL)).tolist() == [2, 1]) is switches


def test_scheduler_leaves_an_inexact_plan_at_once() -> None:
    s = Scheduler(BRANCHES, windows=5)
    assert s.observe(problem_of(OWN, OWN)).tolist() == [2, 2]
    assert s.observe(problem_of(FULL, OWN)).tolist() == [1, 2] and s.streak == 0


def test_scheduler_leaves_an_uneven_plan_at_once() -> None:
    uneven = OWN.copy()
    uneven[12:, 12:] = np.tri(4, dtype=bool)
    s = Scheduler(BRANCHES, windows=5)
    assert s.observe(replace(problem_of(OWN), balance=1.2)).tolist() == [2]
    assert s.observe(replace(problem_of(uneven), balance=1.2)).tolist() == [1] and s.streak == 0


def test_scheduler_refuses() -> None:
    s = Scheduler(BRANCHES)
    s.observe(problem_of(OWN, OWN))
    with pytest.raises(ValueError, match="each of 3 layers"):
        s.observe(problem_of(OWN, OWN, OWN))
    with pytest.raises(ValueError, match="layer 0 can run nothing: ring: holds"):
        Scheduler(BRANCHES[:2]).observe(replace(problem_of(FULL), memory=1.0))
