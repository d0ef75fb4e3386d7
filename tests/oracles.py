"""What tests compare with: a joint law that can be enumerated, the NELBO over every mask, the
scores of a clean-token prediction, and the autoregressive sampler with a key/value cache.

Shapes: B sequences, L positions, V vocabulary, K positions of a block, M masks, N rows; ids 0..n-1
are states, id n is the mask token."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import comb
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.data.synthetic import NEVER
from fdp.models.transformer import Transformer
from fdp.parallel.tensor import vocab_gather
from fdp.sampling.autoregressive import write
from fdp.sampling.noise import Draw


@dataclass(frozen=True)
class EnumerableJoint:
    """A random joint law on n^length sequences, p ~ Dirichlet(concentration): small enough to
    enumerate everything.
    """

    n: int = 3
    length: int = 4
    concentration: float = 0.3
    seed: int = 0

    @cached_property
    def table(self) -> np.ndarray:
        """p(x): f64 [n] * length."""
        flat = np.random.default_rng(self.seed).dirichlet(
            np.full(self.n**self.length, self.concentration)
        )
        return flat.reshape([self.n] * self.length)

    @cached_property
    def states(self) -> np.ndarray:
        """Every state, masks (id n) included, in mixed-radix order: int32 [(n+1)^length,
        length].
        """
        return np.indices([self.n + 1] * self.length).reshape(self.length, -1).T.astype(np.int32)

    @cached_property
    def conditionals(self) -> np.ndarray:
        """p(x_i | z) for every state z of `states`; one-hot where revealed: f64 [(n+1)^length,
        length, n].
        """
        out = np.empty((len(self.states), self.length, self.n))
        for row, z in enumerate(self.states):
            kept = self.table[tuple(slice(None) if c == self.n else slice(c, c + 1) for c in z)]
            for i, c in enumerate(z):
                marginal = kept.sum(tuple(j for j in range(self.length) if j != i))
                out[row, i] = marginal / marginal.sum() if c == self.n else np.eye(self.n)[c]
        return out

    def index(self, z_BxL: jax.Array) -> jax.Array:
        """Row of `states` (and `conditionals`) that holds z: int [B, L] → int [B]."""
        return z_BxL @ np.array([(self.n + 1) ** i for i in reversed(range(self.length))], np.int32)

    def sample(self, seed: int, step: int, batch: int) -> np.ndarray:
        """Batch number `step`: int32 [B, length], a pure function of (seed, step)."""
        flat = np.random.default_rng([seed, step]).choice(
            self.table.size, batch, p=self.table.reshape(-1)
        )
        return np.stack(np.unravel_index(flat, self.table.shape), 1).astype(np.int32)

    def nll(self, x_BxL: np.ndarray) -> np.ndarray:
        """-log p(x) in nats: int [B, length] → f64 [B]."""
        return -np.log(self.table[tuple(np.asarray(x_BxL).T)])

    def denoiser(self, z_BxL: jax.Array) -> jax.Array:
        """Exact log p(x_i | revealed tokens), as `MarkovChain.denoiser`: int [B, length] → [B,
        length, n]. Jittable.
        """
        logp = np.where(self.conditionals > 0, np.log(np.maximum(self.conditionals, 1e-300)), NEVER)
        return jnp.asarray(logp)[self.index(z_BxL)]


def nelbo_exact(
    denoiser: Callable[[np.ndarray], np.ndarray],
    x_BxL: np.ndarray,
    mask_id: int,
    block: int | None = None,
) -> np.ndarray:
    """NELBO of each sequence in nats with no sampling error, by enumerating every mask: int [B, L]
    → f64 [B].

    `denoiser(z_NxL) -> log-probs [N, L, V]`. L(x) = Σ_{M≠∅} 1/(|M| C(L,|M|)) Σ_{i∈M} -log p(x_i |
    z); with `block`, the sum over blocks of that bound given the clean blocks before (later blocks
    fully masked). Equals -log p(x) for exact conditionals (any-order identity). Raises ValueError
    for blocks longer than 10: 2^L masks."""
    x_BxL = np.asarray(x_BxL)
    batch, length = x_BxL.shape
    block = block or length
    if block > 10 or length % block:
        raise ValueError(
            f"need a block of at most 10 that divides the length {length}, not {block}"
        )
    masks_MxK = (np.arange(1, 2**block)[:, None] >> np.arange(block)) & 1 == 1
    sizes_M = masks_MxK.sum(1)
    weights_M = 1 / (sizes_M * np.array([comb(block, k) for k in sizes_M]))
    total_B = np.zeros(batch)
    for start in range(0, length, block):
        own = slice(start, start + block)
        z_BxMxL = np.repeat(x_BxL[:, None], len(masks_MxK), axis=1)
        z_BxMxL[..., start + block :] = mask_id
        z_BxMxL[..., own] = np.where(masks_MxK, mask_id, z_BxMxL[..., own])
        logp = np.asarray(denoiser(z_BxMxL.reshape(-1, length)), np.float64).reshape(
            *z_BxMxL.shape, -1
        )[:, :, own]
        picked_BxMxK = np.take_along_axis(logp, x_BxL[:, None, own, None], axis=-1)[..., 0]
        total_B += np.where(masks_MxK, -picked_BxMxK, 0).sum(-1) @ weights_M
    return total_B


def score_of_mean(logp_RxV: jax.Array, noisy: jax.Array, sigma: jax.Array, n_ids: int) -> jax.Array:
    """Log scores of a clean-token prediction: log q(y)/q(noisy), q = e^-σ p + (1 - e^-σ)/n_ids:
    [R..., V/tp] → same.

    Exact ratios need p = p(x_i | z without i), NOT the posterior p(x_i | z) (UDLM, Schiff et al.
    2025)."""
    sigma = sigma[..., None]
    q_RxV = jnp.exp(logp_RxV - sigma) - jnp.expm1(-sigma) / n_ids
    return jnp.log(q_RxV) - jnp.log(vocab_gather(q_RxV, noisy))[..., None]


def sample_cached(
    model: Transformer, params: Any, draw: Draw, bos: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `autoregressive.sample` for a causal `model`, with one row a token against the key/value
    cache; "nfe" counts rows.

    Raises ValueError for a model that is not causal and under cp > 1.
    """
    if model.softmax.mask.kind != "causal":
        raise ValueError(
            "a cache filled from left to right needs a causal model: under "
            f"{model.softmax.mask} later tokens would change the keys of earlier ones"
        )
    ids_B = draw.sample_ids_B
    cache, _ = model.decode_state(len(ids_B), draw.length)
    bos_B = jnp.full(len(ids_B), bos, jnp.int32)
    tokens_BxL, _ = write(model, {"params": params}, cache, bos_B, 0, draw)
    return tokens_BxL, {"nfe": jnp.int32(draw.length)}
