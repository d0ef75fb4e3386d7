"""Plans as data and as constants of a program equal one device; cores see just what is listed.

Legend: W blocks of a sequence.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.models.attention import Softmax, Where
from fdp.parallel.context import layouts, planner_masks
from fdp.parallel.context.cores import Sparse
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.masks import Mask
from fdp.study import context_exactness as exactness
from fdp.study import context_switching as switching
from tests.study.attending_arm import BLOCK, W, an_arm

MASKS = planner_masks.layers(2, W, 0.5, spread=2.0)


def test_the_sparse_core_sees_just_the_listed_blocks() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 16, 2, 4)), jnp.float32) for _ in range(3))
    where = Where(jnp.arange(16), jnp.arange(16))
    core = jax.jit(lambda v, ids: Sparse(4)(q, k, v, where, ids))
    ids = jnp.asarray([[0, -1, -1, -1], [0, 1, -1, -1], [1, 2, -1, -1], [0, 3, -1, -1]], jnp.int32)
    other = v.at[:, 4:8].set(9.0)  # block 1: read by query blocks 1 and 2 alone
    changed = np.abs(np.asarray(core(other, ids) - core(v, ids))).max((0, 2, 3)).reshape(4, 4)
    assert (changed[[0, 3]] == 0).all() and (changed[[1, 2]] > 0).any(1).all()
    whole = jnp.asarray([[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 2, 3]], jnp.int32)
    dense = Softmax(Mask("causal"))(q, k, v, where, None)
    np.testing.assert_allclose(core(v, whole), dense, atol=1e-6)


@pytest.mark.parametrize("plan", [CommPlan("ring", layout=layouts.ZIGZAG), CommPlan("usp", 2)])
def test_comparison_finds_a_plan_exact(plan: CommPlan) -> None:
    found = exactness.compare(plan)
    assert found.output_error < 1e-5 and found.gradient_error < 1e-5
    assert found.counted and not found.mismatches()
    off = {key: wire + 1 for key, wire in found.formula.items()}
    assert len(dataclasses.replace(found, formula=off).mismatches()) == len(off)


def is_exact(found: switching.Switching, arrays: int) -> None:
    assert found.compilations == 1 and found.arrays == arrays
    assert found.loss_error < 1e-5 and found.gradient_error < 1e-4


def test_plan_arrays_share_one_program_and_equal_one_device() -> None:
    is_exact(switching.switch_plans(an_arm()), 4)


def test_lists_as_data_equal_one_device_by_every_plan_and_by_the_fallback() -> None:
    gathers = [p.capacity for p in switching.listed_plans(MASKS, BLOCK) if p.kind == "gather"]
    assert gathers[0] > gathers[1] == 1  # the second one overflows
    found, fixed = switching.switch_listed(an_arm(), MASKS)
    is_exact(found, 5)
    # As constants of a program, that sends the sum of its layers' formulas.
    assert fixed.output_error < 1e-5 and fixed.gradient_error < 1e-4
    exchanged = [fixed.formula[exactness.over_cp(op)] for op in ("all-to-all", "all-gather")]
    assert min(exchanged) > 0 and not fixed.mismatches()
    off = {key: wire + 4 for key, wire in fixed.formula.items()}
    assert len(dataclasses.replace(fixed, formula=off).mismatches()) == 3


def test_lists_from_each_input_equal_one_device_by_every_plan() -> None:
    is_exact(switching.switch_indexed(an_arm(), W, 4), 4)
