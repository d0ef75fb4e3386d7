"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464): linear attention whose state
forgets at a learned rate and corrects what it holds under a key.

A head keeps a matrix S and reads it with q:

    S_t = a_t (I - b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ,    o_t = S_tᵀ q_t.

The map is affine in S, so any range of tokens collapses to one pair (A, B) with S ← A S + B, and
ranges are composed in order (`fdp.parallel.context.state`). Inside a chunk the products of
I - b k kᵀ are written as a triangular system (the WY form of Yang et al. 2024, arXiv 2406.06484).

Legend: B sequences, L positions (local over cp), H heads (local over tp), K key dim, V value dim, N
chunks, C positions of a chunk, M columns of a state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdp.collectives import vary_like

Array = jax.Array


class Tokens(NamedTuple):
    """What the recurrence reads of each token.

    q, k: [B, L, H, K]; v: [B, L, H, V]; log_decay: log a ≤ 0, and beta: b, both f32 [B, L, H].
    fresh: bool [B, L], whether the token begins a document, so that the state before it is zero;
    None: only the first may."""

    q: Array
    k: Array
    v: Array
    log_decay: Array
    beta: Array
    fresh: Array | None = None


class Chunk(NamedTuple):
    """The chunks of a sequence, [N, B, H, …]: everything of the recurrence that does not read the
    state.

    solved: values after the solve, [C, V]; drawn: what they lose per state, [C, K]; read: decayed
    queries, [C, K]; near: weights of the chunk's own tokens, [C, C]; write: decayed keys, [C, K];
    keep: the decay of the state over the chunk, a scalar."""

    solved: Array
    drawn: Array
    read: Array
    near: Array
    write: Array
    keep: Array


def recur(tokens: Tokens, state_BxHxKxV: Array) -> tuple[Array, Array]:
    """The recurrence token by token, for decoding: (outputs f32 [B, L, H, V], the last state)."""

    def step(state: Array, at: Tokens) -> tuple[Array, Array]:
        state = state * jnp.exp(at.log_decay)[..., None, None]
        if at.fresh is not None:
            state = jnp.where(at.fresh[:, None, None, None], 0, state)
        held = jnp.einsum("bhkv,bhk->bhv", state, at.k)
        correction = at.beta[..., None] * (at.v - held)
        state = state + at.k[..., None] * correction[..., None, :]
        return state, jnp.einsum("bhkv,bhk->bhv", state, at.q)

    first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    state, out_LxBxHxV = jax.lax.scan(step, state_BxHxKxV, first)
    return jnp.moveaxis(out_LxBxHxV, 0, 1), state


def prepare(tokens: Tokens, chunk: int) -> Chunk:
    """The chunks of `chunk` positions each. Raises ValueError where they do not divide the
    sequence."""
    B, L, H, _ = tokens.k.shape
    if L % chunk:
        raise ValueError(
            f"{L} positions of a device are not divisible by chunks of {chunk}: set a chunk of "
            f"{max(c for c in range(1, min(chunk, L) + 1) if L % c == 0)}"
        )

    def cut(x: Array) -> Array:  # [B, L, H, …] → [N, B, H, C, …]
        x = x.astype(jnp.float32).reshape(B, L // chunk, chunk, H, *x.shape[3:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    q, k, v, log_decay, beta = (cut(x) for x in tokens[:5])
    order = jnp.arange(chunk)
    past, fresh = order[:, None] >= order, None
    if tokens.fresh is not None:
        fresh = jnp.moveaxis(tokens.fresh.reshape(B, L // chunk, 1, chunk), 1, 0)
    total = _running(log_decay, fresh)
    since, keep, rest = jnp.exp(total), jnp.exp(total[..., -1]), total[..., -1:] - total
    after = jnp.exp(rest)
    # Exponents of future tokens and of other documents are positive and may overflow: they are
    # masked before.
    if fresh is not None:
        document = jnp.cumsum(fresh, -1)
        past = past & (document[..., None] == document[..., None, :])
        last = document == document[..., -1:]
        since = jnp.where(document == 0, since, 0)
        after = jnp.where(last, jnp.exp(jnp.where(last, rest, 0)), 0)
        keep = jnp.where(document[..., -1] == 0, keep, 0)
    decay = jnp.where(past, jnp.exp(jnp.where(past, total[..., None] - total[..., None, :], 0)), 0)
    strict = jnp.where(order[:, None] > order, decay, 0)
    kk = jnp.einsum("nbhck,nbhdk->nbhcd", k, k)
    right = jnp.concatenate([beta[..., None] * v, (beta * since)[..., None] * k], -1)
    solved = unit_inverse(beta[..., None] * strict * kk) @ right
    near = decay * jnp.einsum("nbhck,nbhdk->nbhcd", q, k)
    V = v.shape[-1]
    read, write = q * since[..., None], k * after[..., None]
    return Chunk(solved[..., :V], solved[..., V:], read, near, write, keep)


def _running(x: Array, fresh: Array | None) -> Array:
    """Sums up to each position of the last dim, which begin again where `fresh`: then not even
    their rounding depends on what was before."""
    if fresh is None:
        return jnp.cumsum(x, -1)

    def add(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.where(later[1], later[0], earlier[0] + later[0]), earlier[1] | later[1]

    start = x, jnp.broadcast_to(fresh, x.shape)
    return jax.lax.associative_scan(add, start, axis=x.ndim - 1)[0]


def unit_inverse(below: Array) -> Array:
    """(I + below)⁻¹ of strictly lower triangular matrices [..., C, C], by blocks of twice the size
    in turn: products alone, which every backend batches well. A triangular solve is a loop over
    rows on a TPU, and its threads wait for each other on a CPU."""
    *batch, C, _ = below.shape
    size = 1 << (C - 1).bit_length()
    below = jnp.pad(below, [(0, 0)] * len(batch) + [(0, size - C)] * 2)
    inverse = jnp.ones((*batch, size, 1, 1))
    block = 1
    while block < size:
        # [[A, 0], [L, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ L A⁻¹, D⁻¹]] for every pair of blocks.
        pairs = size // (2 * block)
        tiles = below.reshape(*batch, pairs, 2, block, pairs, 2, block)
        corner = jnp.einsum("...ixiy->...ixy", tiles[..., :, 1, :, :, 0, :])
        first, last = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        corner = corner if block == 1 else last @ corner @ first
        upper = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        lower = jnp.concatenate([-corner, last], -1)
        inverse = jnp.concatenate([upper, lower], -2)
        block *= 2
    return inverse[..., 0, :C, :C]


def inverse_flops(chunk: int) -> int:
    """Of the products of `unit_inverse`: two of s³ for each pair of blocks of s = 2, 4, …"""
    size = 1 << (chunk - 1).bit_length()
    return max(2 * size * (size * size - 4) // 3, 0)


def scan(chunks: Chunk, state_BxHxKxV: Array) -> tuple[Array, Array]:
    """(outputs f32 [B, L, H, V], the last state) from the state before the first chunk."""

    def step(state: Array, c: Chunk) -> tuple[Array, Array]:
        values = c.solved - c.drawn @ state
        out = c.read @ state + c.near @ values
        return _advance(state, c, values), out

    state, out = jax.lax.scan(step, vary_like(state_BxHxKxV, chunks.solved), chunks)
    N, B, H, C, V = out.shape
    return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(B, N * C, H, V), state


def read_on(tokens: Tokens, state_BxHxKxV: Array, chunk: int) -> tuple[Array, Array]:
    """As `recur`, whole chunks at a time."""
    L, outs = tokens.k.shape[1], []
    cut = L - L % chunk
    if cut:
        first = jax.tree.map(lambda x: x[:, :cut], tokens)
        out, state_BxHxKxV = scan(prepare(first, chunk), state_BxHxKxV)
        outs.append(out)
    if cut < L:
        rest = jax.tree.map(lambda x: x[:, cut:].astype(jnp.float32), tokens)
        out, state_BxHxKxV = recur(rest, vary_like(state_BxHxKxV, tokens.k))
        outs.append(out)
    return jnp.concatenate(outs, 1), state_BxHxKxV


def affine(chunks: Chunk) -> Array:
    """[A | B] of the map S → A S + B of all chunks: f32 [B, H, K, K + V]."""
    _, B, H, _, V = chunks.solved.shape
    K = chunks.drawn.shape[-1]
    start = jnp.concatenate([jnp.eye(K), jnp.zeros((K, V))], -1)
    start = vary_like(jnp.broadcast_to(start, (B, H, K, K + V)), chunks.solved)

    def step(state: Array, c: Chunk) -> tuple[Array, None]:
        values = jnp.pad(c.solved, [(0, 0)] * 3 + [(K, 0)]) - c.drawn @ state
        return _advance(state, c, values), None

    return jax.lax.scan(step, start, chunks)[0]


def compose(later: Array, earlier: Array) -> Array:
    """[A | B] of the map `earlier`, then `later`; both [..., K, K + V]."""
    K = later.shape[-2]
    found = later[..., :K] @ earlier
    return found.at[..., K:].add(later[..., K:])


def constant(both: Array) -> Array:
    """B of [A | B]: what the map makes of a state of zeros, [..., K, V]."""
    return both[..., both.shape[-2] :]


def apply(both: Array, state: Array) -> Array:
    """A S + B for [A | B]: [..., K, V]."""
    K = both.shape[-2]
    return both[..., :K] @ state + both[..., K:]


def _advance(state: Array, c: Chunk, values: Array) -> Array:
    return c.keep[..., None, None] * state + jnp.swapaxes(c.write, -1, -2) @ values


def fold(maps: Array, state: Array, count: Array) -> Array:
    """`state` after the first `count` (traced) of the maps [n, …, K, K + V]."""

    def step(state: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        number, both = at
        return jnp.where(number < count, apply(both, state), state), None

    return jax.lax.scan(step, state, (jnp.arange(maps.shape[0]), maps))[0]


def scan_products(devices: int) -> int:
    """FLOPs over K³ of a head and device in `state.scanned_before`, V = K: none in the first step,
    two compositions of 4 in each further one, but two applications of 2 in the last."""
    steps = (devices - 1).bit_length()
    return max(8 * (steps - 2) + 4, 0)
