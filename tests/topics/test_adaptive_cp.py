"""Topic 3: profiles and masks of known attention, block-sparse evaluation, plans as data, exactness checks.

Legend: S positions, W blocks, N layers.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp import config, objectives
from fdp.mesh import AXES, make_mesh
from fdp.models import transformer
from fdp.parallel import layouts
from fdp.parallel.context import CommPlan
from fdp.step import Program
from fdp.topics.adaptive_cp import checks, study
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
        c=c, model=model, objective=objective, program=program, trained=types.SimpleNamespace(params=params)
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
    flat = jax.tree_util.tree_map_with_path(lambda k, p: 0 * p if "w_q" in str(k) else p, arm.trained.params)
    even = profile(uniform, flat, tokens(), BLOCK, 0.9)  # no queries: every visible key gets the same weight
    rows = np.arange(S)
    expected = np.array([[(np.minimum(np.maximum(r + 1 - BLOCK * w, 0), BLOCK) / (r + 1)) for w in range(S // BLOCK)]
                         for r in rows]).reshape(S // BLOCK, BLOCK, -1).mean(1)  # fmt: skip
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
    W = study.BLOCKS
    everything = np.broadcast_to(np.tri(W, dtype=bool), (2, W, W))
    dense = study.loss_of(arm, arm.trained.params, tokens(), None)
    assert study.loss_of(arm, arm.trained.params, tokens(), everything) == pytest.approx(dense, rel=1e-6)
    own = np.broadcast_to(np.eye(W, dtype=bool), (2, W, W))
    assert study.loss_of(arm, arm.trained.params, tokens(), own) != pytest.approx(dense, rel=1e-4)


def test_sparse_mixer_sees_just_the_listed_blocks() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 16, 2, 4)), jnp.float32) for _ in range(3))
    ids = jnp.asarray([[0, -1], [0, 1], [1, 2], [0, 3]], jnp.int32)
    out = sparse(4)(q, k, v, jnp.arange(16), ids)
    other = v.at[:, 4:8].set(9.0)  # block 1: read by query blocks 1 and 2 alone
    changed = np.abs(np.asarray(sparse(4)(q, k, other, jnp.arange(16), ids) - out)).max((0, 2, 3)).reshape(4, 4)
    assert (changed[[0, 3]] == 0).all() and (changed[[1, 2]] > 0).any(1).all()
    whole = jnp.asarray([[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 2, 3]], jnp.int32)
    np.testing.assert_allclose(
        sparse(4)(q, k, v, jnp.arange(16), whole), plain(q, k, v, jnp.arange(16), None), atol=1e-6
    )


@pytest.mark.parametrize("plan", [CommPlan("ring", layout=layouts.ZIGZAG), CommPlan("usp", 2)])
def test_comparison_finds_a_plan_exact(plan: CommPlan) -> None:
    found = checks.compare(plan)
    assert found.forward_error < 1e-5 and found.gradient_error < 1e-5
    assert found.mismatches() == 0
    assert checks.Comparison(plan, 0, 0, found.counted, {op: b + 1 for op, b in found.formula.items()}).mismatches()


def test_plan_arrays_share_one_program_and_equal_one_device() -> None:
    found = checks.switch_plans(an_arm(), tokens())
    assert found.compilations == 1 and found.arrays == 4
    assert found.loss_error < 1e-5 and found.gradient_error < 1e-4


@pytest.mark.fast
def test_rank_correlation() -> None:
    assert spearman(np.array([1, 2, 3]), np.array([2, 4, 9])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    assert spearman(np.ones(3), np.ones(3)) == 1
    assert spearman(np.ones(3), np.arange(3)) == 0
