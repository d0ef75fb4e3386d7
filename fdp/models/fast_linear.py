"""Fast linear maps, one or several with GELU between them: TTT-Linear and TTT-MLP (Sun et al. 2024,
arXiv 2407.04620, section 2), gradient descent on every token of a small mini-batch from the weights
at its start, in the dual form.

Of every map z = x W + bias, a token's step is its rate times the gradient at z. What is read after
some steps is x W + bias - Σ (x · x' + 1) step over the tokens whose steps have been taken, x' their
inputs: no weights of single tokens are made. Documents of a sequence are read as
`fdp.models.fast_weights` says.

Legend: B sequences, L positions, H heads, K head dim, M and N inputs and outputs of a map, C
positions of a mini-batch."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdp.models.fast_weights import ChunkDocuments, documents_of, everywhere

Array = jax.Array
gelu = jax.nn.gelu  # by tanh, as published


class FastLinear(NamedTuple):
    """The linear fast model z = x W + bias: weight [..., H, M, N], bias [..., H, N]."""

    weight: Array
    bias: Array


Maps = tuple[FastLinear, ...]  # of a network, in order
# What a function of a map and of [B, H, C, …] gives for the map that each token finds.
Use = Callable[[Callable[[FastLinear, Array], Array], int, Array], Array]


def norm_of_heads(norm_HxK: tuple[Array, Array]) -> tuple[Array, Array]:
    """Scale and shift as `maps_steps` and `maps_read` take them."""
    scale, shift = (x[:, None].astype(jnp.float32) for x in norm_HxK)
    return scale, shift


def normed(z: Array, scale: Array, shift: Array) -> Array:
    """Layer norm over the last dim."""
    centred = z - z.mean(-1, keepdims=True)
    return scale * centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6) + shift


def linear(fast: FastLinear, x_BxHxCxM: Array) -> Array:
    """x W + bias."""
    return x_BxHxCxM @ fast.weight + fast.bias[:, :, None]


def back(fast: FastLinear, gradient_BxHxCxN: Array) -> Array:
    """The gradient at x of one at `linear`."""
    return jnp.einsum("bhcn,bhmn->bhcm", gradient_BxHxCxN, fast.weight)


def of(maps: Maps) -> Use:
    """All tokens find `maps`."""
    return lambda function, i, x: function(maps[i], x)


def maps_steps(
    use: Use, depth: int, k: Array, v: Array, rates_BxHxC: Array, norm: tuple
) -> tuple[list[Array], list[Array]]:
    """(inputs, steps of every token of a mini-batch) of each of `depth` maps. A step is the token's
    rate times the gradient of the loss ½ |LN(f(k)) - (v - k)|². k, v: [B, H, C, K]; `norm`: scale
    and shift of LN, [H, 1, K] each."""

    def loss(z: Array) -> Array:
        return 0.5 * jnp.sum((normed(z, *norm) - (v - k)) ** 2)

    inputs, z = [k], use(linear, 0, k)
    slopes: list[Callable[[Array], tuple[Array]]] = []
    for i in range(1, depth):
        x, slope = jax.vjp(gelu, z)
        inputs, slopes, z = [*inputs, x], [*slopes, slope], use(linear, i, x)
    steps = [rates_BxHxC[..., None] * jax.grad(loss)(z)]
    for i in range(depth - 1, 0, -1):
        steps = [*slopes[i - 1](use(back, i, steps[0])), *steps]
    return inputs, steps


def maps_read(
    use: Use, q: Array, inputs: list[Array], steps: list[Array], seen_CxC: Array, norm: tuple
) -> Array:
    """What `q` reads after those steps that `seen` [..., C, C] names for each token; what `use`
    finds is before them."""
    x = q
    for i, (learnt, step) in enumerate(zip(inputs, steps, strict=True)):
        x = gelu(x) if i else x
        alike = jnp.einsum("bhcm,bhdm->bhcd", x, learnt)
        x = use(linear, i, x) - (seen_CxC * alike) @ step - seen_CxC @ step
    return q + normed(x, *norm)


def stepped(maps: Maps, inputs: list[Array], steps: list[Array]) -> Maps:
    """The maps after the `steps` of all tokens with these `inputs`."""
    return tuple(
        FastLinear(fast.weight - jnp.einsum("bhcm,bhcn->bhmn", x, step), fast.bias - step.sum(2))
        for fast, x, step in zip(maps, inputs, steps, strict=True)
    )


def linear_scan(
    q: Array,
    k: Array,
    v: Array,
    rates_BxLxH: Array,
    first: Maps,
    norm: tuple,
    batch: int,
    segment_BxL: Array | None = None,
    before_Bx1: Array | None = None,
    arrived: Maps | None = None,
) -> tuple[Array, Maps]:
    """(outputs f32 [B, L, H, K], the maps after the last token) of TTT-Linear and TTT-MLP.

    The loss of a token is ½ |LN(f(k)) - (v - k)|², with LN of scale and shift `norm`, [H, K] each.
    Each token of a mini-batch takes its own step from the weights at the start of the mini-batch:
    output t, t's q + LN(f(q)), has seen the steps of the mini-batch up to t, and of its own
    document. `rates_BxLxH`: step sizes. `first`: the maps f before the first token, [H, …].
    `segment_BxL`: ids of documents. `arrived`: the maps, [H, …], that the document `before_Bx1` has
    left before these positions; None: `first`."""
    B, L, H, K = k.shape
    norm = norm_of_heads(norm)
    start = jax.tree.map(lambda w: everywhere(w, k), first)
    begun = start if arrived is None else jax.tree.map(lambda w: everywhere(w, k), arrived)
    documents = None
    if segment_BxL is not None:
        documents, _ = documents_of(segment_BxL, batch, L // batch, before_Bx1=before_Bx1)

    def chunked(x: Array) -> Array:  # [B, L, H, …] → [N, B, H, C, …]
        x = x.astype(jnp.float32).reshape(B, L // batch, batch, H, *x.shape[3:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    past = jnp.tril(jnp.ones((batch, batch)))
    # The backward pass keeps products, and computes what is between them again.
    keep = jax.checkpoint_policies.dots_saveable

    def found(maps: Maps, document: ChunkDocuments | None) -> Use:
        if document is None:
            return of(maps)
        old = document.earlier()[:, None, :, None]
        return lambda function, i, x: jnp.where(old, function(maps[i], x), function(start[i], x))

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=keep)
    def one(maps: Maps, at: tuple[tuple, ChunkDocuments | None]) -> tuple[Maps, Array]:
        (q, k, v, rates), document = at
        use, seen = found(maps, document), past
        inputs, steps = maps_steps(use, len(maps), k, v, rates, norm)
        if document is not None:
            seen = past * (document.each[:, None, :, None] == document.each[:, None, None])
        out = maps_read(use, q, inputs, steps, seen, norm)
        if document is not None:
            learnt = document.learnt()[:, None, :, None]
            steps = [jnp.where(learnt, step, 0) for step in steps]
            maps = document.kept(maps, start)
        return stepped(maps, inputs, steps), out

    xs = tuple(chunked(x) for x in (q, k, v, rates_BxLxH)), documents
    maps, out = jax.lax.scan(one, begun, xs)
    return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(B, L, H, K), maps


def scan_memory(length: int, batch: int, widths: Sequence[int], documents: bool = False) -> int:
    """Numbers that `linear_scan` keeps of one head of one sequence of `length` for its backward
    pass. `widths`: K, those between the maps, K. Left out is what heads share: ids of documents,
    the norm, a mask."""
    dims = list(itertools.pairwise(widths))
    maps, later = sum(m * n + n for m, n in dims), sum(widths[1:-1])
    products = (6 if documents else 4) * sum(widths[1:]) + (2 if documents else 1) * later
    each = 3 * widths[0] + 1 + products + batch * len(dims)
    return length * each + (length // batch + documents) * maps
