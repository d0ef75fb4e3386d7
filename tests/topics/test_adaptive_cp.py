"""Topic 3: profiles and masks of known attention, block-sparse evaluation, plans as data, exactness
checks.

Legend: S positions, W blocks, N layers.
"""

import dataclasses
import functools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.topic3 import get_config
from fdp import config, loop, objectives
from fdp.arm import Arm, load_data
from fdp.data.batches import eval_batches
from fdp.mesh import AXES, make_mesh
from fdp.models import transformer
from fdp.parallel import layouts
from fdp.parallel.context import CommPlan
from fdp.step import Program
from fdp.topics.adaptive_cp import checks, measured, runtime
from fdp.topics.adaptive_cp.mixers import sparse
from fdp.topics.adaptive_cp.profile import block_ids, block_masks, plain, profile, spearman

S, BLOCK = 64, 2


@functools.cache
def an_arm() -> types.SimpleNamespace:
    c = config.base()
    c.model.update(layers=2, width=32, heads=8, kv_heads=8, head_dim=4, ffn=64, vocab=64)
    c.objective.name, c.data.seq_len, c.train.batch = "autoregressive", S, 2
    config.validate(c)
    objective = objectives.from_config(c, 60, 59)
    model = transformer.from_config(c, "causal")
    program = Program(c, model, objective, make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1]))
    params = jax.device_get(jax.tree.map(lambda p: 1.5 * p, program.init(0).params))
    return types.SimpleNamespace(
        c=c,
        model=model,
        objective=objective,
        program=program,
        trained=types.SimpleNamespace(params=params),
    )


def tokens(n: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 60, (n, S), np.int32)


def test_profile_equals_probabilities_done_by_hand() -> None:
    arm = an_arm()
    found = profile(arm, arm.trained.params, tokens(), BLOCK, 0.9)
    assert found.mass_NxWxW.shape == (2, S // BLOCK, S // BLOCK)
    np.testing.assert_allclose(found.mass_NxWxW.sum(-1), 1, rtol=1e-5)
    assert not np.triu(found.mass_NxWxW, 1).any()
    assert ((found.density_N > 0) & (found.density_N <= 1)).all()
    uniform = types.SimpleNamespace(**vars(arm))
    flat = jax.tree_util.tree_map_with_path(
        lambda k, p: 0 * p if "w_q" in str(k) else p, arm.trained.params
    )
    even = profile(
        uniform, flat, tokens(), BLOCK, 0.9
    )  # no queries: every visible key gets the same weight
    rows = np.arange(S)
    expected = (
        np.array(
            [
                [
                    (np.minimum(np.maximum(r + 1 - BLOCK * w, 0), BLOCK) / (r + 1))
                    for w in range(S // BLOCK)
                ]
                for r in rows
            ]
        )
        .reshape(S // BLOCK, BLOCK, -1)
        .mean(1)
    )
    np.testing.assert_allclose(even.mass_NxWxW[0], expected, atol=1e-6)


@pytest.mark.fast
def test_masks_hold_the_coverage_and_nothing_of_the_future() -> None:
    rng = np.random.default_rng(0)
    mass = np.tril(rng.random((3, 16, 16)) ** 8)
    mass /= mass.sum(-1, keepdims=True)
    shares = []
    for coverage in (0.5, 0.9, 1.0):
        masks = block_masks(mass, coverage)
        assert not np.triu(masks, 1).any()
        assert masks[:, np.arange(16), np.arange(16)].all() and masks[:, :, 0].all()
        assert ((mass * masks).sum(-1) >= coverage - 1e-9).all()
        shares.append(masks.mean())
    assert shares[0] < shares[1] < shares[2]
    ids = block_ids(block_masks(mass, 0.5))
    back = np.zeros((3, 16, 17), bool)
    np.put_along_axis(back, np.where(ids < 0, 16, ids), True, -1)
    np.testing.assert_array_equal(back[..., :16], block_masks(mass, 0.5))
    with pytest.raises(ValueError, match="coverage = 0 is no share"):
        block_masks(mass, 0)


def test_all_blocks_are_dense_attention_and_fewer_are_not() -> None:
    arm = an_arm()
    W = measured.BLOCKS
    everything = np.broadcast_to(np.tri(W, dtype=bool), (2, W, W))
    dense = measured.loss_of(arm, arm.trained.params, tokens(), None)
    assert measured.loss_of(arm, arm.trained.params, tokens(), everything) == pytest.approx(
        dense, rel=1e-6
    )
    own = np.broadcast_to(np.eye(W, dtype=bool), (2, W, W))
    assert measured.loss_of(arm, arm.trained.params, tokens(), own) != pytest.approx(
        dense, rel=1e-4
    )


def test_sparse_mixer_sees_just_the_listed_blocks() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 16, 2, 4)), jnp.float32) for _ in range(3))
    ids = jnp.asarray([[0, -1], [0, 1], [1, 2], [0, 3]], jnp.int32)
    out = sparse(4)(q, k, v, jnp.arange(16), ids)
    other = v.at[:, 4:8].set(9.0)  # block 1: read by query blocks 1 and 2 alone
    changed = (
        np.abs(np.asarray(sparse(4)(q, k, other, jnp.arange(16), ids) - out))
        .max((0, 2, 3))
        .reshape(4, 4)
    )
    assert (changed[[0, 3]] == 0).all() and (changed[[1, 2]] > 0).any(1).all()
    whole = jnp.asarray([[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 2, 3]], jnp.int32)
    np.testing.assert_allclose(
        sparse(4)(q, k, v, jnp.arange(16), whole), plain(q, k, v, jnp.arange(16), None), atol=1e-6
    )


@pytest.mark.parametrize("plan", [CommPlan("ring", layout=layouts.ZIGZAG), CommPlan("usp", 2)])
def test_comparison_finds_a_plan_exact(plan: CommPlan) -> None:
    found = checks.compare(plan)
    assert found.output_error < 1e-5 and found.gradient_error < 1e-5
    assert found.counted and not found.mismatches()
    off = {key: wire + 1 for key, wire in found.formula.items()}
    assert len(dataclasses.replace(found, formula=off).mismatches()) == len(off)


def test_plan_arrays_share_one_program_and_equal_one_device() -> None:
    found = checks.switch_plans(an_arm(), tokens())
    assert found.compilations == 1 and found.arrays == 4
    assert found.loss_error < 1e-5 and found.gradient_error < 1e-4


def measured_masks() -> np.ndarray:
    arm = an_arm()
    return block_masks(profile(arm, arm.trained.params, tokens(), BLOCK, 0.9).mass_NxWxW, 0.5)


def test_lists_as_data_equal_one_device_by_every_plan_and_by_the_fallback() -> None:
    masks = measured_masks()
    gathers = [p.capacity for p in checks.listed_plans(masks, BLOCK) if p.kind == "gather"]
    assert gathers[0] > gathers[1] == 1  # the second one overflows
    found = checks.switch_listed(an_arm(), tokens(), masks)
    assert found.compilations == 1 and found.arrays == 5
    assert found.loss_error < 1e-5 and found.gradient_error < 1e-4
    dense = measured.loss_of(an_arm(), an_arm().trained.params, tokens(), None)
    assert measured.loss_of(an_arm(), an_arm().trained.params, tokens(), masks) != pytest.approx(
        dense, rel=1e-4
    )


def test_lists_from_each_input_equal_one_device_by_every_plan() -> None:
    found = checks.switch_indexed(an_arm(), tokens(), S // BLOCK, 4)
    assert found.compilations == 1 and found.arrays == 4
    assert found.loss_error < 1e-5 and found.gradient_error < 1e-4


def test_all_blocks_chosen_by_the_input_are_dense_attention() -> None:
    arm = an_arm()
    dense = measured.loss_of(arm, arm.trained.params, tokens(), None)
    assert measured.indexed_loss(
        arm, arm.trained.params, tokens(), measured.BLOCKS
    ) == pytest.approx(dense, rel=1e-6)
    assert measured.indexed_loss(arm, arm.trained.params, tokens(), 2) != pytest.approx(
        dense, rel=1e-4
    )


def test_a_program_of_one_plan_equals_one_device_and_sends_the_sum_of_its_layers_formulas() -> None:
    found = checks.static_plan(an_arm(), tokens(), measured_masks())
    assert found.output_error < 1e-5 and found.gradient_error < 1e-4
    exchanged = [found.formula[checks.over_cp(op)] for op in ("all-to-all", "all-gather")]
    assert min(exchanged) > 0 and not found.mismatches()
    off = {key: wire + 4 for key, wire in found.formula.items()}
    assert len(dataclasses.replace(found, formula=off).mismatches()) == 3


def test_training_goes_on_with_plans_as_data_and_leaves_the_arm_as_it_was(tmp_path: Path) -> None:
    """With every block listed, sparse and dense training are the same, whatever plans run."""
    c = get_config("tiny")
    c.train.steps, c.checkpoint.every = 2, 2
    arm = Arm("text", c, load_data(c), make_mesh(c.mesh))
    loop.fit(arm, tmp_path)
    before = jax.device_get(arm.trained.params)
    (probe,) = eval_batches(arm.data.val, 1, 1)
    found = runtime.adapt(arm, probe, measured.BLOCKS, 1.0, windows=2, steps=1)
    assert found.loss == pytest.approx(found.dense_loss, rel=1e-5)
    assert (
        [len(w.plans) for w in found.windows] == [2, 2] and found.steps == 2 and found.switches == 0
    )
    assert all(0.9 < share <= 1 for w in found.windows for share in w.share_N)
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves(jax.device_get(arm.trained.params)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.fast
def test_compiled_plans_hold_gathers_of_every_size_and_ulysses_where_heads_allow_it() -> None:
    c = get_config("tiny")
    kinds = lambda: [(p.kind, p.capacity) for p in runtime.branches(c, 64)]
    assert kinds() == [*(("gather", n) for n in (1, 2, 4)), ("ulysses", 0), ("all_gather", 0)]
    c.model.heads = 4
    assert kinds() == [*(("gather", n) for n in (1, 2, 4)), ("all_gather", 0)]


@pytest.mark.fast
def test_blocks_that_the_devices_cannot_share_are_refused() -> None:
    arm = types.SimpleNamespace(c=get_config("tiny"))
    with pytest.raises(
        ValueError, match=r"data.seq_len = 128 must be a multiple of 24 blocks, .* 2·cp = 16"
    ):
        runtime.block_of(arm, 24)


@pytest.mark.fast
def test_rank_correlation() -> None:
    assert spearman(np.array([1, 2, 3]), np.array([2, 4, 9])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    assert spearman(np.ones(3), np.ones(3)) == 1
    assert spearman(np.ones(3), np.arange(3)) == 0
