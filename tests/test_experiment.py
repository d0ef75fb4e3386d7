"""An experiment that is no language model trains on any mesh as on one device: its own layer, loss,
batch, model state, rules and metrics.
"""

import dataclasses
from functools import cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from build import Classify, place, program, tiny, tokens, toy

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
    assert (
        np.ptp(got["model state"]["blocks"]["ticks"] - on_the_host().model["blocks"]["ticks"])
        < 1e-6
    )


def test_one_device_is_the_pure_module_and_the_rule() -> None:
    """Loss, gradients and the running mean against the plain module: no step, no mesh."""
    e, state, got = toy(), on_the_host(), reference()
    noised = e.objective.corrupt(jax.random.fold_in(state.key, 3), e.data.train.take(range(8)))

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


def test_every_step_and_every_evaluation_batch_has_noise_of_its_own() -> None:
    """Equal for equal numbers, so that a resumed run draws what the uninterrupted one drew."""
    p, state = built(), on_the_host()
    batch = first_batch(p)

    def both(step: Any, index: Any) -> Any:
        _, metrics = p.train_step(state.replace(step=step), batch)
        return metrics["loss"], p.eval_step(state.variables, batch, index)[0]

    run = jax.jit(both)
    train, evaluation = zip(*(run(n, n) for n in (0, 1, 2, 0)), strict=True)
    for losses in (train, evaluation):
        assert losses[3] == losses[0]
        assert len({float(x) for x in losses}) == 3


@dataclasses.dataclass(frozen=True)
class OneNaN:
    """As `plain`, with a NaN in the gradient of the head."""

    microbatches: int = 1

    def __call__(self, stages: Any, params: Any, noised: Any) -> Any:
        loss, grads, aux = plain(1)(stages, params, noised)
        return loss, grads | {"w_head": grads["w_head"].at[0, 0].set(jnp.nan)}, aux


def test_a_gradient_that_is_not_finite_is_not_applied_although_the_loss_is_finite() -> None:
    p = built(grads=OneNaN(), dp=2)
    state = jax.device_put(on_the_host(), p.specs.state_shardings())
    after, metrics = jax.jit(p.train_step)(state, first_batch(p))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert int(metrics["skipped"]) == int(after.skipped) == 1
    kept = lambda s: (s.params, s.opt_state, s.model)
    chex.assert_trees_all_equal(kept(jax.device_get(after)), kept(on_the_host()))
    assert int(after.step) == 4


class CountsNothing(Classify):
    """A loss whose count is known to be 0."""

    def count(self, noised: Any) -> int:
        return 0


def test_a_loss_that_counts_nothing_is_refused_when_it_is_traced() -> None:
    p = built(objective=CountsNothing())
    with pytest.raises(UserError, match=r"the loss of this batch has count 0: nothing to divide"):
        p.compiled_train_step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cp": 3}, r"image \(8, 8, 3, 4\): 8 is not divisible by cp = 3: choose 9, or other deg"),
        (
            {"dp": 2, "ep": 2, "grads": plain(4)},
            r"\(8, .*: 8 is not divisible by dp·ep = 16: choose 16, or other degrees of dp and ep",
        ),
    ],
)
def test_named_dims_that_the_mesh_does_not_divide_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(**changes)


def test_segments_and_weights_of_tokens_reach_every_device_and_microbatch() -> None:
    """The stock model on documents: a mesh equals one device, and no document sees another."""
    c = tiny(**{"model.layers": 1})
    segments = np.sort(np.random.default_rng(1).integers(0, 4, (8, 32)), 1).astype(np.int32)
    weights = np.random.default_rng(2).integers(0, 3, (8, 32)).astype(np.float32)
    fields = {"segments": segments, "weights": weights}
    one = program(c, **fields)
    variables = jax.device_get(one.init(0).variables)
    batch = {"tokens": tokens(c), **fields}
    noised = jax.device_get(jax.jit(one.objective.corrupt)(jax.random.key(0), batch))
    found = {}
    for name, degrees in {"one": {}, "dp2·cp2·tp2·2": {"dp": 2, "cp": 2, "tp": 2}}.items():
        c = tiny(**{"model.layers": 1, "train.microbatches": 2 if degrees else 1})
        c.mesh.update(degrees)
        p = program(c, **fields)
        placed = jax.device_put(
            variables, {"params": p.specs.state_shardings().params, "state": {}}
        )
        found[name] = jax.device_get(jax.jit(p.grads)(placed, noised))
    got, want = found["dp2·cp2·tp2·2"], found["one"]
    assert_close(got[0], want[0], "loss")
    assert_close(got[1], want[1], "gradients", 1e-4)
    run = jax.jit(lambda variables, noised: module.run(one.model, variables, noised)[0])
    changed = np.where(segments == 1, (noised["inputs"] + 1) % 60, noised["inputs"])
    before, after = (
        np.asarray(run(variables, noised | {"inputs": x})) for x in (noised["inputs"], changed)
    )
    np.testing.assert_array_equal(after[segments != 1], before[segments != 1])
    assert (after[segments == 1] != before[segments == 1]).any()
