"""The study of topic 15: what it reports without measurements, which hold-outs it knows, and the
mesh of its arm.
"""

import importlib
import math

import pytest

from configs import topic15
from fdp import config
from fdp.config import UserError
from fdp.models.shape import ModelShape
from fdp.price import ranking_text
from fdp.price.shapes import named
from fdp.topics.parallelism_search import planning, rows, study

pytestmark = pytest.mark.fast
TOPICS = {"adaptive_cp": "topic3", "parallel_dlm": "topic1"}


def test_without_measurements_the_claims_are_not_testable_and_say_what_to_set():
    found = rows.untestable("no folder nowhere")
    assert {row.verdict for row in found} == {"not testable here"}
    assert all("set plan.measurements to a folder" in row.note for row in found)
    assert all(row.decides for row in found)


@pytest.mark.parametrize("variant", ["tiny", "cpu", "h100", "pod"])
def test_the_arm_trains_on_the_mesh_that_the_planner_found(variant):
    c = topic15.get_config(variant)
    c.data.source = "blank"
    (planned,) = study.arms(c).values()
    assert math.prod(planned.degrees.values()) == math.prod(c.mesh.values())
    assert planned.degrees["pp"] == planned.degrees["ep"] == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "cluster",
            "h100:1x8",
            r"^config\.plan: .*smallest footprint is [\d.]+ GiB .* use \d+ h100",
        ),
        ("precision", "fp4", "has a chip without fp4"),
    ],
)
def test_a_plan_that_does_not_exist_is_refused_before_training(key, value, message):
    c = topic15.get_config("cpu")
    c.plan[key] = value
    with pytest.raises(UserError, match=message):
        study.arms(c)


def test_uneven_stages_agree_and_gain():
    agree, gain = rows.uneven(*study.STAGES, planning.uneven(*study.STAGES))
    assert agree.verdict == gain.verdict == "holds"
    assert gain.ratio < 0.95


def test_a_config_plans_for_a_published_model_or_its_own():
    c = topic15.get_config("tiny")
    c.plan.update(cluster="h100:1x8", batch=64, seq_len=1024)
    for model, objective, causal in (
        ("llama3-8b", "mdlm", True),
        ("", "mdlm", False),
        ("", "autoregressive", True),
    ):
        c.plan.model, c.objective.name = model, objective
        found = study.ranked(c)
        assert found.job.causal is causal and found.cluster.size == 8
        assert found.job.shape == (named(model) if model else ModelShape.of(c.model))


@pytest.mark.parametrize("model", ["llama3-8b", ""])
def test_the_config_that_is_written_is_one_that_its_topic_judges(model):
    """Causal models go to a topic whose study asks for one, others to that of masked models."""
    c = topic15.get_config("h100")
    c.plan.model, c.objective.name = model, "mdlm"
    c.plan.update(cluster="h100:1x8", batch=64, seq_len=1024)
    best = study.ranked(c)
    text = ranking_text.fragment(best, study.trainer(best.job.causal))
    exec(compile(text, "planned.py", "exec"), names := {})
    written = names["get_config"]()
    config.validate(written)
    objective = importlib.import_module(f"configs.{TOPICS[written.topic]}").get_config().objective
    assert written.objective.name == objective.name
