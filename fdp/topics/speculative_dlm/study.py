"""Topic 4: how much of the chain of a masked diffusion LM can run in parallel without changing an
id, and what a draft model adds to what the verifier drafts for itself."""

from collections.abc import Iterator
from functools import partial

import ml_collections

from fdp.run import Run
from fdp.study.measure import Measurement, Part, derive, each, measure
from fdp.study.report import Report
from fdp.topics.speculative_dlm import figures, rows
from fdp.topics.speculative_dlm.arms import VERIFIER, arms
from fdp.topics.speculative_dlm.counted import (
    SpeculativeJob,
    laws,
    lossy,
    oracle_rounds,
    strip,
    trained_rounds,
)
from fdp.topics.speculative_dlm.latency import latency_parts
from fdp.topics.speculative_dlm.settings import NOISY, SELF, cut, windows

__all__ = ["QUESTION", "arms", "study"]

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
    priced = latency_parts() if c.variant != "tiny" else []
    return run.report(*_oracle(c, said), *_trained(run), *_laws(c), *priced)


def jobs(c: ml_collections.ConfigDict) -> list[SpeculativeJob]:
    """Runs of the exact verifier. The first target: all drafters, at the first length with all
    windows, at others with the wide one and all of the chain. Other targets: the first length, all
    of the chain in the window."""
    s = c.speculation
    first, *others = s.targets
    found = []
    for i, length in enumerate(s.lengths):
        fitting = windows(c, length)
        few = [w for w in fitting if w in (WIDE, length)]
        for window in fitting if i == 0 else few:
            found += [SpeculativeJob(first, length, name, window) for name in s.drafters]
    length = s.lengths[0]
    some = [n for n in s.drafters if n in SELF or n == next(iter(NOISY))]
    return found + [SpeculativeJob(t, length, name, length) for t in others for name in some]


def _oracle(c: ml_collections.ConfigDict, said: str) -> Iterator[Measurement]:
    group, some = "Exact verifier", c.speculation.sequences
    given = oracle_rounds, each([tuple(j) for j in jobs(c)]), some
    judged = partial(rows.oracle, said)
    yield measure("oracle", *given, rows=judged, plot=figures.rounds, raw=rows.table, group=group)
    length = c.speculation.lengths[0]
    window = min(WIDE, length)
    drawn = partial(figures.film_strip, window, length)
    yield measure("film strip", strip, length, window, plot=drawn)


def _trained(run: Run) -> Iterator[Measurement]:
    """Every seed of the verifier with the drafts of the same seed."""
    s, verifiers = run.config.speculation, run.arms[VERIFIER]
    window = min(WIDE, verifiers[0].data.seq_len)
    for i, verifier in enumerate(verifiers):
        found = []
        for name in (*(n for n in s.drafters if n in SELF), *s.drafts):
            draft = run.arms[name][i] if name in s.drafts else verifier
            for target in s.targets:
                given = trained_rounds, verifier, draft, (target, name, window), s.sequences
                found.append(measure(f"trained {name} {target} {verifier.label}", *given))
        group = f"Trained verifier, seed {verifier.seed}"
        yield derive(
            f"trained {verifier.label}", found, rows=rows.trained, raw=rows.table, group=group
        )


def _laws(c: ml_collections.ConfigDict) -> Iterator[Part]:
    """The tiny variant has no time for the programs that these take."""
    s = c.speculation
    if c.variant == "tiny":
        return
    yield measure("laws", laws, s.law, rows=rows.laws, group="Laws")
    given = lossy, s.sequences, s.lengths[0]
    yield measure("lossy frontier", *given, plot=figures.frontier, raw=rows.frontier)
