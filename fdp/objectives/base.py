"""What a token objective must offer the train step, and the low-discrepancy strata that they share.

Shapes: B sequences, L positions, S model input length (L, or 2L for block diffusion), V vocabulary
(tp: V/tp columns), R rows (any leading shape), N strata (noise levels drawn for one batch)."""

from functools import lru_cache
from typing import Any, Protocol, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

# Per-position fields of a batch: "targets" int32 and "weights" f32 always, the rest is the
# objective's own business.
Rows = dict[str, jax.Array]


class Batch(TypedDict):
    """One corrupted batch, a pytree: inputs int32 [B, S], noise f32 [B], rows of [B, L] arrays."""

    inputs: jax.Array
    noise: jax.Array
    rows: Rows


class Objective(Protocol):
    """A loss on token ids 0..n_ids-1; id n_ids is the mask token. Train on Σ loss / (B·L): every
    token counts.
    """

    @property
    def n_ids(self) -> int:
        """Number of data ids; everything from here on must never be predicted."""
        ...

    @property
    def attention(self) -> str:
        """Who may attend to whom: "causal", "bidirectional" or "block_diffusion"."""
        ...

    @property
    def block(self) -> int:
        """Block length of block diffusion, 0 elsewhere."""
        ...

    @property
    def sparse_rows(self) -> bool:
        """Whether rows of weight 0 may be dropped before the vocabulary head."""
        ...

    def corrupt(self, key: jax.Array, tokens_BxL: jax.Array) -> Batch:
        """Draw the noise of one GLOBAL batch: call it outside shard_map, so that every mesh sees
        the same noise.
        """
        ...

    def loss(self, logits_RxV: jax.Array, rows: Rows) -> jax.Array:
        """Weighted loss of each row in nats: [R..., V/tp] and rows of shape [R...] → f32 [R...]."""
        ...

    def capacity(self, batch: int, seq_len: int, shards: int, seq_shards: int = 1) -> int:
        """Static bound on the rows of weight > 0 that one of `shards` x `seq_shards` devices can
        hold.
        """
        ...


def _bit_reverse(n: int) -> np.ndarray:
    """Van der Corput order of 0..n-1 (n a power of two): every aligned dyadic range is an equally
    spaced subset.
    """
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
    """Stratum held by each row: a fixed permutation of 0..n-1 that balances every power-of-two
    contiguous split.

    With n = 2^a·q, q odd, a shard of even size holds whole pairs (i, n-1-i), or (q ≥ 3) columns of
    q strata of equal sum to ±1. The order depends on n alone, never on the mesh."""
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
    """`balanced_order(n)` with dyadic ranges swapped by `xor` < 2^a and columns turned by `turn` <
    q (n = 2^a·q).

    Any (xor, turn) keeps every power-of-two contiguous split balanced: it permutes the shards and
    rows inside them."""
    order = balanced_order(n)
    columns = n & -n
    deals = n // columns
    row = np.arange(n)
    source = ((row // deals) ^ xor) * deals + (row % deals + turn) % deals
    return jnp.asarray(order, jnp.int32)[source] if isinstance(source, jax.Array) else order[source]


def strata(key: jax.Array, n: int) -> jax.Array:
    """A stratum 0..n-1 for each of n rows, each used once, each row's uniform on its own: int32
    [n].

    The set is {0..n-1} always and the random shift makes every row's marginal uniform, so a
    stratified estimate is unbiased for a fixed batch, not only for exchangeable data."""
    columns = n & -n
    key_xor, key_turn = jax.random.split(key)
    xor = jax.random.randint(key_xor, (), 0, columns)
    turn = jax.random.randint(key_turn, (), 0, n // columns)
    return shifted_order(n, xor, turn)


def stratified_uniform(key: jax.Array, n: int) -> jax.Array:
    """n times in [0, 1], one in each interval [i/n, (i+1)/n), with one common offset: f32 [n].

    As a set this is {(u + j/n) mod 1} with u uniform (Kingma et al. 2021): always exactly n points,
    where `arange(0, 1, 1/n)` yields n+1 for n = 49, 98, 103, … in f32."""
    key_order, key_offset = jax.random.split(key)
    return (strata(key_order, n) + jax.random.uniform(key_offset)) / n


def stratified_counts(key: jax.Array, n: int, length: int) -> jax.Array:
    """n mask counts, each uniform on {1..length}, stratified: int32 [n]. 1 + floor(t·length) in
    exact integers.

    Rows of stratum i get 1 + (i·length + v) // n with one v uniform on {0..length-1}; f32 times
    would round up at a stratum's end and overflow `masked_capacity`."""
    if n * length >= 2**31:
        raise ValueError(f"{n} rows x {length} positions do not fit int32 strata; split the batch")
    key_order, key_offset = jax.random.split(key)
    offset = jax.random.randint(key_offset, (), 0, length)
    return 1 + (strata(key_order, n) * length + offset) // n
