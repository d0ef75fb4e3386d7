"""Attention to the last tokens beside a state, in the same layer: a state of large chunks knows
nothing of its own chunk, and a window does.

It follows the layer's plan over cp. Where devices hold parts of every chunk, keys and values travel
in a ring, over the hops that the window needs; where heads are exchanged, so are its heads.

Legend: B sequences, L positions (local over cp), H heads (local over tp), K head dim, W positions
of the window."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fdp.collectives import size, vary, vary_like
from fdp.count.counts import Counts, Degrees, Rows
from fdp.kernels_pallas import attend as front
from fdp.mesh import BATCH_AXES
from fdp.models.attention import Softmax, Where
from fdp.models.layers import HeadNorm, rotary
from fdp.models.module import CACHE, Module, compact
from fdp.models.shape import ModelShape
from fdp.parallel.context.plan import CommPlan, needed_hops
from fdp.parallel.context.state import StatePlan
from fdp.parallel.masks import Mask

Array = jax.Array


def over_cp(plan: StatePlan, mask: Mask, length: int, cp: int) -> CommPlan:
    """How attention under `mask` to `length` positions travels where a state follows `plan`: heads
    are exchanged among the same devices, and the others form a ring."""
    u = plan.ways(cp)
    if u == cp:
        return CommPlan("ulysses", cp, layout=plan.layout)
    ring = CommPlan("usp" if u > 1 else "ring", u, layout=plan.layout)
    hops = needed_hops(mask, plan.layout, length, cp, u)
    return ring if len(hops) == cp // u - 1 else replace(ring, hops=hops)


class WindowAttention(Module):
    """Attention to the last `window` tokens, the token itself among them, or with `causal=False` to
    as many on both sides: q, k, v [B, L, H, K] → [B, L, H, K]. Queries and keys are normed by head,
    with a learned scale of each channel, and rotated by their positions. Documents are read alone.

    Decoding keeps the keys and values that the next token's window reaches, W - 1 of each."""

    shape: ModelShape
    plan: StatePlan
    window: int
    causal: bool = True

    @compact
    def __call__(self, q: Array, k: Array, v: Array, where: Where) -> Array:
        s = self.shape
        q = HeadNorm(s, s.heads, name="q_norm")(q)
        k = HeadNorm(s, s.heads, name="k_norm")(k)
        if where.position is not None:
            q, k = (rotary(x, where.position, s.rope_base, s.rope_scaling) for x in (q, k))
        if self.is_initializing():
            return q
        if self.is_mutable_collection(CACHE):
            return self._rows(q, k, v, where.index)
        packed, length = where.segment is not None, q.shape[1] * size("cp")
        return self._core(packed, length, size("cp"))(q, k, v, where, None)

    def _core(self, packed: bool, length: int, cp: int) -> Softmax:
        mask = Mask("causal" if self.causal else "bidirectional", self.window, packed)
        if cp == 1 or self.window > length:
            return Softmax(mask)
        return Softmax(mask, over_cp(self.plan, mask, length, cp))

    def _rows(self, q: Array, k: Array, v: Array, index: Array) -> Array:
        """Attention of tokens that arrive to those before them and to each other."""
        (batch, length), reach = q.shape[:2], self.window - 1
        if index.ndim == 2:
            first = index[0, 0]
            near = tuple(vary_like(self.cached(name), q) for name in ("k", "v"))
        else:
            first = jnp.int32(0)
            none = vary_like(jnp.zeros((batch, reach, *k.shape[2:]), k.dtype), q)
            near = none, none
        k, v = (jnp.concatenate(pair, 1) for pair in zip(near, (k, v), strict=True))
        self.cache("k", k[:, length:])
        self.cache("v", v[:, length:])
        at = first - reach + jnp.arange(reach + length)
        # Places before the first token are empty: a position after every query hides them.
        places = at[reach:], jnp.where(at < 0, first + length, at)
        return front.attend(q, k, v, Mask("causal", self.window), *places)[0]

    def decode_state(self, batch: int) -> tuple[Any, Any]:
        """(zeros, PartitionSpecs) of the keys and values before the first token."""
        s = self.shape
        sizes = batch, self.window - 1, s.heads // size("tp"), s.head_dim
        zeros = vary(jnp.zeros(sizes, jnp.dtype(s.dtype)), (*BATCH_AXES, "tp"))
        spec = PartitionSpec(BATCH_AXES, None, "tp", None)
        return {"k": zeros, "v": zeros}, {"k": spec, "v": spec}

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Of attention and its norms: every head has keys of its own."""
        s, cp, tp = replace(self.shape, kv_heads=self.shape.heads), degrees["cp"], degrees["tp"]
        found = self._core(rows.segments, rows.length, cp).counts(s, rows, degrees)
        norm = HeadNorm(s, s.heads, parent=None).counts(rows, degrees)
        kept = 2 * rows.tokens(degrees) * s.heads // tp * s.head_dim * s.itemsize
        return found + norm + norm + Counts(saved=kept, kept=kept)

    def check(self, batch: int, length: int, degrees: Mapping[str, int]) -> None:
        """Raises ValueError for a window that is negative, or longer than the sequence."""
        s, core = self.shape, self._core(False, length, degrees["cp"])
        core.check(replace(s, kv_heads=s.heads), batch, length, degrees)
