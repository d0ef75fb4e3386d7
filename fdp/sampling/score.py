"""The analytic (Tweedie) sampler for models trained by score entropy (SEDD) under uniform noise.

Conventions of `fdp.sampling.chain`: denoiser signature, keys, sharding and (ids, info) result.
Shapes: B samples, L positions, V vocabulary (tp: V/tp columns)."""

import jax
import jax.numpy as jnp

from fdp.collectives import psum
from fdp.objectives.noise_schedules import NoiseSchedule
from fdp.parallel.tensor import NEVER, suppress, vocab_offset
from fdp.sampling.chain import Denoise, Info, iterate
from fdp.sampling.noise import Draw, categorical, uniform


def tweedie_uniform(
    log_score_V: jax.Array, z: jax.Array, n_ids: int, delta: jax.Array
) -> jax.Array:
    """log p(token at noise σ - `delta` | z), up to a constant, under uniform noise: [..., V/tp],
    [...] → [..., V/tp].

    (e^{-Δσ·Q} s)(y) · p_Δσ(z | y) with s_z = 1 (Lou et al. 2024). A learned score can make this
    negative; such ids get no probability."""
    ids = vocab_offset(log_score_V.shape[-1]) + jnp.arange(log_score_V.shape[-1])
    own = ids == z[..., None]
    score = jnp.where(own, 1.0, jnp.exp(suppress(log_score_V, n_ids)))
    total = psum(score.sum(-1), "tp")[..., None]
    moved = -jnp.expm1(-delta) / n_ids
    # e^{-Δσ·Q} s = e^Δσ·s - (e^Δσ - 1)·mean(s), divided by e^Δσ so that σ = 20 does not overflow.
    before = score - total * moved
    prob = before * jnp.where(own, moved + jnp.exp(-delta), moved)
    return jnp.where((prob > 0) & (ids < n_ids), jnp.log(jnp.maximum(prob, 1e-38)), NEVER)


def analytic_uniform(
    denoise: Denoise, draw: Draw, *, steps: int, schedule: NoiseSchedule
) -> tuple[jax.Array, Info]:
    """Tweedie τ-leaping for a uniform score model in `steps` calls; `denoise(z, σ)` returns log
    scores as in `SEDDUniform`.

    Starts from uniform ids; the last step removes all remaining noise. A step of Δσ amplifies
    rounding errors of the scores by e^Δσ, so choose enough steps (or a smaller σ_max) to keep Δσ
    below about 8."""
    n_ids = draw.n_ids
    # Step `steps` is never taken by the loop, so its noise is free for the start.
    z = jnp.minimum((uniform(draw.keys(steps)) * n_ids).astype(jnp.int32), n_ids - 1)

    def update(step: jax.Array, z: jax.Array) -> tuple:
        sigma = schedule.sigma(jnp.asarray(1 - step / steps, jnp.float32))
        after = schedule.sigma(jnp.asarray(1 - (step + 1) / steps, jnp.float32))
        delta = jnp.where(step == steps - 1, sigma, sigma - after)
        log_score = denoise(z, jnp.broadcast_to(sigma, draw.sample_ids_B.shape)).astype(jnp.float32)
        return categorical(draw.keys(step), tweedie_uniform(log_score, z, n_ids, delta)), 1, True

    return iterate(update, z, steps, draw.trace)
