"""Next-token prediction, in the frame of the diffusion objectives: the exact NLL of all L tokens.

Shapes: B sequences, L positions, V vocabulary (tp: V/tp columns), R rows (any leading shape).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fdp.objectives.base import Batch, Rows
from fdp.parallel.tensor import cross_entropy, suppress


@dataclass(frozen=True)
class Autoregressive:
    """Causal language modelling. Inputs are the tokens shifted right behind `bos`, so Σ loss is
    -log p(tokens).
    """

    n_ids: int
    bos: int
    attention: str = "causal"
    block: int = 0
    sparse_rows: bool = False  # every row carries loss: there is nothing to drop

    def corrupt(self, key: jax.Array, tokens_BxL: jax.Array) -> Batch:
        """Shift; nothing is random and `key` is not used. noise = 0, weights = 1."""
        del key
        tokens_BxL = tokens_BxL.astype(jnp.int32)
        inputs_BxL = jnp.roll(tokens_BxL, 1, axis=1).at[:, 0].set(self.bos)
        rows = {"targets": tokens_BxL, "weights": jnp.ones(tokens_BxL.shape, jnp.float32)}
        return {
            "inputs": inputs_BxL,
            "noise": jnp.zeros(tokens_BxL.shape[0], jnp.float32),
            "rows": rows,
        }

    def loss(self, logits_RxV: jax.Array, rows: Rows) -> jax.Array:
        """-log p(target) in nats, times the weight: [R..., V/tp] → f32 [R...]."""
        return rows["weights"] * cross_entropy(suppress(logits_RxV, self.n_ids), rows["targets"])

    def capacity(self, batch: int, seq_len: int, shards: int, seq_shards: int = 1) -> int:
        """Every row of the shard."""
        return -(-batch // shards) * -(-seq_len // seq_shards)
