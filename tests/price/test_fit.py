"""The fitted cost model: recovers what made the data, keeps its bounds, is physics where nothing
was measured.
"""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from fdp.price import fit, hybrid, step_time
from fdp.price.hardware import chip
from fdp.price.measurements import MeasuredRun
from fdp.price.shapes import named
from fdp.price.workload import Job, Plan, columns


def jobs() -> list[Job]:
    """A made-up sweep of two models on two kinds of chips."""
    out = []
    for name, chips in (("llama3-8b", 64), ("llama2-7b", 64), ("llama3-70b", 128)):
        for kind in ("h100", "a100"):
            for tp in (1, 2, 4, 8):
                for pp in (1, 2, 4):
                    for mbs in (1, 2, 4):
                        plan = Plan(tp=tp, pp=pp, dp=chips // tp // pp, microbatch=mbs)
                        out.append(
                            Job(
                                named(name), plan, chip(kind), 512, 4096, stack="s/f/1", cluster="c"
                            )
                        )
    return out


def truth() -> dict[str, float]:
    """Logit-scale coefficients unlike the prior's."""
    values = {n: start for n, (_, _, start) in step_time.BOUNDS.items()}
    values |= {"gemm": 0.6, "link_out": 0.4, "half_rows": 500.0}
    out = {}
    for n, (low, high, _) in step_time.BOUNDS.items():
        share = (values[n] - low) / (high - low)
        out[n] = float(np.log(share / (1 - share)))
    return out


@pytest.fixture(scope="module")
def synthetic() -> fit.FitData:
    """Step times that the analytic model made with coefficients of its own, and 2 % noise."""
    work = jobs()
    x = columns(work)
    with jax.enable_x64(True):
        k = hybrid.time_coefficients(hybrid.numeric(x), truth(), {})
        seconds = np.asarray(step_time.step_time(hybrid.numeric(x), k)["total"])
    noisy = seconds * np.exp(0.02 * np.random.default_rng(0).standard_normal(len(seconds)))
    names = [f"{j.shape.name}|{j.chip.name}" for j in work]
    rows = zip(names, work, noisy, strict=True)
    return fit.gather(
        [MeasuredRun(i, name, job, float(s)) for i, (name, job, s) in enumerate(rows)]
    )


@pytest.fixture(scope="module")
def fitted(synthetic) -> tuple[fit.Fitter, hybrid.Model]:
    with jax.enable_x64(True):
        fitter = fit.Fitter(synthetic)
        seen = np.array([m.job.shape.name != "llama2-7b" for m in synthetic.measurements])
        return fitter, fitter.fit(seen, steps=80)


def refit(fitter: fit.Fitter, data: fit.FitData) -> fit.Fitter:
    """The same compiled losses on other measured values of the same jobs."""
    other = copy.copy(fitter)
    other.data = data
    return other


def test_an_unseen_model_is_priced_to_the_noise(synthetic, fitted):
    out = np.array([m.job.shape.name == "llama2-7b" for m in synthetic.measurements])
    with jax.enable_x64(True):
        time = hybrid.predict(fitted[1], synthetic.x).time
    error = np.abs(np.log(time) - synthetic.log_time)[out]
    assert np.median(error) < 0.04


def test_shuffled_times_destroy_the_ranking(synthetic, fitted):
    """A leak of the answers into the features would survive this."""
    order = np.random.default_rng(1).permutation(len(synthetic.log_time))
    shuffled = dataclasses.replace(synthetic, log_time=synthetic.log_time[order])
    with jax.enable_x64(True):
        model = refit(fitted[0], shuffled).fit(np.ones(len(order), bool), steps=40, residual=False)
        time = np.log(hybrid.predict(model, synthetic.x).time)
    assert abs(np.corrcoef(time, shuffled.log_time)[0, 1]) < 0.3


def test_coefficients_stay_physical(fitted):
    values = hybrid.bounded(fitted[1].time, step_time.BOUNDS)
    for name, (low, high, _) in step_time.BOUNDS.items():
        assert low <= float(values[name]) <= high


def test_rows_of_weight_zero_do_not_matter(synthetic, fitted):
    """A hold-out may not see its rows: spoiling them changes nothing."""
    model = fitted[1]
    seen = np.array([m.job.shape.name != "llama2-7b" for m in synthetic.measurements])
    spoiled = dataclasses.replace(synthetic, log_time=np.where(seen, synthetic.log_time, 99.0))
    with jax.enable_x64(True):
        again = refit(fitted[0], spoiled).fit(seen, steps=80)
    assert again.time == pytest.approx(model.time, rel=1e-9)
    np.testing.assert_allclose(
        again.residual["weights"], model.residual["weights"], rtol=1e-6, atol=1e-9
    )


def test_the_file_gives_the_model_back(fitted, synthetic):
    again = hybrid.from_json(hybrid.to_json(fitted[1]))
    with jax.enable_x64(True):
        a, b = hybrid.predict(fitted[1], synthetic.x), hybrid.predict(again, synthetic.x)
    np.testing.assert_allclose(a.time, b.time, rtol=1e-3)
    with pytest.raises(ValueError, match="lacks time"):
        hybrid.from_json("{}")


def test_far_from_data_the_residual_is_silent(fitted):
    far = Job(
        named("gpt3-175b"), Plan(tp=8, pp=32, dp=64, virtual=3), chip("gb200"), 4096, 65536, "fp8"
    )
    with jax.enable_x64(True):
        p = hybrid.predict(fitted[1], columns([far]))
    assert p.time[0] == pytest.approx(p.analytic[0], rel=0.05)


def test_intervals_are_wider_for_software_nobody_measured():
    seen = Job(
        named("llama3-8b"), Plan(dp=8), chip("h100"), 128, 8192, stack="dgxc/nemo/x", cluster="dgxc"
    )
    p = hybrid.predict(
        hybrid.shipped(),
        columns([seen, dataclasses.replace(seen, stack="mine/own/1", cluster="mine")]),
    )
    assert p.log_std[1] > p.log_std[0]
    assert (p.low < p.time).all()
    assert (p.time < p.high).all()


def test_unmeasured_software_of_a_known_framework_is_priced_as_its_like():
    known = {"a/megatron", "b/megatron", "c/"}
    families = np.array(["b/megatron", "new/megatron", "new/jax", "c/", "d/"], object)
    assert hybrid.resolved(families, known).tolist() == [
        "b/megatron",
        "a/megatron",
        "new/jax",
        "c/",
        "d/",
    ]


def test_nothing_to_fit_is_said():
    with pytest.raises(ValueError, match="none of 0 measurements has a step time"):
        fit.gather([])
