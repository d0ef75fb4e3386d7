"""The tasks of RULER (`fdp.data.ruler`) as text, with the King James Bible as haystack.

`RulerText` writes the published prompts (github.com/NVIDIA/RULER at c3f5e3b,
scripts/data/synthetic), `ByteNeedle` short sequences to train on. The published score counts the
answers that occur anywhere in what a model prints. Here it must print the answer and nothing else
(`Prompt.right`).

Legend: B sequences, L positions."""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from fdp.data.ruler import KINDS, Facts, RulerWords, Sample, check, facts, order, zeta_counts
from fdp.data.sources import source_of

# Names of the haystack, which are never in lower case there.
NAMES = (
    *("aaron", "abigail", "abraham", "absalom", "barnabas", "benjamin", "caleb", "daniel", "david"),
    *("deborah", "elijah", "elisha", "esther", "ezekiel", "gideon", "hannah", "isaac", "isaiah"),
    *("jacob", "jeremiah", "jonathan", "joseph", "joshua", "lazarus", "miriam", "moses", "naomi"),
    *("rebekah", "samuel", "solomon", "timothy", "zechariah"),
)

# The published format: instruction, context, question, and the beginning of the answer, to which a
# space is added.
NEEDLE = "One of the special magic numbers for {subject} is: {value}."
ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\n{context}\nWhat is the special magic number for "
    "{query} mentioned in the provided text? The special magic number for {query} mentioned in the "
    "provided text is "
)
SEVERAL = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the numbers afterwards.\n{context}\nWhat are all the special magic "
    "numbers for {query} mentioned in the provided text? The special magic numbers for {query} "
    "mentioned in the provided text are "
)
CHAIN = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above. Answer: According to the chain(s) of variable assignment in the text above, {n} "
    "variables are assigned the value {query}, they are: "
)
CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text? Answer: According to the coded text above, the three most frequently appeared words "
    "are: "
)
CODED_LETTERS = 6
CODED_BYTES = 5.18  # of a word with its space on average: at most 1/ζ(2) of them are "..."


@functools.cache
def haystack() -> bytes:
    """The King James Bible on one line of ASCII. Raises UserError where its package is missing."""
    text = " ".join(" ".join(source_of("bible").documents()).split())
    for sign, plain in {"Æ": "Ae", "æ": "ae", "—": "-", "’": "'"}.items():
        text = text.replace(sign, plain)
    return text.encode("ascii")


@functools.cache
def _sentences() -> np.ndarray:
    return np.array([m.end() for m in re.finditer(rb"[.?!] (?=[A-Z])", haystack())])


def with_needles(
    rng: np.random.Generator, n_bytes: int, needles: Sequence[str], asked: int, depth: float | None
) -> str:
    """`n_bytes` of the haystack from the start of a sentence, the last of them a space, with
    needles between its clauses, each followed by a space."""
    start, text = int(rng.choice(_sentences())), haystack()
    window = text[start : start + n_bytes - 1]
    while len(window) < n_bytes - 1:
        window += text[: n_bytes - 1 - len(window)]
    hay = window.decode("ascii") + " "
    gaps = np.array([0, *(m.end() for m in re.finditer(r"[.,:;?!] ", hay[:-1])), n_bytes])
    for place, i in reversed(order(rng, gaps, len(needles), asked, depth)):
        hay = f"{hay[:place]}{needles[i]} {hay[place:]}"
    return hay


def _numbers(rng: np.random.Generator, n: int, digits: int) -> list[str]:
    """n different numbers of so many digits."""
    return [
        str(x) for x in _different(rng, n, lambda: rng.integers(10 ** (digits - 1), 10**digits))
    ]


def _letters(rng: np.random.Generator, n: int, length: int, first: str) -> list[str]:
    """n different words of `length` letters, of the 26 from `first` on."""
    return _different(rng, n, lambda: "".join(map(chr, ord(first) + rng.integers(0, 26, length))))


def _different(rng: np.random.Generator, n: int, draw: Any) -> list[Any]:
    found: dict[Any, None] = {}
    while len(found) < n:
        found[draw()] = None
    return list(found)


@dataclass(frozen=True)
class Prompt:
    """A text that ends where the answer begins, and the answers in order."""

    text: str
    answers: tuple[str, ...]
    separator: str = ", "

    @property
    def answer(self) -> str:
        """What a model should print."""
        return self.separator.join(self.answers)

    def right(self, printed: str) -> bool:
        """Whether this is the answer, and nothing else."""
        return printed.strip().removesuffix(".") == self.answer


def as_bytes(prompts: Iterable[Prompt]) -> Sample:
    """Tokens int32 [B, L] of prompts with their answers, and the answer mask f32 [B, L]."""
    tokens, masks = [], []
    for prompt in prompts:
        row = np.frombuffer((prompt.text + prompt.answer).encode("ascii"), np.uint8)
        mask, at = np.zeros(len(row), np.float32), len(prompt.text) - 1
        for answer in prompt.answers:
            mask[at : at + len(answer)] = 1
            at += len(answer) + len(prompt.separator)
        tokens.append(row)
        masks.append(mask)
    return np.stack(tokens).astype(np.int32), np.stack(masks)


class TextTask:
    """A recall task whose sequences are prompts with their answers, in bytes."""

    def prompt(self, rng: np.random.Generator) -> Prompt:
        """One sequence."""
        raise NotImplementedError

    @property
    def vocab(self) -> int:
        """Number of ids: bytes and the end of a text."""
        return 257

    def prompts(self, seed: int, step: int, batch: int) -> list[Prompt]:
        """Batch number `step`."""
        rng = np.random.default_rng([seed, step])
        return [self.prompt(rng) for _ in range(batch)]

    def sample(self, seed: int, step: int, batch: int) -> Sample:
        """Tokens int32 [B, L] and answer mask f32 [B, L] of batch number `step`."""
        return as_bytes(self.prompts(seed, step, batch))


@dataclass(frozen=True)
class RulerText(TextTask):
    """The published prompts as bytes, each with its answer: exactly `length` of them.

    `kind`, `needles`, `depth`: as in RulerWords. Keys are names, values numbers of seven digits.
    Several values are given in the order of the text, several keys in that of the question. Scored
    are the bytes of the answers, not what separates them. Raises ValueError for a length without
    hay."""

    kind: str = "single"
    length: int = 1024
    needles: int = 0
    depth: float | None = None

    def __post_init__(self) -> None:
        check(self.kind, self.needles, self.depth)
        if self.kind == "frequent":
            if self.count != KINDS["frequent"]:
                raise ValueError(f"needles={self.count}: the prompt asks for 3; set needles=0")
            zeta_counts(self._words, self._words // 4, self.count)
        elif self.count >= len(NAMES):
            raise ValueError(
                f"needles={self.count} are not below {len(NAMES)} names: set "
                f"needles={len(NAMES) - 1}"
            )
        elif self.length < (need := self._longest()):
            raise ValueError(
                f"length {self.length} < {need} bytes of the prompt with its needles and answer: "
                f"set length={need} or more"
            )

    @property
    def count(self) -> int:
        """Number of needles, of assignments after the first, or of words asked for."""
        return self.needles or KINDS[self.kind]

    @property
    def chance(self) -> float:
        """Accuracy of a model that knows the format and draws bytes."""
        return 1 / 26 if self.kind in ("tracking", "frequent") else 1 / 10

    def prompt(self, rng: np.random.Generator) -> Prompt:
        """One sequence."""
        return self._frequent(rng) if self.kind == "frequent" else self._needles(rng)

    def _needles(self, rng: np.random.Generator) -> Prompt:
        n, chain = self.count, self.kind == "tracking"
        if chain:
            told = facts(rng, self.kind, n, _letters(rng, n + 1, 5, "A"), _numbers(rng, 1, 5))
        else:
            names = [NAMES[i] for i in rng.permutation(len(NAMES))[: n + 1]]
            told = facts(rng, self.kind, n, names, _numbers(rng, n + 1, 7))
        needles, template, answers = self._said(told)
        bare = template.format(context="", query=_listed(told), n=n + 1)
        separator = " " if chain else ", "
        room = self.length - len(bare) - len(separator.join(answers))
        room -= sum(len(needle) + 1 for needle in needles)
        context = with_needles(rng, room, needles, told.asked, self.depth)
        text = template.format(context=context, query=_listed(told), n=n + 1)
        return Prompt(text, tuple(answers), separator)

    def _said(self, told: Facts) -> tuple[list[str], str, list[str]]:
        """(needles, template, answers)."""
        answers = [answer for _, found in told.questions for answer in found]
        if self.kind == "tracking":
            (first, value), *links = told.needles
            needles = [f"VAR {first} = {value}.", *(f"VAR {a} = VAR {b}." for a, b in links)]
            return needles, CHAIN, answers
        needles = [NEEDLE.format(subject=s, value=v) for s, v in told.needles]
        return needles, ONE if len(answers) == 1 else SEVERAL, answers

    def _longest(self) -> int:
        """Bytes of the longest prompt, with two of hay."""
        n, name = self.count, max(NAMES, key=len)
        if self.kind == "tracking":
            names, values = ["AAAAA"] * (n + 1), ["12345"]
        else:
            names, values = [name] * (n + 1), ["1234567"] * (n + 1)
        told = facts(np.random.default_rng(0), self.kind, n, names, values)
        needles, template, answers = self._said(told)
        prompt = template.format(context="", query=_listed(told), n=n + 1)
        return len(prompt) + len(", ".join(answers)) + sum(len(x) + 1 for x in needles) + 2

    @property
    def _words(self) -> int:
        """Coded words that the context holds."""
        return int(self._room / CODED_BYTES)

    @property
    def _room(self) -> int:
        """Bytes of the context of coded words."""
        return self.length - len(CODED.format(context="")) - 3 * CODED_LETTERS - 4

    def _frequent(self, rng: np.random.Generator) -> Prompt:
        kinds = self._words // 4
        coded = ["...", *_letters(rng, kinds - 1, CODED_LETTERS, "a")]
        words = np.repeat(coded, zeta_counts(self._words, kinds, self.count))
        answers = tuple(coded[1 : 1 + self.count])
        context = (" ".join(rng.permutation(words)) + " ").ljust(self._room, ".")
        return Prompt(CODED.format(context=context), answers)


def _listed(told: Facts) -> str:
    """The subjects that are asked for: a, b, and c."""
    *rest, last = (str(subject) for subject, _ in told.questions)
    return f"{', '.join(rest)}, and {last}" if rest else last


@dataclass(frozen=True)
class ByteNeedle(TextTask):
    """Exactly `length` bytes: hay with needles, then a needle again, whose number is scored.

        … The special magic number for abraham is: 1234567. … The special magic number for
        abraham is: 1234567

    `keys`: needles with different names, of which one is asked for. `depth`: its place, 0 the start
    of the haystack, 1 its end, None random. Raises ValueError for a length without hay."""

    length: int = 256
    digits: int = 7
    keys: int = 1
    depth: float | None = None

    def __post_init__(self) -> None:
        check("multikey", self.keys, self.depth)
        if not 1 <= self.digits <= 18 or 9 * 10 ** (self.digits - 1) < self.keys:
            raise ValueError(
                f"digits={self.digits} must be 1 … 18, for {self.keys} different numbers: set "
                "digits=7"
            )
        if not 1 <= self.keys <= len(NAMES):
            raise ValueError(
                f"keys={self.keys} must be 1 … {len(NAMES)}, the number of names: set keys=1"
            )
        stated = len(self.needle(max(NAMES, key=len), "")) + self.digits
        need = self.keys * (stated + 1) + stated + 1
        if self.length < need:
            raise ValueError(
                f"length {self.length} < {need} bytes of {self.keys} needle(s), the question, its "
                f"answer and hay: set length={need} or more (data.seq_len)"
            )

    @staticmethod
    def needle(name: str, value: str) -> str:
        """What is hidden."""
        return f"The special magic number for {name} is: {value}."

    @property
    def chance(self) -> float:
        """Accuracy of a model that knows the format and draws digits."""
        return 1 / 10

    def prompt(self, rng: np.random.Generator) -> Prompt:
        """One sequence."""
        names = [NAMES[i] for i in rng.permutation(len(NAMES))[: self.keys]]
        told = facts(rng, "multikey", self.keys, names, _numbers(rng, self.keys, self.digits))
        needles = [self.needle(*pair) for pair in told.needles]
        name, (value,) = told.questions[0]
        question = self.needle(name, "")[:-1]
        room = self.length - len(question) - len(value) - sum(len(x) + 1 for x in needles)
        return Prompt(with_needles(rng, room, needles, told.asked, self.depth) + question, (value,))


Task = TypeVar("Task", RulerWords, RulerText, ByteNeedle)


def grid(
    task: Task, depths: Sequence[float], lengths: Sequence[int]
) -> dict[tuple[float, int], Task]:
    """The task at every depth and length."""
    return {
        (depth, length): replace(task, depth=depth, length=length)
        for depth in depths
        for length in lengths
    }
