"""Grouped-query attention: heads are sharded over tp and the sequence over cp.

The module projects and rotates queries, keys and values. The inner product is a value, `core`:
softmax attention under a mask with a communication plan over cp (`Softmax`, by
`fdp.parallel.context.attend`), or a core of a topic.

Legend: B sequences, L positions (local over cp), S all positions, D width, H query heads, K
key/value heads, C head_dim."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fdp.collectives import size, vary, vary_like
from fdp.count import context as cost
from fdp.count.counts import Counts, Degrees, Ledger, Rows, Work, merged, of
from fdp.kernels_pallas import attend as front
from fdp.mesh import BATCH_AXES
from fdp.models import conv
from fdp.models.conv import ShortConvolution
from fdp.models.layers import (
    HeadNorm,
    Reduction,
    bias_reduced,
    enter_tp,
    entered,
    hidden_bytes,
    leave_tp,
    left,
    normal,
    rotary,
    zeros,
)
from fdp.models.module import CACHE, Module, compact
from fdp.models.shape import ModelShape
from fdp.parallel.context import cache as sharded
from fdp.parallel.context.attend import attend, decode
from fdp.parallel.context.layouts import SequenceLayout
from fdp.parallel.context.plan import CommPlan, check
from fdp.parallel.masks import Mask

Array = jax.Array
GATHER, TREE = CommPlan("all_gather"), CommPlan("tree")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Where:
    """The positions of the tokens of a forward pass, for every layer that mixes positions.

    `index`: int [L], or [B, L] for rows of a cache: the index in the model's input, which masks
    read. `position`: the rotary position, of the same shape; None: no rotation. `segment`: document
    ids [B, L] or None. `given`: data of the whole pass for the layers of a topic. `noise`: f32 [B]
    or None, the noise level of each sequence, for layers that depend on it."""

    index: Array
    position: Array | None
    segment: Array | None = None
    given: Any = None
    noise: Array | None = None


class Core(Protocol):
    """The inner product of attention. A core is hashable."""

    @property
    def layout(self) -> SequenceLayout:
        """Which positions each device of cp holds."""
        ...

    def __call__(
        self, q_BxLxHxC: Array, k_BxLxKxC: Array, v: Array, where: Where, given: Any
    ) -> Array:
        """Attention of rotated queries to the keys and values of this device: [B, L, H, C].
        `given`: the input of this layer besides activations, or None."""
        ...


@runtime_checkable
class CachedCore(Core, Protocol):
    """A core that can also attend to a cache of keys and values."""

    def rows(self, q_BxLxHxC: Array, k_BxSxKxC: Array, v_BxSxKxC: Array, index_BxL: Array) -> Array:
        """Attention of the rows at `index_BxL` to a cache of all positions, of which a device of cp
        has its slots (`fdp.parallel.context.cache`): [B, L, H, C], equal over cp."""
        ...

    def check_cache(self) -> None:
        """Raises ValueError where attention to a cache would differ from a pass over all rows."""
        ...


@runtime_checkable
class PrefixCore(CachedCore, Protocol):
    """A core whose rows attend to the cache as it was before them, and to one another."""

    def beside(
        self, q_NxLxHxC: Array, k_NxLxKxC: Array, v: Array, held: tuple[Array, Array], index: Array
    ) -> Array:
        """Attention of the rows at `index` [N, L], which follow one another: [N, L, H, C].

        `held`: cached keys and values [B, S, K, C]. N = W·B rows of states, state by state, read
        the same B sequences of the cache."""
        ...


@dataclass(frozen=True)
class Softmax:
    """Softmax attention under `mask`, communicating over cp by `plan`. `keeps`: whether a pass that
    fills a cache stores keys and values in it."""

    mask: Mask
    plan: CommPlan = GATHER
    keeps: bool = True

    @property
    def layout(self) -> SequenceLayout:
        """The layout of the plan."""
        return self.plan.layout

    def __call__(
        self, q_BxLxHxC: Array, k_BxLxKxC: Array, v: Array, where: Where, given: Any
    ) -> Array:
        """As `Core`; `given` is not used."""
        segment = where.segment if self.mask.packed else None
        return attend(q_BxLxHxC, k_BxLxKxC, v, self.mask, self.plan, None, segment)

    def check(self, shape: ModelShape, batch: int, length: int, degrees: Mapping[str, int]) -> None:
        """Raises ValueError, with equation, values and fix, for a plan that cannot run `batch`
        sequences of `length` on a device."""
        cp, tp = degrees["cp"], degrees["tp"]
        if cp == 1 and not self.mask.window:
            return
        plan = self.plan if cp > 1 else GATHER
        heads, kv_heads = shape.heads // tp, shape.kv_heads // tp
        sizes = {"seq_len": length, "cp": cp, "heads": heads, "kv_heads": kv_heads}
        check(plan, self.mask, **sizes, batch=batch)

    def counts(self, shape: ModelShape, rows: Rows, degrees: Degrees) -> Counts:
        """Two matrix products with all keys, and the bytes over cp (`fdp.count.context`).

        Saved for the backward pass: the output, and all keys and values. Short sequences on one
        device of cp also save the probabilities and their logits. Otherwise scores are computed
        again tile by tile, with the row sums of output times its gradient."""
        cp, tp, S, C = degrees["cp"], degrees["tp"], rows.length, shape.head_dim
        heads, kv_heads, tokens = shape.heads // tp, shape.kv_heads // tp, rows.tokens(degrees)
        flops = 4 * rows.positions * S * shape.heads * C
        there, back, once, again = (Ledger(degrees) for _ in range(4))
        if cp > 1:
            at = cost.AttentionShape.of(shape, rows.batch, S, cp, tp)
            for ledger, find in ((there, cost.forward_bytes), (back, cost.backward_bytes)):
                for op, wire in find(self.plan, at, self.mask).items():
                    # The one hop of a ring of two is the first of the backward pass, too: XLA
                    # makes it once, whatever is rematerialised.
                    single = op == cost.PERMUTE and self.plan.ring_degree(cp) == 2
                    (back if single else ledger).put(op, ("cp",), wire)
            if self.mask.packed:  # positions are known from the layout, document ids are not
                once.put(cost.GATHER, ("cp",), (cp - 1) * cost.LABEL * tokens)
        forward = Work(flops, batched=flops, sent=there.sent)
        kept = tokens * C * (heads + 2 * cp * kv_heads) * shape.itemsize
        blockwise = cp > 1 or front.LONG <= S
        scores = 0 if blockwise else heads * tokens * S * (4 + shape.itemsize)
        tiles = flops // 2 + 2 * rows.positions * shape.heads * C if blockwise else 0
        return Counts(
            forward=forward,
            backward=forward.backward(back.sent),
            again=Work(tiles, batched=tiles, sent=again.sent),
            once=once.sent,
            saved=kept + scores,
            kept=kept,
        )

    def rows(self, q_BxLxHxC: Array, k_BxSxKxC: Array, v_BxSxKxC: Array, index_BxL: Array) -> Array:
        """As `CachedCore`. Over cp results are merged by two all-reduces (plan tree), because the
        output projection takes all heads of a device of tp."""
        slots = k_BxSxKxC.shape[1]
        qkv = q_BxLxHxC, k_BxSxKxC, v_BxSxKxC
        if size("cp") > 1:
            return decode(*qkv, self.mask, TREE, index_BxL, sharded.positions(slots))
        places = index_BxL, np.arange(slots)
        return front.attend(*qkv, self.mask, *places)[0]

    def check_cache(self) -> None:
        """Raises ValueError for packed masks and mask rules."""
        if self.mask.packed or self.mask.rule is not None:
            raise ValueError(
                f"no key/value cache for the mask {self.mask}: a row of a cache is one sequence, "
                "and its rows are positions; use causal or bidirectional attention"
            )


class Attention(Module):
    """Attention with rotary positions. Its output projection ends in the all-reduce over tp.
    `bias_out`: with a bias after it.

    Where a cache is kept, a pass over all rows stores rotated keys and values in it: at its
    beginning, where one is given. A pass over rows at given indices ([B, L]), which all devices of
    cp run, replaces the keys and values of those rows and attends to the whole cache; with a
    convolution these must be the rows that follow."""

    shape: ModelShape
    core: Core
    reduction: Reduction | None = None
    bias_out: bool = False

    @compact
    def __call__(self, x_BxLxD: Array, where: Where, given: Any = None) -> Array:
        s, dtype = self.shape, jnp.dtype(self.shape.dtype)
        D, H, K, C = s.width, s.heads, s.kv_heads, s.head_dim
        w_q = self.weight("w_q", normal(D**-0.5), (D, H, C), (None, "tp", None)).astype(dtype)
        w_kv = self.weight("w_kv", normal(D**-0.5), (2, D, K, C), (None, None, "tp", None))
        w_kv = w_kv.astype(dtype)
        w_o = self.weight("w_o", normal((H * C) ** -0.5), (H, C, D), ("tp", None, None))
        w_o = w_o.astype(dtype)

        x_BxLxD = enter_tp(x_BxLxD, s.sequence_parallel)
        if s.conv:
            mix_near = ShortConvolution(s.conv, self.core.layout, name="conv")
            x_BxLxD = mix_near(x_BxLxD, where.index, where.segment)
        q_BxLxHxC = jnp.einsum("bld,dhc->blhc", x_BxLxD, w_q)
        k_BxLxKxC = jnp.einsum("bld,dkc->blkc", x_BxLxD, w_kv[0])
        v_BxLxKxC = jnp.einsum("bld,dkc->blkc", x_BxLxD, w_kv[1])
        if s.bias:
            q_BxLxHxC += self.weight("b_q", zeros, (H, C), ("tp", None), decay=False).astype(dtype)
            b_kv = self.weight("b_kv", zeros, (2, K, C), (None, "tp", None), decay=False)
            k_BxLxKxC, v_BxLxKxC = (
                k_BxLxKxC + b_kv[0].astype(dtype),
                v_BxLxKxC + b_kv[1].astype(dtype),
            )
        if s.qk_norm:
            q_BxLxHxC = HeadNorm(s, H, name="q_norm")(q_BxLxHxC)
            k_BxLxKxC = HeadNorm(s, K, name="k_norm")(k_BxLxKxC)

        def turn(x: Array, position: Array) -> Array:
            return rotary(x, position, s.rope_base, s.rope_scaling)

        if where.position is not None:
            q_BxLxHxC, k_BxLxKxC = (turn(x, where.position) for x in (q_BxLxHxC, k_BxLxKxC))
        out_BxLxHxC, attended = self._mix(q_BxLxHxC, k_BxLxKxC, v_BxLxKxC, where, given)
        partial_BxLxD = jnp.einsum("blhc,hcd->bld", out_BxLxHxC, w_o)
        y_BxLxD = leave_tp(
            partial_BxLxD, s.sequence_parallel, self.reduction, "attention", attended
        )
        if self.bias_out:
            y_BxLxD = y_BxLxD + self.weight("b_o", zeros, (D,), (None,)).astype(dtype)
        return y_BxLxD

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Projections, their biases and norms, the convolution, and the counts of the core."""
        s, tp, C = self.shape, degrees["tp"], self.shape.head_dim
        into, out = s.width * C * (s.heads + 2 * s.kv_heads), s.heads * C * s.width
        (enter, enter_back), (leave, leave_back) = (
            entered(s, rows, degrees),
            left(s, rows, degrees, self.reduction),
        )
        last = Work(2 * rows.positions * out, sent=leave)
        forward = Work(2 * rows.positions * into, sent=enter) + last
        between, inside = hidden_bytes(s, rows, degrees)
        kept = between + rows.tokens(degrees) * C * (s.heads + s.kv_heads) // tp * s.itemsize
        found = Counts(
            into + out + (C * (s.heads + 2 * s.kv_heads) if s.bias else 0),
            forward,
            forward.backward(merged(enter_back, leave_back)),
            last,
            saved=kept + inside,
            kept=kept,
        )
        if self.bias_out:
            found += Counts(s.width, backward=Work(sent=bias_reduced(s, degrees)))
        found += of(self.core, s, rows, degrees)
        if s.qk_norm:
            for heads in (s.heads, s.kv_heads):
                found += HeadNorm(s, heads, parent=None).counts(rows, degrees)
        if s.conv:
            filter = ShortConvolution(s.conv, self.core.layout, parent=None)
            found += filter.counts(s, rows, degrees)
        return found

    def _mix(self, q: Array, k: Array, v: Array, where: Where, given: Any) -> tuple[Array, Any]:
        """(out [B, L, H, C], a function that gives the attention-weighted mean, as `Reduction`
        takes it)."""
        if self.is_initializing():  # a core has no parameters, and perhaps no input yet
            return q, None
        if where.index.ndim == 2 and isinstance(self.core, PrefixCore):
            beside, held = self.core.beside, self._held(k)
            if self.is_mutable_collection(CACHE):
                self._replace_rows(k, v, where.index)

            def mix(v: Array) -> Array:
                return beside(q, k, v, held, where.index)

        elif where.index.ndim == 2:
            core = self._cached_core()
            k, v = self._replace_rows(k, v, where.index)

            def mix(v: Array) -> Array:
                return core.rows(q, k, v, where.index)

        else:
            self.probe("q", q)
            self.probe("k", k)
            self._keep(k, v)

            def mix(v: Array) -> Array:
                return self.core(q, k, v, where, given)

        def attended(value_BxL: Array) -> Array:
            spread = jnp.broadcast_to(value_BxL[..., None, None], (*value_BxL.shape, *v.shape[2:]))
            return mix(spread.astype(v.dtype))[..., 0].mean(-1)

        return mix(v), attended

    def _keep(self, k_BxLxKxC: Array, v_BxLxKxC: Array) -> None:
        if not self.is_mutable_collection(CACHE) or not getattr(self.core, "keeps", True):
            return
        self._cached_core()
        cp = size("cp")
        if self.shape.conv and cp > 1:
            raise ValueError(conv.refuse_pass(self.shape.conv, cp))
        both = sharded.deal(k_BxLxKxC, v_BxLxKxC, self.core.layout)
        for name, rows in zip("kv", both, strict=True):
            if self.has_variable(CACHE, name):
                held = vary_like(self.cached(name), rows)
                sharded.check_capacity(rows.shape[1] * cp, 0, held.shape[1] * cp)
                rows = jax.lax.dynamic_update_slice_in_dim(held, rows, 0, 1)
            self.cache(name, rows)

    def _held(self, like: Array) -> tuple[Array, Array]:
        """Keys and values of the cache, which the pass may only read."""
        self._cached_core()
        return vary_like(self.held("k"), like), vary_like(self.held("v"), like)

    def _replace_rows(self, k: Array, v: Array, index_BxL: Array) -> tuple[Array, Array]:
        """Keys and values of the whole cache after those of these rows have been replaced."""
        both = []
        for name, rows in (("k", k), ("v", v)):
            both.append(sharded.put(self.cached(name), rows, index_BxL))
            self.cache(name, both[-1])
        return both[0], both[1]

    def _cached_core(self) -> CachedCore:
        """The core. Raises ValueError where cached decoding would give wrong results."""
        if not isinstance(self.core, CachedCore):
            raise ValueError(f"{type(self.core).__name__} has no cached decoding: use Softmax")
        self.core.check_cache()
        self._check_order()
        mask = getattr(self.core, "mask", None)
        if size("cp") > 1 and getattr(mask, "kind", None) != "causal":
            raise ValueError(
                f"a cache over cp = {size('cp')} needs a causal mask, which hides what lies behind "
                f"a row, not {mask}: set mesh.cp=1 and give its devices to dp or tp"
            )
        return self.core

    def _check_order(self) -> None:
        mask = getattr(self.core, "mask", None)
        if self.shape.conv and getattr(mask, "kind", None) != "causal":
            raise ValueError(conv.refuse_cache(self.shape.conv))

    def check(self, batch: int, length: int, degrees: Mapping[str, int]) -> None:
        """Raises ValueError for sizes that the core or the convolution cannot run on these
        degrees."""
        if self.shape.conv:
            self._check_conv(length, degrees["cp"])
        if hasattr(self.core, "check"):
            self.core.check(self.shape, batch, length, degrees)

    def _check_conv(self, length: int, cp: int) -> None:
        taps, rule = self.shape.conv, getattr(getattr(self.core, "mask", None), "rule", None)
        conv.check_taps(taps)
        if rule is not None:
            raise ValueError(
                f"model.conv = {taps} mixes neighbours of one sequence, and the input under the "
                f"mask rule {rule} is not one: set model.conv=0"
            )
        if cp > 1:
            conv.hops(self.core.layout, length // cp, cp, taps - 1)

    def decode_state(self, batch: int, length: int) -> tuple[Any, Any]:
        """(zeros, PartitionSpecs) of an empty cache for `batch` sequences of `length`.

        {"k", "v"} of [B, S/cp, K/tp, C] in the compute dtype, sequences over (dp, ep), positions
        round-robin over cp and heads over tp; with a convolution, "conv": its last positions.
        Raises ValueError for a convolution under a mask that is not causal, and for a length that
        cp does not divide."""
        s = self.shape
        self._check_order()
        shape = (batch, sharded.share(length), s.kv_heads // size("tp"), s.head_dim)
        zeros = vary(jnp.zeros(shape, jnp.dtype(s.dtype)), (*BATCH_AXES, "cp", "tp"))
        spec = PartitionSpec(BATCH_AXES, "cp", "tp", None)
        state, specs = {"k": zeros, "v": zeros}, {"k": spec, "v": spec}
        if s.conv:
            filter = ShortConvolution(s.conv, self.core.layout, parent=None)
            state["conv"], specs["conv"] = filter.decode_state(batch, s.width, jnp.dtype(s.dtype))
        return state, specs
