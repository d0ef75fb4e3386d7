"""A mixture of experts in place of a feed-forward layer: experts lie over ep, the hidden width of
each over tp.

Statistics that the losses read are summed over all data axes, so neither loss nor routing depends
on the mesh. Under sequence parallelism a device routes its own positions.

Legend: B sequences, L positions (local over cp), T = B·L tokens, D width, F hidden width of an
expert, E experts, K choices of a token, J noise bins."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.collectives import psum, size, vary_like
from fdp.count.counts import REDUCE, Counts, Degrees, Ledger, Rows, Sent, Work, merged
from fdp.kernels_pallas.grouped import Groups, buffer_rows, choose_block, grouped_ffn
from fdp.mesh import DATA_AXES
from fdp.models import balance
from fdp.models.balance import Balance
from fdp.models.layers import Reduction, enter_tp, entered, hidden_bytes, leave_tp, left, normal
from fdp.models.module import Module, compact, silu
from fdp.models.router import Routed, Router, Routing
from fdp.models.shape import ModelShape
from fdp.models.stack import Layer, LayerInput, layer
from fdp.parallel.expert.exchange import Load
from fdp.parallel.expert.plan import Dispatch
from fdp.parallel.wire import Cast

Array = jax.Array
SHARED = "shared"  # scope of the experts that every token visits, in the names of operations


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEInput:
    """Layer input of a mixture. replay: ids [B, L, K] to use in place of the router's choice."""

    replay: Array | None = None


def replay(ids_TxNxK: np.ndarray, batch: int, shape: ModelShape) -> Any:
    """Layer inputs that replay the choices of `batch` sequences, as a trace holds them: int
    [tokens, layers with experts, K]. Raises ValueError for ids out of range or another length."""
    tokens, layers, topk = ids_TxNxK.shape
    want = shape.moe_layers, shape.topk
    if (layers, topk) != want or not batch or tokens % batch:
        raise ValueError(
            f"replayed ids {ids_TxNxK.shape} must be [tokens, layers, k] with layers, k = {want} "
            f"and tokens a multiple of {batch} sequences"
        )
    low, high = int(ids_TxNxK.min()), int(ids_TxNxK.max())
    if low < 0 or high >= shape.experts:
        raise ValueError(
            f"replayed ids lie in {low}…{high}, but the model has experts 0…{shape.experts - 1}: "
            "the trace is of another model"
        )
    ids = np.asarray(ids_TxNxK, np.int32).reshape(batch, -1, layers, topk)
    mine = LayerInput(ffn=MoEInput(jnp.asarray(np.moveaxis(ids, 2, 0))))
    others = (None,) * (shape.moe_every - 1)
    return (*others, mine) if others else mine


def mixture(section: Mapping[str, Any]) -> Layer:
    """The layer in the `model.moe` section of a config. Raises ValueError for values that do not
    fit each other."""
    names = ("experts", "topk", "choice", "score", "normalise", "scale", "groups", "kept", "best")
    given = {n: section[n] for n in (*names, "low", "high", "noise")}
    routing = Routing(bias=section["bias"] > 0, **given)
    wire = Cast("" if section["wire"] == "same" else section["wire"])
    plan, node = section["dispatch"], section["node"]
    dispatch = Dispatch(plan, node, section["capacity"], section["buffer"], wire)
    losses = ("switch", "z", "sequence", "rank", "ranks", "bins", "bias")
    level = Balance(**{n: section[n] for n in losses})
    return layer(MoE, routing=routing, dispatch=dispatch, balance=level)


class MoE(Module):
    """Σ_k gate_k · expert_k(x), plus shared experts that every token visits. Experts are SwiGLUs,
    the shared ones one SwiGLU of their total width."""

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
        self.probe("input", x_BxLxD)
        self.probe("ids", routed.ids)
        x_in = enter_tp(x_BxLxD, s.sequence_parallel)
        x_TxD = x_in.reshape(-1, D)
        ids, gates = (a.reshape(len(x_TxD), -1) for a in (routed.ids, routed.gates))
        load = Load(ids, vary_like(gates, x_TxD), routed.pairs, routed.each, E)

        def ffn(rows_RxD: Array, groups: Groups) -> Array:
            return grouped_ffn(rows_RxD, w_in.astype(dtype), w_out.astype(dtype), groups)

        beside = self._shared() if s.shared_experts else None
        y_TxD, moved, fallback = self.dispatch(x_TxD, load, ffn, beside)
        self._balance(routed, where)
        self._report(jnp.stack([*moved, fallback]), routed.logits)
        y_BxLxD = y_TxD.reshape(x_in.shape)
        return leave_tp(y_BxLxD, s.sequence_parallel)

    def _shared(self) -> Callable[[Array], Array]:
        """The experts that every token visits: [T, D] → [T, D], partial sums over tp."""
        s, dtype = self.shape, jnp.dtype(self.shape.dtype)
        D, wide = s.width, s.moe_ffn * s.shared_experts
        w_in = self.weight("shared_in", normal(D**-0.5), (2, D, wide), (None, None, "tp"))
        w_out = self.weight("shared_out", normal(wide**-0.5), (wide, D), ("tp", None))
        w_in, w_out, w_gate = w_in.astype(dtype), w_out.astype(dtype), None
        if s.shared_gate:
            w_gate = self.weight("shared_gate", normal(D**-0.5), (D, 1), (None, None), decay=False)
            w_gate = w_gate.astype(dtype)

        @jax.named_scope(SHARED)
        def shared(x_TxD: Array) -> Array:
            y_TxD = (silu(x_TxD @ w_in[0]) * (x_TxD @ w_in[1])) @ w_out
            return y_TxD if w_gate is None else y_TxD * jax.nn.sigmoid(x_TxD @ w_gate)

        return shared

    @classmethod
    def parts(cls, fields: Mapping[str, Any]) -> int:
        """Devices of ep that form a node, by the fields of its layer; 1: no nodes."""
        dispatch = fields["dispatch"]
        return dispatch.inner if dispatch.plan == "two_level" else 1

    def check(self, batch: int, length: int, degrees: Mapping[str, int]) -> None:
        """Raises ValueError where the experts do not fit the degrees."""
        self.dispatch.check(self.shape.experts, degrees)

    def _over_tp(self, x: Array) -> Array:
        """`x`, equal on all devices of tp, typed so. Without sequence parallelism it is already."""
        return psum(x / size("tp"), "tp") if self.shape.sequence_parallel else x

    def _report(self, moved: Array, logits: Array) -> None:
        """Metrics: "moved" is [pairs dropped, rows sent to other nodes, rows sent within a node, or
        by plans that know no nodes]; "fell_back" the share of devices whose buffers were too small;
        "nonfinite" counts logits."""
        bad = (~jnp.isfinite(logits)).sum(dtype=jnp.float32)[None]
        if self.shape.sequence_parallel:
            moved, bad = jnp.split(psum(jnp.append(moved / size("tp"), bad), "tp"), [4])
        self.aux("moved", moved[:3])
        self.aux("fell_back", moved[3], mean=True)
        self.aux("nonfinite", bad[0])

    def _balance(self, routed: Routed, where: Any) -> None:
        """Losses of the load, and metrics; their sums over the data axes are global figures."""
        b, E = self.balance, self.shape.experts
        batch, L = routed.ids.shape[:2]
        devices, tokens = size(DATA_AXES), batch * L * size(DATA_AXES)
        count_BxE = self._over_tp(balance.counts(routed.ids, E))
        load_E = psum(count_BxE.sum(0), DATA_AXES)
        share_BxLxE = balance.shares(routed.scores)

        def total(x: Array) -> Array:
            return psum(x, "tp") if self.shape.sequence_parallel else x

        sum_BxE = total(share_BxLxE.sum(1))
        self.aux("load", count_BxE.sum(0))
        self.aux("imbalance", load_E.max() / load_E.mean() / devices, mean=True)
        part_S = load_E.reshape(size("ep"), -1).sum(-1)
        self.aux("rank_imbalance", part_S.max() / part_S.mean() / devices, mean=True)
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
            losses |= self._by_noise(count_BxE, sum_BxE, where.noise, tokens)
        for name, value in losses.items():
            self.aux(name, value, mean=True)
            self.penalty(name, getattr(b, name) * value)

    def _by_noise(
        self, count_BxE: Array, sum_BxE: Array, noise_B: Array, tokens: int
    ) -> dict[str, Array]:
        """The load of each noise bin as a metric, and the rank loss."""
        b = self.balance
        bin_BxJ = balance.noise_bin(noise_B, b.bins)
        count_JxE = bin_BxJ.T @ count_BxE
        self.aux("load_bins", count_JxE, mean=True)  # of a microbatch, as `rank` reads it
        if not b.rank:
            return {}
        now_JxE = psum(count_JxE, DATA_AXES)
        past_JxE = self.model_state("load_bins", jnp.zeros, count_JxE.shape, (None, None))
        load_JxE = b.decay * past_JxE + (1 - b.decay) * now_JxE
        return {"rank": balance.rank_loss(load_JxE, bin_BxJ.T @ sum_BxE, tokens, b.ranks)}

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """FLOPs are those of the experts that tokens visit on average, not of rows that fill up
        blocks. Saved for the backward pass: the rows of the buffers, the products with w_in, and
        the rows that come back. Raises Unstated where the sum over tp is replaced."""
        s, K = self.shape, sum(self.routing.range) / 2
        D, F, E, tp = s.width, s.moe_ffn, s.experts, degrees["tp"]
        tokens, (between, inside) = rows.tokens(degrees), hidden_bytes(s, rows, degrees)
        (enter, enter_back), (leave, leave_back) = (
            entered(s, rows, degrees),
            left(s, rows, degrees, self.reduction),
        )
        load = self._load(rows, degrees)
        row = D, s.itemsize
        there, back = self.dispatch.sent(tokens, load, row, degrees, rows.level)
        loads, metrics = self._statistics(rows, degrees)
        gates = Ledger(degrees)
        if not s.sequence_parallel:
            gates.add(REDUCE, ("tp",), 4 * tokens * load.ids.shape[-1])
        wide = F * s.shared_experts
        flops = round(4 * K * rows.positions * D * F) + 4 * rows.positions * D * wide
        last = Work(flops // 2, sent=merged(leave, metrics))
        forward = Work(flops, sent=merged(enter, there, loads)) + last
        if s.shared_gate:
            gate = 2 * rows.positions * D
            forward += Work(gate, replicated=gate)
            gates.add(REDUCE, ("tp",), 4 * D)
        held = self.dispatch.bounds(tokens, load, degrees["ep"])[0].pairs
        e = E // degrees["ep"]
        buffer = buffer_rows(held, e, choose_block(held, e))
        saved = buffer * (2 * D + 2 * F // tp) * s.itemsize
        saved += between + inside + 4 * tokens * (wide // tp) * s.itemsize
        found = Counts(
            3 * D * (E * F + wide) + D * s.shared_gate,
            forward,
            forward.backward(merged(enter_back, leave_back, back, gates.sent)),
            last,
            saved=saved,
        )
        return found + Router(s, self.routing, parent=None).counts(rows, degrees)

    def _statistics(self, rows: Rows, degrees: Degrees) -> tuple[Sent, Sent]:
        """Bytes of the statistics that gradients of the losses read, and of those that only metrics
        and values of losses read."""
        b, E, each = self.balance, self.shape.experts, 4 * rows.batch * self.shape.experts
        loads, metrics = Ledger(degrees), Ledger(degrees)
        (loads if b.switch else metrics).add(REDUCE, DATA_AXES, 4 * E)
        if b.sequence:
            loads.add(REDUCE, ("cp",), each)
        if b.rank and b.bins > 1:
            loads.add(REDUCE, DATA_AXES, 4 * b.bins * E)
        if self.shape.sequence_parallel:
            losses = b.switch or b.sequence or (b.rank and b.bins > 1)
            (loads if losses else metrics).add(REDUCE, ("tp",), each)
            metrics.add(REDUCE, ("tp",), (each if losses else 0) + 20 + (4 if b.z else 0))
        return loads.sent, metrics.sent

    def _load(self, rows: Rows, degrees: Degrees) -> Load:
        """What a device routes, by shape."""
        r, tokens = self.routing, rows.tokens(degrees)
        local = rows.length // degrees["cp"]
        each = rows.batch * min(r.most(rows.length), local) if r.choice == "expert" else tokens
        pairs = r.experts * each if r.choice == "expert" else tokens * r.topk
        ids: Any = jax.ShapeDtypeStruct((tokens, r.columns()), jnp.int32)
        return Load(ids, ids, pairs, each, r.experts)
