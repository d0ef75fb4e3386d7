"""Rows of simulated seconds say what they rest on; the map is drawn."""

import numpy as np
import pytest

from fdp.price.speculation import BLOCKS
from fdp.price.speculation_map import MARKOV_ROUNDS, cells
from fdp.topics.speculative_dlm import latency
from fdp.topics.speculative_dlm.counted import RoundCounts

pytestmark = pytest.mark.fast


def test_speculation_on_cached_blocks_is_judged():
    row = latency.blocks()
    assert (row.verdict, row.evidence) == ("holds", "simulated")
    assert "median 9%" in row.note and "turn compute-bound at 258 rows" in row.note


def test_a_draft_is_judged_against_the_faster_baseline(monkeypatch):
    points = cells(BLOCKS[:1], (1,), (0.6, 0.95), (1,))
    monkeypatch.setattr(latency, "cells", lambda **_: points[:1])
    monkeypatch.setattr(latency, "rate_needed", lambda *_: None)
    row = latency.drafts(0.6)
    assert row.verdict == "fails" and row.value == pytest.approx(100 * points[0].gain)
    assert "none/none/none" in row.note
    assert set(latency.map_drawn(points)) == {"where a draft pays"}


def counts(drafter, rounds_B, accepted, window=8, length=32):
    """Of eight samples and more; only what seconds are made of."""
    of_S = np.zeros(length, int)
    given = of_S + accepted, of_S + 10, 1, 1, 0, 0, 2.5
    return RoundCounts("first-hitting", length, drafter, window, np.asarray(rounds_B), *given)


def test_counts_of_the_run_replace_those_of_the_trial():
    found = latency.jacobi_rounds([counts("jacobi", [5] * 8 + [7] * 7 + [9], 3)])
    assert found[32, 8] == (98 / 16, 7.0)
    assert found[64, 8] == MARKOV_ROUNDS[64, 8]
    names = "jacobi", "tenth", "uncorrected tenth", "uncorrected bigram"
    drafts = [counts(name, [5], taken) for name, taken in zip(names, (10, 9, 4, 8), strict=True)]
    assert latency.best_rate(drafts) == pytest.approx(0.4)


def test_corrected_drafts_are_judged_against_the_faster_baseline():
    def row(rounds):
        given = [counts("jacobi", [7.4] * 8, 3), counts("tenth", [rounds] * 8, 3)]
        return latency.corrected_drafts([given])

    few, many = row(3.0), row(7.4)
    assert few.verdict == "holds" and many.verdict == "fails" and many.value < 0
