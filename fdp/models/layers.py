"""Layers of the Transformer, written per shard: each collective stands next to the weight that
needs it.

Legend: B sequences, L positions, D width, F FFN hidden, H query heads, K key/value heads, C
head_dim, V vocabulary. Inside shard_map F, H, K, V are this device's shares over tp and L its share
over cp (and over tp between blocks when the sequence is parallel); outside, they are global.
Parameters are float32; compute happens in `dtype`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdp.collectives import all_gather, psum, reduce_scatter, size, vary
from fdp.parallel.tensor import vocab_offset

Array = jax.Array
normal = nn.initializers.normal


def partitioned(init: Any, *spec: str | None) -> Any:
    """Initializer that carries the mesh axis of every dim; the metadata is where PartitionSpecs
    come from.
    """
    return nn.with_partitioning(init, spec)


def enter_tp(x_BxLxD: Array, sequence_parallel: bool) -> Array:
    """Input of column-parallel weights: the whole sequence (all-gather under sequence parallelism).

    Marked as varying here, once: left to each product, every one of q, k, v, gate, up would reduce
    its own gradient."""
    return all_gather(x_BxLxD, "tp", dim=1) if sequence_parallel else vary(x_BxLxD, "tp")


# Sums the partial products of a row-parallel layer over tp: (partial_BxLxD, site, weigh) → [B, L,
# D]. `site` names the layer inside its block: "embedding", "attention" or "mlp". Attention also
# hands over `weigh`, which averages a value of each key with the attention weights of this device's
# heads: f32 [B, S] → [B, L], the mean over heads.
Reduction = Callable[[Array, str, Callable[[Array], Array] | None], Array]


def leave_tp(
    partial_BxLxD: Array,
    sequence_parallel: bool,
    reduction: Reduction | None = None,
    site: str = "",
    weigh: Callable[[Array], Array] | None = None,
) -> Array:
    """Output of a row-parallel layer: sum the partial products, and scatter them under sequence
    parallelism.

    `reduction` replaces the exact sum, as where a sampler sends only what changed since its last
    step."""
    if reduction is not None:
        return reduction(partial_BxLxD, site, weigh)
    return (
        reduce_scatter(partial_BxLxD, "tp", dim=1)
        if sequence_parallel
        else psum(partial_BxLxD, "tp")
    )


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim with a learned scale (Zhang & Sennrich 2019);
    statistics in float32.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", partitioned(nn.initializers.ones, None), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * scale).astype(x.dtype)


class Modulation(nn.Module):
    """Shift, scale and gate from the noise embedding, zero at initialisation (adaLN-zero, Peebles &
    Xie 2022).
    """

    width: int

    @nn.compact
    def __call__(self, noise_BxE: Array) -> tuple[Array, Array, Array]:
        w = self.param(
            "w",
            partitioned(nn.initializers.zeros, None, None),
            (noise_BxE.shape[-1], 3 * self.width),
        )
        # type: ignore[return-value]
        return tuple(jnp.split((noise_BxE @ w)[:, None, :], 3, axis=-1))


class NoiseEmbedding(nn.Module):
    """Sinusoidal features of the noise level, then one hidden layer: noise_B → [B, E]."""

    features: int = 64

    @nn.compact
    def __call__(self, noise_B: Array) -> Array:
        frequencies = jnp.exp(jnp.linspace(0.0, jnp.log(1000.0), self.features // 2))
        angles = noise_B[:, None] * frequencies
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        w = self.param(
            "w",
            partitioned(normal(self.features**-0.5), None, None),
            (self.features, self.features),
        )
        return nn.silu(x @ w)


class SwiGLU(nn.Module):
    """w_out(silu(x w_gate) · x w_up) (Shazeer 2020): columns over tp, then rows over tp with one
    reduction.
    """

    width: int
    hidden: int
    dtype: Any
    sequence_parallel: bool
    reduction: Reduction | None = None

    @nn.compact
    def __call__(self, x_BxLxD: Array) -> Array:
        D, F = self.width, self.hidden // size("tp")
        w_in = self.param("w_in", partitioned(normal(D**-0.5), None, None, "tp"), (2, D, F)).astype(
            self.dtype
        )
        w_out = self.param(
            "w_out", partitioned(normal(self.hidden**-0.5), "tp", None), (F, D)
        ).astype(self.dtype)
        x_BxLxD = enter_tp(x_BxLxD, self.sequence_parallel)
        h_BxLxF = nn.silu(x_BxLxD @ w_in[0]) * (x_BxLxD @ w_in[1])
        return leave_tp(h_BxLxF @ w_out, self.sequence_parallel, self.reduction, "mlp")


class Embedding(nn.Module):
    """Vocabulary-parallel lookup: each device adds the rows it owns. ids_BxL → [B, L, D]."""

    vocab: int
    width: int
    dtype: Any
    sequence_parallel: bool
    reduction: Reduction | None = None

    @nn.compact
    def __call__(self, ids_BxL: Array) -> Array:
        V = self.vocab // size("tp")
        table = self.param("table", partitioned(normal(1.0), "tp", None), (V, self.width))
        local = ids_BxL - vocab_offset(V)
        mine = (local >= 0) & (local < V)
        x_BxLxD = jnp.where(mine[..., None], table[jnp.clip(local, 0, V - 1)], 0.0).astype(
            self.dtype
        )
        return leave_tp(x_BxLxD, self.sequence_parallel, self.reduction, "embedding")


class Head(nn.Module):
    """Vocabulary-parallel projection to float32 logits: [..., D] → [..., V/tp]."""

    vocab: int
    dtype: Any

    @nn.compact
    def __call__(self, x_D: Array) -> Array:
        D, V = x_D.shape[-1], self.vocab // size("tp")
        w = self.param("w", partitioned(normal(D**-0.5), None, "tp"), (D, V)).astype(self.dtype)
        return jnp.matmul(x_D.astype(self.dtype), w, preferred_element_type=jnp.float32)


def rotary(x_BxLxHxC: Array, positions_L: Array, base: float) -> Array:
    """Rotate the two halves of every head by position-dependent angles (Su et al. 2021); float32
    angles.
    """
    C = x_BxLxHxC.shape[-1]
    angles_LxC2 = positions_L[:, None] * base ** (-jnp.arange(0, C, 2, dtype=jnp.float32) / C)
    cos, sin = jnp.cos(angles_LxC2)[:, None, :], jnp.sin(angles_LxC2)[:, None, :]
    a, b = jnp.split(x_BxLxHxC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxLxHxC.dtype)
