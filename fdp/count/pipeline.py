"""Counts of a program that runs a pipeline schedule. Its table is static, so it is known how often
each device runs each branch of a tick, and what stands between two ticks.

Legend: p devices of pp, v chunks of a device, m microbatches, T ticks."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np

from fdp.count import hlo, jaxpr
from fdp.count.counts import PERMUTE, REDUCE, Ledger, Sent, Staged, merged
from fdp.count.step import pipeline
from fdp.models.module import spec_leaf
from fdp.parallel.pipeline.chunks import rounds
from fdp.parallel.pipeline.executor import scheduled
from fdp.parallel.pipeline.placement import Placement
from fdp.parallel.pipeline.table import BRANCHES, FIELDS, FOLDED
from fdp.sharding import axes_of
from fdp.step import TrainStep


def executions(grads: scheduled, device: int) -> list[int]:
    """How often a device of pp runs each branch of a tick in one step."""
    kinds = grads.table.rows[:, device, FIELDS.index("kind")]
    return np.bincount(kinds, minlength=grads.table.branches).tolist()


def branches(grads: scheduled, device: int) -> hlo.Branches:
    """The choice of branches by which counts are those of one device of pp.

    The conditional of a tick is the one of so many branches that stands in no other, and that of S
    the one of two. A scope would name them more plainly, but programs from a compilation cache may
    carry the names of older code.
    """
    runs = executions(grads, device)
    heads = 0 if grads.table.heads is None else grads.microbatches

    def choose(path: str, n: int) -> hlo.Choice:
        if "cond" not in path.split("/")[:-1]:
            if n == grads.table.branches:
                return runs
            if heads and n == 2:
                return [grads.table.ticks - heads, heads]
        return hlo.choice(hlo.USUAL, path, n)

    return choose


def dot_flops(p: TrainStep, closed_jaxpr: Any) -> int:
    """FLOPs of all devices in the traced loss and gradients of `p`, as `jaxpr.dot_flops`."""
    shape = dict(p.mesh.shape)
    if (grads := pipeline(p.experiment)) is None:
        return p.mesh.size * jaxpr.dot_flops(closed_jaxpr, shape)
    devices = range(grads.order.placement.p)
    found = [jaxpr.dot_flops(closed_jaxpr, shape, branches(grads, i)) for i in devices]
    return p.mesh.size // len(devices) * sum(found)


def traced(p: TrainStep) -> Any:
    """The jaxpr of loss and gradients."""
    state, batch = p.abstract_arguments()
    noised = jax.eval_shape(p.objective.corrupt, jax.random.key(0), batch)
    return jax.make_jaxpr(p.grads)(state.variables, noised)


class Ticks(NamedTuple):
    """Bytes per device in the loop over ticks. carried: slots of messages, residuals and stashes,
    and sums of gradients and metrics. result: of one operation, padded to that of any."""

    carried: int
    result: int


def ticks(closed_jaxpr: Any) -> Ticks:
    """Of the traced loss and gradients of a pipeline. Raises ValueError where there are none."""
    for eqn, inner in jaxpr.equations(closed_jaxpr):
        found = [e for e in inner if len(e.params.get("branches", ())) in (BRANCHES, FOLDED)]
        if eqn.primitive.name == "scan" and found:
            carried = sum(map(_bytes, eqn.outvars))  # nothing is stacked
            return Ticks(carried, sum(map(_bytes, found[0].outvars)))
    raise ValueError("the program has no loop over the ticks of a pipeline schedule")


def _bytes(v: Any) -> int:
    return v.aval.size * v.aval.dtype.itemsize


def mean(of_devices: Sequence[Sent]) -> Sent:
    """Mean bytes of several devices."""
    n = len(of_devices)
    return {key: wire / n for key, wire in merged(*of_devices).items()}


# In closed form
# -------------------------------------------------------------------------------------------------


def operations(grads: scheduled, parts: Staged, device: int) -> Sent:
    """Bytes of a device of pp in all operations of its table. Each of its chunks runs forward and
    backward of a v-th of its layers, once a microbatch."""
    place, m = grads.order.placement, grads.microbatches
    each = [parts.layers.passes, *[merged(parts.shared.sent, parts.layers.once)] * place.v]
    if place.devices[0] == device:
        each.append(parts.start.sent)
    if place.devices[-1] == device or grads.table.heads is not None:
        each += [parts.finish.sent, parts.again.sent]
    if place.devices[len(place.devices) // 2] == device:
        each.append(parts.middle.sent)
    return {key: m * wire for key, wire in merged(*each).items()}


def between(p: TrainStep, grads: scheduled, message: int) -> Sent:
    """Bytes of a device over pp beside its operations: two permutes a tick, layers on their way to
    their chunks and gradients on their way back, the reduction of the gradients of what is no
    layer, and what S broadcasts, as a sum."""
    e, place = p.experiment, grads.order.placement
    ledger = Ledger(e.degrees)
    if place.p == 1:
        return {}
    ledger.put(PERMUTE, ("pp",), 2 * grads.table.ticks * message)
    if grads.table.heads is not None:
        ledger.add(REDUCE, ("pp",), message, grads.microbatches)
    for path, leaf, spec in _used(p):
        shard = 4 * prod(leaf.shape) / prod(e.degrees[a] for a in axes_of(spec))
        if "pp" not in axes_of(spec):
            ledger.add(REDUCE, ("pp",), shard)
        elif spec[0] == "pp":
            ledger.put(PERMUTE, ("pp",), 2 * _travels(grads.stack(path)) * shard)
    for (path, leaf), spec in zip(
        jax.tree_util.tree_leaves_with_path(p.specs.aux_shapes),
        jax.tree.leaves(p.specs.aux_specs, is_leaf=spec_leaf),
        strict=True,
    ):
        if "pp" in axes_of(spec):
            shard = leaf.dtype.itemsize * prod(leaf.shape)
            shard /= prod(e.degrees[a] for a in axes_of(spec))
            ledger.put(PERMUTE, ("pp",), _travels(grads.stack(path)) * shard)
    return ledger.sent


def _travels(place: Placement) -> float:
    """Which share of its layers a device sends to where their virtual stages lie."""
    return sum(any(i != j for i, (_, j) in enumerate(r)) for r in rounds(place)) / place.v


def _used(p: TrainStep) -> Any:
    """(path, shape, spec) of all parameters as the schedule gets them: under ZeRO-3 layers are
    stored."""
    shapes = jax.tree_util.tree_leaves_with_path(p.specs.shapes)
    metas = jax.tree.leaves(p.specs.metas)
    specs = (jax.tree.leaves(s, is_leaf=spec_leaf) for s in (p.specs.stored, p.specs.specs))
    for (path, shape), meta, stored, used in zip(shapes, metas, *specs, strict=True):
        yield path, shape, stored if p.experiment.zero == 3 and meta.stacked else used
