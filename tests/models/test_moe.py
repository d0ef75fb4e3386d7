"""A mixture of experts in the stock model: equal to one device on every mesh, bytes equal to its
formula, state and metrics independent of the mesh, bad input refused."""

from functools import cache
from typing import Any

import build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp import loop
from fdp.config import UserError
from fdp.count import bytes as closed
from fdp.count.compare import EXACT, against_one_device, mismatches, outcome
from fdp.count.requirements import missing, required_of, unexpected
from fdp.count.step import microbatch
from fdp.grads import Stages, plain
from fdp.mesh import BATCH_AXES, make_mesh
from fdp.models import module, moe
from fdp.models.layers import ones
from fdp.models.module import Module, compact
from fdp.models.moe import MoEInput
from fdp.models.stack import LayerInput
from fdp.step import TrainStep

EXPERTS = {"model.moe.experts": 8, "model.moe.ffn": 32, "model.moe.switch": 0.01}
SHARED = EXPERTS | {
    "model.layers": 4,
    "model.moe.first_dense": 2,
    "model.moe.shared": 1,
    "model.moe.z": 1e-3,
    "model.moe.sequence": 0.01,
    "model.moe.bias": 1e-3,
    "model.moe.score": "sigmoid",
}
NOISY = EXPERTS | {
    "model.moe.noise": "low_rank",
    "model.moe.rank": 0.01,
    "model.moe.bins": 4,
    "model.moe.ranks": 2,
}
CHOSEN = EXPERTS | {"model.moe.choice": "expert", "model.moe.low": 1.0, "model.moe.high": 3.0}
UNLIKE = {"train.zero": 3, "model.sequence_parallel": True, "model.remat": "full"}
TWOS = {"dp": 2, "ep": 2, "tp": 2}
# Model, what else differs on the mesh, the mesh.
MESHES: dict[str, tuple[dict, dict, dict]] = {
    "flat, ZeRO-3, SP, remat": (SHARED, UNLIKE, TWOS),
    "two levels": (NOISY, {"model.moe.dispatch": "two_level", "model.moe.node": 2}, {"ep": 8}),
    "gather": (
        NOISY,
        {"model.moe.dispatch": "gather", "train.zero": 1},
        {"dp": 2, "ep": 2, "tp": 2},
    ),
    "experts choose": (CHOSEN, {"model.moe.buffer": 1.5}, {"ep": 4, "cp": 2}),
}


def config(overrides: dict, mesh: dict) -> Any:
    return build.tiny(**overrides, **{f"mesh.{axis}": n for axis, n in mesh.items()})


@cache
def alone(key: int) -> Any:
    """(values, outcome) on one device, of one of the models."""
    c = config((SHARED, NOISY, CHOSEN)[key], {})
    p = build.program(c)
    values = jax.device_get(p.init(0).variables)
    return values, outcome(p, values, {"tokens": build.tokens(c)})


@pytest.mark.fast
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_equals_one_device_and_sends_what_the_formula_says(name: str) -> None:
    model, more, mesh = MESHES[name]
    c = config(model | more, mesh)
    p = build.program(c)
    values, want = alone([SHARED, NOISY, CHOSEN].index(model))
    got = outcome(p, values, {"tokens": build.tokens(c)})
    loss, grads = against_one_device(got[:2], want[:2])
    assert loss < 1e-6 and grads < 2e-6
    assert not mismatches(closed.traffic(p), got.sent), EXACT
    needs = required_of(p)
    assert not missing(needs, got.sent) and not unexpected(needs, got.sent)
    sizes = [x.size for x in jax.tree.leaves(p.specs.shapes)]
    assert microbatch(p.experiment, 0).parameters == sum(sizes)


@pytest.mark.fast
def test_experts_are_reduced_over_dp_and_cp_and_not_over_ep() -> None:
    p = build.program(config(SHARED, {"dp": 2, "ep": 2, "cp": 2}))
    dense = build.program(config({}, {"dp": 2, "ep": 2, "cp": 2}))
    sent = closed.traffic(p)
    experts = sum(x.size for x in jax.tree.leaves(p.specs.shapes) if x.shape[1:2] == (8,))
    assert sent["all-reduce", ("dp", "cp")] == 2 * 3 / 4 * 4 * experts / 2
    assert ("all-reduce", ("dp", "cp")) not in closed.traffic(dense)


@cache
def stepping(ep: int) -> Any:
    """(program, compiled train step) with every loss and state, on dp 2 where ep > 1."""
    more = {"model.moe.rank": 0.01, "model.moe.bins": 4, "model.moe.ranks": 2, "train.lr": 1e-3}
    p = build.program(config(SHARED | more, {"dp": 2, "ep": ep} if ep > 1 else {}))
    return p, p.jit_train_step()


@pytest.mark.fast
def test_state_and_metrics_of_two_steps_do_not_depend_on_the_mesh() -> None:
    states = []
    for ep in (1, 4):
        p, step = stepping(ep)
        state, batch = p.init(0), build.place(p, {"tokens": build.tokens(config(SHARED, {}))})
        for _ in range(2):
            state, metrics = step(state, batch)
        states.append(jax.device_get((state.params, state.model, metrics)))
    (params, state, metrics), (want_params, want_state, want) = states[1], states[0]
    for got, expected in zip(jax.tree.leaves(params), jax.tree.leaves(want_params), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    for got, expected in zip(jax.tree.leaves(state), jax.tree.leaves(want_state), strict=True):
        np.testing.assert_array_equal(got, expected)
    bias = state["layers"]["mlp"]["router"]["bias"]
    assert bias.any() and abs(bias).max() <= 2e-3 + 1e-9
    np.testing.assert_array_equal(metrics["layers/mlp/load"], want["layers/mlp/load"])
    assert metrics["layers/mlp/load"].sum(1).tolist() == [8 * 32 * 2] * 2
    for name in ("imbalance", "switch", "rank", "z", "sequence"):
        key = f"layers/mlp/{name}"
        np.testing.assert_allclose(metrics[key], want[key], rtol=1e-5)


class Reports(Module):
    """Scales its input, with one metric of each kind and a penalty."""

    @compact
    def __call__(self, x: Any) -> Any:
        w = self.weight("w", ones, (1,), (None,))
        self.aux("count", x.sum())
        self.aux("level", x.mean(), mean=True)
        self.penalty("size", x.mean() * w.sum())
        return w * x


@pytest.mark.fast
@pytest.mark.parametrize("microbatches", [1, 4])
def test_counts_are_added_over_microbatches_and_means_and_penalties_are_not(
    microbatches: int,
) -> None:
    model, x, share = Reports(), jnp.arange(8.0), 1 / microbatches
    variables = module.init(model, jax.random.key(0), x)

    def stage(params: Any, x: Any) -> Any:
        return module.learn(model, {"params": params, "state": {}}, x, share=share)

    def score(params: Any, x: Any, noised: Any) -> Any:
        return jnp.zeros(()), {}, None

    parts = Stages(stage, lambda params, x, noised: (x, {}, None), score)
    loss, grads, aux = plain(microbatches)(parts, variables["params"], x)
    assert (loss, aux["count"], aux["level"], grads["w"]) == (3.5, 28, 3.5, 3.5)


@pytest.mark.fast
def test_replayed_choices_come_in_as_layer_inputs() -> None:
    c = config(EXPERTS, {"ep": 2})
    e = build.experiment(c)
    ids = np.zeros((8 * 32, 2, 2), np.int16)
    ids[..., 1] = 7
    given = moe.replay(ids, 8, e.model.shape)
    spec = LayerInput(ffn=MoEInput(P(None, BATCH_AXES, "cp")))
    p = TrainStep(e, make_mesh(c.mesh), spec)
    state, batch = p.init(0), build.place(p, {"tokens": build.tokens(c)})
    _, metrics = p.jit_train_step()(state, batch, given)
    assert metrics["layers/mlp/load"].tolist() == [[256.0, 0, 0, 0, 0, 0, 0, 256.0]] * 2
    with pytest.raises(ValueError, match=r"\(256, 1, 2\) must be .* layers, k = \(2, 2\)"):
        moe.replay(ids[:, :1], 8, e.model.shape)
    with pytest.raises(ValueError, match=r"must be .* a multiple of 7 sequences"):
        moe.replay(ids, 7, e.model.shape)
    with pytest.raises(ValueError, match=r"ids lie in 0…8, but the model has experts 0…7"):
        moe.replay(ids + (ids == 7), 8, e.model.shape)


@pytest.mark.fast
def test_router_logits_that_are_not_finite_name_their_layer() -> None:
    p, step = stepping(1)
    state, batch = p.init(0), build.place(p, {"tokens": build.tokens(config(SHARED, {}))})
    router = state.params["layers"]["mlp"]["router"]
    router["w"] = router["w"].at[1].set(np.nan)
    state, metrics = step(state, batch)
    values = jax.device_get(metrics)
    assert state.skipped == 1
    assert "not finite are those of layers/mlp of period 1; " in loop._culprit(values)
    assert loop._culprit(values | {"layers/mlp/nonfinite": np.zeros(2)}) == ""


BAD = [
    ({"mesh.ep": 3, "train.batch": 9}, "experts 8 is not divisible by mesh.ep = 3: set mod"),
    ({"mesh.tp": 4, "model.moe.ffn": 30}, "width of an expert 30 is not divisible by mesh.tp"),
    ({"model.moe.topk": 9}, "topk=9 is not within 1..experts=8"),
    ({"model.moe.groups": 4, "model.moe.topk": 3}, "the kept groups hold too few experts"),
    ({"model.moe.capacity": -1.0}, r"moe.capacity=-1.0 must be a finite number in \[0, inf\)"),
    ({"model.moe.capacity": 1.0, "model.moe.dispatch": "gather"}, "only flat drops pairs"),
    ({"model.moe.first_dense": 2}, "leave no layer with experts: set model.moe.first_dense=1"),
    ({"model.moe.every": 3}, "layers after first_dense 2 is not divisible by model.moe.every = 3"),
    ({"model.moe.rank": 0.1, "model.moe.ranks": 2}, "in noise bins, but model.moe.bins=1 and"),
    ({"model.moe.rank": 0.1, "model.moe.bins": 4}, "bins=4 and ranks=1, where one of either"),
    ({"model.moe.ranks": 3}, "experts 8 is not divisible by model.moe.ranks = 3"),
    ({"model.moe.noise": "film", "objective.form": "t"}, "read the share of masked tokens"),
    (
        {"model.moe.choice": "expert", "objective.name": "autoregressive"},
        "compares a token with later ones of its sequence",
    ),
    ({"model.moe.choice": "expert", "model.moe.bias": 0.1}, "moves what tokens choose"),
    ({"model.moe.choice": "expert", "model.moe.groups": 2}, "groups=2 limits what tokens choose"),
    ({"model.moe.low": 1.0}, "low=1.0 and high=0.0 say how many tokens experts choose"),
    (
        {"model.moe.choice": "expert", "model.moe.low": 0.2},
        r"low·seq_len/experts = 0.2·32/8 = 0.8 tokens .*: set model.moe.low=0.25",
    ),
    ({"model.moe.noise": "group"}, "opens some of the groups, but model.moe.groups=1"),
    ({"model.moe.shared_gate": True}, "weighs shared experts: set model.moe.shared=1"),
    ({"model.moe.wire": "bfloat16", "model.moe.dispatch": "gather"}, "in the type of compute"),
    (
        {"model.moe.dispatch": "two_level", "mesh.ep": 4, "model.moe.node": 3},
        "nodes of 3 devices are no power of two",
    ),
]  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_values_are_refused_before_anything_starts(changes: dict, message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        build.program(build.tiny(**(EXPERTS | changes)))
