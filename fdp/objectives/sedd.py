"""Score entropy (SEDD): learn the ratios p(y)/p(z) of one-token neighbours, under absorbing or
uniform noise.

Shapes: B sequences, L positions, V vocabulary (tp: V/tp columns), R rows (any leading shape).
"""

from dataclasses import dataclass, field
from math import log

import jax
import jax.numpy as jnp

from fdp.collectives import psum
from fdp.objectives.base import (
    Batch,
    Noised,
    Rows,
    TokenObjective,
    stratified_uniform,
    with_segments,
    with_weights,
)
from fdp.objectives.mdlm import MDLM
from fdp.objectives.noise_schedules import Geometric, NoiseSchedule
from fdp.parallel.tensor import NEVER, suppress, vocab_gather, vocab_logsumexp, vocab_offset


@dataclass(frozen=True)
class SEDDAbsorbing(MDLM):
    """Score entropy for absorbing noise (Lou et al. 2024), with the noise forms and masks of
    `MDLM`.

    log score of id y = logit_y - log n_ids - log(e^σ - 1). With this scaling by σ, as in the
    paper's code, zero logits are a normalised score. The loss is MDLM's plus w·(c - 1 - log c) ≥ 0,
    c = Σ e^logit / n_ids."""

    def loss(self, logits_RxV: jax.Array, rows: Rows) -> jax.Array:
        """w·[Σ_y s_y/κ - log s_x/κ - 1] in nats, κ = 1/(e^σ - 1) cancelling: [R..., V/tp] → f32
        [R...].
        """
        logits_RxV = suppress(logits_RxV, self.n_ids, self.axes)
        mass = jnp.exp(vocab_logsumexp(logits_RxV, self.axes) - log(self.n_ids))
        at_target = vocab_gather(logits_RxV, rows["targets"], self.axes)
        return rows["weights"] * (mass - at_target + log(self.n_ids) - 1)


def _uniform(key: jax.Array, n: int) -> jax.Array:
    return jax.random.uniform(key, (n,))


def uniform_ratio(sigma: jax.Array, n_ids: int) -> jax.Array:
    """p(token stays)/p(token becomes one given other id) = 1 + n_ids/(e^σ - 1) under uniform noise
    of total σ."""
    return 1 + n_ids / jnp.expm1(sigma)


@dataclass(frozen=True)
class SEDDUniform(TokenObjective):
    """Score entropy for uniform noise (Lou et al. 2024 with Q uniform); the logits are the log
    scores.

    Every position carries loss, and the model must read σ (`noise`). The bound omits the
    reconstruction term at σ(0) and the prior term at σ(1); both are negligible for the default
    schedule."""

    n_ids: int
    schedule: NoiseSchedule = field(default_factory=Geometric)
    antithetic: bool = True

    def corrupt(self, key: jax.Array, batch: Batch) -> Noised:
        """Replace each token, with probability 1 - e^-σ, by a uniform id (possibly the same). noise
        = σ(t)."""
        tokens_BxL = batch["tokens"].astype(jnp.int32)
        key_t, key_move, key_id = jax.random.split(key, 3)
        levels = stratified_uniform if self.antithetic else _uniform
        t_B = levels(key_t, len(tokens_BxL))
        uniform_BxL = jax.random.uniform(key_move, tokens_BxL.shape)
        moved_BxL = uniform_BxL < self.schedule.mask_prob(t_B)[:, None]
        ids_BxL = jax.random.randint(key_id, tokens_BxL.shape, 0, self.n_ids, jnp.int32)
        noisy_BxL = jnp.where(moved_BxL, ids_BxL, tokens_BxL)
        sigma_B = self.schedule.sigma(t_B)

        def spread(x_B: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x_B[:, None], tokens_BxL.shape)

        rows = {
            "targets": tokens_BxL,
            "weights": spread(self.schedule.rate(t_B)),
            "noisy": noisy_BxL,
            "ratio": spread(uniform_ratio(sigma_B, self.n_ids)),
        }
        noised: Noised = {"inputs": noisy_BxL, "noise": sigma_B, "rows": with_weights(rows, batch)}
        return with_segments(noised, batch)

    def loss(self, logits_RxV: jax.Array, rows: Rows) -> jax.Array:
        """σ'/n Σ_{y≠z} [s_y - r_y log s_y + r_y(log r_y - 1)] in nats, r = p(y|x)/p(z|x): [R...,
        V/tp] → f32 [R...].

        It is never negative, and 0 exactly at s = r. The column of the noisy id is not read."""
        n, ratio = self.n_ids, rows["ratio"]
        logits_RxV = logits_RxV.astype(jnp.float32)
        ids = vocab_offset(logits_RxV.shape[-1], self.axes) + jnp.arange(logits_RxV.shape[-1])
        other = (ids < n) & (ids != rows["noisy"][..., None])
        sums = jnp.stack(
            [
                jnp.where(other, jnp.exp(jnp.where(other, logits_RxV, NEVER)), 0),
                jnp.where(other, logits_RxV, 0),
            ]
        )
        score_sum, log_sum = psum(sums.sum(-1), self.axes)
        kept = rows["noisy"] == rows["targets"]
        # Kept: every r is 1/ratio. Moved: r is `ratio` for the clean id and 1 for the n-2 others.
        at_target = vocab_gather(logits_RxV, rows["targets"], self.axes)
        cross = jnp.where(kept, log_sum / ratio, log_sum + (ratio - 1) * at_target)
        constant = jnp.where(
            kept, -(n - 1) / ratio * (jnp.log(ratio) + 1), ratio * (jnp.log(ratio) - 1) - (n - 2)
        )
        return rows["weights"] / n * (score_sum - cross + constant)
