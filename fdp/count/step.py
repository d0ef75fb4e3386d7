"""Counts of an experiment: what its model and its objective state for one microbatch."""

from typing import Any

from fdp.count import counts
from fdp.count.counts import Counts, Degrees, Rows, Staged, Unstated, of
from fdp.experiment import Experiment
from fdp.mesh import AXES
from fdp.parallel.pipeline.executor import scheduled

ONE_DEVICE = dict.fromkeys(AXES, 1)


def microbatch(
    e: Experiment,
    head_rows: int,
    degrees: Degrees = ONE_DEVICE,
    microbatches: int = 1,
    level: bool = False,
) -> Counts:
    """Counts of one microbatch on one device, of whose rows `head_rows` reach the output head;
    `level` as in `Rows`. Raises Unstated, naming the layer, core or objective that states none."""
    rows = _rows(e, head_rows, degrees, microbatches, level)
    return of(e.model, rows, degrees) + of(e.objective, rows, degrees)


def staged(
    e: Experiment, head_rows: int, degrees: Degrees, microbatches: int, level: bool = False
) -> Staged:
    """As `microbatch`, by stages of a pipeline; the loss is the last stage's."""
    rows = _rows(e, head_rows, degrees, microbatches, level)
    found = counts.staged(e.model, rows, degrees)
    return found._replace(finish=found.finish + of(e.objective, rows, degrees))


def _rows(e: Experiment, head_rows: int, degrees: Degrees, microbatches: int, level: bool) -> Rows:
    noised = e.noised_example()
    inputs = noised.get("inputs")
    length = 0 if inputs is None else inputs.shape[1]
    batch = e.fit.batch // (degrees["dp"] * degrees["ep"] * microbatches)
    return Rows(batch, length, head_rows, "segments" in noised, level)


def pipeline(e: Experiment) -> scheduled | None:
    """The schedule by which an experiment runs its stages; None where it has no pipeline."""
    grads: Any = e.grads
    return grads if isinstance(grads, scheduled) else None


def unstated(e: Experiment) -> str:
    """Why the counts of the experiment are unknown; empty where every part states them."""
    find = staged if pipeline(e) else microbatch
    try:
        find(e, 0, e.degrees, e.grads.microbatches)
    except Unstated as missing:
        return str(missing)
    return ""
