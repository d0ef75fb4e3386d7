"""Sharded equals unsharded: loss, gradients and one optimizer step, every axis alone and mixed,
every storage mode.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from build import place, program, tiny, tokens

from fdp.count import bytes as closed
from fdp.count import flops, hlo, jaxpr
from fdp.count.compare import sent
from fdp.count.step import microbatch
from fdp.models import module

pytestmark = pytest.mark.fast

# mesh degrees; overrides of the config. Each is compared with one device under the same objective
# and model.
CASES = {
    "dp8": ({"dp": 8}, {}),
    "tp4": ({"tp": 4}, {}),
    "cp4": ({"cp": 4}, {}),
    "ep2·dp2": ({"ep": 2, "dp": 2}, {}),
    "tp2·SP": ({"tp": 2}, {"model.sequence_parallel": True}),
    "dp2·cp2·tp2": ({"dp": 2, "cp": 2, "tp": 2}, {}),
    "dp2·cp2·tp2·SP·ZeRO-3·remat": (
        {"dp": 2, "cp": 2, "tp": 2},
        {"model.sequence_parallel": True, "train.zero": 3, "model.remat": "full"},
    ),
    "dp4·tp2·ZeRO-1": ({"dp": 4, "tp": 2}, {"train.zero": 1}),
    "dp2·ep2·ZeRO-3": ({"dp": 2, "ep": 2}, {"train.zero": 3}),
    "dp2·tp2·microbatches": ({"dp": 2, "tp": 2}, {"train.microbatches": 2}),
    "dp2·tp2·microbatches·ZeRO-3·dots": (
        {"dp": 2, "tp": 2},
        {"train.microbatches": 2, "train.zero": 3, "model.remat": "dots"},
    ),
    "dp2·cp2·tp2·SP·remat": (
        {"dp": 2, "cp": 2, "tp": 2},
        {"model.sequence_parallel": True, "model.remat": "full"},
    ),
}
MODELS = {
    "mdlm": {"objective.name": "mdlm"},
    "ar·bias·tied": {
        "objective.name": "autoregressive",
        "model.bias": True,
        "model.tied": True,
        "model.epsilon": 1e-5,
        "model.rope_scaling": 4.0,
    },
    "mdlm·qk_norm·noise": {
        "objective.name": "mdlm",
        "model.qk_norm": True,
        "model.time_conditioning": True,
    },
}
MORE = {
    "sedd_absorbing": {"objective.name": "sedd_absorbing"},
    "sedd_uniform": {"objective.name": "sedd_uniform", "objective.schedule": "geometric"},
    "block_diffusion": {"objective.name": "block_diffusion", "objective.block": 8},
}


@functools.cache
def start(model: str) -> dict:
    """Variables of a model on the host: initial values and some noise, because gates start at 0."""
    p = program(tiny(**(MODELS | MORE)[model]))
    rng = np.random.default_rng(0)
    noisy = lambda x: x + 0.02 * rng.normal(size=x.shape).astype(x.dtype)
    return jax.tree.map(noisy, jax.device_get(p.init(0).variables))


def outcome(c, model: str, steps: int = 0) -> dict:
    """Loss, gradients and bytes of one program; losses and parameters after `steps` train steps."""
    p = program(c)
    shardings = p.specs.state_shardings()
    variables = jax.device_put(start(model), {"params": shardings.params, "state": {}})
    batch = place(p, {"tokens": tokens(c)})
    noised = jax.jit(p.corrupt)(batch, jax.random.key(0))
    traced = jax.jit(p.grads).trace(variables, noised)
    compiled = traced.lower().compile()
    loss, grads, aux = compiled(variables, noised)
    assert aux == {}
    logical = hlo.summary(jaxpr.collectives(traced.jaxpr, dict(p.mesh.shape)))
    found = {
        "loss": float(loss),
        "grads": jax.device_get(grads),
        "bytes": sent(compiled, p.mesh),
        "logical": {k: wire for k, (_, _, wire) in logical.items() if wire},
        "formula": dict(closed.traffic(p)),
        "flops": jaxpr.dot_flops(traced.jaxpr),
        "losses": [],
        "program": p,
    }
    if steps:
        state, step = p.init(0), p.jit_train_step()
        found["init"] = jax.device_get(state.params)
        for _ in range(steps):
            state, metrics = step(state, batch)
            found["losses"].append(float(metrics["loss"]))
        found["params"] = jax.device_get(state.params)
    return found


@functools.cache
def reference(model: str) -> dict:
    """One device."""
    return outcome(tiny(**(MODELS | MORE)[model]), model, steps=2)


def assert_trees_close(a, b, tolerance: float, what: str) -> None:
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        scale = max(np.abs(y).max(), 1e-6)
        error = np.abs(x - y).max() / scale
        assert error <= tolerance, (
            f"{what} {jax.tree_util.keystr(path)}: relative error {error:.2e}"
        )


# The first model runs on every mesh, the others where their extra code meets every axis at once.
MIXED = ("dp2·cp2·tp2", "dp2·cp2·tp2·SP·ZeRO-3·remat", "dp2·tp2·microbatches")
PAIRS = [("mdlm", case) for case in CASES] + [
    (m, case) for m in MODELS if m != "mdlm" for case in MIXED
]
# Initial values and whole steps add a program each: where state is stored in another way, once.
STEPS = {("mdlm", "dp8"), ("mdlm", "dp2·cp2·tp2·SP·ZeRO-3·remat"), ("mdlm", "dp4·tp2·ZeRO-1")}


@pytest.mark.parametrize(("model", "case"), PAIRS)
def test_sharded_equals_unsharded_and_sends_what_the_formula_says(model: str, case: str) -> None:
    degrees, extra = CASES[case]
    c = tiny(**MODELS[model], **{f"mesh.{k}": v for k, v in degrees.items()}, **extra)
    got, want = outcome(c, model, 2 if (model, case) in STEPS else 0), reference(model)
    assert abs(got["loss"] - want["loss"]) <= 1e-5 * abs(want["loss"])
    assert_trees_close(got["grads"], want["grads"], 1e-4, "gradient")
    assert got["bytes"] == pytest.approx(got["formula"])
    assert got["logical"] == pytest.approx(got["formula"])
    if got["losses"]:
        # The random bits are equal; on jax 0.12 their rounding depends on how XLA vectorised a
        # shard.
        pairs = (got["init"], want["init"])
        jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(a, b, 2), *pairs)
        assert np.allclose(got["losses"], want["losses"], rtol=1e-5)


@pytest.mark.parametrize("model", MORE)
@pytest.mark.parametrize("case", ["dp8", "dp4·tp2·ZeRO-1"])
def test_other_objectives_sharded_equal_unsharded(model: str, case: str) -> None:
    degrees, extra = CASES[case]
    c = tiny(**MORE[model], **{f"mesh.{k}": v for k, v in degrees.items()}, **extra)
    got, want = outcome(c, model), reference(model)
    assert abs(got["loss"] - want["loss"]) <= 1e-5 * abs(want["loss"])
    assert_trees_close(got["grads"], want["grads"], 1e-4, "gradient")


@pytest.mark.parametrize("model", MODELS | MORE)
def test_flops_equal_the_jaxpr(model: str) -> None:
    found = reference(model)
    p = found["program"]
    assert found["flops"] == flops.train_step(p)
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(p.specs.shapes))
    assert count == microbatch(p.experiment, 0).parameters


def test_conditioned_blocks_start_as_the_identity() -> None:
    p = program(tiny(**MODELS["mdlm·qk_norm·noise"]))
    variables = p.init(0).variables
    ids, noise = tokens(tiny()), jnp.full(8, 0.5)
    x, _, _ = module.run(p.model, variables, ids, noise, method="hidden")
    embedded, _, _ = module.run(p.model, variables, {"inputs": ids}, method="embed")
    np.testing.assert_allclose(
        x, embedded / jnp.sqrt((embedded**2).mean(-1, keepdims=True) + 1e-6), rtol=1e-5
    )


def test_masked_head_changes_no_loss_and_no_gradient() -> None:
    full, want = outcome(tiny(**{"objective.masked_head": False}), "mdlm"), reference("mdlm")
    assert full["program"].capacity is None and want["program"].capacity is not None
    assert full["loss"] == pytest.approx(want["loss"], rel=1e-6)
    assert_trees_close(full["grads"], want["grads"], 1e-5, "gradient")


def test_bfloat16_compute_keeps_float32_parameters_and_stays_near() -> None:
    c = tiny(**{"model.dtype": "bfloat16", "mesh.dp": 2, "mesh.tp": 2})
    got = outcome(c, "mdlm")
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(got["grads"]))
    assert got["loss"] == pytest.approx(reference("mdlm")["loss"], rel=2e-2)


def test_non_finite_step_leaves_the_state_untouched_and_is_counted() -> None:
    c = tiny(**{"mesh.dp": 2})
    p = program(c)
    state = p.init(0)
    poisoned = state.replace(
        params={**state.params, "norm": {"scale": state.params["norm"]["scale"] * jnp.nan}}
    )
    before = jax.device_get(poisoned.params)
    after, metrics = p.jit_train_step()(poisoned, place(p, {"tokens": tokens(c)}))
    assert int(metrics["skipped"]) == 1 and not np.isfinite(metrics["loss"])
    chex.assert_trees_all_equal(jax.device_get(after.params), before)
    assert int(after.step) == 1
