"""The pictures of topic 8."""

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
    longest: dict[str, float] = {}
    bars: list[tuple[int, float, float, str]] = []
    for i, ops in enumerate(result.order.ops):
        for op, begun, timed in zip(ops, result.start[i], result.program.ops[i], strict=True):
            longest[op.kind] = max(longest.get(op.kind, 0.0), timed[0])
            bars.append((i, begun, timed[0], op.kind))
    for kind, most in longest.items():
        mine = [(i, begun, seconds) for i, begun, seconds, other in bars if other == kind]
        shades = [0.35 + 0.65 * seconds / most if most else 1.0 for _, _, seconds in mine]
        axes.barh(
            [i for i, _, _ in mine],
            [seconds for _, _, seconds in mine],
            left=[begun for _, begun, _ in mine],
            height=0.9,
            color=[(*_rgb(KIND_COLOURS[kind]), shade) for shade in shades],
            edgecolor="white",
            linewidth=0.2,
            label=kind,
        )
    axes.set(xlabel="s", ylabel="stage", title=title, yticks=np.arange(p))
    axes.invert_yaxis()
    axes.grid(False)
    fig.legend(loc="outside right upper", handlelength=1)
    return fig


def _rgb(colour: str) -> tuple[float, float, float]:
    r, g, b = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
    return r, g, b
