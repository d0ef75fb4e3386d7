"""Autoregressive sampling: one forward pass of the whole static-length prefix per token, or of one
row with a cache.

The recomputing sampler is the reference that the cached one reproduces id for id. Shapes: B
samples, L positions, V vocabulary (tp: V/tp)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import vary_like
from fdp.models import module
from fdp.models.transformer import Transformer
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

    `logits_at(inputs_BxL, i) -> [B, V/tp]` f32 predicts token i from inputs 0..i (inputs = bos,
    then the tokens; what lies beyond i is bos and must not matter). Ids ≥ n_ids are never drawn.
    """
    start = vary_like(jnp.full((sample_ids_B.shape[0], length), bos, jnp.int32), sample_ids_B)

    def body(i: jax.Array, tokens_BxL: jax.Array) -> jax.Array:
        inputs_BxL = jnp.roll(tokens_BxL, 1, axis=1).at[:, 0].set(bos)
        token_B = _draw(logits_at(inputs_BxL, i), key, sample_ids_B, i, temperature, n_ids)
        return tokens_BxL.at[:, i].set(token_B)

    return jax.lax.fori_loop(0, length, body, start), {"nfe": jnp.int32(length)}


def sample_cached(
    model: Transformer,
    params: Any,
    key: jax.Array,
    sample_ids_B: jax.Array,
    length: int,
    bos: int,
    temperature: float = 1.0,
    *,
    n_ids: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `sample` for a causal `model`, with one row a token against the key/value cache; "nfe"
    counts rows.

    Raises ValueError for a model that is not causal and under cp > 1.
    """
    if model.softmax.mask.kind != "causal":
        raise ValueError(
            "a cache filled from left to right needs a causal model: under "
            f"{model.softmax.mask} later tokens would change the keys of earlier ones"
        )
    batch, variables = sample_ids_B.shape[0], {"params": params}
    noise_B = vary_like(jnp.zeros(batch), sample_ids_B)

    def body(i: jax.Array, carry: tuple) -> tuple:
        tokens_BxL, last_B, cache = carry
        args = (model, variables, last_B[:, None], noise_B, jnp.full((batch, 1), i))
        hidden_Bx1xD, _, cache = module.run(*args, method="hidden", cache=cache)
        logits_BxV, _, _ = module.run(model, variables, hidden_Bx1xD[:, 0], method="outputs")
        token_B = _draw(logits_BxV, key, sample_ids_B, i, temperature, n_ids)
        return tokens_BxL.at[:, i].set(token_B), token_B, cache

    first_B = vary_like(jnp.full(batch, bos, jnp.int32), sample_ids_B)
    tokens_BxL = vary_like(jnp.zeros((batch, length), jnp.int32), sample_ids_B)
    cache, _ = model.decode_state(batch, length)
    carry = (tokens_BxL, first_B, cache)
    return jax.lax.fori_loop(0, length, body, carry)[0], {"nfe": jnp.int32(length)}


def _draw(
    logits_BxV: jax.Array,
    key: jax.Array,
    sample_ids_B: jax.Array,
    i: jax.Array,
    temperature: float,
    n_ids: int,
) -> jax.Array:
    """Token i of every sample: int32 [B]."""
    keys = position_keys(key, sample_ids_B, 0, i[None])[:, 0]
    return categorical(keys, suppress(logits_BxV, n_ids), temperature)
