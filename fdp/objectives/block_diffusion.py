"""Block diffusion (BD3-LM): autoregressive over blocks, masked diffusion inside a block, trained in
one pass.

The model reads [z ‖ x]: the noisy sequence, then the clean one; only the first L outputs carry
loss. Rotary positions repeat for the two halves.

Shapes: B sequences, L positions, K blocks of length `block`, V vocabulary (tp: V/tp columns).
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from fdp.objectives.base import Batch, Rows
from fdp.objectives.mdlm import MDLM, masked_capacity
from fdp.objectives.schedules import Linear, Schedule


def block_diffusion_mask(q_index: Any, k_index: Any, length: int, block: int) -> Any:
    """Whether query q may attend to key k in [z ‖ x] of 2·length: integer arrays or ints that
    broadcast → bool.

    Noisy → noisy of its own block; noisy → clean of strictly earlier blocks; clean → clean of its
    own block and earlier; clean → noisy never (Arriola et al. 2025)."""
    q_clean, k_clean = q_index >= length, k_index >= length
    q_block, k_block = q_index % length // block, k_index % length // block
    own = (k_block == q_block) & (q_clean == k_clean)
    earlier_clean = (k_block < q_block) & k_clean
    return own | earlier_clean


@dataclass(frozen=True)
class BlockDiffusion:
    """BD3-LM NELBO (Arriola et al. 2025): an `MDLM` loss in every block given the clean blocks
    before it.

    One noise level per block, stratified over all B·K blocks. block = L is MDLM's bound; block = 1
    in form "k" masks everything with weight 1, which is the exact autoregressive NLL."""

    n_ids: int
    block: int = 16
    form: str = "k"
    schedule: Schedule = field(default_factory=Linear)
    antithetic: bool = True
    attention: str = "block_diffusion"
    sparse_rows: bool = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block length must be at least 1, not {self.block}")
        _ = self.within  # refuses an unknown form

    @property
    def within(self) -> MDLM:
        """The objective of one block."""
        return MDLM(self.n_ids, self.form, self.schedule, self.antithetic)

    def corrupt(self, key: jax.Array, tokens_BxL: jax.Array) -> Batch:
        """inputs [B, 2L] = [z ‖ x]; rows of [B, L]; noise [B] is the mean level of the sequence's
        blocks.

        Raises ValueError where `block` does not divide L.
        """
        batch, length = tokens_BxL.shape
        if length % self.block:
            raise ValueError(f"block length {self.block} does not divide sequence length {length}")
        blocks = self.within.corrupt(key, tokens_BxL.reshape(-1, self.block))
        rows = {name: row.reshape(batch, length) for name, row in blocks["rows"].items()}
        inputs_Bx2L = jnp.concatenate(
            [blocks["inputs"].reshape(batch, length), rows["targets"]], axis=1
        )
        return {
            "inputs": inputs_Bx2L,
            "noise": blocks["noise"].reshape(batch, -1).mean(1),
            "rows": rows,
        }

    def loss(self, logits_RxV: jax.Array, rows: Rows) -> jax.Array:
        """w · -log p(target) in nats over the ids 0..n_ids-1: [R..., V/tp] → f32 [R...]."""
        return self.within.loss(logits_RxV, rows)

    def capacity(self, batch: int, seq_len: int, shards: int, seq_shards: int = 1) -> int:
        """Rows of weight > 0 one device can ever hold, seq_len being L: `masked_capacity` with
        blocks, else all.
        """
        if self.form == "k" and self.antithetic:
            return masked_capacity(batch, seq_len, shards, seq_shards, block=self.block)
        return -(-batch // shards) * -(-seq_len // seq_shards)
