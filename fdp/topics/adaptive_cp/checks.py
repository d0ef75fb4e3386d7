"""Every exact plan against masked attention on one device, and the switched program against the
static ones.

Legend: B sequences, S positions, H query and K key/value heads, C head_dim.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from fdp.arm import Arm
from fdp.collectives import shard_map
from fdp.cost import context as cost
from fdp.cost import hlo
from fdp.cost.context_gather import BlockGather, exact_capacity, listed_bytes
from fdp.kernels_pallas.masks import Mask
from fdp.mesh import AXES, factor, make_mesh
from fdp.models.attention import Mixer
from fdp.parallel import context_gather, layouts
from fdp.parallel.context import CommPlan, attend
from fdp.parallel.layouts import SequenceLayout
from fdp.step import Program, loss_sum
from fdp.topics.adaptive_cp.mixers import Planned, indexed, listed, sparse, switched
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


@dataclass(frozen=True)
class Comparison:
    """One plan against one device: relative errors, and wire bytes per op counted in the HLO and by
    formula.
    """

    plan: CommPlan
    forward_error: float
    gradient_error: float
    counted: dict[str, float]
    formula: dict[str, float]

    def mismatches(self) -> int:
        """Ops whose bytes differ."""
        ops = self.counted.keys() | self.formula.keys()
        return sum(
            not math.isclose(self.counted.get(op, 0), self.formula.get(op, 0), rel_tol=1e-12)
            for op in ops
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
    errors = [
        float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))
        for a, b in zip(compiled(*arguments), expected, strict=True)
    ]
    counted: dict[str, float] = {}
    for found in hlo.collectives(str(compiled.as_text()), dict(mesh.shape)):
        counted[found.op] = counted.get(found.op, 0.0) + found.wire_bytes * found.count
    shape = cost.AttentionShape(B, S, H, K, C, DEVICES, 4)
    formula = {op: 2 * wire for op, wire in cost.forward_bytes(plan, shape, CAUSAL).items()}
    for op, wire in cost.backward_bytes(plan, shape, CAUSAL).items():
        formula[op] = formula.get(op, 0.0) + 2 * wire
    for op, wire in cost.label_bytes(
        shape, CAUSAL
    ).items():  # once: the scan hoists what all layers share
        formula[op] = formula.get(op, 0.0) + wire
    return Comparison(plan, errors[0], max(errors[1:]), counted, formula)


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
    plans = tuple(
        CommPlan(kind, u, layout=layouts.ZIGZAG)
        for kind, u in (("ring", 1), ("usp", 2), ("ulysses", 8))
    )
    program = program_over_cp(arm, len(tokens_BxS), switched(plans), layouts.ZIGZAG, P())
    expected = _on_one_device(arm, tokens_BxS, arm.model)
    return _switching(program, arm, tokens_BxS, _numbers(arm, len(plans)), expected)


def switch_listed(arm: Arm, tokens_BxS: np.ndarray, masks_NxWxW: np.ndarray) -> Switching:
    """The same with attention to measured blocks: gathers that fit, gathers that overflow, Ulysses
    and all-gather.
    """
    block, layout = tokens_BxS.shape[1] // masks_NxWxW.shape[-1], layouts.ZIGZAG
    program = program_over_cp(
        arm, len(tokens_BxS), listed(listed_plans(masks_NxWxW, block), block), layout, CHOICE
    )
    one: Any = arm.model.clone(mixer=sparse(block))
    expected = _on_one_device(arm, tokens_BxS, one, jnp.asarray(block_ids(masks_NxWxW)))
    ids = place_ids(masks_NxWxW, block, layout)
    choices = [(numbers, ids) for numbers in _numbers(arm, len(listed_plans(masks_NxWxW, block)))]
    return _switching(program, arm, tokens_BxS, choices, expected)


def switch_indexed(arm: Arm, tokens_BxS: np.ndarray, blocks: int, width: int) -> Switching:
    """The same with lists made from each input: gathers of half of a device's blocks, Ulysses and
    all-gather.
    """
    block, layout, layers = tokens_BxS.shape[1] // blocks, layouts.ZIGZAG, arm.c.model.layers
    kinds = (
        ("gather", 1, max(blocks // DEVICES // 2, 1)),
        ("ulysses", DEVICES, 0),
        ("all_gather", 1, 0),
    )
    plans = tuple(CommPlan(kind, u, capacity=c, layout=layout) for kind, u, c in kinds)
    program = program_over_cp(
        arm, len(tokens_BxS), indexed(plans, block, width), layout, (P(), P())
    )
    one: Any = arm.model.clone(mixer=indexed(plans[2:], block, width))
    kept = np.full(layers, width, np.int32)
    expected = _on_one_device(
        arm, tokens_BxS, one, (jnp.zeros(layers, jnp.int32), jnp.asarray(kept))
    )
    choices = [(numbers, kept) for numbers in _numbers(arm, len(plans))]
    return _switching(program, arm, tokens_BxS, choices, expected)


@dataclass(frozen=True)
class Static:
    """A program compiled for one plan of every layer: relative errors against one device, and wire
    bytes over cp by op (all-to-all, all-gather, reduce-scatter), counted in the HLO and by
    formula."""

    loss_error: float
    gradient_error: float
    counted: dict[str, float]
    formula: dict[str, float]

    @property
    def mismatches(self) -> int:
        """Ops whose bytes differ."""
        return sum(
            not math.isclose(self.counted.get(op, 0), wire, rel_tol=1e-12)
            for op, wire in self.formula.items()
        )


def static_plan(arm: Arm, tokens_BxS: np.ndarray, masks_NxWxW: np.ndarray) -> Static:
    """The plans of `switch_listed` by turns, without the gather that overflows, as constants of the
    program.
    """
    block, layout = tokens_BxS.shape[1] // masks_NxWxW.shape[-1], layouts.ZIGZAG
    every = listed_plans(masks_NxWxW, block)
    plans = (every[0], *every[-2:])
    numbers, ids = _numbers(arm, len(plans))[-1], place_ids(masks_NxWxW, block, layout)
    program = program_over_cp(
        arm, len(tokens_BxS), listed(plans, block), layout, CHOICE[1], numbers
    )
    one: Any = arm.model.clone(mixer=sparse(block))
    expected = _on_one_device(arm, tokens_BxS, one, jnp.asarray(block_ids(masks_NxWxW)))
    params, batch = _placed(program, arm, tokens_BxS)
    compiled: Any = jax.jit(program.grads).lower(params, batch, ids).compile(hlo.QUICK)
    errors = _errors(compiled(params, batch, ids), expected)
    counted: dict[str, float] = {}
    for found in hlo.collectives(
        str(compiled.as_text()), dict(program.mesh.shape), {context_gather.SCOPE: 0}
    ):
        counted[found.op] = counted.get(found.op, 0.0) + found.wire_bytes * found.count
    formula = _static_bytes(
        [plans[n] for n in numbers], shape_of(arm, *tokens_BxS.shape), block, ids.shape[-1]
    )
    return Static(*errors, counted, formula)


def shape_of(arm: Arm, batch: int, seq_len: int) -> cost.AttentionShape:
    """Attention of the arm's model over DEVICES of cp."""
    m = arm.c.model
    itemsize = jnp.dtype(m.dtype).itemsize
    return cost.AttentionShape(batch, seq_len, m.heads, m.kv_heads, m.head_dim, DEVICES, itemsize)


def _static_bytes(
    plans: list[CommPlan], shape: cost.AttentionShape, block: int, width: int
) -> dict[str, float]:
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
    return total | {cost.GATHER: total[cost.GATHER] - again}


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
    return np.stack(
        [context_gather.block_ids(m, block, layout, DEVICES, width) for m in masks_NxWxW]
    )


def program_over_cp(
    arm: Arm, batch: int, mixer: Mixer, layout: SequenceLayout, choice: Any, numbers: Any = None
) -> Program:
    """The arm's loss and step with `mixer` for attention, on a mesh of cp = DEVICES alone,
    factored.

    `numbers`: plans of the layers, as constants of the program.
    """
    c = arm.c.copy_and_resolve_references()
    c.mesh.update(dict.fromkeys(AXES, 1) | {"cp": DEVICES})
    c.train.update(batch=batch, microbatches=1, zero=0)
    model = arm.model.clone(mixer=mixer, plan=CommPlan("all_gather", layout=layout))
    if numbers is not None:
        model = Planned.of(model, numbers)
    return Program(c, model, arm.objective, factor(make_mesh(c.mesh), "cp"), choice)


def _numbers(arm: Arm, plans: int) -> list[np.ndarray]:
    """Every plan in all layers, and all of them by turns."""
    layers = arm.c.model.layers
    uniform = [np.full(layers, i, np.int32) for i in range(plans)]
    return [*uniform, np.arange(layers, dtype=np.int32) % plans]


def _on_one_device(
    arm: Arm, tokens_BxS: np.ndarray, model: Any, choice_N: Any = None
) -> tuple[Any, Any]:
    """(mean loss, gradients) of the trained parameters."""
    batch = arm.objective.corrupt(jax.random.key(0), jnp.asarray(tokens_BxS))
    mean = lambda p: loss_sum(model, arm.objective, None, p, batch, choice_N) / tokens_BxS.size
    return jax.device_get(jax.jit(jax.value_and_grad(mean))(jax.device_get(arm.trained.params)))


def _switching(
    program: Program, arm: Arm, tokens_BxS: np.ndarray, choices: list, expected: Any
) -> Switching:
    params, batch = _placed(program, arm, tokens_BxS)
    step: Any = jax.jit(program.grads, compiler_options=hlo.QUICK)
    errors = [
        _errors(jax.block_until_ready(step(params, batch, choice)), expected) for choice in choices
    ]
    return Switching(
        max(e[0] for e in errors), max(e[1] for e in errors), len(choices), step._cache_size()
    )


def _placed(program: Program, arm: Arm, tokens_BxS: np.ndarray) -> tuple[Any, Any]:
    """(trained parameters, corrupted batch) on the program's mesh."""
    batch = jax.jit(program.corrupt)(tokens_BxS, jax.random.key(0))
    return jax.device_put(
        jax.device_get(arm.trained.params), program.layout.state_shardings().params
    ), batch


def _errors(found: Any, expected: Any) -> tuple[float, float]:
    """Relative errors of (loss, gradients)."""
    (loss, grads), (loss_1, grads_1) = jax.device_get(found), expected
    norm = lambda tree: math.sqrt(
        sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(tree))
    )
    difference = norm(jax.tree.map(np.subtract, grads, grads_1)) / norm(grads_1)
    return abs(float(loss) - float(loss_1)) / abs(float(loss_1)), difference
