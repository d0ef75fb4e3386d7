"""Autoregressive sampling by one forward pass of the whole static-length prefix per token.

Shapes: B samples, L positions, V vocabulary (tp: V/tp)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fdp.collectives import vary_like
from fdp.parallel.tensor import suppress
from fdp.sampling.noise import Draw, categorical, position_keys


def sample(
    logits_at: Callable[[jax.Array, jax.Array], jax.Array], draw: Draw, bos: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Draw tokens from left to right: (ids int32 [B, L], {"nfe": length}).

    `logits_at(inputs_BxL, i) -> [B, V/tp]` f32 predicts token i from inputs 0..i. The inputs are
    bos, then the tokens; what lies beyond i is bos and must not matter.
    """
    batch = draw.sample_ids_B.shape[0]
    start = vary_like(jnp.full((batch, draw.length), bos, jnp.int32), draw.sample_ids_B)

    def body(i: jax.Array, tokens_BxL: jax.Array) -> jax.Array:
        inputs_BxL = jnp.roll(tokens_BxL, 1, axis=1).at[:, 0].set(bos)
        token_B = next_token(logits_at(inputs_BxL, i), draw, i)
        return tokens_BxL.at[:, i].set(token_B)

    return jax.lax.fori_loop(0, draw.length, body, start), {"nfe": jnp.int32(draw.length)}


def next_token(logits_BxV: jax.Array, draw: Draw, i: jax.Array) -> jax.Array:
    """Token i of every sample: int32 [B]."""
    keys = position_keys(draw.key, draw.sample_ids_B, 0, i[None])[:, 0]
    return categorical(keys, suppress(logits_BxV, draw.n_ids), draw.temperature)
