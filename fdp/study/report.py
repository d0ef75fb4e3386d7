"""The Report of a study: claims with numbers, verdicts that follow from the numbers, and how each
number came to be.
"""

import dataclasses
import importlib.metadata
import io
import json
import math
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

VERDICTS = ("holds", "fails", "not testable here")
EVIDENCE = {
    "measured": "run on the devices named above; wall time on virtual CPU devices is never "
    "evidence of parallel speed",
    "counted": "exact, from the jaxpr or the compiled program, or from counted rounds or tokens",
    "compiled": "from a program compiled ahead of time for real TPU or GPU topologies; never a "
    "timing",
    "simulated": "from the cost model, with its calibration data and validation error in the note",
}
ROW_KEYS = (
    "claim",
    "metric",
    "value",
    "unit",
    "baseline",
    "baseline_value",
    "ratio",
    "ci",
    "threshold",
    "verdict",
    "evidence",
    "note",
)
REPORT_KEYS = ("topic", "variant", "config_hash", "versions", "devices", "rows", "plots")

_THRESHOLD = re.compile(r"\s*(value|ratio)?\s*(<=|>=|==)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*")


def _parse(threshold: str) -> tuple[str | None, str, float]:
    """ "ratio <= 0.35" → ("ratio", "<=", 0.35)."""
    match = _THRESHOLD.fullmatch(threshold)
    if match is None:
        raise ValueError(
            f"threshold {threshold!r}: write '<= x', '>= x' or '== x', optionally after 'value' or "
            "'ratio'"
        )
    return match.group(1), match.group(2), float(match.group(3))


def judge(number: float, threshold: str) -> str:
    """ "holds" or "fails": the point estimate decides (`straddles` tells whether its interval
    agrees).

    `threshold` is "<= x", ">= x" or "== x" (equal to 1 part in 10⁹), optionally after "value" or
    "ratio". Raises ValueError on another text and on a number that is not finite."""
    _, operator, limit = _parse(threshold)
    if not math.isfinite(number):
        raise ValueError(
            f"{number} cannot be judged by {threshold!r}: report how many runs diverged as a row "
            "instead"
        )
    if operator == "==":
        holds = math.isclose(number, limit, rel_tol=1e-9)
    else:
        holds = number <= limit if operator == "<=" else number >= limit
    return "holds" if holds else "fails"


def straddles(ci: tuple[float, float], threshold: str) -> bool:
    """Whether the ends of `ci` get different verdicts; an exact "==" has no two sides."""
    return _parse(threshold)[1] != "==" and judge(ci[0], threshold) != judge(ci[1], threshold)


def bootstrap_ci(
    values: Sequence[float],
    baseline: Sequence[float] | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval (10 000 resamples) of the mean over seeds, or None below two
    seeds.

    With `baseline`, values of the same seeds in the same order: of the paired ratio mean(values) /
    mean(baseline)."""
    x_N = np.asarray(values, float)
    if x_N.size < 2:
        return None
    draws_BxN = np.random.default_rng(seed).integers(0, x_N.size, (10_000, x_N.size))
    means_B = x_N[draws_BxN].mean(1)
    if baseline is not None:
        y_N = np.asarray(baseline, float)
        if y_N.shape != x_N.shape:
            raise ValueError(
                f"a paired ratio needs one baseline per seed: {x_N.size} values, {y_N.size} "
                "baselines"
            )
        means_B = means_B / y_N[draws_BxN].mean(1)
    lo, hi = np.quantile(means_B, ((1 - level) / 2, (1 + level) / 2))
    return float(lo), float(hi)


def _seeds(values: float | Sequence[float]) -> list[float]:
    return [float(v) for v in np.atleast_1d(np.asarray(values, float))]


@dataclass(frozen=True)
class Row:
    """One claim with the number that decides it. Make rows with `Row.judged` or `Row.untestable`.

    `threshold` speaks of the ratio where there is one, else of the value; "value <= x" or "ratio <=
    x" says which. `ci` is the 95 % interval of that same number. Raises ValueError where the
    verdict is not what the number says."""

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
    ) -> "Row":
        """A row from one value or one value per seed; means, ratio, interval and verdict follow
        from them.

        Pass `ratio` or `ci` where they were computed otherwise (an interval over prompts, say).
        """
        xs = _seeds(values)
        ys = None if baseline_values is None else _seeds(baseline_values)
        value, baseline_value = float(np.mean(xs)), None if ys is None else float(np.mean(ys))
        if ratio is None and baseline_value:
            ratio = value / baseline_value
            if (
                ci is None
                and ys is not None
                and len(ys) == len(xs)
                and _subject(threshold, ratio) == "ratio"
            ):
                ci = bootstrap_ci(xs, ys)
        of_ratio = ratio is not None and _subject(threshold, ratio) == "ratio"
        if ci is None and not of_ratio:
            ci = bootstrap_ci(xs)
        if ci is not None and straddles(ci, threshold):
            straddle = f"the interval [{_number(ci[0])}, {_number(ci[1])}] straddles the threshold"
            note = f"{note}; {straddle}" if note else straddle
        verdict = judge(ratio if ratio is not None and of_ratio else value, threshold)
        return cls(
            claim,
            metric,
            value,
            unit,
            baseline,
            baseline_value,
            ratio,
            ci,
            threshold,
            verdict,
            evidence,
            note,
        )

    @classmethod
    def untestable(
        cls, claim: str, metric: str, unit: str, threshold: str, evidence: str, note: str
    ) -> "Row":
        """A claim that this machine cannot decide; `note` says why and what it would take."""
        return cls(
            claim,
            metric,
            None,
            unit,
            "",
            None,
            None,
            None,
            threshold,
            "not testable here",
            evidence,
            note,
        )


def _subject(threshold: str, ratio: float | None) -> str:
    """Which number the threshold speaks of."""
    return _parse(threshold)[0] or ("value" if ratio is None else "ratio")


def _require(condition: bool, where: str, key: str, text: str) -> None:
    if not condition:
        raise ValueError(f"{where}, key {key!r}: {text}")


def _check_row(row: Mapping[str, Any], where: str) -> None:
    """Raise ValueError naming `where` and the key that is wrong."""
    for key in (*ROW_KEYS, *row):
        _require(key in row, where, key, "missing")
        _require(key in ROW_KEYS, where, key, "unknown")
    for key in ("claim", "metric", "unit", "baseline", "threshold", "note"):
        _require(isinstance(row[key], str), where, key, f"{row[key]!r} is not a text")
    for key in ("claim", "metric"):
        _require(bool(row[key]), where, key, "empty")
    ci = row["ci"]
    _require(ci is None or len(ci) == 2, where, "ci", f"{ci!r} is not [low, high]")
    for key, numbers in {
        "value": [row["value"]],
        "baseline_value": [row["baseline_value"]],
        "ratio": [row["ratio"]],
        "ci": ci or [],
    }.items():
        for value in numbers:
            finite = value is None or (isinstance(value, int | float) and math.isfinite(value))
            _require(finite, where, key, f"{value!r} is not a finite number or null")
    _require(ci is None or ci[0] <= ci[1], where, "ci", f"{ci!r} has low > high")
    _require(
        row["evidence"] in EVIDENCE,
        where,
        "evidence",
        f"{row['evidence']!r} is none of {tuple(EVIDENCE)}",
    )
    _check_verdict(row, where)


def _check_verdict(row: Mapping[str, Any], where: str) -> None:
    verdict = row["verdict"]
    _require(verdict in VERDICTS, where, "verdict", f"{verdict!r} is none of {VERDICTS}")
    try:
        subject = _subject(row["threshold"], row["ratio"])
    except ValueError as error:
        raise ValueError(f"{where}, key 'threshold': {error}") from error
    if verdict == "not testable here":
        _require(
            bool(row["note"]),
            where,
            "note",
            "an untestable claim must say why and what it would take",
        )
        return
    number = row[subject]
    _require(row["value"] is not None, where, "value", f"a verdict {verdict!r} needs a number")
    _require(
        number is not None,
        where,
        subject,
        f"threshold {row['threshold']!r} speaks of a {subject} that is null",
    )
    said = judge(number, row["threshold"])
    _require(
        verdict == said,
        where,
        "verdict",
        f"{verdict!r}, but {number} {said} at {row['threshold']!r}",
    )


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


def _number(value: float | None) -> str:
    """Counts in full, everything else to four digits."""
    if value is None:
        return "–"
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def _with_unit(value: float | None, unit: str) -> str:
    return f"{_number(value)} {unit}".strip()


def _cells(row: Row) -> list[str]:
    """The table cells of a row: claim, result, baseline, ratio, threshold, verdict, evidence."""
    baseline = row.baseline
    if row.baseline_value is not None:
        baseline = f"{row.baseline}: {_with_unit(row.baseline_value, row.unit)}".removeprefix(": ")
    result, ratio = _with_unit(row.value, row.unit), _number(row.ratio)
    if row.ci is not None:
        interval = f" [{_number(row.ci[0])}, {_number(row.ci[1])}]"
        if _subject(row.threshold, row.ratio) == "ratio":
            ratio += interval
        else:
            result += interval
    return [
        row.claim,
        f"{row.metric}: {result}",
        baseline,
        ratio,
        row.threshold,
        row.verdict,
        row.evidence,
    ]


_HEAD = ["claim", "result", "baseline", "ratio", "threshold", "verdict", "evidence"]


def _fit(widths: list[int], floors: list[int], total: int) -> list[int]:
    """Column widths with two spaces between them that fit `total`: the widest gives way first,
    headers last.
    """
    widths = list(widths)
    while sum(widths) + 2 * (len(widths) - 1) > total and max(widths) > 6:
        widest = max(range(len(widths)), key=lambda i: (widths[i] > floors[i], widths[i]))
        widths[widest] -= 1
    return widths


@dataclass
class Report:
    """What a study found. `plots` are paths inside the workdir; `raw` holds per-seed numbers
    (arrays allowed).
    """

    topic: str
    variant: str
    config_hash: str
    rows: list[Row] = field(default_factory=list)
    plots: list[str | Path] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    devices: str = field(default_factory=devices)

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        rows = [
            dataclasses.asdict(row) | {"ci": None if row.ci is None else list(row.ci)}
            for row in self.rows
        ]
        return {
            "topic": self.topic,
            "variant": self.variant,
            "config_hash": self.config_hash,
            "versions": self.versions,
            "devices": self.devices,
            "rows": rows,
            "plots": [Path(plot).as_posix() for plot in self.plots],
        }

    def markdown(self) -> str:
        """The report as Markdown, with the kinds of evidence explained and the plots embedded."""
        cell = lambda text: text.replace("|", "\\|").replace("\n", " ")
        table = [
            _HEAD,
            ["---"] * len(_HEAD),
            *([cell(c) for c in _cells(row)] for row in self.rows),
        ]
        made_by = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"# {self.topic}: report of variant `{self.variant}`", ""]
        lines += [f"Config `{self.config_hash}` on {self.devices}; {made_by}.", ""]
        lines += [f"| {' | '.join(row)} |" for row in table]
        notes = [f"- {row.claim}: {row.note}" for row in self.rows if row.note]
        lines += ["", "## Notes", "", *notes] if notes else []
        lines += [
            "",
            "## Evidence",
            "",
            *(f"- **{kind}**: {text}." for kind, text in EVIDENCE.items()),
        ]
        lines += [
            "",
            "Square brackets are 95 % intervals; the point estimate decides a verdict.",
            "",
        ]
        lines += [f"![{Path(plot).stem}]({Path(plot).as_posix()})\n" for plot in self.plots]
        return "\n".join(lines)

    def terminal(self, width: int | None = None) -> str:
        """The verdict table, wrapped to `width` columns (default: the terminal's)."""
        width = width or shutil.get_terminal_size((120, 24)).columns
        table = [_cells(row) for row in self.rows]
        floors = [len(head) + 2 for head in _HEAD]  # tabulate pads a header by two
        natural = [
            max([floor, *(len(cells[i]) for cells in table)]) for i, floor in enumerate(floors)
        ]
        widths = _fit(natural, floors, width)
        heads = [w - 2 for w in widths]
        text = tabulate(
            table,
            _HEAD,
            "simple",
            disable_numparse=True,
            maxcolwidths=widths,
            maxheadercolwidths=heads,
        )
        title = f"{self.topic} ({self.variant}) on {self.devices}"
        notes = [
            textwrap.fill(f"note: {r.claim}: {r.note}", width, subsequent_indent="  ")
            for r in self.rows
            if r.note
        ]
        return "\n".join([*textwrap.wrap(title, width), "", text, *(["", *notes] if notes else [])])

    def write(self, workdir: Path, raw: Mapping[str, Any] | None = None) -> None:
        """Write raw.json (`raw`, else self.raw), then check the report and write report.json and
        report.md.

        Raises ValueError as `validate` does: raw numbers are on disk by then, so nothing measured
        is lost."""
        workdir = Path(workdir)
        root = workdir.absolute()
        self.plots = [
            p.relative_to(root) if (p := root / plot).is_relative_to(root) else p
            for plot in self.plots
        ]
        write_atomic(
            workdir / "raw.json",
            json.dumps(_plain(self.raw if raw is None else raw), indent=1) + "\n",
        )
        report = self.to_json()
        validate(report, workdir)
        write_atomic(workdir / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        write_atomic(workdir / "report.md", self.markdown())


def _plain(value: Any) -> Any:
    """JSON of nested containers, arrays and numbers; non-finite numbers become "nan", "inf" and
    "-inf".
    """
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def validate(report: Mapping[str, Any], workdir: Path | None = None) -> None:
    """Raise ValueError naming the row and key that is wrong in the content of a report.json.

    With `workdir`, the plot files must exist there, under relative paths.
    """
    for key in (*REPORT_KEYS, *report):
        _require(key in report, "report", key, "missing")
        _require(key in REPORT_KEYS, "report", key, "unknown")
    _require(len(report["rows"]) > 0, "report", "rows", "a study must judge at least one claim")
    for i, row in enumerate(report["rows"]):
        _check_row(row, f"row {i} ({row.get('claim', 'no claim')!r})")
    for plot in report["plots"]:
        _require(
            not Path(plot).is_absolute() and ".." not in Path(plot).parts,
            "report",
            "plots",
            f"{plot} is not a path inside the workdir",
        )
        _require(
            workdir is None or (Path(workdir) / plot).is_file(),
            "report",
            "plots",
            f"file {plot} is missing",
        )


# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
}


def figure(columns: int = 1, width: float = 6.0, height: float = 3.6) -> tuple[Any, Any]:
    """(Figure, Axes or array of Axes) in the house style, width in inches a column, without any
    global state.
    """
    import matplotlib  # imported on use: it costs half a second at start-up
    from cycler import cycler
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"axes.prop_cycle": cycler(color=_COLOURS)}):
        fig = Figure(figsize=(width * columns, height))
        return fig, fig.subplots(1, columns)


def save_plot(fig: Any, path: Path) -> Path:
    """Render `fig` with Agg to the PNG `path`, atomically, and return the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    FigureCanvasAgg(fig).print_figure(image, format="png")
    write_atomic(path, image.getvalue())
    return path


def plot_curves(
    path: Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    hlines: Mapping[str, float] | None = None,
) -> Path:
    """One line per label of `series` {label: (x, y)} and a dashed level per label of `hlines`;
    returns the path.
    """
    fig, axes = figure()
    for label, (x, y) in series.items():
        axes.plot(x, y, label=label, marker="o" if len(x) <= 20 else None, markersize=3)
    for i, (label, level) in enumerate((hlines or {}).items()):
        axes.axhline(
            level, label=label, linestyle="--", linewidth=1, color=("#444444", "#999999")[i % 2]
        )
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if series or hlines:
        axes.legend(fontsize=8)
    return save_plot(fig, path)
