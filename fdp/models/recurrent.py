"""Mixing layers with a state of fixed size, in place of attention: what they share, and Gated
DeltaNet. `fdp.models.lact` and `fdp.models.ttt` have the others.

All project, filter and activate queries, keys and values in the same way, and norm, gate and
project what they read. Heads are sharded over tp, the sequence over cp by a `StatePlan`.

Legend: B sequences, L positions (local over cp), D width, H heads (local over tp), K head dim."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fdp.collectives import index, size, vary, vary_like
from fdp.count.counts import (
    EXCHANGE,
    GATHER,
    PERMUTE,
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
from fdp.models import delta
from fdp.models.attention import Where
from fdp.models.conv import ShortConvolution, before, check_taps, halo_bytes, hops
from fdp.models.layers import (
    Reduction,
    enter_tp,
    entered,
    hidden_bytes,
    leave_tp,
    left,
    normal,
    ones,
)
from fdp.models.module import CACHE, Module, compact
from fdp.models.shape import ModelShape
from fdp.parallel.context import state
from fdp.parallel.context.state import StatePlan

Array = jax.Array


class StateLayer(Module):
    """What the layers below share: [B, L, D] → [B, L, D]. Each document is read as if it were
    alone, in the chunks of the sequence. A token of it that is not finite stays so, and no other
    token reads it.

    `chunk`: positions of a chunk, on all devices. `gate`: whether what is read is multiplied by
    SiLU of a projection, as published; small models learn to recall sooner without."""

    shape: ModelShape
    plan: StatePlan = StatePlan()
    chunk: int = 16
    gate: bool = True
    reduction: Reduction | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The plans that this layer can follow."""
        raise NotImplementedError

    @property
    def shared_chunk(self) -> int:
        """Positions of a chunk that devices read together; 0: there are no chunks."""
        return self.chunk

    def mix(self, q: Array, k: Array, v: Array, x_BxLxD: Array, where: Where) -> Array:
        """What is read, [B, L, H, K], of activated q, k, v [B, L, H, K]."""
        raise NotImplementedError

    def beside(self, q: Array, k: Array, v: Array, where: Where) -> Array | None:
        """What is added to the normed and gated read, [B, L, H, K], of q, k, v before their
        activation; None: nothing."""
        return None

    def memory(self, batch: int) -> tuple[Any, Any]:
        """(what is kept between the tokens of decoding, PartitionSpecs): arrays of a device, [B, H,
        …]. Their values before the first token are the layer's own."""
        raise NotImplementedError

    def handed_on(self, memory: Any) -> Any:
        """What of `memory` one chunk hands to the next; the rest belongs to an unfinished chunk."""
        return memory

    def state_bytes(self) -> int:
        """Of what chunks of a sequence hand on, on all devices. Decoding keeps its `decode_state`,
        in which the unfinished chunk and the convolutions have their part."""
        return bytes_of(lambda: self.handed_on(self.memory(1)[0]))

    def recalled(
        self, first: Callable[[], Any], where: Where, name: str = "memory"
    ) -> tuple[Any, Array | int] | None:
        """(the memory `name` before these tokens, the number of tokens before them), or None where
        no cache is kept. `first()`: the memory before all tokens. Rows of a cache follow the last
        ones, equally many in every sequence."""
        if self.is_initializing() or not self.is_mutable_collection(CACHE):
            if where.index.ndim == 2:
                self.cached(name)  # says what is missing
            return None
        if size("cp") > 1:
            raise ValueError(
                f"decoding keeps states of whole sequences, and cp = {size('cp')}: set mesh.cp=1 "
                "and give its devices to dp or tp"
            )
        if where.segment is not None:
            raise ValueError(
                "a row of a cache is one sequence, and these rows hold documents: give each "
                "document a row of its own"
            )
        if where.index.ndim == 1:
            return first(), 0
        seen = where.index[0, 0]
        begun = jax.tree.map(
            lambda old, new: jnp.where(seen == 0, new, vary_like(old, new)),
            self.cached(name),
            first(),
        )
        return begun, seen

    @compact
    def __call__(self, x_BxLxD: Array, where: Where, given: object = None) -> Array:
        s, dtype = self.shape, jnp.dtype(self.shape.dtype)
        D, H, K = s.width, s.heads, s.head_dim
        heads, deep = (None, "tp", None), normal(D**-0.5)
        w_qkv = self.weight("w_qkv", deep, (3, D, H, K), (None, *heads)).astype(dtype)
        w_o = self.weight("w_o", normal((H * K) ** -0.5), (H, K, D), ("tp", None, None))
        scale = self.weight("scale", ones, (H, K), ("tp", None), decay=False)

        x_BxLxD = enter_tp(x_BxLxD, s.sequence_parallel)
        if where.segment is not None:  # chunks hide other documents by products with 0
            finite_BxLx1 = jnp.isfinite(x_BxLxD).all(-1, keepdims=True)
            x_BxLxD = jnp.where(finite_BxLx1, x_BxLxD, 0)
        q, k, v = (
            self._near(name, jnp.einsum("bld,dhk->blhk", x_BxLxD, w_qkv[i]), where)
            for i, name in enumerate("qkv")
        )
        beside = self.beside(q, k, v, where)
        q, k, v = map(jax.nn.silu, (q, k, v))
        out = self.mix(_unit(q), _unit(k), v, x_BxLxD, where).astype(jnp.float32)
        out = out * jax.lax.rsqrt((out * out).mean(-1, keepdims=True) + s.epsilon) * scale
        out = out.astype(dtype)
        if self.gate:
            w_gate = self.weight("w_gate", deep, (D, H, K), heads).astype(dtype)
            out = out * jax.nn.silu(jnp.einsum("bld,dhk->blhk", x_BxLxD, w_gate))
        out = out if beside is None else out + beside
        partial = jnp.einsum("blhk,hkd->bld", out, w_o.astype(dtype))
        if where.segment is not None:
            partial = jnp.where(finite_BxLx1, partial, jnp.nan)
        return leave_tp(partial, s.sequence_parallel, self.reduction, "attention")

    def _near(self, name: str, x_BxLxHxK: Array, where: Where) -> Array:
        """After a short convolution of its own."""
        if self.shape.conv:
            B, L, *shape = x_BxLxHxK.shape
            filter = ShortConvolution(
                self.shape.conv, self.plan.layout, axis="tp", name=f"conv_{name}"
            )
            x_BxLxHxK = filter(x_BxLxHxK.reshape(B, L, -1), where.index, where.segment)
            x_BxLxHxK = x_BxLxHxK.reshape(B, L, *shape)
        return x_BxLxHxK

    def decode_state(self, batch: int, length: int) -> tuple[Any, Any]:
        """(zeros, PartitionSpecs) of an empty cache, of the same size for every `length`: the
        `memory` and the last positions of the convolutions."""
        s, (memory, specs) = self.shape, self.memory(batch)
        axes = (*BATCH_AXES, "tp")
        state: dict[str, Any] = {"memory": jax.tree.map(lambda x: vary(x, axes), memory)}
        shards: dict[str, Any] = {"memory": specs}
        for name in ("conv_q", "conv_k", "conv_v") if s.conv else ():
            filter = ShortConvolution(s.conv, self.plan.layout, axis="tp", parent=None)
            channels = s.heads * s.head_dim // size("tp")
            state[name], shards[name] = filter.decode_state(batch, channels, jnp.dtype(s.dtype))
        return state, shards

    def segments(self, where: Where) -> Array | None:
        """Document ids of all positions whose heads are shared out, as `state.by_heads` has them;
        None where there are no documents."""
        _, inner = self.plan.axes()
        if where.segment is None:
            return None
        return state.in_order(where.segment, self.plan.layout, inner)

    def head_scalars(self, name: str, x_BxLxD: Array, many: int) -> Array:
        """`many` numbers for each token and head: f32 [B, L, H, many]."""
        D, H = self.shape.width, self.shape.heads
        w = self.weight(name, normal(D**-0.5), (D, H, many), (None, "tp", None))
        return jnp.einsum("bld,dhn->blhn", x_BxLxD.astype(jnp.float32), w)

    def work(self, rows: Rows, degrees: Degrees) -> Counts:
        """Counts of `mix` alone."""
        raise NotImplementedError

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Projections, filters, and the counts of `work`."""
        s, tp = self.shape, degrees["tp"]
        H, K = s.heads, s.head_dim
        into, out = (3 + self.gate) * s.width * H * K, H * K * s.width
        enter, enter_back = entered(s, rows, degrees)
        leave, leave_back = left(s, rows, degrees, self.reduction)
        last = Work(2 * rows.positions * out, sent=leave)
        forward = Work(2 * rows.positions * into, sent=enter) + last
        between, inside = hidden_bytes(s, rows, degrees)
        heads = rows.tokens(degrees) * H * K // tp
        found = Counts(
            into + out + H * K,
            forward,
            forward.backward(merged(enter_back, leave_back)),
            last,
            saved=between + inside + heads * ((4 + self.gate) * s.itemsize + 4 * 4),
            kept=between + (3 + self.gate) * heads * s.itemsize,
        )
        if s.conv:
            filter = ShortConvolution(s.conv, self.plan.layout, axis="tp", parent=None)
            found = sum([filter.counts(s, rows, degrees, H * K)] * 3, found)
        return found + self.work(rows, degrees)

    def scalars(self, many: int, rows: Rows) -> Counts:
        """Of `head_scalars`."""
        weights = self.shape.width * self.shape.heads * many
        forward = Work(2 * rows.positions * weights)
        return Counts(weights, forward, forward.backward({}))

    def exchange(self, scalars: int, rows: Rows, degrees: Degrees) -> Sent:
        """Bytes of the exchange of heads, forward and again backward: q, k, v and what is read, and
        `scalars` numbers for each token and head."""
        s, u = self.shape, self.plan.ways(degrees["cp"])
        heads = rows.tokens(degrees) * s.heads // degrees["tp"]
        local = heads * (4 * s.head_dim * s.itemsize + 4 * scalars)
        return Ledger(degrees).put(EXCHANGE, ("cp",), local * (u - 1) // u).sent

    def ids(self, rows: Rows, degrees: Degrees) -> Sent:
        """Bytes of `segments`, which all layers share."""
        others = self.plan.ways(degrees["cp"]) - 1
        ids = 4 * rows.tokens(degrees) if rows.segments else 0
        return Ledger(degrees).put(GATHER, ("cp",), others * ids).sent

    def previous(self, segment_BxL: Array) -> Array:
        """The document before the first position of this device, in the contiguous layout: [B, 1];
        on the first device, that of its first position."""
        if size("cp") == 1:
            return segment_BxL[:, :1]
        B, L = segment_BxL.shape
        halo = before(segment_BxL.reshape(B, 1, L, 1), self.plan.layout, self._reach)[:, 0, -1]
        return jnp.where(index("cp") == 0, segment_BxL[:, :1], halo)

    def halo_of_ids(self, rows: Rows, degrees: Degrees) -> Sent:
        """Bytes of `previous`."""
        cp, ids = degrees["cp"], 4 * rows.batch if rows.segments else 0
        halo = halo_bytes(self.plan.layout, rows.length // cp, cp, self._reach, ids)
        return Ledger(degrees).put(PERMUTE, ("cp",), halo).sent

    @property
    def _reach(self) -> int:
        """Positions of the halo of ids: those that the convolution asks for, at least one."""
        return max(self.shape.conv - 1, 1)

    def check(self, batch: int, length: int, degrees: Mapping[str, int]) -> None:
        """Raises ValueError for a plan, chunk or layout that these degrees cannot run."""
        cp = degrees["cp"]
        check_taps(self.shape.conv)
        if cp == 1:
            return
        name = type(self).__name__
        if self.plan.kind not in self.kinds:
            raise ValueError(
                f"{name} does not run plan {self.plan.kind}: choose {' or '.join(self.kinds)}"
            )
        heads = self.shape.heads // degrees["tp"]
        self.plan.check(batch, heads, length, degrees, self.shared_chunk)
        if self.shape.conv:
            hops(self.plan.layout, length // cp, cp, self.shape.conv - 1)


class GatedDeltaNet(StateLayer):
    """The gated delta rule (`fdp.models.delta`). The decay of a head is exp(-A · softplus(x w +
    bias)), A and the bias learned, as in the paper's released code. `decay`: range of
    softplus(bias) before training; published values forget within tens of tokens."""

    decay: tuple[float, float] = (1e-3, 0.1)

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("affine", "affine+scan", "heads")

    def mix(self, q: Array, k: Array, v: Array, x_BxLxD: Array, where: Where) -> Array:
        H = self.shape.heads
        pace = self.weight("pace", _spread(1.0, 16.0), (H,), ("tp",), decay=False)
        bias = self.weight("bias", _inverse_softplus(*self.decay), (H,), ("tp",), decay=False)
        found = self.head_scalars("w_state", x_BxLxD, 2)
        log_decay = -jnp.exp(pace) * jax.nn.softplus(found[..., 0] + bias)
        beta = jax.nn.sigmoid(found[..., 1])
        tokens = delta.Tokens(q, k, v, log_decay, beta)
        recalled = self.recalled(lambda: _empty(q, v), where)
        if recalled is not None:
            out, memory = delta.read_on(tokens, recalled[0], self.chunk)
            self.cache("memory", memory)
            return out
        if self.plan.kind == "heads" and size("cp") > 1:
            run = functools.partial(self._alone, _fresh(self.segments(where)))
            return state.by_heads(run, self.plan.layout, *tokens[:5])
        segment = where.segment
        last = None if segment is None else self.previous(segment)
        tokens = tokens._replace(fresh=_fresh(segment, last))
        chunks = delta.prepare(tokens, self._local(q.shape[1]))
        start = vary_like(_empty(q, v), chunks.solved)
        if size("cp") > 1:
            whole = delta.affine(chunks)
            if self.plan.kind == "affine+scan":
                parts = delta.compose, delta.apply, delta.constant
                start = state.scanned_before(whole, *parts)
            else:
                start = state.before(whole, start, delta.fold)
        return delta.scan(chunks, start)[0]

    def memory(self, batch: int) -> tuple[Any, Any]:
        """The matrix of every head, [B, H, K, K]."""
        H, K = self.shape.heads // size("tp"), self.shape.head_dim
        return jnp.zeros((batch, H, K, K)), PartitionSpec(BATCH_AXES, "tp", None, None)

    def work(self, rows: Rows, degrees: Degrees) -> Counts:
        """Two products of each token with its chunk, one with the chunk's values and two with the
        inverse of its system, three with the state; and the inverse. Over cp, the maps of the parts
        cost more, and go around: once, or composed in every step of a scan, the last one without
        the columns that nobody reads."""
        s, cp, tp = self.shape, degrees["cp"], degrees["tp"]
        H, K, C = s.heads, s.head_dim, self._local(rows.length // self._ways(cp))
        flops = rows.positions * H * (10 * C * K + 6 * K * K)
        flops += rows.positions // C * H * delta.inverse_flops(C)
        again = Work()
        if self.plan.kind == "heads":
            sent = sent_back = self.exchange(2, rows, degrees)
            once = self.ids(rows, degrees)
        else:
            sent, sent_back, products = self._maps(rows.batch * H // tp, degrees)
            once = self.halo_of_ids(rows, degrees)
            if cp > 1:
                maps = 8 * rows.positions * H * K * K + rows.batch * H * cp * products * K**3
                again = Work(3 * maps, batched=3 * maps)
        forward = Work(flops, batched=flops, sent=sent)
        chunks = rows.length // C // cp * rows.batch * H // tp
        saved = 4 * chunks * (6 * C * K + 3 * C * C + K * K)
        back_too = forward.backward(sent_back)
        own = Counts(2 * H, forward, back_too, again=again, once=once, saved=saved)
        return own + self.scalars(2, rows)

    def _maps(self, heads: int, degrees: Degrees) -> tuple[Sent, Sent, int]:
        """Of the maps of `heads` of a device: bytes over cp (forward, backward), and the FLOPs over
        K³ of each head with which a device finds the state before its part."""
        cp, of_state = degrees["cp"], 4 * heads * self.shape.head_dim**2
        there, back, steps = Ledger(degrees), Ledger(degrees), self.plan.scan_steps(cp)
        if self.plan.kind == "affine+scan":
            sent = there.put(PERMUTE, ("cp",), max(2 * steps - 1, 0) * of_state).sent
            return sent, sent, delta.scan_products(cp)
        there.add(GATHER, ("cp",), 2 * of_state)
        return there.sent, back.add(SCATTER, ("cp",), 2 * of_state).sent, 2 * cp

    def _ways(self, cp: int) -> int:
        """Devices that hold a part of the sequence in the scan."""
        return 1 if self.plan.kind == "heads" else cp

    def _local(self, length: int) -> int:
        return min(self.chunk, length)

    def _alone(self, fresh: Array | None, *tokens: Array) -> Array:
        q, _, v, *_ = tokens
        read = delta.Tokens(*tokens)._replace(fresh=fresh)
        chunks = delta.prepare(read, self._local(q.shape[1]))
        return delta.scan(chunks, _empty(q, v))[0]


def _unit(x_BxLxHxK: Array) -> Array:
    """Vectors of length 1."""
    x = x_BxLxHxK.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)).astype(x_BxLxHxK.dtype)


def _fresh(segment_BxL: Array | None, before_Bx1: Array | None = None) -> Array | None:
    """Where a document begins that is not the first: bool [B, L]. `before_Bx1`: the document before
    these positions; None: there is none."""
    if segment_BxL is None:
        return None
    before_Bx1 = segment_BxL[:, :1] if before_Bx1 is None else before_Bx1
    return segment_BxL != jnp.concatenate([before_Bx1, segment_BxL[:, :-1]], 1)


def _empty(q: Array, v: Array) -> Array:
    B, _, H, K = q.shape
    return jnp.zeros((B, H, K, v.shape[-1]))


def softplus_inverse(y: Array | float) -> Array:
    """x with softplus(x) = y."""
    return y + jnp.log(-jnp.expm1(-jnp.asarray(y, jnp.float32)))


def _spread(low: float, high: float) -> Callable[..., Array]:
    """Initialises with the logarithm of a uniform draw."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        return jnp.log(jax.random.uniform(key, shape, minval=low, maxval=high))

    return init


def _inverse_softplus(low: float, high: float) -> Callable[..., Array]:
    """Initialises so that softplus gives a log-uniform draw."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        drawn = jax.random.uniform(key, shape, minval=jnp.log(low), maxval=jnp.log(high))
        return softplus_inverse(jnp.exp(drawn))

    return init


def bytes_of(made: Callable[[], Any]) -> int:
    """Of the arrays that `made` returns; nothing is computed."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(made)))


def check_rate(rate: float) -> None:
    """Raises ValueError for a negative step."""
    if rate < 0:
        raise ValueError(
            f"rate = {rate:g} makes the loss of a token larger: set 0, which learns nothing, or "
            "more"
        )


def by_head(x_BxH: Array) -> PartitionSpec:
    """PartitionSpec of what every sequence and head has."""
    return PartitionSpec(BATCH_AXES, "tp", *[None] * (x_BxH.ndim - 2))
