"""The relaxation: its gradients, its time against the exact one, rounding, and the ranking as its
bound."""

import jax
import numpy as np
import pytest

from fdp.cost import hybrid, workload
from fdp.cost.architecture import architecture
from fdp.cost.hardware import cluster
from fdp.cost.workload import RECOMPUTE, Job, Plan
from fdp.topics.parallelism_search import plan as planner
from fdp.topics.parallelism_search import relax as relaxation
from tests.topics.planning_jobs import EXPERTS, job_of, tuples

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def model():
    return hybrid.shipped()


@pytest.fixture(scope="module")
def llama(model):
    return planner.rank(model, *job_of("llama3-70b", "h100:32x8"))


def interior(n, seed=0):
    """Columns of n jobs and real-valued log2 degrees away from the edges of the space."""
    rng = np.random.default_rng(seed)
    chip = cluster("h100:1x8").chip
    names = ["llama3-8b", "llama3-70b", "mixtral-8x7b", "gpt3-175b"]
    plans = [
        Plan(
            tp=2,
            dp=2,
            microbatch=int(2 ** rng.integers(0, 3)),
            zero=int(rng.choice([0, 1, 3])),
            recompute=str(rng.choice(RECOMPUTE)),
        )
        for _ in range(n)
    ]
    jobs = [Job(architecture(names[i % 4]), p, chip, 1024, 4096) for i, p in enumerate(plans)]
    return workload.columns(jobs), rng.uniform(0.2, 3.8, (n, 4))


def test_gradients_are_those_of_finite_differences(model):
    with jax.enable_x64(True):
        x, log2_NxD = interior(200)
        value = jax.jit(lambda d: relaxation.log_time(model, x, d))
        gradient = np.asarray(
            jax.jit(jax.grad(lambda d: relaxation.log_time(model, x, d).sum()))(log2_NxD)
        )
        assert gradient.dtype == np.float64
        for i in range(4):
            h = 1e-5 * np.eye(4)[i]
            central = np.asarray(value(log2_NxD + h) - value(log2_NxD - h)) / 2e-5
            np.testing.assert_allclose(gradient[:, i], central, rtol=1e-5, atol=1e-8)
    assert (np.abs(gradient).max(0) > 0.1).all()


def test_relaxed_time_is_the_exact_one_where_stages_are_equal(model):
    """80 layers make 8 equal stages; of 3 stages the relaxation holds 26⅔ each, the slowest has 27
    in truth.
    """
    job, _ = job_of("llama3-70b", "h100:32x8")
    plans = [Plan(tp=4, pp=8, dp=4, cp=2), Plan(tp=8, pp=3)]
    points = {
        k: np.array([0 if k == "recompute" else getattr(p, k) for p in plans]) for k in planner.KEYS
    }
    exact = planner.price(model, job, points).analytic
    degrees = np.log2([[getattr(p, k) for k in relaxation.DEGREES] for p in plans])
    x = planner.columns_of(job, points)
    relaxed = np.exp(jax.jit(lambda d: relaxation.log_time(model, x, d))(degrees))
    assert relaxed[0] == pytest.approx(exact[0], rel=1e-4) and relaxed[1] < 0.999 * exact[1]


def test_rounding_keeps_a_plan_that_is_one_already():
    points = planner.space(EXPERTS, 16, 32, 1024)
    for i in range(0, planner.size_of(points), 41):
        plan = planner.plan_at(points, i)
        degrees = np.log2([getattr(plan, k) for k in relaxation.DEGREES])
        assert relaxation._nearest(points, plan, degrees + 0.01) == i


def test_relaxation_does_not_beat_the_ranking(model, llama):
    points = planner.space(llama.job.architecture, 256, 1024, 4096)
    index = np.random.default_rng(0).integers(0, planner.size_of(points), 16)
    starts = [planner.plan_at(points, i) for i in index]
    found = relaxation.relax(model, llama.job, starts, steps=100)
    assert (
        found.best == llama.plans[0].time and found.gap >= 0 and (found.time_N >= found.best).all()
    )
    allowed = set(tuples(points))
    for plan in found.plans:
        values = vars(plan) | {"recompute": RECOMPUTE.index(plan.recompute)}
        assert tuple(values[k] for k in planner.KEYS) in allowed
    moved = relaxation.descend(model, llama.job, starts, 100)
    np.testing.assert_allclose(moved.sum(1), 8, rtol=1e-5)
    x = workload.columns(workload.with_plan(llama.job, **vars(p)) for p in starts)
    begin = np.log2([[getattr(p, k) for k in relaxation.DEGREES] for p in starts])
    objective = jax.jit(lambda d: relaxation.objective(model, x, d))
    began, ended = np.asarray(objective(begin)), np.asarray(objective(moved))
    assert np.median(ended - began) < -0.5 and (ended < began).mean() > 0.8


def test_relaxation_refuses_starts_of_different_sizes(model, llama):
    with pytest.raises(ValueError, match="one number of chips"):
        relaxation.descend(model, llama.job, [Plan(dp=8), Plan(dp=4)])
