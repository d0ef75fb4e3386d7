"""Block diffusion: exact for any block, its two limits, and an attention mask that leaks
nothing.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.objectives.block_diffusion import BlockDiffusion, BlockDiffusionRule
from fdp.objectives.mdlm import MDLM, masked_capacity
from tests.oracles import EnumerableJoint, nelbo_exact

pytestmark = pytest.mark.fast

JOINT = EnumerableJoint()
EVERY_X = np.stack(np.unravel_index(np.arange(81), JOINT.table.shape), 1).astype(np.int32)


def exact_logits(inputs_Bx2L, block):
    """Exact conditionals of each noisy block given the clean blocks before it, from inputs [z ‖
    x].
    """
    length = inputs_Bx2L.shape[1] // 2
    z_BxL, x_BxL = inputs_Bx2L[:, :length], inputs_Bx2L[:, length:]
    outputs = []
    for start in range(0, length, block):
        own = slice(start, start + block)
        rest = jnp.full((len(z_BxL), length - start - block), 3)
        state = jnp.concatenate([x_BxL[:, :start], z_BxL[:, own], rest], axis=1)
        outputs.append(JOINT.denoiser(state)[:, own])
    return jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_nelbo_is_exact_for_every_block(block):
    with jax.enable_x64(True):
        nelbo = nelbo_exact(JOINT.denoiser, EVERY_X, 3, block=block)
    np.testing.assert_allclose(nelbo, JOINT.nll(EVERY_X), rtol=0, atol=2e-14)


def test_block_of_one_is_the_autoregressive_nll_in_every_draw():
    objective = BlockDiffusion(3, block=1)
    for seed in range(3):
        batch = objective.corrupt(jax.random.key(seed), {"tokens": EVERY_X})
        assert (batch["inputs"][:, :4] == 3).all()
        loss = objective.loss(exact_logits(batch["inputs"], 1), batch["rows"]).sum(1)
        np.testing.assert_allclose(loss, JOINT.nll(EVERY_X), rtol=3e-6)


@pytest.mark.parametrize("form", ["t", "k"])
def test_block_of_the_whole_sequence_is_mdlm(form):
    block, plain = BlockDiffusion(3, block=4, form=form), MDLM(3, form)
    ours, theirs = (o.corrupt(jax.random.key(5), {"tokens": EVERY_X}) for o in (block, plain))
    np.testing.assert_array_equal(ours["inputs"], np.concatenate([theirs["inputs"], EVERY_X], 1))
    np.testing.assert_array_equal(ours["noise"], theirs["noise"])
    chex.assert_trees_all_equal(ours["rows"], theirs["rows"])
    logits = exact_logits(ours["inputs"], 4)
    np.testing.assert_array_equal(
        block.loss(logits, ours["rows"]), plain.loss(logits, theirs["rows"])
    )


@pytest.mark.parametrize("form", ["t", "k"])
@pytest.mark.parametrize("block", [1, 2])
def test_estimate_is_unbiased(form, block):
    objective, x_BxL, n = BlockDiffusion(3, block=block, form=form), EVERY_X[[3, 30, 79]], 4000

    def estimate(key):
        batch = objective.corrupt(key, {"tokens": x_BxL})
        return objective.loss(0.5 * exact_logits(batch["inputs"], block), batch["rows"]).sum(1)

    draws = np.asarray(
        jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), n)), np.float64
    )
    softened = lambda z: jax.nn.log_softmax(0.5 * JOINT.denoiser(z), axis=-1)
    exact = nelbo_exact(softened, x_BxL, 3, block=block)
    # ε = 1e-3 of the linear schedule leaves out as much of the mask ratios; exact-k with block 1
    # has no variance.
    z = (draws.mean(0) - exact) / np.maximum(draws.std(0) / n**0.5, 1e-3 * exact)
    assert (abs(z) < 4).all(), z


@pytest.mark.parametrize(("length", "block"), [(6, 2), (8, 4), (5, 1), (4, 4)])
def test_mask_is_the_union_of_its_three_parts(length, block):
    q, k = np.arange(2 * length)[:, None], np.arange(2 * length)[None]
    mask = BlockDiffusionRule(length, block)(q, k)
    of = np.tile(np.arange(length) // block, 2)
    blocks = of[:, None] - of[None]
    half = length
    np.testing.assert_array_equal(mask[:half, :half], blocks[:half, :half] == 0)
    np.testing.assert_array_equal(mask[:half, half:], blocks[:half, half:] > 0)
    np.testing.assert_array_equal(mask[half:, half:], blocks[half:, half:] >= 0)
    assert not mask[half:, :half].any()
    assert mask.any(1).all()  # no query with nothing to attend to
    np.testing.assert_array_equal(
        jax.jit(lambda q, k: BlockDiffusionRule(length, block)(q, k))(q, k), mask
    )


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (4, 4), (5, 7), (16, 12), (3, 48)])
def test_ranges_of_positions_meet_exactly_where_a_pair_is_allowed(rows, keys):
    length, block = 24, 4
    rule, index = BlockDiffusionRule(length, block), np.arange(2 * length)
    seen = rule(index[:, None], index[None])
    first_q, first_k = index[::rows, None], index[None, ::keys]
    last_q, last_k = np.minimum(first_q + rows, 2 * length) - 1, np.minimum(first_k + keys, 48) - 1
    tiles = np.add.reduceat(np.add.reduceat(seen, index[::rows], 0, int), index[::keys], 1) > 0
    np.testing.assert_array_equal(rule.meets(first_q, last_q, first_k, last_k), tiles)
    with pytest.raises(ValueError, match="block length 5 does not divide sequence length 24"):
        BlockDiffusionRule(length, 5)


def test_clean_tokens_of_the_own_or_a_later_block_never_reach_a_noisy_block():
    """Three attention layers with the mask: perturb x_0 of one block and see which noisy outputs
    move.
    """
    length, block, width = 12, 3, 8
    rng = np.random.default_rng(0)
    mask = BlockDiffusionRule(length, block)(np.arange(24)[:, None], np.arange(24)[None])
    w = rng.normal(size=(3, width, width))

    def network(h):
        for w_layer in w:
            scores = np.where(mask, h @ w_layer @ h.T / width, -np.inf)
            p = np.exp(scores - scores.max(1, keepdims=True))
            h = np.tanh(h + p / p.sum(1, keepdims=True) @ h)
        return h[:length]

    h = rng.normal(size=(2 * length, width))
    before = network(h).reshape(4, block, width)
    for changed in range(4):
        perturbed = h.copy()
        perturbed[length + changed * block : length + (changed + 1) * block] += rng.normal(
            size=(block, width)
        )
        moved = (network(perturbed).reshape(4, block, width) != before).any((1, 2))
        np.testing.assert_array_equal(moved, np.arange(4) > changed)


def test_shapes_levels_and_capacity():
    objective = BlockDiffusion(3, block=2)
    batch = objective.corrupt(jax.random.key(0), {"tokens": EVERY_X[:8]})
    assert batch["inputs"].shape == (8, 8)
    masked = np.asarray(batch["inputs"][:, :4] == 3)
    np.testing.assert_array_equal(batch["inputs"][:, 4:], EVERY_X[:8])
    np.testing.assert_allclose(batch["noise"], masked.mean(1))
    assert sorted(masked.reshape(16, 2).sum(1)) == [1] * 8 + [2] * 8
    assert objective.capacity(8, 4, 2) == masked_capacity(8, 4, 2, block=2) == 12
    for seed in range(20):
        masked = np.asarray(
            objective.corrupt(jax.random.key(seed), {"tokens": EVERY_X[:12]})["inputs"][:, :4] == 3
        )
        assert masked.reshape(4, -1).sum(1).max() <= objective.capacity(12, 4, 4)
        assert masked.reshape(4, 3, 2, 2).sum((1, 3)).max() <= objective.capacity(12, 4, 4, 2)
    with pytest.raises(ValueError, match="does not divide"):
        BlockDiffusion(3, block=3).corrupt(jax.random.key(0), {"tokens": EVERY_X})
    with pytest.raises(ValueError, match="at least 1"):
        BlockDiffusion(3, block=0)
    with pytest.raises(ValueError, match="form"):
        BlockDiffusion(3, form="x")
