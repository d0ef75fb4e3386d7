"""Image diffusion: a network F learns to denoise images at every noise level σ.

All objectives here are one. A noisy image is z = x + σε. The network sees c_in·z and its output
gives the estimate D(z, σ) = c_skip·z + c_out·F of the clean image (Karras et al. 2022, eq. 7).
The loss is the squared error of F, per pixel and channel. They differ in the coefficients and in
how often they visit each σ. `denoiser` turns a trained network into D, which is what samplers call.

Legend: B images, H rows, W columns, C channels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import pi
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdp.count.counts import Counts, Degrees, Unstated
from fdp.count.counts import Rows as CountedRows
from fdp.objectives.base import Batch, Objective, strata
from fdp.objectives.cost import PLAIN, CostClass, CostClasses, CostLaw

PIXELS = ("batch", "sequence", None, None)
MAX_TIME = 1000.0  # the network is told the noise level on this scale


class Coefficients(NamedTuple):
    """Of one noise level: D = c_skip·z + c_out·F(c_in·z, time)."""

    c_in: jax.Array
    c_skip: jax.Array
    c_out: jax.Array
    time: jax.Array


@dataclass(frozen=True)
class ImageObjective(Objective):
    """What the objectives share. `classes`: labels are 0..classes-1, and `classes` stands for none.
    `drop`: share of the labels that are dropped, for guidance. `stratified`: one noise level in
    each of B equal shares. `law`: which samples cost what; it needs stratified levels."""

    classes: int
    drop: float = 0.1
    stratified: bool = True
    law: CostLaw = field(default_factory=CostLaw)

    dims: ClassVar[Any] = MappingProxyType(
        {
            "inputs": PIXELS,
            "noise": ("batch",),
            "sigma": ("batch",),
            "labels": ("batch",),
            "kept": ("batch", "sequence", None),
            "rows": PIXELS,
            "estimate": PIXELS,
            "cost": (),
        }
    )

    def __post_init__(self) -> None:
        if len(self.law.costs.pattern) > 1 and not self.stratified:
            raise ValueError(
                f"{len(self.law.costs.pattern)} rows of a pattern of cost classes need a fixed "
                "number of samples of each: set objective.antithetic=True"
            )

    def sigma(self, u_B: jax.Array) -> jax.Array:
        """The noise level of rank u in (0, 1), growing with u: f32 [B]."""
        raise NotImplementedError

    def coefficients(self, sigma_B: jax.Array) -> Coefficients:
        """Of every noise level, f32 [B] each."""
        raise NotImplementedError

    def corrupt(self, key: jax.Array, batch: Batch) -> Any:
        """Noise on batch["images"], f32 [B, H, W, C]; batch["labels"], int32 [B], some of them
        dropped. The noise comes first, and then rows go to the places of their cost class."""
        x = jnp.asarray(batch["images"], jnp.float32)
        labels_B = jnp.asarray(batch["labels"], jnp.int32)
        n = x.shape[0]
        keys = jax.random.split(key, 6)
        stratum_B = strata(keys[0], n)
        if self.stratified:
            u_B = (stratum_B + jax.random.uniform(keys[1])) / n
        else:
            u_B = jax.random.uniform(keys[1], (n,))
        sigma_B, noise = self.sigma(u_B), jax.random.normal(keys[2], x.shape)
        dropped_B = jax.random.uniform(keys[3], (n,)) < self.drop
        labels_B = jnp.where(dropped_B, self.classes, labels_B)
        costs = self.law.costs
        if len(costs.pattern) > 1 and n > 1:  # a single row is an example of shapes
            place_B = self.law.places(keys[4], stratum_B)
            x, noise, sigma_B, labels_B = (a[place_B] for a in (x, noise, sigma_B, labels_B))
        found = self.noised(x, noise, sigma_B) | {"labels": labels_B, "cost": costs}
        if (group := max(cost.group for cost in costs.classes)) > 1:
            # One for every pixel, of which tokens of any size read as many as they are.
            found["kept"] = jax.random.randint(keys[5], x.shape[:3], 0, group)
        return found

    def noised(self, x: jax.Array, noise: jax.Array, sigma_B: jax.Array) -> dict[str, Any]:
        """Inputs, targets and noise levels for clean images and standard normal noise."""
        c = self.coefficients(sigma_B)
        target = _of(-c.c_skip * sigma_B / c.c_out) * noise + _of((1 - c.c_skip) / c.c_out) * x
        inputs = _of(c.c_in) * (x + _of(sigma_B) * noise)
        return {"inputs": inputs, "noise": c.time, "sigma": sigma_B, "rows": target}

    def count(self, noised: Any) -> int:
        """Pixels times channels of all images."""
        return noised["rows"].size

    def loss(self, outputs: jax.Array, rows: Any) -> jax.Array:
        """Squared errors: [B, H, W, C]."""
        return jnp.square(outputs - rows)

    def counts(self, rows: CountedRows, degrees: Degrees) -> Counts:
        """The loss multiplies no matrices and sends nothing. Raises Unstated where images cost
        unlike: count one class at a time."""
        if (n := len(self.law.costs.classes)) > 1:
            raise Unstated(f"a batch of {n} cost classes: a model counts one class at a time")
        return Counts()

    def parts(self, noised: Any) -> tuple[Any, ...]:
        """As `CostClasses.parts`."""
        return noised["cost"].parts(noised)

    def refine(self, predict: Callable[[Any], jax.Array], noised: Any) -> Any:
        """`noised` with the network's own estimate of the clean images where its class asks for
        it. `predict`: from a batch to the outputs, without gradient."""
        if not noised["cost"].only.twice:
            return noised
        c = self.coefficients(noised["sigma"])
        outputs = predict(noised)
        estimate = _of(c.c_skip / c.c_in) * noised["inputs"] + _of(c.c_out) * outputs
        return noised | {"estimate": jax.lax.stop_gradient(estimate)}

    def denoiser(
        self, predict: Callable[[Mapping[str, Any]], jax.Array], labels_B: jax.Array
    ) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
        """D(z, σ_B, last estimate) of a network, given as `predict`, for images of these labels and
        of one noise level. Patches are as coarse as they were in training at that level."""
        rank = self.law.coarse_from

        def denoise(z: jax.Array, sigma_B: jax.Array, estimate: jax.Array) -> jax.Array:
            c = self.coefficients(sigma_B)
            noised = {"inputs": _of(c.c_in) * z, "noise": c.time, "sigma": sigma_B}
            noised |= {"labels": labels_B, "estimate": estimate}

            def of(cost: CostClass) -> jax.Array:
                return predict(noised | {"cost": CostClasses((cost,))})

            if rank is None:
                outputs = of(PLAIN)
            else:
                high = sigma_B[0] >= self.sigma(jnp.full(1, float(rank)))[0]
                outputs = jax.lax.cond(high, lambda: of(CostClass(patch=2)), lambda: of(PLAIN))
            return _of(c.c_skip) * z + _of(c.c_out) * outputs

        return denoise


def _of(coefficient_B: jax.Array) -> jax.Array:
    """To multiply images [B, H, W, C]."""
    return coefficient_B[:, None, None, None]


def _normal_quantile(u_B: jax.Array) -> jax.Array:
    return jax.scipy.special.ndtri(jnp.clip(u_B, 1e-6, 1 - 1e-6))


@dataclass(frozen=True)
class DDPM(ImageObjective):
    """Denoising diffusion in `steps` steps (Ho et al. 2020). The network predicts the noise, or v =
    √ᾱ·ε - √(1-ᾱ)·x (Salimans & Ho 2022). `beta`: linear from 1e-4 to 0.02 (scaled by 1000/steps),
    or cosine (Nichol & Dhariwal 2021). Steps are drawn uniformly."""

    predict: str = "epsilon"
    beta: str = "linear"
    steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predict not in ("epsilon", "v") or self.beta not in ("linear", "cosine"):
            raise ValueError(
                f"predict={self.predict!r} must be 'epsilon' or 'v', and beta={self.beta!r} "
                "'linear' or 'cosine'"
            )

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        """ᾱ of every step, f64 [steps]."""
        n = self.steps
        if self.beta == "linear":
            betas = np.linspace(1e-4, 2e-2, n) * 1000 / n
        else:
            f = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * pi / 2) ** 2
            betas = 1 - f[1:] / f[:-1]
        return np.cumprod(1 - np.minimum(betas, 0.999))

    @property
    def sigmas(self) -> np.ndarray:
        """√((1 - ᾱ)/ᾱ) of every step, growing, f64 [steps]."""
        return np.sqrt(1 / self.alpha_bar - 1)

    def sigma(self, u_B: jax.Array) -> jax.Array:
        """Of the step ⌊u·steps⌋."""
        step_B = jnp.clip((u_B * self.steps).astype(jnp.int32), 0, self.steps - 1)
        return jnp.asarray(self.sigmas, jnp.float32)[step_B]

    def coefficients(self, sigma_B: jax.Array) -> Coefficients:
        """c_in = √ᾱ; between steps, time is interpolated in log σ."""
        c_in = jax.lax.rsqrt(1 + sigma_B**2)
        table = jnp.asarray(np.log(self.sigmas), sigma_B.dtype)
        step_B = jnp.interp(jnp.log(sigma_B), table, jnp.arange(self.steps, dtype=sigma_B.dtype))
        time_B = step_B * (MAX_TIME / self.steps)
        if self.predict == "epsilon":
            return Coefficients(c_in, jnp.ones_like(c_in), -sigma_B, time_B)
        return Coefficients(c_in, c_in**2, -sigma_B * c_in, time_B)


@dataclass(frozen=True)
class EDM(ImageObjective):
    """The preconditioning of Karras et al. 2022 (table 1), whose weighting makes the loss that of
    F; log σ is normal. `data`: standard deviation of the images."""

    mean: float = -1.2
    std: float = 1.2
    data: float = 0.5

    def sigma(self, u_B: jax.Array) -> jax.Array:
        """exp(mean + std·Φ⁻¹(u))."""
        return jnp.exp(self.mean + self.std * _normal_quantile(u_B))

    def coefficients(self, sigma_B: jax.Array) -> Coefficients:
        """The network is told log(σ)/4, times 1000."""
        total = sigma_B**2 + self.data**2
        c_in = jax.lax.rsqrt(total)
        time_B = MAX_TIME * jnp.log(sigma_B) / 4
        return Coefficients(c_in, self.data**2 / total, sigma_B * self.data * c_in, time_B)


@dataclass(frozen=True)
class Flow(ImageObjective):
    """Rectified flow (Liu et al. 2023): the network predicts ε - x on the line (1 - t)·x + t·ε,
    whose σ is t/(1 - t). t is logit-normal (Esser et al. 2024), so log σ is normal."""

    mean: float = 0.0
    std: float = 1.0

    def sigma(self, u_B: jax.Array) -> jax.Array:
        """exp(mean + std·Φ⁻¹(u))."""
        return jnp.exp(self.mean + self.std * _normal_quantile(u_B))

    def coefficients(self, sigma_B: jax.Array) -> Coefficients:
        """The network is told t, times 1000."""
        t_B = sigma_B / (1 + sigma_B)
        return Coefficients(1 - t_B, 1 - t_B, -t_B, MAX_TIME * t_B)
