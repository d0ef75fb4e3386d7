"""Microbatches of unlike cost in one scheduled program, and what a config refuses of them."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from fdp import config
from fdp.count.compare import against_one_device
from fdp.experiment import standard
from fdp.mesh import AXES, make_mesh
from fdp.parallel.pipeline.executor import scheduled
from fdp.parallel.pipeline.fixed import gpipe
from fdp.step import TrainStep

DIT = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 32}
IMAGE = {"size": 8, "patch": 2, "coarse": 0.5}


def configured(pp: int, dp: int, micro: int):
    c = config.base()
    c.model.update(DIT | {"kind": "dit"})
    c.model.image.update(IMAGE)
    c.objective.name, c.objective.antithetic, c.data.source = "flow", True, "blank"
    c.train.update(batch=16, microbatches=micro)
    c.mesh.update(dict.fromkeys(AXES, 1) | {"pp": pp, "dp": dp})
    c.pipeline.schedule = "searched"
    return c


def program(pp: int, dp: int, micro: int) -> TrainStep:
    e = standard(configured(pp, dp, micro))
    return TrainStep(e, make_mesh(e.degrees, jax.devices()[: pp * dp]))


def test_classes_of_unlike_cost_share_a_schedule():
    one, piped = program(1, 1, 1), program(2, 2, 4)
    assert len({op.microbatch for op in piped.experiment.grads.order.ops[0]}) == 4
    images = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 3)).astype(np.float32)
    batch = {"images": images, "labels": np.arange(16, dtype=np.int32) % 10}
    noised = jax.device_get(jax.jit(one.corrupt)(batch, jax.random.key(0)))
    rng = np.random.default_rng(1)  # equal weights of the output would leave the blocks no gradient
    started = jax.device_get(one.init(0).variables)
    variables = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), started)
    got, want = (jax.device_get(jax.jit(p.grads)(variables, noised)) for p in (piped, one))
    loss, grads = against_one_device(got[:2], want[:2])
    assert loss < 1e-6 and grads < 1e-5


@pytest.mark.fast
def test_a_class_that_is_not_whole_microbatches_is_refused():
    with pytest.raises(config.UserError, match=r"1 % 2 = 1; set train\.microbatches=2"):
        config.validate(configured(2, 2, 1))


@pytest.mark.fast
def test_what_no_pipeline_runs_is_refused_in_code_too():
    c = configured(1, 1, 4)
    c.model.image.self_conditioning, c.train.batch = True, 64
    twice = standard(c)
    c.model.update(kind="uvit", layers=3)
    c.model.image.update(coarse=0.0, conditioning="tokens", self_conditioning=False)
    for e, said in ((twice, "runs no sample twice"), (standard(c), r"grads=folded\(order\) only")):
        piped = replace(e, degrees={**e.degrees, "pp": 2}, grads=scheduled(gpipe(2, 4)))
        with pytest.raises(config.UserError, match=said):
            TrainStep(piped, make_mesh(piped.degrees, jax.devices()[:2]))
