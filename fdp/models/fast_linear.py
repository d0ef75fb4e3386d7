"""Fast linear maps: TTT-Linear (Sun et al. 2024, arXiv 2407.04620, section 2), gradient descent on
every token of a small mini-batch from the weights at its start, in the dual form.

Documents of a sequence are read as `fdp.models.fast_weights` says.

Legend: B sequences, L positions, H heads, K head dim, N mini-batches, C positions of one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdp.models.fast_weights import ChunkDocuments, documents_of, everywhere

Array = jax.Array


class FastLinear(NamedTuple):
    """The linear fast model z = k W + bias: weight [..., H, K, K], bias [..., H, K]."""

    weight: Array
    bias: Array


def norm_of_heads(norm_HxK: tuple[Array, Array]) -> tuple[Array, Array]:
    """Scale and shift as `linear_steps` and `linear_read` take them."""
    scale, shift = (x[:, None].astype(jnp.float32) for x in norm_HxK)
    return scale, shift


def normed(z: Array, scale: Array, shift: Array) -> Array:
    """Layer norm over the last dim."""
    centred = z - z.mean(-1, keepdims=True)
    return scale * centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6) + shift


def linear(fast: FastLinear, x_BxHxCxK: Array) -> Array:
    """x W + bias."""
    return x_BxHxCxK @ fast.weight + fast.bias[:, :, None]


def linear_steps(z: Array, k: Array, v: Array, rates_BxHxC: Array, norm: tuple) -> Array:
    """The step of every token of a mini-batch: its rate times the gradient, at its `z`, of the loss
    ½ |LN(z) - (v - k)|². z, k, v: [B, H, C, K]; `norm`: scale and shift of LN, [H, 1, K] each."""

    def loss(z: Array) -> Array:
        return 0.5 * jnp.sum((normed(z, *norm) - (v - k)) ** 2)

    return rates_BxHxC[..., None] * jax.grad(loss)(z)


def linear_read(z: Array, q: Array, k: Array, steps: Array, seen_CxC: Array, norm: tuple) -> Array:
    """What `q` reads: `z`, of the weights before some `steps`, after those that `seen` [..., C, C]
    names for each token (the dual form)."""
    z = z - (seen_CxC * (q @ jnp.swapaxes(k, -1, -2))) @ steps - seen_CxC @ steps
    return q + normed(z, *norm)


def stepped(fast: FastLinear, k: Array, steps: Array) -> FastLinear:
    """The weights after the `steps` of tokens `k`."""
    return FastLinear(fast.weight - jnp.swapaxes(k, -1, -2) @ steps, fast.bias - steps.sum(2))


def linear_scan(
    q: Array,
    k: Array,
    v: Array,
    rates_BxLxH: Array,
    first: FastLinear,
    norm: tuple,
    batch: int,
    segment_BxL: Array | None = None,
) -> tuple[Array, FastLinear]:
    """(outputs f32 [B, L, H, K], the weights after the last token) of TTT-Linear.

    The loss of a token is ½ |LN(k W + bias) - (v - k)|², with LN of scale and shift `norm`, [H, K]
    each. Each token of a mini-batch takes its own step from the weights at the start of the
    mini-batch: output t has seen the steps of the mini-batch up to t, and of its own document.
    `rates_BxLxH`: step sizes. `segment_BxL`: ids of documents."""
    B, L, H, K = k.shape
    norm = norm_of_heads(norm)
    start = FastLinear(*(everywhere(w, k) for w in first))
    documents = None
    if segment_BxL is not None:
        documents, _ = documents_of(segment_BxL, batch, L // batch)

    def chunked(x: Array) -> Array:  # [B, L, H, …] → [N, B, H, C, …]
        x = x.astype(jnp.float32).reshape(B, L // batch, batch, H, *x.shape[3:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    past = jnp.tril(jnp.ones((batch, batch)))

    def mapped(fast: FastLinear, x: Array, of: ChunkDocuments | None) -> Array:
        z = linear(fast, x)
        if of is None:
            return z
        return jnp.where(of.earlier()[:, None, :, None], z, mapped(start, x, None))

    def one(fast: FastLinear, at: tuple[tuple, ChunkDocuments | None]) -> tuple[FastLinear, Array]:
        (q, k, v, rates), of = at
        steps, seen = linear_steps(mapped(fast, k, of), k, v, rates, norm), past
        if of is not None:
            seen = past * (of.each[:, None, :, None] == of.each[:, None, None])
        out = linear_read(mapped(fast, q, of), q, k, steps, seen, norm)
        if of is not None:
            steps = jnp.where(of.learnt()[:, None, :, None], steps, 0)
            fast = of.kept(fast, start)
        return stepped(fast, k, steps), out

    xs = tuple(chunked(x) for x in (q, k, v, rates_BxLxH)), documents
    fast, out = jax.lax.scan(one, start, xs)
    return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(B, L, H, K), fast
