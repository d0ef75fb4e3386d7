"""Block diffusion (BD3-LM): autoregressive over blocks, masked diffusion inside a block, trained in
one pass.

The model reads [z ‖ x]: the noisy sequence, then the clean one. Only the first L outputs carry
loss. The two halves have the same rotary positions.

Shapes: B sequences, L positions, K blocks of length `block`, V vocabulary (tp: V/tp columns)."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from fdp.objectives.base import Batch, Noised, Rows, TokenObjective, with_weights
from fdp.objectives.mdlm import MDLM, masked_capacity
from fdp.objectives.noise_schedules import Linear, NoiseSchedule
from fdp.parallel.masks import Mask


@dataclass(frozen=True)
class BlockDiffusionRule:
    """Which keys a query may see in [z ‖ x], 2·length indices: a `masks.Rule`.

    A noisy query sees the noisy tokens of its own block and the clean tokens of earlier blocks. A
    clean query sees the clean tokens of its own and earlier blocks (Arriola et al. 2025). Raises
    ValueError where `block` does not divide `length`."""

    length: int
    block: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.length % self.block:
            raise ValueError(
                f"block length {self.block} does not divide sequence length {self.length}"
            )

    def _place(self, index: Any) -> tuple[Any, Any]:
        """(whether the index is in the clean half, its block inside that half). A comparison tells
        the halves apart, without a remainder."""
        clean = index >= self.length
        return clean, (index - clean * self.length) // self.block

    def __call__(self, q_index: Any, k_index: Any) -> Any:
        """Integers or integer arrays that broadcast → bool."""
        (q_clean, q_block), (k_clean, k_block) = self._place(q_index), self._place(k_index)
        own = (k_block == q_block) & (q_clean == k_clean)
        return own | ((k_block < q_block) & k_clean)

    def meets(self, q_least: Any, q_most: Any, k_least: Any, k_most: Any) -> Any:
        """As `Rule.meets`. Ranges are cut at `length`, and each pair of halves is judged by its
        first and last block."""
        L, block = self.length, self.block
        q_noisy, q_clean = q_least < L, q_most >= L
        k_noisy, k_clean = k_least < L, k_most >= L
        noisy = [self._capped(x) // block for x in (q_least, q_most, k_least, k_most)]
        clean = [self._clean(x) // block for x in (q_least, q_most, k_least, k_most)]
        same = (noisy[0] <= noisy[3]) & (noisy[1] >= noisy[2]) & q_noisy & k_noisy
        earlier = (clean[2] < noisy[1]) & q_noisy & k_clean
        return same | earlier | ((clean[2] <= clean[1]) & q_clean & k_clean)

    def _capped(self, index: Any) -> Any:
        """The index, or the last noisy index where it is clean."""
        clean = index >= self.length
        return index * (1 - clean) + (self.length - 1) * clean

    def _clean(self, index: Any) -> Any:
        """Index inside the clean half, 0 where the index is noisy."""
        return (index - self.length) * (index >= self.length)


@dataclass(frozen=True)
class BlockCausalRule:
    """What the tokens of a sequence see that is decoded block by block: their own block and all
    earlier ones. A `masks.Rule`."""

    block: int

    def __call__(self, q_index: Any, k_index: Any) -> Any:
        """Integers or integer arrays that broadcast → bool."""
        return k_index // self.block <= q_index // self.block

    def meets(self, q_least: Any, q_most: Any, k_least: Any, k_most: Any) -> Any:
        """As `Rule.meets`."""
        return k_least // self.block <= q_most // self.block


@dataclass(frozen=True)
class TwoHalves:
    """Rotary positions of [z ‖ x]: the same in both halves."""

    length: int

    def __call__(self, index: Any) -> Any:
        """Position of each index of 2·length."""
        return index % self.length


@dataclass(frozen=True)
class BlockDiffusion(TokenObjective):
    """The NELBO of BD3-LM (Arriola et al. 2025): an `MDLM` loss in every block, given the clean
    blocks before it.

    There is one noise level per block, stratified over all B·K blocks. block = L is MDLM's bound.
    block = 1 in form "k" masks everything with weight 1, which is the exact autoregressive NLL."""

    n_ids: int
    block: int = 16
    form: str = "k"
    schedule: NoiseSchedule = field(default_factory=Linear)
    antithetic: bool = True
    sparse_rows: bool = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block length must be at least 1, not {self.block}")
        _ = self.within  # refuses an unknown form

    @property
    def within(self) -> MDLM:
        """The objective inside one block."""
        given = (self.form, self.schedule, self.antithetic, self.sparse_rows)
        return MDLM(self.n_ids, *given, axes=self.axes)

    def mask(self, length: int) -> Mask:
        """The attention mask of [z ‖ x]."""
        return Mask(rule=BlockDiffusionRule(length, self.block))

    def position(self, length: int) -> TwoHalves:
        """Both halves have the same rotary positions."""
        return TwoHalves(length)

    def corrupt(self, key: jax.Array, batch: Batch) -> Noised:
        """inputs [B, 2L] = [z ‖ x]; rows of [B, L]; noise [B] is the mean noise level of the
        sequence's blocks.

        Raises ValueError where `block` does not divide L, and for data with document ids."""
        tokens_BxL = batch["tokens"]
        count, length = tokens_BxL.shape
        if length % self.block:
            raise ValueError(f"block length {self.block} does not divide sequence length {length}")
        if "segments" in batch:
            raise ValueError(
                "block diffusion reads [z ‖ x] and no documents: set data.packing=stream"
            )
        blocks = self.within.corrupt(key, {"tokens": tokens_BxL.reshape(-1, self.block)})
        rows = {name: row.reshape(count, length) for name, row in blocks["rows"].items()}
        noisy_BxL = blocks["inputs"].reshape(count, length)
        return {
            "inputs": jnp.concatenate([noisy_BxL, rows["targets"]], axis=1),
            "noise": blocks["noise"].reshape(count, -1).mean(1),
            "rows": with_weights(rows, batch),
        }

    def rows(
        self, hidden: jax.Array, noised: Noised, capacity: int | None
    ) -> tuple[jax.Array, Rows]:
        """Rows of the noisy half, as `TokenObjective.rows`."""
        return super().rows(hidden[:, : noised["rows"]["weights"].shape[1]], noised, capacity)

    def loss(self, logits_RxV: jax.Array, rows: Rows) -> jax.Array:
        """w · -log p(target) in nats over the ids 0..n_ids-1: [R..., V/tp] → f32 [R...]."""
        return self.within.loss(logits_RxV, rows)

    def capacity(self, batch: int, length: int, shards: int, seq_shards: int = 1) -> int | None:
        """As `MDLM.capacity` with blocks; `length` is L."""
        if not self.sparse_rows:
            return None
        if self.form == "k" and self.antithetic:
            return masked_capacity(batch, length, shards, seq_shards, block=self.block)
        return -(-batch // shards) * -(-length // seq_shards)
