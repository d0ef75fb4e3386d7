"""Sharded equals unsharded: loss, gradients and one optimizer step, every axis alone and mixed,
every storage mode.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from fdp import config, objectives
from fdp.cost import bytes as closed
from fdp.cost import flops, hlo, jaxpr
from fdp.mesh import make_mesh
from fdp.models import transformer
from fdp.step import Program, tokens_sharding
from fdp.topics.parallel_dlm.checks import counted_bytes

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
    "ar": {"objective.name": "autoregressive"},
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


def tiny(**overrides: object) -> ml_collections.ConfigDict:
    c = config.base()
    c.model.update(layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ffn=64, vocab=64)
    c.data.seq_len, c.train.batch, c.train.warmup = 32, 8, 0
    c.update_from_flattened_dict(overrides)
    config.validate(c)
    return c


def program(c: ml_collections.ConfigDict) -> Program:
    objective = objectives.from_config(c, n_ids=60, bos=3)
    model = transformer.from_config(c, objective.attention, objective.block)
    return Program(c, model, objective, make_mesh(c.mesh))


def tokens(c: ml_collections.ConfigDict) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 60, (c.train.batch, c.data.seq_len), np.int32)


def outcome(c: ml_collections.ConfigDict) -> dict:
    """Loss, gradients and the parameters after two steps, on the host."""
    p = program(c)
    x = jax.device_put(tokens(c), tokens_sharding(p.mesh))
    state = p.init(0)
    start = jax.device_get(state.params)
    grads = jax.jit(lambda params: p.grads(params, p.corrupt(x, jax.random.key(0))))(state.params)
    loss, grads = jax.device_get(grads)
    step = p.jit_train_step()
    losses = []
    for _ in range(2):
        state, metrics = step(state, x)
        losses.append(float(metrics["loss"]))
    return {
        "init": start,
        "loss": loss,
        "grads": grads,
        "params": jax.device_get(state.params),
        "losses": losses,
    }


@pytest.fixture(scope="module")
def reference() -> dict:
    return {name: outcome(tiny(**o)) for name, o in (MODELS | MORE).items()}


def assert_trees_close(a, b, tolerance: float, what: str) -> None:
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        scale = max(np.abs(y).max(), 1e-6)
        error = np.abs(x - y).max() / scale
        assert error <= tolerance, (
            f"{what} {jax.tree_util.keystr(path)}: relative error {error:.2e}"
        )


def check(model: str, overrides: dict, case: str, reference: dict) -> None:
    degrees, extra = CASES[case]
    c = tiny(**overrides, **{f"mesh.{k}": v for k, v in degrees.items()}, **extra)
    got, want = outcome(c), reference[model]
    # The random bits are equal; on jax 0.12 their rounding depends on how XLA vectorised a shard.
    jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(a, b, 2), got["init"], want["init"])
    assert abs(got["loss"] - want["loss"]) <= 1e-5 * abs(want["loss"])
    assert_trees_close(got["grads"], want["grads"], 1e-4, "gradient")
    assert np.allclose(got["losses"], want["losses"], rtol=1e-5)


# The first model runs on every mesh, the others where their extra code meets every axis at once.
MIXED = ("dp2·cp2·tp2", "dp2·cp2·tp2·SP·ZeRO-3·remat", "dp2·tp2·microbatches")
PAIRS = [("mdlm", case) for case in CASES] + [
    (m, case) for m in MODELS if m != "mdlm" for case in MIXED
]


@pytest.mark.parametrize(("model", "case"), PAIRS)
def test_sharded_equals_unsharded(model: str, case: str, reference: dict) -> None:
    check(model, MODELS[model], case, reference)


@pytest.mark.parametrize("model", MORE)
@pytest.mark.parametrize("case", ["dp8", "dp4·tp2·ZeRO-1"])
def test_other_objectives_sharded_equal_unsharded(model: str, case: str, reference: dict) -> None:
    check(model, MORE[model], case, reference)


@pytest.mark.parametrize(("model", "case"), PAIRS)
def test_bytes_equal_the_closed_formula(model: str, case: str) -> None:
    degrees, extra = CASES[case]
    c = tiny(**MODELS[model], **{f"mesh.{k}": v for k, v in degrees.items()}, **extra)
    p = program(c)
    state = p.layout.abstract_state()
    batch = jax.eval_shape(
        p.corrupt,
        jax.ShapeDtypeStruct((c.train.batch, c.data.seq_len), jnp.int32),
        jax.random.key(0),
    )
    compiled = jax.jit(p.grads).lower(state.params, batch).compile()
    want = closed.traffic(c, p.layout.shapes, p.layout.stored, p.head_rows())
    assert counted_bytes(compiled, p.mesh) == pytest.approx(dict(want))
    logical = hlo.summary(
        jaxpr.collectives(jax.make_jaxpr(p.grads)(state.params, batch), dict(p.mesh.shape))
    )
    assert {k: wire for k, (_, _, wire) in logical.items() if wire} == pytest.approx(dict(want))


@pytest.mark.parametrize("model", MODELS | MORE)
def test_flops_equal_the_jaxpr(model: str) -> None:
    c = tiny(**(MODELS | MORE)[model])
    p = program(c)
    batch = jax.eval_shape(
        p.corrupt,
        jax.ShapeDtypeStruct((c.train.batch, c.data.seq_len), jnp.int32),
        jax.random.key(0),
    )
    counted = jaxpr.dot_flops(jax.make_jaxpr(p.grads)(p.layout.abstract_state().params, batch))
    assert counted == flops.train_step(c, p.head_rows())
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(p.layout.shapes))
    assert count == flops.parameters(c.model)


def test_masked_head_changes_no_loss_and_no_gradient(reference: dict) -> None:
    full = outcome(tiny(**{"objective.masked_head": False}))
    assert full["loss"] == pytest.approx(reference["mdlm"]["loss"], rel=1e-6)
    assert_trees_close(full["grads"], reference["mdlm"]["grads"], 1e-5, "gradient")


def test_bfloat16_compute_keeps_float32_parameters_and_stays_near(reference: dict) -> None:
    c = tiny(**{"model.dtype": "bfloat16", "mesh.dp": 2, "mesh.tp": 2})
    got = outcome(c)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(got["params"]))
    assert got["loss"] == pytest.approx(reference["mdlm"]["loss"], rel=2e-2)


def test_non_finite_step_leaves_the_state_untouched_and_is_counted() -> None:
    c = tiny(**{"mesh.dp": 2})
    p = program(c)
    state = p.init(0)
    poisoned = state.replace(
        params={**state.params, "norm": {"scale": state.params["norm"]["scale"] * jnp.nan}}
    )
    before = jax.device_get(poisoned.params)
    after, metrics = p.jit_train_step()(
        poisoned, jax.device_put(tokens(c), tokens_sharding(p.mesh))
    )
    assert int(metrics["skipped"]) == 1 and not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.params), before)
    assert int(after.step) == 1
