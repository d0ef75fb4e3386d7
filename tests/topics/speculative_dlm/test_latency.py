"""Rows of simulated seconds say what they rest on; the map is drawn."""

import numpy as np
import pytest

from fdp.price.inference import LLADA_8B
from fdp.price.speculation import BLOCKS, draft_shape, priced
from fdp.price.speculation_map import MARKOV_ROUNDS, cells, corrected
from fdp.study.measure import measure
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
    names = "jacobi", "tenth", "uncorrected tenth", "uncorrected tenth-hinted"
    drafts = [counts(name, [5], taken) for name, taken in zip(names, (10, 9, 4, 8), strict=True)]
    assert latency.best_rate(drafts) == pytest.approx(0.4)
    assert latency.best_rate(drafts[:2]) is None


def pair(rounds, length=32):
    """Counts of a verifier that drafts for itself, and of a draft that it corrects."""
    found = counts("jacobi", [7.4] * 8, 3), counts("tenth", [rounds] * 8, 3)
    return [c._replace(length=length) for c in found]


def test_corrected_drafts_are_judged_against_the_faster_baseline():
    few, many = (latency.corrected_drafts([pair(r)]) for r in (2.0, 7.4))
    assert few.verdict == "holds" and many.verdict == "fails" and many.value < 0
    assert latency.corrected_drafts([pair(2.0, length=64)]) is None  # no such block is priced


def test_a_corrected_draft_takes_a_pass_for_every_step_that_a_round_does_not_give():
    at = BLOCKS[0]
    found = corrected(at, 8, {8: (5.0, 6.0)})
    shared = priced(draft_shape(8), at, 1).seconds * 27 + priced(LLADA_8B, at, 8).seconds * 5
    assert found.seconds == pytest.approx(shared) and "all devices" in found.how


def test_seconds_rest_on_first_hitting_of_each_verifier(monkeypatch):
    monkeypatch.setattr(latency, "blocks", lambda rounds: rounds[32, 8])
    monkeypatch.setattr(latency, "drafts", lambda rate, rounds: rate)
    monkeypatch.setattr(latency, "corrected_drafts", list)
    other = counts("uncorrected tenth", [1], 9)._replace(target="entropy order")
    made = [measure(name, latency.slowest, ()) for name in "abc"]
    part = latency.latency_part(made[:1], [made[1:2], made[2:]])
    first = [counts("jacobi", [5] * 8, 3)]
    given = [first, [counts("uncorrected tenth", [5], 4), other], [counts("jacobi", [6], 2)]]
    rounds, rate, verifiers = part.rows(*given)
    assert rounds == (5.0, 5.0) and rate == pytest.approx(0.4)
    assert [[c.drafter for c in v] for v in verifiers] == [["uncorrected tenth"], ["jacobi"]]
