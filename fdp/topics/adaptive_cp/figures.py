"""The pictures of topic 3: densities while a model trains, what devices need of one another, the
plan of every layer, bytes of all methods, region map.

Legend: N layers, D devices.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fdp.parallel.context.planner_methods import Method
from fdp.parallel.context.profile import TAU
from fdp.study.figures import COLOURS, GREY, curves, figure, legend, reference
from fdp.study.grid import Grid, heat_map
from fdp.topics.adaptive_cp.densities import History
from fdp.topics.adaptive_cp.planned import PlannedLayer
from fdp.topics.adaptive_cp.rows import FASTER

WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # behind text over bars and lines
KINDS = {
    "fixed": ("one plan for all, fixed", "#BBBBBB"),
    "uniform": ("one plan for all, the best", COLOURS[0]),
    "adaptive": ("a plan for every layer", COLOURS[1]),
    "bound": ("bound, no program", "white"),
}


def density(name: str, seeds: Sequence[History]) -> Any:
    """Density of every layer over training, first seed."""
    found = seeds[0]
    series = {f"layer {i}": (found.steps, d.tolist()) for i, d in enumerate(found.density_NxT)}
    title = f"{name}: key blocks that hold {TAU:.0%} of the attention mass"
    fig = curves(series, "training step", "share of the visible key blocks", title)
    fig.axes[0].set_ylim(0, 1)
    fig.axes[0].xaxis.get_major_locator().set_params(integer=True)
    return fig


def needs(name: str, units_NxDxD: np.ndarray) -> Any:
    """Share of each device's keys that each other one needs, one panel a layer."""
    N, D, _ = units_NxDxD.shape
    beside = min(N, 4)
    fig, panels = figure(beside, 2.3, 2.6, rows=-(-N // beside))
    every, image = list(np.atleast_1d(panels).flat), None
    for axes in every[N:]:
        axes.set_axis_off()
    for layer, (axes, units_DxD) in enumerate(zip(every, units_NxDxD, strict=False)):
        image = axes.imshow(units_DxD, cmap="cividis", vmin=0, vmax=1)
        remote = (units_DxD.sum() - np.trace(units_DxD)) / D
        axes.set(xlabel="keys of device", title=f"layer {layer}\n{remote:.1f} units in")
        axes.grid(False)
    every[0].set_ylabel("queries of device")
    fig.colorbar(image, ax=panels, label="share needed")
    fig.suptitle(f"{name}: what devices need, zig-zag over {D}")
    return fig


def plan(name: str, layers: Sequence[PlannedLayer]) -> Any:
    """Wire bytes of every layer, its compute and exposed time."""
    N = len(layers)
    fig, (left, right) = figure(2, 5.0, 1.9 + 0.35 * N)
    sent = [layer.bytes / 1e6 for layer in layers]
    compute, exposed = (
        [1e3 * getattr(layer, field) for layer in layers] for field in ("compute", "exposed")
    )
    left.barh(range(N), sent, color=COLOURS[0], height=0.6)
    for i, layer in enumerate(layers):
        left.text(0.02 * max(sent), i, layer.plan, va="center", bbox=WHITE)
    right.barh(range(N), compute, color="#BBBBBB", height=0.6, label="busiest device's attention")
    last = {"left": compute, "color": COLOURS[1], "height": 0.6}
    right.barh(range(N), exposed, label="exposed communication", **last)
    for axes in (left, right):
        axes.set_yticks(range(N))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    left.set(xlabel="MB sent per device", ylabel="layer")
    right.set(xlabel="predicted ms", xlim=(0, 1.05 * max(np.add(compute, exposed))))
    legend(fig)
    fig.suptitle(f"{name}: plan of every layer, forward and backward")
    return fig


def methods(name: str, found: Sequence[Method], threshold: float = 0.7) -> Any:
    """Bytes of every method; dashed: `threshold` of the best uniform plan of any kind.

    Raises ValueError without a uniform plan that runs."""
    uniform = [m.bytes for m in found if m.kind == "uniform" and np.isfinite(m.bytes)]
    if not uniform:
        raise ValueError("no best uniform plan among the methods: there is nothing to compare with")
    fig, axes = figure(width=8.0, height=1.7 + 0.34 * len(found))
    most = max(m.bytes for m in found if np.isfinite(m.bytes)) / 1e6
    for i, method in enumerate(found):
        label, colour = KINDS[method.kind]
        value = method.bytes / 1e6 if np.isfinite(method.bytes) else 0.0
        axes.barh(i, value, label=label, color=colour, height=0.7, edgecolor=GREY, linewidth=0.6)
        text = f"{method.bytes / min(uniform):.2f}×" if value else "cannot run"
        axes.text(value + 0.01 * most, i, text, va="center", bbox=WHITE)
    reference(axes, threshold * min(uniform) / 1e6, f"{threshold:g}× the best uniform", axis="x")
    axes.set_yticks(range(len(found)), [method.name for method in found])
    axes.set_ylim(len(found) - 0.5, -1.5)  # room for the text of the line
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="MB sent per device, forward and backward, all layers", xlim=(0, 1.12 * most))
    axes.set_title(f"{name}: bytes of every method")
    legend(fig)
    return fig


def region(found: Grid) -> Any:
    """Adaptive over best uniform step time by density and length, one panel a fabric."""
    title = "Step time of the adaptive plan over that of the best uniform one"
    texts = {"fabric": lambda fabric: fabric.name, "length": lambda n: f"{n // 1024}K"}
    return heat_map(found, title, "adaptive / best uniform", FASTER, texts)
