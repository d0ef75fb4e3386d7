"""Samplers of image diffusion as pure functions of a denoiser; the same code runs unsharded and
inside shard_map, images over dp (and ep).

A noisy image is z = x + σε. `denoise(z, σ_B, last)` gives an estimate of x; `last` is that of the
step before, for networks that read it. The samplers follow dz/dσ = (z - D(z, σ))/σ from the largest
σ down (Karras et al. 2022, eq. 3), whatever the network was trained with: an image of variance-
preserving diffusion is z/√(1 + σ²), one of rectified flow z/(1 + σ). The noise of a sample depends
on its id, the step and the pixel only. All samplers return (images f32 [B, H, W, C], info):
info["nfe"] is the number of calls of `denoise`, info["trace"] (if asked for) z before the first
step and after each, [N + 1, B, H, W, C].

Legend: B samples, H rows, W columns, C channels, N steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.collectives import vary_like
from fdp.sampling.noise import normal, position_keys

Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Info = dict[str, Any]


@dataclass(frozen=True, eq=False)
class ImageDraw:
    """What is asked for: an image of `shape` [H, W, C] for each sample id. sample_ids_B: int32 [B],
    global (unique over the whole job). trace: whether `info` holds every state."""

    key: jax.Array
    sample_ids_B: jax.Array
    shape: tuple[int, int, int]
    trace: bool = False

    def noise(self, step: jax.Array | int) -> jax.Array:
        """Standard normal noise of `step`, f32 [B, H, W, C]. Step 0 is the start."""
        height, width, channels = self.shape
        pixels = jnp.arange(height * width)
        keys = position_keys(self.key, self.sample_ids_B, step, pixels)
        noise = normal(keys, channels).reshape(-1, *self.shape)
        return vary_like(noise, self.sample_ids_B)  # bits of a key are not typed varying


# Grids of noise levels
# -------------------------------------------------------------------------------------------------


def karras(steps: int, low: float, high: float, rho: float = 7.0) -> np.ndarray:
    """`steps` noise levels from `high` to `low`, then 0: f64 [N + 1] (Karras et al. 2022, eq. 5).
    Raises ValueError for fewer than one step or levels out of order."""
    if steps < 1 or not 0 < low < high:
        raise ValueError(
            f"steps = {steps} must be at least 1, and 0 < low < high: {low}, {high}; set "
            "steps=18, low=0.002, high=80"
        )
    ramp = np.linspace(0, 1, steps) if steps > 1 else np.zeros(1)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return np.append(levels, 0.0)


def straight(steps: int, high: float) -> np.ndarray:
    """Noise levels whose t = σ/(1 + σ) are equally far apart, from `high` to 0: f64 [N + 1]. For
    rectified flow."""
    if steps < 1 or not high > 0:
        raise ValueError(f"steps = {steps} must be at least 1 and high = {high} above 0")
    t = np.linspace(high / (1 + high), 0, steps + 1)
    return t / (1 - t)


def strided(sigmas: np.ndarray, steps: int) -> np.ndarray:
    """Every so many-th of the `sigmas` of a diffusion in many steps, from the highest to 0: f64
    [N + 1] (Song et al. 2021). Raises ValueError unless `steps` divides their number."""
    if steps < 1 or len(sigmas) % steps:
        near = next(n for n in range(max(steps, 1), 0, -1) if len(sigmas) % n == 0)
        raise ValueError(
            f"the steps of training are not shared out: {len(sigmas)} % {steps} is not 0; set "
            f"steps={near}"
        )
    return np.append(sigmas[:: len(sigmas) // steps][::-1], 0.0)


# Samplers
# -------------------------------------------------------------------------------------------------


def ddim(
    denoise: Denoise, draw: ImageDraw, sigmas: np.ndarray, eta: float = 0.0
) -> tuple[jax.Array, Info]:
    """DDIM (Song et al. 2021, eq. 12), one call a step. `eta`: 0 adds no noise; 1 is ancestral
    sampling of DDPM."""

    def update(step: jax.Array, z: jax.Array, last: jax.Array) -> tuple:
        here, there = _levels(sigmas, step)
        clean = denoise(z, _all(here, z), last)
        added = eta * there * jnp.sqrt(here**2 - there**2) / here  # σ of the paper over √ᾱ
        kept = jnp.sqrt(there**2 - added**2)
        z = clean + kept * (z - clean) / here
        return (z + added * draw.noise(step + 1) if eta else z), clean, 1

    return _iterate(update, draw, sigmas)


def euler(denoise: Denoise, draw: ImageDraw, sigmas: np.ndarray) -> tuple[jax.Array, Info]:
    """Euler's method, one call a step and an error of first order. It is `ddim` without noise, and
    on rectified flow Euler's method in t."""
    return ddim(denoise, draw, sigmas)


def heun(denoise: Denoise, draw: ImageDraw, sigmas: np.ndarray) -> tuple[jax.Array, Info]:
    """Heun's method (Karras et al. 2022, algorithm 1 without churn), two calls a step and an error
    of second order; a step to σ = 0 is Euler's, with one call."""

    def update(step: jax.Array, z: jax.Array, last: jax.Array) -> tuple:
        here, there = _levels(sigmas, step)
        clean = denoise(z, _all(here, z), last)
        slope = (z - clean) / here
        ahead = z + (there - here) * slope

        def corrected() -> tuple[jax.Array, jax.Array]:
            other = denoise(ahead, _all(there, z), clean)
            return z + (there - here) * (slope + (ahead - other) / there) / 2, other

        more = there > 0
        z, clean = jax.lax.cond(more, corrected, lambda: (ahead, clean))
        return z, clean, 1 + more.astype(jnp.int32)

    return _iterate(update, draw, sigmas)


SAMPLERS = {"ddim": ddim, "euler": euler, "heun": heun}


def guided(
    denoiser: Callable[[jax.Array], Denoise], labels_B: jax.Array, none: int, scale: float
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022): D without label + scale·(D with it - D
    without), both in one pass. `denoiser`: from labels to D; `none` stands for no label. scale 1
    needs no second half."""
    if scale == 1.0:
        return denoiser(labels_B)
    both = denoiser(jnp.concatenate([labels_B, jnp.full_like(labels_B, none)]))

    def denoise(z: jax.Array, sigma_B: jax.Array, last: jax.Array) -> jax.Array:
        twice = [jnp.concatenate([x, x]) for x in (z, sigma_B, last)]
        told, untold = jnp.split(both(*twice), 2)
        return untold + scale * (told - untold)

    return denoise


def clipped(denoise: Denoise, largest: float) -> Denoise:
    """`denoise` with its estimates kept within ± `largest`, as published samplers keep pixels. At
    the highest noise levels the small error of a predicted ε is a large one of the image."""
    return lambda z, sigma_B, last: jnp.clip(denoise(z, sigma_B, last), -largest, largest)


def _levels(sigmas: np.ndarray, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The noise levels before and after a step."""
    table = jnp.asarray(sigmas)
    return table[step], table[step + 1]


def _all(sigma: jax.Array, z: jax.Array) -> jax.Array:
    return vary_like(jnp.full(z.shape[:1], sigma), z)


def _iterate(
    update: Callable[[jax.Array, jax.Array, jax.Array], tuple], draw: ImageDraw, sigmas: np.ndarray
) -> tuple[jax.Array, Info]:
    """`update(step, z, last estimate) → (z, estimate, calls)` in every step."""
    z = jnp.asarray(sigmas)[0] * draw.noise(0)

    def body(carry: tuple, step: jax.Array) -> tuple[tuple, Any]:
        z, last, nfe = carry
        z, last, calls = update(step, z, last)
        return (z, last, nfe + calls), z if draw.trace else None

    carry = (z, jnp.zeros_like(z), jnp.int32(0))
    (last, _, nfe), states = jax.lax.scan(body, carry, jnp.arange(len(sigmas) - 1))
    if not draw.trace:
        return last, {"nfe": nfe}
    return last, {"nfe": nfe, "trace": jnp.concatenate([z[None], states])}
