"""TTT-Linear: a linear map that is trained on the sequence as it reads it (Sun et al. 2024, arXiv
2407.04620).

Legend: B sequences, L positions (local over cp), D width, H heads (local over tp), K head dim."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import size
from fdp.count.counts import PERMUTE, Counts, Degrees, Ledger, Rows, Work
from fdp.models import fast_linear, fast_rows
from fdp.models.attention import Where
from fdp.models.fast_linear import FastLinear
from fdp.models.fast_rows import LinearMemory
from fdp.models.fast_weights import everywhere
from fdp.models.layers import normal, ones, zeros
from fdp.models.recurrent import StateLayer, by_head
from fdp.models.shape import ModelShape
from fdp.parallel.context import state

Array = jax.Array


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


def linear_memory(first: FastLinear, like_BxLxHxK: Array) -> LinearMemory:
    """The memory of every sequence before the first token; `first`: the weights of every head."""
    every = FastLinear(*(everywhere(w, like_BxLxHxK) for w in first))
    return LinearMemory(every, every)


def no_linear_memory(shape: ModelShape, batch: int) -> tuple[LinearMemory, Any]:
    """(zeros, PartitionSpecs) of such a memory: map and bias of a device's heads, twice."""
    H, K = shape.heads // size("tp"), shape.head_dim
    one = FastLinear(jnp.zeros((batch, H, K, K)), jnp.zeros((batch, H, K)))
    found = LinearMemory(one, one)
    return found, jax.tree.map(by_head, found)


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
    """A linear map trained token by token in mini-batches of `chunk` (`fdp.models.fast_linear`).
    The step of a token is a learned sigmoid; the paper's is head_dim times smaller at first.
    Its mini-batches depend on each other: over cp it shares out heads, or runs as a wavefront."""

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("heads", "wavefront")

    def mix(self, q: Array, k: Array, v: Array, x_BxLxD: Array, where: Where) -> Array:
        first, norm = linear_weights(self, "fast")
        rates = jax.nn.sigmoid(self.head_scalars("w_state", x_BxLxD, 1)[..., 0])
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
        out, last = fast_linear.linear_scan(q, k, v, rates, first, norm, self.chunk)
        return out, FastLinear(*(w[0] for w in last))

    def memory(self, batch: int) -> tuple[Any, Any]:
        """Map and bias of every head, twice."""
        return no_linear_memory(self.shape, batch)

    def handed_on(self, memory: Any) -> Any:
        """Map and bias at the start of the mini-batch."""
        return memory.start

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
