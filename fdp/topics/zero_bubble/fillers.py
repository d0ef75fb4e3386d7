"""What idle slots of a pipeline can compute: stable targets of the next batch, from data alone.

Legend: B images, N reference images, H rows, W columns, C channels, p devices, m microbatches."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.arm import Arm
from fdp.objectives import Flow
from fdp.objectives.base import Batch, Objective
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.evaluate import Evaluation, evaluate
from fdp.parallel.pipeline.library import named
from fdp.parallel.pipeline.orders import Op, Order
from fdp.topics.zero_bubble.op_costs import OpCosts


class References:
    """Images f32 [N, H, W, C] and labels int32 [N] from which a mean is taken; compared by
    identity, as a part of an objective has to be."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels


@dataclass(frozen=True)
class StableFlow(Flow):
    """Rectified flow towards stable targets (Xu, Tong & Jaakkola 2023, eq. 7).

    The clean image in the target becomes the mean of the sample's own and `n` reference images of
    its class (of all classes without a label), drawn for every step, weighed by how likely each
    gave the noisy image. The target has less variance, and its mean is off by as little as the
    references are many."""

    references: References | None = None
    n: int = 256

    def corrupt(self, key: jax.Array, batch: Batch) -> Any:
        """As `Flow.corrupt`, the targets replaced."""
        found = super().corrupt(key, batch)
        if self.references is None:
            return found
        sigma_B, c = found["sigma"], self.coefficients(found["sigma"])
        skip, out, scale = (x[:, None, None, None] for x in (c.c_skip, c.c_out, c.c_in))
        z = found["inputs"] / scale
        own = skip * z + out * found["rows"]
        mean = self._mean(jax.random.fold_in(key, 1), z, own, sigma_B, found["labels"])
        return found | {"rows": (mean - skip * z) / out}

    def _mean(self, key: jax.Array, z: Any, own: Any, sigma_B: Any, labels_B: Any) -> jax.Array:
        """E[x | z] over the own image and the references."""
        r = self.references
        assert r is not None
        chosen = jax.random.permutation(key, len(r.images))[: self.n]
        images, labels_N = jnp.asarray(r.images)[chosen], jnp.asarray(r.labels)[chosen]
        n, flat = len(z), images.reshape(len(images), -1)
        there = z.reshape(n, -1)
        gaps = (there**2).sum(1)[:, None] - 2 * there @ flat.T + (flat**2).sum(1)
        first = ((there - own.reshape(n, -1)) ** 2).sum(1)
        allowed = (labels_B[:, None] == labels_N) | (labels_B == self.classes)[:, None]
        logits = jnp.concatenate([first[:, None], jnp.where(allowed, gaps, jnp.inf)], 1)
        weights = jax.nn.softmax(-logits / (2 * sigma_B[:, None] ** 2), axis=1)
        mean = weights[:, :1] * own.reshape(n, -1) + weights[:, 1:] @ flat
        return mean.reshape(z.shape)


def stable(objective: Objective, references: References, n: int) -> StableFlow:
    """`objective` with stable targets. Raises ValueError for one that is not rectified flow."""
    if type(objective) is not Flow:
        raise ValueError(
            f"stable targets are built for rectified flow, not {type(objective).__name__}: set "
            "objective.name='flow'"
        )
    return StableFlow(**vars(objective), references=references, n=n)


def without(objective: Objective) -> Objective:
    """The objective that a filler replaced, by which all arms are judged."""
    return replace(objective, references=None) if isinstance(objective, StableFlow) else objective


# In the idle slots of a schedule
# -------------------------------------------------------------------------------------------------

PIECES = 4  # of the targets of a microbatch
REPEATS, WARM = 15, 2


@dataclass(frozen=True)
class Growth:
    """Of a step of p stages and m microbatches with stable targets in its idle slots. targets, F:
    measured seconds for one microbatch, of all stages and of one. bubble: before. share: of the
    makespan."""

    p: int
    m: int
    targets: float
    F: float
    bubble: float
    share: float


def growth(arm: Arm, p: int, timed: Sequence[OpCosts], m: int = 8) -> Growth:
    """What the targets cost a searched schedule at the op costs of the finest patches. Every device
    computes a p-th of the targets of the next step."""
    t = timed[0]
    f, b, w = (t.median(kind) for kind in ("F", "B", "W"))
    seconds = target_seconds(arm, t.rows)
    order, costs = named("searched", p, m), Costs(f, b, w)
    _, share = filled(order, costs, m * seconds / p, m * PIECES)
    return Growth(p, m, seconds, f, evaluate(order, costs).bubble, share)


def target_seconds(arm: Arm, rows: int) -> float:
    """What it takes longer to corrupt `rows` images with stable targets, on the first device: the
    difference of medians of repeats that take turns."""
    batch = jax.device_put(arm.data.train.take(range(rows)), jax.local_devices()[0])
    key = jax.random.key(0)
    runs = [jax.jit(o.corrupt) for o in (arm.objective, without(arm.objective))]
    seconds: list[list[float]] = [[], []]
    for _ in range(WARM + REPEATS):
        for run, found in zip(runs, seconds, strict=True):
            begun = time.perf_counter()
            jax.block_until_ready(run(key, batch))
            found.append(time.perf_counter() - begun)
    with_targets, plain = (float(np.median(x[WARM:])) for x in seconds)
    return max(0.0, with_targets - plain)


def filled(order: Order, costs: Costs, seconds: float, pieces: int) -> tuple[Evaluation, float]:
    """The order with `seconds` of work on every device, cut into equal pieces which nothing waits
    for, in its idle slots, and the growth of its makespan as a share. What fits into no slot comes
    last, where a device waits for the end of the step."""
    before = evaluate(order, costs)
    costs = replace(costs, AUX=seconds / pieces)
    ops = tuple(_filled(before, i, seconds / pieces, pieces) for i in range(order.placement.p))
    after = evaluate(Order(order.placement, ops, order.steps), costs)
    return after, after.makespan / before.makespan - 1


def _filled(result: Evaluation, i: int, each: float, pieces: int) -> tuple[Op, ...]:
    """The operations of a device; pieces go into its gaps as they come."""
    found: list[Op] = []
    end, left = 0.0, pieces
    for op, start, timed in zip(
        result.order.ops[i], result.start[i], result.program.ops[i], strict=True
    ):
        fit = min(left, int((start - end) / each * (1 + 1e-9))) if each else left
        found += [Op("AUX", pieces - left + n) for n in range(fit)]
        left -= fit
        found.append(op)
        end = start + timed[0]
    return (*found, *(Op("AUX", pieces - left + n) for n in range(left)))
