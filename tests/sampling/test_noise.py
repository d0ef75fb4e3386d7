"""Sampling noise: its law, its tails, and that nothing but (key, sample, step, position, id) enters
it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.sampling.noise import bits_to_unit, categorical, gumbel, position_keys, uniform

pytestmark = pytest.mark.fast

KEY = jax.random.key(7)


def test_keys_are_the_documented_chain_and_each_differs():
    keys = position_keys(KEY, jnp.array([5, 900]), 3, jnp.arange(4))
    for b, sample in enumerate((5, 900)):
        for i in range(4):
            expected = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, sample), 3), i)
            np.testing.assert_array_equal(keys[b, i], jax.random.key_data(expected))
    assert len(np.unique(np.asarray(keys).reshape(-1, 2), axis=0)) == 8
    np.testing.assert_array_equal(
        keys, position_keys(jax.random.PRNGKey(7), jnp.array([5, 900]), 3, jnp.arange(4))
    )
    with pytest.raises(ValueError, match="threefry"):
        position_keys(jax.random.key(0, impl="rbg"), jnp.arange(2), 0, jnp.arange(2))


def test_a_sample_does_not_depend_on_its_batch():
    draw = jax.jit(
        lambda ids: (gumbel(keys := position_keys(KEY, ids, 1, jnp.arange(6)), 9), uniform(keys))
    )
    alone, crowd = draw(jnp.array([42])), draw(jnp.arange(40, 48))
    for one, many in zip(alone, crowd, strict=True):
        np.testing.assert_array_equal(one[0], many[2])


def test_laws():
    keys = position_keys(KEY, jnp.arange(500), 0, jnp.arange(100))
    u, g = (
        np.asarray(uniform(keys), np.float64).reshape(-1),
        np.asarray(gumbel(keys, 20), np.float64).reshape(-1),
    )
    assert u.dtype == g.dtype == np.float64
    ks = lambda x: np.abs(np.sort(x) - (np.arange(len(x)) + 0.5) / len(x)).max() * len(x) ** 0.5
    assert ks(u) < 2  # p < 1e-3
    assert ks(np.exp(-np.exp(-g))) < 2
    # The uniform that decides whether to unmask and the Gumbels that choose the token are
    # independent.
    first = np.exp(-np.exp(-np.asarray(gumbel(keys, 1)).reshape(-1)))
    assert abs(np.corrcoef(u, first)[0, 1]) < 0.02


def test_gumbel_tails_are_precise():
    """f32 default Gumbels end at 15.94 in steps of 2^-23 of u; these follow the inverse
    distribution to 45.
    """
    words = np.array(
        [
            [0, 0],
            [0, 7],
            [0, 2**31],
            [1, 5],
            [300, 0],
            [2**20, 9],
            [2**31, 1],
            [2**32 - 1, 2**32 - 1],
        ]
    )
    u = (words[:, 0] * 2.0**32 + words[:, 1] + 0.5) / 2.0**64
    got = bits_to_unit(*jnp.asarray(words.T, jnp.uint32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, u, rtol=2e-7)
    assert float(got.max()) < 1
    exact = -np.log(-np.log1p(-np.float64(got)))
    np.testing.assert_allclose(-jnp.log(-jnp.log1p(-got)), exact, rtol=1e-5, atol=1e-6)
    assert exact.max() > 45
    assert np.isfinite(exact).all()
    # Far tail by draws: as many below 2^-20 as there should be, on no grid.
    small = np.asarray(
        gumbel(position_keys(KEY, jnp.arange(64), 0, jnp.arange(128)), 1024)
    ).reshape(-1)
    above = (small > 20 * np.log(2)).sum()  # about 8 of 8.4 million
    assert 1 <= above <= 22
    fine = small[small > 10 * np.log(2)]
    assert len(np.unique(fine)) > 0.99 * len(fine)


def test_rare_ids_are_not_starved():
    """64 ids of p = 1e-4 each, 200k draws of f32 logits: the rate is right to within noise."""
    probs = np.append(np.full(64, 1e-4), 1 - 64e-4)
    keys = position_keys(KEY, jnp.arange(2000), 0, jnp.arange(100))
    ids = np.asarray(
        jax.jit(categorical)(
            keys, jnp.broadcast_to(jnp.log(probs), (2000, 100, 65)).astype(jnp.bfloat16)
        )
    )
    low = np.float64(jnp.log(probs).astype(jnp.bfloat16))
    expected = 200_000 * (1 - np.exp(low[-1]) / np.exp(low).sum())
    assert abs((ids < 64).sum() - expected) < 5 * expected**0.5


def test_categorical_follows_temperature():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = position_keys(KEY, jnp.arange(200), 0, jnp.arange(200))
    table = jnp.broadcast_to(logits, (200, 200, 4))
    for temperature in (1.0, 0.5, 2.0):
        p = np.exp(np.asarray(logits) / temperature)
        counts = np.bincount(
            np.asarray(categorical(keys, table, temperature)).reshape(-1), minlength=4
        )
        assert ((counts - 40_000 * p / p.sum()) ** 2 / (40_000 * p / p.sum())).sum() < 20
    assert (categorical(keys, table, 0.0) == 0).all()
    with pytest.raises(ValueError, match="at least 0"):
        categorical(keys, table, -1.0)


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 4), (1, 8)])
def test_shards_draw_slices_of_the_global_table(dp, tp):
    axes = ("pp", "dp", "ep", "cp", "tp")
    kinds = (jax.sharding.AxisType.Auto,) * 5
    mesh = jax.make_mesh(
        (1, dp, 1, 1, tp), axes, axis_types=kinds, devices=jax.devices()[: dp * tp]
    )
    draw = lambda key, ids: gumbel(position_keys(key, ids, 2, jnp.arange(3)), 24 // tp)
    sharded = jax.shard_map(
        draw, mesh=mesh, in_specs=(P(), P("dp")), out_specs=P("dp", None, "tp"), check_vma=True
    )
    expected = jax.jit(lambda ids: gumbel(position_keys(KEY, ids, 2, jnp.arange(3)), 24))(
        jnp.arange(4)
    )
    np.testing.assert_array_equal(jax.jit(sharded)(KEY, jnp.arange(4)), expected)
