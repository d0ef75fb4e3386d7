"""A study as a list of measurements: what is measured, kept, judged and drawn."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdp import process
from fdp.study import figures
from fdp.study.cache import Absent, Cache, Key, code_of, describe, slug
from fdp.study.report import Row, plain

MANY = 1000  # an array of more elements stays out of raw.json


@dataclass(frozen=True, eq=False)
class Measurement:
    """`function(*values)` under a name; made by `measure` and `derive`, run by `Run.report`."""

    name: str
    function: Callable[..., Any] | None  # None: the values themselves are the result
    values: tuple[Any, ...]
    rows: Callable[..., Row | Iterable[Row]] | None
    plot: Callable[..., Any] | None
    raw: Callable[..., Any] | None
    group: str


@dataclass(frozen=True, eq=False)
class Each:
    """Values of which a function gets one at a time."""

    items: Sequence[Any] | Measurement


Part = Measurement | Row | Iterable[Any]


def measure(
    name: str,
    function: Callable[..., Any],
    *values: Any,
    rows: Callable[..., Row | Iterable[Row]] | None = None,
    plot: Callable[..., Any] | None = None,
    raw: Callable[..., Any] | None = None,
    group: str = "",
) -> Measurement:
    """A measurement whose result is kept; see `fdp.study` for its parts.

    Raises ValueError for a function without a name of its own."""
    code_of(function)
    return Measurement(name, function, values, rows, plot, raw, group)


def derive(
    name: str,
    *values: Any,
    rows: Callable[..., Row | Iterable[Row]] | None = None,
    plot: Callable[..., Any] | None = None,
    raw: Callable[..., Any] | None = None,
    group: str = "",
) -> Measurement:
    """Rows and pictures of several results; nothing is kept."""
    return Measurement(name, None, values, rows, plot, raw, group)


def each(items: Sequence[Any] | Measurement) -> Each:
    """One call of the function for each item, kept by itself; the result is the list."""
    return Each(items)


@dataclass
class Found:
    """What the parts of a study add up to; `plots` are paths inside the workdir."""

    rows: list[Row] = field(default_factory=list)
    plots: list[str | Path] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)


def perform(parts: Iterable[Part], cache: Cache, workdir: Path, group: str = "") -> Found:
    """Run or find every measurement, in order, then its rows, raw numbers and pictures.

    Raises ValueError for two measurements of one name and what functions raise."""
    needed = list({id(n): n for part in _flat(parts) for n in _needed(part)}.values())
    measurements = [m for m in needed if isinstance(m, Measurement)]
    files = [slug(m.name) for m in measurements]
    twice = sorted({m.name for m in measurements if files.count(slug(m.name)) > 1})
    if twice:
        raise ValueError(f"two measurements are named {twice[0]!r}: a name is a file in measured/")
    runner, found = _Runner(cache, sum(map(_calls, measurements))), Found()
    for part in needed:
        if isinstance(part, Row):
            found.rows.append(_grouped(part, group))
            continue
        result = runner.result(part)
        given = result if part.function is None else (result,)
        _conclude(part, given, found, workdir, group)
    runner.end()
    return found


def _conclude(
    part: Measurement, given: tuple[Any, ...], found: Found, workdir: Path, group: str
) -> None:
    """Rows, raw numbers and pictures of one result."""
    if part.rows is not None:
        rows = part.rows(*given)
        rows = [rows] if isinstance(rows, Row) else rows
        found.rows += [_grouped(row, part.group or group) for row in rows]
    if part.raw is not None:
        found.raw[part.name] = part.raw(*given)
    elif part.function is not None:
        found.raw[part.name] = plain(given[0], MANY)
    # Pictures are made of results: no device is asked, and the main process draws alone.
    drawn = part.plot(*given) if part.plot is not None and process.main() else None
    if drawn is not None:
        for name, fig in (drawn if isinstance(drawn, Mapping) else {part.name: drawn}).items():
            path = Path("plots") / f"{slug(name)}.png"
            figures.save(fig, workdir / path)
            found.plots.append(path)


def _grouped(row: Row, group: str) -> Row:
    return row if row.group or not group else dataclasses.replace(row, group=group)


def _flat(parts: Iterable[Part]) -> Iterator[Measurement | Row]:
    for part in parts:
        if isinstance(part, Measurement | Row):
            yield part
        elif isinstance(part, str | Mapping) or not isinstance(part, Iterable):
            raise TypeError(f"a report is made of measurements and rows, not of {part!r:.80}")
        else:
            yield from _flat(part)


def _inside(value: Any) -> Iterator[Measurement]:
    """The measurements that a value holds."""
    if isinstance(value, Measurement):
        yield value
    elif isinstance(value, Each):
        yield from _inside(value.items)
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _inside(item)


def _needed(part: Measurement | Row) -> Iterator[Measurement | Row]:
    """All that a part builds on, and itself."""
    if isinstance(part, Measurement):
        for value in part.values:
            for m in _inside(value):
                yield from _needed(m)
    yield part


def _calls(m: Measurement) -> int:
    """How often its function runs."""
    if m.function is None:
        return 0
    every = [v.items for v in m.values if isinstance(v, Each)]
    if not every:
        return 1
    return _calls(every[0]) if isinstance(every[0], Measurement) else len(every[0])


class _Runner:
    """Runs each measurement once and says how far the study is."""

    def __init__(self, cache: Cache, total: int):
        self.cache, self.total = cache, total
        self.done = self.kept = 0
        self.started, self.spent = time.perf_counter(), 0.0
        self._results: dict[Measurement, Any] = {}

    def result(self, m: Measurement) -> Any:
        """What `m` measures, now or at an earlier start."""
        if m not in self._results:
            values = [self._resolved(v) for v in m.values]
            every = [v.items for v in values if isinstance(v, Each)]
            if m.function is None:
                self._results[m] = tuple(values)
            elif not every:
                self._results[m] = self._one(m, m.name, values)
            else:
                self._results[m] = self._all(m, values, every)
        return self._results[m]

    def _all(self, m: Measurement, values: list[Any], every: list[Any]) -> list[Any]:
        if len({len(items) for items in every}) > 1:
            counts = ", ".join(str(len(items)) for items in every)
            raise ValueError(f"{m.name!r}: each() of {counts} values cannot go in step")
        found, labels = [], _labels(every[0])
        self.total += len(labels) - _calls(m)  # items that were not known before
        for i, label in enumerate(labels):
            one = iter([items[i] for items in every])
            now = [next(one) if isinstance(v, Each) else v for v in values]
            found.append(self._one(m, f"{m.name} {label}", now))
        return found

    def _resolved(self, value: Any) -> Any:
        """`value` with results in the place of measurements."""
        if isinstance(value, Measurement):
            return self.result(value)
        if isinstance(value, Each):
            return Each(self._resolved(value.items))
        if type(value) in (list, tuple):
            return type(value)(self._resolved(v) for v in value)
        if type(value) is dict:
            return {k: self._resolved(v) for k, v in value.items()}
        return value

    def _one(self, m: Measurement, name: str, values: list[Any]) -> Any:
        assert m.function is not None
        # Of the main process: what code is reached depends on what has been imported.
        key = process.decided(lambda: _key(m, name, values))
        if process.decided(lambda: self._is_kept(name, key)):
            self.kept += 1
        else:
            self._say(name)
            start = time.perf_counter()
            value = m.function(*values)
            seconds = time.perf_counter() - start

            def keep() -> None:
                self.cache.keep(name, key, value, seconds)

            process.decided(keep)
            self.spent += seconds
        self.done += 1
        return self.cache.find(name, key)  # all processes read what the main one has kept

    def _is_kept(self, name: str, key: Key) -> bool:
        """Whether the cache holds it; says why not where it held something else."""
        try:
            self.cache.find(name, key)
        except Absent as absent:
            if str(absent):
                print(f"study     {absent}: measured again", flush=True)
            return False
        return True

    def _say(self, name: str) -> None:
        measured = self.done - self.kept
        left = self.spent / measured * (self.total - self.done) if measured else None
        eta = "" if left is None else f", about {clock(left)} left"
        past = clock(time.perf_counter() - self.started)
        print(f"study     {self.done + 1} of {self.total} after {past}{eta}: {name}", flush=True)

    def end(self) -> None:
        """Say how it went."""
        found = f", {self.kept} of them at an earlier start" if self.kept else ""
        past = clock(time.perf_counter() - self.started)
        print(f"study     {self.total} measured{found}; {past}", flush=True)


def _key(m: Measurement, name: str, values: list[Any]) -> dict[str, str]:
    """What the result of one call depends on. Raises TypeError naming an argument that cannot be
    told from others."""
    assert m.function is not None
    key = {"function": f"{m.function.__module__}.{m.function.__qualname__}"}
    key["code"] = code_of(m.function)
    for i, value in enumerate(values):
        try:
            key[f"argument {i + 1}"] = describe(value)
        except TypeError as error:
            raise TypeError(f"argument {i + 1} of {name!r}: {error}") from error
    return key


def _labels(items: Sequence[Any]) -> list[str]:
    """What tells each item from the others on the screen and in file names."""

    def label(item: Any) -> str:
        named = item[0] if isinstance(item, tuple) and item else item
        if isinstance(named, str | int):
            return str(named)
        return str(getattr(item, "label", "") or getattr(item, "name", ""))

    labels = [label(item) for item in items]
    if "" in labels or len({slug(text) for text in labels}) < len(labels):
        return [str(i) for i in range(len(labels))]
    return labels


def clock(seconds: float) -> str:
    """0:07, 2:30 or 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
