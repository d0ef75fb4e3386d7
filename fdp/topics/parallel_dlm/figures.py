"""The pictures of topic 1: training curves, wire bytes by mesh, bytes against KL, step times, a
sample while it is denoised.

Legend: L positions, T states.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fdp.arm import Arm
from fdp.count.compare import Comparison
from fdp.price.inference import BOUND
from fdp.study.figures import COLOURS, MARKERS, figure, legend, reference, training_curves
from fdp.study.grid import Grid, heat_map
from fdp.topics.parallel_dlm.policies import PolicyResult
from fdp.topics.parallel_dlm.switching import KINDS, best_job

ARMS = {"mdlm": "MDLM (NELBO)", "ar": "AR (NLL)", "markov": "MDLM on the Markov chain (NELBO)"}
EXACT = 1e-6  # nats: below, KL is the rounding of float32
GROUPS = (
    "drift, int8",
    "exact",
    "stale",
    "int8",
    "drift",
    "channels",
    "skip",
    "window",
    "attention",
)


def losses(workdir: Path) -> Any:
    """Loss against steps, mean over seeds."""
    title = "Masked diffusion and autoregressive LM at equal budget"
    return training_curves(workdir, ARMS, title)


def traffic(comparisons: list[Comparison]) -> Any:
    """Stacked wire bytes per device and step of every mesh, by collective and axes."""
    fig, axes = figure(width=8.0, height=5.5)
    names = [c.name.replace(", ", "\n") for c in comparisons]
    base = np.zeros(len(names))
    kinds = sorted({key for c in comparisons for key in c.counted}, key=str)
    for i, (op, mesh_axes) in enumerate(kinds):
        height = np.array([c.counted.get((op, mesh_axes), 0.0) for c in comparisons]) / 1024
        hatch = ("", "//", "..")[i // len(COLOURS) % 3]
        label = f"{op} over {'·'.join(mesh_axes)}"
        axes.bar(names, height, bottom=base, label=label, hatch=hatch, width=0.6)
        base += height
    title = "Wire bytes of loss and gradients, counted in the compiled program"
    axes.set(ylabel="KiB sent per device and step", title=title, ylim=(0, 1.05 * base.max()))
    axes.grid(False, axis="x")
    legend(fig)
    return fig


def trade_off(results: Mapping[tuple[str, int], list[PolicyResult]]) -> Any:
    """KL on the rows read against the share of bytes sent, one panel a task.

    A policy without error stands on the lower edge, which the axis says."""
    rows = -(-len(results) // 2)
    fig, panels = figure(min(len(results), 2), 4.4 if len(results) > 1 else 7, 3.8, rows=rows)
    for axes, ((name, steps), found) in zip(np.ravel(panels), results.items(), strict=False):
        for group in dict.fromkeys(map(_group, found)):
            mine = sorted((r for r in found if _group(r) == group), key=lambda r: r.share)
            _draw_group(axes, group, [r.share for r in mine], [np.mean(r.kl_read) for r in mine])
        reference(axes, 1e-3, "threshold 1e-3 nats")
        reference(axes, 0.35, "threshold 35 %", axis="x")
        axes.set(yscale="log", ylim=(EXACT, 1), title=f"{name}, N = {steps} steps", xlim=(0, 1.05))
        axes.set_xlabel("share of the exact bytes over tp")
        axes.set_ylabel("KL(exact ‖ policy), nats, rows read\n(on the edge: exact)")
    legend(fig, columns=5)
    return fig


def _group(result: PolicyResult) -> str:
    """Policies that one line joins: "drift 0.25" and "drift 0.4", not "drift, int8"."""
    return next(group for group in GROUPS if result.policy.startswith(group))


def _draw_group(axes: Any, group: str, share: list[float], kl: list[Any]) -> None:
    at, ways = GROUPS.index(group), len(COLOURS)
    style = {"color": COLOURS[at % ways], "marker": MARKERS[at % ways], "clip_on": False}
    if at >= ways:
        style |= {"markerfacecolor": "white"}
    shown = np.maximum(np.array(kl, float), EXACT)
    axes.plot(share, shown, label=group, linestyle=":", linewidth=1, zorder=3, **style)


def speedups(region: Grid) -> Any:
    """Gain of a degree for each phase over the grid of jobs."""
    title, label = "A degree for each phase, 8B on 8 × H100", "speed-up over the best fixed degrees"
    return heat_map(region, title, label, "value >= 1.1")


def step_times(region: Grid) -> Any:
    """Stacked seconds of each kind of step of the job that gains most, at every {tp, dp}, by the
    resource that they wait for."""
    job = best_job(region)
    fig, panels = figure(columns=2, width=4.4, height=3.6)
    for panel, kind in zip(panels, KINDS, strict=True):
        steps = {str(d): step for (k, d), step in job.steps().items() if k == kind}
        base = np.zeros(len(steps))
        for resource in dict.fromkeys(BOUND.values()):
            parts = [
                sum(s for term, s in step.terms.items() if BOUND[term] == resource)
                for step in steps.values()
            ]
            panel.bar(list(steps), 1e3 * np.array(parts), bottom=base, label=resource, width=0.6)
            base += 1e3 * np.array(parts)
        panel.set(ylabel="ms a step (simulated)", ylim=(0, 1.05 * base.max()))
        panel.grid(False, axis="x")
        panel.set_title(f"{kind}: {job.work(kind).rows:,} rows each of {job.requests} requests")
    legend(fig, columns=4)
    return fig


def film_strip(arm: Arm, states_TxL: np.ndarray, columns: int = 8) -> Any:
    """One sample while it is denoised: tokens in reading order, coloured by the step that revealed
    them.
    """
    mask_id, length = arm.objective.n_ids, states_TxL.shape[1]
    assert arm.data.tokenizer is not None
    born_L = (states_TxL == mask_id).sum(0) - 1  # the step after which the token was there
    fig, panels = figure(2, 4.4, 0.5 + 0.2 * length / columns, rows=3)
    moments = np.linspace(0, length, panels.size).round().astype(int)
    for axes, t in zip(panels.flat, moments, strict=True):
        hidden_L = states_TxL[t] == mask_id
        shown = np.where(hidden_L, np.nan, born_L).astype(float)
        grid = np.pad(shown, (0, -length % columns), constant_values=np.nan).reshape(-1, columns)
        image = axes.imshow(grid, "viridis", vmin=0, vmax=length, aspect="auto", alpha=0.45)
        for i in np.flatnonzero(~hidden_L):
            text = printable(arm.data.tokenizer.decode([int(states_TxL[t, i])]))[:7]
            axes.text(i % columns, i // columns, text, ha="center", va="center")
        axes.set(title=f"after step {t} of {length}", xticks=[], yticks=[])
        axes.grid(False)
    fig.colorbar(image, ax=panels, label="step that revealed the token", shrink=0.6)
    return fig


def printable(text: str) -> str:
    """The text as matplotlib can draw it: no control characters, no formulas."""
    shown = "".join("⏎" if x == "\n" else x if x.isprintable() else "·" for x in text)
    return shown.replace("$", r"\$")
