"""Analytic (Tweedie) samplers for models trained by score entropy (SEDD), absorbing and uniform.

Conventions of `fdp.sampling.masked`: same denoiser signature, keys, sharding and (ids, info)
result. Shapes: B samples, L positions, V vocabulary (tp: V/tp columns)."""

import jax
import jax.numpy as jnp

from fdp.collectives import psum
from fdp.objectives.noise_schedules import NoiseSchedule
from fdp.parallel.tensor import NEVER, suppress, vocab_logsumexp, vocab_offset
from fdp.sampling.masked import Denoise, Info, initial_state, iterate, unmask_prob
from fdp.sampling.noise import categorical, position_keys, uniform


def analytic_absorbing(
    denoise: Denoise,
    key: jax.Array,
    sample_ids_B: jax.Array,
    length: int,
    *,
    n_ids: int,
    steps: int,
    schedule: NoiseSchedule,
    temperature: float = 1.0,
    start_BxL: jax.Array | None = None,
    trace: bool = False,
) -> tuple[jax.Array, Info]:
    """Tweedie τ-leaping for an absorbing score model (Lou et al. 2024), logits as in
    `SEDDAbsorbing`.

    A mask is revealed with probability c·(e^Δσ - 1)/(e^σ - 1), at most 1, where c is the mass of
    the scaled score; for c = 1 this is `masked.ancestral`, id for id."""
    z = initial_state(sample_ids_B, length, n_ids, start_BxL)

    def update(step: jax.Array, z: jax.Array) -> tuple:
        noise_B = jnp.broadcast_to(
            schedule.mask_prob(jnp.asarray(1 - step / steps, jnp.float32)), sample_ids_B.shape
        )
        logits = suppress(denoise(z, noise_B), n_ids)
        keys = position_keys(key, sample_ids_B, step, jnp.arange(length))
        mass_BxL = jnp.exp(vocab_logsumexp(logits)) / n_ids
        # The last step reveals whatever is left, as the final denoising step of the paper.
        prob_BxL = jnp.where(step == steps - 1, 1.0, mass_BxL * unmask_prob(schedule, step, steps))
        reveal_BxL = (z == n_ids) & (uniform(keys) < prob_BxL)
        return jnp.where(reveal_BxL, categorical(keys, logits, temperature), z), 1, True

    return iterate(update, z, steps, trace)


def tweedie_uniform(
    log_score_V: jax.Array, z: jax.Array, n_ids: int, delta: jax.Array
) -> jax.Array:
    """log p(token before | z), up to a constant, `delta` of uniform noise σ earlier: [..., V/tp],
    [...] → [..., V/tp].

    (e^{-Δσ·Q} s)(y) · p_Δσ(z | y) with s_z = 1 (Lou et al. 2024). A learned score can make this
    negative: such ids get no mass."""
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
    denoise: Denoise,
    key: jax.Array,
    sample_ids_B: jax.Array,
    length: int,
    *,
    n_ids: int,
    steps: int,
    schedule: NoiseSchedule,
    trace: bool = False,
) -> tuple[jax.Array, Info]:
    """Tweedie τ-leaping for a uniform score model; `denoise(z, σ)` returns log scores as in
    `SEDDUniform`.

    Starts from uniform ids; the last step removes all noise that is left. `steps` calls. A step of
    Δσ amplifies the rounding of the scores by e^Δσ, so take enough steps (or a smaller σ_max) that
    Δσ stays below about 8."""
    positions_L = jnp.arange(length)
    # Step `steps` is never taken by the loop, so its noise is free for the start.
    start_keys = position_keys(key, sample_ids_B, steps, positions_L)
    z = jnp.minimum((uniform(start_keys) * n_ids).astype(jnp.int32), n_ids - 1)

    def update(step: jax.Array, z: jax.Array) -> tuple:
        sigma = schedule.sigma(jnp.asarray(1 - step / steps, jnp.float32))
        after = schedule.sigma(jnp.asarray(1 - (step + 1) / steps, jnp.float32))
        delta = jnp.where(step == steps - 1, sigma, sigma - after)
        log_score = denoise(z, jnp.broadcast_to(sigma, sample_ids_B.shape)).astype(jnp.float32)
        keys = position_keys(key, sample_ids_B, step, positions_L)
        return categorical(keys, tweedie_uniform(log_score, z, n_ids, delta)), 1, True

    return iterate(update, z, steps, trace)
