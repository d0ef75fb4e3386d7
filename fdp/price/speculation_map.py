"""Where a draft model on devices of its own pays: seconds of the verifier alone, of self-drafting
and of the best schedule with a draft, over what is decoded, window, draft and batch, all on the
same number of devices.

Self-drafting goes by rounds counted with the exact denoiser of Markov-27 (`fdp.data.synthetic`;
first-hitting order, temperature 1, Jacobi drafts), a draft model by an acceptance rate a, equal for
all steps. A draft walks its chain pass by pass, or solves it in windows by Jacobi iteration of its
own, which takes the same rounds a token as those of the verifier.

Legend: N steps, W states of a window, k = W - 1 drafted steps, a acceptance rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from fdp.keys import UserError
from fdp.price.inference import LLADA_8B
from fdp.price.speculation import (
    BLOCKS,
    DEVICES,
    WHOLE,
    Decoding,
    Schedule,
    Split,
    draft_shape,
    drawn,
    played,
    priced,
)

# (N, W) → rounds of self-drafting: mean of a sample, and mean of the slowest of eight. 64 samples,
# from N = 256 on only 8.
Rounds = Mapping[tuple[int, int], tuple[float, float]]
MARKOV_ROUNDS: Rounds = {
    (32, 2): (17.22, 17.75), (32, 4): (10.22, 11.38), (32, 8): (7.41, 8.62),
    (32, 16): (6.23, 7.38), (32, 32): (5.78, 7.12),
    (64, 2): (33.34, 34.38), (64, 4): (18.42, 19.88), (64, 8): (11.59, 13.0),
    (64, 16): (8.69, 10.12), (64, 32): (7.14, 8.38), (64, 64): (6.39, 7.75),
    (256, 8): (36.38, 37.0), (256, 16): (22.0, 23.0), (256, 32): (15.5, 17.0),
    (1024, 8): (131.88, 135.0), (1024, 16): (69.63, 72.0),
}  # fmt: skip
LAYERS, RATES, WINDOWS, BATCHES = (1, 4, 16), (0.6, 0.77, 0.9, 0.95), (4, 8, 16), (1, 8)
PLACES = (Split(1, 7), Split(4, 4), Split(2, 3, 2))
EVERYWHERE = Split(DEVICES, DEVICES, shared=True)


@dataclass(frozen=True)
class Best:
    """The fastest of several: seconds of a generation, and how."""

    seconds: float
    window: int
    how: str


@dataclass(frozen=True)
class MapPoint:
    """Seconds of a generation at one point of the map."""

    at: Decoding
    layers: int
    rate: float
    alone: float
    own: Best
    model: Best

    @property
    def gain(self) -> float:
        """Seconds of the faster of the verifier alone and self-drafting over those with a draft,
        less 1."""
        return min(self.alone, self.own.seconds) / self.model.seconds - 1

    @property
    def speed_up(self) -> float:
        """Seconds of the verifier alone over those of the fastest way to speculate."""
        return self.alone / min(self.own.seconds, self.model.seconds)


def verifier_alone(at: Decoding) -> float:
    """One pass a step, on all devices."""
    return at.steps * priced(LLADA_8B, at).seconds


def lazy_ancestral(at: Decoding, grid: int) -> float:
    """Ancestral sampling on `grid` times that runs a pass only where a token of some request is
    revealed: grid (1 - (1 - 1/grid)^(N · B)) passes in the mean, under a linear schedule. The
    tokens of one time are drawn together, so the law is that of the grid. Raises UserError for a
    grid below 1."""
    if grid < 1:
        raise UserError(f"grid = {grid}: ancestral sampling needs at least 1 time")
    passes = grid * (1 - (1 - 1 / grid) ** (at.steps * at.requests))
    return float(passes * priced(LLADA_8B, at).seconds)


def self_drafted(at: Decoding, rounds: Rounds = MARKOV_ROUNDS) -> Best:
    """The best window of those that `rounds` has counts of. Raises UserError where it has none."""
    found = [
        Best(_rounds(at, counts) * priced(LLADA_8B, at, W).seconds, W, "Jacobi drafts")
        for (N, W), counts in rounds.items()
        if at.steps == N
    ]
    if not found:
        known = sorted({N for N, _ in rounds})
        raise UserError(
            f"no rounds of self-drafting over N = {at.steps} steps were counted, only over "
            f"{known}: count them by `speculate` and give them as `rounds`"
        )
    return min(found, key=lambda one: one.seconds)


def _rounds(at: Decoding, counts: tuple[float, float]) -> float:
    """A batch ends with its slowest; the counts of eight stand for every batch beyond one."""
    return counts[at.requests > 1]


@cache
def _paths(rate: float, at: Decoding) -> list[np.ndarray]:
    """Fewer for long generations, which average by themselves."""
    return [drawn(rate, at.steps, at.requests, seed) for seed in range(max(256 // at.steps, 2))]


def seconds(plan: Schedule, rate: float, at: Decoding) -> float:
    """Mean of a generation in which drafted steps are right with probability `rate`."""
    return float(np.mean([played(plan, right).seconds for right in _paths(rate, at)]))


def drafting(at: Decoding, layers: int, split: Split, W: int, rounds: Rounds) -> tuple[float, str]:
    """(seconds of a drafted step, how), the faster of a pass a step and of the draft's own Jacobi
    iteration."""
    shape = draft_shape(layers)
    found = [(priced(shape, at, 1, split.draft).seconds, "a pass a step")]
    if (at.steps, W) in rounds:
        a_step = _rounds(at, rounds[at.steps, W]) / at.steps
        found.append((a_step * priced(shape, at, W, split.draft).seconds, "solved in windows"))
    return min(found)


def drafted(
    at: Decoding,
    layers: int,
    rate: float,
    rounds: Rounds = MARKOV_ROUNDS,
    windows: Sequence[int] = WINDOWS,
    apart: bool = False,
) -> Best:
    """The best window, placement and schedule with a draft of `layers`. `apart`: only with devices
    of its own."""
    found = []
    for W in (W for W in windows if at.steps >= W):
        for split in PLACES if apart else (EVERYWHERE, *PLACES):
            step, how = drafting(at, layers, split, W, rounds)
            verify = priced(LLADA_8B, at, W, split.verifier).seconds
            plan = Schedule(step, verify, W - 1, replicas=split.replicas)
            name = f"{how} on all devices in turn"
            if not split.shared:
                first = priced(LLADA_8B, at, 1, split.verifier).seconds
                plan = replace(plan, flying=split.replicas + 1, first=first)
                name = f"{how}, {split.draft} + {split.replicas} · {split.verifier} devices"
            found.append(Best(seconds(plan, rate, at), W, name))
    return min(found, key=lambda one: one.seconds)


def corrected(
    at: Decoding, layers: int, rounds: Mapping[int, tuple[float, float]], apart: bool = False
) -> Best:
    """The best window and placement with a draft of `layers` that is corrected by what the verifier
    drew: `rounds` of each window, as in `Rounds`. A round gives one step that needs no draft, every
    other one is drafted once. Draft and verifier take turns. `apart`: only with devices of its
    own."""
    found = []
    for W, counts in rounds.items():
        for split in PLACES if apart else (EVERYWHERE, *PLACES):
            if split.replicas > 1:
                continue
            many = _rounds(at, counts)
            draft = (at.steps - many) * priced(draft_shape(layers), at, 1, split.draft).seconds
            verify = many * priced(LLADA_8B, at, W, split.verifier).seconds
            where = "all devices" if split.shared else f"{split.draft} + {split.verifier} devices"
            found.append(Best(draft + verify, W, f"corrected drafts on {where} in turn"))
    return min(found, key=lambda one: one.seconds)


def cells(
    places: Sequence[Decoding] = (*BLOCKS, *WHOLE),
    layers: Sequence[int] = LAYERS,
    rates: Sequence[float] = RATES,
    batches: Sequence[int] = BATCHES,
    rounds: Rounds = MARKOV_ROUNDS,
) -> list[MapPoint]:
    """The map; a draft stands on devices of its own."""
    found = []
    for place in places:
        for requests in batches:
            at = replace(place, requests=requests)
            alone, own = verifier_alone(at), self_drafted(at, rounds)
            found += [
                MapPoint(at, n, a, alone, own, drafted(at, n, a, rounds, apart=True))
                for n in layers
                for a in rates
            ]
    return found


def rate_needed(
    at: Decoding, layers: int, gain: float = 0.1, rounds: Rounds = MARKOV_ROUNDS
) -> float | None:
    """The least acceptance rate, to 0.01, at which a draft on devices of its own is `gain` faster
    than the verifier alone and than self-drafting; None where no rate is enough."""
    asked = min(verifier_alone(at), self_drafted(at, rounds).seconds) / (1 + gain)
    low, high = 0, 100
    if drafted(at, layers, 1.0, rounds, apart=True).seconds > asked:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        fast = drafted(at, layers, middle / 100, rounds, apart=True).seconds <= asked
        low, high = (low, middle) if fast else (middle, high)
    return high / 100
