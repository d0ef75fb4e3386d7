"""Which key blocks each query block attends to: block lists built from queries and keys by three
published estimators.

Every builder is jittable, has static capacities, and works on the whole sequence in its natural
order (the layout of a ring is applied to the lists afterwards). `causal` = a token sees itself and
the past; otherwise it sees everything. `grouped` = the G = H/K query heads of a key/value head
share one list, chosen from the sum of their probabilities.

Legend: B sequences, S tokens, H query heads, K key/value heads, G = H/K, C head_dim, J lists a
sequence (K if grouped, else H), N query blocks, T key blocks (N = T = S / block), A capacity of a
list, R sampled rows, P probe rows, O offsets q - k of a diagonal, D distances of blocks."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdp.collectives import vary_like

Array = jax.Array


class BlockIndex(NamedTuple):
    """Key blocks of every query block.

    ids_BxJxNxA int32: ascending, -1 in unused slots (never 0: a reader that ignores `counts` must
    not see block 0 twice). counts_BxJxN int32: used slots. overflow: int32 scalar, wanted blocks
    left out for want of capacity, all lists added up; 0 means that the lists are exactly what the
    estimator asked for."""

    ids_BxJxNxA: Array
    counts_BxJxN: Array
    overflow: Array


def pack(wanted_BxJxNxT: Array, priority_BxJxNxT: Array, capacity: int) -> BlockIndex:
    """Lists of the wanted blocks, the `capacity` of highest priority where more are wanted (ties:
    the lower block).

    wanted bool and finite priority f32, [B, J, N, T] → BlockIndex with A = capacity. Raises
    ValueError when capacity is not in 1 … T."""
    T = wanted_BxJxNxT.shape[-1]
    if not 1 <= capacity <= T:
        raise ValueError(
            f"capacity {capacity} is not in 1 … {T} key blocks: set "
            f"capacity={min(max(capacity, 1), T)}"
        )
    key_BxJxNxT = jnp.where(wanted_BxJxNxT, priority_BxJxNxT.astype(jnp.float32), -jnp.inf)
    best_BxJxNxA, ids_BxJxNxA = lax.top_k(key_BxJxNxT, capacity)
    # Unused slots sort behind every block before they become -1.
    ids_BxJxNxA = jnp.sort(jnp.where(jnp.isneginf(best_BxJxNxA), T, ids_BxJxNxA), axis=-1)
    wanted_BxJxN = wanted_BxJxNxT.sum(-1, dtype=jnp.int32)
    overflow = jnp.maximum(wanted_BxJxN - capacity, 0).sum(dtype=jnp.int32)
    ids_BxJxNxA = jnp.where(ids_BxJxNxA == T, -1, ids_BxJxNxA).astype(jnp.int32)
    return BlockIndex(ids_BxJxNxA, jnp.minimum(wanted_BxJxN, capacity), overflow)


def unpack(index: BlockIndex, blocks: int) -> Array:
    """The lists as a block mask: bool [B, J, N, T] with T = blocks."""
    ids_BxJxNxA = jnp.where(index.ids_BxJxNxA < 0, blocks, index.ids_BxJxNxA)
    kept_BxJxNxT = jnp.zeros((*ids_BxJxNxA.shape[:-1], blocks + 1), bool)
    return jnp.put_along_axis(kept_BxJxNxT, ids_BxJxNxA, True, axis=-1, inplace=False)[..., :blocks]


def vertical_slash(
    q_BxSxHxC: Array,
    k_BxSxKxC: Array,
    block: int,
    capacity: int,
    verticals: int,
    slashes: int,
    causal: bool = True,
    grouped: bool = False,
    probe: int = 64,
    initial: int = 1,
    local: int = 1,
) -> BlockIndex:
    """Blocks that the strongest columns and diagonals cross (MInference, Jiang et al. 2024, arXiv
    2407.02490, Alg. 2).

    The attention of `probe` query rows is summed per key (vertical) and per offset q - k (slash);
    the `verticals` best keys and `slashes` best offsets are kept, and every block that one of them
    crosses is wanted. The probe rows are the last ones, as in the paper; without a causal mask,
    where the last rows say nothing of keys ahead, they are spread evenly. `initial` first blocks
    and the `local` nearest are forced. Priority: the mass of a block's columns plus that of its
    diagonals. Raises ValueError for shapes or capacities that do not fit."""
    S = _check(q_BxSxHxC, k_BxSxKxC, block, capacity, initial, local, causal)
    most = {"verticals": S, "slashes": S if causal else 2 * S - 1, "probe": S}
    for name, value in (("verticals", verticals), ("slashes", slashes), ("probe", probe)):
        if not 1 <= value <= most[name]:
            fix = min(max(value, 1), most[name])
            raise ValueError(
                f"{name} {value} is not in 1 … {most[name]} for {S} tokens: set {name}={fix}"
            )
    rows_P = (
        S - probe + jnp.arange(probe)
        if causal
        else ((jnp.arange(probe) + 0.5) * S / probe).astype(jnp.int32)
    )
    mass_BxJxPxS = _probe_attention(q_BxSxHxC[:, rows_P], k_BxSxKxC, rows_P, causal, grouped)
    column_BxJxS = _keep_largest(mass_BxJxPxS.sum(-2), verticals)
    slash_BxJxO = _keep_largest(_diagonal_sums(mass_BxJxPxS, rows_P), slashes)

    N = S // block
    column_BxJxT = column_BxJxS.reshape(*column_BxJxS.shape[:-1], N, block).sum(-1)
    slash_BxJxDxU = slash_BxJxO.reshape(
        *slash_BxJxO.shape[:-1], 2 * N, block
    )  # offset = (D - N)·block + U
    # A diagonal crosses the blocks at distance D - N and, unless its offset is a multiple of
    # `block`, at one more.
    more_BxJxD = jnp.pad(slash_BxJxDxU[..., :-1, 1:].sum(-1), ((0, 0), (0, 0), (1, 0)))
    slash_BxJxD = slash_BxJxDxU.sum(-1) + more_BxJxD
    between_NxT = jnp.arange(N)[:, None] - jnp.arange(N)
    estimate_BxJxNxT = column_BxJxT[..., None, :] + slash_BxJxD[..., between_NxT + N]
    allowed_NxT, forced_NxT = _shape(N, initial, local, causal)
    wanted = ((estimate_BxJxNxT > 0) & allowed_NxT) | forced_NxT
    return pack(wanted, _forced_first(estimate_BxJxNxT, forced_NxT), capacity)


def block_topk(
    q_BxSxHxC: Array,
    k_BxSxKxC: Array,
    block: int,
    capacity: int,
    causal: bool = True,
    grouped: bool = False,
    initial: int = 1,
    local: int = 1,
) -> BlockIndex:
    """The `capacity` blocks with the largest product of mean-pooled query and mean-pooled key
    block.

    Every list is full, or as long as there are blocks in sight, so overflow is 0. `initial` first
    and `local` nearest blocks are always among them. Source: MInference, Jiang et al. 2024, arXiv
    2407.02490, Alg. 3. Raises ValueError for shapes or capacities that do not fit."""
    S = _check(q_BxSxHxC, k_BxSxKxC, block, capacity, initial, local, causal)
    N = S // block
    allowed_NxT, forced_NxT = _shape(N, initial, local, causal)
    logits = _scores(_pool(q_BxSxHxC, block), _pool(k_BxSxKxC, block))
    logp_BxKxGxNxT = jax.nn.log_softmax(jnp.where(allowed_NxT, logits, -jnp.inf), axis=-1)
    # log Σ_G p orders as Σ_G p does and, unlike it, keeps blocks apart whose probability
    # underflows.
    score_BxJxNxT = _lists(logp_BxKxGxNxT, grouped, jax.nn.logsumexp)
    allowed_BxJxNxT = jnp.broadcast_to(allowed_NxT, score_BxJxNxT.shape)
    score_BxJxNxT = _forced_first(jnp.where(allowed_NxT, score_BxJxNxT, 0.0), forced_NxT)
    return pack(allowed_BxJxNxT, score_BxJxNxT, capacity)._replace(overflow=jnp.int32(0))


def antidiagonal(
    q_BxSxHxC: Array,
    k_BxSxKxC: Array,
    block: int,
    capacity: int,
    tau: float,
    stride: int,
    causal: bool = True,
    grouped: bool = False,
    initial: int = 1,
    local: int = 1,
) -> BlockIndex:
    """The fewest blocks whose antidiagonal scores hold a share `tau` of a query block's mass, at
    most `capacity`.

    Scores: of every stride x stride tile of logits the antidiagonal is summed, which touches each
    row and column once; softmax over the tiles of a row, summed to blocks. `initial` first and
    `local` nearest blocks are taken first and count towards `tau`. Source: XAttention, Xu et al.
    2025, arXiv 2503.16428, Alg. 1. Raises ValueError for tau outside (0, 1], a block that is no
    multiple of stride, and shapes or capacities that do not fit."""
    S = _check(q_BxSxHxC, k_BxSxKxC, block, capacity, initial, local, causal)
    if not 0 < tau <= 1:
        raise ValueError(
            f"tau {tau} is not in (0, 1]: it is the share of attention mass to keep, such as 0.95"
        )
    if stride < 1 or block % stride:
        raise ValueError(
            f"block {block} is not a multiple of stride {stride}: set stride to a divisor of "
            f"{block}"
        )
    N = S // block
    allowed_NxT, forced_NxT = _shape(N, initial, local, causal)
    mass_BxJxNxT = antidiagonal_mass(q_BxSxHxC, k_BxSxKxC, block, stride, causal, grouped)
    order_BxJxNxT = jnp.argsort(-_forced_first(mass_BxJxNxT, forced_NxT), axis=-1, stable=True)
    sorted_BxJxNxT = jnp.take_along_axis(mass_BxJxNxT, order_BxJxNxT, axis=-1)
    before_BxJxNxT = jnp.cumsum(sorted_BxJxNxT, axis=-1) - sorted_BxJxNxT
    rank_BxJxNxT = jnp.argsort(order_BxJxNxT, axis=-1)
    needed_BxJxNxT = jnp.take_along_axis(before_BxJxNxT < tau, rank_BxJxNxT, axis=-1) & allowed_NxT
    return pack(needed_BxJxNxT | forced_NxT, _forced_first(mass_BxJxNxT, forced_NxT), capacity)


def antidiagonal_mass(
    q_BxSxHxC: Array, k_BxSxKxC: Array, block: int, stride: int, causal: bool, grouped: bool
) -> Array:
    """Attention mass of every block as its antidiagonals estimate it: f32 [B, J, N, T], 1 in sum
    over T.

    Scores as in `antidiagonal`; where grouped, the mean over the heads of a group.
    """
    B, S, _, C = q_BxSxHxC.shape
    tiles, N = S // stride, S // block
    # Σ_t q[stride-1-t] · k[t] is one inner product of the tile's rows, laid end to end, with its
    # columns.
    reversed_q = (
        q_BxSxHxC.reshape(B, tiles, stride, -1, C)[:, :, ::-1]
        .swapaxes(2, 3)
        .reshape(B, tiles, -1, stride * C)
    )
    along_k = (
        k_BxSxKxC.reshape(B, tiles, stride, -1, C).swapaxes(2, 3).reshape(B, tiles, -1, stride * C)
    )
    # `_scores` divides by √(stride·C); the mean over the antidiagonal of logits is over stride and
    # √C.
    logits = _scores(reversed_q, along_k) / stride**0.5
    if causal:
        logits = jnp.where(jnp.tri(tiles, dtype=bool), logits, -jnp.inf)
    p = _lists(jax.nn.softmax(logits, axis=-1), grouped, jnp.mean)
    return p.reshape(*p.shape[:2], N, block // stride, N, block // stride).sum(-1).mean(-2)


def recall(mass_BxHxRxT: Array, row_position_R: Array, index: BlockIndex, block: int) -> Array:
    """Attention mass that the lists keep, per query head, f32 [H]: mean over sequences and sampled
    rows.

    mass: exact softmax mass of the sampled rows by key block, all T of them
    (`sparsity_density.block_mass` with cp unbound). With recall r of a row, attention over its list
    differs from full attention by at most 2(1 - r)·max|v|: both are means of values, and o_full =
    r·o_list + (1 - r)·o_rest."""
    kept_BxJxNxT = unpack(index, mass_BxHxRxT.shape[-1])
    kept_BxJxRxT = kept_BxJxNxT[:, :, row_position_R // block]
    repeats = mass_BxHxRxT.shape[1] // kept_BxJxRxT.shape[1]
    kept_BxHxRxT = jnp.repeat(kept_BxJxRxT, repeats, axis=1)
    return jnp.where(kept_BxHxRxT, mass_BxHxRxT, 0.0).sum(-1).mean((0, 2))


# Parts
# -------------------------------------------------------------------------------------------------


def _check(
    q: Array, k: Array, block: int, capacity: int, initial: int, local: int, causal: bool
) -> int:
    """Number of tokens, after the checks that all builders share."""
    (B, S, H, C), (_, _, K, _) = q.shape, k.shape
    if k.shape != (B, S, K, C) or H % K:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must be [B, S, H, C] and [B, S, K, C] with H "
            "% K = 0"
        )
    if block < 1 or S % block:
        raise ValueError(
            f"{S} tokens are not a multiple of block {block}: pad the sequence or choose a divisor "
            f"of {S}"
        )
    forced = initial + (local if causal else 2 * local - 1)
    if initial < 0 or local < 1:
        raise ValueError(
            f"initial = {initial} must be at least 0 and local = {local} at least 1 (the diagonal "
            "block)"
        )
    if min(forced, S // block) > capacity:
        near = "local" if causal else "2·local - 1"
        raise ValueError(
            f"initial + {near} = {forced} forced blocks exceed capacity {capacity}: set "
            f"capacity={forced}"
        )
    return S


def _shape(N: int, initial: int, local: int, causal: bool) -> tuple[Array, Array]:
    """Blocks with at least one visible entry, and those that every list holds: bool [N, T] each."""
    between_NxT = jnp.arange(N)[:, None] - jnp.arange(N)
    allowed_NxT = between_NxT >= 0 if causal else jnp.ones((N, N), bool)
    return allowed_NxT, allowed_NxT & ((jnp.arange(N) < initial) | (jnp.abs(between_NxT) < local))


def _forced_first(score: Array, forced_NxT: Array) -> Array:
    """Scores with all forced blocks above all others, and otherwise in the same order."""
    return jnp.where(forced_NxT, jnp.finfo(jnp.float32).max, score)


def _scores(q_BxNxHxC: Array, k_BxTxKxC: Array) -> Array:
    """q·k / √C, float32: [B, K, G, N, T]."""
    B, N, H, C = q_BxNxHxC.shape
    K = k_BxTxKxC.shape[2]
    q_BxNxKxGxC = q_BxNxHxC.reshape(B, N, K, H // K, C)
    scores = jnp.einsum(
        "bnkgc,btkc->bkgnt", q_BxNxKxGxC, k_BxTxKxC, preferred_element_type=jnp.float32
    )
    return scores * C**-0.5


def _lists(x_BxKxGxNxT: Array, grouped: bool, combine: Callable[..., Array]) -> Array:
    """One list a head, or a group combined into one: [B, J, N, T]."""
    if grouped:
        return combine(x_BxKxGxNxT, axis=2)
    B, K, G, *rest = x_BxKxGxNxT.shape
    return x_BxKxGxNxT.reshape(B, K * G, *rest)


def _pool(x_BxSxHxC: Array, block: int) -> Array:
    """Mean of every block of tokens, float32: [B, N, H, C]."""
    B, S, H, C = x_BxSxHxC.shape
    return x_BxSxHxC.astype(jnp.float32).reshape(B, S // block, block, H, C).mean(2)


def _probe_attention(
    q_BxPxHxC: Array, k_BxSxKxC: Array, rows_P: Array, causal: bool, grouped: bool
) -> Array:
    """Softmax attention of the probe rows: f32 [B, J, P, S]."""
    logits = _scores(q_BxPxHxC, k_BxSxKxC)
    if causal:
        logits = jnp.where(rows_P[:, None] >= jnp.arange(k_BxSxKxC.shape[1]), logits, -jnp.inf)
    return _lists(jax.nn.softmax(logits, axis=-1), grouped, jnp.mean)


def _diagonal_sums(mass_BxJxPxS: Array, rows_P: Array) -> Array:
    """Σ over probe rows of the mass at key = row - offset, for offsets -S … S - 1: f32 [B, J, 2S].

    Row by row, because a gather would hold P·2S entries a head.
    """
    S = mass_BxJxPxS.shape[-1]

    def add(total_BxJxO: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        position, mass_BxJxS = row
        # Key S - 1 has offset position - (S - 1), at index position + 1; smaller keys follow.
        here = (
            lax.dynamic_slice_in_dim(total_BxJxO, position + 1, S, axis=-1) + mass_BxJxS[..., ::-1]
        )
        return lax.dynamic_update_slice_in_dim(total_BxJxO, here, position + 1, axis=-1), None

    zeros_BxJxO = jnp.zeros((*mass_BxJxPxS.shape[:2], 2 * S), jnp.float32)
    return lax.scan(
        add, vary_like(zeros_BxJxO, mass_BxJxPxS), (rows_P, jnp.moveaxis(mass_BxJxPxS, 2, 0))
    )[0]


def _keep_largest(x: Array, k: int) -> Array:
    """x with all but the k largest of its last dim set to zero (ties: the lower index)."""
    largest, where = lax.top_k(x, k)
    return jnp.put_along_axis(jnp.zeros_like(x), where, largest, axis=-1, inplace=False)
