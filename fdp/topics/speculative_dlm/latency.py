"""Simulated seconds of the study: rows with the error of the prices, and where a draft pays."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fdp.price.inference import LLADA_8B
from fdp.price.speculation import BLOCKS, WHOLE, Decoding, calibration, free_states, knee
from fdp.price.speculation_map import (
    LAYERS,
    MARKOV_ROUNDS,
    RATES,
    MapPoint,
    Rounds,
    cells,
    corrected,
    rate_needed,
    self_drafted,
    verifier_alone,
)
from fdp.study.figures import figure
from fdp.study.measure import Measurement, derive
from fdp.study.report import Row
from fdp.topics.speculative_dlm.counted import RoundCounts
from fdp.topics.speculative_dlm.settings import PLAIN

BATCH = 8
PRICED = 32  # steps of a priced block
DEPTH = 8  # layers of a draft beside 32 of its verifier: a quarter, as those that are trained
FREE = ("stale", "jacobi")  # without a pass of any model
GIVEN = "8B verifier, 8 × H100, batch 1; rounds of Jacobi drafts counted with exact Markov-27"


def blocks(rounds: Rounds = MARKOV_ROUNDS) -> Row:
    """Self-drafting against the verifier alone on blocks of 32, over all prefixes."""
    found = {at.name: verifier_alone(at) / self_drafted(at, rounds).seconds for at in BLOCKS}
    said = ", ".join(f"{name} {gain:.2f}" for name, gain in found.items())
    eight = [replace(at, requests=8) for at in BLOCKS]
    batch = min(verifier_alone(at) / self_drafted(at, rounds).seconds for at in eight)
    knees = [knee(LLADA_8B, 1, tp) for tp in (1, 8)]
    free = ", ".join(f"{at.name} {free_states(LLADA_8B, at)}" for at in (BLOCKS[1], *WHOLE))
    return Row.judged(
        "speculation is twice as fast as the verifier alone, blocks of 32 with a cached prefix",
        "least speed-up of self-drafting, over prefixes of 2K to 32K",
        min(found.values()),
        "×",
        ">= 2",
        "simulated",
        note=f"{GIVEN}; {said}; batch 8: {batch:.2f} at least; products turn compute-bound at "
        f"{knees[0]:.0f} rows of a replica (tp 1) to {knees[1]:.0f} (tp 8); states within 10 % of "
        f"one state's seconds: {free}; {calibration()}",
    )


def drafts(rate: float, rounds: Rounds = MARKOV_ROUNDS) -> Row:
    """A draft on its own devices against the faster of both baselines, at the acceptance `rate`."""
    found = cells(rates=(rate,), batches=(1,), rounds=rounds)
    best = max(found, key=lambda point: point.gain)
    places = {point.at.name: point.at for point in found}
    needed = {
        name: [rate_needed(at, layers, 0.1, rounds) for layers in LAYERS]
        for name, at in places.items()
    }
    said = "; ".join(
        f"{name} {'/'.join('none' if a is None else f'{a:.2f}' for a in rates)}"
        for name, rates in needed.items()
    )
    return Row.judged(
        "a draft of 1/10 on devices of its own is 10 % faster than the verifier alone and than "
        "self-drafting, at equal devices",
        f"largest gain over the faster of both, drafts right with probability {rate:.2f}",
        100 * best.gain,
        "%",
        ">= 10",
        "simulated",
        note=f"{GIVEN}; best: {best.at.name}, {best.layers} layers, window {best.model.window}, "
        f"{best.model.how}; acceptance that 10 % would take, by {'/'.join(map(str, LAYERS))} "
        f"layers: {said}; {calibration()}",
    )


def map_drawn(points: list[MapPoint] | None = None) -> Mapping[str, object]:
    """Gain of a draft over the faster of both baselines: a panel by depth, batch 1."""
    points = cells(batches=(1,)) if points is None else points
    names = list(dict.fromkeys(point.at.name for point in points))
    fig, panels = figure(columns=len(LAYERS), width=4.0, height=4.0)
    image = None
    for axes, layers in zip(panels, LAYERS, strict=True):
        grid = np.full((len(names), len(RATES)), np.nan)
        for point in points:
            if point.layers == layers:
                grid[names.index(point.at.name), RATES.index(point.rate)] = 100 * point.gain
        image = axes.imshow(grid, cmap="RdBu", vmin=-100, vmax=100, aspect="auto")
        for (i, j), gain in np.ndenumerate(grid):
            if np.isfinite(gain):
                axes.text(j, i, f"{gain:.0f}", ha="center", va="center")
        axes.set_xticks(range(len(RATES)), [str(rate) for rate in RATES])
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names))
        axes.set(xlabel="acceptance rate", title=f"{layers} layers")
        axes.grid(False)
    fig.colorbar(image, ax=panels, label="% faster, simulated")
    return {"where a draft pays": fig}


def corrected_drafts(verifiers: Sequence[Sequence[RoundCounts]]) -> Row | None:
    """Trained drafts of 1/10 that the verifier corrects, on devices of their own, against the
    faster of both baselines: counts of first-hitting of every trained verifier whose chain has the
    steps of a priced block, at the depth that the drafts have. None without such counts."""
    asked = [at for at in BLOCKS if at.steps == PRICED]
    some = [c for c in verifiers if c[0].length == PRICED and any(map(_is_corrected, c))]
    if not some:
        return None
    gains, said = [], []
    for counts in some:
        apart, where = _best_corrected(counts, asked, DEPTH, True)
        turn = _best_corrected(counts, asked, DEPTH, False)[0]
        others = [_best_corrected(counts, asked, layers, True)[0] for layers in LAYERS]
        gains.append(100 * apart)
        said.append(
            f"{where}; all devices in turn {100 * turn:.0f} %; with {'/'.join(map(str, LAYERS))} "
            f"layers {'/'.join(f'{100 * g:.0f}' for g in others)} %"
        )
    return Row.judged(
        "a draft of 1/10 that the verifier corrects, on devices of its own, is 10 % faster than "
        "the verifier alone and than self-drafting, at equal devices",
        "largest gain over the faster of both, prefixes of 2K to 32K",
        gains,
        "%",
        ">= 10",
        "simulated",
        note=f"8B verifier, 8 × H100, batch 1, draft of {DEPTH} of 32 layers; rounds counted with "
        f"the trained verifiers; {'; '.join(said)}; {calibration()}",
    )


def _is_corrected(c: RoundCounts) -> bool:
    return "tenth" in c.drafter and not c.drafter.startswith(PLAIN)


def _best_corrected(
    counts: Sequence[RoundCounts], asked: Sequence[Decoding], layers: int, apart: bool
) -> tuple[float, str]:
    """The largest gain over the faster baseline, and where."""
    free = fewest([c for c in counts if c.drafter in FREE])
    drawn = fewest([c for c in counts if _is_corrected(c)])
    rounds = {(counts[0].length, W): pair for W, pair in free.items()}
    found = []
    for at in asked:
        least = min(verifier_alone(at), self_drafted(at, rounds).seconds)
        best = corrected(at, layers, drawn, apart)
        found.append((least / best.seconds - 1, f"{at.name}, window {best.window}, {best.how}"))
    return max(found)


def fewest(counts: Sequence[RoundCounts]) -> dict[int, tuple[float, float]]:
    """{window: (mean rounds, mean of the slowest of eight)} of the drafter with the fewest."""
    found: dict[int, tuple[float, float]] = {}
    for c in counts:
        found[c.window] = min(found.get(c.window, (np.inf, np.inf)), (c.rounds, slowest(c)))
    return found


def slowest(c: RoundCounts) -> float:
    """Mean rounds of the slowest of eight samples."""
    eights = c.rounds_B[: len(c.rounds_B) // BATCH * BATCH].reshape(-1, BATCH)
    return float(eights.max(1).mean() if eights.size else c.rounds_B.max())


def latency_part(
    exact: Sequence[Measurement], trained: Sequence[Sequence[Measurement]]
) -> Measurement:
    """Rows and the map, from counts of the exact verifier, and of first-hitting of each trained
    one."""
    sizes = [len(exact), *map(len, trained)]

    def given(counts: Sequence[list[RoundCounts]]) -> list[list[RoundCounts]]:
        ends = np.cumsum(sizes)
        spans = zip(ends - sizes, ends, strict=True)
        hits = [[c for found in counts[i:j] for c in found] for i, j in spans]
        return [[c for c in found if c.target == "first-hitting"] for found in hits]

    def rows(*counts: list[RoundCounts]) -> list[Row]:
        of_exact, *of_trained = given(counts)
        rounds, rate = jacobi_rounds(of_exact), best_rate([c for f in of_trained for c in f])
        judged = [blocks(rounds), drafts(rate, rounds) if rate else None]
        some = [found for found in of_trained if found]
        return [row for row in (*judged, corrected_drafts(some)) if row is not None]

    def plot(*counts: list[RoundCounts]) -> Mapping[str, object]:
        return map_drawn(cells(batches=(1,), rounds=jacobi_rounds(given(counts)[0])))

    every = [*exact, *(m for found in trained for m in found)]
    return derive("latency", *every, rows=rows, plot=plot, group="Latency")


def best_rate(counts: Sequence[RoundCounts]) -> float | None:
    """Accepted over judged steps of the uncorrected draft of 1/10, without a hint, for which that
    is largest: schedules overlap, where a hint would be old. None where none was counted."""
    models = [c for c in counts if c.drafter in (PLAIN + "tenth", PLAIN + "tenth-distilled")]
    rates = [float(c.accepted_S.sum() / max(c.judged_S.sum(), 1)) for c in models]
    return max(rates, default=None)


def jacobi_rounds(counts: Sequence[RoundCounts]) -> Rounds:
    """Those of this run's first-hitting, beside a trial's where it counted none."""
    found = dict(MARKOV_ROUNDS)
    for c in counts:
        if (c.target, c.drafter) == ("first-hitting", "jacobi"):
            found[c.length, c.window] = c.rounds, slowest(c)
    return found
