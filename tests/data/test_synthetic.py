"""The oracles: against published numbers, against each other, and against brute force."""

import itertools

import jax
import numpy as np
import pytest

from fdp.data.synthetic import MarkovChain, markov_data
from tests.oracles import EnumerableJoint, nelbo_exact

pytestmark = pytest.mark.fast


def test_markov_27_has_the_published_entropy_and_floor():
    chain = MarkovChain()
    assert chain.entropy_rate() == pytest.approx(1.7078, abs=5e-5)
    assert chain.nll_floor(32) == pytest.approx(1.7525, abs=5e-5)
    assert chain.nll_floor(1) > chain.nll_floor(2) > chain.entropy_rate()
    np.testing.assert_allclose(chain.stationary @ chain.transitions, chain.stationary, atol=1e-15)


def test_samples_follow_the_chain_and_depend_on_seed_and_step_alone():
    chain = MarkovChain()
    x_BxL = chain.sample(0, 3, 2000, 32)
    assert x_BxL.dtype == np.int32
    np.testing.assert_array_equal(x_BxL, chain.sample(0, 3, 2000, 32))
    assert (x_BxL != chain.sample(0, 4, 2000, 32)).any()
    assert (x_BxL != chain.sample(1, 3, 2000, 32)).any()
    nll = chain.nll(x_BxL) / 32
    assert abs(nll.mean() - chain.nll_floor(32)) < 4 * nll.std() / 2000**0.5
    np.testing.assert_allclose(
        np.bincount(x_BxL[:, -1], minlength=27) / 2000, chain.stationary, atol=0.04
    )


def test_denoiser_matches_brute_force_on_every_mask_pattern():
    chain = MarkovChain(n=3, concentration=0.4, seed=2)
    every = np.array(list(itertools.product(range(3), repeat=5)))
    p = np.exp(-chain.nll(every))
    assert p.sum() == pytest.approx(1, abs=1e-12)
    x = chain.sample(0, 0, 1, 5)[0]
    z_NxL = np.array([np.where(mask, 3, x) for mask in itertools.product([False, True], repeat=5)])
    expected = np.zeros((len(z_NxL), 5, 3))
    for row, z in enumerate(z_NxL):
        agree = ((every == z) | (z == 3)).all(1)
        for i, v in itertools.product(range(5), range(3)):
            expected[row, i, v] = p[agree & (every[:, i] == v)].sum() / p[agree].sum()
    with jax.enable_x64(True):
        np.testing.assert_allclose(np.exp(jax.jit(chain.denoiser)(z_NxL)), expected, atol=1e-13)
    got = jax.jit(chain.denoiser)(z_NxL)
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.exp(got), expected, atol=1e-6)


def test_chain_denoiser_has_nelbo_equal_to_nll_for_each_sequence():
    chain = MarkovChain()
    x_BxL = chain.sample(0, 0, 4, 8)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            nelbo_exact(jax.jit(chain.denoiser), x_BxL, 27), chain.nll(x_BxL), atol=1e-12
        )


def test_joint_is_normalised_and_its_denoiser_is_its_conditional():
    joint = EnumerableJoint()
    every = np.stack(np.unravel_index(np.arange(81), joint.table.shape), 1)
    assert np.exp(-joint.nll(every)).sum() == pytest.approx(1, abs=1e-12)
    z = np.array([[3, 1, 3, 0]])
    marginal = joint.table[:, 1, :, 0].sum(1)
    np.testing.assert_allclose(
        np.exp(joint.denoiser(z))[0, 0], marginal / marginal.sum(), rtol=1e-5
    )
    np.testing.assert_array_equal(np.exp(joint.denoiser(z))[0, 1], [0, 1, 0])
    np.testing.assert_array_equal(joint.sample(0, 1, 5), joint.sample(0, 1, 5))


def test_chain_as_a_corpus_holds_whole_sequences_and_says_its_floor() -> None:
    chain = MarkovChain()
    data = markov_data(16, train=64, val=32)
    train, val = (split.take(range(len(split)))["tokens"] for split in (data.train, data.val))
    np.testing.assert_array_equal(train, chain.sample(0, 0, 64, 16))
    np.testing.assert_array_equal(val, chain.sample(1, 0, 32, 16))
    assert (len(data.train), len(data.val)) == (64, 32)
    assert data.tokenizer.n_data == 27 and data.tokenizer.mask_id == 27
    assert f"{chain.nll_floor(16):.4f}" in data.name
    assert data.tokenizer.decode([0, 25, 27]) == "az▁"
    assert list(data.tokenizer.encode("abz")) == [0, 1, 25]
    assert (
        markov_data(16, train=64, val=32).sha256
        == data.sha256
        != markov_data(8, train=64, val=32).sha256
    )
