"""LaCT: a fast SwiGLU network that is trained on large chunks of the sequence as it reads them
(Zhang et al. 2025, arXiv 2505.23884).

Legend: B sequences, L positions (local over cp), D width, H heads (local over tp), K head dim, F
hidden width of the fast network."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import psum, size
from fdp.count.counts import (
    EXCHANGE,
    GATHER,
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
from fdp.kernels_pallas import newton_schulz
from fdp.kernels_pallas.newton_schulz import orthogonal
from fdp.models import fast_rows, fast_weights
from fdp.models.attention import Where
from fdp.models.fast_weights import FastWeights, Read, Sharing
from fdp.models.layers import normal, rotary
from fdp.models.module import CACHE
from fdp.models.recurrent import StateLayer, by_head, check_rate, softplus_inverse
from fdp.models.window import WindowAttention
from fdp.parallel.context import state

Array = jax.Array


class LaCT(StateLayer):
    """A fast SwiGLU network trained on large chunks (`fdp.models.fast_weights`). `hidden`: F over
    K. `rate`: of its training, before the model's own. `muon`: whether updates are orthogonalised.
    `rotate`: whether queries and keys are rotated by their positions after their norm. `group`: the
    backward pass computes so many chunks again from the weights before them; 0: it keeps what it
    needs of every chunk. `window`: tokens of a window of attention in the same layer; 0: none.
    `prenorm`: weights are normed before they are used, not after they are updated.
    `causal=False`: one update on all tokens before all are read, whatever `chunk`, `group` and
    `momentum`; for models that see both sides.

    As in the published layer, window and fast network share queries, keys and values, and the
    output projection; the window's output is added to the normed read. There, both norm queries and
    keys alike, and the fast network scales and shifts their channels; here, the window norms them
    by head with scales of its own, and the fast network takes them at length 1. There, SiLU of a
    projection may scale the read of a head; here, `gate` scales every channel."""

    hidden: int = 2
    rate: float = 1e-3
    rotate: bool = True
    muon: bool = False
    momentum: bool = True
    group: int = 0
    window: int = 0
    prenorm: bool = False
    causal: bool = True

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
        if not self.causal:
            self._check_whole(where)
        if self.rotate and where.segment is not None:
            raise ValueError(
                "LaCT with rotate=True turns keys by their place in the row, and what its network "
                "makes of them depends on it, so a document would depend on where it lies: set "
                "rotate=False, or data.packing=stream"
            )
        if self.rotate and where.position is not None:
            q, k = (rotary(x, where.position, s.rope_base, s.rope_scaling) for x in (q, k))
        tokens = (q, k, v, rates) + ((momentum,) if self._momentum else ())
        recalled = self.recalled(lambda: self._before(first, q), where)
        if recalled is not None:
            norms = FastWeights(*map(fast_weights.row_norms, first))
            read, polish = Read(*tokens), orthogonal if self.muon else None
            out, memory = fast_rows.swiglu_rows(
                read, *recalled, self.chunk, norms, polish, self.prenorm
            )
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

    def beside(self, q: Array, k: Array, v: Array, where: Where) -> Array | None:
        """The window's output."""
        if not self.window:
            return None
        of = self.shape, self.plan, self.window, self.causal
        return WindowAttention(*of, name="window")(q, k, v, where)

    def _window(self) -> WindowAttention:
        return WindowAttention(self.shape, self.plan, self.window, self.causal, parent=None)

    @property
    def shared_chunk(self) -> int:
        """As of all layers with a state; an update on all tokens has no chunks."""
        return self.chunk if self.causal else 0

    @property
    def _momentum(self) -> bool:
        """One update has no last one."""
        return self.momentum and self.causal

    def _updates(self, length: int) -> tuple[int, int]:
        """(updates of a sequence of `length`, positions of each)."""
        return (max(-(-length // self.chunk) - 1, 0), self.chunk) if self.causal else (1, length)

    def _check_whole(self, where: Where) -> None:
        if where.segment is not None:
            raise ValueError(
                "LaCT with causal=False makes one update on a whole sequence, and these rows hold "
                "documents: set data.packing=stream, or causal=True"
            )
        decodes = self.is_mutable_collection(CACHE) and not self.is_initializing()
        if decodes or where.index.ndim == 2:
            raise ValueError(
                "LaCT with causal=False learns from later tokens before it reads, so nothing can "
                "be kept for decoding: sample without a cache, or set causal=True"
            )

    def _before(self, first: FastWeights, like: Array) -> fast_rows.SwigluMemory:
        """The memory before the first token."""
        every = FastWeights(*(fast_weights.everywhere(w, like) for w in first))
        return fast_rows.swiglu_memory(every, self._momentum)

    def memory(self, batch: int) -> tuple[Any, Any]:
        """Weights, velocity and steps so far of every head."""
        H, K = self.shape.heads // size("tp"), self.shape.head_dim
        F = K * self.hidden
        up, down = jnp.zeros((batch, H, F, K)), jnp.zeros((batch, H, K, F))
        found = fast_rows.swiglu_memory(FastWeights(up, up, down), self._momentum)
        return found, jax.tree.map(by_head, found)

    def handed_on(self, memory: Any) -> Any:
        """Weights and velocity."""
        return memory.weights, memory.velocity

    def decode_state(self, batch: int, length: int) -> tuple[Any, Any]:
        """As of all layers with a state, and the keys and values of the window."""
        found, specs = super().decode_state(batch, length)
        if self.window:
            found["window"], specs["window"] = self._window().decode_state(batch)
        return found, specs

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """As of all layers with a state, and those of the window."""
        found = super().counts(rows, degrees)
        if not self.window:
            return found
        near = self._window().counts(rows, degrees)
        if self.plan.head_split > 1:  # ids of the neighbours for the state, of all for the window
            near = replace(near, once=merged(near.once, self.ids(rows, degrees)))
        return found + near

    def check(self, batch: int, length: int, degrees: Mapping[str, int]) -> None:
        """As of all layers with a state; raises ValueError for a negative `rate` or `group` and for
        a window that is negative or longer than the sequence, too."""
        check_rate(self.rate)
        if self.window:
            self._window().check(batch, length, degrees)
        if self.group < 0:
            raise ValueError(
                f"group = {self.group} chunks to compute again: set 0, which keeps all, or more"
            )
        super().check(batch, length, degrees)

    def work(self, rows: Rows, degrees: Degrees) -> Counts:
        """Reading a chunk is three products, an update six more; the last chunk is only read, where
        there are several. With documents, all is also read with the first weights. Over cp, heads
        are exchanged, or every update is summed, its gradient too, or both."""
        s, cp, tp = self.shape, degrees["cp"], degrees["tp"]
        H, K, F = s.heads, s.head_dim, s.head_dim * self.hidden
        updates, chunk = self._updates(rows.length)
        reads = 2 if rows.segments and updates else 1
        flops = 6 * F * K * H * (reads * rows.positions + 2 * rows.batch * updates * chunk)
        polish = retaken = 0
        if self.muon:
            matrices = 3 * rows.batch * H * updates
            polish, retaken = (matrices * each for each in newton_schulz.flops(K, F))
        forward = Work(flops + polish, batched=flops + polish)
        heads = rows.batch * H // tp
        sent, ways = self._sent(updates, heads, rows, degrees), self.plan.ways(cp)
        # The devices that share out a chunk all orthogonalise the whole sum.
        alike = 1 if self.plan.kind == "tokens+ns" else cp // ways
        more = 3 * polish * (alike - 1) + retaken * alike
        again = Work(more, batched=more)
        if self.group and self.causal:
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
        F, share = K * self.hidden, 1 / cp if self.plan.kind == "tokens+ns" else 1
        if not self.causal:
            return fast_weights.whole_memory(length // parts, K, F, self.muon, share)
        return fast_weights.scan_memory(
            length // parts,
            self.chunk // parts,
            K,
            F,
            momentum=self.momentum,
            orthogonalise=self.muon,
            group=self.group,
            share=share,
            documents=documents,
            prenorm=self.prenorm,
        )

    def _sent(self, updates: int, heads: int, rows: Rows, degrees: Degrees) -> tuple[Sent, Sent]:
        """Bytes over cp, (forward, backward)."""
        weights = 3 * heads * self.shape.head_dim**2 * self.hidden * 4
        momentum, cp = 4 * heads * self._momentum, degrees["cp"]
        there, back = Ledger(degrees), Ledger(degrees)
        if self.plan.kind == "tokens+ns":
            there.add(SCATTER, ("cp",), (weights + momentum) / cp, updates)
            there.add(GATHER, ("cp",), weights / cp, updates)
            back.add(GATHER, ("cp",), (weights + momentum) / cp, updates)
            return there.sent, back.add(SCATTER, ("cp",), weights / cp, updates).sent
        exchanged, ways = self.exchange(3 + self._momentum, rows, degrees), self.plan.ways(cp)
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
        polish = orthogonal if self.muon else None
        read = Read(*tokens)
        if not self.causal:
            return fast_weights.swiglu_whole(read, first, polish, sharing)
        how = chunk, polish, sharing, self.group, segment, self.prenorm
        return fast_weights.swiglu_scan(read, first, *how)[0]
