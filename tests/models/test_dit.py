"""DiT and U-ViT on meshes: sharded equals unsharded, and layers state what their programs do."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import jax
import numpy as np
import pytest

from fdp.count import bytes as closed
from fdp.count import flops, hlo, jaxpr
from fdp.count.compare import relative_error, sent
from fdp.count.counts import Unstated
from fdp.count.step import microbatch
from fdp.data.batches import Arrays, Data
from fdp.experiment import Experiment, Fit
from fdp.grads import plain
from fdp.mesh import AXES, make_mesh
from fdp.models.dit import dit
from fdp.models.image import ImageShape
from fdp.models.shape import ModelShape
from fdp.models.uvit import UViT
from fdp.objectives.cost import CostLaw
from fdp.objectives.image import Flow, ImageObjective
from fdp.optimizer import adamw, warmup_cosine
from fdp.step import TrainStep

pytestmark = pytest.mark.fast
SHAPE = ModelShape(
    layers=2, width=16, heads=4, kv_heads=4, head_dim=4, ffn=32, vocab=12, gated=False
)
ADALN = replace(SHAPE, bias=True, time_conditioning=True)
SKIPS = replace(SHAPE, layers=5)
IMAGE = ImageShape(size=16, channels=3, classes=5, patch=2)
REGISTERS = replace(IMAGE, registers=2)
CLASSES = CostLaw(coarse=Fraction(1, 2), dropped=Fraction(1, 2), group=2)
EVERY = replace(IMAGE, coarse=True, dropping=True)
MODELS: dict[str, tuple[Any, ImageObjective]] = {
    "adaln": (dit(ADALN, IMAGE), Flow(5)),
    "in-context": (dit(replace(SHAPE, bias=True), REGISTERS), Flow(5)),
    "uvit": (UViT(SKIPS, REGISTERS), Flow(5)),
    "classes": (dit(ADALN, EVERY), Flow(5, law=CLASSES)),
}
MIXED: dict[str, Any] = {"dp": 2, "cp": 2, "tp": 2}
SP = {"sequence_parallel": True}


def data(n: int = 16) -> Data:
    draw = np.random.default_rng(0)
    fields = {
        "images": draw.normal(size=(n, 16, 16, 3)).astype(np.float32),
        "labels": draw.integers(0, 5, n).astype(np.int32),
    }
    split = Arrays(fields, "random images", "make more")
    dims = {"images": ("batch", "sequence", None, None), "labels": ("batch",)}
    return Data("random", "0" * 64, "none", None, split, split, dims)


def experiment(name: str, shape: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    """The experiment of a model; `shape`: changes of its shape."""
    model, objective = MODELS[name]
    model = model.clone(shape=replace(model.shape, **(shape or {})))
    degrees = {axis: changes.pop(axis, 1) for axis in AXES}
    fit, rate = Fit(steps=2, batch=16), warmup_cosine(1e-2, 1, 2)
    base = Experiment(model, objective, data(), adamw(rate, 0.98, 0.01, 1.0), degrees, fit)
    return replace(base, **changes)


def program(e: Experiment) -> TrainStep:
    return TrainStep(e, make_mesh(e.degrees))


def start(p: TrainStep) -> Any:
    """Random variables on the host: gates and outputs start at 0."""
    rng = np.random.default_rng(1)

    def drawn(x: Any) -> np.ndarray:
        return 0.3 * rng.normal(size=x.shape).astype(np.float32) / max(x.shape[-2:]) ** 0.5

    params = jax.tree.map(drawn, p.specs.shapes)
    return jax.device_put(params, p.specs.state_shardings().params)


def outcome(p: TrainStep) -> dict[str, Any]:
    """Loss, gradients, bytes sent and FLOPs of one program."""
    variables = {"params": start(p), "state": {}}
    batch = jax.device_put(data().train.take(range(16)), p.batch_shardings())
    noised = jax.jit(p.corrupt)(batch, jax.random.key(0))
    traced = jax.jit(p.grads).trace(variables, noised)
    compiled = traced.lower().compile(hlo.QUICK)
    loss, grads, _ = compiled(variables, noised)
    found = {"loss": float(loss), "grads": jax.device_get(grads), "sent": sent(compiled, p.mesh)}
    return found | {"flops": p.mesh.size * jaxpr.dot_flops(traced.jaxpr)}


# Each model once, where its own code meets every axis and storage mode.
CASES = {
    "adaln": (SP | {"remat": "full"}, MIXED | {"zero": 3}),
    "in-context": (SP, MIXED | {"zero": 3}),
    "uvit": (SP, MIXED | {"zero": 3}),
    "classes": ({}, {"ep": 2, "cp": 2, "tp": 2, "grads": plain(2)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_sharded_equals_unsharded_and_sends_what_the_layers_state(name: str) -> None:
    shape, changes = CASES[name]
    p = program(experiment(name, shape, **changes))
    got, want = outcome(p), outcome(program(experiment(name)))
    assert abs(got["loss"] - want["loss"]) <= 1e-5 * want["loss"]
    assert relative_error(got["grads"], want["grads"]) <= 1e-5
    if name == "classes":
        with pytest.raises(Unstated, match="cost classes"):
            closed.traffic(p)
        return
    assert got["sent"] == pytest.approx(closed.traffic(p))
    assert got["flops"] == flops.executed(p)
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(p.specs.shapes))
    assert microbatch(p.experiment, 0).parameters == parameters
