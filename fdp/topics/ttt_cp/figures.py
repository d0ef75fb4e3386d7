"""Pictures of topic 12."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdp.study.figures import COLOURS, figure, legend, reference
from fdp.topics.ttt_cp.arms import state_bytes


def answers(shares: Mapping[str, Sequence[float]], chance: float) -> Any:
    """A bar for each arm, its seeds as points."""
    fig, axes = figure(width=7.0)
    means = [100 * float(np.mean(values)) for values in shares.values()]
    axes.barh(list(shares), means, color=COLOURS[0])
    for i, values in enumerate(shares.values()):
        points = [100 * v for v in values]
        axes.plot(points, [i] * len(points), "o", color=COLOURS[1], markersize=4)
    reference(axes, 100 * chance, "chance", "x")
    axes.invert_yaxis()
    axes.set(xlabel="right answers, %; points are seeds", title="Recall by mixing layer")
    return fig


def needles(
    shares: Mapping[str, np.ndarray], lengths: Sequence[int], depths: Sequence[float]
) -> Any:
    """Right answers by length and depth, a map for each arm."""
    fig, axes = figure(len(shares), 2.2, 3.0)
    every = np.atleast_1d(axes)
    for ax, (kind, share) in zip(every, shares.items(), strict=True):
        image = ax.imshow(100 * np.asarray(share), vmin=0, vmax=100, aspect="auto", cmap="viridis")
        ends = [0, len(depths) // 2, len(depths) - 1]
        ax.set_xticks(ends, [f"{depths[i]:g}" for i in ends])
        ax.set_yticks(range(len(lengths)), [str(n) for n in lengths])
        ax.grid(visible=False)
        ax.set(title=kind, xlabel="depth")
    every[0].set_ylabel("tokens")
    fig.colorbar(image, ax=list(every), label="right, %")
    return fig


def capacity(by_kind: Mapping[str, Mapping[int, np.ndarray]], pairs: Sequence[int]) -> Any:
    """Right answers against pairs, a panel for each kind and a line for each state."""
    fig, axes = figure(len(by_kind), 3.4, 3.4)
    every = np.atleast_1d(axes)
    for ax, (kind, by_size) in zip(every, by_kind.items(), strict=True):
        for i, n in enumerate(sorted(by_size)):
            means = 100 * by_size[n].mean(0)
            ax.plot(pairs, means, "o-", color=COLOURS[i], label=f"{state_bytes(kind, n):,} bytes")
            # The keys of all heads: the pairs that a matrix can hold exactly.
            keys = 2 * n if kind == "lact" else 6 * n
            if keys <= pairs[-1]:
                ax.axvline(keys, color=COLOURS[i], linestyle=":")
        reference(ax, 90, "90 %")
        ax.set(title=kind, xlabel="pairs", ylim=(0, 105))
    every[0].set_ylabel("right answers, %")
    legend(fig)
    return fig
