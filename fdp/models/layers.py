"""Layers of the Transformer, written per shard: each collective stands next to the weight that
needs it.

Inside shard_map F, H, K and V are the shares of this device over tp. L is its share over cp, and
between blocks also over tp under sequence parallelism. Outside shard_map all are global. Parameters
are float32; compute happens in `dtype`.

Legend: B sequences, L positions, D width, F FFN hidden, H query heads, K key/value heads, C
head_dim, V vocabulary."""

import functools
from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import all_gather, psum, reduce_scatter, vary
from fdp.count.counts import (
    GATHER,
    REDUCE,
    SCATTER,
    Counts,
    Degrees,
    Ledger,
    Rows,
    Sent,
    Unstated,
    Work,
    merged,
)
from fdp.models.module import Module, compact, initializers, silu
from fdp.models.shape import NOISE_FEATURES, ModelShape
from fdp.parallel.tensor import vocab_offset

Array = jax.Array
normal, ones, zeros = initializers.normal, initializers.ones, initializers.zeros


def enter_tp(x_BxLxD: Array, sequence_parallel: bool) -> Array:
    """The input of column-parallel weights: the whole sequence (all-gathered under sequence
    parallelism).

    It is marked as varying over tp here, once. Otherwise each product (q, k, v, gate, up) would
    all-reduce its own gradient."""
    return all_gather(x_BxLxD, "tp", dim=1) if sequence_parallel else vary(x_BxLxD, "tp")


# In place of the all-reduce over tp that ends a row-parallel layer: (partial_BxLxD, layer,
# attended) → [B, L, D]. `layer` is "embedding", "attention" or "mlp". Attention also hands over
# `attended`, the attention-weighted mean over this device's heads: f32 [B, L] of the keys → [B, L].
# The module behind it is also given the data of the pass, as keyword `given`.
Reduction = Callable[[Array, str, Callable[[Array], Array] | None], Array]


def leave_tp(
    partial_BxLxD: Array,
    sequence_parallel: bool,
    reduction: Reduction | None = None,
    layer: str = "",
    attended: Callable[[Array], Array] | None = None,
) -> Array:
    """The output of a row-parallel layer: the all-reduce over tp of the partial products, or their
    reduce-scatter under sequence parallelism.

    `reduction` replaces the exact sum, for example in a sampler that sends only what has changed
    since its last step."""
    if reduction is not None:
        return reduction(partial_BxLxD, layer, attended)
    if sequence_parallel:
        return reduce_scatter(partial_BxLxD, "tp", dim=1)
    return psum(partial_BxLxD, "tp")


def hidden_bytes(s: ModelShape, rows: Rows, degrees: Degrees) -> tuple[int, int]:
    """(between layers, inside a layer): bytes of [B, L, D] on a device, in the compute dtype."""
    inside = rows.tokens(degrees) * s.width * s.itemsize
    return (inside // degrees["tp"] if s.sequence_parallel else inside), inside


def entered(s: ModelShape, rows: Rows, degrees: Degrees) -> tuple[Sent, Sent]:
    """Bytes that `enter_tp` sends, (forward, backward)."""
    there, back, hidden = Ledger(degrees), Ledger(degrees), hidden_bytes(s, rows, degrees)[1]
    if s.sequence_parallel:
        shard = hidden / degrees["tp"]
        return there.add(GATHER, ("tp",), shard).sent, back.add(SCATTER, ("tp",), shard).sent
    return {}, back.add(REDUCE, ("tp",), hidden).sent


def left(
    s: ModelShape, rows: Rows, degrees: Degrees, reduction: Reduction | None = None
) -> tuple[Sent, Sent]:
    """Bytes that `leave_tp` sends, (forward, backward). Raises Unstated where `reduction` replaces
    the sum."""
    if reduction is not None:
        raise Unstated("a sum over tp that is replaced has no counts")
    there, back, hidden = Ledger(degrees), Ledger(degrees), hidden_bytes(s, rows, degrees)[1]
    if s.sequence_parallel:
        shard = hidden / degrees["tp"]
        return there.add(SCATTER, ("tp",), shard).sent, back.add(GATHER, ("tp",), shard).sent
    return there.add(REDUCE, ("tp",), hidden).sent, {}


def bias_reduced(s: ModelShape, degrees: Degrees) -> Sent:
    """Bytes of the gradient of a bias that is added after `leave_tp`: under sequence parallelism
    devices of tp add it to different rows."""
    ledger = Ledger(degrees)
    return ledger.add(REDUCE, ("tp",), 4 * s.width).sent if s.sequence_parallel else {}


class RMSNorm(Module):
    """Root-mean-square norm over the last dim with a learned scale (Zhang & Sennrich 2019);
    statistics in float32."""

    epsilon: float = 1e-6

    @compact
    def __call__(self, x: Array) -> Array:
        scale = self.weight("scale", ones, (x.shape[-1],), (None,))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * scale).astype(x.dtype)

    def counts(self, width: int, varies: bool, degrees: Degrees) -> Counts:
        """Counts of a norm over `width`. `varies`: whether devices of tp norm different
        activations; the gradient of the scale is then reduced over tp."""
        ledger = Ledger(degrees)
        if varies:
            ledger.add(REDUCE, ("tp",), 4 * width)
        return Counts(width, backward=Work(sent=ledger.sent))


class LayerNorm(Module):
    """Layer norm over the last dim (Ba et al. 2016); statistics in float32. `affine`: with a
    learned scale and bias."""

    shape: ModelShape
    affine: bool = True

    @compact
    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(variance + self.shape.epsilon)
        if self.affine:
            sizes = (x.shape[-1],)
            x32 = x32 * self.weight("scale", ones, sizes, (None,))
            x32 = x32 + self.weight("bias", zeros, sizes, (None,))
        return x32.astype(x.dtype)

    def counts(self, width: int, varies: bool, degrees: Degrees) -> Counts:
        """As `RMSNorm.counts`."""
        ledger, many = Ledger(degrees), 2 if self.affine else 0
        if varies:
            ledger.add(REDUCE, ("tp",), 4 * width, many)
        return Counts(many * width, backward=Work(sent=ledger.sent))


class HeadNorm(Module):
    """RMSNorm of queries or keys [B, L, H, C]: over each head, with one scale. With `joint_norm`
    over all `heads` of a token, which lie over tp, with a scale for each (Muennighoff et al.
    2024)."""

    shape: ModelShape
    heads: int

    @compact
    def __call__(self, x_BxLxHxC: Array) -> Array:
        s, x32 = self.shape, x_BxLxHxC.astype(jnp.float32)
        if s.joint_norm:
            sizes, axes = (self.heads, s.head_dim), ("tp", None)
            scale = self.weight("scale", ones, sizes, axes, decay=False)
            total = psum((x32 * x32).sum((-2, -1), keepdims=True), "tp")
            mean = total / (self.heads * s.head_dim)
        else:
            scale = self.weight("scale", ones, (s.head_dim,), (None,))
            mean = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean + s.epsilon) * scale).astype(x_BxLxHxC.dtype)

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Devices of tp norm different heads: they add up gradients of one scale, or squares."""
        s, there, back = self.shape, Ledger(degrees), Ledger(degrees)
        if s.joint_norm:
            each = 4 * rows.tokens(degrees)
            there.add(REDUCE, ("tp",), each)
            back.add(REDUCE, ("tp",), each)
            return Counts(self.heads * s.head_dim, Work(sent=there.sent), Work(sent=back.sent))
        back.add(REDUCE, ("tp",), 4 * s.head_dim)
        return Counts(s.head_dim, backward=Work(sent=back.sent))


class Modulation(Module):
    """Shift, scale and gate from features of the noise level [B, E], zero at initialisation
    (adaLN-zero, Peebles & Xie 2022). What they modulate is x·(1 + scale) + shift; the gate
    multiplies as it is, so a block starts as the identity."""

    shape: ModelShape
    features: int = NOISE_FEATURES
    bias: bool = False
    parts: int = 3

    @compact
    def __call__(self, noise_BxE: Array) -> list[Array]:
        sizes = (self.features, self.parts * self.shape.width)
        out = noise_BxE @ self.weight("w", zeros, sizes, (None, None))
        if self.bias:
            out = out + self.weight("b", zeros, sizes[1:], (None,))
        return jnp.split(out[:, None, :], self.parts, axis=-1)

    def counts(self, rows: Rows, degrees: Degrees, varies: bool) -> Counts:
        """`varies`: whether devices of tp modulate different activations. The gradients of shift,
        scale and gate are then reduced over tp, one row per sequence."""
        out = self.parts * self.shape.width
        flops = 2 * rows.batch * self.features * out
        forward = Work(flops, replicated=flops)
        ledger = Ledger(degrees)
        if varies:
            ledger.add(REDUCE, ("tp",), 4 * rows.batch * self.shape.width, self.parts)
        weights = (self.features + self.bias) * out
        return Counts(weights, forward, forward.backward(ledger.sent))


class NoiseEmbedding(Module):
    """Sinusoidal features of the noise level, then one hidden layer: noise_B → [B, E]."""

    features: int = NOISE_FEATURES

    @compact
    def __call__(self, noise_B: Array) -> Array:
        frequencies = jnp.exp(jnp.linspace(0.0, jnp.log(1000.0), self.features // 2))
        angles = noise_B[:, None] * frequencies
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        n = self.features
        w = self.weight("w", normal(n**-0.5), (n, n), (None, None), decay=False)
        return silu(x @ w)

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Its input is data, so the backward pass has one product less."""
        flops = 2 * rows.batch * self.features**2
        forward = Work(flops, replicated=flops)
        return Counts(self.features**2, forward, forward)


class SwiGLU(Module):
    """w_out(silu(x w_gate) · x w_up) (Shazeer 2020). w_gate and w_up are column-parallel, w_out is
    row-parallel and ends in the all-reduce over tp."""

    shape: ModelShape
    reduction: Reduction | None = None

    @compact
    def __call__(self, x_BxLxD: Array, where: Any = None, given: Any = None) -> Array:
        s, dtype = self.shape, jnp.dtype(self.shape.dtype)
        D, F = s.width, s.ffn
        w_in = self.weight("w_in", normal(D**-0.5), (2, D, F), (None, None, "tp")).astype(dtype)
        w_out = self.weight("w_out", normal(F**-0.5), (F, D), ("tp", None)).astype(dtype)
        x_BxLxD = enter_tp(x_BxLxD, s.sequence_parallel)
        h_BxLxF = silu(x_BxLxD @ w_in[0]) * (x_BxLxD @ w_in[1])
        return leave_tp(h_BxLxF @ w_out, s.sequence_parallel, self.reduction, "mlp")

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Gate, up, silu(gate) and their product are saved; remat "dots" keeps gate and up."""
        s = self.shape
        weights = s.width * s.ffn
        (enter, enter_back), (leave, leave_back) = (
            entered(s, rows, degrees),
            left(s, rows, degrees, self.reduction),
        )
        last = Work(2 * rows.positions * weights, sent=leave)
        forward = Work(4 * rows.positions * weights, sent=enter) + last
        between, inside = hidden_bytes(s, rows, degrees)
        wide = rows.tokens(degrees) * (s.ffn // degrees["tp"]) * s.itemsize
        return Counts(
            3 * weights,
            forward,
            forward.backward(merged(enter_back, leave_back)),
            last,
            saved=between + inside + 4 * wide,
            kept=between + 2 * wide,
        )


@jax.custom_jvp
def exact_gelu(x: Array) -> Array:
    """x·Φ(x). In newer versions of JAX the derivative of erf cannot be traced for values that vary
    over a mesh, so it is given here."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


@exact_gelu.defjvp
def _exact_gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    slope = 0.5 * (1 + jax.lax.erf(x * 0.5**0.5)) + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5
    return exact_gelu(x), slope * dx


class MLP(Module):
    """w_out(gelu(x w_in + b_in)) + b_out, without a gate. w_in is column-parallel, w_out is
    row-parallel and ends in the all-reduce over tp. `exact`: gelu by the error function, not by its
    tanh approximation."""

    shape: ModelShape
    exact: bool = False
    reduction: Reduction | None = None

    @compact
    def __call__(self, x_BxLxD: Array, where: Any = None, given: Any = None) -> Array:
        s, dtype = self.shape, jnp.dtype(self.shape.dtype)
        D, F = s.width, s.ffn
        w_in = self.weight("w_in", normal(D**-0.5), (D, F), (None, "tp")).astype(dtype)
        b_in = self.weight("b_in", zeros, (F,), ("tp",)).astype(dtype)
        w_out = self.weight("w_out", normal(F**-0.5), (F, D), ("tp", None)).astype(dtype)
        b_out = self.weight("b_out", zeros, (D,), (None,)).astype(dtype)
        x_BxLxD = enter_tp(x_BxLxD, s.sequence_parallel)
        gelu = exact_gelu if self.exact else jax.nn.gelu
        h_BxLxF = gelu(x_BxLxD @ w_in + b_in)
        return leave_tp(h_BxLxF @ w_out, s.sequence_parallel, self.reduction, "mlp") + b_out

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """The input of gelu and its output are saved; remat "dots" keeps the former."""
        s = self.shape
        weights = s.width * s.ffn
        (enter, enter_back), (leave, leave_back) = (
            entered(s, rows, degrees),
            left(s, rows, degrees, self.reduction),
        )
        last = Work(2 * rows.positions * weights, sent=leave)
        forward = Work(2 * rows.positions * weights, sent=enter) + last
        between, inside = hidden_bytes(s, rows, degrees)
        wide = rows.tokens(degrees) * (s.ffn // degrees["tp"]) * s.itemsize
        return Counts(
            2 * weights + s.ffn + s.width,
            forward,
            forward.backward(merged(enter_back, leave_back, bias_reduced(s, degrees))),
            last,
            saved=between + inside + 2 * wide,
            kept=between + wide,
        )


class Embedding(Module):
    """Vocabulary-parallel lookup: ids_BxL → [B, L, D]. Each device looks up the ids that it owns,
    and an all-reduce over tp adds the results. `logits` is the output head of a tied table."""

    shape: ModelShape
    reduction: Callable[..., Any] | None = None  # builds what replaces the all-reduce

    def setup(self) -> None:
        s = self.shape
        if self.reduction is not None:
            self.sum = self.reduction(s)
        axes = ("tp", None)
        self.table = self.weight("table", normal(1.0), (s.vocab, s.width), axes, decay=False)

    def __call__(self, ids_BxL: Array, given: Any = None) -> Array:
        s, table = self.shape, self.table
        reduce = None if self.reduction is None else functools.partial(self.sum, given=given)
        V = table.shape[0]
        local = ids_BxL - vocab_offset(V)
        mine = (local >= 0) & (local < V)
        x_BxLxD = jnp.where(mine[..., None], table[jnp.clip(local, 0, V - 1)], 0.0)
        x_BxLxD = x_BxLxD.astype(s.dtype)
        return leave_tp(x_BxLxD, s.sequence_parallel, reduce, "embedding")

    def logits(self, x_D: Array) -> Array:
        """[..., D] → float32 [..., V/tp], with the rows of the table divided by √D."""
        dtype = jnp.dtype(self.shape.dtype)
        w = (self.table.T * self.shape.width**-0.5).astype(dtype)
        return jnp.matmul(x_D.astype(dtype), w, preferred_element_type=jnp.float32)

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Counts of the lookup."""
        s = self.shape
        if self.reduction is not None:
            raise Unstated("a sum over tp that is replaced has no counts")
        there, back = left(s, rows, degrees)
        saved = hidden_bytes(s, rows, degrees)[1]
        return Counts(s.vocab * s.width, Work(sent=there), Work(sent=back), saved=saved)


class Head(Module):
    """Vocabulary-parallel projection to float32 logits: [..., D] → [..., V/tp]. The vocabulary may
    be sharded over pp as well (`ModelShape.vocab_axes`): all stages of a pipeline then run their
    share of the same rows."""

    shape: ModelShape

    @compact
    def __call__(self, x_D: Array) -> Array:
        s, D, dtype = self.shape, x_D.shape[-1], jnp.dtype(self.shape.dtype)
        axes = (None, s.vocab_axes)
        w = self.weight("w", normal(D**-0.5), (D, s.vocab), axes, decay=False)
        w = w.astype(dtype)
        return jnp.matmul(x_D.astype(dtype), w, preferred_element_type=jnp.float32)

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """The rows, their logits and the gradient of the logits are saved. The rows are marked as
        varying over pp and, without sequence parallelism, over tp here, after the objective has
        selected them."""
        s, row = self.shape, self.shape.width * self.shape.itemsize
        axes = [a for a in s.vocab_axes if a != "tp" or not s.sequence_parallel]
        ledger = Ledger(degrees).add(REDUCE, axes, rows.head * row)
        weights = s.width * s.vocab
        forward = Work(2 * rows.head * degrees["cp"] * weights)
        saved = rows.head * (row + 2 * 4 * s.vocab // prod(degrees[a] for a in s.vocab_axes))
        return Counts(weights, forward, forward.backward(ledger.sent), saved=saved)


def rotary(x_BxLxHxC: Array, position: Array, base: float, scaling: float = 1.0) -> Array:
    """Rotate the two halves of every head by angles that depend on the position (Su et al. 2021),
    in float32.

    `position`: int [L], or [B, L] where sequences differ. `scaling` > 1 divides positions (Chen et
    al. 2023)."""
    C = x_BxLxHxC.shape[-1]
    frequency = base ** (-jnp.arange(0, C, 2, dtype=jnp.float32) / C)
    angle = (position if scaling == 1.0 else position / scaling)[..., None] * frequency
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    a, b = jnp.split(x_BxLxHxC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxLxHxC.dtype)
