"""The interface of an objective, what token objectives share, and low-discrepancy strata.

Shapes: B sequences, L positions, S model input length (L, or 2L for block diffusion), D width, V
vocabulary (tp: V/tp columns), R rows (any leading shape), N strata (noise levels of one batch)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from fdp.count.counts import REDUCE, Counts, Degrees, Ledger, Work
from fdp.count.counts import Rows as CountedRows
from fdp.parallel.masks import Mask
from fdp.parallel.tensor import TP

# Per-position fields of a batch: "targets" int32 and "weights" f32 always, the rest is the
# objective's own business.
Rows = dict[str, jax.Array]
Batch = dict[str, jax.Array]  # what data yield, by name


class Noised(TypedDict, total=False):
    """One corrupted batch of tokens, a pytree.

    inputs: int32 [B, S]. noise: f32 [B]. rows: arrays [B, L]. segments: document ids int32 [B, S],
    where data have them."""

    inputs: jax.Array
    noise: jax.Array
    rows: Rows
    segments: jax.Array


class Objective:
    """A loss as pure functions of a batch and the model's outputs: Σ loss / Σ count is minimised.

    `dims` names the dims of what `corrupt` returns (`fdp.sharding.batch_specs`)."""

    dims: ClassVar[Any] = {}

    def corrupt(self, key: jax.Array, batch: Batch) -> Any:
        """Corrupt one GLOBAL batch with noise from `key`. Call it outside shard_map, so that every
        mesh has the same noise."""
        raise NotImplementedError

    def count(self, noised: Any) -> Any:
        """What the summed loss of a GLOBAL corrupted batch is divided by; an int where it is
        static."""
        raise NotImplementedError

    def rows(self, hidden: jax.Array, noised: Any, capacity: int | None) -> tuple[jax.Array, Any]:
        """(activations that go through the output head, what `loss` reads besides the outputs)."""
        return hidden, noised["rows"]

    def loss(self, outputs: jax.Array, rows: Any) -> jax.Array:
        """Summands of the loss, of any shape; in nats for tokens."""
        raise NotImplementedError

    def capacity(self, batch: int, length: int, shards: int, seq_shards: int = 1) -> int | None:
        """Static bound on the rows with loss on one of `shards` x `seq_shards` devices; None: all
        rows go through the output head."""
        return None

    def parts(self, noised: Any) -> tuple[Any, ...]:
        """A device's corrupted batch as the batches that one program each can run: more than one
        where rows differ in what they cost (`fdp.objectives.cost`)."""
        return (noised,)

    def refine(self, predict: Callable[[Any], jax.Array], noised: Any) -> Any:
        """One of the `parts` with what a first pass adds to it. `predict`: from such a batch to the
        model's outputs, without gradient; not called where nothing is added."""
        return noised


@dataclass(frozen=True)
class TokenObjective(Objective):
    """A loss on token ids 0..n_ids-1; id n_ids is the mask token. Every token counts 1, or its
    weight where the data have weights. `axes`: mesh axes over which logits are sharded, those of
    the model's shape (`ModelShape.vocab_axes`)."""

    dims: ClassVar[Any] = {
        "inputs": ("batch", "sequence"),
        "noise": ("batch",),
        "rows": ("batch", "sequence"),
        "segments": ("batch", "sequence"),
    }
    n_ids: int
    axes: tuple[str, ...] = field(default=TP, kw_only=True)

    def mask(self, length: int) -> Mask:
        """The attention mask of a model whose data are `length` tokens long."""
        return Mask("bidirectional")

    def position(self, length: int) -> Any:
        """Rotary positions for the indices of the model's input; None: the indices themselves."""
        return None

    def count(self, noised: Noised) -> Any:
        """Number of tokens, or the sum of their weights where the data have weights."""
        rows = noised["rows"]
        return rows["counted"].sum() if "counted" in rows else rows["targets"].size

    def counts(self, rows: CountedRows, degrees: Degrees) -> Counts:
        """Counts of the vocabulary-parallel loss in float32: the maximum of a row's logits, then
        the sum of their exponentials and the logit of the target."""
        ledger = Ledger(degrees).add(REDUCE, self.axes, (4 + 8) * rows.head)
        return Counts(forward=Work(sent=ledger.sent))

    def rows(
        self, hidden: jax.Array, noised: Noised, capacity: int | None
    ) -> tuple[jax.Array, Rows]:
        """The rows that may carry loss, at most `capacity` of them."""
        rows = noised["rows"]
        if capacity is not None and capacity < rows["weights"].size:
            return select_rows(hidden, rows, capacity)
        return hidden, rows


def select_rows(hidden_BxLxD: jax.Array, rows: Rows, capacity: int) -> tuple[jax.Array, Rows]:
    """Gather the ≤ capacity positions whose weight is not 0: [B, L, D] → [capacity, D], rows alike.

    Unused entries have weight 0. The capacity is an exact bound (objective.capacity), so nothing is
    dropped."""
    flat = jax.tree.map(lambda x: x.reshape(-1), rows)
    size = flat["weights"].size
    (places,) = jnp.nonzero(flat["weights"] > 0, size=capacity, fill_value=size)

    def take(x: jax.Array) -> jax.Array:
        return jnp.take(x, places, axis=0, mode="fill", fill_value=0)

    return take(hidden_BxLxD.reshape(-1, hidden_BxLxD.shape[-1])), jax.tree.map(take, flat)


def with_weights(rows: Rows, batch: Batch) -> Rows:
    """`rows` with the data's weights of tokens, f32 [B, L], where there are any."""
    if "weights" not in batch:
        return rows
    weights = batch["weights"].astype(jnp.float32)
    return rows | {"weights": rows["weights"] * weights, "counted": weights}


def with_segments(noised: Noised, batch: Batch) -> Noised:
    """`noised` with the document ids, where the batch has some: the model sees them uncorrupted."""
    return {**noised, "segments": batch["segments"]} if "segments" in batch else noised


def _bit_reverse(n: int) -> np.ndarray:
    """Van der Corput order of 0..n-1 (n a power of two): every aligned dyadic range is an equally
    spaced subset."""
    bits = n.bit_length() - 1
    return np.array([int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(n)])


def _three_deals(n: int) -> np.ndarray:
    """Three permutations of 0..n-1 whose columnwise sum is constant to ±1: [3, n]."""
    first = np.arange(n)
    second = np.where(first % 2 == 0, (n - 1) // 2 - first // 2, n - 1 - first // 2)
    third = np.empty(n, int)
    third[np.argsort(first + second)] = np.arange(n)[::-1]
    return np.stack([first, second, third])


@lru_cache(maxsize=32)
def balanced_order(n: int) -> np.ndarray:
    """The stratum of each row: a fixed permutation of 0..n-1 that balances every power-of-two
    contiguous split.

    With n = 2^a·q, q odd, a shard of even size holds whole pairs (i, n-1-i), or (q ≥ 3) columns of
    q strata whose sums are equal to ±1. The order depends only on n, never on the mesh."""
    columns = n & -n
    deals = n // columns
    if deals == 1:
        if n == 1:
            return np.zeros(1, int)
        pair = _bit_reverse(n // 2)
        return np.stack([pair, n - 1 - pair], 1).reshape(-1)
    across = np.arange(columns)
    rows = list(_three_deals(columns))
    rows += [across if d % 2 else columns - 1 - across for d in range(3, deals)]
    order = np.stack([d * columns + row for d, row in enumerate(rows)])
    return order.T.reshape(-1)


def shifted_order(n: int, xor: Any, turn: Any) -> Any:
    """`balanced_order(n)` with dyadic ranges swapped by `xor` < 2^a and columns rotated by `turn` <
    q (n = 2^a·q).

    Every (xor, turn) keeps every power-of-two contiguous split balanced: it permutes the shards and
    the rows inside them."""
    order = balanced_order(n)
    columns = n & -n
    deals = n // columns
    row = np.arange(n)
    source = ((row // deals) ^ xor) * deals + (row % deals + turn) % deals
    return jnp.asarray(order, jnp.int32)[source] if isinstance(source, jax.Array) else order[source]


def strata(key: jax.Array, n: int) -> jax.Array:
    """A stratum 0..n-1 for each of n rows: int32 [n]. Each is used once, and the marginal of each
    row is uniform.

    The set is always {0..n-1}, and a random shift makes the marginals uniform. A stratified
    estimate is therefore unbiased for a fixed batch, not only for exchangeable data."""
    columns = n & -n
    key_xor, key_turn = jax.random.split(key)
    xor = jax.random.randint(key_xor, (), 0, columns)
    turn = jax.random.randint(key_turn, (), 0, n // columns)
    return shifted_order(n, xor, turn)


def stratified_uniform(key: jax.Array, n: int) -> jax.Array:
    """n times in [0, 1], one in each interval [i/n, (i+1)/n), with one common offset: f32 [n].

    As a set they are {(u + j/n) mod 1} with u uniform (Kingma et al. 2021). They are always exactly
    n, while `arange(0, 1, 1/n)` gives n+1 for n = 49, 98, 103, … in f32."""
    key_order, key_offset = jax.random.split(key)
    return (strata(key_order, n) + jax.random.uniform(key_offset)) / n


def stratified_counts(key: jax.Array, n: int, length: int) -> jax.Array:
    """n mask counts, each uniform on {1..length}, stratified: int32 [n]. They are 1 +
    floor(t·length) in exact integers.

    Rows of stratum i get 1 + (i·length + v) // n with one v uniform on {0..length-1}. Times in f32
    would round up at the end of a stratum and exceed `masked_capacity`."""
    if n * length >= 2**31:
        raise ValueError(f"{n} rows x {length} positions do not fit int32 strata; split the batch")
    key_order, key_offset = jax.random.split(key)
    offset = jax.random.randint(key_offset, (), 0, length)
    return 1 + (strata(key_order, n) * length + offset) // n
