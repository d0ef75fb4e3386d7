"""An experiment that is no language model trains on any mesh as on one device: its own layer, loss,
batch, model state, rules and metrics.
"""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from build import Classify, images, image_data, place, program, tiny, tokens, toy, TOY_FIT

from fdp.arm import Arm
from fdp.config import UserError
from fdp.grads import plain
from fdp.mesh import make_mesh
from fdp.models import module
from fdp.step import TrainStep, mean_loss

pytestmark = pytest.mark.fast

MESHES = {
    "dp2·tp2·cp2": {"dp": 2, "tp": 2, "cp": 2},
    "dp2·tp2·microbatches·ZeRO-1": {"dp": 2, "tp": 2, "grads": plain(2), "zero": 1},
    "dp2·ep2·tp2·ZeRO-3": {"dp": 2, "ep": 2, "tp": 2, "zero": 3},
}


def built(**changes: Any) -> TrainStep:
    """Program of a toy."""
    e = toy(**changes)
    return TrainStep(e, make_mesh(e.degrees))


def first_batch(p: TrainStep) -> Any:
    return place(p, p.experiment.data.train.take(range(8)))


@cache
def on_the_host() -> Any:
    """A state before step 3 whose model state is not zero."""
    state = built().init(0)
    model = jax.tree.map(lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape), state.model)
    return jax.device_get(state.replace(model=model, step=jnp.int32(3)))


def outcome(p: TrainStep) -> dict[str, Any]:
    """Loss, gradients and aux of the first batch, and what one step makes of the state."""
    state = jax.device_put(on_the_host(), p.specs.state_shardings())

    def both(state: Any, batch: Any) -> Any:
        noised = p.corrupt(batch, jax.random.fold_in(state.key, state.step))
        return p.grads(state.variables, noised), p.train_step(state, batch)

    (loss, grads, aux), (after, metrics) = jax.jit(both)(state, first_batch(p))
    found = {"loss": loss, "gradients": grads, "aux": aux, "params": after.params}
    return jax.device_get(found | {"model state": after.model, "metrics": metrics})


@cache
def reference() -> dict[str, Any]:
    return outcome(built())


def assert_close(got: Any, want: Any, what: str, tolerance: float = 1e-5) -> None:
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        scale = max(np.abs(b).max(), 1e-3)
        assert np.abs(a - b).max() <= tolerance * scale, (what, jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", MESHES)
def test_a_sharded_toy_equals_one_device(name: str) -> None:
    got, want = outcome(built(**MESHES[name])), reference()
    for what, wanted in want.items():
        assert_close(got[what], wanted, what)
    assert got["aux"]["blocks"]["sum"].shape == (2, 8)
    assert np.ptp(got["model state"]["blocks"]["ticks"] - on_the_host().model["blocks"]["ticks"]) < 1e-6


def test_one_device_is_the_pure_module_and_the_rule() -> None:
    """Loss, gradients and the running mean against the plain module: no step, no mesh."""
    e, state, got = toy(), on_the_host(), reference()
    noised = e.objective.corrupt(
        jax.random.fold_in(state.key, 3), e.data.train.take(range(8))
    )

    def loss(params: Any) -> Any:
        variables = {"params": params, "state": state.model}
        return mean_loss(e.model, e.objective, variables, noised)

    value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    assert_close(got["loss"], value, "loss")
    assert_close(got["gradients"], grads, "gradients")
    x_BxLxD = noised["inputs"].mean(2) @ state.params["w_embed"]
    mean = 0.9 * state.model["blocks"]["mean"][0] + 0.1 * x_BxLxD.mean((0, 1))
    assert_close(got["model state"]["blocks"]["mean"][0], mean, "running mean")


def test_the_mean_is_weighted_over_microbatches_and_devices() -> None:
    """Σ w·loss / Σ w of the whole batch, summed by hand, whatever share of the weight a device or a
    microbatch holds."""
    e, state = toy(), on_the_host()
    batch = e.data.train.take(range(8))
    noised = e.objective.corrupt(jax.random.fold_in(state.key, 3), batch)
    outputs, _, _ = module.run(e.model, state.variables, noised)
    each_BxL = e.objective.loss(outputs, noised["rows"] | {"weight": jnp.ones(8)})
    weight_B = batch["weight"]
    assert np.ptp(weight_B.reshape(4, 2).sum(1)) > 0  # every (device, microbatch) weighs another
    want = (each_BxL.sum(1) * weight_B).sum() / (8 * weight_B.sum())
    assert float(reference()["loss"]) == pytest.approx(float(want), rel=1e-6)
