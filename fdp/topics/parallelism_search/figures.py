"""The pictures of topic 15."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdp.price import hybrid
from fdp.price.fit import FitData
from fdp.price.hardware import GIB
from fdp.price.ranking import LIKELY, Ranking, price
from fdp.price.space import space
from fdp.study.figures import figure, save
from fdp.topics.parallelism_search.landscapes import Searches
from fdp.topics.parallelism_search.validate import HoldOut

COLOURS = 7  # of the house style
LINE, RED = "#444444", "#bb3333"


def _save(fig: Any, workdir: Path, name: str) -> str:
    """The picture's path in the workdir."""
    return str(save(fig, workdir / "plots" / f"{name}.png").relative_to(workdir))


def _log_log(axes: Any, x: str, y: str, title: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)


def predicted(workdir: Path, outcomes: Sequence[HoldOut]) -> str:
    """Predicted against measured step time of every hold-out."""
    fig, axes = figure()
    for i, o in enumerate(outcomes):
        marker = "o^sx"[i // COLOURS % 4]  # the house colours repeat
        style = {"markersize": 2, "linestyle": "", "label": o.case.name}
        axes.plot(o.measured, o.predicted, marker, **style)
    measured = np.concatenate([o.measured for o in outcomes])
    ends = [measured.min(), measured.max()]
    axes.plot(ends, ends, color=LINE, linewidth=1)
    title = "Hold-outs: predicted and measured"
    _log_log(axes, "measured, s a step", "predicted without having seen it, s", title)
    axes.legend(fontsize=6, markerscale=3)
    return _save(fig, workdir, "predicted")


def memory(workdir: Path, data: FitData, outcomes: Sequence[HoldOut]) -> str:
    """Predicted against measured memory of the hold-outs that measured it; failed runs on the right
    edge.
    """
    fig, axes = figure()
    for o in outcomes:
        rows, gb = o.at[np.isfinite(data.log_memory[o.at])], o.hybrid.memory / 1e9
        if not rows.size:
            continue
        used = np.exp(data.log_memory[rows]) / 1e9
        axes.plot(used, gb[rows], ".", markersize=3, label=o.case.name)
        failed = o.at[o.failed[o.at]]
        axes.plot(np.full(len(failed), 95.0), gb[failed], "x", markersize=3, color=RED)
    axes.plot([1, 90], [1, 90], color=LINE, linewidth=1)
    axes.axhline(80, linestyle="--", linewidth=1, color="#999999")
    axes.set(xlabel="measured GB (crosses at 95: the run failed)", ylabel="predicted GB")
    axes.set(ylim=(0, 200), title="Memory of unseen models")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, markerscale=3)
    return _save(fig, workdir, "memory")


def regret(workdir: Path, found: Searches) -> str:
    """Median over landscapes of the regret after each real run, per algorithm."""
    fig, axes = figure()
    landscapes = list(found.regret.values())
    for algorithm in landscapes[0]:
        curves = [per[algorithm] for per in landscapes]
        length = min(len(c) for c in curves)
        middle = 100 * np.median([c[:length] for c in curves], 0)
        axes.plot(np.arange(1, length + 1), np.maximum(middle, 0.1), label=algorithm)
    axes.axhline(5, linestyle="--", linewidth=1, color="#999999")
    title = f"Median of {len(landscapes)} measured landscapes"
    _log_log(axes, "real runs, failed ones included", "regret to the best, %", title)
    axes.legend(fontsize=8)
    return _save(fig, workdir, "regret")


def landscape(workdir: Path, best: Ranking) -> str:
    """The predicted landscape: time against memory of every plan, the best ten marked."""
    job = best.job
    points = space(job.shape, best.cluster.size, job.batch, job.seq)
    priced = price(hybrid.shipped(), job, points)
    runs = priced.feasible >= LIKELY
    fig, axes = figure()
    for kind, mask, colour in (
        ("probably fails", ~runs, "#cccccc"),
        ("probably runs", runs, "#4477aa"),
    ):
        style = {"markersize": 2, "color": colour, "label": kind}
        axes.plot(priced.memory[mask] / GIB, priced.time[mask], ".", **style)
    at = [p.memory / GIB for p in best.plans], [p.time for p in best.plans]
    axes.plot(*at, "*", color=RED, label="best ten")
    limit = {"linestyle": "--", "linewidth": 1, "color": LINE, "label": "HBM"}
    axes.axvline(job.chip.hbm_bytes / GIB, **limit)
    title = f"{job.shape.name} on {best.cluster.name}"
    _log_log(axes, "predicted GiB a chip", "predicted s a step", title)
    axes.legend(fontsize=8)
    return _save(fig, workdir, "landscape")
