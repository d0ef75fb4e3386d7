"""Autoregressive sampling: by one forward pass of the whole static-length prefix per token
(`sample`), by a cache of what was read (`fill`, `read`, `write`), or as a chain that can be drafted
and verified (`LeftToRight`). All give the same ids. The cache of softmax attention may lie over cp.

Shapes: B samples, L positions (inputs of a pass: local over cp), R rows, V vocabulary (tp:
V/tp)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdp.collectives import size, vary_like
from fdp.models import module
from fdp.models.transformer import Transformer
from fdp.parallel.context import layouts
from fdp.parallel.context.cache import check_capacity
from fdp.parallel.context.layouts import SequenceLayout
from fdp.parallel.tensor import suppress
from fdp.sampling.chain import Chain, ChainState
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


@dataclass(frozen=True, eq=False)
class LeftToRight(Chain):
    """`sample` as a chain: the denoiser's logits of a position come from those before it. The noise
    of a token depends on its position alone, and so not on the length of the prompt."""

    order: str = "left_to_right"

    def keys(self, state: ChainState, stream: int = 0) -> jax.Array:
        """As of `Chain`, of the same step always."""
        return super().keys(state._replace(step_B=jnp.zeros_like(state.step_B)), stream)


def next_token(logits_BxV: jax.Array, draw: Draw, i: jax.Array) -> jax.Array:
    """Token i of every sample: int32 [B]. `i`: of all samples, or int32 [B]."""
    keys = position_keys(draw.key, draw.sample_ids_B, 0, i[..., None])[:, 0]
    return categorical(keys, suppress(logits_BxV, draw.n_ids), draw.temperature)


def fill(
    model: Transformer, variables: Mapping[str, Any], cache: Any, inputs_BxL: jax.Array
) -> Any:
    """The cache after a pass over all inputs from the first on, by the plan of the model over cp;
    its keys and values are then dealt round-robin (`fdp.parallel.context.cache`).

    `cache`: of `model.decode_state`. `inputs_BxL`: those of this device in the layout of the model.
    A shorter prompt is filled up with any inputs: what lies behind its own is hidden until it is
    replaced. Raises ValueError for inputs beyond the capacity, and over cp for layers whose cache
    is not sharded."""
    noise_B = vary_like(jnp.zeros(len(inputs_BxL)), inputs_BxL)
    return module.run(model, variables, inputs_BxL, noise_B, method="hidden", cache=cache)[2]


def read(
    model: Transformer,
    variables: Mapping[str, Any],
    cache: Any,
    inputs_BxR: jax.Array,
    start: jax.Array | int,
) -> tuple[jax.Array, Any]:
    """(logits [B, V/tp] of the token after these inputs, the cache with them), for a causal model.

    `cache`: of `model.decode_state`, after `start` inputs: the start token, then tokens. `start`:
    of all sequences, or int32 [B], the length of each; a smaller one rolls a sequence back. Under
    cp > 1 all devices are given the same inputs. Rows beyond the capacity are not stored
    (`check_capacity`). Raises ValueError for layers without cached decoding."""
    index_BxR = jnp.reshape(start, (-1, 1)) + jnp.arange(inputs_BxR.shape[1])
    index_BxR = jnp.broadcast_to(index_BxR, inputs_BxR.shape)
    noise_B = vary_like(jnp.zeros(len(inputs_BxR)), inputs_BxR)
    args = model, variables, inputs_BxR, noise_B, index_BxR
    hidden_BxRxD, _, cache = module.run(*args, method="hidden", cache=cache)
    return module.run(model, variables, hidden_BxRxD[:, -1], method="outputs")[0], cache


def write(
    model: Transformer,
    variables: Mapping[str, Any],
    cache: Any,
    last_B: jax.Array,
    start: jax.Array | int,
    draw: Draw,
) -> tuple[jax.Array, Any]:
    """(the next `draw.length` tokens, int32 [B, L], the cache without the last of them), one row a
    token.

    `cache`: as in `read`, after `start` inputs; `last_B`: the input that follows them, after which
    to write. Token i of a sample has the noise that it has in `sample`. With a `start` of each
    sequence, tokens follow prompts of unlike lengths."""
    batch = len(last_B)
    tokens_BxL = vary_like(jnp.zeros((batch, draw.length), jnp.int32), draw.sample_ids_B)

    def body(i: jax.Array, carry: tuple) -> tuple:
        tokens_BxL, last_B, cache = carry
        logits_BxV, cache = read(model, variables, cache, last_B[:, None], start + i)
        token_B = next_token(logits_BxV, draw, start + i)
        return tokens_BxL.at[:, i].set(token_B), token_B, cache

    carry = tokens_BxL, vary_like(last_B, draw.sample_ids_B), cache
    tokens_BxL, _, cache = jax.lax.fori_loop(0, draw.length, body, carry)
    return tokens_BxL, cache


class Prompts(NamedTuple):
    """What `complete` reads. `inputs_BxL`: the start token and the prompt of each sequence, filled
    up, in the layout of a model (of this device); `lengths_B`: how many of them are its own;
    `last_B`: the last one of those."""

    inputs_BxL: Any
    lengths_B: Any
    last_B: Any


def prompts_of(
    texts: Sequence[Sequence[int]], bos: int, layout: SequenceLayout, cp: int
) -> Prompts:
    """Prompts of unlike lengths, int32 and global, filled up to a length that `layout` divides
    among `cp` devices. An empty one is the start token alone. Raises ValueError without any."""
    if not len(texts):
        raise ValueError("prompts = 0 sequences: give at least one, which may be empty")
    unit, lengths_B = layout.unit(cp)[0], np.array([1 + len(ids) for ids in texts], np.int32)
    inputs_BxL = np.full((len(texts), -(-lengths_B.max() // unit) * unit), bos, np.int32)
    for row_L, ids in zip(inputs_BxL, texts, strict=True):
        row_L[1 : 1 + len(ids)] = ids
    last_B = inputs_BxL[np.arange(len(texts)), lengths_B - 1]
    return Prompts(layouts.permute(inputs_BxL, layout, cp), lengths_B, last_B)


def complete(
    model: Transformer, variables: Mapping[str, Any], prompts: Prompts, draw: Draw, capacity: int
) -> tuple[jax.Array, Any]:
    """(the `draw.length` tokens after each prompt, the cache), as `fill` and then `write` make
    them, with a cache of `capacity` positions. The row of the last input is run again.

    Raises ValueError where prompts, with what fills them up, and tokens exceed the capacity."""
    inputs_BxL, lengths_B, last_B = prompts
    check_capacity(inputs_BxL.shape[1] * size("cp"), draw.length, capacity)
    cache, _ = model.decode_state(len(inputs_BxL), capacity)
    cache = fill(model, variables, cache, inputs_BxL)
    return write(model, variables, cache, last_B, lengths_B - 1, draw)
