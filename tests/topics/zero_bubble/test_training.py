"""Stable targets, the judge, fillers in idle slots, and the yardstick of the DiT.

Legend: B images, N references."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import plain_dit
from configs.topic8 import get_config
from fdp.config import UserError, validate
from fdp.data.batches import Arrays
from fdp.experiment import standard
from fdp.mesh import AXES, abstract_mesh
from fdp.models import module
from fdp.mpmd_steps import StagedSteps
from fdp.objectives import EDM, Flow
from fdp.parallel.pipeline import fixed
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.orders import repeat
from fdp.step import TrainStep
from fdp.topics.zero_bubble import fillers, judge, quality, rows, study
from fdp.topics.zero_bubble.fillers import References, StableFlow, filled, stable, without
from fdp.topics.zero_bubble.op_costs import OpCosts
from fdp.topics.zero_bubble.steps import Clipped

pytestmark = pytest.mark.fast


def images(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (n, 4, 4, 1)).astype(np.float32), np.arange(n, dtype=np.int32) % 2


def test_a_stable_target_is_the_mean_over_images_of_the_class() -> None:
    x, labels = images(2)
    others, classes = images(6, 1)
    flow = StableFlow(2, 0.0, references=References(others, classes), n=6)
    batch = {"images": x, "labels": labels}
    key = jax.random.key(3)
    plain, found = Flow(2, 0.0).corrupt(key, batch), flow.corrupt(key, batch)
    np.testing.assert_array_equal(plain["inputs"], found["inputs"])
    for b in range(2):
        sigma = float(found["sigma"][b])
        z = np.asarray(found["inputs"][b]) * (1 + sigma)
        own = z - sigma * (np.asarray(plain["rows"][b]) + z) / (1 + sigma)  # rows = ε - x
        pool = np.concatenate([own[None], others[classes == int(found["labels"][b])]])
        weight = np.exp(-((z - pool) ** 2).sum((1, 2, 3)) / (2 * sigma**2))
        mean = (weight[:, None, None, None] * pool).sum(0) / weight.sum()
        want = (z - mean) / sigma - mean
        np.testing.assert_allclose(found["rows"][b], want, rtol=2e-4, atol=2e-4)


def test_little_noise_leaves_the_own_image() -> None:
    x, labels = images(2)
    others, classes = images(6, 1)
    given = Flow(2, 0.0, mean=-6.0, std=0.1)
    flow = stable(given, References(others, classes), 6)
    batch, key = {"images": x, "labels": labels}, jax.random.key(0)
    both = [o.corrupt(key, batch)["rows"] for o in (given, flow)]
    np.testing.assert_allclose(*both, rtol=1e-3, atol=1e-2)
    assert without(flow).corrupt(key, batch)["rows"] == pytest.approx(np.asarray(both[0]))


def test_stable_targets_are_for_flow() -> None:
    with pytest.raises(ValueError, match=r"set\s+objective.name='flow'"):
        stable(EDM(2), References(*images(2)), 2)


def test_work_in_idle_slots_costs_nothing_until_they_are_full() -> None:
    order, costs = fixed.zb_h1(4, 8), Costs()
    idle = evaluate(order, costs).makespan - 3 * 8
    result, growth = filled(order, costs, idle - 1, int(2 * (idle - 1)))
    assert growth == 0.0
    assert sum(op.kind == "AUX" for op in result.order.ops[0]) == int(2 * (idle - 1))
    assert filled(order, costs, idle + 6, 12)[1] > 0


def test_samples_of_a_run_under_zero_take_whole_parameters(monkeypatch) -> None:
    c, given = get_config("tiny"), []
    c.update_from_flattened_dict({"data.source": "blank", "mesh.pp": 1, "train.zero": 3})
    e = standard(c)
    program = TrainStep(e, abstract_mesh(e.degrees))

    def instead(_: object, variables: object, specs: object, *args: object, **kept: object) -> None:
        given.append(specs)

    monkeypatch.setattr(quality, "draw_images", instead)
    arm = SimpleNamespace(experiment=e, program=program, mesh=program.mesh)
    quality.sampled(arm, SimpleNamespace(variables={}), np.zeros(2, np.int32), 1)
    assert "dp" in str(program.specs.stored) and "dp" not in str(given)


def test_a_covariance_needs_two_samples() -> None:
    c = get_config("tiny")
    c.images.samples = 1
    with pytest.raises(UserError, match=r"images\.samples=1 must be an integer of at least 2"):
        validate(c)


def test_the_growth_of_a_step_is_measured_and_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = images(6)
    flow = stable(Flow(2), References(x, labels), 6)
    split = Arrays({"images": x, "labels": labels}, "images", "more")
    arm: Any = SimpleNamespace(objective=flow, data=SimpleNamespace(train=split))
    assert fillers.target_seconds(arm, 4) < 1
    timed = [OpCosts(1, 4, {"F": [1.0], "B": [1.0], "W": [1.0], "BW": [2.0]})]
    for seconds, verdict in ((0.01, "holds"), (8.0, "fails")):
        monkeypatch.setattr(fillers, "target_seconds", lambda *_, s=seconds: s)
        row = rows.growth(fillers.growth(arm, 2, timed, 4))
        assert row.verdict == verdict and f"targets of a microbatch {seconds:.3g} s" in row.note


def test_steps_to_equal_loss() -> None:
    curve = {n: 1 / n for n in range(1, 9)}
    assert rows.steps_to(curve, curve) == pytest.approx(1.0)
    assert rows.steps_to(curve, {n: 0.5 / n for n in range(1, 9)}) == pytest.approx(0.5, abs=0.1)
    assert rows.steps_to(curve, dict.fromkeys(curve, 2.0)) >= 1.0


def test_the_frechet_distance_of_normals() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 3))
    assert judge.frechet(x, x) == pytest.approx(0.0, abs=1e-9)
    assert judge.frechet(x, x + np.eye(3)[0]) == pytest.approx(1.0, abs=1e-9)
    assert judge.frechet(x, 2 * x) == pytest.approx(3.0, abs=0.1)  # (2 - 1)² a dim


def test_the_nearest_image() -> None:
    x, _ = images(6)
    at, gap = judge.nearest(x[[4, 1]] + 0.01, x)
    assert at.tolist() == [4, 1] and gap == pytest.approx([0.01, 0.01], rel=1e-3)


def test_the_yardstick_is_the_same_dit() -> None:
    c = get_config("tiny")
    with c.unlocked():
        c.mesh.update(dict.fromkeys(AXES, 1))
        c.train.microbatches, c.data.source = 1, "blank"
    e = standard(c)
    batch = {"images": np.ones((2, 16, 16, 3), np.float32), "labels": np.array([1, 2], np.int32)}
    noised = e.objective.corrupt(jax.random.key(0), batch)
    variables = module.init(e.model, jax.random.key(0), noised)
    rng = np.random.default_rng(0)
    random = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), variables
    )
    given = {k: noised[k] for k in ("inputs", "rows", "noise", "labels")}
    want = e.objective.loss(module.run(e.model, random, noised)[0], noised["rows"]).mean()
    got = plain_dit.loss(random["params"], given, 4)
    assert float(got) == pytest.approx(float(want), rel=1e-5)


def test_what_clipping_afterwards_gave_is_judged() -> None:
    found = Clipped(0.0, 1e-3, (0, 2), 3, 1.5, (2.0, 1.0, 1.9, 1.1), 0)
    row = rows.clipped(found)
    assert row.verdict == "holds" and "rolled back 2 steps, 3 operations run again" in row.note
    assert rows.clipped(found._replace(validated=2e-6)).verdict == "fails"


def test_every_experiment_of_the_comparisons_is_built() -> None:
    c = get_config("cpu")
    for name, degrees in study.MESHES.items():
        e = study.build(c, name, degrees)
        assert TrainStep(e, abstract_mesh(e.degrees)).experiment.grads.microbatches == 8
    free = study.build(c, "no barrier", {"pp": 2})
    assert not StagedSteps(free, repeat(free.grads.order, 2)).shared
