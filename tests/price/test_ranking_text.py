"""A ranking written out: the table names plans, reasons and evidence, the fragment is a valid
config."""

import dataclasses
from dataclasses import replace

import pytest

from fdp import config as fdp_config
from fdp.models.shape import ModelShape
from fdp.price import hybrid, ranking, ranking_text, space
from fdp.price.shapes import named
from tests.price.planning_jobs import SMALL, job_of

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def model():
    return hybrid.shipped()


@pytest.fixture(scope="module")
def llama(model):
    return ranking.rank(model, *job_of("llama3-70b", "h100:32x8"))


def test_experts_are_ranked_with_expert_parallelism(model):
    found = ranking.rank(model, *job_of("mixtral-8x7b", "h100:8x8", 256))
    assert found.plans[0].traffic["ep"] > 0
    exec(compile(ranking_text.fragment(found, ""), "fragment", "exec"), names := {})
    c, plan = names["get_config"](), found.trainable.plan
    fdp_config.validate(c)
    assert (c.mesh.dp * c.mesh.ep, c.mesh.ep, c.mesh.tp) == (plan.dp, plan.ep, 1)
    assert (c.model.moe.experts, c.model.moe.ffn) == (8, 14336)


def test_what_is_missing_of_a_model_is_named(model):
    found = ranking.rank(model, *job_of("deepseek-v3", "h100:32x8", 1024))
    assert found.trainable is None
    text = ranking_text.fragment(found, "")
    assert "latent attention" in text
    exec(compile(text, "fragment", "exec"), names := {})
    assert names["PLAN"] == dataclasses.asdict(found.plans[0].plan)


@pytest.mark.parametrize(
    ("name", "where"), [("llama3-70b", "h100:32x8"), ("llama3-8b", "v5p:4x4x4")]
)
def test_fragment_is_a_valid_config_with_the_mesh_of_the_plan(model, tmp_path, name, where):
    found = ranking.rank(model, *job_of(name, where))
    path = tmp_path / "planned.py"
    path.write_text(ranking_text.fragment(found, ""), "utf8")
    exec(compile(path.read_text("utf8"), str(path), "exec"), names := {})
    c = names["get_config"]()
    fdp_config.validate(c)
    plan = found.trainable.plan
    assert dict(c.mesh) == {"pp": 1, "dp": plan.dp, "ep": 1, "cp": plan.cp, "tp": plan.tp}
    assert (c.train.batch, c.train.zero, c.model.remat) == (1024, plan.zero, plan.recompute)
    assert c.train.batch // (c.train.microbatches * plan.dp) == plan.microbatch
    assert (
        c.model.sequence_parallel == (plan.tp > 1)
        and c.hardware.topology == where
        and c.data.seq_len == 4096
    )
    assert {k: c.model[k] for k in ("layers", "width", "heads", "kv_heads", "ffn", "vocab")} == {
        k: getattr(named(name), k) for k in ("layers", "width", "heads", "kv_heads", "ffn", "vocab")
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
    points = space.space(a, 8, 16, 1024)
    points = {k: v[(points["pp"] == 1)] for k, v in points.items()}
    marked = space.trainable(job, points)
    assert 0 < marked.sum() < len(marked)
    for i, ok in enumerate(marked):
        plan = space.plan_at(points, i)
        if plan.recompute == "selective":
            assert not ok
            continue
        row = ranking.Ranked(plan, 1, 1, 1, 1, 1, 1, 1, {}, "", {}, "")
        text = ranking_text.fragment(ranking.Ranking(job, here, 1, 1, (row,), row), "")
        exec(compile(text, "fragment", "exec"), names := {})
        try:
            fdp_config.validate(names["get_config"]())
        except fdp_config.UserError:
            assert not ok, plan
        else:
            assert ok, plan


def test_fragment_keeps_the_switches_of_the_model(model):
    a = replace(SMALL, kv_heads=8, tied=True, qk_norm=True, rope_base=5e5)
    job, here = job_of(a, "h100:1x8", 16, 1024)
    text = ranking_text.fragment(
        ranking.rank(model, dataclasses.replace(job, causal=False), here), ""
    )
    exec(compile(text, "fragment", "exec"), names := {})
    c = names["get_config"]()
    built = ModelShape.of(c.model)
    chosen = {k: getattr(built, k) for k in ranking_text.PLANNED}
    assert built == replace(a, name=built.name, **chosen) and c.objective.name == "mdlm"


def test_table_tells_plans_and_reasons(llama):
    text = ranking_text.describe(llama)
    assert (
        "llama3-70b on h100:32x8: 256 chips" in text and space.name_of(llama.plans[0].plan) in text
    )
    assert text.rstrip().splitlines()[-1].startswith("10  ") and " 1  fastest" in text
    assert "simulated: cost model fitted on published runs" in text and "extrapolation" not in text


def test_a_plan_for_a_tpu_says_that_none_was_fitted(model):
    text = ranking_text.describe(ranking.rank(model, *job_of("llama3-8b", "v5p:4x4x4")))
    assert "no v5p, no TPU at all, was in the fit: an extrapolation" in text
