"""Memory per device of a train step, as a sum of its parts. `--dry_run` prints it beside the plan
of the compiler."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from fdp.count.counts import Unstated
from fdp.count.step import microbatch
from fdp.models.module import spec_leaf
from fdp.sharding import axes_of
from fdp.step import TrainStep


@dataclass(frozen=True)
class Memory:
    """Bytes per device."""

    parameters: int  # float32 masters, as stored
    optimizer: int  # two float32 moments
    gathered: int  # what ZeRO gathers for use, and the gradients before they are scattered
    activations: int | None  # saved for the backward pass, one live layer, the head; None: unstated

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


def estimate(p: TrainStep) -> Memory:
    """Memory of one train step."""
    zero, pp = p.experiment.zero, p.experiment.degrees["pp"]
    held, used = _local(p, p.specs.stored), _local(p, p.specs.specs)
    if zero == 0:
        gathered = held  # the gradients
    elif zero == 1:
        gathered = 2 * used
    else:  # one period and its gradient, all outside the stack, and the scattered gradients
        period = _local(p, p.specs.specs, lambda x, m: x.shape[0] // pp if m.stacked else 0)
        outside = _local(p, p.specs.specs, lambda x, m: 0 if m.stacked else 1)
        gathered = held + 2 * period + 2 * outside
    return Memory(held, 2 * held, gathered, activations(p))


def activations(p: TrainStep) -> int | None:
    """Bytes of activations at the start of the backward pass, their peak (Korthikanti et al. 2022,
    §4), as layers state them; None where a layer states none."""
    e = p.experiment
    try:
        found = microbatch(e, p.head_rows(), e.degrees, e.grads.microbatches)
    except Unstated:
        return None
    return found.saved + found.live
