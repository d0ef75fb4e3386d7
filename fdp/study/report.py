"""The Report of a study: claims with numbers, verdicts that follow from the numbers, how each
number came to be, and what a person reads first: the question, the answer, the rows that decide.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tabulate import tabulate

from fdp.files import write_atomic
from fdp.mesh import is_virtual
from fdp.study.statistics import interval

VERDICTS = ("holds", "fails", "not testable here")
EVIDENCE = {
    "measured": "run on the devices named above; wall time on virtual CPU devices is never "
    "evidence of parallel speed",
    "counted": "exact, from the jaxpr or the compiled program, or from counted rounds or tokens",
    "compiled": "from a program compiled ahead of time for real TPU or GPU topologies; never a "
    "timing",
    "simulated": "from the cost model, with its calibration data and validation error in the note",
}
ROW_TEXTS = ("claim", "metric", "unit", "baseline", "threshold", "note")
ROW_MORE = ("group", "decides")
REPORT_KEYS = ("topic", "variant", "config_hash", "versions", "devices", "rows", "plots")
REPORT_MORE = ("question", "answer", "training")
REMARK = ", interval crosses"
SKIPPED = 0.01  # share of skipped steps beyond which a run decides no claim

_THRESHOLD = re.compile(r"\s*(value|ratio)?\s*(<=|>=|==)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*")


class BadReport(ValueError):
    """A row or report that says what its numbers do not, or nothing."""


# Verdicts
# -------------------------------------------------------------------------------------------------


def threshold_of(text: str) -> tuple[str | None, str, float]:
    """ "ratio <= 0.35" → ("ratio", "<=", 0.35). Raises BadReport for another text."""
    match = _THRESHOLD.fullmatch(text)
    if match is None:
        raise BadReport(
            f"threshold {text!r}: write '<= x', '>= x' or '== x', optionally after 'value' or "
            "'ratio'"
        )
    return match.group(1), match.group(2), float(match.group(3))


def judge(number: float, threshold: str) -> str:
    """ "holds" or "fails": the point estimate decides (`crosses` tells whether its interval
    agrees).

    `threshold` is "<= x", ">= x" or "== x" (equal to 1 part in 10⁹), optionally after "value" or
    "ratio". Raises BadReport on another text and on a number that is not finite."""
    _, operator, limit = threshold_of(threshold)
    if not math.isfinite(number):
        raise BadReport(
            f"{number} cannot be judged by {threshold!r}: report how many runs diverged as a row "
            "instead"
        )
    if operator == "==":
        holds = math.isclose(number, limit, rel_tol=1e-9)
    else:
        holds = number <= limit if operator == "<=" else number >= limit
    return "holds" if holds else "fails"


def crosses(ci: Sequence[float] | None, threshold: str) -> bool:
    """Whether the ends of `ci` get different verdicts; an exact "==" has no two sides."""
    if ci is None or threshold_of(threshold)[1] == "==":
        return False
    return judge(ci[0], threshold) != judge(ci[1], threshold)


def _subject(threshold: str, ratio: float | None) -> str:
    """Which number the threshold speaks of."""
    return threshold_of(threshold)[0] or ("value" if ratio is None else "ratio")


# Rows
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One claim with the number that decides it. Make rows with `Row.judged` or `Row.untestable`.

    `threshold` speaks of the ratio where there is one, else of the value; "value <= x" or "ratio <=
    x" says which. `ci` is the 95 % interval of that same number. Rows of one `group` stand
    together; those that answer the question of the study have `decides`. Raises BadReport where
    the verdict is not what the number says."""

    claim: str
    metric: str
    value: float | None
    unit: str
    baseline: str
    baseline_value: float | None
    ratio: float | None
    ci: tuple[float, float] | None
    threshold: str
    verdict: str
    evidence: str
    note: str
    group: str = ""
    decides: bool = False

    def __post_init__(self) -> None:
        _check_row(dataclasses.asdict(self), f"row {self.claim!r}")

    @classmethod
    def judged(
        cls,
        claim: str,
        metric: str,
        values: float | Sequence[float],
        unit: str,
        threshold: str,
        evidence: str,
        baseline: str = "",
        baseline_values: float | Sequence[float] | None = None,
        ratio: float | None = None,
        ci: tuple[float, float] | None = None,
        note: str = "",
        group: str = "",
        decides: bool = False,
    ) -> "Row":
        """A row from one value or one value per seed; means, ratio, interval and verdict follow
        from them.

        Pass `ratio` or `ci` where they were computed otherwise (an interval over prompts, say).
        Raises BadReport naming the claim for a number that is not finite."""
        xs = _seeds(values)
        ys = None if baseline_values is None else _seeds(baseline_values)
        value, base = float(np.mean(xs)), None if ys is None else float(np.mean(ys))
        given = ratio is not None
        if ratio is None and base:
            ratio = value / base
        of_ratio = ratio is not None and _subject(threshold, ratio) == "ratio"
        try:
            verdict = judge(ratio if ratio is not None and of_ratio else value, threshold)
        except BadReport as error:
            raise BadReport(f"row {claim!r}: {error}") from error
        if ci is None and not of_ratio:
            ci = interval(xs)
        elif ci is None and not given and ys is not None and len(ys) == len(xs):
            ci = interval(xs, ys)
        if ci is not None and crosses(ci, threshold):
            said = f"the interval [{_number(ci[0])}, {_number(ci[1])}] crosses the threshold"
            note = f"{note}; {said}" if note else said
        numbers = value, unit, baseline, base, ratio, ci
        return cls(claim, metric, *numbers, threshold, verdict, evidence, note, group, decides)

    @classmethod
    def untestable(
        cls,
        claim: str,
        metric: str,
        unit: str,
        threshold: str,
        evidence: str,
        note: str,
        group: str = "",
        decides: bool = False,
    ) -> "Row":
        """A claim that this machine cannot decide; `note` says why and what it would take."""
        none = None, unit, "", None, None, None
        verdict = VERDICTS[2]
        return cls(claim, metric, *none, threshold, verdict, evidence, note, group, decides)

    def doubted(self, why: str) -> "Row":
        """The row without a verdict, if its evidence comes from training; its number stays in the
        note."""
        if self.evidence in ("compiled", "simulated") or self.verdict == VERDICTS[2]:
            return self
        note = f"{why}; without that, {self.metric} would be {self.result}"
        note = f"{note}; {self.note}" if self.note else note
        who = self.claim, self.metric, self.unit, self.threshold, self.evidence
        return Row.untestable(*who, note, self.group, self.decides)

    @property
    def said(self) -> str:
        """The verdict, and whether its interval disagrees."""
        judged = self.verdict != VERDICTS[2]
        return self.verdict + REMARK * (judged and crosses(self.ci, self.threshold))

    @property
    def result(self) -> str:
        """The number that decides, with unit and interval; "–" where there is none."""
        if self.value is None:
            return "–"
        of_ratio = _subject(self.threshold, self.ratio) == "ratio"
        text = f"{_number(self.ratio)} ×" if of_ratio else _with_unit(self.value, self.unit)
        return text + _bracket(self.ci)


ROW_KEYS = tuple(f.name for f in dataclasses.fields(Row) if f.name not in ROW_MORE)


def _seeds(values: float | Sequence[float]) -> list[float]:
    return [float(v) for v in np.atleast_1d(np.asarray(values, float))]


def _require(condition: bool, where: str, key: str, text: str) -> None:
    if not condition:
        raise BadReport(f"{where}, key {key!r}: {text}")


def _check_keys(
    content: Mapping[str, Any], needed: tuple[str, ...], more: tuple[str, ...], where: str
) -> None:
    for key in (*needed, *content):
        _require(key in content, where, key, "missing")
        _require(key in needed + more, where, key, "unknown")


def _check_row(row: Mapping[str, Any], where: str) -> None:
    """Raise BadReport naming `where` and the key that is wrong."""
    _check_keys(row, ROW_KEYS, ROW_MORE, where)
    for key in ROW_TEXTS:
        _require(isinstance(row[key], str), where, key, f"{row[key]!r} is not a text")
    for key in ("claim", "metric"):
        _require(bool(row[key]), where, key, "empty")
    ci = row["ci"]
    _require(ci is None or len(ci) == 2, where, "ci", f"{ci!r} is not [low, high]")
    for key in ("value", "baseline_value", "ratio", "ci"):
        for value in ci or () if key == "ci" else (row[key],):
            finite = value is None or (isinstance(value, int | float) and math.isfinite(value))
            _require(finite, where, key, f"{value!r} is not a finite number or null")
    _require(ci is None or ci[0] <= ci[1], where, "ci", f"{ci!r} has low > high")
    evidence, verdict = row["evidence"], row["verdict"]
    _require(evidence in EVIDENCE, where, "evidence", f"{evidence!r} is none of {tuple(EVIDENCE)}")
    _require(verdict in VERDICTS, where, "verdict", f"{verdict!r} is none of {VERDICTS}")
    _check_verdict(row, where)


def _check_verdict(row: Mapping[str, Any], where: str) -> None:
    verdict, threshold = row["verdict"], row["threshold"]
    try:
        subject = _subject(threshold, row["ratio"])
    except BadReport as error:
        raise BadReport(f"{where}, key 'threshold': {error}") from error
    if verdict == "not testable here":
        why = "an untestable claim must say why and what it would take"
        return _require(bool(row["note"]), where, "note", why)
    number = row[subject]
    _require(row["value"] is not None, where, "value", f"a verdict {verdict!r} needs a number")
    absent = f"threshold {threshold!r} speaks of a {subject} that is null"
    _require(number is not None, where, subject, absent)
    said = judge(number, threshold)
    _require(
        verdict == said, where, "verdict", f"{verdict!r}, but {number} {said} at {threshold!r}"
    )


# What made the numbers
# -------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of what decides numbers."""
    out = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "fdp"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def devices() -> str:
    """`8 virtual CPU devices`, `1 CPU device` or `4 × NVIDIA H200`."""
    found = jax.devices()
    n = len(found)
    if found[0].platform != "cpu":
        return f"{n} × {found[0].device_kind}"
    return f"{n} {'virtual ' if is_virtual(found) else ''}CPU device{'s' if n > 1 else ''}"


# Rendering
# -------------------------------------------------------------------------------------------------

_HEAD = ["claim", "result", "baseline", "ratio", "threshold", "verdict", "evidence"]
_DECIDING = ["verdict", "claim", "result", "threshold", "evidence"]


def _number(value: float | None) -> str:
    """Counts in full, everything else to four digits."""
    if value is None:
        return "–"
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def _with_unit(value: float | None, unit: str) -> str:
    return f"{_number(value)} {unit}".strip()


def _bracket(ci: tuple[float, float] | None) -> str:
    return "" if ci is None else f" [{_number(ci[0])}, {_number(ci[1])}]"


def _cells(row: Row) -> list[str]:
    """The table cells of a row, as _HEAD."""
    baseline = row.baseline
    if row.baseline_value is not None:
        baseline = f"{row.baseline}: {_with_unit(row.baseline_value, row.unit)}".removeprefix(": ")
    of_ratio = _subject(row.threshold, row.ratio) == "ratio"
    result = _with_unit(row.value, row.unit) + _bracket(None if of_ratio else row.ci)
    ratio = _number(row.ratio) + _bracket(row.ci if of_ratio else None)
    metric = f"{row.metric}: {result}"
    return [row.claim, metric, baseline, ratio, row.threshold, row.said, row.evidence]


def _deciding_cells(row: Row) -> list[str]:
    """As _DECIDING."""
    return [row.said, row.claim, f"{row.metric}: {row.result}", row.threshold, row.evidence]


def _fit(widths: list[int], floors: list[int], total: int) -> list[int]:
    """Column widths with two spaces between them that fit `total`: the widest gives way first,
    headers last.
    """
    widths = list(widths)
    while sum(widths) + 2 * (len(widths) - 1) > total and max(widths) > 6:
        widest = max(range(len(widths)), key=lambda i: (widths[i] > floors[i], widths[i]))
        widths[widest] -= 1
    return widths


def _table(head: list[str], cells: list[list[str]], width: int) -> str:
    """Wrapped to `width` columns."""
    floors = [len(title) + 2 for title in head]  # tabulate pads a header by two
    natural = [max([floor, *(len(c[i]) for c in cells)]) for i, floor in enumerate(floors)]
    widths = _fit(natural, floors, width)
    options: dict[str, Any] = {"disable_numparse": True, "maxcolwidths": widths}
    return tabulate(cells, head, "simple", maxheadercolwidths=[w - 2 for w in widths], **options)


def _markdown_table(head: list[str], cells: list[list[str]]) -> list[str]:
    plain = [[c.replace("|", "\\|").replace("\n", " ") for c in row] for row in cells]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *plain)]


@dataclass
class Report:
    """What a study found. `plots` are paths inside the workdir; `raw` holds per-seed numbers
    (arrays allowed). `training`: what a reader must know of how the arms were trained.
    """

    topic: str
    variant: str
    config_hash: str
    rows: list[Row] = field(default_factory=list)
    plots: list[str | Path] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    devices: str = field(default_factory=devices)
    question: str = ""
    training: list[str] = field(default_factory=list)

    @property
    def deciding(self) -> list[Row]:
        """The rows that answer the question; all of them where none is marked."""
        return [row for row in self.rows if row.decides] or self.rows

    @property
    def answer(self) -> str:
        """One sentence made of the deciding rows: how many hold, the first number, what fails."""
        rows = self.deciding
        count = {v: sum(row.verdict == v for row in rows) for v in VERDICTS}
        holds, fails, unknown = count.values()
        judged = holds + fails
        word = "In part" if holds and fails else "Yes" if holds else "No" if fails else "Open"
        kind = "deciding claims" if any(row.decides for row in rows) else "claims"
        parts = [f"{holds} of {judged} {kind} hold" if judged else "no claim could be decided"]
        if unknown:
            parts.append(f"{unknown} not testable here")
        first = next((r for r in rows if r.value is not None and r.decides), None)
        shown = [] if first is None else [first]
        shown += [r for r in rows if r.decides and r.verdict == "fails" and r is not first]
        parts += [f"{r.claim}: {r.result} ({r.threshold}, {r.said})" for r in shown]
        return f"{word}: {'; '.join(parts)}."

    def distrust(self, skipped: Mapping[str, tuple[int, int]]) -> None:
        """Say how many steps of each arm were skipped, of how many; beyond SKIPPED of an arm, no
        claim that depends on training is testable."""
        shares = {arm: n / max(steps, 1) for arm, (n, steps) in skipped.items()}
        said = {
            arm: f"{n} of {steps} steps ({100 * shares[arm]:.2g} %) were skipped: loss or "
            "gradient was not finite"
            for arm, (n, steps) in skipped.items()
            if n
        }
        self.training += [f"{arm}: {text}" for arm, text in said.items()]
        worst = max(shares, key=lambda arm: shares[arm], default="")
        if worst and shares[worst] > SKIPPED:
            why = f"{worst}: {said[worst]}, more than {100 * SKIPPED:.0f} % of a run"
            self.rows = [row.doubted(why) for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        rows = [
            dataclasses.asdict(row) | {"ci": None if row.ci is None else list(row.ci)}
            for row in self.rows
        ]
        head = {key: getattr(self, key) for key in REPORT_KEYS[:5]}
        plots = [Path(plot).as_posix() for plot in self.plots]
        return head | {"rows": rows, "plots": plots} | {k: getattr(self, k) for k in REPORT_MORE}

    def markdown(self) -> str:
        """The report as Markdown: question, answer and deciding rows, all rows by group, pictures,
        notes, and what the kinds of evidence mean."""
        made_by = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"# {self.topic}: report of variant `{self.variant}`", ""]
        lines += [f"**{self.question}**", ""] if self.question else []
        lines += [self.answer, ""]
        if any(row.decides for row in self.rows):
            lines += [*_markdown_table(_DECIDING, [_deciding_cells(r) for r in self.deciding]), ""]
        lines += [f"Config `{self.config_hash}` on {self.devices}; {made_by}.", ""]
        lines += (
            [*(f"- Training of {line}." for line in self.training), ""] if self.training else []
        )
        lines += ["## All rows"]
        for group in dict.fromkeys(row.group for row in self.rows):
            cells = [_cells(row) for row in self.rows if row.group == group]
            lines += ["", *([f"### {group}", ""] if group else []), *_markdown_table(_HEAD, cells)]
        lines += ["", *(f"![{Path(plot).stem}]({Path(plot).as_posix()})\n" for plot in self.plots)]
        lines += ["Square brackets are 95 % intervals; the point estimate decides a verdict."]
        lines += [f"Where they reach over the threshold it says so: {REMARK[2:]}.", ""]
        lines += [f"- **{kind}**: {text}." for kind, text in EVIDENCE.items()]
        notes = [f"- {row.claim}: {row.note}" for row in self.rows if row.note]
        lines += ["", "## Notes", "", *notes] if notes else []
        return "\n".join([*lines, ""])

    def terminal(self, width: int | None = None) -> str:
        """The opening of the report, wrapped to `width` columns (default: the terminal's)."""
        width = width or shutil.get_terminal_size((120, 24)).columns
        lines = textwrap.wrap(f"{self.topic} ({self.variant}) on {self.devices}", width)
        said = [("question", self.question), ("answer", self.answer)]
        for name, text in said + [("training", line) for line in self.training]:
            indent: dict[str, str] = {"initial_indent": f"{name:10}", "subsequent_indent": " " * 10}
            lines += textwrap.wrap(text, width, **indent) if text else []  # type: ignore[arg-type]
        return "\n".join(
            [*lines, "", _table(_DECIDING, list(map(_deciding_cells, self.deciding)), width)]
        )

    def write(self, workdir: Path) -> None:
        """Write raw.json, then check the report and write report.json and report.md.

        Raises BadReport as `validate` does: raw numbers are on disk by then, so nothing measured
        is lost."""
        workdir = Path(workdir)
        self.plots = [_inside(plot, os.path.abspath(workdir)) for plot in self.plots]
        write_atomic(workdir / "raw.json", json.dumps(plain(self.raw), indent=1) + "\n")
        report = self.to_json()
        validate(report, workdir)
        write_atomic(workdir / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        write_atomic(workdir / "report.md", self.markdown())


def _inside(plot: str | Path, root: str) -> Path:
    """The plot's path in the folder `root`, given there or from the current directory."""
    path = Path(root, plot)
    if not path.is_file():
        path = Path(os.path.abspath(plot))
    return path.relative_to(root) if path.is_relative_to(root) else Path(plot)


def plain(value: Any, many: int | None = None) -> Any:
    """JSON of nested containers, dataclasses, arrays and numbers; non-finite numbers become "nan",
    "inf" and "-inf", arrays of more than `many` elements their shapes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v, many) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, many) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        x = np.asarray(value)
        if many is not None and x.size > many:
            return f"{x.dtype} [{', '.join(map(str, x.shape))}] in measured/"
        return plain(x.tolist())
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def validate(report: Mapping[str, Any], workdir: Path | None = None) -> None:
    """Raise BadReport naming the row and key that is wrong in the content of a report.json.

    With `workdir`, the plot files must exist there, under relative paths.
    """
    _check_keys(report, REPORT_KEYS, REPORT_MORE, "report")
    _require(len(report["rows"]) > 0, "report", "rows", "a study must judge at least one claim")
    for i, row in enumerate(report["rows"]):
        _check_row(row, f"row {i} ({row.get('claim', 'no claim')!r})")
    for plot in map(Path, report["plots"]):
        outside = plot.is_absolute() or ".." in plot.parts
        _require(not outside, "report", "plots", f"{plot} is not a path inside the workdir")
        there = workdir is None or (Path(workdir) / plot).is_file()
        _require(there, "report", "plots", f"file {plot} is missing")
