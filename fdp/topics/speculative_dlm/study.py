"""Topic 4: how much of the chain of a masked diffusion LM can run in parallel without changing an
id, and what a draft model adds to what the verifier drafts for itself."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ml_collections

from fdp.arm import Arm
from fdp.objectives import BlockDiffusion
from fdp.run import Run
from fdp.study.measure import Measurement, Part, derive, measure
from fdp.study.report import Report
from fdp.topics.speculative_dlm import figures, rows
from fdp.topics.speculative_dlm.arms import arms
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
from fdp.topics.speculative_dlm.settings import (
    BIGRAM,
    NOISY,
    PAIRED,
    PLAIN,
    SELF,
    WIDE,
    cut,
    sequences_at,
    tasks,
    windows,
)
from fdp.topics.speculative_dlm.teaching import examples

__all__ = ["QUESTION", "arms", "examples", "study"]

QUESTION = (
    "Which part of the chain of a masked diffusion LM runs in parallel without changing one id, "
    "and does a small draft beat what the verifier drafts for itself?"
)


def study(run: Run) -> Report:
    """Counts of the exact and of the trained verifier, laws, what lossy samplers pay, seconds."""
    c = run.config
    said = cut(c)
    if said:
        print(f"study     {said}", flush=True)
    exact, trained = _exact_counts(c), _trained_counts(run)
    parts = [*_oracle(c, said, exact), *_trained(trained)]
    if c.variant == "tiny":  # no time for the programs that these take
        return run.report(*parts)
    # Blocks are counted without a cache and over their borders, so they are not priced.
    whole = [m for arm, m in trained.items() if not isinstance(arm.objective, BlockDiffusion)]
    return run.report(*parts, *_laws(c), latency_part(exact, whole))


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


def _trained_counts(run: Run) -> dict[Arm, list[Measurement]]:
    """Of every seed of every verifier, with the drafts of the same task and seed."""
    found = {}
    for verifier, drafts in tasks(run.config).values():
        for i, arm in enumerate(run.arms[verifier]):
            found[arm] = _of_verifier(run.config, arm, [run.arms[name][i] for name in drafts])
    return found


def _of_verifier(
    c: ml_collections.ConfigDict, verifier: Arm, drafts: list[Arm]
) -> list[Measurement]:
    """The first target with two windows, and drafts that are corrected and not; others with the
    wide one, and corrected drafts."""
    s, models = c.speculation, [arm.name for arm in drafts]
    if c.model.vocab <= PAIRED:
        models.append(BIGRAM)
    own, found = [n for n in s.drafters if n in SELF], []
    for target in s.targets:
        first = target == s.targets[0]
        names = [*own, *models, *(PLAIN + name for name in models if first)]
        for window in (WIDE, WIDE // 2) if first and c.variant != "tiny" else (WIDE,):
            given = verifier, drafts, target, min(window, verifier.data.seq_len), names
            label = f"trained {target} W{window} {verifier.label}"
            found.append(measure(label, trained_rounds, *given, s.sequences))
    return found


def _trained(counts: dict[Arm, list[Measurement]]) -> Iterator[Part]:
    for verifier, found in counts.items():
        yield derive(
            f"trained {verifier.label}",
            *found,
            rows=partial(_all, partial(rows.trained, verifier.label)),
            raw=partial(_all, rows.table),
            group=f"Trained {verifier.label}",
        )


def _laws(c: ml_collections.ConfigDict) -> Iterator[Part]:
    s = c.speculation
    yield measure("laws", laws, s.law, rows=rows.laws, group="Laws")
    given = lossy, s.sequences, s.lengths[0]
    yield measure("lossy frontier", *given, plot=figures.frontier, raw=rows.frontier)
