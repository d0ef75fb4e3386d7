"""Hold-outs and landscapes: the arithmetic of their scores, on outcomes made by hand."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fdp.price import fit
from fdp.price.hardware import chip
from fdp.price.measurements import MeasuredRun, published
from fdp.price.shapes import named
from fdp.price.workload import Job, Plan
from fdp.topics.parallelism_search import landscapes, validate

pytestmark = pytest.mark.fast

SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "planning"
TPS = [1, 2, 4, 8, 16, 32]


def measured(times: list[float], failed: list[int]) -> list[MeasuredRun]:
    out = []
    for i, time in enumerate(times):
        plan = Plan(tp=TPS[i % 6], dp=64 // TPS[i % 6], microbatch=2 ** (i // 6))
        job = Job(named("llama3-8b"), plan, chip("h100"), 1024, 4096, stack="s/f/1", cluster="c")
        out.append(
            MeasuredRun(i, "task", job, float("nan") if i in failed else time, failed=i in failed)
        )
    return out


def outcome(
    kind: str = "model", width: float = 1.2, bias: float = 1.1
) -> tuple[fit.FitData, validate.HoldOut]:
    """24 plans of 1 s to 3.3 s, two of which failed; predictions too high by `bias`, intervals of a
    factor `width`.
    """
    times = [1 + 0.1 * i for i in range(24)]
    data = fit.gather(measured(times, [3, 7]))
    seconds = np.array(times)
    p = SimpleNamespace(
        time=bias * seconds,
        low=bias * seconds / width,
        high=bias * seconds * width,
        log_std=np.full(24, 0.1),
        feasible=np.where(data.failed, 0.2, 0.9),
        memory=np.full(24, 1e9),
        analytic=bias * seconds,
        stalled=np.zeros(24),
    )
    rows = np.flatnonzero(~data.failed)
    case = validate.Case(f"{kind} {bias}", kind, lambda m: True)
    return data, validate.HoldOut(
        case, rows, seconds[rows], p, seconds[rows], np.arange(24), data.failed
    )


def test_scores_are_per_landscape():
    data, o = outcome()
    s = validate.score(data, o)
    assert s.errors == pytest.approx([10.0])
    assert s.correlations == pytest.approx([1.0])
    assert s.regrets == pytest.approx([0.0])
    backwards = dataclasses.replace(o, learned=o.predicted[::-1])
    reversed_ = validate.score(data, backwards, "learned")
    assert reversed_.correlations == pytest.approx([-1.0])
    assert reversed_.regrets == pytest.approx([230.0])


def test_a_case_without_rows_says_so():
    data, _ = outcome()
    with pytest.raises(validate.NothingToJudge, match="'none': no measured row to judge"):
        validate.run_case(fit.Fitter(data), validate.Case("none", "model", lambda m: False), 1)


def test_copying_takes_the_same_configuration_of_the_newest_other_release():
    plans = measured([1.0, 2.0, 3.0], [])
    old, older = (
        [
            dataclasses.replace(
                m, job=dataclasses.replace(m.job, stack=f"s/f/{era}"), step_time=scale * m.step_time
            )
            for m in plans[:2]
        ]
        for era, scale in (("0.9", 1.5), ("0.8", 9.0))
    )
    data = fit.gather(plans + old + older)
    rows = np.arange(3)
    case = validate.Case("release", "release", lambda m: m.job.stack == "s/f/1")
    o = validate.HoldOut(case, rows, np.array([1.0, 2.0, 3.0]), None, None, rows, data.failed)
    places, seconds = validate.copied(data, o)
    assert places.tolist() == [0, 1] and seconds == pytest.approx([1.5, 3.0])


def test_intervals_take_their_width_from_the_other_cases():
    """Alone, intervals of 1.05 miss a bias of 1.1; told by a case with that bias, they grow until
    they hold it.
    """
    narrow = outcome(width=1.05)[1]
    assert validate.coverage([narrow]) == 0.0
    assert validate.coverage([narrow, outcome(width=1.05, bias=1.1)[1]]) == 100.0


def test_memory_quantiles_come_from_the_other_cases():
    """Peaks of 1.5 GB predicted as 1 GB: a case of the same bias covers them, one without does not,
    alone none is.
    """
    data, o = outcome()
    data = dataclasses.replace(data, log_memory=np.log(np.full(24, 1.5e9)))
    right = dataclasses.replace(o, hybrid=SimpleNamespace(memory=np.full(24, 1.5e9)))
    assert validate.memory_coverage(data, [o, o]) == (100.0, 2)
    assert validate.memory_coverage(data, [o, right]) == (50.0, 2)  # the biased one is missed
    assert validate.memory_coverage(data, [o])[1] == 0


def test_alarms_are_counted_among_failed_and_other_runs():
    _, o = outcome()
    assert validate.memory_alarm(o) == (100.0, 0.0)
    o.hybrid.feasible[:] = 0.2
    assert validate.memory_alarm(o) == (100.0, 100.0)


def test_anchors_of_a_constant_error_remove_most_of_it():
    data, o = outcome(bias=1.5)
    after, before = validate.with_anchors(data, o, 5, 2)
    assert before == pytest.approx([50.0])
    assert after[0] < 15


def test_weighted_quantile():
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 8.0])
    assert fit.weighted_quantile(values, weights, 0.5) == 2.0
    assert fit.weighted_quantile(values, weights, 0.05) == 1.0
    assert fit.weighted_quantile(values, weights, 1.0) == 3.0


def test_a_right_prior_finds_the_best_plan_at_once_and_failed_runs_are_in_the_landscape():
    data, o = outcome()
    found = landscapes.compare(data, [o], seeds=2)
    (per,) = found.needed.values()
    assert (per["bayes"] == 1).all()
    assert per["random"].mean() > 1
    (curves,) = found.regret.values()
    assert len(curves["random"]) == 24, "every plan, the failed ones included"
    assert not landscapes.compare(data, [outcome(kind="moe")[1]], seeds=2).needed


@pytest.mark.slow
def test_a_published_model_is_priced_without_having_been_seen():
    if not SHARED.is_dir():
        pytest.skip("the published measurements (shared data, planning/) are not on this machine")
    with jax.enable_x64(True):
        data = fit.gather(published(SHARED)[0])
        fitter = fit.Fitter(data)
        case = next(c for c in validate.CASES if c.name == "llama3-70b")
        outcome = validate.run_case(fitter, case, 200)
    assert validate.error(outcome.predicted, outcome.measured) < 10
