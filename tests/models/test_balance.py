"""Losses and rules of the load: the values that their papers state.

Legend: B sequences, E experts, J noise bins, R ranks."""

import jax.numpy as jnp
import numpy as np
import pytest

from fdp.models import balance
from fdp.models.balance import Balance, LoadRule

pytestmark = pytest.mark.fast

E, TOKENS, K = 8, 64, 2
LEVEL_E, SUM_E = jnp.full(E, TOKENS * K / E), jnp.full(E, TOKENS / E)


def test_a_level_router_has_a_switch_loss_of_one_and_a_collapsed_one_of_the_experts() -> None:
    assert balance.switch(LEVEL_E, SUM_E, TOKENS) == 1
    one = jnp.zeros(E).at[0].set(1.0)
    assert balance.switch(TOKENS * K * one, TOKENS * one, TOKENS) == E


def test_the_switch_loss_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    p_TxE = rng.dirichlet(np.ones(E), TOKENS)
    ids = np.argsort(-p_TxE, 1)[:, :K]
    counts = np.asarray(balance.counts(jnp.asarray(ids)[None], E))[0]
    want = E / (K * TOKENS**2) * sum(p_TxE[:, e].sum() * (ids == e).sum() for e in range(E))
    got = balance.switch(jnp.asarray(counts), jnp.asarray(p_TxE.sum(0)), TOKENS)
    assert got == pytest.approx(want, rel=1e-6)


def test_ranks_are_level_in_every_bin_though_experts_specialise() -> None:
    """Two bins use different experts, of which each rank has one: the loss of the ranks is 1. On
    one rank they would cost R."""
    tokens_J = jnp.array([48.0, 16.0])
    striped = jnp.zeros((2, E)).at[0, jnp.array([0, 4])].set(24.0).at[1, jnp.array([1, 5])].set(8.0)
    assert balance.rank_loss(striped, striped, TOKENS, 2) == 1
    packed = jnp.zeros((2, E)).at[0, 0].set(48.0).at[1, 1].set(16.0)
    assert balance.rank_loss(packed, packed, TOKENS, 2) == 2
    assert balance.rank_loss(7 * striped, striped, TOKENS, 2) == 1  # a load of any scale
    assert tokens_J.sum() == TOKENS


def test_bins_cut_the_noise_levels_evenly() -> None:
    bins = balance.noise_bin(jnp.array([0.05, 0.1, 0.55, 1.0]), 10).argmax(1)
    assert bins.tolist() == [0, 1, 5, 9]


def test_the_rule_moves_biases_towards_the_level_load() -> None:
    load = jnp.array([[5.0, 1.0, 3.0, 3.0]])
    state = {"layers": {"mlp": {"router": {"bias": jnp.zeros((1, 4))}}}}
    new = LoadRule(Balance(bias=0.1))(state, {"layers": {"mlp": {"load": load}}}, jnp.zeros(()))
    got = new["layers"]["mlp"]["router"]["bias"]
    np.testing.assert_allclose(got, [[-0.1, 0.1, 0.0, 0.0]])


def test_the_rule_keeps_a_running_load_of_each_noise_bin() -> None:
    state = {"mlp": {"load_bins": jnp.ones((2, 4))}, "other": jnp.ones(1)}
    aux = {"mlp": {"load_bins": jnp.zeros((2, 4)), "load": jnp.ones(4)}}
    new = LoadRule(Balance(rank=1.0, bins=2, decay=0.75))(state, aux, jnp.zeros(()))
    assert (new["mlp"]["load_bins"] == 0.75).all() and new["other"] == 1
