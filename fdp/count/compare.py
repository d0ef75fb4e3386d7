"""Compare a program with what it should be: its bytes with a formula, its values with one
device."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from fdp import process
from fdp.count import hlo, pipeline, step
from fdp.count.counts import Key, Sent
from fdp.mesh import AnyMesh
from fdp.step import TrainStep

EXACT = 1e-12  # relative: formulas of integers, added up in floating point


def sent(compiled: Any, mesh: AnyMesh, branches: hlo.Branches | None = None) -> Sent:
    """Wire bytes per device by (op, axes) in a compiled program. Sub-axes are reported as the axis
    that they belong to. `branches` and errors: as `hlo.collectives`."""
    degrees: dict[str, int] = {}
    for name, n in mesh.shape.items():  # sub-axes follow one another: devices keep their places
        axis = name.rstrip("0123456789")
        degrees[axis] = degrees.get(axis, 1) * n
    summary = hlo.summary(hlo.collectives(compiled.as_text(), degrees, branches))
    return {key: wire for key, (_, _, wire) in summary.items()}


def sent_by(p: TrainStep, compiled: Any, device: int | None = None) -> Sent:
    """`sent` in a compiled program of `p`. Stages of a pipeline send unlike: `device` of pp, or the
    mean of all."""
    if (grads := step.pipeline(p.experiment)) is None:
        return sent(compiled, p.mesh)
    devices = range(grads.order.placement.p) if device is None else [device]
    return pipeline.mean([sent(compiled, p.mesh, pipeline.branches(grads, i)) for i in devices])


# Bytes against a formula
# -------------------------------------------------------------------------------------------------


class Mismatch(NamedTuple):
    """Bytes that differ."""

    key: Key
    formula: float
    counted: float


def mismatches(formula: Mapping[Key, float], counted: Mapping[Key, float]) -> list[Mismatch]:
    """The (op, axes) whose bytes differ, sorted; a missing entry counts as 0."""
    both = (
        Mismatch(key, formula.get(key, 0.0), counted.get(key, 0.0))
        for key in sorted(formula.keys() | counted.keys())
    )
    return [m for m in both if not math.isclose(m.formula, m.counted, rel_tol=EXACT)]


@dataclass(frozen=True)
class Bytes:
    """Wire bytes per device of one program, by formula and counted in its compiled form."""

    formula: Mapping[Key, float]
    counted: Mapping[Key, float]

    @property
    def entries(self) -> int:
        """The (op, axes) of either side."""
        return len(self.formula.keys() | self.counted.keys())

    def mismatches(self) -> list[Mismatch]:
        """As the function `mismatches`."""
        return mismatches(self.formula, self.counted)


# Values against one device
# -------------------------------------------------------------------------------------------------


def norm(tree: Any) -> float:
    """Root of the sum of squares of all leaves, in float64 on the host, so no program is
    compiled."""
    squares = (float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(tree))
    return math.sqrt(sum(squares))


def relative_error(got: Any, want: Any) -> float:
    """Norm of the difference of two trees over the norm of `want`; NaN if one holds a NaN.

    Raises ValueError for trees of other structure or shapes."""

    def difference(a: Any, b: Any) -> np.ndarray:
        if np.shape(a) != np.shape(b):
            raise ValueError(f"shapes {np.shape(a)} and {np.shape(b)} cannot be compared")
        return np.asarray(a, np.float64) - np.asarray(b, np.float64)

    off, size = norm(jax.tree.map(difference, got, want)), norm(want)
    if off == 0:
        return 0.0
    return off / size if size else math.inf


def against_one_device(got: tuple[Any, Any], want: tuple[Any, Any]) -> tuple[float, float]:
    """Relative errors of (value, gradients), each as a whole tree."""
    (value, grads), (value_1, grads_1) = process.fetch((got, want))
    return relative_error(value, value_1), relative_error(grads, grads_1)


class Outcome(NamedTuple):
    """Loss, gradients (on the host) and bytes sent of one loss-and-gradient program."""

    loss: float
    grads: Any
    sent: Sent


def outcome(p: TrainStep, variables: Any, batch: Any) -> Outcome:
    """Compile and run `p.grads` on host arrays with the noise of one key."""
    state = p.specs.state_shardings()
    placed = process.place(variables, {"params": state.params, "state": state.model})
    noised = jax.jit(p.corrupt)(process.place(batch, p.batch_shardings()), jax.random.key(0))
    compiled = jax.jit(p.grads).lower(placed, noised).compile(hlo.QUICK)
    loss, grads, _ = compiled(placed, noised)
    return Outcome(float(loss), process.fetch(grads), sent_by(p, compiled))


@dataclass(frozen=True)
class Comparison(Bytes):
    """A program against one device and against its formula of bytes.

    `output_error`: relative error of the loss, or of what else was differentiated.
    `gradient_error`: relative error of the gradients."""

    name: str
    output_error: float
    gradient_error: float

    @classmethod
    def of(cls, name: str, got: Outcome, want: Outcome, formula: Sent) -> "Comparison":
        """Compare the outcome of a program with the outcome on one device."""
        return cls(formula, got.sent, name, *against_one_device(got[:2], want[:2]))
