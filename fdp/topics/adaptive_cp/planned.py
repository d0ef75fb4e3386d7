"""What the planner makes of measured masks: the plan of every layer, its price, what devices need
of one another, and what other methods would send.

Legend: N layers, W blocks of a sequence, D devices.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fdp.parallel.context import planner
from fdp.parallel.context.planner import describe, summary
from fdp.parallel.context.planner_machine import INFINIBAND, machine, problem
from fdp.parallel.context.planner_methods import Method, methods, needs
from fdp.parallel.context.planner_problem import Problem
from fdp.parallel.context.planner_uniform import uniform_any
from fdp.topics.adaptive_cp.measured import Measured
from fdp.topics.adaptive_cp.predict import CP, GQA_8B, LENGTHS, Draws, StepSeconds, predict

FAR = LENGTHS[0]  # positions of the simulated sequence
BALANCE = 1.1


def problem_of(masks_NxWxW: np.ndarray, objective: str, draws: int = 1) -> Problem:
    """What is planned: the measured masks, scaled up, as layers of Llama-8B shape (32 query, 8 key
    heads) at FAR tokens over eight devices on InfiniBand, bfloat16, with max/mean FLOPs of at most
    BALANCE."""
    on = machine(INFINIBAND, errors=Draws(draws))
    return problem(GQA_8B, masks_NxWxW, FAR, CP, on, objective, balance=BALANCE)


@dataclass(frozen=True)
class PlannedLayer:
    """Plan of a layer in words, wire bytes, nominal seconds of the busiest device's attention and
    of exposed communication."""

    plan: str
    bytes: float
    compute: float
    exposed: float


@dataclass(frozen=True)
class Planned:
    """Plans of a model's masks for bytes, and its step times where they are planned for time."""

    layers: list[PlannedLayer]
    bytes: float
    uniform_bytes: float
    imbalance: float
    plans: str
    uniform_plan: str
    step: StepSeconds
    methods: list[Method]
    units_NxDxD: np.ndarray
    needs: list[dict[str, Any]]


def planned(measured: Measured) -> Planned:
    """Everything that the planner says of a model's masks."""
    masks_NxWxW = measured.masks_NxWxW
    found = problem_of(masks_NxWxW, "bytes")
    best, bar = planner.plan(found), uniform_any(found)
    layers = [
        PlannedLayer(
            describe(at.plan), at.price.wire, float(at.price.compute_N[0]), at.price.exposed
        )
        for at in best.layers
    ]
    names = summary(best), describe(bar.plans[0])
    step = predict(GQA_8B, problem_of(masks_NxWxW, "seconds", draws=200))
    numbers = best.bytes, bar.bytes, best.imbalance
    return Planned(layers, *numbers, *names, step, methods(found), *needs(found, LENGTHS))
