"""Predicted seconds of a training step of a Transformer under context plans, with intervals, on
eight H100.

A step is the planned attention of every layer and everything else: matmuls and elementwise kernels
of fdp.price.inference, three times (forward, and twice as much backward), the same for all plans.
Collectives are those of fdp.price.network, fitted on measurements; nothing here was timed on several
devices. Data parallelism, the optimizer and positions sent once a step are left out, which are the
same for all plans as well.

Legend: L layers, N draws of the models' errors (draw 0 is nominal).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fdp.count.context import EXCHANGE, GATHER, PERMUTE, REDUCE, SCATTER, AttentionShape
from fdp.models.shape import ModelShape
from fdp.price import hardware, inference, network
from fdp.price.shapes import named
from fdp.study.uncertainty import factors, interval, sigma
from fdp.topics.adaptive_cp import baselines, planner, synthetic
from fdp.topics.adaptive_cp.planner import ModelPlan
from fdp.topics.adaptive_cp.problem import Masks, Problem, dense, sparse
from fdp.topics.adaptive_cp.timing import Machine

GQA_8B = named("llama3-8b")
OPS = {
    GATHER: "all_gather",
    SCATTER: "reduce_scatter",
    EXCHANGE: "all_to_all",
    PERMUTE: "point_to_point",
    REDUCE: "all_reduce",
}
# 90 % quantile of |error| of attention, block-sparse kernels included: assumed, wide on purpose
ATTENTION_ERROR = 0.5
LENGTHS = (2**17, 2**18, 2**19, 2**20)  # positions of simulated sequences


@dataclass(frozen=True)
class Fabric:
    """Where the devices of cp sit: `local` of them in a node; `congested` keeps the fit's loss of
    bandwidth with the number of nodes, which was measured on one busy cluster."""

    name: str
    local: int
    congested: bool = False


NVLINK, INFINIBAND = Fabric("NVLink", 8), Fabric("InfiniBand", 1)
CONGESTED = Fabric("InfiniBand, congested", 1, True)


@dataclass(frozen=True)
class Fitted:
    """Network of a chip by its fit, with `draws` draws of its error; the first is nominal."""

    fabric: Fabric
    chip: str = "h100"
    draws: int = 1
    seed: int = 0

    def seconds(self, op: str, wire: float, ranks: int, inner: int) -> np.ndarray:
        """Seconds [N] of a collective, as `timing.Network`; errors of one op, group and size class
        are the same.
        """
        local = min(ranks, max(1, self.fabric.local // inner))
        fit = network.coefficients(self.chip)
        if not self.fabric.congested:
            fit = replace(fit, congestion=0.0)
        # fdp.price.network speaks of whole operands, of which a device sends (n-1)/n, in an
        # all-reduce twice.
        operand = wire if op == PERMUTE else wire * ranks / (ranks - 1) / (2 if op == REDUCE else 1)
        nominal = float(network.collective_time(OPS[op], operand, ranks, local, self.chip, fit))
        small, crosses = operand < inference.SMALL, local < ranks
        spread = sigma(network_error(self.chip, crosses, small)[1])
        what = op, ranks, inner, small
        return nominal * factors(what, spread, self.draws, self.seed, nominal=True)


def network_error(chip: str, crosses: bool, small: bool) -> tuple[float, float]:
    """(median, 90 % quantile) of |error| of collectives in a node or across nodes, of a class left
    out of the fit.
    """
    where = f"{'across nodes' if crosses else 'in a node'}, {'below' if small else 'from'} 1 MiB"
    found = network.document()["errors"]["held_out_class"][hardware.chip(chip).name][where]
    return found["median_pct"] / 100, found["p90_pct"] / 100


def machine(fabric: Fabric, chip: str = "h100", draws: int = 1, seed: int = 0) -> Machine:
    """Attention at the fitted share of the chip's peak (no block-sparse kernel was timed) and a
    network.
    """
    rate = hardware.chip(chip).peak_bf16_flops * inference.coefficient("attention", chip)
    error = factors("attention", sigma(ATTENTION_ERROR), draws, seed, nominal=True)
    return Machine(rate / error, Fitted(fabric, chip, draws, seed))


@lru_cache
def rest_seconds(model: ModelShape, seq_len: int, cp: int, chip: str = "h100") -> float:
    """Seconds of everything but attention in a step of one sequence, on each of cp devices."""
    rows = seq_len // cp
    step = inference.price(
        model, inference.Work(1, rows, seq_len, rows), inference.Degrees(1, 1), chip
    )
    return 3 * sum(seconds for term, seconds in step.terms.items() if "attention" not in term)


def problem(
    model: ModelShape, masks: Masks, seq_len: int, cp: int, on: Machine, objective: str = "seconds"
) -> Problem:
    """Planning problem of a model's layers at one sequence a device. Raises ValueError for sizes
    that do not fit.
    """
    shape = AttentionShape.of(model, 1, seq_len, cp)
    return Problem(masks, shape, on, objective=objective)


@dataclass(frozen=True)
class Prediction:
    """Step seconds of the adaptive and of the best uniform plan, their ratio with its 95 %
    interval, and the ratio of their wire bytes."""

    adaptive: float
    uniform: float
    low: float
    high: float
    bytes_ratio: float
    adaptive_plan: str
    uniform_plan: str

    @property
    def ratio(self) -> float:
        """Adaptive over uniform: below 1 is faster."""
        return self.adaptive / self.uniform


def predict(model: ModelShape, found: Problem, level: float = 0.95) -> Prediction:
    """Step time of the adaptive plan against the best uniform one, of all kinds.

    L masks stand for the model's layers, each for layers/L of them. Plans are chosen at nominal
    figures; in every draw the adaptive plan meets the best uniform plan OF THAT DRAW, so errors
    work against it and the interval may lie above
    1. Errors of the matmuls outside attention count as well. Raises ValueError where no plan can
    run."""
    s, N = found.shape, len(np.atleast_1d(found.machine.flops))
    repeat = model.layers / found.layers
    spread = sigma(inference.matmul_error("h100")[1])
    rest_N = rest_seconds(model, s.seq_len, s.cp) * factors("rest", spread, N, nominal=True)
    adaptive, uniform = planner.plan(found), baselines.uniform_any(found)
    total = lambda plan: rest_N + repeat * plan.total_N
    fixed = [total(plan) for plan in uniform_plans(found)]
    ratio_N = total(adaptive) / np.min(fixed, axis=0)
    low, high = interval(ratio_N, level)
    bytes_ratio = adaptive.bytes / uniform.bytes if uniform.bytes else 1.0
    seconds = float(total(adaptive)[0]), float(total(uniform)[0])
    names = baselines.summary(adaptive), baselines.describe(uniform.plans[0])
    return Prediction(*seconds, low, high, bytes_ratio, *names)


def uniform_plans(found: Problem) -> list[ModelPlan]:
    """Every uniform plan that can run, of all kinds and layouts."""
    layers, cp = range(found.layers), found.shape.cp
    plans = [p for at in found.places for p in (*dense(at, cp), *sparse(found, at, layers))]
    return [f for f in (planner.uniform(found, p) for p in plans) if isinstance(f, ModelPlan)]


@dataclass(frozen=True)
class Region:
    """Predictions [fabrics, densities, lengths] of synthetic masks whose layers differ by `spread`
    in density.
    """

    fabrics: tuple[Fabric, ...]
    densities: tuple[float, ...]
    lengths: tuple[int, ...]
    spread: float
    cells: np.ndarray

    def field(self, name: str) -> np.ndarray:
        """One number of each prediction."""
        return np.vectorize(lambda cell: getattr(cell, name), otypes=[float])(self.cells)

    def share(self, fabric: int, threshold: float = 0.9, sure: bool = False) -> float:
        """Share of a fabric's cells with ratio ≤ threshold; `sure`: with the interval's upper end
        there.
        """
        return float((self.field("high" if sure else "ratio")[fabric] <= threshold).mean())


def region(
    model: ModelShape = GQA_8B,
    fabrics: tuple[Fabric, ...] = (NVLINK, INFINIBAND, CONGESTED),
    densities: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0),
    lengths: tuple[int, ...] = LENGTHS,
    cp: int = 8,
    layers: int = 8,
    blocks: int = 512,
    spread: float = 16.0,
    draws: int = 200,
    seed: int = 0,
) -> Region:
    """Where an adaptive plan pays: `predict` over a grid.

    A block is seq_len/blocks positions: a mask keeps its shape at every length, see
    `synthetic.magnify` for what that assumes. Raises ValueError for sizes that do not fit."""
    cells = np.empty((len(fabrics), len(densities), len(lengths)), object)
    for j, density in enumerate(densities):
        masks = Masks(synthetic.layers(layers, blocks, density, spread, seed))
        for i, fabric in enumerate(fabrics):
            on = machine(fabric, draws=draws, seed=seed)
            for k, length in enumerate(lengths):
                cells[i, j, k] = predict(model, problem(model, masks, length, cp, on))
    return Region(fabrics, densities, lengths, spread, cells)


def evidence(fabric: Fabric, chip: str = "h100") -> str:
    """What a simulated row must say of its calibration: data, held-out errors, assumptions."""
    median, p90 = network_error(chip, fabric.local < 8, small=False)
    points = sum(source["points"] for source in network.document()["sources"].values())
    text = (
        f"simulated {chip}, {fabric.name}, {fabric.local} of 8 cp devices a node: collectives "
        f"fitted on {points:,} "
        f"measured points, |error| on classes left out of the fit median {median:.0%}, 90 % "
        f"quantile {p90:.0%} (from "
        f"1 MiB); matmuls {inference.matmul_error(chip)[1]:.0%}; attention kernels "
        f"{ATTENTION_ERROR:.0%}, assumed: no "
        "block-sparse kernel was timed; the interval draws all three, and meets the best uniform "
        "plan of each draw"
    )
    if fabric.local < 8 and not fabric.congested:
        text += "; the fit's congestion, measured on one busy cluster, is left out"
    return text
