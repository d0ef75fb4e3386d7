"""Pictures of topic 2.

Legend: J noise bins, M layers with experts, E experts, S steps of a sampler, R ranks of ep."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdp.data import expert_loads
from fdp.study.figures import COLOURS, MARKERS, figure, legend, reference
from fdp.study.statistics import interval
from fdp.topics.moe_dlm.observe import RANKS, Observed, Sampled
from fdp.topics.moe_dlm.settings import BINS, SEVERAL_NODES

SHOWN = ("aux", "low_rank", "low_rank_rank", "film_rank")  # in pictures of loads, where trained


def task(
    name: str,
    arms: Sequence[str],
    seen: Sequence[Sequence[Observed]],
    drawn: Sequence[Sequence[Sampled]],
) -> dict[str, Any]:
    """All pictures of a task."""
    found = {f"nelbo {name}": by_noise(name, arms, seen)}
    first = {a: (o[0], s[0]) for a, o, s in zip(arms, seen, drawn, strict=True) if a in SHOWN}
    if first:
        found[f"experts {name}"] = heat(name, {a: o for a, (o, _) in first.items()})
        found[f"ranks {name}"] = ranks(name, {a: s for a, (_, s) in first.items()})
    return found


def by_noise(name: str, arms: Sequence[str], seen: Sequence[Sequence[Observed]]) -> Any:
    """NELBO of every router less that of the first, by mask share, with intervals over seeds."""
    fig, axes = figure(width=7.2, height=4.2)
    share = (np.arange(BINS) + 0.5) / BINS
    base = np.array([o.nelbo_J for o in seen[0]])
    for i, (arm, seeds) in enumerate(zip(arms, seen, strict=True)):
        pairs = min(len(seeds), len(base))
        gap = np.array([o.nelbo_J for o in seeds[:pairs]]) - base[:pairs]
        ends = [interval(g) or (g.mean(), g.mean()) for g in gap.T]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.plot(share, gap.mean(0), label=arm, markersize=4, **style)
        axes.fill_between(share, *np.array(ends).T, alpha=0.12, color=style["color"])
    reference(axes, 0.0, arms[0])
    axes.set(
        xlabel="share of masked tokens",
        ylabel=f"NELBO less that of {arms[0]} (nats a token)",
        title=f"{name}: what routers gain at each noise level",
    )
    legend(fig, 4)
    return fig


def heat(name: str, found: Mapping[str, Observed]) -> Any:
    """Share of the choices that each expert gets in each noise bin, one panel a layer."""
    layers = next(iter(found.values())).load_JxMxE.shape[1]
    fig, panels = figure(len(found), 2.6, 2.4, rows=layers)
    panels = np.asarray(panels).reshape(layers, len(found))
    image = None
    for column, (arm, o) in enumerate(found.items()):
        for m in range(layers):
            load_JxE = o.load_JxMxE[:, m]
            share = load_JxE / np.maximum(load_JxE.sum(1, keepdims=True), 1)
            axes = panels[m, column]
            image = axes.imshow(share.T, cmap="cividis", vmin=0, aspect="auto", origin="lower")
            axes.grid(False)
            axes.set(title=f"{arm}\nlayer {m}" if m == 0 else f"layer {m}")
            if m == layers - 1:
                axes.set_xlabel("noise bin")
        panels[0, 0].set_ylabel("expert")
    fig.colorbar(image, ax=panels, label="share of the choices of a bin")
    fig.suptitle(f"{name}: who fires when")
    return fig


def ranks(name: str, found: Mapping[str, Sampled]) -> Any:
    """Load of the ranks of ep over a sampling run, over the level load, worst layer marked."""
    fig, panels = figure(len(found), 2.6 if len(found) > 1 else 4.0, 3.2)
    top = max(s.overload_S.max() for s in found.values()) + 1
    for axes, (arm, s) in zip(np.atleast_1d(panels), found.items(), strict=True):
        part_SxMxR = expert_loads.part_loads(s.load_SxMxE, RANKS)
        level_SxMxR = part_SxMxR / part_SxMxR.mean(-1, keepdims=True)
        worst = int(level_SxMxR.max(-1).max(0).argmax())
        masked = 1 - np.arange(len(level_SxMxR)) / len(level_SxMxR)
        for r in range(RANKS):
            axes.plot(masked, level_SxMxR[:, worst, r], color=COLOURS[r % len(COLOURS)], alpha=0.8)
        axes.invert_xaxis()
        axes.set_ylim(0, 1.05 * top)
        axes.set(xlabel="share of masked tokens", title=f"{arm}\nlayer {worst}")
        reference(axes, 1.0, "level")
    np.atleast_1d(panels)[0].set_ylabel("load of a rank over the mean")
    fig.suptitle(f"{name}: {RANKS} ranks of ep along a sampling run")
    return fig


def plans(found: Mapping[str, tuple[float, float]]) -> Any:
    """Bytes a token by dispatch plan, inside a node and between nodes."""
    fig, axes = figure(width=6.0, height=3.2)
    names, bottom = list(found), np.zeros(len(found))
    for i, where in enumerate(("inside a node", "between nodes")):
        height = np.array([found[n][i] for n in names]) / 2**10
        axes.bar(names, height, bottom=bottom, label=where, color=COLOURS[i])
        bottom += height
    title = "What a plan sends: {} on {}".format(*SEVERAL_NODES)
    axes.set(ylabel="KiB a token and layer, out and back", title=title)
    legend(fig, 2)
    return fig
