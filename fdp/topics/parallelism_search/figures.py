"""The pictures of topic 15."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdp.price import hybrid
from fdp.study.figures import figure, save
from fdp.topics.parallelism_search.fit import Data
from fdp.topics.parallelism_search.landscapes import Comparison
from fdp.topics.parallelism_search.plan import Ranking, price, space
from fdp.topics.parallelism_search.validate import Outcome

GIB = 2**30
COLOURS = 7  # of the house style


def _save(fig: Any, workdir: Path, name: str) -> str:
    """The picture's path in the workdir."""
    return str(save(fig, workdir / "plots" / f"{name}.png").relative_to(workdir))


def predicted(workdir: Path, outcomes: Sequence[Outcome]) -> str:
    """Predicted against measured step time of every hold-out."""
    fig, axes = figure()
    for i, outcome in enumerate(outcomes):
        marker = "o^sx"[i // COLOURS % 4]  # the house colours repeat
        axes.plot(
            outcome.measured,
            outcome.predicted,
            marker,
            markersize=2,
            linestyle="",
            label=outcome.case.name,
        )
    low, high = (f(np.concatenate([o.measured for o in outcomes])) for f in (np.min, np.max))
    axes.plot([low, high], [low, high], color="#444444", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="measured, s a step",
        ylabel="predicted without having seen it, s",
        title="Hold-outs: predicted and measured",
    )
    axes.legend(fontsize=6, markerscale=3)
    return _save(fig, workdir, "predicted")


def memory(workdir: Path, data: Data, outcomes: Sequence[Outcome]) -> str:
    """Predicted against measured memory of the hold-outs that measured it; failed runs on the right
    edge.
    """
    fig, axes = figure()
    for outcome in outcomes:
        rows = outcome.at[np.isfinite(data.log_memory[outcome.at])]
        if not rows.size:
            continue
        axes.plot(
            np.exp(data.log_memory[rows]) / 1e9,
            outcome.hybrid.memory[rows] / 1e9,
            ".",
            markersize=3,
            label=outcome.case.name,
        )
        failed = outcome.at[outcome.failed[outcome.at]]
        axes.plot(
            np.full(len(failed), 95.0),
            outcome.hybrid.memory[failed] / 1e9,
            "x",
            markersize=3,
            color="#bb3333",
        )
    axes.plot([1, 90], [1, 90], color="#444444", linewidth=1)
    axes.axhline(80, linestyle="--", linewidth=1, color="#999999")
    axes.set(
        xlabel="measured GB (crosses at 95: the run failed)",
        ylabel="predicted GB",
        ylim=(0, 200),
        title="Memory of unseen models",
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, markerscale=3)
    return _save(fig, workdir, "memory")


def regret(workdir: Path, comparison: Comparison) -> str:
    """Mean over landscapes of the regret after each real run, per algorithm."""
    fig, axes = figure()
    names = list(comparison.regret)
    for algorithm in comparison.regret[names[0]]:
        curves = [comparison.regret[name][algorithm] for name in names]
        length = min(len(c) for c in curves)
        mean = 100 * np.median([c[:length] for c in curves], 0)
        axes.plot(np.arange(1, length + 1), np.maximum(mean, 0.1), label=algorithm)
    axes.axhline(5, linestyle="--", linewidth=1, color="#999999")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="real runs, failed ones included",
        ylabel="regret to the best, %",
        title=f"Median of {len(names)} measured landscapes",
    )
    axes.legend(fontsize=8)
    return _save(fig, workdir, "regret")


def landscape(workdir: Path, ranking: Ranking) -> str:
    """The predicted landscape: time against memory of every plan, the best ten marked."""
    job = ranking.job
    points = space(job.shape, ranking.cluster.size, job.batch, job.seq)
    priced = price(hybrid.shipped(), job, points)
    runs = priced.feasible >= 0.5
    fig, axes = figure()
    for kind, mask, colour in (
        ("probably fails", ~runs, "#cccccc"),
        ("probably runs", runs, "#4477aa"),
    ):
        axes.plot(
            priced.memory[mask] / GIB,
            priced.time[mask],
            ".",
            markersize=2,
            color=colour,
            label=kind,
        )
    axes.plot(
        [p.memory / GIB for p in ranking.plans],
        [p.time for p in ranking.plans],
        "*",
        color="#bb3333",
        label="best ten",
    )
    axes.axvline(
        job.chip.hbm_bytes / GIB, linestyle="--", linewidth=1, color="#444444", label="HBM"
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="predicted GiB a chip",
        ylabel="predicted s a step",
        title=f"{job.shape.name} on {ranking.cluster.name}",
    )
    axes.legend(fontsize=8)
    return _save(fig, workdir, "landscape")
