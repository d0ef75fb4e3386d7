"""Topic 1, what crosses the wire: ids and scalars instead of logits (T1.5), int8 sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.sharding import PartitionSpec as P

from fdp.collectives import shard_map
from fdp.count import hlo
from fdp.mesh import AXES, make_mesh
from fdp.parallel.tensor import suppress
from fdp.parallel.wire import int8_psum, quantise
from fdp.sampling.noise import categorical, categorical_confidence, position_keys
from fdp.topics.parallel_dlm import head


@functools.cache
def whole() -> tuple[jax.Array, ...]:
    """Keys, logits, and the tokens and confidences of one device."""
    normal = np.random.default_rng(0).normal(0, 2, (4, 64, 32))
    logits = suppress(jnp.asarray(normal, jnp.float32), 30)
    keys = position_keys(jax.random.key(5), jnp.arange(4), 0, jnp.arange(64))
    return keys, logits, categorical(keys, logits), jax.nn.softmax(logits).max(-1)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_token_and_confidence_do_not_depend_on_the_shards(tp: int) -> None:
    keys, logits, expected, confidence = whole()
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": tp})
    specs = (P(), P(None, None, "tp"))
    token, sure = jax.jit(shard_map(categorical_confidence, mesh, specs, (P(), P())))(keys, logits)
    np.testing.assert_array_equal(token, expected)
    np.testing.assert_allclose(sure, confidence, rtol=1e-6)


@pytest.mark.fast
def test_drawn_tokens_follow_the_softmax() -> None:
    logits = jnp.asarray([1.0, 0.0, -1.0, 2.0, -3.0])
    keys = position_keys(jax.random.key(1), jnp.arange(100), 0, jnp.arange(100))
    tokens, _ = categorical_confidence(keys, jnp.broadcast_to(logits, (100, 100, 5)))
    expected = scipy.special.softmax(np.asarray(logits, float)) * tokens.size
    assert scipy.stats.chisquare(np.bincount(np.ravel(tokens), minlength=5), expected).pvalue > 1e-3
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        categorical_confidence(keys, jnp.zeros((100, 100, 5)), -1.0)


def test_sampling_sends_a_thousandth_of_the_logits() -> None:
    found = head.sampling_bytes(4)
    assert found.scalars == 2 * 3 / 4 * 4 * head.ROWS * 4  # four scalars a row, all-reduced
    assert found.gather == 3 / 4 * 4 * head.ROWS * head.V_WIDE


@pytest.mark.parametrize("tp", [2, 8])
def test_int8_sum_is_near_and_sends_a_quarter(tp: int) -> None:
    x = np.random.default_rng(0).normal(0, 1, (tp, 6, 64)).astype(np.float32)
    x[:, 0] = 0
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": tp})
    run = jax.jit(shard_map(lambda a: int8_psum(a[0], "tp")[None], mesh, P("tp"), P("tp")))
    summed = np.asarray(run(x))
    exact = x.sum(0)
    np.testing.assert_array_equal(
        summed, np.broadcast_to(summed[:1], summed.shape)
    )  # all devices hold the same sum
    assert np.abs(summed[0] - exact).max() <= (tp + 1) / 2 * 1.02 * np.abs(x).sum(0).max() / 127
    assert np.abs(summed[0] - exact).max() > 0
    assert not summed[0, 0].any()
    text = run.lower(x).compile().as_text()
    sent = sum(
        x.wire_bytes * x.count for x in hlo.collectives(text, dict(mesh.shape)) if x.dtype == "s8"
    )
    assert sent == 2 * (tp - 1) / tp * 6 * 64


@pytest.mark.fast
def test_int8_never_clips_and_refuses_uneven_chunks() -> None:
    x = jnp.asarray(
        np.random.default_rng(0).normal(0, 1, (1000, 8)) * 10.0 ** np.arange(-4, 4), jnp.float32
    )
    q, scale = quantise(x)
    assert (np.abs(np.asarray(x)).max(1) <= 127.001 * np.asarray(scale, np.float32)).all()
    assert np.abs(np.asarray(q)).max() <= 127
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": 4})
    with pytest.raises(ValueError, match="width 6 is not divisible by the 4 devices"):
        shard_map(lambda a: int8_psum(a, "tp"), mesh, P(), P())(jnp.zeros((2, 6)))
