"""Vocabulary-parallel operations over tp: logits stay sharded, and only reductions are
communicated.

`logits_V` holds the V/tp columns of this device, a contiguous block; all other ids are global.
`axes`: those over which the vocabulary is sharded, where they are others than tp.

Legend: V vocabulary."""

import jax
import jax.numpy as jnp

from fdp.collectives import Axes, index, pmax, psum

TP = ("tp",)

# Logits of ids that must never be predicted. Finite: -inf would turn 0·log 0 terms into NaN.
NEVER = -1e30


def vocab_offset(v_local: int, axes: Axes = TP) -> jax.Array | int:
    """Global id of the first logits column of this device."""
    return index(axes) * v_local


def suppress(logits_V: jax.Array, n_ids: int, axes: Axes = TP) -> jax.Array:
    """Forbid every id ≥ n_ids (mask token and padding rows of the embedding). Shape [..., V/tp] →
    same.
    """
    ids = vocab_offset(logits_V.shape[-1], axes) + jnp.arange(logits_V.shape[-1])
    # An addition, not a select: its transpose is the identity, where a select cost 6 % of a small
    # step.
    return logits_V + jnp.where(ids < n_ids, 0.0, NEVER)


def vocab_logsumexp(logits_V: jax.Array, axes: Axes = TP) -> jax.Array:
    """log Σ_v exp(logit_v) over the whole vocabulary: [..., V/tp] → [...] f32. One pmax and one
    psum of a scalar.
    """
    logits_V = logits_V.astype(jnp.float32)
    # The maximum only stabilises the exponent; its gradient cancels exactly.
    top = pmax(jax.lax.stop_gradient(logits_V.max(-1)), axes)
    return top + jnp.log(psum(jnp.exp(logits_V - top[..., None]).sum(-1), axes))


def vocab_gather(logits_V: jax.Array, ids: jax.Array, axes: Axes = TP) -> jax.Array:
    """logits at global `ids`: [..., V/tp], [...] int → [...] f32. One psum of a scalar per row."""
    local = ids - vocab_offset(logits_V.shape[-1], axes)
    mine = (local >= 0) & (local < logits_V.shape[-1])
    picked = jnp.take_along_axis(
        logits_V, jnp.clip(local, 0, logits_V.shape[-1] - 1)[..., None], axis=-1
    )[..., 0]
    return psum(jnp.where(mine, picked.astype(jnp.float32), 0.0), axes)


def cross_entropy(logits_V: jax.Array, targets: jax.Array, axes: Axes = TP) -> jax.Array:
    """-log softmax(logits)[target] in nats, vocabulary-parallel: [..., V/tp], [...] → [...] f32.

    The two reductions after the maximum share one psum. Source: Shoeybi et al. 2019 (Megatron-LM),
    section 3."""
    logits_V = logits_V.astype(jnp.float32)
    local = targets - vocab_offset(logits_V.shape[-1], axes)
    mine = (local >= 0) & (local < logits_V.shape[-1])
    picked = jnp.take_along_axis(
        logits_V, jnp.clip(local, 0, logits_V.shape[-1] - 1)[..., None], axis=-1
    )[..., 0]
    top = pmax(jax.lax.stop_gradient(logits_V.max(-1)), axes)
    both = jnp.stack(
        [jnp.exp(logits_V - top[..., None]).sum(-1), jnp.where(mine, picked - top, 0.0)]
    )
    total, target_logit = psum(both, axes)
    return jnp.log(total) - target_logit


def vocab_argmax(scores_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(largest value, its global id) over the vocabulary: [..., V/tp] → [...] f32, [...] int32.
    Ties go to the smallest id."""
    best = scores_V.max(-1)
    ids = scores_V.argmax(-1).astype(jnp.int32) + vocab_offset(scores_V.shape[-1])
    top = pmax(best, "tp")
    # Smallest id among the shards that hold the maximum, so that the result does not depend on tp.
    winner = -pmax(jnp.where(best == top, -ids, jnp.iinfo(jnp.int32).min), "tp")
    return top, winner
