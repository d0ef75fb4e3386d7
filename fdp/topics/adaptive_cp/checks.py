"""Every exact plan against masked attention on one device, and the switched program against the
static ones.

Legend: B sequences, S positions, H query and K key/value heads, C head_dim.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from fdp.arm import Arm
from fdp.collectives import shard_map
from fdp.count import context as cost
from fdp.count import hlo
from fdp.count.compare import Comparison, Key, Sent, against_one_device, relative_error, sent
from fdp.count.gather import BlockGather, exact_capacity, listed_bytes
from fdp.grads import plain
from fdp.mesh import AXES, factor, make_mesh
from fdp.models import module
from fdp.models.transformer import Transformer, with_core
from fdp.parallel.context import gather, layouts, requests
from fdp.parallel.context.attend import attend
from fdp.parallel.context.layouts import SequenceLayout
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.masks import Mask
from fdp.sharding import shardings
from fdp.step import TrainStep, mean_loss
from fdp.topics.adaptive_cp.cores import Indexed, Listed, Sparse, Switched, by_layer, unstacked
from fdp.topics.adaptive_cp.profile import block_ids

DEVICES = 8
B, S, H, K, C = 8, 64, 8, 4, 8
CAUSAL = Mask("causal")
PLANS = tuple(
    CommPlan(kind, split, layout=layout)
    for layout in (layouts.CONTIGUOUS, layouts.ZIGZAG, layouts.SequenceLayout("striped", 4))
    for kind, split in (
        ("ring", 1),
        ("ulysses", DEVICES),
        ("usp", 2),
        ("usp", 4),
        ("all_gather", 1),
        ("batch", 2),
    )
)


def compare(plan: CommPlan) -> Comparison:
    """Two layers of causal attention, forward and backward, over cp = 8; float32."""
    mesh = factor(make_mesh(dict.fromkeys(AXES, 1) | {"cp": DEVICES}), "cp")
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.normal(size=(2, B, S, h, C)).astype(np.float32) for h in (H, K, K, H))
    order = layouts.permutation(plan.layout, S, DEVICES)

    def layers(plan: CommPlan, position: Any) -> Any:
        one = lambda _, qkv: (None, attend(qkv[0], qkv[1], qkv[2], CAUSAL, plan, position))
        return lambda *qkv: jax.lax.scan(one, None, qkv)[1]

    whole, pull = jax.vjp(layers(CommPlan(), jnp.arange(S)), q, k, v)
    expected = [np.asarray(x)[:, :, order] for x in (whole, *pull(dout))]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, pull = jax.vjp(layers(plan, layouts.positions(plan.layout, S // DEVICES)), q, k, v)
        return (out, *pull(dout))

    spec = P(None, None, "cp")
    program = jax.jit(shard_map(local, mesh, (spec,) * 4, (spec,) * 4))
    arguments = [x[:, :, order] for x in (q, k, v, dout)]
    compiled = program.lower(*arguments).compile(hlo.QUICK)
    pairs = zip(jax.device_get(compiled(*arguments)), expected, strict=True)
    errors = [relative_error(got, want) for got, want in pairs]
    shape = cost.AttentionShape(B, S, H, K, C, DEVICES, 4)
    formula: Sent = {}
    forward, backward = (f(plan, shape, CAUSAL) for f in (cost.forward_bytes, cost.backward_bytes))
    # Labels once: the scan hoists what all layers share.
    for times, part in ((2, forward), (2, backward), (1, cost.label_bytes(shape, CAUSAL))):
        for op, wire in part.items():
            formula[over_cp(op)] = formula.get(over_cp(op), 0.0) + times * wire
    counted = sent(compiled, mesh)
    return Comparison(formula, counted, str(plan), errors[0], max(errors[1:]))


def over_cp(op: str) -> Key:
    """Key of `op` over the one axis of these meshes."""
    return op, ("cp",)


@dataclass(frozen=True)
class Switching:
    """Plans as data: largest relative errors of loss and gradients over the plan arrays, and
    programs compiled.
    """

    loss_error: float
    gradient_error: float
    arrays: int
    compilations: int


def switch_plans(arm: Arm, tokens_BxS: np.ndarray) -> Switching:
    """Loss and gradients of the trained model under several plan arrays in one program, against one
    device.
    """
    kinds = (("ring", 1), ("usp", 2), ("ulysses", 8))
    plans = tuple(CommPlan(kind, u, layout=layouts.ZIGZAG) for kind, u in kinds)
    program = program_over_cp(arm, len(tokens_BxS), with_core(arm.model, Switched(plans)), P())
    expected = _on_one_device(arm, tokens_BxS, arm.model)
    return _switching(program, arm, tokens_BxS, _numbers(arm, len(plans)), expected)


def switch_listed(arm: Arm, tokens_BxS: np.ndarray, masks_NxWxW: np.ndarray) -> Switching:
    """The same with attention to measured blocks: gathers that fit, gathers that overflow, Ulysses
    and all-gather.
    """
    block = tokens_BxS.shape[1] // masks_NxWxW.shape[-1]
    plans = listed_plans(masks_NxWxW, block)
    model = with_core(arm.model, Listed(plans, block))
    program = program_over_cp(arm, len(tokens_BxS), model, CHOICE)
    expected = _listed_on_one_device(arm, tokens_BxS, masks_NxWxW)
    ids = place_ids(masks_NxWxW, block, layouts.ZIGZAG)
    choices = [(numbers, ids) for numbers in _numbers(arm, len(plans))]
    return _switching(program, arm, tokens_BxS, choices, expected)


def switch_indexed(arm: Arm, tokens_BxS: np.ndarray, blocks: int, width: int) -> Switching:
    """The same with lists made from each input: gathers of half of a device's blocks, Ulysses and
    all-gather.
    """
    block, layers = tokens_BxS.shape[1] // blocks, arm.model.shape.layers
    kinds = (
        ("gather", 1, max(blocks // DEVICES // 2, 1)),
        ("ulysses", DEVICES, 0),
        ("all_gather", 1, 0),
    )
    plans = tuple(CommPlan(kind, u, capacity=c, layout=layouts.ZIGZAG) for kind, u, c in kinds)
    model = with_core(arm.model, Indexed(plans, block, width))
    program = program_over_cp(arm, len(tokens_BxS), model, (P(), P()))
    one = with_core(arm.model, Indexed(plans[2:], block, width))
    kept = np.full(layers, width, np.int32)
    expected = _on_one_device(arm, tokens_BxS, one, (np.zeros(layers, np.int32), kept))
    choices = [(numbers, kept) for numbers in _numbers(arm, len(plans))]
    return _switching(program, arm, tokens_BxS, choices, expected)


def static_plan(arm: Arm, tokens_BxS: np.ndarray, masks_NxWxW: np.ndarray) -> Comparison:
    """The plans of `switch_listed` by turns, without the gather that overflows, as constants of the
    program. Bytes: of all-to-all, all-gather and reduce-scatter.
    """
    block, layers = tokens_BxS.shape[1] // masks_NxWxW.shape[-1], arm.model.shape.layers
    every = listed_plans(masks_NxWxW, block)
    plans = (every[0], *every[-2:])
    chosen = [plans[n] for n in _numbers(arm, len(plans))[-1]]
    model = by_layer(arm.model, [Listed((plan,), block) for plan in chosen])
    program = program_over_cp(arm, len(tokens_BxS), model, (CHOICE,) * layers)
    loss, grads = _listed_on_one_device(arm, tokens_BxS, masks_NxWxW)
    variables = arm.trained_on_host.variables
    variables = variables | {"params": unstacked(variables["params"], layers)}
    ids = place_ids(masks_NxWxW, block, layouts.ZIGZAG)
    inputs = tuple((np.zeros(1, np.int32), ids[i : i + 1]) for i in range(layers))
    given = (*_placed(program, variables, tokens_BxS), inputs)
    compiled: Any = jax.jit(program.grads).lower(*given).compile(hlo.QUICK)
    expected = loss, unstacked(grads, layers)
    errors = against_one_device(compiled(*given)[:2], expected)
    formula = _static_bytes(chosen, shape_of(arm, *tokens_BxS.shape), block, ids.shape[-1])
    counted = sent(compiled, program.mesh, {gather.SCOPE: 0})
    counted = {key: wire for key, wire in counted.items() if key in formula}
    return Comparison(formula, counted, "plans by layer", *errors)


def shape_of(arm: Arm, batch: int, seq_len: int) -> cost.AttentionShape:
    """Attention of the arm's model over DEVICES of cp."""
    return cost.AttentionShape.of(arm.model.shape, batch, seq_len, DEVICES)


def _static_bytes(
    plans: list[CommPlan], shape: cost.AttentionShape, block: int, width: int
) -> Sent:
    """Of all layers; what is the same in every layer (places, positions) is sent once. Reductions
    are left out: those of overflow counts are merged with others."""
    total = {cost.EXCHANGE: 0.0, cost.GATHER: 0.0, cost.SCATTER: 0.0}
    places = BlockGather(shape, block, 0).label_bytes(CAUSAL)[cost.GATHER]
    positions = cost.label_bytes(shape, CAUSAL)[cost.GATHER]
    whole = [plan.kind != "gather" for plan in plans]
    for plan in plans:
        for part in listed_bytes(plan, BlockGather(shape, block, plan.capacity), width, CAUSAL):
            total = {op: wire + part.get(op, 0.0) for op, wire in total.items()}
    again = (len(plans) - 1) * places + max(sum(whole) - 1, 0) * positions
    total[cost.GATHER] -= again
    return {over_cp(op): wire for op, wire in total.items()}


CHOICE = (P(), P(None, None, None, "cp"))  # specs of plan numbers [N] and block ids [N, b, k, W, L]


def listed_plans(masks_NxWxW: np.ndarray, block: int) -> tuple[CommPlan, ...]:
    """A gather that fits every layer, one of a single block, Ulysses and all-gather, zig-zag over
    DEVICES.
    """
    layout = layouts.ZIGZAG
    fits = exact_capacity(masks_NxWxW, layout, DEVICES, block)
    plans = [
        CommPlan("gather", capacity=c, layout=layout) for c in dict.fromkeys((fits, min(fits, 1)))
    ]
    return (
        *plans,
        CommPlan("ulysses", DEVICES, layout=layout),
        CommPlan("all_gather", layout=layout),
    )


def place_ids(
    masks_NxWxW: np.ndarray, block: int, layout: SequenceLayout, width: int | None = None
) -> np.ndarray:
    """Lists of all layers, shared by sequences and heads, in the order of the layout: int32 [N, 1,
    1, W, width].
    """
    width = int(masks_NxWxW.sum(-1).max()) if width is None else width
    return np.stack([requests.block_ids(m, block, layout, DEVICES, width) for m in masks_NxWxW])


def program_over_cp(arm: Arm, batch: int, model: Transformer, inputs: Any) -> TrainStep:
    """The arm's loss and step with another `model`, on a mesh of cp = DEVICES alone, factored.

    `inputs`: specs of its layer inputs.
    """
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


def _listed_on_one_device(
    arm: Arm, tokens_BxS: np.ndarray, masks_NxWxW: np.ndarray
) -> tuple[Any, Any]:
    """(mean loss, gradients) with attention to measured blocks."""
    core = Sparse(tokens_BxS.shape[1] // masks_NxWxW.shape[-1])
    return _on_one_device(arm, tokens_BxS, with_core(arm.model, core), block_ids(masks_NxWxW))


def _on_one_device(
    arm: Arm, tokens_BxS: np.ndarray, model: Transformer, inputs_N: Any = None
) -> tuple[Any, Any]:
    """(mean loss, gradients) of the trained parameters."""
    variables = arm.trained_on_host.variables

    def mean(params: Any, tokens: jax.Array, inputs_N: Any) -> jax.Array:
        noised = arm.objective.corrupt(jax.random.key(0), {"tokens": tokens})
        return mean_loss(model, arm.objective, variables | {"params": params}, noised, inputs_N)

    run = jax.jit(jax.value_and_grad(mean))
    return jax.device_get(run(variables["params"], tokens_BxS, inputs_N))


def _switching(
    program: TrainStep, arm: Arm, tokens_BxS: np.ndarray, choices: list, expected: Any
) -> Switching:
    variables, noised = _placed(program, arm.trained_on_host.variables, tokens_BxS)
    step: Any = jax.jit(program.grads, compiler_options=hlo.QUICK)
    errors = [
        against_one_device(jax.block_until_ready(step(variables, noised, choice))[:2], expected)
        for choice in choices
    ]
    return Switching(
        max(e[0] for e in errors), max(e[1] for e in errors), len(choices), step._cache_size()
    )


def _placed(
    program: TrainStep, variables: module.Variables, tokens_BxS: np.ndarray
) -> tuple[Any, Any]:
    """(variables, corrupted batch) on the program's mesh."""
    noised = jax.jit(program.corrupt)({"tokens": tokens_BxS}, jax.random.key(0))
    specs = program.specs.variable_specs()
    return jax.device_put(variables, shardings(program.mesh, specs)), noised
