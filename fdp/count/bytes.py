"""Closed formula for the bytes that loss and gradients communicate, per device and train step, by
(op, mesh axes).

It adds what layers and objective state (`fdp.count.counts`) to what follows from the metadata of
the parameters: gradient reductions and ZeRO. The optimizer (a few scalars of the global norm) and
the drawing of noise are not included. Tests hold the formula equal to the compiled program, except
that XLA on a CPU gathers once, not twice, for a rematerialised stack of one period, and that a bias
whose sum is the output of a period is gathered once, too: rematerialisation does not need it."""

from math import prod
from typing import Any

import jax

from fdp.count import pipeline, step
from fdp.count.counts import GATHER, REDUCE, SCATTER, Ledger, Sent, merged
from fdp.mesh import BATCH_AXES, DATA_AXES
from fdp.models.module import spec_leaf
from fdp.sharding import axes_of
from fdp.step import TrainStep


def traffic(p: TrainStep, level: bool = False, device: int | None = None) -> Sent:
    """Wire bytes per device of one loss-and-gradient evaluation; `level` as in `counts.Rows`.
    Stages of a pipeline send unlike: `device` of pp, or the mean of all. Raises Unstated for a
    model or objective that does not state its bytes.

    Sources: Shoeybi et al. 2019, Korthikanti et al. 2022, Rajbhandari et al. 2020.
    """
    e = p.experiment
    ledger = Ledger(e.degrees)
    _parameters(ledger, p)
    ledger.add(REDUCE, ("pp", *DATA_AXES), 4)  # the loss
    for leaf, spec in _leaves(p.specs.aux_shapes, p.specs.aux_specs):
        shard = leaf.dtype.itemsize * prod(leaf.shape) / prod(e.degrees[a] for a in axes_of(spec))
        ledger.add(REDUCE, DATA_AXES, shard)
    if "weights" in e.data.dims:  # what the loss is divided by
        axes = DATA_AXES if "sequence" in e.data.dims["weights"] else BATCH_AXES
        ledger.add(REDUCE, axes, 4)
    return merged(_operations(p, level, device), ledger.sent)


def _operations(p: TrainStep, level: bool, device: int | None) -> Sent:
    """Of all microbatches, and of what a pipeline sends beside."""
    e, micro = p.experiment, p.experiment.grads.microbatches
    if (grads := step.pipeline(e)) is None:
        each = step.microbatch(e, p.head_rows(), e.degrees, micro, level).sent
        return {key: micro * wire for key, wire in each.items()}
    parts = step.staged(e, p.head_rows(), e.degrees, micro, level)
    devices = range(grads.order.placement.p) if device is None else [device]
    found = pipeline.mean([pipeline.operations(grads, parts, i) for i in devices])
    return merged(found, pipeline.between(p, grads, parts.message))


def _leaves(tree: Any, specs: Any) -> Any:
    return zip(jax.tree.leaves(tree), jax.tree.leaves(specs, is_leaf=spec_leaf), strict=True)


def _parameters(ledger: Ledger, p: TrainStep) -> None:
    """Gradient reductions and ZeRO gathers. Parameters and their gradients are communicated in
    float32."""
    e = p.experiment
    repeats = getattr(getattr(e.model, "shape", None), "remat", "none") != "none"
    metas = jax.tree.leaves(p.specs.metas)
    for (leaf, spec), meta in zip(_leaves(p.specs.shapes, p.specs.stored), metas, strict=True):
        used = axes_of(spec)
        shard = 4 * prod(leaf.shape) / prod(e.degrees[a] for a in used)
        ledger.add(REDUCE, [a for a in DATA_AXES if a not in used], shard)
        if "dp" not in used:
            continue
        per_layer = e.zero == 3 and meta.stacked
        backward = e.grads.microbatches if per_layer else 1
        forward = backward * (2 if per_layer and repeats else 1)
        ledger.add(GATHER, ("dp",), shard, forward)
        ledger.add(SCATTER, ("dp",), shard, backward)
