"""Numbers over a grid of cases, and the map of where a claim holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fdp.study import figures
from fdp.study.report import judge, threshold_of


@dataclass(frozen=True)
class Grid:
    """`fields` {name: array over the values of `axes`, in their order}; NaN where a case has none.

    The fields "low" and "high", where there are, bound the field "value"."""

    axes: dict[str, tuple[Any, ...]]
    fields: dict[str, np.ndarray]

    @classmethod
    def over(
        cls, function: Callable[..., Mapping[str, float] | None], **axes: Sequence[Any]
    ) -> "Grid":
        """`function(name=value, …)` of every case; it gives numbers by name, None where there is
        nothing to give. Raises ValueError where all give nothing."""
        shape = tuple(len(values) for values in axes.values())
        fields: dict[str, np.ndarray] = {}
        for at in np.ndindex(shape):
            case = {name: axes[name][i] for name, i in zip(axes, at, strict=True)}
            for name, number in (function(**case) or {}).items():
                fields.setdefault(name, np.full(shape, np.nan))[at] = number
        if not fields:
            raise ValueError(f"none of the {math.prod(shape)} cases over {', '.join(axes)} fits")
        return cls({name: tuple(values) for name, values in axes.items()}, fields)

    def index(self, **at: Any) -> tuple[Any, ...]:
        """Index of the cases with these values. Raises KeyError for an axis and ValueError for a
        value that is not there."""
        if unknown := at.keys() - self.axes.keys():
            raise KeyError(f"axis {unknown.pop()!r} is none of {', '.join(self.axes)}")
        whole = slice(None)
        return tuple(vs.index(at[n]) if n in at else whole for n, vs in self.axes.items())

    def at(self, **at: Any) -> dict[str, Any]:
        """All fields of these cases: numbers where every axis has a value."""
        return {name: field[self.index(**at)] for name, field in self.fields.items()}

    def share(self, threshold: str, sure: bool = False, **at: Any) -> float:
        """Share of the cases with a value that meet "<= x" or ">= x"; `sure`: with the end of the
        interval that is worse for it."""
        value, tested = (
            self.at(**at)[name] for name in ("value", _worse(threshold)[0] if sure else "value")
        )
        there = np.isfinite(value)
        held = [judge(float(x), threshold) == "holds" for x in tested[there]]
        return float(np.mean(held))

    def best(self, largest: bool = True) -> dict[str, Any]:
        """The case with the largest, or smallest, value."""
        pick = np.nanargmax if largest else np.nanargmin
        at = np.unravel_index(int(pick(self.fields["value"])), self.fields["value"].shape)
        return {name: values[i] for (name, values), i in zip(self.axes.items(), at, strict=True)}


def _worse(threshold: str) -> tuple[str, str]:
    """The field that bounds a value on the side that the threshold fears, and its sign."""
    return ("low", "≥") if threshold_of(threshold)[1] == ">=" else ("high", "≤")


def heat_map(
    grid: Grid,
    title: str,
    label: str,
    threshold: str,
    texts: Mapping[str, Callable[[Any], str]] | None = None,
) -> Any:
    """The figure of a grid of three axes: a panel for each value of the first, rows of the second,
    columns of the third. A box marks cases that meet `threshold`; the second line of a cell is the
    end of its interval that is worse for it. `texts` {axis: how its values are written}."""
    (panel_name, panels), (row_name, rows), (column_name, columns) = grid.axes.items()
    write = dict.fromkeys(grid.axes, str) | dict(texts or {})
    beside = min(len(panels), max(1, 11 // len(columns)))  # so many numbers can be read in a row
    below = -(-len(panels) // beside)
    size = max(3.0, 0.66 * len(columns) + 0.9), 1.0 + 0.45 * len(rows)
    fig, many = figures.figure(beside, *size, rows=below)
    many = np.atleast_1d(many).reshape(below, beside)
    value = grid.fields["value"]
    limits = {"vmin": float(np.nanmin(value)), "vmax": float(np.nanmax(value))}
    image: Any = None
    for axes in many.flat[len(panels) :]:
        axes.set_axis_off()
    for at, (axes, name) in enumerate(zip(many.flat, panels, strict=False)):
        image = axes.imshow(value[at], cmap="cividis", origin="lower", aspect="auto", **limits)
        for i, j in np.ndindex(value[at].shape):
            shade = image.norm(value[at, i, j])
            _cell(axes, (j, i), {n: f[at, i, j] for n, f in grid.fields.items()}, threshold, shade)
        axes.set(xlabel=column_name, title=f"{panel_name} {write[panel_name](name)}")
        axes.set_xticks(range(len(columns)), [write[column_name](v) for v in columns])
        axes.set_yticks(range(len(rows)), [write[row_name](v) for v in rows])
        axes.grid(False)
    for axes in many[:, 0]:
        axes.set_ylabel(row_name)
    fig.colorbar(image, ax=many, label=label)
    worse, _ = _worse(threshold)
    second = f"; second line: {worse} end of the 95 % interval" if worse in grid.fields else ""
    fig.suptitle(f"{title}\nboxed: {threshold}{second}")
    return fig


def _cell(
    axes: Any, place: tuple[int, int], fields: dict[str, float], threshold: str, shade: float
) -> None:
    value = fields["value"]
    if not math.isfinite(value):
        axes.text(*place, "none fits", ha="center", va="center")
        return
    worse, sign = _worse(threshold)
    text = f"{value:#.3g}" + (f"\n{sign}{fields[worse]:#.3g}" if worse in fields else "")
    colour = "black" if shade > 0.5 else "white"
    held = judge(value, threshold) == "holds"
    box = {"boxstyle": "square,pad=0.2", "fill": False, "edgecolor": colour} if held else None
    axes.text(*place, text, ha="center", va="center", color=colour, bbox=box)
