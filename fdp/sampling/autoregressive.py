"""Autoregressive sampling by full recomputation: one forward pass of the whole static-length prefix per token.

The reference that a cached sampler must reproduce id for id. Shapes: B samples, L positions, V vocabulary (tp: V/tp).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fdp.collectives import vary_like
from fdp.parallel.tensor import suppress
from fdp.sampling.noise import categorical, position_keys


def sample(
    logits_at: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    sample_ids_B: jax.Array,
    length: int,
    bos: int,
    temperature: float = 1.0,
    *,
    n_ids: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Draw `length` tokens left to right: (ids int32 [B, L], {"nfe": length}).

    `logits_at(inputs_BxL, i) -> [B, V/tp]` f32 predicts token i from inputs 0..i (inputs = bos, then the tokens; what
    lies beyond i is bos and must not matter). Ids ≥ n_ids are never drawn.
    """
    start = vary_like(jnp.full((sample_ids_B.shape[0], length), bos, jnp.int32), sample_ids_B)

    def body(i: jax.Array, tokens_BxL: jax.Array) -> jax.Array:
        inputs_BxL = jnp.roll(tokens_BxL, 1, axis=1).at[:, 0].set(bos)
        keys = position_keys(key, sample_ids_B, 0, i[None])[:, 0]
        token_B = categorical(keys, suppress(logits_at(inputs_BxL, i), n_ids), temperature)
        return tokens_BxL.at[:, i].set(token_B)

    return jax.lax.fori_loop(0, length, body, start), {"nfe": jnp.int32(length)}
