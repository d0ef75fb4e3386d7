"""Fast weights that read tokens as they arrive, one or many at a time, for decoding
(`fdp.models.fast_weights` and `fdp.models.fast_linear` have the scans of whole sequences).

What is kept is of fixed size, whatever the chunk: a chunk's update is a sum over its tokens, each
at the weights before the chunk, so the unfinished chunk is kept as the sum so far. Tokens are cut
where chunks end; a token of rate 0 adds nothing, so pieces are padded with such.

Legend: B sequences, L tokens that arrive, H heads, K head dim, N pieces, C positions of a piece."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdp.collectives import vary_like
from fdp.models.fast_linear import Maps, maps_read, maps_steps, norm_of_heads, of, stepped
from fdp.models.fast_weights import FastWeights, Read, apply, as_used, learn, step

Array = jax.Array


class SwigluMemory(NamedTuple):
    """Of LaCT. weights, velocity: before the unfinished chunk; without momentum no velocity.
    gained: the steps of its tokens, and momentum f32 [B, H]: theirs, both summed."""

    weights: FastWeights
    velocity: FastWeights | None
    gained: FastWeights
    momentum: Array | None


class LinearMemory(NamedTuple):
    """Of TTT-Linear and TTT-MLP. start: before the unfinished mini-batch; now: after its tokens so
    far."""

    start: Maps
    now: Maps


def swiglu_memory(weights_BxH: FastWeights, momentum: bool) -> SwigluMemory:
    """Before the first token; `weights_BxH`: the first weights of every sequence."""
    zeros = jax.tree.map(jnp.zeros_like, weights_BxH)
    none = jnp.zeros_like(weights_BxH.gate[:, :, 0, 0])
    return SwigluMemory(weights_BxH, zeros if momentum else None, zeros, none if momentum else None)


def swiglu_rows(
    read: Read,
    memory: SwigluMemory,
    seen: Array | int,
    chunk: int,
    norms: FastWeights,
    orthogonalise: Callable[[Array], Array] | None = None,
    prenorm: bool = False,
) -> tuple[Array, SwigluMemory]:
    """(outputs f32 [B, L, H, K], the memory after these tokens), as `swiglu_scan` has them.

    `seen`: tokens before these, in every sequence. `norms`: `row_norms` of the first weights."""

    def one(memory: SwigluMemory, at: tuple[Read, Array, Array]) -> tuple[SwigluMemory, Array]:
        piece, full, _ = at
        weights, velocity, gained, momentum = memory
        used = as_used(weights, norms if prenorm else None)
        out = apply(used, piece.q)
        more = step(used, piece.k, piece.v, piece.rates)
        gained = jax.tree.map(jnp.add, gained, more)
        if momentum is not None and piece.momentum is not None:
            momentum = momentum + piece.momentum.sum(-1)

        def finish() -> SwigluMemory:
            kept = None if momentum is None else momentum / chunk
            last = gained if velocity is None else velocity
            lengths = None if prenorm else norms
            after, velocity_after = learn(weights, last, gained, kept, lengths, orthogonalise)
            empty = swiglu_memory(after, momentum is not None)
            return empty if velocity is None else empty._replace(velocity=velocity_after)

        kept = SwigluMemory(weights, velocity, gained, momentum)
        return jax.lax.cond(full, finish, lambda: kept), out

    return _scan(one, memory, read, seen, chunk)


def linear_rows(
    tokens: tuple[Array, Array, Array, Array],
    memory: LinearMemory,
    seen: Array | int,
    batch: int,
    norm: tuple[Array, Array],
    again: tuple[int, LinearMemory] | None = None,
) -> tuple[Array, LinearMemory]:
    """(outputs f32 [B, L, H, K], the memory after these tokens), as `linear_scan` has them.

    `tokens`: its q, k, v and rates. `seen`: tokens before these, in every sequence. `again`: (R,
    the memory of every sequence that takes this one's place after every R tokens, a multiple of
    `batch`)."""
    norm = norm_of_heads(norm)

    def one(memory: LinearMemory, at: tuple[Any, Array, Array]) -> tuple[LinearMemory, Array]:
        (q, k, v, rates), full, ended = at
        start, now = memory
        inputs, steps = maps_steps(of(start), len(start), k, v, rates, norm)
        past = jnp.tril(jnp.ones((q.shape[2],) * 2))
        out = maps_read(of(now), q, inputs, steps, past, norm)
        now = stepped(now, inputs, steps)
        start = jax.tree.map(lambda new, old: jnp.where(full, new, old), now, start)
        memory = LinearMemory(start, now)
        if again is not None:
            anew = full & (ended % (again[0] // batch) == 0)
            memory = jax.tree.map(lambda new, old: jnp.where(anew, new, old), again[1], memory)
        return memory, out

    return _scan(one, memory, tokens, seen, batch)


def _scan(
    one: Callable[..., Any], memory: Any, tokens_BxLxH: Any, seen: Array | int, chunk: int
) -> tuple[Array, Any]:
    """(outputs [B, L, H, …], the last memory) of `one(memory, (piece, full, ended))` on pieces [B,
    H, C, …]: `full`, whether a chunk ends with the piece, and `ended`, the chunks that then have
    ended in all."""
    like = jax.tree.leaves(tokens_BxLxH)[0]
    length = like.shape[1]
    size = 1 if length == 1 else chunk  # one token ends no piece before it
    offset = 0 if length == 1 else seen % chunk
    most = offset if isinstance(offset, int) else chunk - 1
    pieces = -(-(most + length) // size)

    def cut(x: Array) -> Array:  # [B, L, H, …] → [N, B, H, C, …]
        x = x.astype(jnp.float32)
        B, _, *rest = x.shape
        room = vary_like(jnp.zeros((B, pieces * size, *rest)), x)
        x = jax.lax.dynamic_update_slice_in_dim(room, x, offset, 1)
        return jnp.moveaxis(x.reshape(B, pieces, size, *rest), (1, 3), (0, 2))

    ends = (jnp.arange(pieces) + 1) * size
    after = seen - offset + ends
    full = (after % chunk == 0) & (ends <= offset + length)
    memory = jax.tree.map(lambda x: vary_like(x, like), memory)
    at = jax.tree.map(cut, tokens_BxLxH), full, after // chunk
    memory, out = jax.lax.scan(one, memory, at)
    out = jnp.moveaxis(out, (0, 2), (1, 3))  # [B, N, C, H, K]
    out = out.reshape(out.shape[0], pieces * size, *out.shape[3:])
    return jax.lax.dynamic_slice_in_dim(out, offset, length, 1), memory
