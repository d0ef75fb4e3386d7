"""Fast weights: small models inside a layer that are trained on the sequence as it is read
(test-time training).

`swiglu_scan` is LaCT (Zhang et al. 2025, arXiv 2505.23884): a SwiGLU network, one update for a
large chunk, applied to a chunk before it is updated on it. `fdp.models.fast_linear` has TTT-Linear.

A device may hold a part of each chunk: `Sharing` then adds up devices BEFORE momentum and
orthogonalisation, as the latter is not linear.

The weights of every chunk are kept for the backward pass, or only those of every `group`-th one,
and what the others need is computed again.

Of a sequence that holds several documents, chunks stay where they are. A token reads the weights
that its own document has left, those before the first token where it began in this chunk, and the
last document of a chunk hands its weights on: each document is read as if it were alone.

Legend: B sequences, L positions of a device, H heads, K head dim (of keys and values), F hidden
width of the fast network, N chunks, C positions of a device in a chunk."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdp.collectives import vary_like
from fdp.kernels_pallas import newton_schulz

Array = jax.Array
Total = Callable[[Array], Array]


class FastWeights(NamedTuple):
    """Of f(x) = down (silu(gate x) * up x): gate, up [..., H, F, K], down [..., H, K, F]."""

    gate: Array
    up: Array
    down: Array


class Read(NamedTuple):
    """What the layer reads of each token: q, k, v [B, L, H, K], learning rates of (gate, up, down)
    f32 [B, L, H, 3], and momentum f32 [B, L, H] or None."""

    q: Array
    k: Array
    v: Array
    rates: Array
    momentum: Array | None = None


def apply(weights: FastWeights, q_BxHxCxK: Array) -> Array:
    """f(q): [B, H, C, K]."""
    gate = jnp.einsum("bhfk,bhck->bhcf", weights.gate, q_BxHxCxK)
    up = jnp.einsum("bhfk,bhck->bhcf", weights.up, q_BxHxCxK)
    return jnp.einsum("bhkf,bhcf->bhck", weights.down, jax.nn.silu(gate) * up)


def step(weights: FastWeights, k: Array, v: Array, rates_BxHxCx3: Array) -> FastWeights:
    """Minus the gradient of the loss -Σ ⟨f(k), v⟩ over the tokens of a chunk, each weighted by its
    rates."""
    gate = jnp.einsum("bhfk,bhck->bhcf", weights.gate, k)
    up = jnp.einsum("bhfk,bhck->bhcf", weights.up, k)
    back = jnp.einsum("bhkf,bhck->bhcf", weights.down, v)
    chance = jax.nn.sigmoid(gate)
    open_ = gate * chance
    for_gate, for_up, for_down = (rates_BxHxCx3[..., i, None] for i in range(3))
    slope = back * up * chance * (1 + gate * (1 - chance))
    return FastWeights(
        jnp.einsum("bhcf,bhck->bhfk", slope, for_gate * k),
        jnp.einsum("bhcf,bhck->bhfk", back * open_, for_up * k),
        jnp.einsum("bhck,bhcf->bhkf", v, for_down * open_ * up),
    )


def rescaled(w: Array, norms: Array) -> Array:
    """`w` with rows of the lengths `norms` [..., 1]."""
    return w * (norms * jax.lax.rsqrt(jnp.sum(w * w, -1, keepdims=True) + 1e-10))


def moved(w: Array, by: Array, norms: Array) -> Array:
    """`w + by` with rows of the lengths `norms` [..., 1], which those of `w` have. A row that `by`
    leaves where it is keeps its bits."""
    new = w + by
    scale = norms * jax.lax.rsqrt(jnp.sum(new * new, -1, keepdims=True) + 1e-10)
    return new * _or_one(scale, jnp.any(by != 0, -1, keepdims=True))


@jax.custom_jvp
def _or_one(scale: Array, where: Array) -> Array:
    """`scale`, and exactly 1 where not `where`: it is 1 up to rounding there, so its derivative
    stays."""
    return jnp.where(where, scale, 1)


@_or_one.defjvp
def _or_one_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    return _or_one(*primals), tangents[0]


def row_norms(w: Array) -> Array:
    """Lengths of the rows: [..., 1]."""
    return jnp.sqrt(jnp.sum(w * w, -1, keepdims=True))


@dataclass(frozen=True)
class Sharing:
    """How devices that hold parts of each chunk make one update of it.

    `total`: sums arrays over the devices; it may keep a share of the heads (dim 1). `spread`: from
    that share to all heads. `devices`: how many there are. `ends`: what the device with the end
    of each chunk has."""

    total: Total = lambda x: x
    spread: Total = lambda x: x
    devices: int = 1
    ends: Total = lambda x: x


ALONE = Sharing()


def learn(
    weights: FastWeights,
    velocity: FastWeights,
    gained: FastWeights,
    momentum_BxH: Array | None,
    norms: FastWeights | None,
    orthogonalise: Callable[[Array], Array] | None = None,
    spread: Total = ALONE.spread,
) -> tuple[FastWeights, FastWeights]:
    """(weights, velocity) after an update by `gained`, the summed `step` of a chunk, with what
    remains of the last velocity. `norms`: `row_norms` of the first weights; None: rows grow."""
    if momentum_BxH is not None:
        # Once: its gradient is summed over devices once, not for each matrix.
        kept = vary_like(momentum_BxH[..., None, None], velocity.gate)
        gained = FastWeights(*(g + kept * m for g, m in zip(gained, velocity, strict=True)))
    steps = gained if orthogonalise is None else map(orthogonalise, gained)
    steps = map(spread, steps)
    new = map(jnp.add, weights, steps) if norms is None else map(moved, weights, steps, norms)
    after = FastWeights(*map(vary_like, new, weights))
    return after, FastWeights(*(vary_like(g, m) for g, m in zip(gained, velocity, strict=True)))


class ChunkDocuments(NamedTuple):
    """Ids of the documents of a chunk: `each`, int [B, C], of its tokens; `before`, int [B], of the
    last token before the chunk; `last`, int [B], of its last token, on any device."""

    each: Array
    before: Array
    last: Array

    def earlier(self) -> Array:
        """Which tokens belong to the document that has left its weights: bool [B, C]."""
        return self.each == self.before[:, None]

    def learnt(self) -> Array:
        """Which tokens belong to the document that hands its weights on: bool [B, C]."""
        return self.each == self.last[:, None]

    def kept(self, carried: Any, first: Any) -> Any:
        """What the last document starts from: `carried`, or `first` where it began in the chunk."""
        same = self.before == self.last

        def one(x: Array, y: Array) -> Array:
            return jnp.where(same.reshape(-1, *[1] * (x.ndim - 1)), x, y)

        return jax.tree.map(one, carried, first)


def documents_of(
    segment_BxL: Array,
    chunk: int,
    updates: int,
    ends: Total = ALONE.ends,
    before_Bx1: Array | None = None,
) -> tuple[ChunkDocuments, Array]:
    """(documents of the first `updates` chunks, [N, …]; which of the tokens after them belong to
    the document that has left its weights, bool [B, …]). `before_Bx1`: the document that has left
    the weights with which the first chunk begins; None: those are the first ones, so any id is
    right. Other arguments as in `swiglu_scan` and `Sharing`."""
    B, cut = segment_BxL.shape[0], updates * chunk
    last_BxN = ends(segment_BxL[:, chunk - 1 : cut : chunk])
    before_Bx1 = last_BxN[:, :1] if before_Bx1 is None else before_Bx1
    before_BxN = jnp.concatenate([before_Bx1, last_BxN], 1)
    each = segment_BxL[:, :cut].reshape(B, updates, chunk)
    found = ChunkDocuments(each, before_BxN[:, :-1], last_BxN)
    found = ChunkDocuments(*(jnp.moveaxis(vary_like(x, segment_BxL), 1, 0) for x in found))
    return found, segment_BxL[:, cut:] == before_BxN[:, -1:]


def grouped_scan(step: Callable[..., Any], start: Any, xs: Any, group: int) -> tuple[Any, Any]:
    """`lax.scan(step, start, xs)` that keeps the carry of every `group`-th step for the backward
    pass, and computes a group of steps again there. 0: every step keeps all it needs."""
    if not group:
        return jax.lax.scan(step, start, xs)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a scan's body is not merged with others
    def steps(carry: Any, xs: Any) -> tuple[Any, Any]:
        return jax.lax.scan(step, carry, xs)

    def run(carry: Any, part: slice, size: int) -> tuple[Any, Any]:
        cut = jax.tree.map(lambda x: x[part].reshape(-1, size, *x.shape[1:]), xs)
        carry, out = jax.lax.scan(steps, carry, cut)
        return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), out)

    n, outs = jax.tree.leaves(xs)[0].shape[0], []
    rest = n % group
    if n >= group:
        start, out = run(start, slice(n - rest), group)
        outs.append(out)
    if rest:
        start, out = run(start, slice(n - rest, n), rest)
        outs.append(out)
    return start, jax.tree.map(lambda *ys: jnp.concatenate(ys), *outs)


def as_used(weights: FastWeights, norms: FastWeights | None) -> FastWeights:
    """The weights that are read: with rows of the lengths `norms`; None: as they are."""
    return weights if norms is None else FastWeights(*map(rescaled, weights, norms))


def swiglu_whole(
    read: Read,
    first: FastWeights,
    orthogonalise: Callable[[Array], Array] | None = None,
    sharing: Sharing = ALONE,
) -> Array:
    """As `swiglu_scan`, in both directions: one update on all tokens, with which all are read.
    Momentum has no last update to keep."""
    first = FastWeights(*(vary_like(w, read.k) for w in first))
    start = FastWeights(*(everywhere(w, read.k) for w in first))
    at = jax.tree.map(lambda x: jnp.moveaxis(x.astype(jnp.float32), 2, 1), read)
    gained = FastWeights(*map(sharing.total, step(start, at.k, at.v, at.rates)))
    norms = FastWeights(*map(row_norms, first))
    weights, _ = learn(start, gained, gained, None, norms, orthogonalise, sharing.spread)
    return jnp.moveaxis(apply(weights, at.q), 1, 2)


def swiglu_scan(
    read: Read,
    first: FastWeights,
    chunk: int,
    orthogonalise: Callable[[Array], Array] | None = None,
    sharing: Sharing = ALONE,
    group: int = 0,
    segment_BxL: Array | None = None,
    prenorm: bool = False,
) -> tuple[Array, FastWeights]:
    """(outputs f32 [B, L, H, K], the weights after the last chunk but one).

    `first`: [H, …], the weights before the first token. `chunk`: C, positions of THIS device in a
    chunk. Every chunk is read with the weights of the chunks before it; the last one, which may be
    shorter, is read only. `orthogonalise`: of each summed update, for example `orthogonal`
    (Muon). `group`: chunks, of `grouped_scan`. `segment_BxL`: ids of documents. `prenorm`: the
    weights that are kept grow, and rows of their first lengths are read and learnt from; otherwise
    those are kept."""
    B, L, H, K = read.k.shape
    updates = max(-(-L // chunk) - 1, 0)
    # Once: their gradients are summed over devices once, not after every chunk.
    first = FastWeights(*(vary_like(w, read.k) for w in first))
    norms = FastWeights(*(row_norms(w) for w in first))
    start = FastWeights(*(everywhere(w, read.k) for w in first))
    used = functools.partial(as_used, norms=norms if prenorm else None)
    new = used(start)
    shared = jax.eval_shape(lambda w: FastWeights(*map(sharing.total, w)), start)
    still = FastWeights(*(vary_like(jnp.zeros(w.shape), read.k) for w in shared))
    heads = jax.tree.map(lambda x: jnp.moveaxis(x.astype(jnp.float32), 2, 1), read)
    documents, earlier = None, None
    if segment_BxL is not None and updates:
        documents, earlier = documents_of(segment_BxL, chunk, updates, sharing.ends)

    def update(weights: FastWeights, velocity: FastWeights, at: Read) -> tuple[Any, Any]:
        gained = FastWeights(*map(sharing.total, step(used(weights), at.k, at.v, at.rates)))
        kept = None
        if at.momentum is not None:
            kept = sharing.total(at.momentum.sum(-1)) / (chunk * sharing.devices)
        lengths = None if prenorm else norms
        return learn(weights, velocity, gained, kept, lengths, orthogonalise, sharing.spread)

    def read_by(weights: FastWeights, q: Array, earlier: Array | None) -> Array:
        out = apply(used(weights), q)
        if earlier is None:
            return out
        return jnp.where(earlier[:, None, :, None], out, apply(new, q))

    def one(memory: tuple[Any, Any], at: tuple[Read, ChunkDocuments | None]) -> tuple[Any, Array]:
        (part, of), carried, earlier = at, memory, None
        if of is not None:
            # Momentum needs no mask: a document that began in this chunk has no velocity.
            rates = jnp.where(of.learnt()[:, None, :, None], part.rates, 0)
            part, carried = part._replace(rates=rates), of.kept(memory, (start, still))
            earlier = of.earlier()
        # The sum over devices does not read q: it may travel while the chunk is read.
        return update(*carried, part), read_by(memory[0], part.q, earlier)

    cut, parts, weights = updates * chunk, [], start
    if updates:

        def chunked(x: Array) -> Array:
            return jnp.moveaxis(x[:, :, :cut].reshape(B, H, updates, chunk, *x.shape[3:]), 2, 0)

        xs = jax.tree.map(chunked, heads), documents
        (weights, _), out = grouped_scan(one, (start, still), xs, group)
        parts.append(jnp.moveaxis(out, 0, 2).reshape(B, H, cut, K))
    parts.append(read_by(weights, heads.q[:, :, cut:], earlier))
    return jnp.moveaxis(jnp.concatenate(parts, 2), 1, 2), weights


def scan_memory(
    length: int,
    chunk: int,
    K: int,
    F: int,
    *,
    momentum: bool,
    orthogonalise: bool,
    group: int = 0,
    share: float = 1,
    documents: bool = False,
    prenorm: bool = False,
) -> tuple[float, float]:
    """Numbers of `swiglu_scan` for one head of one sequence: those that it keeps for its backward
    pass, and those of a group of chunks that is computed again there. A truth value is a quarter of
    a number; ids of documents, which heads share, are left out.

    `length`, `chunk`: positions of a device. `share`: of the heads, that it orthogonalises."""
    updates, weights = max(-(-length // chunk) - 1, 0), 3 * F * K
    normed = weights + 6 * F + 3 * K
    each = _update_memory(chunk, K, F, momentum, orthogonalise, share) + prenorm * normed
    rest = length - updates * chunk
    read: float = rest * (6 * F + K) + weights + prenorm * normed
    if documents and updates:
        memory = weights * (1 + momentum * share)
        each += chunk * 6 * F + weights + (memory + chunk * (3 + K)) / 4
        read += rest * (6 * F + K / 4) + memory + prenorm * normed
    if not group:
        return updates * each + read + 3 * chunk * (documents and updates > 0), 0
    kept = -(-updates // group) * (weights + momentum * int(share * weights))
    kept += updates * chunk * (3 * K + 3 + momentum)
    return kept + read, min(group, updates) * each


def whole_memory(
    length: int, K: int, F: int, orthogonalise: bool, share: float = 1
) -> tuple[float, float]:
    """As `scan_memory`, of `swiglu_whole`."""
    return _update_memory(length, K, F, False, orthogonalise, share) + 3 * F * K, 0


def _update_memory(
    chunk: int, K: int, F: int, momentum: bool, orthogonalise: bool, share: float
) -> float:
    """Numbers that a chunk keeps that is read and learnt from."""
    weights = 3 * F * K
    each: float = chunk * (20 * F + 5 * K + 3) + 2 * weights + 6 * F + 3 * K
    each += momentum * (int(share * weights) + 1)
    if orthogonalise:
        each += int(share * 3 * newton_schulz.kept(F, K))
    return each


def everywhere(w: Array, like: Array) -> Array:
    """Weights of every sequence of a batch: [B, …]."""
    batched = jnp.broadcast_to(w, (like.shape[0], *w.shape)).astype(jnp.float32)
    return vary_like(batched, like)
