"""Layers that train a small model on the sequence as they read it (test-time training): LaCT and
TTT-Linear.

Legend: B sequences, L positions (local over cp), D width, H heads (local over tp), K head dim, F
hidden width of a fast network."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fdp.collectives import psum, size
from fdp.count.counts import (
    EXCHANGE,
    GATHER,
    PERMUTE,
    REDUCE,
    SCATTER,
    Counts,
    Degrees,
    Ledger,
    Rows,
    Sent,
    Work,
    merged,
)
from fdp.mesh import BATCH_AXES
from fdp.models import fast_rows, fast_weights
from fdp.models.attention import Where
from fdp.models.fast_rows import LinearMemory
from fdp.models.fast_weights import FastLinear, FastWeights, Read, Sharing
from fdp.models.layers import normal, ones, rotary, zeros
from fdp.models.recurrent import StateLayer, softplus_inverse
from fdp.models.shape import ModelShape
from fdp.parallel.context import state

Array = jax.Array


class LaCT(StateLayer):
    """A fast SwiGLU network trained on large chunks (`fdp.models.fast_weights`). `hidden`: F over
    K. `rate`: of its training, before the model's own. `muon`: whether updates are orthogonalised.
    `rotate`: whether queries and keys are rotated by their positions after their norm. `group`: the
    backward pass computes so many chunks again from the weights before them; 0: it keeps what it
    needs of every chunk."""

    hidden: int = 2
    rate: float = 1e-3
    rotate: bool = True
    muon: bool = False
    momentum: bool = True
    group: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("tokens", "tokens+ns", "heads", "heads+tokens")

    def mix(self, q: Array, k: Array, v: Array, x_BxLxD: Array, where: Where) -> Array:
        s = self.shape
        H, K, F = s.heads, s.head_dim, s.head_dim * self.hidden
        axes = ("tp", None, None)
        first = FastWeights(
            self.weight("fast_gate", normal(K**-0.5), (H, F, K), axes, decay=False),
            self.weight("fast_up", normal(K**-0.5), (H, F, K), axes, decay=False),
            self.weight("fast_down", normal(F**-0.5), (H, K, F), axes, decay=False),
        )
        found = self.head_scalars("w_state", x_BxLxD, 4)
        rates = jax.nn.softplus(found[..., :3] + softplus_inverse(self.rate))
        momentum = jax.nn.sigmoid(found[..., 3])
        if self.rotate and where.segment is not None:
            raise ValueError(
                "LaCT with rotate=True turns keys by their place in the row, and what its network "
                "makes of them depends on it, so a document would depend on where it lies: set "
                "rotate=False, or data.packing=stream"
            )
        if self.rotate and where.position is not None:
            q, k = (rotary(x, where.position, s.rope_base, s.rope_scaling) for x in (q, k))
        tokens = (q, k, v, rates) + ((momentum,) if self.momentum else ())
        recalled = self.recalled(lambda: self._before(first, q), where)
        if recalled is not None:
            norms = FastWeights(*map(fast_weights.row_norms, first))
            read, polish = Read(*tokens), fast_weights.orthogonal if self.muon else None
            out, memory = fast_rows.swiglu_rows(read, *recalled, self.chunk, norms, polish)
            self.cache("memory", memory)
            return out
        outer, inner = self.plan.axes()
        parts, ends = size(outer), functools.partial(state.of_the_last, among=outer)
        sharing = Sharing(lambda x: psum(x, outer), devices=parts, ends=ends)
        if self.plan.kind == "tokens+ns":
            sharing = Sharing(state.gather_heads, state.spread_heads, parts, ends)
        first = FastWeights(*(state.own_heads(w, inner) for w in first))
        segment = self.segments(where)
        run = functools.partial(self._scan, first, self.chunk // parts, sharing, segment)
        return state.by_heads(run, self.plan.layout, *tokens, among=inner)

    def _before(self, first: FastWeights, like: Array) -> fast_rows.SwigluMemory:
        """The memory before the first token."""
        every = FastWeights(*(fast_weights.everywhere(w, like) for w in first))
        return fast_rows.swiglu_memory(every, self.momentum)

    def memory(self, batch: int) -> tuple[Any, Any]:
        """Weights, velocity and steps so far of every head."""
        H, K = self.shape.heads // size("tp"), self.shape.head_dim
        F = K * self.hidden
        up, down = jnp.zeros((batch, H, F, K)), jnp.zeros((batch, H, K, F))
        found = fast_rows.swiglu_memory(FastWeights(up, up, down), self.momentum)
        return found, jax.tree.map(_by_head, found)

    def check(self, batch: int, length: int, degrees: Mapping[str, int]) -> None:
        """As of all layers with a state; raises ValueError for a negative `group`, too."""
        if self.group < 0:
            raise ValueError(
                f"group = {self.group} chunks to compute again: set 0, which keeps all, or more"
            )
        super().check(batch, length, degrees)

    def work(self, rows: Rows, degrees: Degrees) -> Counts:
        """Reading a chunk is three products, an update six more; the last chunk is only read. With
        documents, all is also read with the first weights. Over cp, heads are exchanged, or every
        update is summed, its gradient too, or both."""
        s, cp, tp = self.shape, degrees["cp"], degrees["tp"]
        H, K, F = s.heads, s.head_dim, s.head_dim * self.hidden
        updates = max(-(-rows.length // self.chunk) - 1, 0)
        reads = 2 if rows.segments and updates else 1
        flops = 6 * F * K * H * (reads * rows.positions + 2 * rows.batch * updates * self.chunk)
        polish = 0
        if self.muon:
            few, many = sorted((K, F))
            polish = 15 * rows.batch * H * updates * (4 * few * few * many + 2 * few**3)
        forward = Work(flops + polish, batched=flops + polish)
        heads = rows.batch * H // tp
        sent, ways = self._sent(updates, heads, rows, degrees), self.plan.ways(cp)
        # The devices that share out a chunk all orthogonalise the whole sum.
        alike = 1 if self.plan.kind == "tokens+ns" else cp // ways
        again = Work(3 * polish * (alike - 1), batched=3 * polish * (alike - 1))
        if self.group:
            again += self._again(rows.batch * H * updates, polish * alike, reads, sent[0])
        forward, backward = replace(forward, sent=sent[0]), forward.backward(sent[1])
        kept = self._kept(rows.length, cp, rows.segments)
        saved, live = (int(4 * heads // ways * x) for x in kept)
        own = Counts(
            3 * H * F * K,
            forward,
            backward,
            again=again,
            once=self._ids(updates, rows, degrees),
            saved=saved,
            live=live,
        )
        return own + self.scalars(4, rows)

    def _ids(self, updates: int, rows: Rows, degrees: Degrees) -> Sent:
        """Bytes of ids of documents: those of `segments`, and the last one of each chunk."""
        parts = degrees["cp"] // self.plan.ways(degrees["cp"])
        ends = 4 * rows.batch * updates if rows.segments else 0
        last = Ledger(degrees).put(REDUCE, ("cp",), ends * 2 * (parts - 1) / parts).sent
        return merged(self.ids(rows, degrees), last)

    def _again(self, updates: int, polish: int, reads: int, sent: Sent) -> Work:
        """What groups compute again: all of `updates` but the last product of each of the `reads`.
        The exchange of heads is outside them."""
        F, K = self.shape.head_dim * self.hidden, self.shape.head_dim
        flops = (12 + 4 * reads) * F * K * updates * self.chunk + polish
        inside = {key: wire for key, wire in sent.items() if key[0] != EXCHANGE}
        return Work(flops, batched=flops, sent=inside)

    def _kept(self, length: int, cp: int, documents: bool) -> tuple[float, float]:
        """Numbers that a head of a sequence of `length` keeps on a device that has it: for the
        backward pass, and of a group."""
        K, parts = self.shape.head_dim, cp // self.plan.ways(cp)
        return fast_weights.scan_memory(
            length // parts,
            self.chunk // parts,
            K,
            K * self.hidden,
            momentum=self.momentum,
            orthogonalise=self.muon,
            group=self.group,
            share=1 / cp if self.plan.kind == "tokens+ns" else 1,
            documents=documents,
        )

    def _sent(self, updates: int, heads: int, rows: Rows, degrees: Degrees) -> tuple[Sent, Sent]:
        """Bytes over cp, (forward, backward)."""
        weights = 3 * heads * self.shape.head_dim**2 * self.hidden * 4
        momentum, cp = 4 * heads * self.momentum, degrees["cp"]
        there, back = Ledger(degrees), Ledger(degrees)
        if self.plan.kind == "tokens+ns":
            there.add(SCATTER, ("cp",), (weights + momentum) / cp, updates)
            there.add(GATHER, ("cp",), weights / cp, updates)
            back.add(GATHER, ("cp",), (weights + momentum) / cp, updates)
            return there.sent, back.add(SCATTER, ("cp",), weights / cp, updates).sent
        exchanged, ways = self.exchange(3 + self.momentum, rows, degrees), self.plan.ways(cp)
        parts = cp // ways
        summed = updates * (weights + momentum) / ways * 2 * (parts - 1) / parts
        sums = there.put(REDUCE, ("cp",), summed).sent
        return merged(exchanged, sums), merged(exchanged, sums)

    def _scan(
        self,
        first: FastWeights,
        chunk: int,
        sharing: Sharing,
        segment: Array | None,
        *tokens: Array,
    ) -> Array:
        orthogonalise = fast_weights.orthogonal if self.muon else None
        return fast_weights.swiglu_scan(
            Read(*tokens), first, chunk, orthogonalise, sharing, self.group, segment
        )[0]


def linear_weights(layer: StateLayer, name: str) -> tuple[FastLinear, tuple[Array, Array]]:
    """(map and bias before the first token, scale and shift of the norm) of a fast linear map of
    every head: parameters of `layer`, the first two under `name`."""
    H, K = layer.shape.heads, layer.shape.head_dim
    axes = ("tp", None)
    first = FastLinear(
        layer.weight(name, normal(0.02), (H, K, K), ("tp", None, None), decay=False),
        layer.weight(f"{name}_bias", zeros, (H, K), axes, decay=False),
    )
    scale = layer.weight("norm_scale", ones, (H, K), axes, decay=False)
    return first, (scale, layer.weight("norm_shift", zeros, (H, K), axes, decay=False))


def linear_work(shape: ModelShape, batch: int, rows: Rows, degrees: Degrees) -> Counts:
    """Of the parameters of `linear_weights` and of `linear_scan` in mini-batches of `batch`, no
    bytes sent: three products with the weights and three inside the mini-batch, of which the mask's
    has one gradient. With documents, two more with the first weights."""
    H, K = shape.heads, shape.head_dim
    flops, mask = rows.positions * H * 6 * K * (batch + K), rows.positions * H * 2 * batch * K
    flops += rows.positions * H * 4 * K * K * rows.segments
    forward = Work(flops, batched=flops)
    backward = forward.backward({}) - Work(mask, batched=mask)
    heads = rows.batch * H // degrees["tp"]
    starts = rows.length // batch * (1 + rows.segments)  # weights: carried, and begun from
    saved = 4 * heads * (starts * K * K + rows.length * (8 * K + batch)) // degrees["cp"]
    return Counts(H * K * (K + 3), forward, backward, saved=saved)


class TTTLinear(StateLayer):
    """A linear map trained token by token in mini-batches of `chunk` (`fdp.models.fast_weights`).
    The step of a token is a learned sigmoid; the paper's is head_dim times smaller at first.
    Its mini-batches depend on each other: over cp it shares out heads, or runs as a wavefront."""

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("heads", "wavefront")

    def mix(self, q: Array, k: Array, v: Array, x_BxLxD: Array, where: Where) -> Array:
        first, norm = linear_weights(self, "fast")
        rates = jax.nn.sigmoid(self.head_scalars("w_state", x_BxLxD, 1)[..., 0])

        def before() -> LinearMemory:
            every = FastLinear(*(fast_weights.everywhere(w, q) for w in first))
            return LinearMemory(every, every)

        recalled = self.recalled(before, where)
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
            return fast_weights.linear_scan(q, k, v, rates, first, norm, batch, segment)[0]

        if self.plan.kind == "wavefront" and size("cp") > 1:
            if segment is not None:
                raise ValueError(
                    f"plan wavefront hands on the weights of one document, and cp = {size('cp')} "
                    "devices hold parts of many: use plan heads, or set data.packing=stream"
                )
            return state.wavefront(self._piece, self.plan.pieces, first, norm, q, k, v, rates)
        return state.by_heads(run, self.plan.layout, q, k, v, rates)

    def _piece(
        self, first: FastLinear, norm: Any, q: Array, k: Array, v: Array, rates: Array
    ) -> tuple[Array, FastLinear]:
        out, last = fast_weights.linear_scan(q, k, v, rates, first, norm, self.chunk)
        return out, FastLinear(*(w[0] for w in last))

    def memory(self, batch: int) -> tuple[Any, Any]:
        """Map and bias of every head, twice."""
        H, K = self.shape.heads // size("tp"), self.shape.head_dim
        one = FastLinear(jnp.zeros((batch, H, K, K)), jnp.zeros((batch, H, K)))
        found = LinearMemory(one, one)
        return found, jax.tree.map(_by_head, found)

    def check(self, batch: int, length: int, degrees: Mapping[str, int]) -> None:
        """As of all layers with a state; raises ValueError for a length that is not whole
        mini-batches, too."""
        if length % min(self.chunk, length):
            raise ValueError(
                f"{length} tokens are not divisible by mini-batches of {self.chunk}: set "
                f"data.seq_len={-(-length // self.chunk) * self.chunk}"
            )
        super().check(batch, length, degrees)

    def work(self, rows: Rows, degrees: Degrees) -> Counts:
        """Those of `linear_work`. A wavefront hands on weights in every tick, and computes in all
        of them."""
        own = linear_work(self.shape, min(self.chunk, rows.length), rows, degrees)
        sent, again, saved = self.exchange(1, rows, degrees), Work(), own.saved
        if self.plan.kind == "wavefront" and degrees["cp"] > 1:
            ticks, m = self.plan.ticks(degrees["cp"]), self.plan.pieces
            heads, K = rows.batch * self.shape.heads // degrees["tp"], self.shape.head_dim
            wire = 4 * heads // m * ticks * K * (K + 1)
            sent = Ledger(degrees).put(PERMUTE, ("cp",), wire).sent
            idle = (own.forward.flops + own.backward.flops) * (ticks - m) // m
            again, saved = Work(idle, batched=idle), saved * ticks // m
        own = replace(
            own,
            forward=replace(own.forward, sent=sent),
            backward=replace(own.backward, sent=sent),
            again=again,
            once=self.ids(rows, degrees),
            saved=saved,
        )
        return own + self.scalars(1, rows)


def _by_head(x_BxH: Array) -> PartitionSpec:
    return PartitionSpec(BATCH_AXES, "tp", *[None] * (x_BxH.ndim - 2))
