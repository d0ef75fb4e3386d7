"""What is measured in traces of routing: loads, balance, fan-out, and what the noise says of them.

Pure functions of a `fdp.data.traces.RoutingTrace` or of loads. Experts are placed in equal
contiguous ranges, as over ep.

Legend: N tokens, L layers with experts, K choices a token, E experts, M parts that hold equal
ranges of experts (devices or nodes), R bins of noise, S token states, Q pieces of sequences.
"""

import numpy as np

from fdp.data.traces import ExpertCounts, RoutingTrace
from fdp.keys import UserError


def loads(found: RoutingTrace | ExpertCounts) -> np.ndarray:
    """Choices of every expert [L, E]."""
    if isinstance(found, ExpertCounts):
        return found.counts_LxE
    ids, E = found.ids_NxLxK, found.experts
    layer = np.broadcast_to(np.arange(ids.shape[1])[:, None] * E, ids.shape)[ids >= 0]
    flat = np.bincount(layer + ids[ids >= 0], minlength=ids.shape[1] * E)
    return flat.reshape(-1, E)


def part_loads(loads_xE: np.ndarray, parts: int) -> np.ndarray:
    """Choices [..., M] of equal contiguous ranges of experts, such as ranks of ep. Raises UserError
    where they are not equal."""
    experts = loads_xE.shape[-1]
    if parts < 1 or experts % parts:
        near = max(d for d in range(1, max(parts, 1) + 1) if experts % d == 0)
        raise UserError(
            f"experts {experts} are not divisible by ep = {parts}: set ep to {near} or another "
            "divisor"
        )
    return loads_xE.reshape(*loads_xE.shape[:-1], parts, -1).sum(-1)


def imbalance(loads_xM: np.ndarray) -> np.ndarray:
    """max/mean over the last axis; 1 where nothing was chosen."""
    mean = loads_xM.mean(-1)
    return np.divide(loads_xM.max(-1), mean, out=np.ones_like(mean), where=mean > 0)


def noise_bins(found: RoutingTrace, bins: int) -> np.ndarray:
    """Bin 0 … R − 1 of every token's noise in [0, 1]; −1 without noise."""
    known = np.isfinite(found.noise_N)
    index = np.minimum(np.where(known, found.noise_N, 0) * bins, bins - 1).astype(int)
    return np.where(known, np.maximum(index, 0), -1)


def noise_loads(found: RoutingTrace, bins: int) -> np.ndarray:
    """Choices of every expert by bin of noise [R, L, E]."""
    bin_N = noise_bins(found, bins)
    return np.stack([loads(found.take(bin_N == b)) for b in range(bins)])


def distinct(found: RoutingTrace, parts: int) -> np.ndarray:
    """Parts (devices, nodes) that every token reaches in every layer [N, L]."""
    part_loads(np.zeros(found.experts), parts)
    part = np.where(found.ids_NxLxK >= 0, found.ids_NxLxK // (found.experts // parts), -1)
    part = np.sort(part, axis=-1)
    new = np.diff(part, axis=-1, prepend=-1) > 0
    return new.sum(-1)


def information(
    ids_NxK: np.ndarray,
    bin_N: np.ndarray,
    state_N: np.ndarray,
    sequence_N: np.ndarray,
    shuffles: int = 20,
    seed: int = 0,
) -> float:
    """I(expert; bin of noise | token state) of one layer, nats a choice.

    A state is such as masked or not: it depends on the noise by itself.

    Bias correction: less the mean of the same figure over `shuffles` in which sequences (pieces of
    them where the bin changes inside) exchange what their tokens choose in each state, and keep
    their bins and how many choices they made in it. Finite samples inflate the plain figure, the
    more as the tokens of a sequence, which share one bin, choose alike. So it is around 0 without
    dependence, where it reads a tenth of what it takes off too low, and may be negative."""
    pieces, piece_N = np.unique(np.stack([sequence_N, bin_N]), axis=1, return_inverse=True)
    states, state_N = np.unique(state_N, return_inverse=True)
    bins, bin_Q = np.unique(pieces[1], return_inverse=True)
    Q, S, E = len(bin_Q), len(states), int(ids_NxK.max()) + 1
    cell = (piece_N.reshape(-1) * S + state_N.reshape(-1))[:, None] * E + ids_NxK
    counts_QxSxE = np.bincount(cell[ids_NxK >= 0], minlength=Q * S * E).reshape(Q, S, E)
    total_QxSx1 = counts_QxSxE.sum(2, keepdims=True)
    share_QxSxE = counts_QxSxE / np.maximum(total_QxSx1, 1)
    one_hot_RxQ = (bin_Q == np.arange(len(bins))[:, None]).astype(float)

    def plain(share_QxSxE: np.ndarray) -> float:
        p = np.tensordot(one_hot_RxQ, share_QxSxE * total_QxSx1, 1) / max(total_QxSx1.sum(), 1)
        independent = p.sum(0) * p.sum(2, keepdims=True)
        ratio = np.divide(p * p.sum((0, 2))[:, None], independent, out=np.ones_like(p), where=p > 0)
        return float((p * np.log(ratio)).sum())

    draw, null = np.random.default_rng(seed), []
    for _ in range(shuffles):
        other = draw.permutation(Q)
        null.append(plain(np.where(total_QxSx1[other] > 0, share_QxSxE[other], share_QxSxE)))
    return plain(share_QxSxE) - float(np.mean(null))
