"""The pictures of topic 4: rounds against length, one run as a film strip, what lossy samplers
pay."""

from typing import Any

import numpy as np

from fdp.study.figures import COLOURS, MARKERS, figure, legend, reference
from fdp.topics.speculative_dlm.counted import FrontierPoint, RoundCounts

CELLS = {"accepted": COLOURS[2], "corrected": COLOURS[4], "discarded": "#bbbbbb"}


def rounds(counts: list[RoundCounts]) -> Any:
    """Mean rounds of first-hitting against the length: all of the chain in a window, and the next
    smaller window."""
    some = [c for c in counts if c.target == "first-hitting"]
    largest = max((c.window for c in some if c.window < c.length), default=0)
    shown = (True, False) if largest else (True,)
    fig, panels = figure(columns=len(shown), width=4.4 if largest else 6.0, height=3.8)
    for axes, whole in zip(np.ravel(panels), shown, strict=True):
        title = "all states in the window" if whole else f"window {largest}"
        mine = [c for c in some if c.window == (c.length if whole else largest)]
        for i, name in enumerate(dict.fromkeys(c.drafter for c in some)):
            line = sorted((c.length, c.rounds) for c in mine if c.drafter == name)
            if line:
                style = {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)]}
                style["linestyle"] = "-" if i < len(COLOURS) else "--"
                axes.plot(*zip(*line, strict=True), label=name, **style)
        axes.set(title=title, xlabel="length L, tokens", ylabel="mean rounds of a sample")
        axes.set_ylim(bottom=0)
    legend(fig, columns=4)
    return fig


def film_strip(window: int, length: int, taken_R: np.ndarray) -> Any:
    """Steps of the chain in every round of one sample: drafted and accepted, the verifier's own,
    drafted and discarded."""
    from matplotlib.patches import Patch

    fig, axes = figure(width=8.0, height=max(2.5, 0.3 * len(taken_R) + 1.6))
    start = 0
    for r, taken in enumerate(int(t) for t in taken_R):
        last = min(start + window - 1, length)
        spans = {
            "accepted": (start, min(start + taken, length)),
            "corrected": (start + taken, min(start + taken + 1, length)),
            "discarded": (start + taken + 1, last),
        }
        for name, (left, right) in spans.items():
            for step in range(left, right):
                axes.barh(r, 0.9, left=step + 0.05, height=0.9, color=CELLS[name])
        start += taken + 1
    title = f"One run, self-correcting drafts, window {window}"
    axes.set(title=title, xlabel="step of the chain", ylabel="round", xlim=(0, length))
    axes.set_yticks(range(len(taken_R)), [str(r + 1) for r in range(len(taken_R))])
    axes.invert_yaxis()
    axes.grid(False)
    fig.legend(
        handles=[Patch(color=colour, label=name) for name, colour in CELLS.items()],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return fig


def frontier(points: list[FrontierPoint]) -> Any:
    """Exact NLL and entropy of single tokens against verifier passes."""
    fig, panels = figure(columns=2, width=4.4, height=4.2)
    labels = {"nll": "exact NLL, nats a token", "entropy": "entropy of tokens, nats"}
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for i, p in enumerate(points):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // 2 % len(MARKERS)]
            line: dict[str, Any] = {"marker": marker, "color": colour, "linestyle": ""}
            axes.plot([p.nfe], [getattr(p, key)], label=p.sampler, **line)
        reference(axes, getattr(points[0], key), "one token a step")
        axes.set(xlabel="verifier passes", ylabel=label)
    legend(fig, columns=3)
    return fig
