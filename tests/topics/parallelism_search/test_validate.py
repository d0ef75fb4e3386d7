"""Hold-outs and landscapes: the arithmetic of their scores, on outcomes made by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fdp.price import fit
from fdp.price.hardware import chip
from fdp.price.hybrid import PricedJobs
from fdp.price.measurements import MeasuredRun
from fdp.price.shapes import named
from fdp.price.workload import Job, Plan
from fdp.study import cache
from fdp.topics.parallelism_search import landscapes, scores, settings, validate

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


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements made here stand for the folder that holds them."""
    for module in (validate, landscapes):
        monkeypatch.setattr(module, "gathered", lambda data: data)


def outcome(
    kind: str = "model", width: float = 1.2, bias: float = 1.1
) -> tuple[fit.FitData, validate.HoldOut]:
    """24 plans of 1 s to 3.3 s, two of which failed; predictions too high by `bias`, intervals of a
    factor `width`, nothing known of memory.
    """
    times = [1 + 0.1 * i for i in range(24)]
    data = fit.gather(measured(times, [3, 7]))
    seconds, one = bias * np.array(times), np.ones(24)
    likely = np.where(data.failed, 0.2, 0.9)
    ends = seconds / width, seconds * width, 0.1 * one
    priced = PricedJobs(seconds, *ends, 1e9 * one, 2e9 * one, likely, 0 * one, seconds, {})
    ran = np.where(data.failed, np.nan, times)
    given = np.arange(24), data.tasks.astype(str), ran, np.nan * one, data.failed, priced
    return data, validate.HoldOut(f"{kind} {bias}", kind, *given, np.array(times))


def remembering(o: validate.HoldOut, peak: float, predicted: float = 1e9) -> validate.HoldOut:
    """The outcome with all peaks measured, and predicted, as so many bytes."""
    peaks, priced = np.full(24, peak), dataclasses.replace(o.hybrid, memory=np.full(24, predicted))
    return dataclasses.replace(o, memory=peaks, hybrid=priced)


def test_scores_are_per_landscape():
    _, o = outcome()
    s = scores.score(o)
    assert s.errors == pytest.approx([10.0])
    assert s.correlations == pytest.approx([1.0])
    assert s.regrets == pytest.approx([0.0])
    backwards = dataclasses.replace(o, learned=o.hybrid.time[::-1])
    reversed_ = scores.score(backwards, "learned")
    assert reversed_.correlations == pytest.approx([-1.0])
    assert reversed_.regrets == pytest.approx([230.0])
    two = dataclasses.replace(o, task=np.array(["a", "b"] * 12))
    assert scores.score(two).errors == pytest.approx([10.0] * 2)


def test_only_cases_with_a_timed_row_are_present(tmp_path):
    lines = ["model,gpu,gpus,seq,gbs,tp,step_time_s,status"]
    lines += [f"llama3-70b,h100,64,4096,64,8,{time},ok" for time in (5.0, 6.0)]
    lines += ["llama3.1-405b,h100,64,4096,64,8,,oom"]
    (tmp_path / "measured_configs.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    data = validate.Published.of(tmp_path)
    assert [case.name for case in validate.present(data)] == ["llama3-70b"]
    (tmp_path / "measured_configs.csv").write_text("\n".join(lines[:2]) + "\n", encoding="utf8")
    assert validate.Published.of(tmp_path) != data, "another content is another key"


def test_copying_takes_the_same_configuration_of_the_newest_other_release(in_memory):
    plans = [
        dataclasses.replace(m, job=dataclasses.replace(m.job, stack="s/f/26.04.01"))
        for m in measured([1.0, 2.0, 3.0], [])
    ]
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
    o = dataclasses.replace(outcome()[1].at(np.arange(3)), name=settings.RELEASE)
    o = dataclasses.replace(o, measured=np.array([1.0, 2.0, 3.0]))
    errors = 100 * np.abs(o.hybrid.time / o.measured - 1)
    pairs = validate.copied(data, o)
    np.testing.assert_allclose(pairs, [(errors[0], 50.0), (errors[1], 50.0)])


def test_intervals_take_their_width_from_the_other_cases():
    """Alone, intervals of 1.05 miss a bias of 1.1; told by a case with that bias, they grow until
    they hold it.
    """
    narrow = outcome(width=1.05)[1]
    assert scores.coverage([narrow]) == 0.0
    assert scores.coverage([narrow, outcome(width=1.05, bias=1.1)[1]]) == 100.0


def test_memory_quantiles_come_from_the_other_cases():
    """Peaks of 1.5 GB predicted as 1 GB: a case of the same bias covers them, one without does not,
    alone none is.
    """
    o, right = (remembering(outcome()[1], 1.5e9, predicted) for predicted in (1e9, 1.5e9))
    assert scores.memory_coverage([o, o]) == (100.0, 2)
    assert scores.memory_coverage([o, right]) == (50.0, 2)  # the biased one is missed
    assert scores.memory_coverage([o, outcome()[1]])[1] == 0


def test_alarms_are_counted_among_failed_and_other_runs():
    _, o = outcome()
    assert scores.memory_alarm(o) == (100.0, 0.0)
    o.hybrid.feasible[:] = 0.2
    assert scores.memory_alarm(o) == (100.0, 100.0)


def test_anchors_of_a_constant_error_remove_most_of_it(in_memory):
    data, o = outcome(bias=1.5)
    ((after, before),) = validate.five_points(data, o)
    assert before == pytest.approx(50.0)
    assert after < 15
    (one, *more) = validate.one_point(data, o)
    assert one < before and len(more) == validate.DRAWS - 1
    few = o.at(np.arange(2 * validate.POINTS + 1))
    assert validate.five_points(data, few) == [], "two of eleven failed: nine ran"


def test_weighted_quantile():
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 8.0])
    assert fit.weighted_quantile(values, weights, 0.5) == 2.0
    assert fit.weighted_quantile(values, weights, 0.05) == 1.0
    assert fit.weighted_quantile(values, weights, 1.0) == 3.0


def test_a_right_prior_finds_the_best_plan_at_once_and_failed_runs_are_in_the_landscape(in_memory):
    data, o = outcome()
    (found,) = landscapes.compare(data, o, seeds=2)
    assert found.name == "model 1.1 on 64"
    assert (found.needed["bayes"] == 1).all()
    assert found.needed["random"].mean() > 1
    assert len(found.regret["random"]) == 24, "every plan, the failed ones included"
    few = o.at(np.arange(landscapes.LEAST - 1))
    assert landscapes.compare(data, few, seeds=2) == []


def test_what_a_study_keeps_comes_back_as_it_was(in_memory):
    data, o = outcome()
    for value in (o, landscapes.compare(data, o, seeds=1)):
        arrays: list[np.ndarray] = []
        again = cache.unpack(cache.pack(value, arrays), arrays)
        assert cache.describe(again) == cache.describe(value)


@pytest.mark.slow
def test_a_published_model_is_priced_without_having_been_seen():
    if not SHARED.is_dir():
        pytest.skip("the published measurements (shared data, planning/) are not on this machine")
    o = validate.run_case(validate.Published.of(SHARED), "llama3-70b", 200).timed
    assert validate.error(o.hybrid.time, o.measured) < 10
