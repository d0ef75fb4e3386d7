"""The planner itself: what it prices, how fast it is, and pipelines with uneven stages."""

import time
from collections.abc import Callable
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


def uneven(stages: int, microbatches: int) -> dict[str, float]:
    """Pipeline times of llama3-8b in units of a layer's time, whose head is one more layer of as
    many FLOPs: by dynamic program, by ILP, and with as many layers in every stage."""
    a = shapes.named("llama3-8b")
    layer = (a.forward_flops(8192, causal=True) - 2 * a.vocab * a.width) / a.layers
    head, even = 2 * a.vocab * a.width / layer, a.layers // stages
    times_L = np.array([1.0] * a.layers + [head])
    program, integer = (
        method(times_L, stages, microbatches).time
        for method in (partition.partition_dp, partition.partition_ilp)
    )
    equal = partition.pipeline_time([even * 1.0] * (stages - 1) + [even + head], microbatches)
    return {"program": program, "integer": integer, "equal": equal, "head": head}


def speed() -> dict[str, float]:
    """Predictions a second, and seconds to rank the whole space of 512 GPUs, of `valid` plans."""
    model = hybrid.shipped()
    best = planner.plan("llama3-70b", "h100:64x8", 1024, 8192)
    points = space.space(best.job.shape, best.cluster.size, 1024, 8192)
    priced = np.median([_seconds(ranking.price, model, best.job, points) for _ in range(3)])
    whole = _seconds(ranking.rank, model, best.job, best.cluster)
    return {"rate": space.size_of(points) / float(priced), "seconds": whole, "valid": best.valid}


def _seconds(function: Callable[..., Any], *values: Any) -> float:
    start = time.perf_counter()
    function(*values)
    return time.perf_counter() - start
