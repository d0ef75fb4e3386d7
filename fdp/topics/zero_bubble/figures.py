"""The pictures of topic 8."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fdp.parallel.pipeline.evaluate import Evaluation
from fdp.study.figures import COLOURS, GREY, figure

KIND_COLOURS = {
    "F": COLOURS[0],
    "R": COLOURS[5],
    "B": COLOURS[2],
    "BW": COLOURS[3],
    "W": COLOURS[4],
    "U": COLOURS[1],
    "S": COLOURS[6],
    "AUX": GREY,
}


def gantt(result: Evaluation, title: str) -> Any:
    """One row a device, one bar an operation, coloured by kind. The longer an operation among those
    of its kind, the darker it is."""
    p = result.order.placement.p
    fig, axes = figure(width=10.0, height=0.8 + 0.35 * p)
    bars = [
        (i, begun, timed[0], op.kind)
        for i, ops in enumerate(result.order.ops)
        for op, begun, timed in zip(ops, result.start[i], result.program.ops[i], strict=True)
    ]
    draw(axes, *zip(*bars, strict=True))
    axes.set(xlabel="s", ylabel="stage", title=title)
    fig.legend(loc="outside right upper", handlelength=1)
    return fig


def draw(
    axes: Any,
    device_N: Sequence[int],
    start_N: Sequence[float],
    seconds_N: Sequence[float],
    kind_N: Sequence[str],
) -> None:
    """The bars of N operations."""
    device, start, seconds = (np.asarray(x) for x in (device_N, start_N, seconds_N))
    kinds = np.array(kind_N)
    for kind in dict.fromkeys(kind_N):
        mine = kinds == kind
        most = seconds[mine].max()
        shades = 0.35 + 0.65 * seconds[mine] / most if most else np.ones(mine.sum())
        axes.barh([0], [0], color=KIND_COLOURS[kind], label=kind)  # the legend's full shade
        colours = np.array([(*_rgb(KIND_COLOURS[kind]), shade) for shade in shades])
        spans = np.stack([start[mine], seconds[mine]], 1)
        for i in np.unique(device[mine]):
            at = device[mine] == i
            style: dict[str, Any] = {"facecolors": colours[at], "edgecolor": "white"}
            axes.broken_barh(spans[at], (i - 0.45, 0.9), linewidth=0.2, **style)
    axes.set_yticks(np.arange(device.max() + 1))
    axes.set_ylim(device.max() + 0.6, -0.6)
    axes.grid(False)


def _rgb(colour: str) -> tuple[float, float, float]:
    r, g, b = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
    return r, g, b
