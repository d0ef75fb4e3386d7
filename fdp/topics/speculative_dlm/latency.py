"""Simulated seconds of the study: rows with the error of the prices, and where a draft pays."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fdp.price.inference import LLADA_8B
from fdp.price.speculation import BLOCKS, WHOLE, calibration, free_states, knee
from fdp.price.speculation_map import (
    LAYERS,
    MARKOV_ROUNDS,
    RATES,
    MapPoint,
    Rounds,
    cells,
    rate_needed,
    self_drafted,
    verifier_alone,
)
from fdp.study.figures import figure
from fdp.study.measure import Measurement, derive
from fdp.study.report import Row
from fdp.topics.speculative_dlm.counted import RoundCounts
from fdp.topics.speculative_dlm.settings import BIGRAM, SELF

BATCH = 8
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


def latency_part(exact: Sequence[Measurement], trained: Sequence[Measurement]) -> Measurement:
    """Rows and the map, from counts of the exact verifier and of trained ones of first-hitting."""
    many = len(exact)

    def given(*counts: list[RoundCounts]) -> tuple[float, Rounds]:
        own = [c for found in counts[:many] for c in found]
        return best_rate([c for found in counts[many:] for c in found]), jacobi_rounds(own)

    def rows(*counts: list[RoundCounts]) -> list[Row]:
        rate, rounds = given(*counts)
        return [blocks(rounds), drafts(rate, rounds)]

    def plot(*counts: list[RoundCounts]) -> Mapping[str, object]:
        return map_drawn(cells(batches=(1,), rounds=given(*counts)[1]))

    return derive("latency", *exact, *trained, rows=rows, plot=plot, group="Latency")


def best_rate(counts: Sequence[RoundCounts]) -> float:
    """Accepted over judged steps of the trained draft model for which that is largest."""
    models = [c for c in counts if c.drafter not in (*SELF, BIGRAM)]
    return max(float(c.accepted_S.sum() / max(c.judged_S.sum(), 1)) for c in models)


def jacobi_rounds(counts: Sequence[RoundCounts]) -> Rounds:
    """Those of this run's first-hitting, beside a trial's where it counted none."""
    found = dict(MARKOV_ROUNDS)
    for c in counts:
        if (c.target, c.drafter) == ("first-hitting", "jacobi"):
            eights = c.rounds_B[: len(c.rounds_B) // BATCH * BATCH].reshape(-1, BATCH)
            slowest = eights.max(1).mean() if eights.size else c.rounds_B.max()
            found[c.length, c.window] = c.rounds, float(slowest)
    return found
