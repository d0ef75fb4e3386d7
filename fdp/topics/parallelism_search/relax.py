"""Gradient descent over real-valued degrees, then rounding: the search that ranking every plan
makes unnecessary.

tp·pp·cp·dp = chips is kept by log2 degree = log2(chips)·softmax(z); the objective is the smooth
analytic log time with a penalty on memory. A relaxed optimum may lie between plans (fractional
degrees are rewarded), so what counts is the rounded plan at its exact price: it is one of the
ranked plans and cannot beat the best of them.

Legend: N starts, D = 4 degrees (tp, pp, cp, dp).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdp.cost import footprint, hybrid, step_time, workload
from fdp.cost.hybrid import Model
from fdp.cost.workload import RECOMPUTE, Columns, Job, Plan
from fdp.topics.parallelism_search.plan import KEYS, LIKELY, Space, plan_at, price, size_of, space

Array = Any
DEGREES = ("tp", "pp", "cp", "dp")
PENALTY = 5.0  # of log time per unit of log memory above the limit


@dataclass(frozen=True)
class Relaxation:
    """Rounded plans of every start, their seconds at the exact price, and the best ranked
    seconds.
    """

    plans: tuple[Plan, ...]
    time_N: np.ndarray
    best: float

    @property
    def gap(self) -> float:
        """How much slower the best rounded plan is than the best ranked one: ≥ 0."""
        return float(self.time_N.min() / self.best - 1)


def with_degrees(x: Mapping[str, Array], log2_NxD: Array) -> dict[str, Array]:
    """Columns with real-valued degrees and what follows from them."""
    degrees = {name: 2.0 ** log2_NxD[:, i] for i, name in enumerate(DEGREES)}
    microbatches = jnp.maximum(x["batch"] / (degrees["dp"] * x["microbatch"]), 1.0)
    return (
        dict(x) | degrees | {"microbatches": microbatches, "shards": degrees["dp"] * degrees["cp"]}
    )


def log_time(model: Model, x: Columns, log2_NxD: Array) -> Array:
    """Analytic log seconds (N,) of the jobs `x` at log2 (tp, pp, cp, dp), smooth in them: d/d log2
    by `jax.grad`.
    """
    y = with_degrees(hybrid.numeric(x), log2_NxD)
    k = hybrid.time_coefficients(y, model.time, hybrid.shifts(model.effects, hybrid.groups_of(x)))
    return jnp.log(step_time.step_time(y, k, smooth=True)["total"])


def objective(model: Model, x: Columns, log2_NxD: Array) -> Array:
    """What is descended (N,): `log_time` and a penalty where memory exceeds what probably runs."""
    shift = hybrid.shifts(model.memory_effects, hybrid.groups_of(x))
    k = hybrid.bounded(
        {n: model.memory[n] + shift.get(n, 0.0) for n in footprint.BOUNDS}, footprint.BOUNDS
    )
    pressure = jnp.log(
        footprint.memory(with_degrees(hybrid.numeric(x), log2_NxD), k) / x["hbm_bytes"]
    )
    return log_time(model, x, log2_NxD) + PENALTY * jax.nn.relu(pressure - model.fit["margin"])


def descend(
    model: Model, job: Job, starts: Sequence[Plan], steps: int = 200, rate: float = 0.05
) -> np.ndarray:
    """Relaxed log2 degrees (N, D) after Adam from every start; microbatch, recomputation, ZeRO stay
    as they are.
    """
    chips = starts[0].chips
    if any(p.chips != chips for p in starts):
        raise ValueError(
            f"starts use {sorted({p.chips for p in starts})} chips: give plans of one number of "
            "chips"
        )
    x = workload.columns(workload.with_plan(job, **vars(p)) for p in starts)
    log2_NxD = np.log2([[getattr(p, name) for name in DEGREES] for p in starts])
    z_NxD = jnp.log(jnp.asarray(np.maximum(log2_NxD, 0.1)))
    optimizer = optax.adam(rate)

    def loss(z: Array) -> Array:
        return objective(model, x, np.log2(chips) * jax.nn.softmax(z)).sum()

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        z, state = carry
        update, state = optimizer.update(jax.grad(loss)(z), state)
        return (optax.apply_updates(z, update), state), None

    (z_NxD, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(
        (z_NxD, optimizer.init(z_NxD))
    )
    return np.asarray(np.log2(chips) * jax.nn.softmax(z_NxD))


def _nearest(points: Space, start: Plan, log2_D: np.ndarray) -> int:
    """The plan of the space closest to the relaxed degrees that keeps the rest of the start where
    it can.
    """
    far = sum((np.log2(points[name]) - log2_D[i]) ** 2 for i, name in enumerate(DEGREES))
    for name in KEYS:
        if name not in DEGREES:
            kept = RECOMPUTE.index(start.recompute) if name == "recompute" else getattr(start, name)
            far = far + 0.25 * (np.log2(points[name] + 1) - np.log2(kept + 1)) ** 2
    return int(np.argmin(far))


def relax(model: Model, job: Job, starts: Sequence[Plan], steps: int = 200) -> Relaxation:
    """Descend from every start, round to the nearest plan that probably runs, and price it exactly.

    The job carries chip and domain, as `plan.job_on` sets them. Raises ValueError where the starts
    use different numbers of chips, or no plan of that number probably runs."""
    log2_NxD = descend(model, job, starts, steps)
    points = space(job.architecture, starts[0].chips, job.batch, job.seq)
    p = price(model, job, points)
    likely = p.feasible >= LIKELY
    if not likely.any():
        raise ValueError(
            f"none of {size_of(points)} plans on {starts[0].chips} chips probably runs: take more "
            "chips"
        )
    runs, time = {k: v[likely] for k, v in points.items()}, p.time[likely]
    index = [_nearest(runs, start, log2_D) for start, log2_D in zip(starts, log2_NxD, strict=True)]
    return Relaxation(tuple(plan_at(runs, i) for i in index), time[index], float(time.min()))
