"""Left-to-right sampling by full recomputation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.data.synthetic import MarkovChain
from fdp.sampling.autoregressive import sample
from fdp.sampling.noise import Draw

pytestmark = pytest.mark.fast

CHAIN = MarkovChain()


def logits_at(inputs_BxL, i):
    """The true chain; 50 on padding columns, which must never be drawn."""
    tables = jnp.asarray(np.log(np.maximum(CHAIN.transitions, 1e-30)), jnp.float32)
    start = jnp.asarray(np.log(CHAIN.stationary), jnp.float32)
    logits = jnp.where(i == 0, start, tables[inputs_BxL[:, i]])
    return jnp.concatenate([logits, jnp.full((len(inputs_BxL), 5), 50.0)], -1)


def draw(ids, temperature=1.0, length=32):
    asked = lambda k, s: Draw(k, s, length, 27, temperature)
    return jax.jit(lambda k, s: sample(logits_at, asked(k, s), 0))(jax.random.key(0), ids)


def test_samples_of_the_true_chain_have_its_nll():
    ids_BxL, info = draw(jnp.arange(2000))
    assert int(info["nfe"]) == 32
    assert ids_BxL.dtype == jnp.int32
    assert int(ids_BxL.max()) < 27
    nll = CHAIN.nll(np.asarray(ids_BxL)) / 32
    assert abs(nll.mean() - CHAIN.nll_floor(32)) < 4 * nll.std() / 2000**0.5


def test_ids_depend_on_the_sample_id_alone_and_extend_with_length():
    all_ids, _ = draw(jnp.arange(8))
    np.testing.assert_array_equal(draw(jnp.array([6, 2]))[0], all_ids[jnp.array([6, 2])])
    np.testing.assert_array_equal(draw(jnp.arange(8), length=10)[0], all_ids[:, :10])


def test_temperature_zero_is_greedy():
    ids_BxL, _ = draw(jnp.arange(3), temperature=0.0)
    greedy = [int(CHAIN.stationary.argmax())]
    for _ in range(31):
        greedy.append(int(CHAIN.transitions[greedy[-1]].argmax()))
    np.testing.assert_array_equal(ids_BxL, [greedy] * 3)
