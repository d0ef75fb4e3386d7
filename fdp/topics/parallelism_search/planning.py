"""The planner itself: what it prices, how fast it is, and pipelines with uneven stages."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fdp.parallel.pipeline import partition
from fdp.price import hybrid, planner, ranking, shapes, space
from fdp.price.workload import Job


def landscape(job: Job, chips: int) -> dict[str, np.ndarray]:
    """Seconds a step, bytes a device and the probability to run, of every plan of the job."""
    points = space.space(job.shape, chips, job.batch, job.seq)
    priced = ranking.price(hybrid.shipped(), job, points)
    return {"time": priced.time, "memory": priced.memory, "feasible": priced.feasible}


@dataclass(frozen=True)
class Stages:
    """Pipeline times of llama3-8b in units of a layer's time: by dynamic program, by ILP, and with
    as many layers in every stage; `head`: what its head takes."""

    program: float
    integer: float
    equal: float
    head: float
    stages: int = 4
    microbatches: int = 16


def uneven() -> Stages:
    """The head is one more layer of as many FLOPs."""
    a, p, m = shapes.named("llama3-8b"), Stages.stages, Stages.microbatches
    layer = (a.forward_flops(8192, causal=True) - 2 * a.vocab * a.width) / a.layers
    head = 2 * a.vocab * a.width / layer
    times_L = np.array([1.0] * a.layers + [head])
    program, integer = partition.partition_dp(times_L, p, m), partition.partition_ilp(times_L, p, m)
    equal = [a.layers // p * 1.0] * (p - 1) + [a.layers // p + head]
    return Stages(program.time, integer.time, partition.pipeline_time(equal, m), head)


@dataclass(frozen=True)
class Speed:
    """Warm, on this machine: predictions a second, and seconds to rank a space of `valid` plans."""

    rate: float
    seconds: float
    valid: int


def speed() -> Speed:
    """How fast plans are priced, and the whole space of 512 GPUs ranked."""
    model = hybrid.shipped()
    best = planner.plan("llama3-70b", "h100:64x8", 1024, 8192)
    points = space.space(best.job.shape, best.cluster.size, 1024, 8192)
    priced = np.median([_seconds(ranking.price, model, best.job, points) for _ in range(3)])
    whole = _seconds(ranking.rank, model, best.job, best.cluster)
    return Speed(space.size_of(points) / float(priced), whole, best.valid)


def _seconds(function: Callable[..., Any], *values: Any) -> float:
    start = time.perf_counter()
    function(*values)
    return time.perf_counter() - start
