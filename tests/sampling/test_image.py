"""Samplers of images against a mixture of Gaussians, whose denoiser is known."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.data.synthetic import GaussianMixture
from fdp.objectives import DDPM
from fdp.sampling.image import (
    ImageDraw,
    clipped,
    ddim,
    euler,
    guided,
    heun,
    karras,
    straight,
    strided,
)

pytestmark = pytest.mark.fast
MIX = GaussianMixture(size=4, channels=2, classes=3, spread=0.3)
IDS = jnp.arange(6)
LABELS = IDS % 3
SHAPE = (4, 4, 2)


def told(labels_B: jax.Array) -> Any:
    """The exact denoiser of images of these labels."""
    return lambda z, sigma_B, last: MIX.denoise(z, sigma_B, labels_B)


def drawn(sampler: Any, sigmas: np.ndarray, labels_B: jax.Array = LABELS, **more: Any) -> Any:
    def run(key: jax.Array) -> Any:
        return sampler(told(labels_B), ImageDraw(key, IDS, SHAPE), sigmas, **more)

    return jax.jit(run)(jax.random.key(0))


def solution(low: float, high: float) -> np.ndarray:
    """Of dz/dσ = (z - D)/σ for one Gaussian, from `high` to `low`."""
    start = high * np.asarray(ImageDraw(jax.random.key(0), IDS, SHAPE).noise(0))
    mean = MIX.means[np.asarray(LABELS)]
    return mean + (start - mean) * np.sqrt((0.09 + low**2) / (0.09 + high**2))


@pytest.mark.parametrize(("sampler", "factor"), [(euler, 2), (heun, 4)], ids=["euler", "heun"])
def test_the_order_of_a_sampler(sampler: Any, factor: float) -> None:
    """Half the step, half the error of Euler and a quarter of Heun's."""
    want, errors = solution(0.05, 5.0), []
    for steps in (24, 48):
        sigmas = karras(steps + 1, 0.05, 5.0)[:-1]
        image, info = drawn(sampler, sigmas)
        errors.append(float(np.abs(image - want).max()))
        assert info["nfe"] == steps * (2 if sampler is heun else 1)
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.15)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_the_published_one(eta: float) -> None:
    """Eq. 12 of Song et al. in ᾱ, step by step in float64, with the same noise."""
    objective = DDPM(3)
    sigmas = strided(objective.sigmas, 10)
    got, info = drawn(ddim, sigmas, eta=eta)
    draw, labels = ImageDraw(jax.random.key(0), IDS, SHAPE), LABELS
    abar = np.append(objective.alpha_bar[::100][::-1], 1.0)
    x = np.sqrt(1 - abar[0]) * np.asarray(draw.noise(0), np.float64)  # √ᾱ·σ times noise
    for t, (a, b) in enumerate(pairwise(abar)):
        sigma_B = jnp.full(6, np.sqrt(1 / a - 1))
        clean = np.asarray(MIX.denoise(jnp.asarray(x / np.sqrt(a)), sigma_B, labels))
        epsilon = (x - np.sqrt(a) * clean) / np.sqrt(1 - a)
        added = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
        x = np.sqrt(b) * clean + np.sqrt(1 - b - added**2) * epsilon
        x += added * np.asarray(draw.noise(t + 1))
    np.testing.assert_allclose(got, x, atol=3e-5)
    assert info["nfe"] == 10


def test_euler_is_ddim_and_straight_steps_are_eulers_in_t() -> None:
    sigmas = straight(8, 50.0)
    np.testing.assert_array_equal(drawn(euler, sigmas)[0], drawn(ddim, sigmas)[0])
    draw = ImageDraw(jax.random.key(0), IDS, SHAPE)
    t = np.linspace(50 / 51, 0, 9)
    x = t[0] * np.asarray(draw.noise(0))
    for here, there in pairwise(t):
        sigma_B = jnp.full(6, here / (1 - here))
        clean = np.asarray(MIX.denoise(jnp.asarray(x / (1 - here)), sigma_B, LABELS))
        x = x + (there - here) * (x - clean) / here  # the velocity ε - x
    np.testing.assert_allclose(drawn(euler, sigmas)[0], x, atol=2e-5)


def test_a_sample_depends_on_its_id_alone() -> None:
    draw = ImageDraw(jax.random.key(3), jnp.arange(8), SHAPE)
    one = ImageDraw(jax.random.key(3), jnp.array([5]), SHAPE)
    np.testing.assert_array_equal(draw.noise(2)[5], one.noise(2)[0])
    many = np.asarray(ImageDraw(jax.random.key(0), jnp.arange(800), SHAPE).noise(0))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
    assert abs((many**4).mean() - 3) < 0.15  # of the normal law
    between = np.corrcoef(many.reshape(800, -1).T) - np.eye(32)
    assert np.abs(between).max() < 0.2


def test_samples_follow_the_law_of_their_label() -> None:
    ids = jnp.arange(600)
    draw = ImageDraw(jax.random.key(1), ids, SHAPE)
    denoise = lambda z, sigma_B, last: MIX.denoise(z, sigma_B, ids % 3)
    image, info = jax.jit(lambda: heun(denoise, draw, karras(40, 0.01, 20.0)))()
    assert info["nfe"] == 79
    off = np.asarray(image) - MIX.means[np.asarray(ids) % 3]
    assert abs(off.mean()) < 0.01 and abs(off.std() - MIX.spread) < 0.01


def test_guidance_extrapolates_from_no_label() -> None:
    draw = ImageDraw(jax.random.key(0), IDS, SHAPE)
    z, sigma_B = 2 * draw.noise(0), jnp.full(6, 2.0)
    alone = {n: guided(told, LABELS, 3, n)(z, sigma_B, z) for n in (0.0, 1.0, 3.0)}
    np.testing.assert_allclose(alone[1.0], told(LABELS)(z, sigma_B, z), atol=1e-6)
    np.testing.assert_allclose(alone[0.0], told(jnp.full(6, 3))(z, sigma_B, z), atol=1e-6)
    want = alone[0.0] + 3 * (alone[1.0] - alone[0.0])
    np.testing.assert_allclose(alone[3.0], want, atol=1e-5)


def test_estimates_are_clipped() -> None:
    z, sigma_B = 9 * jnp.ones((1, *SHAPE)), jnp.full(1, 0.01)
    assert told(LABELS[:1])(z, sigma_B, z).max() > 8
    assert clipped(told(LABELS[:1]), 1.0)(z, sigma_B, z).max() == 1


def test_grids_refuse_what_they_cannot_give() -> None:
    np.testing.assert_allclose(karras(1, 0.1, 2.0), [2.0, 0.0])
    with pytest.raises(ValueError, match="steps = 0 must be at least 1"):
        karras(0, 0.1, 2.0)
    with pytest.raises(ValueError, match=r"1000 % 30 is not 0; set steps=25"):
        strided(DDPM(3).sigmas, 30)
    with pytest.raises(ValueError, match="high = 0 above 0"):
        straight(3, 0)
