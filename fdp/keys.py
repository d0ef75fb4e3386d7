"""Declarations of configuration keys: default, allowed values, meaning and unit of each.

`fdp.config` and the settings of a topic declare their keys with the constructors below. Imports
neither jax nor flax."""

import difflib
import math
import re
import struct
from ast import literal_eval
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

INT32 = 2**31 - 1


class UserError(ValueError):
    """A mistake the user can fix: shown as one message, without a traceback."""


def closest(word: str, known: Collection[str]) -> str:
    """`did you mean 'x'?` or the list of known words."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    mark = "; " if any("," in one for one in known) else ", "
    return f"did you mean {match[0]!r}?" if match else f"known: {mark.join(sorted(known))}"


def shown(value: Any) -> str:
    """A value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Key:
    """A default, its meaning and its unit ("" for a pure number or a word)."""

    default: Any
    text: str
    unit: str = ""

    def holds(self, value: Any) -> bool:
        """Whether the key may have this value."""
        raise NotImplementedError

    def allowed(self, value: Any) -> str:
        """What is allowed where `value` is not, in words."""
        raise NotImplementedError

    def nearest(self, value: Any) -> Any:
        """An allowed value in place of `value`."""
        return self.default

    def read(self, text: str) -> Any:
        """The value that a word of the command line means, or `text` itself where it means none."""
        return text

    def problem(self, value: Any) -> str:
        """What is wrong with a value that is not allowed."""
        meaning = f"{self.text}; {self.unit}" if self.unit else self.text
        return f"must be {self.allowed(value)} ({meaning})"

    def fix(self, name: str, value: Any) -> str:
        """A value to set instead."""
        return f": set {name}={self.nearest(value)!r}"

    def check(self, name: str, value: Any) -> None:
        """Raise UserError, with what is allowed and a fix, for a value that the key may not
        have.
        """
        if not self.holds(value):
            raise UserError(f"{name}={shown(value)} {self.problem(value)}{self.fix(name, value)}")


class Flag(Key):
    """True or False."""

    def holds(self, value: Any) -> bool:
        return isinstance(value, bool)

    def allowed(self, value: Any) -> str:
        return "True or False"

    def read(self, text: str) -> Any:
        words = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
        return words.get(text.lower(), text)


@dataclass(frozen=True)
class Integer(Key):
    """From `low` to `high`, both included; neither True nor 2.0 is one."""

    low: int = 0
    high: int = INT32

    def holds(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def allowed(self, value: Any) -> str:
        if type(value) is int and value > self.high:
            return f"an integer of at most {self.high}"
        return f"an integer of at least {self.low}"

    def nearest(self, value: Any) -> Any:
        if not _is_number(value) or (isinstance(value, float) and not math.isfinite(value)):
            return self.default
        return max(round(value), self.low) if value <= self.high else self.default

    def read(self, text: str) -> Any:
        try:
            return int(text)
        except ValueError:
            return _number(text)


@dataclass(frozen=True)
class Number(Key):
    """A number in `interval`, such as "[0, 1)", also after rounding to float32; never nan. The
    value `off` switches off what the key sets."""

    interval: str = "(-inf, inf)"
    off: float | None = None

    def holds(self, value: Any) -> bool:
        return _is_number(value) and _inside(_float32(value), self.interval)

    def allowed(self, value: Any) -> str:
        finite = "" if self.interval.endswith("inf]") else "finite "
        rounded = _is_number(value) and _inside(value, self.interval)
        return f"a {finite}number in {self.interval}{', also as float32' if rounded else ''}"

    def fix(self, name: str, value: Any) -> str:
        switch = f", or {name}={self.off} to switch it off" if self.off is not None else ""
        return super().fix(name, value) + switch

    def read(self, text: str) -> Any:
        return _number(text)


@dataclass(frozen=True)
class Choice(Key):
    """One of `choices`, all of one type, or a word that matches `pattern`."""

    choices: tuple[Any, ...] = ()
    pattern: str = "(?!)"  # matches nothing

    def holds(self, value: Any) -> bool:
        if type(value) is not type(self.choices[0]):
            return False
        return value in self.choices or (
            isinstance(value, str) and bool(re.fullmatch(self.pattern, value))
        )

    def allowed(self, value: Any) -> str:
        return f"one of {', '.join(map(str, self.choices))}"

    def problem(self, value: Any) -> str:
        if isinstance(value, str) and isinstance(self.choices[0], str):
            return f"is unknown: {closest(value, self.choices)}"
        return super().problem(value)

    def fix(self, name: str, value: Any) -> str:
        if isinstance(value, str) and isinstance(self.choices[0], str):
            return ""
        return super().fix(name, value)

    def read(self, text: str) -> Any:
        if isinstance(self.choices[0], str):
            return text
        return int(text) if text.isdecimal() else _number(text)


@dataclass(frozen=True)
class String(Key):
    """Any text; a key whose default is not empty stays so."""

    def holds(self, value: Any) -> bool:
        return isinstance(value, str) and bool(value or not self.default)

    def allowed(self, value: Any) -> str:
        return "a text that is not empty" if self.default else "a text"


@dataclass(frozen=True)
class Several(Key):
    """A tuple of distinct values, each allowed by `each`. It may be empty only where the default
    is."""

    each: Key = String("", "")

    def holds(self, value: Any) -> bool:
        return (
            isinstance(value, tuple | list)
            and all(self.each.holds(one) for one in value)
            and len(set(value)) == len(value)
            and bool(len(value) or not self.default)
        )

    def allowed(self, value: Any) -> str:
        return f"a tuple, such as {self.default or (self.each.default,)!r}"

    def problem(self, value: Any) -> str:
        if not isinstance(value, tuple | list):
            return super().problem(value)
        if not value:
            return f"is empty ({self.text})"
        for one in value:
            if not self.each.holds(one):
                return f"holds {shown(one)}, which {self.each.problem(one)}"
        return f"names {next(one for i, one in enumerate(value) if one in value[:i])!r} twice"

    def fix(self, name: str, value: Any) -> str:
        held = not isinstance(value, tuple | list) or all(self.each.holds(one) for one in value)
        return super().fix(name, value) if held or not isinstance(self.each, Choice) else ""

    def read(self, text: str) -> Any:
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            return (text,) if text.isidentifier() else text
        return tuple(value) if isinstance(value, tuple | list) else (value,)

    def nearest(self, value: Any) -> Any:
        given = value if isinstance(value, tuple | list) else ()
        return tuple(dict.fromkeys(one for one in given if self.each.holds(one))) or self.default


@dataclass(frozen=True)
class Span(Key):
    """Two integers (first, last) with low ≤ first ≤ last, or () for none."""

    low: int = 1

    def holds(self, value: Any) -> bool:
        if not isinstance(value, tuple | list) or len(value) not in (0, 2):
            return False
        ordered = all(type(one) is int for one in value) and list(value) == sorted(value)
        return ordered and all(self.low <= one <= INT32 for one in value)

    def allowed(self, value: Any) -> str:
        return f"(first, last) with {self.low} ≤ first ≤ last, or ()"

    def nearest(self, value: Any) -> Any:
        given = value if isinstance(value, tuple | list) else (value,)
        whole = sorted(max(one, self.low) for one in given if type(one) is int and one <= INT32)
        return (whole[0], whole[-1]) if whole else self.default

    def read(self, text: str) -> Any:
        try:
            return literal_eval(text)
        except (ValueError, SyntaxError):
            return text


Section = Mapping[str, Key]


def section(**keys: Key) -> Section:
    """A section of keys."""
    return keys


def count(default: int, text: str, unit: str = "", high: int = INT32) -> Key:
    """An integer of at least 1."""
    return Integer(default, text, unit, 1, high)


def at_least(low: int, default: int, text: str, unit: str = "", high: int = INT32) -> Key:
    """An integer of at least `low`."""
    return Integer(default, text, unit, low, high)


def within(
    interval: str, default: float, text: str, unit: str = "", off: float | None = None
) -> Key:
    """A real number in `interval`, in mathematical notation; an open end at inf means finite."""
    return Number(default, text, unit, interval, off)


def positive(default: float, text: str, unit: str = "") -> Key:
    """A finite number above 0."""
    return Number(default, text, unit, "(0, inf)")


def flag(default: bool, text: str) -> Key:
    """True or False."""
    return Flag(default, text)


def choice(default: Any, choices: tuple[Any, ...], text: str, pattern: str = "(?!)") -> Key:
    """One of `choices`, or a word that matches `pattern`."""
    return Choice(default, text, "", choices, pattern)


def string(default: str, text: str) -> Key:
    """Any text, empty only where the default is."""
    return String(default, text)


def integers(low: int, default: tuple[int, ...], text: str, unit: str = "") -> Key:
    """A tuple of distinct integers of at least `low`."""
    return Several(default, text, unit, Integer(low, text, unit, low))


def span(low: int, text: str, unit: str = "") -> Key:
    """Two integers of at least `low` in order, by default none."""
    return Span((), text, unit, low)


def words(default: tuple[str, ...], choices: tuple[str, ...], text: str) -> Key:
    """A tuple of distinct words among `choices`."""
    return Several(default, text, "", Choice(choices[0], text, "", choices))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _float32(value: float) -> float:
    """Rounded to float32; what is too large for it is infinite."""
    try:
        return struct.unpack("f", struct.pack("f", float(value)))[0]
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _inside(value: float, interval: str) -> bool:
    """Whether an interval such as "[0, 1)" holds the value; none holds nan."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _number(text: str) -> Any:
    """The real number that `text` says, or `text`."""
    try:
        return float(text)
    except ValueError:
        return text
