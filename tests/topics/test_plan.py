"""The planner: its space by brute force, its columns and bytes against the cost model, ranking,
errors.
"""

import dataclasses
import itertools
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from fdp import config as fdp_config
from fdp.cost import hybrid, network, step_time, workload
from fdp.cost.architecture import architecture
from fdp.cost.hardware import cluster
from fdp.cost.workload import RECOMPUTE, Job, Plan
from fdp.models.shape import ModelShape
from fdp.topics.parallelism_search import plan as planner
from fdp.topics.parallelism_search import settings

pytestmark = pytest.mark.fast

SMALL = replace(
    architecture("llama3-8b"),
    name="small",
    layers=6,
    heads=8,
    kv_heads=2,
    head_dim=64,
    width=512,
    ffn=1024,
    vocab=4096,
)
EXPERTS = replace(SMALL, name="experts", experts=8, topk=2, moe_ffn=512, first_dense=2)
DEEP = replace(SMALL, name="deep", layers=32)
H100 = cluster("h100:4x8").chip


@pytest.fixture(scope="module")
def model():
    return hybrid.shipped()


def job_of(name_or_architecture, text, batch=1024, seq=4096, precision="bf16"):
    a = (
        architecture(name_or_architecture)
        if isinstance(name_or_architecture, str)
        else name_or_architecture
    )
    here = cluster(text)
    return planner.job_on(a, here, batch, seq, precision), here


@pytest.fixture(scope="module")
def llama(model):
    return planner.rank(model, *job_of("llama3-70b", "h100:32x8"))


def tuples(points):
    return list(zip(*(points[k].tolist() for k in planner.KEYS), strict=True))


def by_loops(a, chips, batch, seq):
    """The same space, one plan at a time, from the sentences of the docstring."""
    found = set()
    sides = range(1, chips + 1)
    for tp, pp, cp, ep in itertools.product(sides, sides, sides, range(1, max(a.experts, 1) + 1)):
        if (
            chips % (tp * pp * cp)
            or a.heads % tp
            or seq % (cp * tp)
            or (cp > 1 and seq / cp < 256)
            or pp > a.layers
        ):
            continue
        dp = chips // (tp * pp * cp)
        if max(a.experts, 1) % ep or (dp * cp * tp) % ep:
            continue
        for microbatch, virtual in itertools.product(
            (1, 2, 4, 8, 16, 32), range(1, min(a.layers, 12) + 1)
        ):
            if batch % (dp * microbatch):
                continue
            m = batch // (dp * microbatch)
            if virtual > 1 and (pp == 1 or m % pp or a.layers % (pp * virtual)):
                continue
            modes = (RECOMPUTE.index("none"), RECOMPUTE.index("full"))
            for recompute, zero in itertools.product(modes, (0, 1, 3) if dp * cp > 1 else (0,)):
                found.add((tp, pp, dp, cp, ep, 1, virtual, microbatch, recompute, zero))
    return found


@pytest.mark.parametrize(
    ("a", "chips", "batch", "seq"),
    [(SMALL, 12, 24, 1024), (EXPERTS, 8, 16, 512), (SMALL, 1, 3, 7), (DEEP, 2, 4, 64)],
)
def test_space_is_what_the_rules_allow_and_nothing_twice(a, chips, batch, seq):
    points = tuples(planner.space(a, chips, batch, seq))
    assert len(points) == len(set(points))
    assert set(points) == by_loops(a, chips, batch, seq)


@pytest.mark.parametrize("sizes", [(0, 8, 512), (8, 0, 512), (8, 8, 0)])
def test_space_refuses_sizes_below_one(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        planner.space(SMALL, *sizes)


def test_expert_parallelism_and_wide_tensor_parallelism_are_in_the_space():
    points = planner.space(architecture("deepseek-v3"), 256, 1024, 4096)
    assert points["ep"].max() == 256 and points["tp"].max() == planner.TP_LIMIT
    assert (points["tp"] * points["pp"] * points["cp"] * points["dp"] == 256).all()


@pytest.mark.parametrize("name", ["llama3-70b", "deepseek-v3"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_columns_and_prices_are_those_of_real_jobs(model, name, precision):
    job, here = job_of(name, "h100:4x8", 64, 4096, precision)
    points = planner.space(job.architecture, here.size, 64, 4096)
    index = np.random.default_rng(0).choice(planner.size_of(points), 300, replace=False)
    sample = {k: v[index] for k, v in points.items()}
    jobs = [dataclasses.replace(job, plan=planner.plan_at(sample, i)) for i in range(len(index))]
    for one in jobs:
        workload.check(one)
    expected, got = workload.columns(jobs), planner.columns_of(job, sample)
    assert list(expected) == list(got)
    for key in expected:
        assert expected[key].dtype == got[key].dtype and np.array_equal(expected[key], got[key]), (
            key
        )
    whole, real = planner.price(model, job, points), hybrid.predict(model, expected)
    assert whole.time.shape == (planner.size_of(points),)  # several padded chunks
    for key in ("time", "low", "high", "memory", "feasible"):
        np.testing.assert_allclose(
            getattr(whole, key)[index], getattr(real, key), rtol=2e-5, atol=1e-12
        )


ALONE = {  # nothing overlaps, no latency, links at their peak
    **dict.fromkeys(
        ("overlap_tp", "overlap_dp", "overlap_ep", "overlap_cp", "alpha_up", "alpha_out"), 0.0
    ),
    **dict.fromkeys(("congestion", "bubble", "stage", "balanced"), 0.0),
    **dict.fromkeys(("link_up", "link_out", "exposed_pp", "exposed_gather", "uneven"), 1.0),
}


def test_bytes_by_axis_are_those_that_the_step_time_prices(model):
    """On one network of one speed, without overlap, a term's seconds times the bandwidth are its
    bytes.
    """
    a = replace(EXPERTS, layers=8, first_dense=0, vocab=32768)
    job, _ = job_of(a, "h100:8x8", 64, 1024)
    job = dataclasses.replace(job, domain=10**6)
    points = planner.space(a, 64, 64, 1024)
    points = {k: v[8 % points["pp"] == 0] for k, v in points.items()}  # equal stages
    x = planner.columns_of(job, points)
    with jax.enable_x64(True):
        k = hybrid.time_coefficients(hybrid.numeric(x), model.time, {})
        terms = jax.jit(step_time.step_time)(
            hybrid.numeric(x), k | {n: np.full(len(x["tp"]), v) for n, v in ALONE.items()}
        )
        terms = {n: np.asarray(v) for n, v in terms.items()}
        moved = planner.traffic(x)
    fill = (x["microbatches"] + x["pp"] - 1) / x[
        "microbatches"
    ]  # transfers of the pipeline's fill are waited for too
    for axis in planner.AXES:
        assert (moved[axis] > 0).any(), axis
        seconds = terms[axis] / (fill if axis == "pp" else 1.0)
        np.testing.assert_allclose(seconds * x["up"], moved[axis], rtol=1e-9, err_msg=axis)


def test_one_chip_sends_nothing():
    job, _ = job_of(SMALL, "h100:1x1", 8, 512)
    points = planner.space(SMALL, 1, 8, 512)
    assert all((v == 0).all() for v in planner.traffic(planner.columns_of(job, points)).values())


def test_bytes_of_a_dense_plan_by_hand():
    plan = Plan(tp=4, pp=2, dp=2, cp=2, microbatch=1, zero=1, recompute="full")
    job = Job(SMALL, plan, cluster("h100:4x8").chip, 8, 1024)
    moved = {k: float(v[0]) for k, v in planner.traffic(workload.columns([job])).items()}
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
        for k, v in planner.traffic(workload.columns([Job(EXPERTS, plan, H100, 8, 1024)])).items()
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
    share = planner._leaving(
        workload.columns([Job(SMALL, plan, cluster("h100:1x8").chip, 8, 1024)])
    )
    got = {k: float(v[0]) for k, v in share.items()}
    assert got == {"tp": 0.0, "cp": 0.5, "ep": 0.0, "pp": 1.0, "dp": 0.5}


def test_llama_70b_on_256_h100_is_planned_sensibly(llama):
    assert len(llama.plans) == planner.KEPT and llama.valid > llama.feasible > 1000
    first = llama.plans[0]
    assert first.plan.chips == 256 and first.memory < 80 * 2**30 and first.feasible >= 0.5
    assert not (first.plan.tp == first.plan.pp == 1 and first.plan.zero == 0)
    times = [r.time for r in llama.plans]
    assert times == sorted(times) and all(r.low < r.time < r.high for r in llama.plans)
    flops = 3 * architecture("llama3-70b").forward_flops(4096) * 1024 * 4096
    assert 0.25 < flops / (256 * 989e12 * first.time) < 0.65  # the MFU of published runs
    for r in llama.plans:
        workload.check(dataclasses.replace(llama.job, plan=r.plan))


def test_energy_lies_between_idle_and_the_cap(llama):
    for r in llama.plans:
        watts = r.joules / r.time / 256 - 1800 / 8  # of a chip
        assert 70 < watts <= 700
        assert r.tokens_per_joule == pytest.approx(1024 * 4096 / r.joules)


def test_work_of_all_chips_is_that_of_the_model_whatever_the_degrees(model):
    """3 forward passes, half a pass of scores that fused attention redoes, and what is
    recomputed.
    """
    a = architecture("llama3-8b")
    scores, head = 2 * 32 * 4096 * 32 * 256 * 0.5, 2.0 * a.vocab * a.width
    extra = {"none": 0.0, "selective": scores, "full": a.forward_flops(4096) - head}
    for degrees, (recompute, more) in itertools.product(
        ({"dp": 8}, {"tp": 4, "pp": 2}, {"cp": 8}), extra.items()
    ):
        job = Job(a, Plan(**degrees, recompute=recompute), cluster("h100:1x8").chip, 64, 4096)
        flops, hbm = planner._work(model, job, workload.columns([job]))
        expected = 64 * 4096 * (3 * a.forward_flops(4096) + 0.5 * scores + more)
        assert 8 * float(flops["linear"][0] + flops["rest"][0]) == pytest.approx(expected, rel=1e-9)
        # At least the weights and Adam's state once, at most all of the step at the rate of the
        # memory.
        assert (
            hbm[0] > (8 + 30) * a.parameters() / 8 / 8 and hbm[0] / 3.35e12 < expected / 8 / 989e12
        )
        _, whole = planner._work(model, job, workload.columns([workload.with_plan(job, zero=0)]))
        held = float(sum(step_time.local_parameters(workload.columns([job])))[0])
        ranks = job.plan.dp * job.plan.cp
        assert whole[0] - hbm[0] == pytest.approx(30 * held * (1 - 1 / ranks), rel=1e-3, abs=1.0)


def test_the_best_is_the_best_of_all_that_run(model, llama):
    points = planner.space(llama.job.architecture, 256, 1024, 4096)
    p = planner.price(model, llama.job, points)
    runs = p.feasible >= 0.5
    assert llama.feasible == runs.sum() and llama.plans[0].time == p.time[runs].min()
    assert np.sort(p.time[runs])[:10].tolist() == [r.time for r in llama.plans]


def test_reasons_add_up_to_the_distance(llama):
    best = llama.plans[0]
    for r in llama.plans[1:]:
        assert sum(r.terms.values()) == pytest.approx(r.time, rel=1e-5)
        distance = sum(r.terms[k] - best.terms[k] for k in best.terms) / best.time
        assert distance == pytest.approx(r.time / best.time - 1, abs=1e-5)
    assert best.why == "fastest" and all(r.why for r in llama.plans)


def test_reason_names_the_largest_difference_first():
    base = dict.fromkeys((*hybrid.BOTTLENECKS, "correction"), 0.0)
    text = planner.why(
        base | {"compute": 100.0, "pp": 12.0, "tp": 0.0}, base | {"compute": 97.0, "tp": 3.0}
    )
    assert (
        text
        == "+12 % pipeline bubble and transfers, +3 % compute, −3 % tensor-parallel communication"
    )
    assert planner.why(base | {"compute": 1.0}, base | {"compute": 1.0}) == ""


def test_a_torus_is_planned_without_energy(model):
    ranking = planner.rank(model, *job_of("llama3-70b", "v5p:4x8x8"))
    assert ranking.plans[0].plan.chips == 256 and ranking.plans[0].memory < 96 * 2**30
    assert ranking.job.domain == 8960 and np.isnan(ranking.plans[0].joules)
    assert "–" in planner.describe(ranking)


def test_a_mixed_cluster_is_priced_with_its_weakest(model):
    mixed = planner.rank(model, *job_of("llama3-8b", "h100:2x8+a100_40gb:2x8", 256))
    same = planner.rank(model, *job_of("llama3-8b", "a100_40gb:4x8", 256))
    assert [r.plan for r in mixed.plans] == [r.plan for r in same.plans]
    assert mixed.plans[0].time == same.plans[0].time
    assert "mixed cluster" in planner.describe(mixed)
    # The slowest chip is the A100 of 80 GiB, the smallest memory that of the L40S.
    weak = planner.weakest(cluster("a100:1x8+l40s:1x8"))
    assert weak.name == "a100" and weak.hbm_bytes == 45 * 2**30 and weak.peak_fp8_flops is None
    assert (
        planner.domain_of(cluster("h100:8x4")) == 4
        and planner.domain_of(cluster("gb200:4x72")) == 72
    )


def test_energy_of_a_mixed_cluster_is_the_sum_of_its_groups(model):
    job, both = job_of("llama3-8b", "h100:2x8+a100:2x8", 256)
    points = planner.space(job.architecture, 32, 256, 4096)
    points = {k: v[:64] for k, v in points.items()}
    x, p = planner.columns_of(job, points), planner.price(model, job, points)
    parts = [planner.joules(model, job, cluster(text), x, p) for text in ("h100:2x8", "a100:2x8")]
    np.testing.assert_allclose(planner.joules(model, job, both, x, p), sum(parts), rtol=1e-12)
    # The faster group waits: less than were it busy as long as the slow one.
    alone = dataclasses.replace(job, chip=cluster("h100:2x8").chip)
    assert (parts[0] < planner.joules(model, alone, cluster("h100:2x8"), x, p)).all()


def test_experts_are_ranked_with_expert_parallelism(model):
    ranking = planner.rank(model, *job_of("mixtral-8x7b", "h100:8x8", 256))
    assert ranking.plans[0].traffic["ep"] > 0 and ranking.trainable is None
    text = planner.fragment(ranking)
    assert "mixture of 8 experts" in text and "PLAN" in text
    exec(compile(text, "fragment", "exec"), names := {})
    assert names["PLAN"] == dataclasses.asdict(ranking.plans[0].plan)


@pytest.mark.parametrize(
    ("name", "where"), [("llama3-70b", "h100:32x8"), ("llama3-8b", "v5p:4x4x4")]
)
def test_fragment_is_a_valid_config_with_the_mesh_of_the_plan(model, tmp_path, name, where):
    ranking = planner.rank(model, *job_of(name, where))
    path = tmp_path / "planned.py"
    path.write_text(planner.fragment(ranking), "utf8")
    exec(compile(path.read_text("utf8"), str(path), "exec"), names := {})
    c = names["get_config"]()
    fdp_config.validate(c)
    plan = ranking.trainable.plan
    assert dict(c.mesh) == {"pp": 1, "dp": plan.dp, "ep": 1, "cp": plan.cp, "tp": plan.tp}
    assert (c.train.batch, c.train.zero, c.model.remat) == (1024, plan.zero, plan.recompute)
    assert c.train.batch // (c.train.microbatches * plan.dp) == plan.microbatch
    assert (
        c.model.sequence_parallel == (plan.tp > 1)
        and c.hardware.topology == where
        and c.data.seq_len == 4096
    )
    assert {k: c.model[k] for k in ("layers", "width", "heads", "kv_heads", "ffn", "vocab")} == {
        k: getattr(architecture(name), k)
        for k in ("layers", "width", "heads", "kv_heads", "ffn", "vocab")
    }


@pytest.mark.parametrize(
    "changes", [{"kv_heads": 2}, {"ffn": 1028}, {"width": 516}, {"vocab": 4100}]
)
def test_fragment_takes_no_plan_that_validation_refuses(changes):
    """Every plan called trainable passes; every other one without pipeline is refused or recomputes
    selectively.
    """
    a = replace(SMALL, **{"kv_heads": 8} | changes)
    job, here = job_of(a, "h100:1x8", 16, 1024)
    points = planner.space(a, 8, 16, 1024)
    points = {k: v[(points["pp"] == 1)] for k, v in points.items()}
    marked = planner.trainable(job, points)
    assert 0 < marked.sum() < len(marked)
    for i, ok in enumerate(marked):
        plan = planner.plan_at(points, i)
        if plan.recompute == "selective":
            assert not ok
            continue
        row = planner.Ranked(plan, 1, 1, 1, 1, 1, 1, 1, {}, "", {}, "")
        text = planner.fragment(planner.Ranking(job, here, 1, 1, (row,), row))
        exec(compile(text, "fragment", "exec"), names := {})
        try:
            fdp_config.validate(names["get_config"]())
        except fdp_config.UserError:
            assert not ok, plan
        else:
            assert ok, plan


def test_table_tells_plans_and_reasons(llama):
    text = planner.describe(llama)
    assert (
        "llama3-70b on h100:32x8: 256 chips" in text
        and planner.name_of(llama.plans[0].plan) in text
    )
    assert text.rstrip().splitlines()[-1].startswith("10  ") and " 1  fastest" in text
    assert "simulated: cost model fitted on published runs" in text and "extrapolation" not in text


def test_a_plan_for_a_tpu_says_that_none_was_fitted(model):
    text = planner.describe(planner.rank(model, *job_of("llama3-8b", "v5p:4x4x4")))
    assert "no v5p, no TPU at all, was in the fit: an extrapolation" in text


def test_a_plan_to_train_keeps_room_for_what_the_compiler_adds(model):
    """Priced without fused attention, and the fastest of those that fit 1.5 times their
    footprint.
    """
    job, here = job_of("llama3-8b", "h100:2x8", 64)
    own = planner.rank(model, job, here).trainable
    points = planner.space(job.architecture, 16, 64, 4096)
    plans = {k: v[planner.trainable(job, points)] for k, v in points.items()}
    p = planner.price(model, dataclasses.replace(job, modern=False), plans)
    fits = p.memory * 1.5 <= job.chip.hbm_bytes
    assert 0 < fits.sum() < len(fits)
    assert own.time == pytest.approx(p.time[fits].min())


def test_too_large_a_model_names_memory_and_the_smallest_cluster_that_holds_it(model):
    with pytest.raises(fdp_config.UserError, match="smallest footprint") as error:
        planner.rank(model, *job_of("llama3-70b", "h100:1x8", 64))
    assert "80 GiB" in str(error.value)
    chips = int(str(error.value).partition("use ")[2].split()[0])
    job, _ = job_of("llama3-70b", "h100:1x8", 64)
    fits = [n for n in range(2, chips // 8 + 1) if planner._fits(model, job, 8 * n, 4096)]
    assert fits == [chips // 8]


def test_too_long_a_sequence_is_halved_until_it_fits(model):
    with pytest.raises(fdp_config.UserError, match=r"set plan\.seq_len=") as error:
        planner.rank(model, *job_of("llama3-8b", "h100:1x8", 8, 2**20))
    seq = int(str(error.value).partition("plan.seq_len=")[2].split()[0].rstrip(":,"))
    job, _ = job_of("llama3-8b", "h100:1x8", 8)
    assert planner._fits(model, job, 8, seq) and not planner._fits(model, job, 8, 2 * seq)


def test_an_indivisible_batch_names_the_nearest_batch_and_chips(model):
    with pytest.raises(
        fdp_config.UserError,
        match=r"none divides the batch 1024: set plan.batch=1143 or use 124 chips",
    ):
        planner.rank(model, *job_of("llama3-8b", "h100:1x127"))
    a = architecture("llama3-8b")
    assert planner.size_of(planner.space(a, 127, 1143, 4096)) and planner.size_of(
        planner.space(a, 124, 1024, 4096)
    )
    for chips, batch in ((125, 1024), (126, 1024), (127, 1142)):
        assert not planner.size_of(planner.space(a, chips, batch, 4096))


def test_a_chip_without_the_precision_is_a_user_error(model):
    c = fdp_config.base(**settings.SECTIONS)
    c.plan.update(cluster="a100:4x8", precision="fp8")
    with pytest.raises(fdp_config.UserError, match="without fp8"):
        planner.for_config(c, model)


def test_config_plans_its_own_model(model):
    c = fdp_config.base(**settings.SECTIONS)
    c.plan.update(model="", cluster="h100:1x8", batch=64, seq_len=1024)
    ranking = planner.for_config(c, model)
    assert ranking.job.architecture == ModelShape.of(c.model) and ranking.cluster.size == 8
    assert not ranking.job.causal
    c.objective.name = "autoregressive"
    assert planner.for_config(c, model).job.causal


def test_512_chips_are_ranked_within_two_seconds(model):
    job, here = job_of("llama3-70b", "h100:64x8")
    planner.rank(model, job, here)
    start = time.process_time()  # of this process: the machine may be shared
    planner.rank(model, job, here)
    assert time.process_time() - start < 2 * 2  # two cores


def test_throughput_counts_all_plans(model):
    job, _ = job_of("llama3-70b", "h100:64x8")
    assert planner.throughput(model, job, 512) > 3e4  # 1e5 on two idle cores


@pytest.mark.parametrize(
    "key", ["scale_up_bandwidth", "scale_out_bandwidth", "hbm_bandwidth", "peak_bf16_flops"]
)
def test_faster_hardware_is_never_slower(model, key):
    job, here = job_of("mixtral-8x7b", "h100:8x8", 128)
    points = planner.space(job.architecture, here.size, 128, 4096)
    points = {k: v[::37] for k, v in points.items()}
    better = dataclasses.replace(
        job, chip=dataclasses.replace(job.chip, **{key: 2 * getattr(job.chip, key)})
    )
    before, after = (planner.price(model, j, points).analytic for j in (job, better))
    assert (after <= before * (1 + 1e-5)).all() and (after < before * 0.999).any()


@pytest.mark.parametrize("key", ["seq", "batch", "width", "kv_width", "vocab", "topk"])
def test_more_bytes_take_longer(model, key):
    job, here = job_of("mixtral-8x7b", "h100:8x8", 128)
    points = planner.space(job.architecture, here.size, 128, 4096)
    index = np.random.default_rng(0).choice(planner.size_of(points), 300)
    x = planner.columns_of(job, {k: v[index] for k, v in points.items()})
    more = x | {key: 2 * x[key]}
    if key == "batch":
        more["microbatches"] = 2 * x["microbatches"]
    before, after = hybrid.predict(model, x).analytic, hybrid.predict(model, more).analytic
    assert (after >= before * (1 - 1e-5)).all() and (after > before * 1.001).any()


def test_one_chip_has_no_communication_time(model):
    job, _ = job_of(SMALL, "h100:1x1", 8, 512)
    p = planner.price(model, job, planner.space(SMALL, 1, 8, 512))
    for term in ("tp", "cp", "ep", "dp"):
        assert (p.terms[term] == 0).all(), term
    assert network.all_reduce(1e9, 1, 1e-5, 1e9) == 0
