"""Next-token prediction in the frame of the diffusion objectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.data.synthetic import MarkovChain
from fdp.objectives.autoregressive import Autoregressive

pytestmark = pytest.mark.fast


def test_inputs_are_shifted_and_every_token_counts():
    objective = Autoregressive(n_ids=27, bos=26)
    tokens_BxL = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    batch = objective.corrupt(jax.random.key(0), {"tokens": tokens_BxL})
    np.testing.assert_array_equal(batch["inputs"], [[26, 3, 1, 4], [26, 5, 9, 2]])
    np.testing.assert_array_equal(batch["rows"]["targets"], tokens_BxL)
    np.testing.assert_array_equal(batch["rows"]["weights"], np.ones((2, 4)))
    assert objective.capacity(8, 64, shards=2, seq_shards=4) is None  # no row can be left out
    assert objective.count(batch) == 8


def test_loss_of_the_true_chain_is_its_nll():
    chain = MarkovChain()
    objective = Autoregressive(n_ids=27, bos=26)
    x_BxL = chain.sample(0, 0, 16, 32)
    batch = objective.corrupt(jax.random.key(0), {"tokens": jnp.asarray(x_BxL)})
    logits = np.log(np.maximum(chain.transitions, 1e-30))[batch["inputs"]]
    logits[:, 0] = np.log(chain.stationary)
    # Padding columns must not take mass.
    padded = jnp.asarray(np.concatenate([logits, np.full((16, 32, 5), 50.0)], -1), jnp.float32)
    loss = objective.loss(padded, batch["rows"]).sum(1)
    np.testing.assert_allclose(loss, chain.nll(x_BxL), rtol=2e-6)
