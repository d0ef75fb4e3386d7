"""Bytes, FLOPs and joules of a step of a plan: by hand, against the step time, over the groups of a
cluster."""

import dataclasses
import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from fdp.price import hybrid, ranking, space, step_time, workload
from fdp.price import traffic as spent
from fdp.price.hardware import cluster
from fdp.price.shapes import named
from fdp.price.workload import Job, Plan
from tests.price.planning_jobs import EXPERTS, SMALL, job_of, with_plan

pytestmark = pytest.mark.fast

H100 = cluster("h100:4x8").chip
ALONE = {  # nothing overlaps, no latency, links at their peak
    **dict.fromkeys(
        ("overlap_tp", "overlap_dp", "overlap_ep", "overlap_cp", "alpha_up", "alpha_out"), 0.0
    ),
    **dict.fromkeys(("congestion", "bubble", "stage", "balanced"), 0.0),
    **dict.fromkeys(("link_up", "link_out", "exposed_pp", "exposed_gather", "uneven"), 1.0),
}


@pytest.fixture(scope="module")
def model():
    return hybrid.shipped()


def test_bytes_by_axis_are_those_that_the_step_time_prices(model):
    """On one network of one speed, without overlap, a term's seconds times the bandwidth are its
    bytes.
    """
    a = replace(EXPERTS, layers=8, first_dense=0, vocab=32768)
    job, _ = job_of(a, "h100:8x8", 64, 1024)
    job = dataclasses.replace(job, domain=10**6)
    points = space.space(a, 64, 64, 1024)
    points = {k: v[8 % points["pp"] == 0] for k, v in points.items()}  # equal stages
    x = space.columns_of(job, points)
    with jax.enable_x64(True):
        k = hybrid.time_coefficients(hybrid.numeric(x), model.time, {})
        terms = jax.jit(step_time.step_time)(
            hybrid.numeric(x), k | {n: np.full(len(x["tp"]), v) for n, v in ALONE.items()}
        )
        terms = {n: np.asarray(v) for n, v in terms.items()}
        moved = spent.traffic(x)
    fill = (x["microbatches"] + x["pp"] - 1) / x[
        "microbatches"
    ]  # transfers of the pipeline's fill are waited for too
    for axis in spent.AXES:
        assert (moved[axis] > 0).any(), axis
        seconds = terms[axis] / (fill if axis == "pp" else 1.0)
        np.testing.assert_allclose(seconds * x["up"], moved[axis], rtol=1e-9, err_msg=axis)


def test_one_chip_sends_nothing():
    job, _ = job_of(SMALL, "h100:1x1", 8, 512)
    points = space.space(SMALL, 1, 8, 512)
    assert all((v == 0).all() for v in spent.traffic(space.columns_of(job, points)).values())


def test_bytes_of_a_dense_plan_by_hand():
    plan = Plan(tp=4, pp=2, dp=2, cp=2, microbatch=1, zero=1, recompute="full")
    job = Job(SMALL, plan, cluster("h100:4x8").chip, 8, 1024)
    moved = {k: float(v[0]) for k, v in spent.traffic(workload.columns([job])).items()}
    T, D, m, layers = 512, 512, 4, 3
    assert moved["tp"] == 6 * 2 * 3 / 4 * 2 * T * D * layers * m
    assert (
        moved["cp"] == 3 * (2 * 2 * T * 64) * layers * m
    )  # two key/value heads on four ranks: one each, replicated
    assert moved["pp"] == 2 * m * 2 * T * D / 4 and moved["ep"] == 0
    held = (
        layers * (sum(SMALL.attention_parameters()) + SMALL.ffn_parameters()) / 4
        + SMALL.vocab * D / 4
    )
    assert moved["dp"] == pytest.approx(
        2 * 3 / 4 * held * 3
    )  # fp32 scatter, bf16 gather over dp·cp = 4


def test_bytes_of_experts_under_zero_3_by_hand():
    """Two of six layers are dense. Over ep = 4 of dp·tp = 8 ranks, an expert has two replicas."""
    plan = Plan(tp=2, dp=4, ep=4, microbatch=1, zero=3)
    moved = {
        k: float(v[0])
        for k, v in spent.traffic(workload.columns([Job(EXPERTS, plan, H100, 8, 1024)])).items()
    }
    T, D, m, layers, moe = 1024, 512, 2, 6, 4
    # Sequence parallelism leaves tokens split, so that an expert layer has attention's two
    # reductions only.
    assert moved["tp"] == pytest.approx((4 * (layers - moe) + 2 * moe) * 2 * T * D * m)
    assert moved["ep"] == 4 * (2 * T / 2 * 2 * D) * 3 / 4 * moe * m
    experts = 8 / 4 * moe * 3 * D * 512
    embedding = EXPERTS.vocab * D / 2 * 2
    plain = (
        layers * sum(EXPERTS.attention_parameters()) + (layers - moe) * 3 * D * EXPERTS.ffn
    ) / 2
    # bfloat16 gathers forward and backward and a float32 scatter, in every microbatch.
    assert moved["dp"] == pytest.approx(
        (2 + 2 + 4) * m * ((plain + embedding) * 3 / 4 + experts / 2)
    )


def test_what_leaves_the_domain_follows_the_rank_order():
    plan = Plan(tp=4, cp=4, dp=4, pp=2)
    share = spent._leaving(workload.columns([Job(SMALL, plan, cluster("h100:1x8").chip, 8, 1024)]))
    got = {k: float(v[0]) for k, v in share.items()}
    assert got == {"tp": 0.0, "cp": 0.5, "ep": 0.0, "pp": 1.0, "dp": 0.5}


def test_work_of_all_chips_is_that_of_the_model_whatever_the_degrees(model):
    """3 forward passes, half a pass of scores that fused attention redoes, and what is
    recomputed.
    """
    a = named("llama3-8b")
    scores, head = 2 * 32 * 4096 * 32 * 256 * 0.5, 2.0 * a.vocab * a.width
    extra = {"none": 0.0, "selective": scores, "full": a.forward_flops(4096, causal=True) - head}
    for degrees, (recompute, more) in itertools.product(
        ({"dp": 8}, {"tp": 4, "pp": 2}, {"cp": 8}), extra.items()
    ):
        job = Job(a, Plan(**degrees, recompute=recompute), cluster("h100:1x8").chip, 64, 4096)
        flops, hbm = spent._work(model, job, workload.columns([job]))
        expected = 64 * 4096 * (3 * a.forward_flops(4096, causal=True) + 0.5 * scores + more)
        assert 8 * float(flops["linear"][0] + flops["rest"][0]) == pytest.approx(expected, rel=1e-9)
        # At least the weights and Adam's state once, at most all of the step at the rate of the
        # memory.
        assert (
            hbm[0] > (8 + 30) * a.parameters() / 8 / 8 and hbm[0] / 3.35e12 < expected / 8 / 989e12
        )
        _, whole = spent._work(model, job, workload.columns([with_plan(job, zero=0)]))
        held = float(sum(step_time.local_parameters(workload.columns([job])))[0])
        older = replace(job, modern=False)  # its scores are kept for the backward pass
        less, _ = spent._work(model, older, workload.columns([older]))
        assert 8 * float(flops["rest"][0] - less["rest"][0]) == pytest.approx(
            64 * 4096 * 0.5 * scores
        )
        ranks = job.plan.dp * job.plan.cp
        assert whole[0] - hbm[0] == pytest.approx(30 * held * (1 - 1 / ranks), rel=1e-3, abs=1.0)


def test_energy_of_a_mixed_cluster_is_the_sum_of_its_groups(model):
    job, both = job_of("llama3-8b", "h100:2x8+a100:2x8", 256)
    points = space.space(job.shape, 32, 256, 4096)
    points = {k: v[:64] for k, v in points.items()}
    x, p = space.columns_of(job, points), ranking.price(model, job, points)
    parts = [spent.joules(model, job, cluster(text), x, p) for text in ("h100:2x8", "a100:2x8")]
    np.testing.assert_allclose(spent.joules(model, job, both, x, p), sum(parts), rtol=1e-12)
    # The faster group waits: less than were it busy as long as the slow one.
    alone = dataclasses.replace(job, chip=cluster("h100:2x8").chip)
    assert (parts[0] < spent.joules(model, alone, cluster("h100:2x8"), x, p)).all()
