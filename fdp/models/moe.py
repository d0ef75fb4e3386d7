"""A mixture of experts in place of a feed-forward layer: experts lie over ep, the hidden width of
each over tp.

Statistics that the losses read are summed over all data axes, so neither loss nor routing depends
on the mesh. Under sequence parallelism a device routes its own positions.

Legend: B sequences, L positions (local over cp), T = B·L tokens, D width, F hidden width of an
expert, E experts, K choices of a token, J noise bins."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import psum, size, vary, vary_like
from fdp.count.counts import REDUCE, Counts, Degrees, Ledger, Rows, Unstated, Work, merged
from fdp.kernels_pallas.grouped import Groups, choose_block, grouped_ffn, most_blocks
from fdp.mesh import DATA_AXES
from fdp.models import balance
from fdp.models.balance import Balance
from fdp.models.layers import (
    Reduction,
    SwiGLU,
    enter_tp,
    entered,
    hidden_bytes,
    leave_tp,
    left,
    normal,
)
from fdp.models.module import Module, compact
from fdp.models.router import Routed, Router, Routing
from fdp.models.shape import ModelShape
from fdp.parallel.expert.exchange import Load
from fdp.parallel.expert.plan import Dispatch

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEInput:
    """Layer input of a mixture. replay: ids [B, L, K] to use in place of the router's choice."""

    replay: Array | None = None


class MoE(Module):
    """Σ_k gate_k · expert_k(x), plus shared experts that every token visits (one SwiGLU of their
    total width). Experts are SwiGLUs."""

    shape: ModelShape
    routing: Routing
    dispatch: Dispatch = Dispatch()
    balance: Balance = Balance()
    reduction: Reduction | None = None

    @compact
    def __call__(self, x_BxLxD: Array, where: Any, given: MoEInput | None = None) -> Array:
        s, dtype = self.shape, jnp.dtype(self.shape.dtype)
        if self.reduction is not None:
            raise ValueError("a mixture of experts has no replacement of its sum over tp")
        E, D, F = s.experts, s.width, s.moe_ffn
        w_in = self.weight("w_in", normal(D**-0.5), (E, 2, D, F), ("ep", None, None, "tp"))
        w_out = self.weight("w_out", normal(F**-0.5), (E, F, D), ("ep", "tp", None))
        router = Router(s, self.routing, name="router")
        routed = router(x_BxLxD, where, None if given is None else given.replay)
        x_in = enter_tp(x_BxLxD, s.sequence_parallel)
        self._balance(routed, where)
        x_TxD = x_in.reshape(-1, D)
        ids, gates = (a.reshape(len(x_TxD), -1) for a in (routed.ids, routed.gates))
        load = Load(ids, vary_like(gates, x_TxD), routed.pairs, routed.each, E)

        def ffn(rows_RxD: Array, groups: Groups) -> Array:
            weights = (vary_like(w.astype(dtype), rows_RxD) for w in (w_in, w_out))
            return grouped_ffn(rows_RxD, *weights, groups)

        y_TxD, moved, fallback = self.dispatch(x_TxD, load, ffn)
        for name, value in (moved._asdict() | {"fallback": fallback}).items():
            self.aux(name, self._over_tp(value))
        y_BxLxD = leave_tp(y_TxD.reshape(x_in.shape), s.sequence_parallel)
        if not s.shared_experts:
            return y_BxLxD
        wide = replace(s, ffn=s.moe_ffn * s.shared_experts)
        return y_BxLxD + SwiGLU(wide, name="shared")(x_BxLxD, where)

    def _over_tp(self, x: Array) -> Array:
        """`x`, equal on all devices of tp, typed so. Without sequence parallelism it is already."""
        return psum(x / size("tp"), "tp") if self.shape.sequence_parallel else x

    def _balance(self, routed: Routed, where: Any) -> None:
        """Losses of the load, and metrics; their sums over the data axes are global figures."""
        b, E = self.balance, self.shape.experts
        batch, L = routed.ids.shape[:2]
        devices, tokens = size(DATA_AXES), batch * L * size(DATA_AXES)
        self.probe("ids", routed.ids)
        count_BxE = self._over_tp(balance.counts(routed.ids, E))
        load_E = psum(count_BxE.sum(0), DATA_AXES)
        share_BxLxE = balance.shares(routed.scores)

        def total(x: Array) -> Array:
            return psum(x, "tp") if self.shape.sequence_parallel else x

        sum_BxE = total(share_BxLxE.sum(1))
        self.aux("load", count_BxE.sum(0))
        self.aux("imbalance", load_E.max() / load_E.mean() / devices)
        part_S = load_E.reshape(size("ep"), -1).sum(-1)
        self.aux("rank_imbalance", part_S.max() / part_S.mean() / devices)
        self.aux("nonfinite", total((~jnp.isfinite(routed.logits)).sum(dtype=jnp.float32)))
        losses: dict[str, Array] = {}
        if b.switch:
            losses["switch"] = balance.switch(load_E, sum_BxE.sum(0), tokens)
        if b.z:
            z_BxL = jax.nn.logsumexp(routed.logits, axis=-1) ** 2
            losses["z"] = total(z_BxL.sum()) / tokens
        if b.sequence:
            whole_BxE = psum(count_BxE, "cp")
            share = E * whole_BxE / whole_BxE.sum(-1, keepdims=True) * sum_BxE
            losses["sequence"] = share.sum() / tokens
        if b.bins > 1:
            losses |= self._by_noise(count_BxE, sum_BxE, where.noise, L)
        for name, value in losses.items():
            self.aux(name, value)
            self.penalty(name, getattr(b, name) * value)

    def _by_noise(
        self, count_BxE: Array, sum_BxE: Array, noise_B: Array, length: int
    ) -> dict[str, Array]:
        """The load of each noise bin as a metric, and the rank loss."""
        b = self.balance
        bin_BxJ = balance.noise_bin(noise_B, b.bins)
        count_JxE = bin_BxJ.T @ count_BxE
        self.aux("load_bins", count_JxE)
        if not b.rank:
            return {}
        now_JxE = psum(count_JxE, DATA_AXES)
        past_JxE = self.model_state("load_bins", jnp.zeros, count_JxE.shape, (None, None))
        load_JxE = b.decay * past_JxE + (1 - b.decay) * now_JxE
        tokens_J = psum(bin_BxJ.sum(0) * length, DATA_AXES)
        return {"rank": balance.rank_loss(load_JxE, bin_BxJ.T @ sum_BxE, tokens_J, b.ranks)}
