"""Rows of simulated seconds say what they rest on; the map is drawn."""

import pytest

from fdp.price.speculation import BLOCKS
from fdp.price.speculation_map import cells
from fdp.topics.speculative_dlm import latency

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
