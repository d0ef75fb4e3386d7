"""The pictures of topic 15."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fdp.price.hardware import GIB
from fdp.price.ranking import LIKELY, Ranking
from fdp.study.figures import COLOURS, GREY, curves, figure, legend, reference
from fdp.topics.parallelism_search.landscapes import Searched
from fdp.topics.parallelism_search.validate import HoldOut

RED = "#bb3333"
LOG: dict[str, Any] = {"xscale": "log", "yscale": "log"}


def predicted(found: Sequence[HoldOut]) -> Any:
    """Predicted against measured step time of every hold-out."""
    fig, axes = figure(height=5.0)
    outcomes = [o.timed for o in found]
    for i, o in enumerate(outcomes):
        marker = "o^sx"[i // len(COLOURS) % 4]  # the colours repeat
        style = {"markersize": 2, "linestyle": "", "label": o.name}
        axes.plot(o.measured, o.hybrid.time, marker, **style)
    measured = np.concatenate([o.measured for o in outcomes])
    ends = [measured.min(), measured.max()]
    axes.plot(ends, ends, color=GREY, linewidth=1)
    axes.set(xlabel="measured, s a step", ylabel="predicted, s a step", **LOG)
    axes.set(title="Predicted without having seen it, and measured")
    legend(fig)
    return fig


def memory(found: Sequence[HoldOut]) -> Any:
    """Predicted against measured memory of the hold-outs that measured it; failed runs on the right
    edge."""
    outcomes = [o for o in found if np.isfinite(o.memory).any()]
    if not outcomes:
        return None
    fig, axes = figure()
    for o in outcomes:
        known, gb = np.isfinite(o.memory), o.hybrid.memory / 1e9
        axes.plot(o.memory[known] / 1e9, gb[known], ".", markersize=3, label=o.name)
        axes.plot(np.full(o.failed.sum(), 95.0), gb[o.failed], "x", markersize=3, color=RED)
    axes.plot([1, 90], [1, 90], color=GREY, linewidth=1)
    axes.axhline(80, color=GREY, linestyle="--", linewidth=1, label="80 GB")
    axes.set(xlabel="measured GB (crosses at 95: the run failed)", ylabel="predicted GB")
    axes.set(ylim=(0, 200), title="Memory of unseen models")
    legend(fig)
    return fig


def regret(found: Sequence[Sequence[Searched]]) -> Any:
    """Median over landscapes of the regret after each real run, per algorithm."""
    every = [s.regret for many in found for s in many]
    if not every:
        return None
    series: dict[str, Any] = {}
    for algorithm in every[0]:
        length = min(len(regrets[algorithm]) for regrets in every)
        middle = 100 * np.median([regrets[algorithm][:length] for regrets in every], 0)
        series[algorithm] = np.arange(1, length + 1), np.maximum(middle, 0.1)
    title, x = f"Median of {len(every)} measured landscapes", "real runs, failed ones included"
    fig = curves(series, x, "regret to the best, %", title, levels={"5 %": 5})
    fig.axes[0].set(**LOG)
    return {"regret": fig}


def landscape(best: Ranking, priced: dict[str, np.ndarray]) -> Any:
    """The predicted landscape: time against memory of every plan, the best ten marked."""
    runs = priced["feasible"] >= LIKELY
    fig, axes = figure()
    kinds = ("probably fails", ~runs, "#cccccc"), ("probably runs", runs, COLOURS[0])
    for kind, mask, colour in kinds:
        style = {"markersize": 2, "color": colour, "label": kind}
        axes.plot(priced["memory"][mask] / GIB, priced["time"][mask], ".", **style)
    at = [p.memory / GIB for p in best.plans], [p.time for p in best.plans]
    axes.plot(*at, "*", color=RED, label="best ten")
    reference(axes, best.job.chip.hbm_bytes / GIB, "HBM", "x")
    axes.set(xlabel="predicted GiB a chip", ylabel="predicted s a step", **LOG)
    axes.set(title=f"{best.job.shape.name} on {best.cluster.name}")
    legend(fig)
    return fig
