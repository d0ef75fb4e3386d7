"""The pictures of topic 8.

Legend: B images, H rows, W columns, C channels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdp.parallel.pipeline.evaluate import Evaluation
from fdp.study.figures import COLOURS, GREY, MARKERS, figure, legend
from fdp.topics.zero_bubble.op_costs import KINDS, OpCosts
from fdp.topics.zero_bubble.quality import Samples
from fdp.topics.zero_bubble.simulated import Bars

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
    bars = Bars.of(result)
    draw(axes, bars.device, bars.start, bars.seconds, bars.kind)
    axes.set(xlabel="s", ylabel="stage", title=title)
    fig.legend(loc="outside right upper", handlelength=1)
    return fig


def draw(
    axes: Any,
    device_N: Sequence[int],
    start_N: Sequence[float],
    seconds_N: Sequence[float],
    kind_N: Sequence[str],
) -> None:
    """The bars of N operations."""
    device, start, seconds = (np.asarray(x) for x in (device_N, start_N, seconds_N))
    kinds = np.array(kind_N)
    for kind in dict.fromkeys(kind_N):
        mine = kinds == kind
        most = seconds[mine].max()
        shades = 0.35 + 0.65 * seconds[mine] / most if most else np.ones(mine.sum())
        axes.barh([0], [0], color=KIND_COLOURS[kind], label=kind)  # the legend's full shade
        colours = np.array([(*_rgb(KIND_COLOURS[kind]), shade) for shade in shades])
        spans = np.stack([start[mine], seconds[mine]], 1)
        for i in np.unique(device[mine]):
            at = device[mine] == i
            style: dict[str, Any] = {"facecolors": colours[at], "edgecolor": "white"}
            axes.broken_barh(spans[at], (i - 0.45, 0.9), linewidth=0.2, **style)
    axes.set_yticks(np.arange(device.max() + 1))
    axes.set_ylim(device.max() + 0.6, -0.6)
    axes.grid(False)


def _rgb(colour: str) -> tuple[float, float, float]:
    r, g, b = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
    return r, g, b


def while_training(rows: Mapping[int, np.ndarray], title: str) -> Any:
    """One row of samples, one a class, for each step; `rows` {step: [B, H, W, C] of 0..255}."""
    steps = sorted(rows)
    B, height, width, _ = rows[steps[0]].shape
    fig, axes = figure(width=9.0, height=0.3 + 0.9 * len(steps))
    page = np.concatenate([_strip(rows[step]) for step in steps])
    _show(axes, page)
    axes.set(title=title, xlabel="class asked for", ylabel="training step")
    axes.set_xticks((np.arange(B) + 0.5) * width - 0.5, [str(n) for n in range(B)])
    axes.set_yticks((np.arange(len(steps)) + 0.5) * height - 0.5, [f"{n:,}" for n in steps])
    return fig


def beside_nearest(name: str, found: Samples, train: np.ndarray) -> Any:
    """Samples above their nearest training images."""
    fig, axes = figure(width=10.0, height=2.2)
    height = found.images.shape[1]
    near = train[found.nearest_B]
    page = np.concatenate([_strip((x + 1) * 127.5) for x in (found.images, near)])
    _show(axes, page)
    axes.set(title=f"{name}: samples, and the nearest training image of each", xticks=[])
    axes.set_yticks([height / 2, 1.5 * height], ["sample", "nearest"])
    return fig


def _strip(images: np.ndarray) -> np.ndarray:
    """Images side by side."""
    return np.concatenate(list(images), axis=1)


def _show(axes: Any, page: np.ndarray) -> None:
    page = np.clip(page, 0, 255).astype(np.uint8)
    axes.imshow(page[..., 0] if page.shape[-1] == 1 else page, cmap="gray", vmin=0, vmax=255)
    axes.grid(False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def costs(found: Sequence[OpCosts]) -> Any:
    """Median seconds of every operation, with quartiles."""
    fig, axes = figure(width=6.5, height=3.6)
    for n, o in enumerate(found):
        at = np.arange(len(KINDS)) + 0.4 * (n - (len(found) - 1) / 2)
        quartiles = np.array([np.percentile(o.seconds[k], [25, 50, 75]) for k in KINDS]).T * 1e3
        reach = np.abs(quartiles[[0, 2]] - quartiles[1])
        label = "patches of twice the edge" if o.patch > 1 else "finest patches"
        axes.bar(at, quartiles[1], 0.36, yerr=reach, capsize=3, label=label, color=COLOURS[n])
    axes.set(
        ylabel=f"ms, {found[0].rows} images",
        title="Operations of one stage, median and quartiles",
        ylim=(0, None),
    )
    axes.set_xticks(np.arange(len(KINDS)), [*KINDS[:-1], "fused B + W"])
    legend(fig)
    return fig


def by_noise(losses: Mapping[str, np.ndarray]) -> Any:
    """Held-out loss of every arm less that of the first, by share of the noise; lower is better."""
    fig, axes = figure(width=7.2, height=4.0)
    first = next(iter(losses))
    for n, (name, loss_J) in enumerate(losses.items()):
        share = (np.arange(len(loss_J)) + 0.5) / len(loss_J)
        marker, colour = MARKERS[n % len(MARKERS)], COLOURS[n % len(COLOURS)]
        axes.plot(share, loss_J / losses[first], marker=marker, color=colour, label=name)
    axes.set(
        xlabel="rank of the noise level, 1 = most noise",
        ylabel=f"held-out loss / that of {first}",
        title="Held-out loss at fixed noise, lower is better",
    )
    legend(fig, 3)
    return fig
