"""Pictures in one style: colours that colour-blind readers tell apart, text that is still 9 pt
where a page shows the picture 800 pixels wide, legends outside the curves, lines that say what they
are.
"""

import io
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdp.files import write_atomic
from fdp.metrics import read_metrics

# Okabe and Ito's colours, and with them markers for those who print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
GREY = "#444444"
SMALLEST = 9.0  # pt of 1/72 inch, a screen having 96 pixels an inch
SHOWN = 800.0  # pixels
_STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
}


def _points(width: float) -> float:
    """Font size in a figure of `width` inches that is SMALLEST where it is shown SHOWN wide."""
    return SMALLEST * width * 96 / SHOWN


def figure(
    columns: int = 1, width: float = 6.0, height: float = 3.6, rows: int = 1
) -> tuple[Any, Any]:
    """(Figure, Axes or array of Axes) in the house style, inches a column and a row, without any
    global state. What a caller writes into it needs no font size.
    """
    import matplotlib  # on use: it costs half a second at start-up
    from cycler import cycler

    # The first picture on a machine builds a list of its fonts, and says so.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    size = max(SMALLEST, _points(width * columns))
    cycle = cycler(color=COLOURS)
    with matplotlib.rc_context(_STYLE | {"font.size": size, "axes.prop_cycle": cycle}):
        fig = Figure(figsize=(width * columns, height * rows))
        return fig, fig.subplots(rows, columns)


def _texts(fig: Any) -> list[Any]:
    from matplotlib.text import Text

    return [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]


def smallest_text(fig: Any) -> float:
    """Size in pt of the smallest text where the figure is shown SHOWN pixels wide."""
    scale = SMALLEST / _points(fig.get_figwidth())
    return min((t.get_fontsize() * scale for t in _texts(fig)), default=math.inf)


def save(fig: Any, path: Path) -> Path:
    """Render `fig` with Agg to the PNG `path`, atomically, and return the path. Text too small to be
    read is enlarged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas, least = FigureCanvasAgg(fig), _points(fig.get_figwidth())
    canvas.draw()  # tick labels are there from now on
    for text in _texts(fig):
        text.set_fontsize(max(text.get_fontsize(), least))
    for axes in fig.axes:
        for axis in (axes.xaxis, axes.yaxis):  # labels of ticks that are not there yet
            sizes = [t.get_fontsize() for t in axis.get_ticklabels()]
            axis.set_tick_params(which="both", labelsize=max([least, *sizes]))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    canvas.print_figure(image, format="png")
    write_atomic(path, image.getvalue())
    return path


def legend(fig: Any, columns: int = 2) -> None:
    """One legend of all panels below them, each label once."""
    shown: dict[str, Any] = {}
    for axes in fig.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    if shown:
        size = max(SMALLEST, _points(fig.get_figwidth()))
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns}
        fig.legend(list(shown.values()), list(shown), fontsize=size, frameon=False, **place)


def reference(axes: Any, level: float, text: str, axis: str = "y") -> None:
    """A dashed line at `level` of an axis that says what it is, such as a threshold."""
    size = max(SMALLEST, _points(axes.figure.get_figwidth()))
    style: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1}
    words: dict[str, Any] = {"color": GREY, "fontsize": size}
    words["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1.0}
    if axis == "y":
        axes.axhline(level, **style)
        place = axes.get_yaxis_transform()
        axes.text(0.99, level, text, transform=place, ha="right", va="bottom", **words)
    else:
        axes.axvline(level, **style)
        place = axes.get_xaxis_transform()
        axes.text(level, 0.99, f" {text}", transform=place, ha="left", va="top", **words)


def smoothed(y_N: Sequence[float], over: int) -> np.ndarray:
    """Means of `over` values in a row, over - 1 fewer than there were."""
    return np.convolve(np.asarray(y_N, float), np.ones(over) / over, "valid")


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    levels: Mapping[str, float] | None = None,
    smooth: int = 1,
) -> Any:
    """The figure of one line per label of `series` {label: (x, y)} and a labelled level for each of
    `levels`. `smooth`: lines of at least twice as many values are means over so many, and say it."""
    fig, axes = figure(height=4.0)
    for i, (label, (x, y)) in enumerate(series.items()):
        if smooth > 1 and len(y) >= 2 * smooth:
            x, y, label = (
                x[smooth - 1 :],
                smoothed(y, smooth).tolist(),
                f"{label} (mean of {smooth})",
            )
        marker = MARKERS[i % len(MARKERS)] if len(x) <= 20 else None
        line = ("-", "--", ":")[i // len(COLOURS) % 3]
        axes.plot(x, y, label=label, marker=marker, markersize=4, linestyle=line)
    for text, level in (levels or {}).items():
        reference(axes, level, text)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    legend(fig)
    return fig


def training_curves(
    workdir: Path, names: Mapping[str, str], title: str, ylabel: str = "nats per token"
) -> Any:
    """The figure of training and validation losses of the arms `names` {arm: label} against steps:
    means over seeds of what the run has logged, training losses as means of ten rows."""
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_metrics(workdir):
        for key in ("loss", "val_loss"):
            if row["arm"] in names and key in row and math.isfinite(float(row[key])):
                found[row["arm"], key][row["step"]].append(float(row[key]))
    series = {}
    for (arm, key), by_step in found.items():
        steps = sorted(by_step)
        kind = "training" if key == "loss" else "validation"
        means = [float(np.mean(by_step[step])) for step in steps]
        series[f"{names[arm]}, {kind}"] = (steps, means)
    return curves(series, "step", ylabel, title, smooth=10)
