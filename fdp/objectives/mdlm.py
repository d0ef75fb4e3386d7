"""Masked diffusion (MDLM = MD4 = RADD = LLaDA): a cross entropy on the masked positions, weighted
into a NELBO.

There are two unbiased estimators of the same bound. "t": time t, each token masked with probability
1-α(t), weight w(t). "k": exactly k ~ U{1..L} masked tokens, weight L/k. They cannot be mixed:
exact-k masks with 1/t weights are biased.

Shapes: B sequences, L positions, V vocabulary (tp: V/tp columns), R rows (any leading shape), M
masks."""

from dataclasses import dataclass, field
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from fdp.objectives.base import (
    Batch,
    Noised,
    Rows,
    TokenObjective,
    shifted_order,
    stratified_counts,
    stratified_uniform,
    with_segments,
    with_weights,
)
from fdp.objectives.noise_schedules import Linear, NoiseSchedule
from fdp.parallel.tensor import cross_entropy, suppress


def mask_bernoulli(key: jax.Array, probs_B: jax.Array, length: int) -> jax.Array:
    """Mask every position of row b independently with probability probs[b]: bool [B, L]."""
    return jax.random.uniform(key, (probs_B.shape[0], length)) < probs_B[:, None]


def mask_exact_k(key: jax.Array, counts_B: jax.Array, length: int) -> jax.Array:
    """Mask exactly counts[b] positions of row b, all subsets equally likely: bool [B, L]."""
    order_BxL = jnp.argsort(jax.random.bits(key, (counts_B.shape[0], length)), axis=1)
    return jnp.argsort(order_BxL, axis=1) < counts_B[:, None]


def iid_counts(key: jax.Array, count: int, length: int) -> jax.Array:
    """Independent mask counts, uniform on {1..length}: int32 [count]."""
    return jax.random.randint(key, (count,), 1, length + 1)


@dataclass(frozen=True)
class MDLM(TokenObjective):
    """The NELBO of masked diffusion (Sahoo et al. 2024; "k" form: Nie et al. 2025).

    `antithetic` draws one noise level per stratum of the global batch (less than 1/5 of the
    variance); otherwise the levels are independent. Time conditioning reads `noise`: the mask ratio
    k/L, or 1-α(t)."""

    n_ids: int
    form: str = "k"
    schedule: NoiseSchedule = field(default_factory=Linear)
    antithetic: bool = True
    sparse_rows: bool = True

    def __post_init__(self) -> None:
        if self.form not in ("t", "k"):
            raise ValueError(
                f"form must be 't' (continuous time) or 'k' (exact mask count), not {self.form!r}"
            )

    def levels(self, key: jax.Array, count: int, length: int) -> tuple[jax.Array, jax.Array]:
        """`count` noise levels and their weights: f32 [count] each. Form "k" gives (k/length,
        length/k)."""
        if self.form == "k":
            k = (
                stratified_counts(key, count, length)
                if self.antithetic
                else iid_counts(key, count, length)
            )
            return k / length, length / k
        t = stratified_uniform(key, count) if self.antithetic else jax.random.uniform(key, (count,))
        return self.schedule.mask_prob(t), self.schedule.weight(t)

    def corrupt(self, key: jax.Array, batch: Batch) -> Noised:
        """Replace tokens by the mask id n_ids; the weight of unmasked positions is 0."""
        tokens_BxL = batch["tokens"].astype(jnp.int32)
        count, length = tokens_BxL.shape
        key_level, key_mask = jax.random.split(key)
        noise_B, weight_B = self.levels(key_level, count, length)
        if self.form == "k":
            counts_B = jnp.round(noise_B * length).astype(jnp.int32)
            masked_BxL = mask_exact_k(key_mask, counts_B, length)
        else:
            masked_BxL = mask_bernoulli(key_mask, noise_B, length)
        # Selecting, not multiplying: at t = 0 the weight is infinite and nothing is masked.
        weights_BxL = jnp.where(masked_BxL, weight_B[:, None], 0.0)
        rows = with_weights({"targets": tokens_BxL, "weights": weights_BxL}, batch)
        inputs_BxL = jnp.where(masked_BxL, self.n_ids, tokens_BxL)
        noised: Noised = {"inputs": inputs_BxL, "noise": noise_B, "rows": rows}
        return with_segments(noised, batch)

    def loss(self, logits_RxV: jax.Array, rows: Rows) -> jax.Array:
        """w · -log p(target) in nats over the ids 0..n_ids-1: [R..., V/tp] → f32 [R...]."""
        logits_RxV = suppress(logits_RxV, self.n_ids, self.axes)
        return rows["weights"] * cross_entropy(logits_RxV, rows["targets"], self.axes)

    def capacity(self, batch: int, length: int, shards: int, seq_shards: int = 1) -> int | None:
        """The most rows of weight > 0 that a device can ever hold: `masked_capacity` where counts
        are stratified, else all rows. None where `sparse_rows` is off."""
        if not self.sparse_rows:
            return None
        if self.form == "k" and self.antithetic:
            return masked_capacity(batch, length, shards, seq_shards)
        return -(-batch // shards) * -(-length // seq_shards)


@lru_cache(maxsize=256)
def masked_capacity(
    batch: int, seq_len: int, shards: int, seq_shards: int = 1, block: int | None = None
) -> int:
    """The most masked positions that stratified exact-k masks can give one device, about
    (B+1)·L/2/shards; attained, never exceeded.

    `shards`: contiguous batch shards. `seq_shards` > 1 counts at most seq_len/seq_shards positions
    per sequence, a bound for any sequence layout. `block`: length in which k is drawn (block
    diffusion). Raises ValueError where the shards do not divide the batch or sequence, or `block`
    does not divide the sequence."""
    block = block or seq_len
    if batch % shards or seq_len % seq_shards or seq_len % block:
        raise ValueError(
            f"batch {batch} over {shards} shards, sequence {seq_len} over {seq_shards} shards and "
            f"blocks of {block}: "
            "each must divide"
        )
    blocks = seq_len // block
    n = batch * blocks
    columns = n & -n
    # Counts grow with the common offset v (`stratified_counts`), so its largest value is the worst
    # case.
    counts = 1 + (np.arange(n) * block + block - 1) // n
    # A shift permutes aligned power-of-two ranges whole: it matters only where shards or sequences
    # are not such ranges.
    aligned = columns % shards == 0 and (seq_shards == 1 or blocks == 1 or columns % batch == 0)
    worst = 0
    for shift in range(1 if aligned else n):
        order = shifted_order(n, shift % columns, shift // columns)
        per_sequence = counts[order].reshape(batch, blocks).sum(1)
        held = np.minimum(per_sequence, seq_len // seq_shards).reshape(shards, -1).sum(1)
        worst = max(worst, int(held.max()))
    return worst
