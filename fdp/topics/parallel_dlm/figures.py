"""The pictures of topic 1: training curves and wire bytes by mesh."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from fdp.metrics import read_metrics
from fdp.report import figure, plot_curves, save_plot
from fdp.topics.parallel_dlm.checks import Comparison

ARMS = {"mdlm": "MDLM (NELBO)", "ar": "AR (NLL)"}


def curves(workdir: Path) -> str:
    """Loss against steps, mean over seeds; training smoothed over ten rows. Returns the path inside the workdir."""
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_metrics(workdir):
        for key in ("loss", "val_loss"):
            if key in row and math.isfinite(float(row[key])):
                found[row["arm"], key][row["step"]].append(float(row[key]))
    series = {}
    for (arm, key), by_step in found.items():
        steps = sorted(by_step)
        means = np.array([np.mean(by_step[step]) for step in steps])
        if key == "loss" and len(steps) >= 20:
            means = np.convolve(means, np.ones(10) / 10, "valid")
            steps = steps[9:]
        series[f"{ARMS.get(arm, arm)}, {'training' if key == 'loss' else 'validation'}"] = (steps, means.tolist())
    title = "Masked diffusion and autoregressive LM, equal budget"
    return str(
        plot_curves(workdir / "plots" / "loss.png", series, "step", "nats per token", title).relative_to(workdir)
    )


def traffic(workdir: Path, comparisons: list[Comparison]) -> str:
    """Stacked wire bytes per device and step of every mesh, by collective and axes. Returns the path in the workdir."""
    fig, axes = figure(width=8.0, height=4.0)
    names = [c.mesh.replace(", ", "\n") for c in comparisons]
    base = np.zeros(len(names))
    kinds = sorted({key for c in comparisons for key in c.counted}, key=str)
    for i, (op, mesh_axes) in enumerate(kinds):
        height = np.array([c.counted.get((op, mesh_axes), 0.0) for c in comparisons]) / 1024
        hatch = ("", "//", "..")[i // 7 % 3]  # the house style has seven colours
        axes.bar(names, height, bottom=base, label=f"{op} over {'·'.join(mesh_axes)}", hatch=hatch, width=0.6)
        base += height
    axes.set_ylim(0, 1.05 * base.max())
    axes.set(ylabel="KiB sent per device and step", title="Wire bytes of loss and gradients, counted in the HLO")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return str(save_plot(fig, workdir / "plots" / "bytes.png").relative_to(workdir))
