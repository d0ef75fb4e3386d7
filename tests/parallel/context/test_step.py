"""Training under every context plan equals one device: loss, gradients, and bytes by the closed
formula.
"""

import functools

import jax
import numpy as np
import pytest
from build import program, tiny, tokens

from fdp import config
from fdp.count import bytes as closed
from fdp.count import compare

BASE = {"model.heads": 8}  # for plans that share out heads over eight devices
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


OBJECTIVES = ("autoregressive", "mdlm")


def outcome(variables: dict | None, **overrides: object) -> tuple:
    """(loss, gradients, bytes, formula, variables) from the same initial values on every mesh."""
    c = tiny(**BASE | overrides)
    p = program(c)
    if variables is None:
        variables = jax.device_get(p.init(0).variables)
    found = compare.outcome(p, variables, {"tokens": tokens(c)})
    return *found, dict(closed.traffic(p)), variables


@functools.cache
def reference(objective: str, window: int = 0) -> tuple:
    """One device."""
    variables = (
        None if (objective, window) == ("autoregressive", 0) else reference(OBJECTIVES[0])[4]
    )
    return outcome(variables, **{"objective.name": objective, "model.window": window})


def assert_equal(got: tuple, want: tuple) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_plan_trains_as_one_device_and_sends_what_the_formula_says(
    objective: str, case: str
) -> None:
    want = reference(objective)
    got = outcome(want[4], **{"objective.name": objective}, **CASES[case])
    assert_equal(got, want)
    assert got[2] == pytest.approx(got[3], rel=1e-12)


@pytest.mark.parametrize("case", ["ring, zig-zag", "ulysses"])
def test_a_window_trains_as_one_device(case: str) -> None:
    want = reference("autoregressive", 9)
    assert want[0] != pytest.approx(reference("autoregressive")[0], rel=1e-4)
    window = {"objective.name": "autoregressive", "model.window": 9}
    assert_equal(outcome(want[4], **window, **CASES[case]), want)


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
        program(tiny(**BASE | {"objective.name": "autoregressive"} | wrong))


@pytest.mark.fast
def test_unknown_words_are_refused_with_the_closest() -> None:
    with pytest.raises(
        config.UserError, match=r"context.plan='rings' is unknown: did you mean 'ring'"
    ):
        tiny(**{"context.plan": "rings"})
    with pytest.raises(config.UserError, match=r"block_diffusion doubles"):
        tiny(**{"mesh.cp": 2, "objective.name": "block_diffusion"})
