"""Noise schedules: how much of a token survives at time t, and the weight that makes the loss a
likelihood bound.

t in [0, 1] (0 clean, 1 noise), any shape, f32. α keep probability, σ = -log α total noise.
"Cosine" names three different functions in the literature; each has its own name here.
"""

import difflib
import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp

HALF_PI = math.pi / 2


@dataclass(frozen=True)
class NoiseSchedule:
    """Base of all schedules: a subclass gives 1-α (accurate where α ≈ 1) and dα/dt."""

    def mask_prob(self, t: jax.Array) -> jax.Array:
        """1 - α(t), the probability that a token is corrupted."""
        raise NotImplementedError

    def dalpha(self, t: jax.Array) -> jax.Array:
        """dα/dt, never positive."""
        raise NotImplementedError

    def alpha(self, t: jax.Array) -> jax.Array:
        """α(t), the probability that a token survives."""
        return 1 - self.mask_prob(t)

    def sigma(self, t: jax.Array) -> jax.Array:
        """Total noise σ(t) = -log α(t), in nats."""
        return -jnp.log1p(-self.mask_prob(t))

    def rate(self, t: jax.Array) -> jax.Array:
        """dσ/dt = -α'/α, the rate at which tokens are corrupted."""
        return -self.dalpha(t) / self.alpha(t)

    def weight(self, t: jax.Array) -> jax.Array:
        """-α'/(1-α) = σ'/(e^σ - 1), the NELBO weight of a masked position (Sahoo et al. 2024)."""
        return -self.dalpha(t) / self.mask_prob(t)


@dataclass(frozen=True)
class Linear(NoiseSchedule):
    """α = 1 - (1-ε)t (log-linear σ; Lou et al. 2024, Sahoo et al. 2024). The weight is exactly 1/t
    for every ε.
    """

    eps: float = 1e-3

    def mask_prob(self, t: jax.Array) -> jax.Array:
        """(1-ε)t, NOT t: a mask drawn with probability t would need the weight (1-ε)/t."""
        return (1 - self.eps) * t

    def dalpha(self, t: jax.Array) -> jax.Array:
        """-(1-ε)."""
        return jnp.full_like(t, -(1 - self.eps))

    def weight(self, t: jax.Array) -> jax.Array:
        """1/t without the factor that cancels."""
        return 1 / t


@dataclass(frozen=True)
class MD4Cosine(NoiseSchedule):
    """α = (1-2ε)(1 - cos(π/2 (1-t))) + ε (Shi et al. 2024, MD4)."""

    eps: float = 1e-4

    def mask_prob(self, t: jax.Array) -> jax.Array:
        """(1-2ε) sin(πt/2) + ε."""
        return (1 - 2 * self.eps) * jnp.sin(HALF_PI * t) + self.eps

    def dalpha(self, t: jax.Array) -> jax.Array:
        """-(1-2ε) π/2 cos(πt/2)."""
        return -(1 - 2 * self.eps) * HALF_PI * jnp.cos(HALF_PI * t)


@dataclass(frozen=True)
class MDLMCosine(NoiseSchedule):
    """α = ε + (1-ε) cos(πt/2) (the mdlm code's CosineNoise; with ε = 0 also init2winit's
    "cosine").
    """

    eps: float = 1e-3

    def mask_prob(self, t: jax.Array) -> jax.Array:
        """(1-ε)(1 - cos(πt/2)), as a square: the difference would cancel near t = 0."""
        return (1 - self.eps) * 2 * jnp.sin(HALF_PI * t / 2) ** 2

    def dalpha(self, t: jax.Array) -> jax.Array:
        """-(1-ε) π/2 sin(πt/2)."""
        return -(1 - self.eps) * HALF_PI * jnp.sin(HALF_PI * t)


@dataclass(frozen=True)
class BD3Cosine(NoiseSchedule):
    """α = (1-ε) cos(πt/2) (Arriola et al. 2025, BD3-LM): unlike `MDLMCosine` it corrupts ε of the
    tokens at t = 0.
    """

    eps: float = 1e-3

    def mask_prob(self, t: jax.Array) -> jax.Array:
        """1 - (1-ε) cos(πt/2)."""
        return self.eps + (1 - self.eps) * 2 * jnp.sin(HALF_PI * t / 2) ** 2

    def dalpha(self, t: jax.Array) -> jax.Array:
        """-(1-ε) π/2 sin(πt/2)."""
        return -(1 - self.eps) * HALF_PI * jnp.sin(HALF_PI * t)


@dataclass(frozen=True)
class Polynomial(NoiseSchedule):
    """α = (1-2ε)(1 - t^power) + ε (Shi et al. 2024, MD4; power 1 is MD4's "linear")."""

    eps: float = 1e-4
    power: float = 2.0

    def mask_prob(self, t: jax.Array) -> jax.Array:
        """(1-2ε) t^power + ε."""
        return (1 - 2 * self.eps) * t**self.power + self.eps

    def dalpha(self, t: jax.Array) -> jax.Array:
        """-(1-2ε) power t^(power-1)."""
        return -(1 - 2 * self.eps) * self.power * t ** (self.power - 1)


@dataclass(frozen=True)
class Geometric(NoiseSchedule):
    """σ = σ_min^(1-t) σ_max^t (Lou et al. 2024, the schedule of SEDD uniform). σ_min has the role
    of ε."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def sigma(self, t: jax.Array) -> jax.Array:
        """σ_min^(1-t) σ_max^t."""
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def mask_prob(self, t: jax.Array) -> jax.Array:
        """1 - e^-σ."""
        return -jnp.expm1(-self.sigma(t))

    def alpha(self, t: jax.Array) -> jax.Array:
        """e^-σ, which 1 - (1 - α) would round to 0 at σ = 20."""
        return jnp.exp(-self.sigma(t))

    def rate(self, t: jax.Array) -> jax.Array:
        """σ log(σ_max / σ_min)."""
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def dalpha(self, t: jax.Array) -> jax.Array:
        """-α σ'."""
        return -self.alpha(t) * self.rate(t)


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    "linear": Linear,
    "loglinear": Linear,
    "md4_cosine": MD4Cosine,
    "mdlm_cosine": MDLMCosine,
    "bd3_cosine": BD3Cosine,
    "geometric": Geometric,
}


def schedule(name: str, **parameters: float) -> NoiseSchedule:
    """The schedule called `name` ("poly<p>" is α = 1 - t^p), with its parameters (eps, power,
    sigma_min, …).

    Raises ValueError with the closest name for an unknown name, and TypeError for an unknown
    parameter."""
    if polynomial := re.fullmatch(r"poly(\d+(?:\.\d+)?)", name):
        return Polynomial(power=float(polynomial[1]), **parameters)
    if name not in SCHEDULES:
        known = [*SCHEDULES, "poly2", "poly3"]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        if "cosine" in name:  # three functions share the word: name them all rather than guess one
            close = [n for n in known if "cosine" in n]
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(known)}.{hint}")
    return SCHEDULES[name](**parameters)
