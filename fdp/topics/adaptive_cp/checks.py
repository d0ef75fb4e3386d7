"""Every exact plan against masked attention on one device, and the switched program against the static ones.

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
from fdp.collectives import psum, shard_map
from fdp.cost import context as cost
from fdp.cost import hlo
from fdp.kernels_pallas.masks import Mask
from fdp.mesh import AXES, expand, factor, make_mesh
from fdp.parallel import layouts
from fdp.parallel.context import CommPlan, attend
from fdp.step import batch_specs, loss_sum
from fdp.topics.adaptive_cp.mixers import switched

DEVICES = 8
B, S, H, K, C = 8, 64, 8, 4, 8
CAUSAL = Mask("causal")
PLANS = tuple(
    CommPlan(kind, split, layout=layout)
    for layout in (layouts.CONTIGUOUS, layouts.ZIGZAG, layouts.SequenceLayout("striped", 4))
    for kind, split in (("ring", 1), ("ulysses", DEVICES), ("usp", 2), ("usp", 4), ("all_gather", 1), ("batch", 2))
)


@dataclass(frozen=True)
class Comparison:
    """One plan against one device: relative errors, and wire bytes per op counted in the HLO and by formula."""

    plan: CommPlan
    forward_error: float
    gradient_error: float
    counted: dict[str, float]
    formula: dict[str, float]

    def mismatches(self) -> int:
        """Ops whose bytes differ."""
        ops = self.counted.keys() | self.formula.keys()
        return sum(not math.isclose(self.counted.get(op, 0), self.formula.get(op, 0), rel_tol=1e-12) for op in ops)


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
    compiled = program.lower(*arguments).compile()
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
    for op, wire in cost.label_bytes(shape, CAUSAL).items():  # once: the scan hoists what all layers share
        formula[op] = formula.get(op, 0.0) + wire
    return Comparison(plan, errors[0], max(errors[1:]), counted, formula)


@dataclass(frozen=True)
class Switching:
    """Plans as data: largest relative errors of loss and gradients over the plan arrays, and programs compiled."""

    loss_error: float
    gradient_error: float
    arrays: int
    compilations: int


def switch_plans(arm: Arm, tokens_BxS: np.ndarray) -> Switching:
    """Loss and gradients of the trained model under several plan arrays in one program, against one device."""
    plans = tuple(CommPlan(kind, u, layout=layouts.ZIGZAG) for kind, u in (("ring", 1), ("usp", 2), ("ulysses", 8)))
    mesh = factor(make_mesh(dict.fromkeys(AXES, 1) | {"cp": DEVICES}), "cp")
    params, objective = jax.device_get(arm.trained.params), arm.objective
    plain = objective.corrupt(jax.random.key(0), jnp.asarray(tokens_BxS))
    mean = lambda model, p, b: loss_sum(model, objective, None, p, b) / tokens_BxS.size
    expected, slopes = jax.jit(jax.value_and_grad(lambda p: mean(arm.model, p, plain)))(params)
    model = arm.model.clone(mixer=switched(plans), plan=plans[0])

    def local(params: Any, batch: Any, numbers_N: jax.Array) -> Any:
        numbered = Numbered(model, numbers_N)
        loss, grads = jax.value_and_grad(lambda p: mean(numbered, p, batch))(params)
        return psum(loss, "cp"), grads

    batch = jax.tree.map(lambda x: layouts.permute(x, layouts.ZIGZAG, DEVICES) if x.ndim > 1 else x, plain)
    specs = jax.tree.map(lambda s: expand(mesh, s), batch_specs(batch), is_leaf=lambda s: isinstance(s, P))
    whole = jax.tree.map(lambda _: P(), params)
    program: Any = jax.jit(shard_map(local, mesh, (whole, specs, P()), (P(), whole)))
    layers = arm.c.model.layers
    arrays = [np.full(layers, i, np.int32) for i in range(len(plans))] + [
        np.arange(layers, dtype=np.int32) % len(plans)
    ]
    errors = []
    for numbers in arrays:
        loss, grads = jax.block_until_ready(program(params, batch, numbers))
        difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), grads, slopes)
        norm = lambda tree: math.sqrt(sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(tree)))
        errors.append((abs(float(loss) - float(expected)) / abs(float(expected)), norm(difference) / norm(slopes)))
    return Switching(max(e[0] for e in errors), max(e[1] for e in errors), len(arrays), program._cache_size())


class Numbered:
    """The model with its plan array bound: `loss_sum` calls `apply` without one."""

    def __init__(self, model: Any, numbers_N: jax.Array):
        self.model, self.numbers_N = model, numbers_N

    def apply(self, variables: Any, *args: Any, method: str) -> Any:
        more = {"choice_N": self.numbers_N} if method == "hidden" else {}
        return self.model.apply(variables, *args, method=method, **more)
