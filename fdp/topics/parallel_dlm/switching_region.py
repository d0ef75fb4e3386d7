"""Where switching the tensor degree pays: speed-ups over a grid of jobs, intervals under the
model's errors, pictures.

Legend: N draws; grids are [lengths, requests, reuse steps].
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fdp.models.shape import ModelShape
from fdp.price import inference
from fdp.price.inference import BOUND, Degrees, Step
from fdp.study import uncertainty
from fdp.study.figures import figure, save
from fdp.topics.parallel_dlm.switching import KINDS, Choice, Job, candidates, plan, profile

# 90 % quantile of |error| where nothing was measured here; assumed, wide on purpose.
ASSUMED_ERROR = {"attention": 0.5, "elementwise": 0.5, "launch": 1.0}


def spread(chip: str) -> dict[str, float]:
    """Standard deviation of the log of each term's error, taken as normal with |error| at the
    stated 90 % quantile.
    """
    quantile = {"matmul": inference.matmul_error(chip)[1], **ASSUMED_ERROR}
    network = {
        True: inference.network_error(chip, small=True)[1],
        False: inference.network_error(chip, small=False)[1],
    }
    of = lambda term: (
        network["below" in term] if term.startswith("network") else quantile[term.split()[0]]
    )
    return {term: uncertainty.sigma(of(term)) for term in BOUND}


class Errors:
    """Seeded factors of each term, lognormal: one of a collective for every tp, of a matmul for
    every tp and kind, one in all for launches, attention and elementwise kernels."""

    def __init__(self, chip: str, draws: int, seed: int):
        self.sigma, self.draws, self.seed = spread(chip), draws, seed
        self._drawn: dict[tuple, np.ndarray] = {}

    def factor(self, term: str, *what: Any) -> np.ndarray:
        """Factors [N] of `term` for one member of its class; equal calls give equal factors."""
        key = (term, *what)
        if key not in self._drawn:
            drawn = uncertainty.factors(key, self.sigma[term], self.draws, self.seed)
            self._drawn[key] = drawn
        return self._drawn[key]

    def seconds(self, kind: str, degrees: Degrees, step: Step) -> np.ndarray:
        """Possible seconds [N] of one step."""
        total = np.zeros(self.draws)
        for term, seconds in step.terms.items():
            if term.startswith("network"):
                total += seconds * self.factor(term, degrees.tp)
            elif term.startswith("matmul"):
                total += seconds * self.factor(term, degrees.tp, kind)
            else:
                total += seconds * self.factor(term)
        return total


def interval(
    job: Job, choice: Choice, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the speed-up under the model's errors.

    The plan is the one chosen from the nominal table; in every draw it meets the best fixed degrees
    OF THAT DRAW, so errors work against it and the interval may lie below 1."""
    errors = Errors(job.chip, draws, seed)
    time = {(e.kind, e.degrees): errors.seconds(e.kind, e.degrees, e.step) for e in profile(job)}
    period = lambda refresh, reuse: (
        time["refresh", refresh] + job.reuse_steps * time["reuse", reuse]
    )
    fixed = [period(p.refresh, p.reuse) for p in candidates(job) if not p.switches]
    best = choice.best
    switch = best.switch_seconds * errors.factor(
        "network from 1 MiB", "switch", best.refresh.tp, best.reuse.tp
    )
    ratio = np.min(fixed, axis=0) / (period(best.refresh, best.reuse) + switch)
    return uncertainty.interval(ratio, level)


@dataclass(frozen=True)
class Region:
    """Speed-up of the switched plan over the best fixed: arrays [lengths, requests, reuse steps];
    NaN: nothing fits.

    `low` and `high` bound it at 95 %; `choices` holds the plans (None where none fits).
    """

    lengths: tuple[int, ...]
    requests: tuple[int, ...]
    reuse_steps: tuple[int, ...]
    speedup: np.ndarray
    low: np.ndarray
    high: np.ndarray
    choices: np.ndarray

    def share(self, threshold: float = 1.1, sure: bool = False) -> float:
        """Share of the cells that fit with speed-up ≥ threshold; `sure`: with the interval's lower
        end there.
        """
        values = (self.low if sure else self.speedup)[np.isfinite(self.speedup)]
        return float((values >= threshold).mean())


def region(
    shape: ModelShape,
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096),
    requests: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    reuse_steps: tuple[int, ...] = (1, 3, 7, 15, 31),
    block: int = 32,
    chip: str = "h100",
    draws: int = 1000,
    seed: int = 0,
) -> Region:
    """Where switching pays: `plan` and `interval` over a grid of jobs on a node of eight."""
    grid = (len(lengths), len(requests), len(reuse_steps))
    speedup, low, high = (np.full(grid, np.nan) for _ in range(3))
    choices = np.full(grid, None, object)
    for at in np.ndindex(grid):
        job = Job(shape, requests[at[1]], lengths[at[0]], reuse_steps[at[2]], block, chip)
        try:
            choice = plan(job)
        except ValueError:
            continue
        choices[at], speedup[at] = choice, choice.speedup
        low[at], high[at] = interval(job, choice, draws, seed)
    return Region(lengths, requests, reuse_steps, speedup, low, high, choices)


# Pictures
# -------------------------------------------------------------------------------------------------

_TERMS = {"compute": "compute", "memory": "memory", "network": "network (tp)", "launch": "launch"}


def heat_map(path: Path, found: Region, title: str) -> Path:
    """Speed-up by requests and reuse steps, one panel a length; a box marks 10 % and more. Returns
    the path.
    """
    fig, panels = figure(columns=len(found.lengths), width=2.6, height=3.4)
    image: Any = None
    for panel, length, speedup, low in zip(
        np.atleast_1d(panels), found.lengths, found.speedup, found.low, strict=True
    ):
        image = panel.imshow(
            speedup, cmap="viridis", vmin=1.0, vmax=1.2, origin="lower", aspect="auto"
        )
        for (i, j), value in np.ndenumerate(speedup):
            text = "none fits" if np.isnan(value) else f"{value:.3f}\n≥{low[i, j]:.2f}"
            colour = "black" if value > 1.12 else "white"
            box = (
                {"boxstyle": "square,pad=0.2", "fill": False, "edgecolor": colour}
                if value >= 1.1
                else None
            )
            panel.text(j, i, text, ha="center", va="center", fontsize=5.5, color=colour, bbox=box)
        panel.set(xlabel="reuse steps a refresh")
        panel.set_title(f"{length:,} positions", fontsize=9)
        panel.set_xticks(range(len(found.reuse_steps)), [str(n) for n in found.reuse_steps])
        panel.set_yticks(range(len(found.requests)), [str(n) for n in found.requests])
        panel.grid(False)
    np.atleast_1d(panels)[0].set_ylabel("requests")
    fig.colorbar(image, ax=panels, label="speed-up over the best fixed degrees")
    fig.suptitle(f"{title}; second line: lower end of the 95 % interval", fontsize=10)
    return save(fig, path)


def step_times(path: Path, job: Job, title: str) -> Path:
    """Stacked seconds of each kind of step at every {tp, dp}, by the resource that they wait for.
    Returns the path.
    """
    fig, panels = figure(columns=2, width=4.2, height=3.2)
    for panel, kind in zip(panels, KINDS, strict=True):
        entries = [e for e in profile(job) if e.kind == kind]
        names, base = [str(e.degrees) for e in entries], np.zeros(len(entries))
        for resource, label in _TERMS.items():
            parts = [
                sum(s for term, s in e.step.terms.items() if BOUND[term] == resource)
                for e in entries
            ]
            panel.bar(names, 1e3 * np.array(parts), bottom=base, label=label, width=0.6)
            base += 1e3 * np.array(parts)
        for x, (entry, top) in enumerate(zip(entries, base, strict=True)):
            panel.text(
                x,
                top,
                f"{entry.flops / 1e12:.2f} TFLOP\n{entry.tp_bytes / 1e6:,.0f} MB",
                ha="center",
                va="bottom",
                fontsize=6,
            )
        rows = job.work(kind).rows
        panel.set(ylabel="ms a step (simulated)")
        panel.set_title(f"{kind}: {rows:,} rows of {job.requests} requests", fontsize=9)
        panel.set_ylim(0, 1.25 * base.max())
    panels[0].legend(fontsize=7, loc="upper left")
    fig.suptitle(title, fontsize=10)
    return save(fig, path)
