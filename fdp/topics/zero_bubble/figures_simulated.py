"""The pictures of the simulated half of topic 8."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdp.study.figures import COLOURS, GREY, MARKERS, figure, legend
from fdp.topics.zero_bubble.figures import draw
from fdp.topics.zero_bubble.simulated import Bars, Contest, Sweep
from fdp.topics.zero_bubble.worth import Worth

LINES = {  # field of a contest: label and colour
    "random_1f1b": ("1F1B, random order", "#bbbbbb"),
    "sorted_1f1b": ("1F1B, sorted", GREY),
    "fixed": ("best fixed schedule", COLOURS[4]),
    "searched": ("searched", COLOURS[0]),
    "equal_searched": ("searched, equalised microbatches", COLOURS[2]),
}


def contests(found: Sequence[Contest]) -> Any:
    """Bubbles of every case."""
    fig, axes = figure(width=8.0, height=0.9 + 0.75 * len(found))
    size = 0.8 / len(LINES)
    for n, (name, (label, colour)) in enumerate(LINES.items()):
        at = np.arange(len(found)) + (n - 2) * size
        bubbles = [100 * getattr(c, name).bubble for c in found]
        axes.barh(at, bubbles, size, color=colour, label=label)
        for y, x in zip(at, bubbles, strict=True):
            axes.text(x, y, f" {x:.1f}", va="center", fontsize=8)
    bounds = [100 * (1 - _work(c) / c.bound) for c in found]
    rows = np.arange(len(found))
    axes.vlines(bounds, rows - 0.42, rows + 0.42, color=COLOURS[1], label="no order can idle less")
    names = [_wrapped(c.name) for c in found]
    axes.set(yticks=rows, xlabel="idle share of the step, % (less is better)")
    axes.set_yticklabels(names, linespacing=1.1)
    first = found[0]
    axes.set(title=f"Unequal microbatches, p = {first.p} where not said, m = {first.m}")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    legend(fig, 3)
    return fig


def _work(c: Contest) -> float:
    return (1 - c.searched.bubble) * c.searched.makespan


def _wrapped(name: str) -> str:
    return name.replace(", ", "\n")


def sweep(found: Sweep) -> Any:
    """Bubble against memory."""
    fig, axes = figure(width=7.0, height=4.4)
    lines = (
        ("searched", found.searched, COLOURS[0], "-"),
        ("best fixed schedule", found.best_fixed, COLOURS[4], "-"),
        ("no order can idle less", found.bound, COLOURS[1], "--"),
    )
    for label, bubbles, colour, dash in lines:
        x, y = found.caps, 100 * np.array(bubbles)
        axes.step(x, y, dash, where="post", color=colour, label=label)
        if dash == "-":
            axes.plot(x, y, "o", color=colour, markersize=4)
    shown = {n: (h, 100 * b) for n, (h, b) in found.fixed.items() if h <= max(found.caps) + 1e-6}
    for n, (name, (held, bubble)) in enumerate(sorted(shown.items(), key=lambda x: -x[1][1])):
        marker = MARKERS[(n + n // len(COLOURS)) % len(MARKERS)]
        colour = COLOURS[n % len(COLOURS)]
        style: dict[str, Any] = {"markersize": 6, "linestyle": "", "markerfacecolor": "none"}
        axes.plot(held, bubble, marker, color=colour, label=name, **style)
    axes.set(xlabel="microbatches that a device may hold", ylabel="idle share of the step, %")
    axes.set(title=f"What memory buys\n{found.name}", yscale="log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    low = axes.get_ylim()[0]
    axes.set_yticks([t for t in ticks if t >= low], [f"{t:g}" for t in ticks if t >= low])
    axes.minorticks_off()
    legend(fig, 3)
    return fig


def schedules(found: Mapping[str, Bars]) -> Any:
    """Every schedule on one time axis, the worst first."""
    columns = 2
    rows = -(-len(found) // columns)
    p = 1 + max(next(iter(found.values())).device)
    fig, many = figure(columns, 7.0, 0.75 + 0.2 * p, rows)
    flat = np.atleast_1d(many).ravel()
    end = max(s + t for b in found.values() for s, t in zip(b.start, b.seconds, strict=True))
    for axes in flat[len(found) :]:
        axes.set_axis_off()
    for axes, (name, bars) in zip(flat, found.items(), strict=False):
        draw(axes, bars.device, bars.start, bars.seconds, bars.kind)
        held = f"{bars.held:.2f}".rstrip("0").rstrip(".")
        axes.set(title=f"{name}: {bars.bubble:.1%} idle, holds {held}", xlim=(0, end))
    for n, axes in enumerate(flat[: len(found)]):
        if n >= len(found) - columns:
            axes.set_xlabel("time, F of a device")
        else:
            axes.set_xticklabels([])
        if n % columns == 0:
            axes.set_ylabel("stage")
    legend(fig, 5)
    return fig


def worth(found: Sequence[Worth]) -> Any:
    """The map of where a pipeline wins: a panel a link, a row a workload, a column a cluster and
    batch."""
    links = sorted({w.link for w in found}, reverse=True)
    rows = list(dict.fromkeys(_workload(w) for w in found))
    columns = list(dict.fromkeys((w.chips, _size(w, found)) for w in found))
    fig, many = figure(len(links), 6.4, 1.8 + 0.5 * len(rows))
    image: Any = None
    for axes, link in zip(np.atleast_1d(many), links, strict=True):
        gain = np.full((len(rows), len(columns)), np.nan)
        for w in (w for w in found if w.link == link):
            at = rows.index(_workload(w)), columns.index((w.chips, _size(w, found)))
            gain[at] = np.log2(w.gain)
            colour = "white" if abs(gain[at]) > 0.7 else "black"
            mark = "◆" if w.flips else "◇" if w.decides else ""
            percent = 100 * (w.gain - 1)
            text = f"{percent:+.1f}" if abs(percent) < 9.95 else f"{percent:+.0f}"
            style = {"ha": "center", "va": "center", "color": colour}
            axes.text(at[1], at[0], f"{text}\n{mark}" if mark else text, **style)
        image = axes.imshow(gain, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(len(columns)), [f"{chips}\n{size}" for chips, size in columns])
        axes.set_yticks(range(len(rows)), rows)
        axes.set(title=f"{link / 1e9:g} GB/s a chip between nodes", xlabel="chips, batch")
        axes.grid(False)
    bar = fig.colorbar(image, ax=many, label="% more samples/s\nthan the best plan without pp")
    bar.set_ticks([-1, 0, 1], labels=["−50", "0", "≥ +100"])
    fig.suptitle(
        "Where a pipeline wins (blue), with a searched schedule\n"
        "◇ loses as interleaved 1F1B, would win without any bubble\n◆ wins when searched"
    )
    return fig


def _workload(w: Worth) -> str:
    return f"{w.model}, {w.tokens:,} tokens"


def _size(w: Worth, found: Sequence[Worth]) -> str:
    """Batches differ by workload: the smaller or the larger one of its own."""
    mine = {other.batch for other in found if _workload(other) == _workload(w)}
    return "small" if w.batch == min(mine) else "large"
