"""A comm plan of attention against masked attention on one device: values, gradients, bytes.

Legend: B sequences, S positions, H query and K key/value heads, C head_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fdp import process
from fdp.collectives import shard_map
from fdp.count import context as cost
from fdp.count import hlo
from fdp.count.compare import Comparison, Key, Sent, relative_error, sent
from fdp.mesh import AXES, expand, factor, make_mesh
from fdp.parallel.context import layouts
from fdp.parallel.context.attend import attend
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.masks import Mask

DEVICES = 8
B, S, H, K, C = 8, 64, 8, 4, 8
CAUSAL = Mask("causal")
LAYOUTS = (layouts.CONTIGUOUS, layouts.ZIGZAG, layouts.SequenceLayout("striped", 4))
KINDS = (("ring", 1), ("ulysses", 8), ("usp", 2), ("usp", 4), ("all_gather", 1), ("batch", 2))
PLANS = tuple(CommPlan(kind, u, layout=layout) for layout in LAYOUTS for kind, u in KINDS)


def compare(plan: CommPlan) -> Comparison:
    """Two layers of causal attention, forward and backward, over cp = 8; float32."""
    mesh = factor(make_mesh(dict.fromkeys(AXES, 1) | {"cp": DEVICES}), "cp")
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.normal(size=(2, B, S, h, C)).astype(np.float32) for h in (H, K, K, H))
    order = layouts.permutation(plan.layout, S, DEVICES)
    whole, pull = jax.vjp(_layers(CommPlan(), jnp.arange(S)), q, k, v)
    expected = [np.asarray(x)[:, :, order] for x in (whole, *pull(dout))]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, pull = jax.vjp(_layers(plan, layouts.positions(plan.layout, S // DEVICES)), q, k, v)
        return (out, *pull(dout))

    spec = P(None, None, "cp")
    program = jax.jit(shard_map(local, mesh, (spec,) * 4, (spec,) * 4))
    where = NamedSharding(mesh, expand(mesh, spec))
    arguments = [process.place(x[:, :, order], where) for x in (q, k, v, dout)]
    compiled = program.lower(*arguments).compile(hlo.QUICK)
    pairs = zip(process.fetch(compiled(*arguments)), expected, strict=True)
    errors = [relative_error(got, want) for got, want in pairs]
    return Comparison(_formula(plan), sent(compiled, mesh), str(plan), errors[0], max(errors[1:]))


def _layers(plan: CommPlan, position: Any) -> Any:
    """Attention of every layer: (q, k, v) that lead with the layers → outputs."""

    def one(_: None, qkv: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, attend(*qkv, CAUSAL, plan, position)

    def layers(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.lax.scan(one, None, (q, k, v))[1]

    return layers


def _formula(plan: CommPlan) -> Sent:
    """Bytes of two layers; of labels once, since the scan hoists what all layers share."""
    shape, total = cost.AttentionShape(B, S, H, K, C, DEVICES, 4), Sent()
    forward, backward = (f(plan, shape, CAUSAL) for f in (cost.forward_bytes, cost.backward_bytes))
    for times, part in ((2, forward), (2, backward), (1, cost.label_bytes(shape, CAUSAL))):
        for op, wire in part.items():
            total[over_cp(op)] = total.get(over_cp(op), 0.0) + times * wire
    return total


def over_cp(op: str) -> Key:
    """Key of `op` over the one axis of these meshes."""
    return op, ("cp",)
