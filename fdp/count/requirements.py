"""The collectives that the degrees of a program require, and those that it has.

A program can train well while an axis does nothing: with context parallelism off, every device
attends to its own positions only, and gradients are still reduced over cp. The bytes that each axis
must carry, and the ops that carry them, reveal this without a formula for every layer."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from fdp.count.compare import EXACT, Key, Sent
from fdp.count.counts import EXCHANGE, GATHER, PERMUTE, REDUCE, SCATTER
from fdp.mesh import AXES, DATA_AXES
from fdp.models.module import spec_leaf
from fdp.models.transformer import Transformer
from fdp.parallel.context.plan import CommPlan
from fdp.sharding import axes_of
from fdp.step import TrainStep

ANY = (GATHER, SCATTER, EXCHANGE, PERMUTE)  # that moves data without summing all of it


@dataclass(frozen=True)
class Requirement:
    """A program must send at least `least` bytes per device, and more than 0, by `ops` together,
    over groups that `axis` is part of."""

    axis: str
    ops: tuple[str, ...]
    least: float
    purpose: str

    def found(self, counted: Mapping[Key, float]) -> float:
        """The bytes that a program sends in this way."""
        return sum(w for (op, axes), w in counted.items() if op in self.ops and self.axis in axes)

    def describe(self, counted: Mapping[Key, float]) -> str:
        """Text for a person: the purpose, the ops, and how much of the required bytes was found."""
        return (
            f"{self.axis}: {self.purpose} by {' or '.join(self.ops)}, "
            f"{self.found(counted):,.0f} of at least {max(self.least, 1):,.0f} bytes"
        )


def required(
    degrees: Mapping[str, int],
    gradients: Mapping[str, float],
    activations: float | None = None,
    sequence_parallel: bool = False,
    context: Collection[str] | None = None,
) -> list[Requirement]:
    """What loss and gradients must send over every axis of degree > 1.

    Bytes of one device. `gradients`: data axis → bytes that are reduced over it, whole before a
    reduce-scatter over dp. `activations`: bytes reduced over tp, forward and backward. `context`:
    ops by which layers exchange positions over cp; None: unknown, any op counts. These are lower
    bounds, so they hold for whole train steps too; the formula of bytes is exact."""
    out = []
    for axis in (a for a in AXES if degrees[a] > 1):
        share = (degrees[axis] - 1) / degrees[axis]  # of a payload, sent by one pass round a ring
        if axis in DATA_AXES:
            # Other collectives over cp are reduce-scatters, too; over dp only those of gradients.
            scattered = axis == "dp"
            ops = (REDUCE, SCATTER) if scattered else (REDUCE,)
            least = (1 if scattered else 2) * share * gradients[axis]
            out.append(Requirement(axis, ops, least, "reduction of gradients"))
        if axis == "pp":
            out.append(Requirement(axis, (PERMUTE,), 0, "activations between stages"))
        if axis == "tp":
            out += _over_tp(activations, share, sequence_parallel)
        if axis == "cp":
            asked = [ANY] if context is None else [(op,) for op in sorted(context)]
            out += [Requirement(axis, ops, 0, "exchange of positions") for ops in asked]
    return out


def _over_tp(activations: float | None, share: float, scattered: bool) -> list[Requirement]:
    if activations is None:
        return [Requirement("tp", (REDUCE, *ANY), 0, "activations")]
    if not scattered:
        return [Requirement("tp", (REDUCE,), 2 * share * activations, "activations")]
    ops = (GATHER, SCATTER)
    return [Requirement("tp", (op,), share * activations, "activations in shards") for op in ops]


def exchanges(plan: CommPlan, cp: int) -> set[str]:
    """Ops by which attention with `plan` exchanges positions, forward and backward."""
    if plan.kind == "all_gather":
        return {GATHER, SCATTER}
    ring = plan.ring_degree(cp) > 1 and plan.hops != ()
    return ({EXCHANGE} if plan.head_split > 1 else set()) | ({PERMUTE} if ring else set())


def required_of(p: TrainStep) -> list[Requirement]:
    """`required` for the experiment of `p`; layers other than the stock ones may use any op."""
    e, model = p.experiment, p.experiment.model
    gradients, gathered = _gradients(p)
    if not is_stock(model):
        out = required(e.degrees, gradients)
    else:
        m, d, core = model.shape, e.degrees, model.core
        tokens = e.fit.batch // (d["dp"] * d["ep"]) * (e.input_length // d["cp"])
        activations = 4 * m.layers * tokens * m.width * m.itemsize  # 2 sublayers, 2 directions
        context = exchanges(core.plan, d["cp"])
        context |= {GATHER} if core.mask.packed else set()  # document ids
        context |= {PERMUTE} if m.conv else set()  # its halo
        out = required(d, gradients, activations, m.sequence_parallel, context)
    shape: Any = getattr(model, "shape", None)
    if e.degrees["ep"] > 1 and getattr(shape, "experts", False):
        out.append(Requirement("ep", (EXCHANGE, GATHER, SCATTER), 0, "rows of experts"))
    if e.zero and e.degrees["dp"] > 1:
        out.append(Requirement("dp", (GATHER,), gathered, f"parameters under ZeRO-{e.zero}"))
    return out


def is_stock(model: Any) -> bool:
    """Whether the model is one stock block, repeated."""
    return isinstance(model, Transformer) and len(model.pattern) == 1 and model.stock


def _gradients(p: TrainStep) -> tuple[dict[str, float], float]:
    """(bytes of gradients that a device reduces over each data axis, whole over dp under ZeRO;
    bytes that one gather of the stored parameters over dp sends)."""
    total, gathered = dict.fromkeys(DATA_AXES, 0.0), 0.0
    degrees, specs = p.experiment.degrees, jax.tree.leaves(p.specs.stored, is_leaf=spec_leaf)
    for leaf, spec in zip(jax.tree.leaves(p.specs.shapes), specs, strict=True):
        used = axes_of(spec)
        shard = leaf.dtype.itemsize * prod(leaf.shape) / prod(degrees[a] for a in used)
        for axis in DATA_AXES:
            total[axis] += shard if axis not in used else 0.0
        if "dp" in used:
            total["dp"] += shard * degrees["dp"]
            gathered += shard * (degrees["dp"] - 1)
    return total, gathered


def missing(requirements: list[Requirement], counted: Mapping[Key, float]) -> list[Requirement]:
    """The requirements that a program does not meet."""

    def met(r: Requirement) -> bool:
        found = r.found(counted)
        return found > 0 and found >= r.least * (1 - EXACT)

    return [r for r in requirements if not met(r)]


def unexpected(requirements: list[Requirement], counted: Mapping[Key, float]) -> Sent:
    """What loss and gradients send that no requirement asks for: (op, axes) → bytes.

    An all-reduce is never unexpected: the loss and the gradients of replicated parameters need it
    over any axis. A whole train step may have other ops, where the compiler moves a batch."""
    asked = {(op, r.axis) for r in requirements for op in r.ops}
    return {
        (op, axes): wire
        for (op, axes), wire in counted.items()
        if op != REDUCE and not all((op, axis) in asked for axis in axes)
    }
