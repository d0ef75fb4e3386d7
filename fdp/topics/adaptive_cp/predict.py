"""Predicted seconds of a training step of a Transformer under comm plans, with intervals, on eight
H100.

A step is the planned attention of every layer and everything else: matmuls and elementwise kernels
of fdp.price.inference, three times (forward, and twice as much backward), the same for all plans.
Nothing here was timed on several devices. Data parallelism, the optimizer and positions sent once a
step are left out, which are the same for all plans as well.

Legend: L layers, N draws of the models' errors (draw 0 is nominal).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fdp.models.shape import ModelShape
from fdp.parallel.context import planner, planner_masks
from fdp.parallel.context.planner import ModelPlan, describe, model_value, summary
from fdp.parallel.context.planner_machine import (
    ATTENTION_ERROR,
    CONGESTED,
    INFINIBAND,
    NVLINK,
    Fabric,
    machine,
    problem,
)
from fdp.parallel.context.planner_problem import Masks, Problem
from fdp.parallel.context.planner_uniform import uniform_plans
from fdp.price import inference, network
from fdp.price.shapes import named
from fdp.study.grid import Grid
from fdp.study.uncertainty import factors, interval, sigma

GQA_8B, CP, CHIP = named("llama3-8b"), 8, "h100"
LENGTHS = (2**17, 2**18, 2**19, 2**20)  # positions of simulated sequences
FABRICS, DENSITIES = (NVLINK, INFINIBAND, CONGESTED), (0.01, 0.03, 0.1, 0.3, 1.0)
SPREAD = 16.0  # densest layer over the sparsest, of synthetic masks


@dataclass(frozen=True)
class Draws:
    """Errors of a `Machine`: so many draws, the first of them nominal."""

    draws: int
    seed: int = 0

    def __call__(self, what: Any, p90: float) -> np.ndarray:
        """As `planner_machine.Errors`."""
        return factors(what, sigma(p90), self.draws, self.seed, nominal=True)


@lru_cache
def rest_seconds(model: ModelShape, seq_len: int, cp: int) -> float:
    """Seconds of everything but attention in a step of one sequence, on each of cp devices."""
    rows = seq_len // cp
    work = inference.ForwardPass(1, rows, seq_len, rows)
    terms = inference.price(model, work, inference.Degrees(1, 1), CHIP).terms
    return 3 * sum(seconds for term, seconds in terms.items() if "attention" not in term)


@dataclass(frozen=True)
class StepSeconds:
    """A step under the adaptive and the best uniform plan, and the 95 % interval of their ratio."""

    adaptive: float
    uniform: float
    low: float
    high: float
    adaptive_plan: str
    uniform_plan: str

    @property
    def ratio(self) -> float:
        """Adaptive over uniform: below 1 is faster."""
        return self.adaptive / self.uniform


def predict(model: ModelShape, found: Problem) -> StepSeconds:
    """Step time of the adaptive plan against the best uniform one, of all kinds.

    L masks stand for the model's layers, each for layers/L of them. Plans are chosen at nominal
    figures. In every draw the adaptive plan meets the best uniform plan OF THAT DRAW: errors work
    against it, and the interval may lie above 1. Errors of the matmuls outside attention count as
    well. Raises ValueError where no plan can run."""
    s, N = found.shape, len(np.atleast_1d(found.machine.flops))
    spread = sigma(inference.matmul_error(CHIP)[1])
    rest_N = rest_seconds(model, s.seq_len, s.cp) * factors("rest", spread, N, 0, nominal=True)

    def total_N(plan: ModelPlan) -> np.ndarray:
        return rest_N + model.layers / found.layers * plan.total_N

    def value(plan: ModelPlan) -> tuple[float, float]:
        return model_value(found, plan)

    adaptive, every = planner.plan(found), uniform_plans(found)
    uniform = min(every, key=value)
    low, high = interval(total_N(adaptive) / np.min([total_N(plan) for plan in every], axis=0))
    seconds = float(total_N(adaptive)[0]), float(total_N(uniform)[0])
    return StepSeconds(*seconds, low, high, summary(adaptive), describe(uniform.plans[0]))


@lru_cache(maxsize=16)  # masks keep what was counted, for all fabrics and lengths
def _masks(layers: int, blocks: int, density: float) -> Masks:
    return Masks(planner_masks.layers(layers, blocks, density, SPREAD))


def region(
    lengths: tuple[int, ...],
    draws: int,
    densities: tuple[float, ...] = DENSITIES,
    fabrics: tuple[Fabric, ...] = FABRICS,
    layers: int = 8,
    blocks: int = 512,
) -> Grid:
    """Where an adaptive plan pays: `predict` for synthetic masks, over fabrics, densities, lengths.

    A block is length/blocks positions: a mask keeps its shape at every length, which is an
    assumption. A window of fixed width would become sparser, so long sequences are priced too dear.
    Raises ValueError for sizes that do not fit."""

    def case(fabric: Fabric, density: float, length: int) -> dict[str, float]:
        on = machine(fabric, CHIP, Draws(draws))
        found = predict(GQA_8B, problem(GQA_8B, _masks(layers, blocks, density), length, CP, on))
        return {"value": found.ratio, "low": found.low, "high": found.high}

    return Grid.over(case, fabric=fabrics, density=densities, length=lengths)


def evidence() -> str:
    """What a simulated row must say of its calibration: data, held-out errors, assumptions."""
    median, p90 = network.held_out_error(CHIP, small=False, crosses=True)
    points = sum(source["points"] for source in network.document()["sources"].values())
    return (
        f"simulated {CHIP}, {INFINIBAND.name}, {INFINIBAND.local} of {CP} cp devices a node: "
        f"collectives fitted on {points:,} measured points, |error| on classes left out of the fit "
        f"median {median:.0%}, 90 % quantile {p90:.0%} (from 1 MiB); matmuls "
        f"{inference.matmul_error(CHIP)[1]:.0%}; attention kernels {ATTENTION_ERROR:.0%}, assumed: "
        "no block-sparse kernel was timed; the interval draws all three, and meets the best "
        "uniform plan of each draw; the fit's congestion, measured on one busy cluster, is left out"
    )
