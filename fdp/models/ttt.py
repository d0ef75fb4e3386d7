"""Layers that train a small model on the sequence as they read it (test-time training): LaCT and
TTT-Linear.

Legend: B sequences, L positions (local over cp), D width, H heads (local over tp), K head dim, F
hidden width of a fast network."""

import functools
from dataclasses import replace

import jax

from fdp.collectives import size
from fdp.count.counts import GATHER, REDUCE, SCATTER, Counts, Degrees, Ledger, Rows, Sent, Work
from fdp.models import fast_weights
from fdp.models.attention import Where
from fdp.models.fast_weights import FastLinear, FastWeights, Read, Sharing
from fdp.models.layers import normal, ones, rotary, zeros
from fdp.models.recurrent import StateLayer, softplus_inverse
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
        return ("tokens", "tokens+ns", "heads")

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
        if self.rotate and where.position is not None:
            q, k = (rotary(x, where.position, s.rope_base, s.rope_scaling) for x in (q, k))
        tokens = (q, k, v, rates) + ((momentum,) if self.momentum else ())
        if self.plan.kind == "heads":
            first = FastWeights(*map(state.own_heads, first))
            run = functools.partial(self._scan, first, self.chunk, Sharing())
            return state.by_heads(run, self.plan.layout, *tokens)
        cp = size("cp")
        if self.plan.kind == "tokens":
            sharing = Sharing(state.total, devices=cp)
        else:
            sharing = Sharing(state.gather_heads, state.spread_heads, cp)
        return self._scan(first, self.chunk // cp, sharing, *tokens)

    def work(self, rows: Rows, degrees: Degrees) -> Counts:
        """Reading a chunk is three products, an update six more; the last chunk is only read. Over
        cp, either heads are exchanged or every update is summed, its gradient too."""
        s, cp, tp = self.shape, degrees["cp"], degrees["tp"]
        H, K, F = s.heads, s.head_dim, s.head_dim * self.hidden
        updates = max(-(-rows.length // self.chunk) - 1, 0)
        flops = 6 * F * K * H * (rows.positions + 2 * rows.batch * updates * self.chunk)
        polish = 0
        if self.muon:
            few, many = sorted((K, F))
            polish = 15 * rows.batch * H * updates * (4 * few * few * many + 2 * few**3)
        forward = Work(flops + polish, batched=flops + polish)
        heads = rows.batch * H // tp
        sent, again = self._sent(updates, heads, rows, degrees), Work()
        if self.plan.kind == "tokens":  # every device orthogonalises the whole sum
            again = Work(3 * polish * (cp - 1), batched=3 * polish * (cp - 1))
        if self.group:
            again += self._again(rows.batch * H * updates, polish, sent[0], cp)
        forward, backward = replace(forward, sent=sent[0]), forward.backward(sent[1])
        ways = self._ways(cp)
        saved, live = (4 * heads // ways * x for x in self._kept(rows.length * ways // cp, cp))
        own = Counts(3 * H * F * K, forward, backward, again=again, saved=saved, live=live)
        return own + self.scalars(4, rows)

    def _again(self, updates: int, polish: int, sent: Sent, cp: int) -> Work:
        """What groups compute again: all of `updates` but the last product of reading. The exchange
        of heads is outside them."""
        F, K = self.shape.head_dim * self.hidden, self.shape.head_dim
        if self.plan.kind == "tokens":
            polish *= cp
        flops = 16 * F * K * updates * self.chunk + polish
        return Work(flops, batched=flops, sent={} if self.plan.kind == "heads" else sent)

    def _kept(self, length: int, cp: int) -> tuple[int, int]:
        """Numbers that a head of a sequence of `length` positions of a device keeps: for the
        backward pass, and of a group."""
        K = self.shape.head_dim
        return fast_weights.scan_memory(
            length,
            self.chunk if self.plan.kind == "heads" else self.chunk // cp,
            K,
            K * self.hidden,
            momentum=self.momentum,
            orthogonalise=self.muon,
            group=self.group,
            share=1 / cp if self.plan.kind == "tokens+ns" else 1,
        )

    def _ways(self, cp: int) -> int:
        """Devices that share out the heads in the scan."""
        return cp if self.plan.kind == "heads" else 1

    def _sent(self, updates: int, heads: int, rows: Rows, degrees: Degrees) -> tuple[Sent, Sent]:
        """Bytes over cp, (forward, backward)."""
        if self.plan.kind == "heads":
            return self.exchange(3 + self.momentum, rows, degrees)
        weights = 3 * heads * self.shape.head_dim**2 * self.hidden * 4
        momentum = 4 * heads * self.momentum
        there, back = Ledger(degrees), Ledger(degrees)
        if self.plan.kind == "tokens":
            there.add(REDUCE, ("cp",), weights + momentum, updates)
            return there.sent, back.add(REDUCE, ("cp",), weights + momentum, updates).sent
        cp = degrees["cp"]
        there.add(SCATTER, ("cp",), (weights + momentum) / cp, updates)
        there.add(GATHER, ("cp",), weights / cp, updates)
        back.add(GATHER, ("cp",), (weights + momentum) / cp, updates)
        return there.sent, back.add(SCATTER, ("cp",), weights / cp, updates).sent

    def _scan(self, first: FastWeights, chunk: int, sharing: Sharing, *tokens: Array) -> Array:
        orthogonalise = fast_weights.orthogonal if self.muon else None
        read = Read(*tokens)
        return fast_weights.swiglu_scan(
            read, first, chunk, orthogonalise, sharing, group=self.group
        )[0]


class TTTLinear(StateLayer):
    """A linear map trained token by token in mini-batches of `chunk` (`fdp.models.fast_weights`).
    Over cp it can only share out heads: its mini-batches depend on each other."""

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("heads",)

    def mix(self, q: Array, k: Array, v: Array, x_BxLxD: Array, where: Where) -> Array:
        H, K = self.shape.heads, self.shape.head_dim
        axes = ("tp", None)
        first = FastLinear(
            self.weight("fast", normal(0.02), (H, K, K), ("tp", None, None), decay=False),
            self.weight("fast_bias", zeros, (H, K), axes, decay=False),
        )
        norm = (
            self.weight("norm_scale", ones, (H, K), axes, decay=False),
            self.weight("norm_shift", zeros, (H, K), axes, decay=False),
        )
        rates = jax.nn.sigmoid(self.head_scalars("w_state", x_BxLxD, 1)[..., 0])
        if self.plan.kind == "heads":
            first, norm = jax.tree.map(state.own_heads, (first, norm))

        def run(q: Array, k: Array, v: Array, rates: Array) -> Array:
            batch = min(self.chunk, q.shape[1])
            return fast_weights.linear_scan(q, k, v, rates, first, norm, batch)[0]

        return state.by_heads(run, self.plan.layout, q, k, v, rates)

    def work(self, rows: Rows, degrees: Degrees) -> Counts:
        """Three products with the weights and three inside the mini-batch, of which the mask's has
        one gradient."""
        s = self.shape
        H, K, C = s.heads, s.head_dim, min(self.chunk, rows.length)
        flops, mask = rows.positions * H * 6 * K * (C + K), rows.positions * H * 2 * C * K
        sent, sent_back = self.exchange(1, rows, degrees)
        forward = Work(flops, batched=flops, sent=sent)
        backward = forward.backward(sent_back) - Work(mask, batched=mask)
        heads = rows.batch * H // degrees["tp"] // degrees["cp"]
        saved = 4 * heads * (rows.length // C * K * K + rows.length * (8 * K + C))
        own = Counts(H * K * (K + 3), forward, backward, saved=saved)
        return own + self.scalars(1, rows)
