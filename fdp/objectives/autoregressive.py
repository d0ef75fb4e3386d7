"""Next-token prediction with the interface of the diffusion objectives: the exact NLL of all L
tokens.

Shapes: B sequences, L positions, V vocabulary (tp: V/tp columns), R rows (any leading shape)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fdp.objectives.base import Batch, Noised, Rows, TokenObjective, with_segments, with_weights
from fdp.parallel.masks import Mask
from fdp.parallel.tensor import cross_entropy, suppress


@dataclass(frozen=True)
class Autoregressive(TokenObjective):
    """Causal language modelling. Inputs are the tokens shifted right behind `bos`, so Σ loss is
    -log p(tokens).

    Where data have document ids, the end token of a document is the start token of the next."""

    n_ids: int
    bos: int

    def mask(self, length: int) -> Mask:
        """Keys up to the query."""
        return Mask("causal")

    def corrupt(self, key: jax.Array, batch: Batch) -> Noised:
        """Shift the tokens; nothing is random, and `key` is not used. noise = 0; weights = 1, or
        those of the data."""
        del key
        tokens_BxL = batch["tokens"].astype(jnp.int32)
        inputs_BxL = jnp.roll(tokens_BxL, 1, axis=1).at[:, 0].set(self.bos)
        rows = {"targets": tokens_BxL, "weights": jnp.ones(tokens_BxL.shape, jnp.float32)}
        noise_B = jnp.zeros(tokens_BxL.shape[0], jnp.float32)
        noised: Noised = {"inputs": inputs_BxL, "noise": noise_B, "rows": with_weights(rows, batch)}
        return with_segments(noised, batch)

    def loss(self, logits_RxV: jax.Array, rows: Rows) -> jax.Array:
        """-log p(target) in nats, times the weight: [R..., V/tp] → f32 [R...]."""
        logits_RxV = suppress(logits_RxV, self.n_ids, self.axes)
        return rows["weights"] * cross_entropy(logits_RxV, rows["targets"], self.axes)
