"""Recall tasks: sequences whose scored tokens can be predicted from the context, and only from it.

A batch is a pure function of (seed, step). `task.sample(seed, step, batch)` returns the tokens,
int32 [B, L], and the answer mask, f32 [B, L]: mask[b, i] = 1 where the prediction made AT position
i, of token i + 1, is scored; the last column is always 0. `recall_data` shifts it onto the answers:
the loss weight of token i + 1. A task that cannot be built raises ValueError: equation, values,
fix.

Legend: B sequences, L positions, P pairs (or tokens of a segment, needle or value), Q query slots,
V vocabulary."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fdp.data.batches import Arrays, Batch, Data
from fdp.data.ruler import Sample
from fdp.data.ruler_text import ByteNeedle, TextTask
from fdp.data.sources import source_of
from fdp.data.tokenizer import Tokenizer, build_tokenizer, decoder


class RecallTask(Protocol):
    """The interface of the tasks below."""

    @property
    def vocab(self) -> int:
        """Number of ids."""
        ...

    @property
    def chance(self) -> float:
        """Accuracy without memory."""
        ...

    def sample(self, seed: int, step: int, batch: int) -> Sample:
        """Tokens int32 [B, L] and answer mask f32 [B, L] of batch number `step`."""
        ...


# slot s of the query section is drawn with weight s^(0.01 - 1), as in the paper's released
# generator
GAP_POWER = 0.01


@dataclass(frozen=True)
class AssociativeRecall:
    """Multi-query associative recall (MQAR; Arora et al. 2023, arXiv 2312.04927): k1 v1 … kP vP,
    then every key again.

    The query section consists of two-token slots. P of them hold a key and its value, in random
    order; the others hold filler. The value after a repeated key is scored: P answers per sequence.
    Near slots are more likely, by the power law of the paper. Ids: 0 filler, then (vocab - 1) // 2
    keys, then the values. Keys differ within a sequence; values may repeat. Raises ValueError when
    length < 4·pairs or there are fewer keys than pairs."""

    length: int = 64
    pairs: int = 8
    vocab: int = 64

    def __post_init__(self) -> None:
        _at_least_one(pairs=self.pairs)
        if self.length < 4 * self.pairs:
            raise ValueError(
                f"length {self.length} < 4·pairs = 4·{self.pairs} = {4 * self.pairs} (2 tokens a "
                "pair, 2 a query): "
                f"set length={4 * self.pairs}"
                + (f" or pairs={self.length // 4}" if self.length >= 4 else "")
            )
        if self.keys < self.pairs:
            raise ValueError(
                f"vocab {self.vocab} gives (vocab - 1) // 2 = {self.keys} keys < pairs = "
                f"{self.pairs}: "
                f"set vocab={2 * self.pairs + 1}"
                + (f" or pairs={self.keys}" if self.keys > 0 else "")
            )

    @property
    def keys(self) -> int:
        """Number of key ids: 1 … keys."""
        return (self.vocab - 1) // 2

    @property
    def chance(self) -> float:
        """Accuracy of a model that knows the format and draws a value: 1 / number of values."""
        return 1 / (self.vocab - 1 - self.keys)

    def sample(self, seed: int, step: int, batch: int) -> Sample:
        """Tokens int32 [B, L] and answer mask f32 [B, L] of batch number `step`."""
        rng = np.random.default_rng([seed, step])
        P = self.pairs
        keys_BxP = 1 + _distinct(rng, batch, self.keys, P)
        values_BxP = rng.integers(1 + self.keys, self.vocab, (batch, P))
        tokens_BxL = np.zeros((batch, self.length), np.int32)
        tokens_BxL[:, 0 : 2 * P : 2], tokens_BxL[:, 1 : 2 * P : 2] = keys_BxP, values_BxP
        query_BxP = 2 * P + 2 * self._slots(rng, batch)
        np.put_along_axis(tokens_BxL, query_BxP, keys_BxP.astype(np.int32), 1)
        np.put_along_axis(tokens_BxL, query_BxP + 1, values_BxP.astype(np.int32), 1)
        mask_BxL = np.zeros(tokens_BxL.shape, np.float32)
        np.put_along_axis(mask_BxL, query_BxP, np.float32(1), 1)
        return tokens_BxL, mask_BxL

    def _slots(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        """P distinct slots per sequence, int [B, P], drawn in random order without replacement by
        the power law."""
        slots = (self.length - 2 * self.pairs) // 2
        log_weight_Q = (GAP_POWER - 1) * np.log(np.arange(1, slots + 1))
        # Gumbel top-k is sampling without replacement; shuffled, so that a key's rank says nothing
        # of its slot.
        order_BxQ = np.argsort(-(log_weight_Q + rng.gumbel(size=(batch, slots))), axis=1)
        return rng.permuted(order_BxQ[:, : self.pairs], axis=1)


@dataclass(frozen=True)
class InductionHeads:
    """A random segment occurs twice in noise, and its second copy is scored (Olsson et al. 2022,
    arXiv 2209.11895).

    The `segment` tokens are distinct and occur nowhere else, so the previous occurrence of a token
    determines the next one. Both copies are at random positions, so a fixed distance does not.
    Scored: segment - 1 tokens per sequence. Ids 0 … vocab - 1 have no fixed roles: each sequence
    divides them anew into those of its segment and those of its noise. Raises ValueError when
    length < 2·segment, segment < 2, or no id is left for the noise."""

    length: int = 64
    segment: int = 8
    vocab: int = 64

    def __post_init__(self) -> None:
        if self.segment < 2:
            raise ValueError(
                f"segment {self.segment} scores segment - 1 < 1 tokens: set segment=2 or more"
            )
        if self.length < 2 * self.segment:
            raise ValueError(
                f"length {self.length} < 2·segment = 2·{self.segment} = {2 * self.segment}: "
                f"set length={2 * self.segment}"
                + (f" or segment={self.length // 2}" if self.length >= 4 else "")
            )
        if self.vocab <= self.segment:
            raise ValueError(
                f"vocab {self.vocab} < segment + 1 = {self.segment + 1} (the segment's ids and one "
                "of noise): "
                f"set vocab={self.segment + 1}"
                + (f" or segment={self.vocab - 1}" if self.vocab > 2 else "")
            )

    @property
    def chance(self) -> float:
        """Accuracy of a uniform guess: 1 / vocab."""
        return 1 / self.vocab

    def sample(self, seed: int, step: int, batch: int) -> Sample:
        """Tokens int32 [B, L] and answer mask f32 [B, L] of batch number `step`."""
        rng = np.random.default_rng([seed, step])
        P, free = self.segment, self.length - 2 * self.segment
        ids_BxV = _distinct(rng, batch, self.vocab, self.vocab)
        noise_BxL = P + rng.integers(0, self.vocab - P, (batch, self.length))
        tokens_BxL = np.take_along_axis(ids_BxV, noise_BxL, 1).astype(np.int32)
        # Two sorted cuts of the free positions are the lengths of the noise before, between and
        # after the copies.
        cuts_Bx2 = np.sort(rng.integers(0, free + 1, (batch, 2)), axis=1)
        second_B = cuts_Bx2[:, 1] + P
        for start_B in (cuts_Bx2[:, 0], second_B):
            np.put_along_axis(
                tokens_BxL, start_B[:, None] + np.arange(P), ids_BxV[:, :P].astype(np.int32), 1
            )
        mask_BxL = np.zeros(tokens_BxL.shape, np.float32)
        np.put_along_axis(mask_BxL, second_B[:, None] + np.arange(P - 1), np.float32(1), 1)
        return tokens_BxL, mask_BxL


@dataclass(frozen=True)
class WordNeedle:
    """One needle in a haystack of words (the single-key task of RULER, Hsieh et al. 2024, arXiv
    2404.06654).

    Haystack words with the needle (MARK, key, value …) at `depth`, then (MARK, key) again and the
    value, which is scored: `value_words` answers per sequence. Depth 0 is the first position in the
    haystack, 1 the last; None draws a position for every sequence. Ids: 0 MARK; then a third of the
    other ids each for keys, values and hay (the remainder to hay). Raises ValueError when the
    length holds less than one haystack word or vocab < 4."""

    length: int = 64
    vocab: int = 64
    value_words: int = 1

    def __post_init__(self) -> None:
        _at_least_one(value_words=self.value_words)
        if self.hay < 1:
            need = 2 * (2 + self.value_words) + 1
            raise ValueError(
                f"length {self.length} < 2·(2 + value_words) + 1 = 2·(2 + {self.value_words}) + 1 "
                f"= {need} "
                f"(needle, question and one word of hay): set length={need}"
            )
        if self.vocab < 4:
            raise ValueError(
                f"vocab {self.vocab} < 4 = mark + one key + one value + one word of hay: set "
                "vocab=4"
            )

    @property
    def hay(self) -> int:
        """Number of haystack words; the needle has hay + 1 possible positions."""
        return self.length - 2 * (2 + self.value_words)

    @property
    def chance(self) -> float:
        """Accuracy of a model that knows the format and draws a value: 1 / number of values."""
        return 1 / ((self.vocab - 1) // 3)

    def sample(self, seed: int, step: int, batch: int, depth: float | None = None) -> Sample:
        """Tokens int32 [B, L] and answer mask f32 [B, L]; depth in [0, 1], ValueError otherwise."""
        rng = np.random.default_rng([seed, step])
        third = (self.vocab - 1) // 3
        key_Bx1 = rng.integers(1, 1 + third, (batch, 1))
        value_BxP = rng.integers(1 + third, 1 + 2 * third, (batch, self.value_words))
        needle_BxP = np.concatenate([np.zeros_like(key_Bx1), key_Bx1, value_BxP], axis=1)
        hay_BxL = rng.integers(1 + 2 * third, self.vocab, (batch, self.hay))
        place_B = _places(rng, depth, batch, np.arange(self.hay + 1))
        rows = [
            np.concatenate([hay[:place], needle, hay[place:], needle])
            for hay, needle, place in zip(hay_BxL, needle_BxP, place_B, strict=True)
        ]
        return np.stack(rows).astype(np.int32), _last_scored(batch, self.length, self.value_words)


def accuracy(predictions_BxL: np.ndarray, tokens_BxL: np.ndarray, mask_BxL: np.ndarray) -> float:
    """Share of scored tokens predicted correctly; predictions[b, i] is the guess, made at i, of
    tokens[b, i + 1].

    Raises ValueError for shapes that differ, a scored last position or no scored position."""
    right_BxL, scored_BxL = _right(predictions_BxL, tokens_BxL, mask_BxL)
    return float(right_BxL[scored_BxL].mean())


def exact(predictions_BxL: np.ndarray, tokens_BxL: np.ndarray, mask_BxL: np.ndarray) -> float:
    """Share of the sequences of which ALL scored tokens are predicted correctly. Arguments and
    errors of `accuracy`; sequences without a scored token are left out."""
    right_BxL, scored_BxL = _right(predictions_BxL, tokens_BxL, mask_BxL)
    return float((right_BxL | ~scored_BxL).all(1)[scored_BxL.any(1)].mean())


def _right(
    predictions_BxL: np.ndarray, tokens_BxL: np.ndarray, mask_BxL: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each token but the first is predicted, and whether it is scored."""
    predictions_BxL, tokens_BxL, mask_BxL = map(np.asarray, (predictions_BxL, tokens_BxL, mask_BxL))
    shapes = [list(x.shape) for x in (predictions_BxL, tokens_BxL, mask_BxL)]
    if shapes[0] != shapes[1] or shapes[1] != shapes[2] or len(shapes[0]) != 2:
        raise ValueError(
            f"predictions {shapes[0]}, tokens {shapes[1]} and mask {shapes[2]} must share a shape "
            "[B, L]"
        )
    if mask_BxL[:, -1].any():
        raise ValueError("the last position has no next token to score: set mask[:, -1] = 0")
    if not mask_BxL.any():
        raise ValueError("no position is scored: the mask is all zero")
    return predictions_BxL[:, :-1] == tokens_BxL[:, 1:], mask_BxL[:, :-1] > 0


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1: set {name}=1")


def _distinct(rng: np.random.Generator, batch: int, n: int, k: int) -> np.ndarray:
    """k distinct numbers below n for every sequence, in random order: int [B, k]."""
    return np.argsort(rng.random((batch, n)), axis=1)[:, :k]


def _places(
    rng: np.random.Generator, depth: float | None, batch: int, allowed: np.ndarray
) -> np.ndarray:
    """Offsets of the needles, int [B]: the allowed offset nearest to `depth` · the last one, or a
    random one."""
    if depth is None:
        return rng.choice(allowed, batch)
    if not 0 <= depth <= 1:
        raise ValueError(
            f"depth {depth} is not in [0, 1]: 0 is the start of the haystack, 1 its end"
        )
    return np.full(batch, allowed[np.argmin(np.abs(allowed - depth * allowed[-1]))])


def _last_scored(batch: int, length: int, answers: int) -> np.ndarray:
    """Mask f32 [B, L] that scores the last `answers` tokens, each at the position before it."""
    mask_BxL = np.zeros((batch, length), np.float32)
    mask_BxL[:, length - 1 - answers : length - 1] = 1
    return mask_BxL


RECALL = ("mqar", "needle", "induction", "kjv_needle")  # data.source


def task_of(source: str, seq_len: int) -> RecallTask:
    """The recall task of `data.source` at this length: seq_len/16 pairs, a needle of ids or of
    bytes, or a segment of seq_len/8."""
    vocab = max(64, seq_len // 8 + 1)
    if source == "mqar":
        return AssociativeRecall(seq_len, pairs=max(seq_len // 16, 1), vocab=vocab)
    if source == "needle":
        return WordNeedle(seq_len, vocab)
    if source == "induction":
        return InductionHeads(seq_len, segment=max(seq_len // 8, 2), vocab=vocab)
    if source == "kjv_needle":
        return ByteNeedle(seq_len)
    raise ValueError(f"recall task {source!r} is unknown: {', '.join(RECALL)}")


def recall_data(source: str, seq_len: int, train: int = 8192, val: int = 256) -> Data:
    """`task_data` of the task of `data.source` at this length."""
    return task_data(task_of(source, seq_len), train, val)


def task_data(task: RecallTask, train: int = 8192, val: int = 256) -> Data:
    """Sequences of a recall task in place of a corpus; only the answers carry loss.

    `train`, `val`: numbers of sequences, of seeds 0 and 1. Fields: "tokens", int32 [B, L];
    "weights", f32 [B, L]: 1 on scored answers, else 0."""
    parts = [_weighted(*task.sample(0, 0, train)), _weighted(*task.sample(1, 0, val))]
    content = b"".join(part[field].tobytes() for part in parts for field in sorted(part))
    fix = "choose another data.source"
    return Data(
        name=repr(task),
        sha256=hashlib.sha256(content).hexdigest(),
        licence=source_of("bible").licence if isinstance(task, TextTask) else "made here",
        tokenizer=_tokenizer(task),
        train=Arrays(parts[0], "training sequences", fix),
        val=Arrays(parts[1], "validation sequences", fix),
        dims=dict.fromkeys(parts[0], ("batch", "sequence")),
    )


def _tokenizer(task: RecallTask) -> Tokenizer:
    if isinstance(task, TextTask):
        return build_tokenizer("byte", task.vocab, list, "", Path())
    token_bytes = [f"{i} ".encode() for i in range(task.vocab - 1)]
    return Tokenizer(
        len(token_bytes),
        lambda texts: [np.array(t.split(), np.int32) for t in texts],
        decoder(token_bytes),
        repr(task),
    )


def _weighted(tokens_BxL: np.ndarray, mask_BxL: np.ndarray) -> Batch:
    # The mask's last column is 0, so nothing wraps around.
    return {"tokens": tokens_BxL, "weights": np.roll(mask_BxL, 1, axis=1)}
