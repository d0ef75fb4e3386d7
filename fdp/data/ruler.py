"""Recall at any length and depth, after RULER (Hsieh et al. 2024, arXiv 2404.06654): needles in a
haystack, chains of variables, frequent words. Here as ids of a small vocabulary, in
`fdp.data.ruler_text` as text.

Each is a recall task of `fdp.data.recall`: its batches are pure functions of (seed, step).

Legend: B sequences, L positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Sample = tuple[np.ndarray, np.ndarray]

# Each kind with the number of needles, assignments after the first, or words of the published
# setting.
KINDS = {
    "single": 1,
    "multikey": 4,  # of which one is asked for
    "multivalue": 4,  # of one key
    "multiquery": 4,
    "tracking": 4,
    "frequent": 3,
}
ONE_ASKED = ("single", "multikey")


class Facts(NamedTuple):
    """What a sequence states, in this order: (subject, value) each; and what it asks: the answers
    of each subject. `asked`: the index of the only needle that is asked for, if there is one."""

    needles: list[tuple[Any, Any]]
    questions: list[tuple[Any, list[Any]]]
    asked: int = 0


def facts(
    rng: np.random.Generator, kind: str, n: int, subjects: Sequence[Any], values: Sequence[Any]
) -> Facts:
    """Facts of `kind`. `subjects` and `values` are distinct; n + 1 of each suffice.

    Tracking: the first subject has a value, every other one that of the subject before it, and
    asked are all subjects of the value."""
    if kind == "tracking":
        links = list(zip(subjects[: n + 1], [values[0], *subjects[:n]], strict=True))
        return Facts(links, [(values[0], list(subjects[: n + 1]))])
    if kind == "multivalue":
        return Facts([(subjects[0], v) for v in values[:n]], [(subjects[0], list(values[:n]))])
    needles = list(zip(subjects[:n], values[:n], strict=True))
    if kind == "multiquery":
        return Facts(needles, [(needles[i][0], [needles[i][1]]) for i in rng.permutation(n)])
    asked = int(rng.integers(n))
    return Facts(needles, [(needles[asked][0], [needles[asked][1]])], asked)


def order(
    rng: np.random.Generator, gaps: np.ndarray, n: int, asked: int, depth: float | None
) -> list[tuple[int, int]]:
    """(offset, needle) of n needles, sorted: random gaps, that of needle `asked` nearest to
    `depth` · the last gap."""
    places = np.sort(rng.choice(gaps, n))
    if depth is not None:
        places[asked] = gaps[np.argmin(np.abs(gaps - depth * gaps[-1]))]
    return [(int(places[i]), int(i)) for i in np.argsort(places, kind="stable")]


def zeta_counts(words: int, vocab: int, asked: int) -> np.ndarray:
    """How often the word of each rank occurs among about `words`: proportional to 1/rank², the
    first rank being noise. Raises ValueError unless ranks 2 … asked + 1 stand out."""
    weight = np.arange(1.0, vocab + 1) ** -2
    counts = (words * weight * 6 / np.pi**2).astype(int)
    if vocab < asked + 2 or (np.diff(counts[1 : asked + 2]) >= 0).any():
        raise ValueError(
            f"{words} words of {vocab} kinds do not tell the {asked} most frequent ones apart: "
            f"they occur {counts[1 : asked + 2].tolist()} times; set a larger length, or fewer "
            "needles"
        )
    return counts


def check(kind: str, needles: int, depth: float | None) -> None:
    """Raises ValueError for an unknown kind, fewer than no needles, and a depth that is none."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown: {', '.join(KINDS)}")
    if needles < 0:
        raise ValueError(f"needles={needles} must be at least 1, or 0 as published: set needles=1")
    if depth is not None and kind not in ONE_ASKED:
        raise ValueError(
            f"depth {depth} is that of one needle, and {kind} asks for {needles or KINDS[kind]}: "
            "set depth=None"
        )
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(
            f"depth {depth} is not in [0, 1]: 0 is the start of the haystack, 1 its end"
        )


@dataclass(frozen=True)
class RulerWords:
    """Ids in place of words: a needle is (MARK, subject, value), a question (MARK, subject) and
    its answers, of which each is scored; the questions come last.

    `needles`: 0 is the published number, see KINDS. `depth`: of the needle that is asked for, 0 the
    start of the haystack, 1 its end, None random. Frequent words: hay of Zipf's law, MARK, and the
    most frequent ones but the first, in order. Ids: 0 MARK; then a third of the other ids each for
    subjects, values and hay (the remainder to hay). Raises ValueError where they do not fit."""

    kind: str = "single"
    length: int = 64
    vocab: int = 64
    needles: int = 0
    depth: float | None = None

    def __post_init__(self) -> None:
        check(self.kind, self.needles, self.depth)
        if self.kind == "frequent":
            zeta_counts(self.hay, self.vocab - 1, self.count)
            return
        if self.third < self.count + 1:
            raise ValueError(
                f"vocab {self.vocab} gives (vocab - 1) // 3 = {self.third} subjects < needles + 1 "
                f"= {self.count + 1}: set vocab={3 * self.count + 4}"
            )
        if self.hay < 1:
            raise ValueError(
                f"length {self.length} holds no hay beside {self.length - self.hay} words of "
                f"needles and questions: set length={self.length - self.hay + 1}"
            )

    @property
    def count(self) -> int:
        """Number of needles, or of words that are asked for."""
        return self.needles or KINDS[self.kind]

    @property
    def third(self) -> int:
        """Number of subjects, and of values."""
        return (self.vocab - 1) // 3

    @property
    def hay(self) -> int:
        """Number of haystack words."""
        n = self.count
        told, asked = {
            "tracking": (n + 1, 2 + n + 1),
            "multivalue": (n, 2 + n),
            "multiquery": (n, 3 * n),
            "frequent": (0, 1 + n),
        }.get(self.kind, (n, 3))
        return self.length - 3 * told - asked

    @property
    def chance(self) -> float:
        """Accuracy of a model that knows the format and draws an answer."""
        return 1 / (self.vocab - 1 if self.kind == "frequent" else self.third)

    def sample(self, seed: int, step: int, batch: int) -> Sample:
        """Tokens int32 [B, L] and answer mask f32 [B, L] of batch number `step`."""
        rng = np.random.default_rng([seed, step])
        make = self._frequent if self.kind == "frequent" else self._row
        tokens, masks = zip(*(make(rng) for _ in range(batch)), strict=True)
        return np.array(tokens, np.int32), np.array(masks, np.float32)

    def _row(self, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        n, third = self.count, self.third
        subjects, values = (rng.permutation(third)[: n + 1] + 1 + i * third for i in range(2))
        told = facts(rng, self.kind, n, subjects.tolist(), values.tolist())
        row = rng.integers(1 + 2 * third, self.vocab, self.hay).tolist()
        gaps = np.arange(self.hay + 1)
        for place, i in reversed(order(rng, gaps, len(told.needles), told.asked, self.depth)):
            row[place:place] = [0, *told.needles[i]]
        mask = [0] * len(row)
        for subject, answers in told.questions:
            row += [0, subject, *answers]
            mask += [0] + [1] * len(answers) + [0]
        return row, mask

    def _frequent(self, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        ids = 1 + rng.permutation(self.vocab - 1)
        words = np.repeat(ids, zeta_counts(self.hay, self.vocab - 1, self.count))
        noise = np.full(self.hay - len(words), ids[0])
        row = rng.permutation(np.concatenate([words, noise])).tolist()
        answers = ids[1 : 1 + self.count].tolist()
        return [*row, 0, *answers], [0] * len(row) + [1] * len(answers) + [0]
