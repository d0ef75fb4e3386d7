"""A program against what it should be: bytes against a formula, values against one device,
collectives against what the degrees ask for.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from fdp.cost import hlo
from fdp.count.counts import Key, Sent
from fdp.mesh import AXES, AnyMesh
from fdp.step import TrainStep

EXACT = 1e-12  # relative: formulas of integers, added up in floating point


def sent(compiled: Any, mesh: AnyMesh) -> Sent:
    """Wire bytes per device by (op, axes) in a compiled program."""
    summary = hlo.summary(hlo.collectives(compiled.as_text(), dict(mesh.shape)))
    return {key: wire for key, (_, _, wire) in summary.items()}


def mismatches(formula: Mapping[Any, float], counted: Mapping[Any, float]) -> list[Any]:
    """The keys whose bytes differ, in order."""
    keys = formula.keys() | counted.keys()

    def same(key: Any) -> bool:
        return math.isclose(formula.get(key, 0.0), counted.get(key, 0.0), rel_tol=EXACT)

    return sorted(key for key in keys if not same(key))


def norm(tree: Any) -> float:
    """Root of the summed squares of all leaves, in float64 on the host."""
    squares = (float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(tree))
    return math.sqrt(sum(squares))


def relative_error(got: Any, want: Any) -> float:
    """Norm of the difference of two trees on the host over the norm of `want`."""
    return norm(jax.tree.map(np.subtract, got, want)) / norm(want)


class Outcome(NamedTuple):
    """Loss, gradients on the host and bytes sent of one loss-and-gradient program."""

    loss: float
    grads: Any
    sent: Sent


def outcome(p: TrainStep, variables: Any, batch: Any) -> Outcome:
    """Compile and run `p.grads` on host arrays, under the noise of one key."""
    state = p.specs.state_shardings()
    placed = jax.device_put(variables, {"params": state.params, "state": state.model})
    noised = jax.jit(p.corrupt)(jax.device_put(batch, p.batch_shardings()), jax.random.key(0))
    compiled = jax.jit(p.grads).lower(placed, noised).compile(hlo.QUICK)
    loss, grads, _ = compiled(placed, noised)
    return Outcome(float(loss), jax.device_get(grads), sent(compiled, p.mesh))


@dataclass(frozen=True)
class Comparison:
    """One program against one device and against its formula of bytes."""

    name: str
    loss_error: float
    gradient_error: float
    counted: Mapping[Any, float]
    formula: Mapping[Any, float]

    def mismatches(self) -> int:
        """Entries whose bytes differ."""
        return len(mismatches(self.formula, self.counted))

    @classmethod
    def of(cls, name: str, got: Outcome, want: Outcome, formula: Sent) -> "Comparison":
        """Of a program's outcome against the one on one device."""
        error = abs(got.loss - want.loss) / abs(want.loss)
        return cls(name, error, relative_error(got.grads, want.grads), got.sent, formula)


def silent_axes(
    counted: Iterable[Key], degrees: Mapping[str, int], alone: Iterable[str] = ("cp", "tp")
) -> list[str]:
    """Axes of degree > 1 that no collective of the program serves.

    Every axis reduces gradients or gathers parameters; those of `alone` must, besides, exchange
    activations by a collective of their own: a context parallelism that is silently off still
    reduces its gradients over cp, together with dp.
    """
    served = {a for _, axes in counted for a in axes}
    own = {axes[0] for _, axes in counted if len(set(map(_logical, axes))) == 1}
    live = [a for a in AXES if degrees[a] > 1]
    missing = [a for a in live if a not in set(map(_logical, served))]
    return missing + [a for a in live if a in alone and a not in set(map(_logical, own))]


def _logical(axis: str) -> str:
    """The axis of a binary sub-axis."""
    return axis.rstrip("0123456789")
