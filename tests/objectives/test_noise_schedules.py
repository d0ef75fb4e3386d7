"""Schedules: derivatives, weights, ends, and the traps of ε."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.objectives.noise_schedules import (
    BD3Cosine,
    Linear,
    MD4Cosine,
    MDLMCosine,
    Polynomial,
    schedule,
)

pytestmark = pytest.mark.fast

NAMES = ("linear", "md4_cosine", "mdlm_cosine", "bd3_cosine", "poly1", "poly3", "geometric")
T = np.linspace(0.01, 0.99, 99)


@pytest.mark.parametrize("name", NAMES)
def test_derivative_weight_and_rate_agree_with_alpha(name):
    with jax.enable_x64(True):
        s, t = schedule(name), jnp.asarray(T)
        alpha, dalpha = s.alpha(t), s.dalpha(t)
        np.testing.assert_allclose(dalpha, jax.vmap(jax.grad(s.alpha))(t), rtol=1e-6)
        np.testing.assert_allclose(s.mask_prob(t), 1 - alpha, rtol=1e-9)
        np.testing.assert_allclose(s.sigma(t), -jnp.log(alpha), rtol=1e-6)
        np.testing.assert_allclose(s.weight(t), -dalpha / (1 - alpha), rtol=1e-6)
        # The same weight in terms of σ: σ'/(e^σ - 1).
        np.testing.assert_allclose(s.weight(t), s.rate(t) / jnp.expm1(s.sigma(t)), rtol=1e-6)
        assert (np.diff(alpha) < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_f32_is_accurate_near_the_clean_end(name):
    t = np.array([1e-6, 1e-4, 1e-2])
    with jax.enable_x64(True):
        exact = np.asarray(schedule(name).mask_prob(jnp.asarray(t)))
    np.testing.assert_allclose(
        schedule(name).mask_prob(jnp.asarray(t, jnp.float32)), exact, rtol=3e-6
    )


def test_linear_weight_is_one_over_t_for_every_eps_while_it_masks_less_than_t():
    for eps in (0.0, 1e-3, 0.1):
        s = Linear(eps)
        np.testing.assert_allclose(s.weight(T), 1 / T)
        np.testing.assert_allclose(s.mask_prob(T), (1 - eps) * T)


def test_the_three_cosines_differ():
    half = np.float64(0.5)
    assert float(MD4Cosine(0).alpha(half)) == pytest.approx(1 - np.sqrt(0.5), abs=1e-6)
    assert float(MDLMCosine(0).alpha(half)) == pytest.approx(np.sqrt(0.5), abs=1e-6)
    zero = np.float64(0)
    assert float(MDLMCosine(0.01).mask_prob(zero)) == 0
    assert float(BD3Cosine(0.01).mask_prob(zero)) == pytest.approx(0.01)
    assert float(MD4Cosine(0.01).mask_prob(zero)) == pytest.approx(0.01)
    assert float(Polynomial(0.01, 1).mask_prob(np.float64(1))) == pytest.approx(0.99)


def test_names():
    assert schedule("loglinear") == schedule("linear") == Linear()
    assert schedule("poly2.5", eps=0.0) == Polynomial(0.0, 2.5)
    with pytest.raises(ValueError, match="Did you mean geometric"):
        schedule("geometrc")
    with pytest.raises(ValueError, match="md4_cosine or mdlm_cosine or bd3_cosine"):
        schedule("cosine")
    with pytest.raises(TypeError):
        schedule("linear", sigma_min=1.0)
