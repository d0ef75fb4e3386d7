"""Topic 4: how much of the chain of a masked diffusion LM can run in parallel without changing an
id, and what a draft model adds to what the verifier drafts for itself."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ml_collections

from fdp.run import Run
from fdp.study.measure import Measurement, Part, derive, measure
from fdp.study.report import Report
from fdp.topics.speculative_dlm import figures, rows
from fdp.topics.speculative_dlm.arms import VERIFIER, arms
from fdp.topics.speculative_dlm.counted import (
    RoundCounts,
    SpeculativeGroup,
    laws,
    lossy,
    oracle_rounds,
    strip,
    trained_rounds,
)
from fdp.topics.speculative_dlm.latency import latency_part
from fdp.topics.speculative_dlm.settings import BIGRAM, NOISY, SELF, cut, sequences_at, windows
from fdp.topics.speculative_dlm.teaching import examples

__all__ = ["QUESTION", "arms", "examples", "study"]

QUESTION = (
    "Which part of the chain of a masked diffusion LM runs in parallel without changing one id, "
    "and does a small draft beat what the verifier drafts for itself?"
)
WIDE = 16  # the window of the claim, beside the whole chain


def study(run: Run) -> Report:
    """Counts of the exact and of the trained verifier, laws, what lossy samplers pay, seconds."""
    c = run.config
    said = cut(c)
    if said:
        print(f"study     {said}", flush=True)
    exact, trained = _exact_counts(c), _trained_counts(run)
    parts = [*_oracle(c, said, exact), *_trained(run, trained)]
    if c.variant == "tiny":  # no time for the programs that these take
        return run.report(*parts)
    hits = [m for of_seed in trained for m in of_seed[:1]]
    return run.report(*parts, *_laws(c), latency_part(exact, hits))


def groups(c: ml_collections.ConfigDict) -> list[tuple[SpeculativeGroup, tuple[str, ...]]]:
    """Runs of the exact verifier and who drafts. The first target: all drafters, at the first
    length with all windows, at others with the wide one and all of the chain. Other targets: the
    first length, all of the chain in the window."""
    s = c.speculation
    first, *others = s.targets
    found = []
    for i, length in enumerate(s.lengths):
        for window in windows(c, length):
            if i == 0 or window in (WIDE, length):
                found.append((SpeculativeGroup(first, length, window), tuple(s.drafters)))
    length = s.lengths[0]
    some = tuple(n for n in s.drafters if n in SELF or n == next(iter(NOISY)))
    return found + [(SpeculativeGroup(t, length, length), some) for t in others]


def _exact_counts(c: ml_collections.ConfigDict) -> list[Measurement]:
    """Of all groups."""
    return [
        measure(
            f"oracle {group.target} L{group.length} W{group.window}",
            oracle_rounds,
            *(tuple(group), drafters, sequences_at(c, group.length)),
        )
        for group, drafters in groups(c)
    ]


def _oracle(c: ml_collections.ConfigDict, said: str, found: list[Measurement]) -> Iterator[Part]:
    yield derive(
        "rounds",
        *found,
        rows=partial(_all, partial(rows.oracle, said)),
        plot=partial(_all, figures.rounds),
        raw=partial(_all, rows.table),
        group="Exact verifier",
    )
    length = c.speculation.lengths[0]
    window = min(WIDE, length)
    drawn = partial(figures.film_strip, window, length)
    yield measure("film strip", strip, length, window, plot=drawn)


def _all(f: Callable[[list[RoundCounts]], Any], *groups: list[RoundCounts]) -> Any:
    """`f` of the counts of all groups."""
    return f([c for found in groups for c in found])


def _trained_counts(run: Run) -> list[list[Measurement]]:
    """Of every seed of the verifier with the drafts of the same seed; of every target."""
    s, verifiers = run.config.speculation, run.arms[VERIFIER]
    window = min(WIDE, verifiers[0].data.seq_len)
    own = [*(n for n in s.drafters if n in SELF), BIGRAM]
    found: list[list[Measurement]] = []
    for i, verifier in enumerate(verifiers):
        drafts = [run.arms[name][i] for name in s.drafts]
        given = [(verifier, drafts, target, window, own, s.sequences) for target in s.targets]
        found.append(
            [measure(f"trained {g[2]} {verifier.label}", trained_rounds, *g) for g in given]
        )
    return found


def _trained(run: Run, counts: list[list[Measurement]]) -> Iterator[Part]:
    for verifier, found in zip(run.arms[VERIFIER], counts, strict=True):
        yield derive(
            f"trained {verifier.label}",
            *found,
            rows=partial(_all, rows.trained),
            raw=partial(_all, rows.table),
            group=f"Trained verifier, seed {verifier.seed}",
        )


def _laws(c: ml_collections.ConfigDict) -> Iterator[Part]:
    s = c.speculation
    yield measure("laws", laws, s.law, rows=rows.laws, group="Laws")
    given = lossy, s.sequences, s.lengths[0]
    yield measure("lossy frontier", *given, plot=figures.frontier, raw=rows.frontier)
