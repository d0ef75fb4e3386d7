"""What topic 12 makes of its measurements, and what it refuses."""

import types

import numpy as np
import pytest

from configs.topic12 import get_config
from fdp.config import validate
from fdp.keys import UserError
from fdp.topics.ttt_cp import study
from fdp.topics.ttt_cp.arms import MemoryCase, cases, recall_task, state_bytes
from fdp.topics.ttt_cp.counted import constant, polished, scanned, wire
from fdp.topics.ttt_cp.recall import (
    capacity_rows,
    chunk_rows,
    held,
    lact_or_gdn,
    least_attention,
    parts,
    recall_rows,
    slope,
)
from fdp.topics.ttt_cp.tasks import MixedPairs

pytestmark = pytest.mark.fast
PAIRS = [4, 8, 16]


def test_sequences_have_each_number_of_pairs_in_turn():
    task = MixedPairs(64, (4, 8, 16), 64)
    tokens, scored = task.sample(0, 0, 8)
    assert tokens.shape == scored.shape == (8, 64)
    assert scored.sum(1).tolist() == [4, 8, 16, 4, 8, 16, 4, 8]
    alone = task.with_pairs(8).sample(0, 0, 3)
    np.testing.assert_array_equal(tokens[1::3], alone[0])
    np.testing.assert_array_equal(scored[1::3], alone[1])


def test_states_of_a_size_have_equal_bytes():
    for n in (4, 8, 16):
        assert state_bytes("gdn", n) == state_bytes("lact", n) == 48 * n * n
        assert state_bytes("ttt_linear", n) == 48 * n * n + 24 * n  # and a bias


def test_a_state_does_not_grow_and_a_scan_of_maps_sends_what_its_steps_say():
    row = constant(get_config("cpu"))
    assert row.value == 1 and row.verdict == "holds"
    # Two heads of 16, three tails of 3 · 32 numbers; attention has one tail.
    assert f"gdn {4 * (2 * 16 * 16 + 3 * 3 * 32):,}" in row.note
    assert f"{4 * (2 * 2**20 + 3) * 32:,}" in row.note
    row = scanned()
    assert row.value == 5 / 14 and row.verdict == "holds"


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([1.0, 1.0, 1.0], 16),
        ([1.0, 0.95, 0.85], 8 * 2**0.5),
        ([0.8, 0.99, 0.1], 2 * 2**0.5),  # what comes after the first fall does not count
        ([0.0, 0.0, 0.0], 2 * 2**0.1),
    ],
)
def test_pairs_held_are_interpolated_by_the_logarithm(shares, expected):
    assert held(np.array(shares), PAIRS) == pytest.approx(expected)


def test_slope_is_that_of_pairs_against_bytes():
    whole = {4: [1.0, 0.8, 0.0], 8: [1.0, 1.0, 0.8]}  # 4√2 and 8√2 pairs, four times the bytes
    shares = {n: np.array([s, s]) for n, s in whole.items()}
    assert slope("gdn", shares, PAIRS) == pytest.approx([0.5, 0.5])
    (row,) = capacity_rows({"gdn": shares}, PAIRS, "")
    assert row.verdict == "holds" and "5.7 at 768 B" in row.note
    assert not capacity_rows({"gdn": {4: shares[4]}}, PAIRS, "")


def test_lact_is_compared_where_gated_delta_net_is_neither_lost_nor_perfect():
    gdn = {4: np.array([[0.99, 0.72, 0.2]] * 2), 8: np.array([[1.0, 0.99, 0.55]] * 2)}
    lact = {4: np.array([[0.9, 0.82, 0.2], [0.9, 0.84, 0.2]]), 8: np.array([[1.0, 0.9, 0.5]] * 2)}
    row = lact_or_gdn({"gdn": gdn, "lact": lact}, PAIRS, "")
    assert row.decides and row.verdict == "holds" and row.value == pytest.approx(11)
    assert "768 bytes, 8 pairs" in row.note and "all 2 such cells +3.0 points" in row.note
    perfect = {"gdn": {4: np.ones((1, 3))}, "lact": {4: np.ones((1, 3))}}
    assert lact_or_gdn(perfect, PAIRS, "").verdict == "not testable here"


def test_least_share_of_attention_is_that_of_each_seed():
    far = {
        "attention": [1.0, 1.0],
        "window": [1.0, 1.0],
        "lact": [0.2, 0.95],
        "lact_1to1": [1.0, 1.0],
        "lact_1to3": [0.95, 0.5],
    }
    (row,) = least_attention(far, "")
    assert row.value == pytest.approx((0.25 + 0.0) / 2) and row.verdict == "holds"
    assert not least_attention({"attention": [0.1], "lact_1to1": [0.1]}, "")


def test_recall_is_not_compared_with_attention_that_learnt_nothing():
    good, bad = (recall_rows({"attention": [a], "gdn": [0.03]}, "") for a in (0.97, 0.03))
    assert [r.verdict for r in good] == ["holds", "fails"]
    assert [r.threshold for r in bad] == [">= 0.95", ">= 0.95"]


def test_counted_rows_hold():
    assert {row.verdict for row in [*polished(), *wire()]} == {"holds"}


@pytest.mark.parametrize("variant", ["cpu", "full"])
def test_every_arm_of_a_variant_can_be_built(variant):
    c = get_config(variant)
    c.train.steps = 1
    c.data.val_fraction = 0.01
    assert set(study.arms(c)) == set(cases(c))


def test_a_chunk_of_the_whole_sequence_is_said():
    c = get_config("tiny")
    c.memory.chunk = 64
    with pytest.warns(UserWarning, match="a chunk of 64 tokens holds all 64 .* learns nothing"):
        validate(c)


def test_an_arm_is_a_kind_on_a_task():
    names = list(cases(get_config("full")))
    assert len(set(names)) == len(names)
    assert {"lact", "needle-lact", "text-lact", "capacity-lact-8", "chunk-lact-32"} <= set(names)
    c = get_config("cpu")
    assert recall_task(MemoryCase("lact", "text"), c) is None
    assert recall_task(MemoryCase("lact"), c).pairs == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory.arms": ("lact_1to3",)}, r"model\.layers=2 .* 4 layers .*: set model\.layers=4"),
        ({"objective.name": "mdlm"}, "the layers of this topic read the past"),
        ({"data.seq_len": 72}, r"seq_len=72 .* memory\.chunk=16: set data\.seq_len=80"),
        (
            {"memory.chunk": 2, "mesh.cp": 4},
            r"memory\.chunk=2 .* mesh\.cp=4.*: set memory\.chunk=4",
        ),
        ({"memory.sizes": ()}, r"memory\.capacity needs sizes"),
        (
            {"data.seq_len": 128, "memory.chunk": 128},
            r"memory\.needle has sequences of 64 tokens, .*=128: set memory\.chunk=64",
        ),
        ({"memory.chunks": (8, 24)}, r"seq_len=64 is not divisible by 24 of .*: set 8 in"),
        (
            {"memory.chunks": (4,), "mesh.cp": 8},
            r"memory\.chunks=4 is not divisible by mesh\.cp=8, .*: set memory\.chunks=8",
        ),
        (
            {"memory.pairs": (4, 18)},
            r"18 pairs take 4 · 18 tokens, not divisible by 16 .*: let the most be 16",
        ),
        ({"memory.pairs": (4, 32)}, r"32 pairs of different keys > the 31 keys among 64 ids"),
        (
            {"memory.arms": ("two_memories",), "memory.chunks": (), "memory.near": 6},
            r"chunk of 16 tokens .* memory\.near=6, .*: set memory\.near=4",
        ),
        (
            {"memory.arms": ("two_memories",), "memory.chunks": (), "mesh.cp": 4},
            r"heads=2 .* mesh\.tp·mesh\.cp = 4, .*: set model\.heads=4 and model\.kv_heads=4, or",
        ),
        (
            {"memory.chunks": (8,), "data.source": "bible"},
            r"memory\.chunks=\(8,\) compares recall, .* set data\.source=mqar",
        ),
    ],
)
def test_refused(changes, message):
    c = get_config("cpu")
    for key, value in changes.items():
        section, name = key.split(".")
        c[section][name] = value
    with pytest.raises(UserError, match=message):
        validate(c)


def test_two_memories_are_judged_by_what_one_loses():
    some = {
        f"{k}-{n}": MemoryCase(k, "chunk", n) for k in ("lact", "two_memories") for n in (8, 32)
    }
    shares = {"lact-8": [0.9], "lact-32": [0.4], "two_memories-8": [0.95], "two_memories-32": [0.8]}
    *_, both = chunk_rows(some, shares, "")
    assert both.verdict == "holds" and both.value == pytest.approx(0.3)
    assert len(chunk_rows(some, shares | {"lact-32": [0.9]}, "")) == 2  # nothing to halve


def test_parts_have_names_of_their_own_where_all_arms_read_text():
    c = get_config("cpu")
    c.data.source, c.memory.chunks, c.memory.text = "bible", (), c.memory.arms
    run = types.SimpleNamespace(config=c, arms=dict.fromkeys(cases(c), ()))
    names = [part.name for part in parts(run)]
    assert {"loss main", "loss text"} <= set(names)
    assert len(set(names)) == len(names)
