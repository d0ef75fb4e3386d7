"""Comm plans as data of one compiled program (`cores`), and as constants of another, against one
device: loss, gradients and bytes of a trained model.

Legend: B sequences, S positions, N layers, W blocks of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from fdp import process
from fdp.arm import Arm
from fdp.count import context as cost
from fdp.count import hlo
from fdp.count.blocks import BlockCounts
from fdp.count.compare import Comparison, Sent, against_one_device, sent
from fdp.count.gather import BlockGather, listed_bytes
from fdp.grads import plain
from fdp.mesh import AXES, factor, make_mesh
from fdp.models import module
from fdp.models.transformer import Transformer, with_core
from fdp.parallel.context import gather, requests
from fdp.parallel.context.cores import Indexed, Listed, Sparse, Switched, by_layer, unstacked
from fdp.parallel.context.layouts import ZIGZAG
from fdp.parallel.context.plan import CommPlan
from fdp.sharding import shardings
from fdp.step import TrainStep, mean_loss
from fdp.study.context_exactness import CAUSAL, DEVICES, over_cp

CHOICE = (P(), P(None, None, None, "cp"))  # specs of plan numbers [N] and block ids [N, b, k, W, L]
WHOLE = CommPlan("ulysses", DEVICES, layout=ZIGZAG), CommPlan("all_gather", layout=ZIGZAG)


@dataclass(frozen=True)
class Switching:
    """Plans as data: largest relative errors of loss and gradients over the plan arrays, and
    programs compiled."""

    loss_error: float
    gradient_error: float
    arrays: int
    compilations: int


# Plans as data
# -------------------------------------------------------------------------------------------------


def switch_plans(arm: Arm) -> Switching:
    """Loss and gradients of the trained model under several plan arrays in one program, against one
    device."""
    kinds = (("ring", 1), ("usp", 2), ("ulysses", 8))
    plans = tuple(CommPlan(kind, u, layout=ZIGZAG) for kind, u in kinds)
    program = program_over_cp(arm, 2, with_core(arm.model, Switched(plans)), P())
    return _switching(program, arm, _numbers(arm, len(plans)), _on_one_device(arm, arm.model))


def switch_listed(arm: Arm, masks_NxWxW: np.ndarray) -> tuple[Switching, Comparison]:
    """The same with attention to measured blocks: gathers that fit, gathers that overflow, Ulysses
    and all-gather; and beside it these plans by turns, without the gather that overflows, as
    constants of a program (bytes: of all-to-all, all-gather and reduce-scatter)."""
    block = arm.experiment.input_length // masks_NxWxW.shape[-1]
    plans, ids = listed_plans(masks_NxWxW, block), place_ids(masks_NxWxW, block)
    expected = _on_one_device(arm, with_core(arm.model, Sparse(block)), block_ids(masks_NxWxW))
    program = program_over_cp(arm, 2, with_core(arm.model, Listed(plans, block)), CHOICE)
    choices = [(numbers, ids) for numbers in _numbers(arm, len(plans))]
    fixed = _static(arm, (plans[0], *WHOLE), ids, block, expected)
    return _switching(program, arm, choices, expected), fixed


def switch_indexed(arm: Arm, blocks: int, width: int) -> Switching:
    """The same with lists of `width` blocks made from each input: gathers of half of a device's
    blocks, Ulysses and all-gather."""
    block, layers = arm.experiment.input_length // blocks, arm.model.shape.layers
    half = CommPlan("gather", capacity=max(blocks // DEVICES // 2, 1), layout=ZIGZAG)
    plans = (half, *WHOLE)
    program = program_over_cp(
        arm, 2, with_core(arm.model, Indexed(plans, block, width)), (P(), P())
    )
    one = with_core(arm.model, Indexed(plans[2:], block, width))
    kept = np.full(layers, width, np.int32)
    expected = _on_one_device(arm, one, (np.zeros(layers, np.int32), kept))
    choices = [(numbers, kept) for numbers in _numbers(arm, len(plans))]
    return _switching(program, arm, choices, expected)


def listed_plans(masks_NxWxW: np.ndarray, block: int) -> tuple[CommPlan, ...]:
    """A gather that fits every layer, one of a single block, Ulysses and all-gather, zig-zag over
    DEVICES."""
    fits = BlockCounts.laid_out(masks_NxWxW, ZIGZAG, DEVICES, block).capacity
    sizes = dict.fromkeys((fits, min(fits, 1)))
    return (*(CommPlan("gather", capacity=c, layout=ZIGZAG) for c in sizes), *WHOLE)


def block_ids(masks_NxWxW: np.ndarray, width: int | None = None) -> np.ndarray:
    """The masks as lists of ascending key blocks, -1 unused: int32 [N, W, width]; None = the
    longest of any layer.
    """
    width = int(masks_NxWxW.sum(-1).max()) if width is None else width
    return np.stack([requests.block_ids(mask, 1, width=width)[0, 0] for mask in masks_NxWxW])


def place_ids(masks_NxWxW: np.ndarray, block: int, width: int | None = None) -> np.ndarray:
    """Lists of all layers, shared by sequences and heads, in zig-zag order: int32 [N, 1, 1, W,
    width]."""
    width = int(masks_NxWxW.sum(-1).max()) if width is None else width
    return np.stack([requests.block_ids(m, block, ZIGZAG, DEVICES, width) for m in masks_NxWxW])


def program_over_cp(arm: Arm, batch: int, model: Transformer, inputs: Any) -> TrainStep:
    """The arm's loss and step with another `model`, on a mesh of cp = DEVICES alone, factored.

    `inputs`: specs of its layer inputs."""
    e = arm.experiment
    degrees = dict.fromkeys(AXES, 1) | {"cp": DEVICES}
    fit = replace(e.fit, batch=batch)
    e = replace(e, model=model, degrees=degrees, zero=0, grads=plain(1), fit=fit)
    return TrainStep(e, factor(make_mesh(degrees), "cp"), inputs)


def _numbers(arm: Arm, plans: int) -> list[np.ndarray]:
    """Every plan in all layers, and all of them by turns."""
    layers = arm.model.shape.layers
    uniform = [np.full(layers, i, np.int32) for i in range(plans)]
    return [*uniform, np.arange(layers, dtype=np.int32) % plans]


def _switching(program: TrainStep, arm: Arm, choices: Sequence[Any], expected: Any) -> Switching:
    variables, noised = _placed(program, arm, arm.trained_on_host.variables)
    step: Any = jax.jit(program.grads, compiler_options=hlo.QUICK)
    found = (jax.block_until_ready(step(variables, noised, choice))[:2] for choice in choices)
    errors = np.array([against_one_device(got, expected) for got in found]).max(0)
    return Switching(float(errors[0]), float(errors[1]), len(choices), step._cache_size())


# Plans as constants
# -------------------------------------------------------------------------------------------------


def _static(
    arm: Arm, plans: Sequence[CommPlan], ids: np.ndarray, block: int, expected: Any
) -> Comparison:
    """One of `plans` in each layer, by turns."""
    layers = arm.model.shape.layers
    chosen = [plans[n] for n in _numbers(arm, len(plans))[-1]]
    model = by_layer(arm.model, [Listed((plan,), block) for plan in chosen])
    program = program_over_cp(arm, 2, model, (CHOICE,) * layers)
    variables = arm.trained_on_host.variables
    variables = variables | {"params": unstacked(variables["params"], layers)}
    inputs = tuple((np.zeros(1, np.int32), ids[i : i + 1]) for i in range(layers))
    given = (*_placed(program, arm, variables), inputs)
    compiled: Any = jax.jit(program.grads).lower(*given).compile(hlo.QUICK)
    want = expected[0], unstacked(expected[1], layers)
    errors = against_one_device(compiled(*given)[:2], want)
    formula = _static_bytes(chosen, shape_of(arm, 2), block, ids.shape[-1])
    counted = sent(compiled, program.mesh, {gather.SCOPE: 0})
    counted = {key: wire for key, wire in counted.items() if key in formula}
    return Comparison(formula, counted, "plans by layer", *errors)


def shape_of(arm: Arm, batch: int) -> cost.AttentionShape:
    """Attention of the arm's model over DEVICES of cp."""
    return cost.AttentionShape.of(arm.model.shape, batch, arm.experiment.input_length, DEVICES)


def _static_bytes(
    plans: list[CommPlan], shape: cost.AttentionShape, block: int, width: int
) -> Sent:
    """Of all layers; what is the same in every layer (places, positions) is sent once. Reductions
    are left out: those of overflow counts are merged with others."""
    total = {cost.EXCHANGE: 0.0, cost.GATHER: 0.0, cost.SCATTER: 0.0}
    places = BlockGather(shape, block, 0).label_bytes(CAUSAL)[cost.GATHER]
    positions = cost.label_bytes(shape, CAUSAL)[cost.GATHER]
    whole = sum(plan.kind != "gather" for plan in plans)
    for plan in plans:
        for part in listed_bytes(plan, BlockGather(shape, block, plan.capacity), width, CAUSAL):
            total = {op: wire + part.get(op, 0.0) for op, wire in total.items()}
    total[cost.GATHER] -= (len(plans) - 1) * places + max(whole - 1, 0) * positions
    return {over_cp(op): wire for op, wire in total.items()}


# One device
# -------------------------------------------------------------------------------------------------


def _tokens(arm: Arm) -> np.ndarray:
    return arm.data.val.take([0, 1])["tokens"]


def _on_one_device(arm: Arm, model: Transformer, inputs_N: Any = None) -> tuple[Any, Any]:
    """(mean loss, gradients) of the trained parameters."""
    variables = arm.trained_on_host.variables

    def mean(params: Any, tokens: jax.Array, inputs_N: Any) -> jax.Array:
        noised = arm.objective.corrupt(jax.random.key(0), {"tokens": tokens})
        return mean_loss(model, arm.objective, variables | {"params": params}, noised, inputs_N)

    run = jax.jit(jax.value_and_grad(mean))
    return jax.device_get(run(variables["params"], _tokens(arm), inputs_N))


def _placed(program: TrainStep, arm: Arm, variables: module.Variables) -> tuple[Any, Any]:
    """(variables, corrupted batch) on the program's mesh."""
    noised = jax.jit(program.corrupt)({"tokens": _tokens(arm)}, jax.random.key(0))
    specs = program.specs.variable_specs()
    return process.place(variables, shardings(program.mesh, specs)), noised
