"""Training under every context plan equals one device: loss, gradients, and bytes by the closed
formula.
"""

import jax
import numpy as np
import pytest

from fdp import config
from fdp.cost import bytes as closed
from fdp.cost import hlo
from fdp.mesh import make_mesh
from fdp.models import transformer
from fdp.objectives import from_config
from fdp.step import Program, tokens_sharding

BASE = {
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 8,
    "model.kv_heads": 4,
    "model.head_dim": 8,
    "model.ffn": 64,
    "model.vocab": 64,
    "data.seq_len": 32,
    "train.batch": 8,
}
CASES = {
    "ring, zig-zag": {"mesh.cp": 4, "context.plan": "ring", "context.layout": "zigzag"},
    "ulysses": {"mesh.cp": 4, "context.plan": "ulysses"},
    "usp, striped": {
        "mesh.cp": 8,
        "context.plan": "usp",
        "context.head_split": 2,
        "context.layout": "striped",
        "context.stripe": 2,
    },
    "batch": {"mesh.cp": 4, "context.plan": "batch", "context.head_split": 2},
    "all-gather, zig-zag": {"mesh.cp": 4, "context.layout": "zigzag"},
    "usp on dp2·cp2·tp2": {"mesh.dp": 2, "mesh.cp": 2, "mesh.tp": 2, "context.plan": "ring"},
}


def program(objective: str, **overrides: object) -> Program:
    c = config.base()
    c.update_from_flattened_dict(BASE | {"objective.name": objective} | overrides)
    config.validate(c)
    o = from_config(c, 62, 61)
    return Program(c, transformer.from_config(c, o.attention, o.block), o, make_mesh(c.mesh))


def outcome(p: Program) -> tuple:
    tokens = np.random.default_rng(0).integers(0, 62, (8, 32), np.int32)
    batch = jax.jit(p.corrupt)(jax.device_put(tokens, tokens_sharding(p.mesh)), jax.random.key(0))
    compiled = jax.jit(p.grads).lower(p.init(0).params, batch).compile()
    loss, grads = compiled(p.init(0).params, batch)
    return float(loss), jax.device_get(grads), compiled


@pytest.fixture(scope="module")
def reference() -> dict:
    return {
        (name, w): outcome(program(name, **{"model.window": w}))[:2]
        for name, w in (("autoregressive", 0), ("mdlm", 0), ("autoregressive", 9))
    }


def by_axis(compiled, mesh) -> dict:
    """Wire bytes by (op, logical axes): cp0·cp1·… and any part of it count as cp."""
    found: dict = {}
    for (op, axes), (_, _, wire) in hlo.summary(
        hlo.collectives(compiled.as_text(), dict(mesh.shape))
    ).items():
        key = op, tuple(dict.fromkeys(a.rstrip("0123456789") for a in axes))
        found[key] = found.get(key, 0.0) + wire
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("objective", ["autoregressive", "mdlm"])
def test_every_plan_trains_as_one_device_and_sends_what_the_formula_says(
    objective: str, case: str, reference: dict
) -> None:
    p = program(objective, **CASES[case])
    loss, grads, compiled = outcome(p)
    expected_loss, expected = reference[objective, 0]
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)
    formula = closed.traffic(p.c, p.layout.shapes, p.layout.stored, p.head_rows())
    counted = by_axis(compiled, p.mesh)
    for key in formula.keys() | counted.keys():
        assert counted.get(key, 0) == pytest.approx(formula.get(key, 0), rel=1e-12), key


@pytest.mark.parametrize("case", ["ring, zig-zag", "ulysses"])
def test_a_window_trains_as_one_device(case: str, reference: dict) -> None:
    loss, grads, _ = outcome(program("autoregressive", **CASES[case], **{"model.window": 9}))
    expected_loss, expected = reference["autoregressive", 9]
    assert expected_loss != pytest.approx(reference["autoregressive", 0][0], rel=1e-4)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"mesh.cp": 8, "data.seq_len": 24, "context.layout": "zigzag"},
            r"24 is not divisible by 2·cp = 16 \(zig-zag\)",
        ),
        (
            {"mesh.cp": 8, "mesh.tp": 1, "model.heads": 4, "context.plan": "ulysses"},
            r"heads = 4 .* head_split = 8",
        ),
        (
            {"mesh.cp": 4, "model.window": 64, "context.plan": "ring"},
            r"window = 64 > sequence length 32",
        ),
        (
            {"mesh.cp": 4, "context.plan": "usp", "context.head_split": 3},
            r"cp = 4 is not divisible by head_split = 3",
        ),
        (
            {"mesh.cp": 4, "context.plan": "batch", "context.head_split": 4, "train.batch": 2},
            r"not divisible by head_split",
        ),
    ],
)
def test_plans_that_cannot_run_are_refused_before_training(wrong: dict, message: str) -> None:
    with pytest.raises(config.UserError, match=message):
        program("autoregressive", **wrong)


@pytest.mark.fast
def test_unknown_words_are_refused_with_the_closest() -> None:
    with pytest.raises(
        config.UserError, match=r"context.plan='rings' is unknown: did you mean 'ring'"
    ):
        program("mdlm", **{"context.plan": "rings"})
    with pytest.raises(config.UserError, match=r"block_diffusion doubles"):
        program("block_diffusion", **{"mesh.cp": 2})
