"""TTT-Linear and TTT-MLP: a linear map, or two with GELU between them, that are trained on the
sequence as they read it (Sun et al. 2024, arXiv 2407.04620).

Legend: B sequences, L positions (local over cp), D width, H heads (local over tp), K head dim, M
and N inputs and outputs of a map."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import size
from fdp.count.counts import PERMUTE, Counts, Degrees, Ledger, Rows, Work
from fdp.models import fast_linear, fast_rows
from fdp.models.attention import Where
from fdp.models.fast_linear import FastLinear, Maps
from fdp.models.fast_rows import LinearMemory
from fdp.models.fast_weights import everywhere
from fdp.models.layers import normal, ones, zeros
from fdp.models.recurrent import StateLayer, by_head, check_rate
from fdp.models.shape import ModelShape
from fdp.parallel.context import state

Array = jax.Array


def linear_weights(
    layer: StateLayer, name: str, widths: Sequence[int]
) -> tuple[Maps, tuple[Array, Array]]:
    """(maps before the first token, scale and shift of the norm) of a fast network of every head:
    parameters of `layer`, the first map's under `name`. `widths`: K, those between the maps, K."""
    H, K, axes = layer.shape.heads, layer.shape.head_dim, ("tp", None)
    first = []
    for i, (M, N) in enumerate(itertools.pairwise(widths)):
        own = f"{name}_{i}" if i else name
        weight = layer.weight(own, normal(0.02), (H, M, N), (*axes, None), decay=False)
        bias = layer.weight(f"{own}_bias", zeros, (H, N), axes, decay=False)
        first.append(FastLinear(weight, bias))
    scale = layer.weight("norm_scale", ones, (H, K), axes, decay=False)
    return tuple(first), (scale, layer.weight("norm_shift", zeros, (H, K), axes, decay=False))


def linear_memory(first: Maps, like_BxLxHxK: Array) -> LinearMemory:
    """The memory of every sequence before the first token; `first`: the maps of every head."""
    every = jax.tree.map(lambda w: everywhere(w, like_BxLxHxK), first)
    return LinearMemory(every, every)


def no_linear_memory(
    shape: ModelShape, widths: Sequence[int], batch: int
) -> tuple[LinearMemory, Any]:
    """(zeros, PartitionSpecs) of such a memory: maps of a device's heads, twice."""
    H = shape.heads // size("tp")
    one = tuple(
        FastLinear(jnp.zeros((batch, H, m, n)), jnp.zeros((batch, H, n)))
        for m, n in itertools.pairwise(widths)
    )
    found = LinearMemory(one, one)
    return found, jax.tree.map(by_head, found)


def linear_work(
    shape: ModelShape, widths: Sequence[int], batch: int, rows: Rows, degrees: Degrees
) -> Counts:
    """Of the parameters of `linear_weights` and of `linear_scan` in mini-batches of `batch`, no
    bytes sent. Of every map three products with its weights and three inside the mini-batch, of
    which the mask's has one gradient; one with the weights of every map but the first for the steps
    before it. With documents, those that read weights also read the first ones."""
    H, K, dims = shape.heads, shape.head_dim, list(itertools.pairwise(widths))
    maps, later = sum(m * n for m, n in dims), sum(m * n for m, n in dims[1:])
    inside = 2 * batch * sum(m + n for m, n in dims)
    mask = rows.positions * H * 2 * batch * sum(widths[1:])
    read = (1 + rows.segments) * (4 * maps + 2 * later)
    flops = rows.positions * H * (read + 2 * maps + inside) + mask
    forward = Work(flops, batched=flops)
    backward = forward.backward({}) - Work(mask, batched=mask)
    heads = rows.batch * H // degrees["tp"]
    saved = fast_linear.scan_memory(rows.length, batch, widths, rows.segments)
    parameters = H * (maps + sum(widths[1:]) + 2 * K)
    return Counts(parameters, forward, backward, saved=4 * heads * saved // degrees["cp"])


class TTTLinear(StateLayer):
    """A linear map trained token by token in mini-batches of `chunk` (`fdp.models.fast_linear`).
    Its mini-batches depend on each other: over cp it shares out heads, or runs as a wavefront.

    `rate`: what a learned sigmoid is multiplied by for the step of a token. Published are 1 /
    head_dim, and for TTT-MLP 0.1 / head_dim, times 1 / i plus a learned number for the i-th token
    of a mini-batch, which is left out here."""

    rate: float = 1.0

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("heads", "wavefront")

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the fast network: its inputs, what is between its maps, its outputs."""
        return self.shape.head_dim, self.shape.head_dim

    def mix(self, q: Array, k: Array, v: Array, x_BxLxD: Array, where: Where) -> Array:
        first, norm = linear_weights(self, "fast", self.widths)
        rates = self.rate * jax.nn.sigmoid(self.head_scalars("w_state", x_BxLxD, 1)[..., 0])
        recalled = self.recalled(lambda: linear_memory(first, q), where)
        if recalled is not None:
            tokens = q, k, v, rates
            out, memory = fast_rows.linear_rows(tokens, *recalled, self.chunk, norm)
            self.cache("memory", memory)
            return out
        if self.plan.kind == "heads":
            first, norm = jax.tree.map(state.own_heads, (first, norm))
        segment = self.segments(where)

        def run(q: Array, k: Array, v: Array, rates: Array) -> Array:
            batch = min(self.chunk, q.shape[1])
            return fast_linear.linear_scan(q, k, v, rates, first, norm, batch, segment)[0]

        if self.plan.kind == "wavefront" and size("cp") > 1:
            parts = [q, k, v, rates]
            if segment is not None:  # pieces are of sequences and heads, so every head has ids
                ids = jnp.concatenate([self.previous(segment), segment], 1)
                parts.append(jnp.repeat(ids[..., None], q.shape[2], 2))
            return state.wavefront(self._piece, self.plan.pieces, first, norm, *parts)
        return state.by_heads(run, self.plan.layout, q, k, v, rates)

    def _piece(self, arrived: Maps, first: Maps, norm: Any, *tokens: Array) -> tuple[Array, Maps]:
        """Of pairs of a sequence and a head, whose tokens are [1, L, G, …]; ids of documents, where
        there are any, come last, after that of the document before."""

        def of_pair(weights: Any, *tokens: Array) -> tuple[Array, Maps]:
            arrived, first, norm = jax.tree.map(lambda w: w[None], weights)
            q, k, v, rates = (x[:, :, None] for x in tokens[:4])
            segment, before = (tokens[4][:, 1:], tokens[4][:, :1]) if tokens[4:] else (None, None)
            out, last = fast_linear.linear_scan(
                q, k, v, rates, first, norm, self.chunk, segment, before, arrived
            )
            return out[:, :, 0], jax.tree.map(lambda w: w[0, 0], last)

        each = jax.vmap(of_pair, (0, *[2] * len(tokens)), (2, 0))
        return each((arrived, first, norm), *tokens)

    def memory(self, batch: int) -> tuple[Any, Any]:
        """Maps of every head, twice."""
        return no_linear_memory(self.shape, self.widths, batch)

    def handed_on(self, memory: Any) -> Any:
        """Map and bias at the start of the mini-batch."""
        return memory.start

    def check(self, batch: int, length: int, degrees: Mapping[str, int]) -> None:
        """As of all layers with a state; raises ValueError for a length that is not whole
        mini-batches and for a negative `rate`, too."""
        check_rate(self.rate)
        if length % min(self.chunk, length):
            raise ValueError(
                f"{length} tokens are not divisible by mini-batches of {self.chunk}: set "
                f"data.seq_len={-(-length // self.chunk) * self.chunk}"
            )
        super().check(batch, length, degrees)

    def work(self, rows: Rows, degrees: Degrees) -> Counts:
        """Those of `linear_work`. A wavefront hands on weights in every tick, and computes in all
        of them."""
        batch = min(self.chunk, rows.length)
        own = linear_work(self.shape, self.widths, batch, rows, degrees)
        sent, again, saved = self.exchange(1, rows, degrees), Work(), own.saved
        once = self.ids(rows, degrees)
        if self.plan.kind == "wavefront" and degrees["cp"] > 1:
            ticks, m = self.plan.ticks(degrees["cp"]), self.plan.pieces
            heads = rows.batch * self.shape.heads // degrees["tp"]
            maps = sum((k + 1) * n for k, n in itertools.pairwise(self.widths))
            wire = 4 * heads // m * ticks * maps
            sent = Ledger(degrees).put(PERMUTE, ("cp",), wire).sent
            idle = (own.forward.flops + own.backward.flops) * (ticks - m) // m
            again, saved = Work(idle, batched=idle), saved * ticks // m
            once = self.halo_of_ids(rows, degrees)
        own = replace(
            own,
            forward=replace(own.forward, sent=sent),
            backward=replace(own.backward, sent=sent),
            again=again,
            once=once,
            saved=saved,
        )
        return own + self.scalars(1, rows)


class TTTMLP(TTTLinear):
    """TTT-Linear with a network of two maps, f(x) = GELU(x W1 + b1) W2 + b2, in place of one.
    `hidden`: its width over the head dim. Its base rate is a tenth of the other's, as published:
    at 1, small models recall next to nothing."""

    hidden: int = 4
    rate: float = 0.1

    @property
    def widths(self) -> tuple[int, ...]:
        K = self.shape.head_dim
        return K, self.hidden * K, K
