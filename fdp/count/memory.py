"""Memory per device of a train step, as a sum of its parts. `--dry_run` prints it beside the plan
of the compiler."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from fdp.count.counts import Unstated
from fdp.count.pipeline import ticks, traced
from fdp.count.step import microbatch, pipeline, staged
from fdp.models.module import spec_leaf
from fdp.parallel.pipeline.executor import scheduled
from fdp.sharding import axes_of
from fdp.step import TrainStep


@dataclass(frozen=True)
class Memory:
    """Bytes per device."""

    parameters: int  # float32 masters, as stored
    optimizer: int  # two float32 moments
    gathered: int  # what ZeRO gathers for use, and the gradients before they are scattered
    # Saved for the backward pass, one live layer, the head; of a pipeline all slots, and the result
    # of an operation but for its gradients. None: unstated.
    activations: int | None

    def total(self) -> int:
        """The sum of all parts: an upper bound on the peak, up to what the compiler adds or fuses
        away. Without activations where the model does not state them."""
        return self.parameters + self.optimizer + self.gathered + (self.activations or 0)


def _local(p: TrainStep, specs: Any, share: Callable[[Any, Any], int] | None = None) -> int:
    """Bytes of the parameters of a device under `specs`, divided by `share`, which is given per
    parameter (0: nothing)."""
    leaves = jax.tree.leaves(specs, is_leaf=spec_leaf)
    parts = zip(
        jax.tree.leaves(p.specs.shapes), leaves, jax.tree.leaves(p.specs.metas), strict=True
    )
    degrees, total = p.experiment.degrees, 0
    for x, spec, meta in parts:
        by = 1 if share is None else share(x, meta)
        size = 4 * prod(x.shape) // prod(degrees[a] for a in axes_of(spec))
        total += size // by if by else 0
    return total


def estimate(p: TrainStep, program: Any = None) -> Memory:
    """Memory of one train step. `program`: its traced loss and gradients, where they are known; for
    a pipeline only."""
    zero, pp = p.experiment.zero, p.experiment.degrees["pp"]
    held, used = _local(p, p.specs.stored), _local(p, p.specs.specs)
    if (grads := pipeline(p.experiment)) is not None:
        return _in_stages(p, grads, traced(p) if program is None else program)
    if zero == 0:
        gathered = held  # the gradients
    elif zero == 1:
        gathered = 2 * used
    else:  # one period and its gradient, all outside the stack, and the scattered gradients
        period, outside = (_local(p, p.specs.specs, f) for f in (_period(pp), _outside))
        gathered = held + 2 * period + 2 * outside
    return Memory(held, 2 * held, gathered, activations(p))


def _in_stages(p: TrainStep, grads: scheduled, program: Any) -> Memory:
    """With gradients twice, their sums and those of one operation, of parameters as the schedule
    gets them; chunks are a copy of these."""
    zero, e = p.experiment.zero, p.experiment
    held, used = _local(p, p.specs.stored), _local(p, p.specs.specs)
    outside = _local(p, p.specs.specs, _outside)
    mine = held - _local(p, p.specs.stored, _outside) + outside if zero == 3 else used
    copied = 0 if zero == 0 and grads.order.placement.v == 1 else mine
    if zero == 3:  # one period and its gradient
        periods = _local(p, p.specs.specs, _period(e.degrees["pp"]))
        copied += 2 * periods
    found = ticks(program)
    try:
        parts = staged(e, p.head_rows(), e.degrees, e.grads.microbatches)
    except Unstated:
        return Memory(held, 2 * held, copied + 2 * mine, None)
    live = parts.layers.live + parts.finish.saved
    slots = found.carried + found.result - 2 * mine
    return Memory(held, 2 * held, copied + 2 * mine, slots + live)


def _outside(x: Any, meta: Any) -> int:
    """All that is no layer."""
    return 0 if meta.stacked else 1


def _period(pp: int) -> Callable[[Any, Any], int]:
    """One period of the layers of a shard of pp."""
    return lambda x, meta: x.shape[0] // pp if meta.stacked else 0


def activations(p: TrainStep) -> int | None:
    """Bytes of activations at the start of the backward pass, their peak (Korthikanti et al. 2022,
    §4), as layers state them; None where a layer states none."""
    e = p.experiment
    try:
        found = microbatch(e, p.head_rows(), e.degrees, e.grads.microbatches)
    except Unstated:
        return None
    return found.saved + found.live
