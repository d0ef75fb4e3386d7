"""Recall tasks: an oracle that reads the context scores 1, shortcuts do not, and the mask stands
where it must.
"""

import re

import numpy as np
import pytest

from fdp.data.batches import eval_batches
from fdp.data.recall import (
    RECALL,
    AssociativeRecall,
    InductionHeads,
    WordNeedle,
    accuracy,
    recall_data,
    task_data,
    task_of,
)

pytestmark = pytest.mark.fast

TASKS = [AssociativeRecall(), InductionHeads(), WordNeedle(value_words=2)]
ANSWERS = {AssociativeRecall: 8, InductionHeads: 7, WordNeedle: 2}


def earlier_continuation(tokens_BxL, context=1):
    """Predictions of the oracle: what followed the latest earlier occurrence of the last `context`
    tokens, else -1.
    """
    out = np.full(tokens_BxL.shape, -1)
    for row, guess in zip(tokens_BxL.tolist(), out, strict=True):
        seen = {}
        for i in range(context - 1, len(row)):
            key = tuple(row[i - context + 1 : i + 1])
            guess[i] = seen.get(key, -1)
            if i + 1 < len(row):
                seen[key] = row[i + 1]
    return out


@pytest.mark.parametrize("task", TASKS, ids=lambda t: type(t).__name__)
def test_batch_is_a_pure_function_of_seed_and_step(task):
    tokens, mask = task.sample(3, 5, 16)
    assert (
        tokens.shape == mask.shape == (16, task.length)
        and tokens.dtype == np.int32
        and mask.dtype == np.float32
    )
    assert tokens.min() >= 0 and tokens.max() < task.vocab
    for again, same in (((3, 5), True), ((3, 6), False), ((4, 5), False)):
        assert np.array_equal(tokens, task.sample(*again, 16)[0]) == same
    np.testing.assert_array_equal(mask, task.sample(3, 5, 16)[1])
    assert len(np.unique(tokens, axis=0)) == 16  # rows differ
    assert (
        set(np.unique(mask)) == {0.0, 1.0}
        and (mask.sum(1) == ANSWERS[type(task)]).all()
        and not mask[:, -1].any()
    )


@pytest.mark.parametrize("task", TASKS, ids=lambda t: type(t).__name__)
def test_an_oracle_that_looks_back_scores_one_and_the_token_itself_scores_nothing(task):
    tokens, mask = task.sample(0, 0, 64)
    context = 2 if isinstance(task, WordNeedle) else 1  # MARK key
    oracle = earlier_continuation(tokens, context)
    assert accuracy(oracle, tokens, mask) == 1.0
    # a mask moved by one would make copying the input right
    assert accuracy(tokens, tokens, mask) < 0.1
    unlike = np.roll(oracle, 1, axis=0)  # another sequence's answers
    assert accuracy(unlike, tokens, mask) < task.chance + 0.15


def test_mqar_repeats_every_key_once_with_its_value_and_fills_the_rest():
    task = AssociativeRecall(length=96, pairs=6, vocab=40)
    tokens, mask = task.sample(1, 2, 300)
    for row, scored in zip(tokens, mask, strict=True):
        pairs = dict(zip(row[:12:2].tolist(), row[1:12:2].tolist(), strict=True))
        assert (
            len(pairs) == 6
            and all(1 <= k <= 19 for k in pairs)
            and all(20 <= v < 40 for v in pairs.values())
        )
        at = np.flatnonzero(scored)
        assert (
            sorted(row[at].tolist()) == sorted(pairs) and (at % 2 == 0).all() and (at >= 12).all()
        )
        assert all(pairs[int(k)] == v for k, v in zip(row[at], row[at + 1], strict=True))
        rest = np.delete(row, np.concatenate([np.arange(12), at, at + 1]))
        assert not rest.any()
    assert task.keys == 19 and task.chance == 1 / 20
    assert set(np.unique(tokens)) == set(range(40))  # every id is used


def test_mqar_queries_follow_a_power_law_and_come_in_random_order():
    task = AssociativeRecall(length=256, pairs=4, vocab=64)
    tokens, mask = task.sample(0, 0, 2000)
    at = np.nonzero(mask)[1].reshape(2000, 4)
    assert np.median((at - 8) / 2) < 0.35 * 124 / 2  # uniform slots have their median at 62
    assert at.max() >= 250 and at.min() == 8
    first_query_key = np.take_along_axis(tokens, at[:, :1], 1)[:, 0]
    rank = np.argmax(tokens[:, :8:2] == first_query_key[:, None], axis=1)
    np.testing.assert_allclose(np.bincount(rank, minlength=4) / 2000, 0.25, atol=0.05)


def test_induction_segment_occurs_twice_at_places_that_reveal_nothing():
    task = InductionHeads(length=48, segment=6, vocab=20)
    tokens, mask = task.sample(0, 1, 500)
    second = mask.argmax(1)
    starts = []
    for row, start in zip(tokens, second, strict=True):
        segment = row[start : start + 6]
        assert len(set(segment.tolist())) == 6
        places = [i for i in range(43) if (row[i : i + 6] == segment).all()]
        assert len(places) == 2 and places[1] == start and places[1] - places[0] >= 6
        assert sum(np.isin(row, segment)) == 12  # its tokens occur nowhere else
        starts.append(places)
    starts = np.array(starts)
    assert starts[:, 0].min() == 0 and starts[:, 1].max() == 42
    distance = starts[:, 1] - starts[:, 0]
    assert np.bincount(distance).max() < 0.15 * 500  # no fixed distance answers
    assert (mask.sum(1) == 5).all() and all(mask[b, s : s + 5].all() for b, s in enumerate(second))


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.25, 14), (0.5, 28), (1.0, 56)])
def test_word_needle_stands_at_its_depth(depth, place):
    task = WordNeedle(length=62, vocab=31)
    tokens, mask = task.sample(0, 0, 8, depth)
    assert task.hay == 56
    for row in tokens:
        assert np.flatnonzero(row == 0).tolist() == [place, 59]
        assert row[place + 1] == row[60] in range(1, 11) and row[place + 2] == row[61] in range(
            11, 21
        )
        hay = np.delete(row, [place, place + 1, place + 2, 59, 60, 61])
        assert (hay >= 21).all()
    assert np.flatnonzero(mask[0]).tolist() == [60]


def test_without_a_depth_the_needle_is_everywhere():
    task = WordNeedle(length=40)
    tokens, _ = task.sample(0, 0, 400)
    first = (tokens == 0).argmax(1)
    thirds = np.bincount(3 * first // (task.hay + 1), minlength=3) / 400
    assert thirds.min() > 0.2
    with pytest.raises(ValueError, match=r"depth 1.5 is not in \[0, 1\]"):
        task.sample(0, 0, 1, 1.5)


def test_accuracy_counts_scored_tokens():
    tokens = np.array([[5, 1, 2, 3], [5, 4, 6, 7], [9, 9, 9, 9]])
    mask = np.array([[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]], np.float32)
    guess = np.array(
        [[0, 2, 3, 0], [4, 0, 0, 0], [1, 1, 1, 1]]
    )  # right, right; right, wrong; nothing scored
    assert accuracy(guess, tokens, mask) == 0.75
    with pytest.raises(ValueError, match=r"predictions \[3, 3\], tokens \[3, 4\]"):
        accuracy(guess[:, 1:], tokens, mask)
    with pytest.raises(ValueError, match="last position has no next token"):
        accuracy(guess, tokens, np.ones_like(mask))
    with pytest.raises(ValueError, match="no position is scored"):
        accuracy(guess, tokens, 0 * mask)


@pytest.mark.parametrize(
    ("task", "wrong", "message"),
    [
        (
            AssociativeRecall,
            {"length": 31},
            r"length 31 < 4·pairs = 4·8 = 32.*set length=32 or pairs=7",
        ),
        (
            AssociativeRecall,
            {"vocab": 16},
            r"\(vocab - 1\) // 2 = 7 keys < pairs = 8: set vocab=17 or pairs=7",
        ),
        (AssociativeRecall, {"pairs": 0}, "pairs=0 must be at least 1"),
        (
            InductionHeads,
            {"length": 15},
            r"length 15 < 2·segment = 2·8 = 16: set length=16 or segment=7",
        ),
        (InductionHeads, {"vocab": 8}, r"vocab 8 < segment \+ 1 = 9.*set vocab=9 or segment=7"),
        (InductionHeads, {"segment": 1}, "segment - 1 < 1 tokens: set segment=2"),
        (
            WordNeedle,
            {"length": 6},
            r"length 6 < 2·\(2 \+ value_words\) \+ 1 = 2·\(2 \+ 1\) \+ 1 = 7.*set length=7",
        ),
        (WordNeedle, {"vocab": 3}, "vocab 3 < 4.*set vocab=4"),
    ],
)
def test_impossible_tasks_name_the_equation_and_a_fix_that_works(task, wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        task(**wrong)
    for field, value in re.findall(r"(\w+)=(\d+)", str(error.value).rpartition("set ")[2]):
        fixed = task(**{**wrong, field: int(value)})
        tokens, mask = fixed.sample(0, 0, 2)
        assert tokens.shape == (2, fixed.length) and mask.any()


def test_a_topic_may_choose_its_own_task_as_a_corpus() -> None:
    task = AssociativeRecall(64, pairs=4, vocab=64)
    chosen, stock = task_data(task, train=4, val=2), recall_data("mqar", 64, train=4, val=2)
    assert chosen.sha256 == stock.sha256 and chosen.name == repr(task)
    other = task_data(AssociativeRecall(64, pairs=8, vocab=64), train=4, val=2)
    assert other.train.take([0])["weights"].sum() == 8
    assert stock.train.take([0])["weights"].sum() == 4


@pytest.mark.parametrize("source", RECALL)
def test_recall_as_a_corpus_holds_whole_sequences_and_weighs_answers_only(source: str) -> None:
    length, vocab, context = {"needle": (64, 64, 2), "kjv_needle": (128, 257, 20)}.get(
        source, (64, 64, 1)
    )
    data = recall_data(source, length, train=16, val=8)
    task = task_of(source, length)
    for split, seed, n in ((data.train, 0, 16), (data.val, 1, 8)):
        tokens, mask = task.sample(seed, 0, n)
        got = split.take(range(n))
        assert len(split) == n and got["weights"].dtype == np.float32
        np.testing.assert_array_equal(got["tokens"], tokens)
        np.testing.assert_array_equal(got["weights"][:, 1:], mask[:, :-1])
        assert not got["weights"][:, 0].any() and got["tokens"].max() < data.tokenizer.n_data
        reader = np.roll(earlier_continuation(tokens, context), 1, axis=1)
        assert (reader == tokens)[got["weights"] > 0].all(), "what is weighed can be looked up"
    assert dict(data.dims) == dict.fromkeys(("tokens", "weights"), ("batch", "sequence"))
    assert data.seq_len == length
    assert data.tokenizer.n_data == task.vocab == vocab and data.name == repr(task)
    assert data.sha256 != recall_data(source, 2 * length, train=16, val=8).sha256
    with pytest.raises(ValueError, match=r"larger than the validation sequences .* another data"):
        eval_batches(data.val, 9, 1)


def test_an_unknown_recall_task_is_refused() -> None:
    with pytest.raises(
        ValueError, match="recall task 'copy' is unknown: mqar, needle, induction, kjv"
    ):
        task_of("copy", 64)
