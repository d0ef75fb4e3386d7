"""The pictures of topic 3: densities while a model trains, what devices need of one another, the
plan of every layer, bytes of all methods, region map.

Legend: L layers, T training steps at which masks were measured.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdp.study.figures import figure, save
from fdp.topics.adaptive_cp.baselines import Baseline, describe
from fdp.topics.adaptive_cp.planner import ModelPlan
from fdp.topics.adaptive_cp.predict import Region

KINDS = {
    "ring": "#0072B2",
    "usp": "#56B4E9",
    "ulysses": "#009E73",
    "all_gather": "#E69F00",
    "batch": "#CC79A7",
    "gather": "#D55E00",
}
DENSE, SPARSE, BOUND = "#999999", "#D55E00", "white"


def density_map(path: Path, density_LxT: np.ndarray, steps: Sequence[int], title: str) -> Path:
    """Density of every layer at every measured step, on a logarithmic scale. Returns the path."""
    from matplotlib.colors import LogNorm  # on use, as fdp.study.figures does

    density_LxT = np.asarray(density_LxT, float)
    L, T = density_LxT.shape
    fig, axes = figure(width=max(5.4, 1.2 + 0.45 * T), height=max(3.0, 1.0 + 0.3 * L))
    norm = LogNorm(density_LxT.min(), max(density_LxT.max(), 1.001 * density_LxT.min()))
    image = axes.imshow(density_LxT, cmap="viridis", norm=norm, aspect="auto")
    if L * T <= 200:
        for (layer, t), value in np.ndenumerate(density_LxT):
            colour = "black" if norm(value) > 0.6 else "white"
            axes.text(t, layer, f"{value:.2g}", ha="center", va="center", fontsize=6, color=colour)
    shown = range(0, T, max(1, -(-T // 12)))
    axes.set_xticks(shown, [f"{steps[t]:,}" for t in shown])
    axes.set_yticks(range(L))
    axes.grid(False)
    axes.set(xlabel="training step", ylabel="layer", title=title)
    fig.colorbar(image, ax=axes, label="share of visible key blocks kept")
    return save(fig, path)


def need_map(path: Path, units_LxDxD: np.ndarray, title: str) -> Path:
    """Share of each device's keys that each other one needs, one panel a layer. Returns the
    path.
    """
    units_LxDxD = np.asarray(units_LxDxD)
    fig, panels = figure(columns=len(units_LxDxD), width=2.0, height=2.6)
    image: Any = None
    for layer, (axes, units_DxD) in enumerate(zip(np.atleast_1d(panels), units_LxDxD, strict=True)):
        image = axes.imshow(units_DxD, cmap="viridis", vmin=0, vmax=1)
        remote = (units_DxD.sum() - np.trace(units_DxD)) / len(units_DxD)
        axes.set(xlabel="keys of device")
        axes.set_title(f"layer {layer}: {remote:.1f} units in", fontsize=8)
        axes.grid(False)
    np.atleast_1d(panels)[0].set_ylabel("queries of device")
    fig.colorbar(image, ax=panels, label="share needed")
    fig.suptitle(title, fontsize=10)
    return save(fig, path)


def plan_picture(path: Path, found: ModelPlan, title: str) -> Path:
    """Wire bytes of every layer in the colour of its kind, and its compute and exposed time.
    Returns the path.
    """
    L = len(found.choices)
    fig, (left, right) = figure(columns=2, width=4.4, height=max(2.2, 1.0 + 0.3 * L))
    wire = np.array([choice.price.wire for choice in found.choices]) / 1e6
    for layer, choice in enumerate(found.choices):
        left.barh(layer, wire[layer], color=KINDS[choice.plan.kind], height=0.7)
        left.text(wire[layer], layer, f" {describe(choice.plan)}", va="center", fontsize=6.5)
    compute = 1e3 * np.array([choice.price.compute_N[0] for choice in found.choices])
    exposed = 1e3 * np.array([choice.price.exposed for choice in found.choices])
    right.barh(range(L), compute, color=DENSE, height=0.7, label="attention of the busiest device")
    right.barh(
        range(L),
        exposed,
        left=compute,
        color=SPARSE,
        height=0.7,
        label="exposed communication, waits",
    )
    for axes in (left, right):
        axes.set_yticks(range(L))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    left.set(
        xlabel="MB sent per device, forward and backward",
        ylabel="layer",
        xlim=(0, 1.7 * max(wire.max(), 1e-9)),
    )
    right.set(
        xlabel="predicted ms, forward and backward", xlim=(0, 1.05 * (compute + exposed).max())
    )
    fig.legend(*right.get_legend_handles_labels(), fontsize=7, loc="outside lower right", ncols=2)
    fig.suptitle(title, fontsize=10)
    return save(fig, path)


def bytes_chart(path: Path, rows: Sequence[Baseline], title: str, threshold: float = 0.7) -> Path:
    """Bytes of every method; dashed: `threshold` of the best uniform plan of any kind. Returns the
    path.

    Raises ValueError without a "best uniform" row that runs.
    """
    uniform = [
        row.bytes for row in rows if row.name.startswith("best uniform") and np.isfinite(row.bytes)
    ]
    if not uniform:
        raise ValueError("no best uniform plan among the rows: there is nothing to compare with")
    fig, axes = figure(width=7.4, height=0.8 + 0.32 * len(rows))
    most = max(row.bytes for row in rows if np.isfinite(row.bytes))
    for i, row in enumerate(rows):
        bound = row.seconds is None and np.isfinite(row.bytes)
        adaptive = row.name.startswith("adaptive")
        colour = (
            BOUND
            if bound
            else SPARSE
            if adaptive
            else "#0072B2"
            if "uniform" in row.name
            else DENSE
        )
        value = row.bytes if np.isfinite(row.bytes) else 0.0
        axes.barh(i, value / 1e6, color=colour, height=0.7, edgecolor="#444444", linewidth=0.6)
        text = "cannot run" if not np.isfinite(row.bytes) else f"{row.bytes / min(uniform):.2f}×"
        axes.text(
            value / 1e6 + 0.01 * most / 1e6,
            i,
            text,
            va="center",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    line = threshold * min(uniform) / 1e6
    axes.axvline(
        line,
        color="#444444",
        linestyle="--",
        linewidth=1,
        label=f"{threshold:g}× the best uniform plan",
    )
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(
        xlabel="MB sent per device, forward and backward, all layers",
        xlim=(0, 1.12 * most / 1e6),
        title=title,
    )
    axes.legend(fontsize=7, loc="lower right")
    return save(fig, path)


def region_map(path: Path, found: Region, title: str, threshold: float = 0.9) -> Path:
    """Adaptive over best uniform step time by density and length, one panel a fabric; a box marks
    `threshold` and less.

    Second line of a cell: the 95 % interval. Returns the path.
    """
    ratio, low, high = (found.field(name) for name in ("ratio", "low", "high"))
    fig, panels = figure(
        columns=len(found.fabrics), width=3.4, height=1.2 + 0.55 * len(found.densities)
    )
    image: Any = None
    for i, (panel, fabric) in enumerate(zip(np.atleast_1d(panels), found.fabrics, strict=True)):
        image = panel.imshow(
            ratio[i], cmap="viridis_r", vmin=0.7, vmax=1.0, origin="lower", aspect="auto"
        )
        for (j, k), value in np.ndenumerate(ratio[i]):
            colour = "black" if value < 0.82 else "white"
            box = (
                {"boxstyle": "square,pad=0.2", "fill": False, "edgecolor": colour}
                if value <= threshold
                else None
            )
            text = f"{value:.3f}\n{low[i, j, k]:.2f}…{high[i, j, k]:.2f}"
            panel.text(k, j, text, ha="center", va="center", fontsize=6, color=colour, bbox=box)
        panel.set_xticks(range(len(found.lengths)), [f"{n // 1024}K" for n in found.lengths])
        panel.set_yticks(range(len(found.densities)), [f"{d:g}" for d in found.densities])
        panel.set(xlabel="positions")
        panel.set_title(fabric.name, fontsize=9)
        panel.grid(False)
    np.atleast_1d(panels)[0].set_ylabel("mean density of the layers")
    fig.colorbar(image, ax=panels, label="adaptive / best uniform step time")
    fig.suptitle(f"{title} (second line: 95 % interval)", fontsize=10)
    return save(fig, path)
