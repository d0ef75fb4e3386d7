"""Measured seconds of the operations of a pipeline's stage, on one device.

Legend: B images of a microbatch, N repeats."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.arm import Arm
from fdp.config import UserError
from fdp.experiment import Experiment
from fdp.grads import plain
from fdp.mesh import AXES, make_mesh
from fdp.models.shape import ModelShape
from fdp.objectives.cost import CostClass, CostClasses
from fdp.parallel.pipeline.split import halves
from fdp.price import inference
from fdp.step import TrainStep, stages

KINDS = ("F", "B", "W", "BW")
REPEATS, WARM = 15, 2


@dataclass(frozen=True)
class OpCosts:
    """Of one cost class: seconds of every repeat, by kind; F also stands for R."""

    patch: int
    rows: int
    seconds: dict[str, list[float]]

    def median(self, kind: str) -> float:
        """Seconds."""
        return float(np.median(self.seconds[kind]))

    def spread(self, kind: str) -> float:
        """Between the quartiles, as a share of the median."""
        low, high = np.percentile(self.seconds[kind], [25, 75])
        return float((high - low) / self.median(kind))

    @property
    def ratio(self) -> tuple[float, float, float]:
        """F : B : W, F = 1."""
        f = self.median("F")
        return 1.0, self.median("B") / f, self.median("W") / f


def measured(arm: Arm, stages_of: int, rows: int) -> list[OpCosts]:
    """F, B, W and the fused backward of a stage, which is one of `stages_of` equal shares of the
    arm's layers, on `rows` images: for every size of patches that the model has. Kinds take turns,
    so that a slower moment of the machine meets all of them."""
    e = arm.experiment
    if e.model.shape.layers % stages_of:
        raise UserError(
            f"layers are not divisible by stages: {e.model.shape.layers} % {stages_of}; set "
            "model.layers to a multiple"
        )
    return [_of_class(e, CostClass(patch=n), stages_of, rows) for n in _patches(e)]


def _patches(e: Experiment) -> tuple[int, ...]:
    return (1, 2) if e.model.image.coarse else (1,)


def _of_class(e: Experiment, cost: CostClass, stages_of: int, rows: int) -> OpCosts:
    runs = _operations(e, cost, stages_of, rows)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for n in range(WARM + REPEATS):
        for kind, (run, given) in runs.items():
            begun = time.perf_counter()
            jax.block_until_ready(run(*given))
            if n >= WARM:
                seconds[kind].append(time.perf_counter() - begun)
    return OpCosts(cost.patch, rows, seconds)


def _operations(
    e: Experiment, cost: CostClass, stages_of: int, rows: int
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """{kind: (compiled function, arguments)} of one stage on the first device."""
    layers = e.model.shape.layers // stages_of
    model = e.model.clone(shape=replace(e.model.shape, layers=layers))
    alone = dict.fromkeys(AXES, 1)
    e = replace(e, model=model, degrees=alone, grads=plain(1), zero=0)
    e = replace(e, fit=replace(e.fit, batch=rows))
    program = TrainStep(e, make_mesh(alone, jax.local_devices()[:1]))
    # A dense model takes as long with any values.
    types = program.specs.shapes, program.specs.model_shapes
    params, state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
    noised = _noised(e, cost, rows)
    parts = stages(model, e.objective, state, 1, staged=True)
    x = parts.embed(params, noised)[0]

    def block(params: Any, x: Any) -> Any:
        y, aux, _ = parts.stack(params, x, noised)
        return y, aux

    split = halves(block, params, x)
    F = jax.jit(lambda p, x: split.forward(block, p, x)[:2])
    B = jax.jit(split.input_gradients)
    W = jax.jit(split.weight_gradients)
    BW = jax.jit(lambda p, r, dy: _fused(split, p, r, dy))
    y, residuals = F(params, x)
    dy = jnp.ones_like(y)
    _, stash = B(params, residuals, dy)
    given = (params, residuals, dy)
    return {"F": (F, (params, x)), "B": (B, given), "W": (W, (params, stash)), "BW": (BW, given)}


def _fused(split: Any, params: Any, residuals: Any, dy: Any) -> Any:
    dx, stash = split.input_gradients(params, residuals, dy)
    return dx, split.weight_gradients(params, stash)


def _noised(e: Experiment, cost: CostClass, rows: int) -> Any:
    """A batch of one class."""
    objective: Any = e.objective
    image = e.model.image
    x = jnp.zeros((rows, image.size, image.size, image.channels))
    noise = jax.random.normal(jax.random.key(0), x.shape)
    noised = objective.noised(x, noise, jnp.ones(rows))
    return noised | {"labels": jnp.zeros(rows, jnp.int32), "cost": CostClasses((cost,))}


def predicted(shape: ModelShape, tokens: int, images: int, chip: str) -> tuple[float, float, float]:
    """Seconds of F, B, W of all layers of `shape` on a chip of `fdp.price`, for bidirectional
    attention over so many tokens of each image. B repeats the products of F and recomputes the
    scores, so attention takes three times as long; W repeats the products that have weights. The
    price knows gated FFNs only: one of two thirds of the width has the same products."""
    if not shape.gated:
        shape = replace(shape, gated=True, ffn=2 * shape.ffn // 3)
    shape = replace(shape, time_conditioning=False, bias=False)
    work = inference.ForwardPass(images, tokens, tokens, 1)
    terms = inference.price(shape, work, inference.Degrees(1, 1), chip).terms
    products = terms["matmul compute"] + terms["matmul memory"]
    attention = terms["attention compute"] + terms["attention memory"]
    rest = terms["elementwise"] + terms["launch"]
    return products + attention + rest, products + 3 * attention + rest, products
