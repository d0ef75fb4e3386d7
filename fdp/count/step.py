"""Counts of an experiment: what its model and its objective state for one microbatch."""

from fdp.count.counts import Counts, Degrees, Rows, Unstated, of
from fdp.experiment import Experiment
from fdp.mesh import AXES

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
    noised = e.noised_example()
    inputs = noised.get("inputs")
    length = 0 if inputs is None else inputs.shape[1]
    batch = e.fit.batch // (degrees["dp"] * degrees["ep"] * microbatches)
    rows = Rows(batch, length, head_rows, "segments" in noised, level)
    return of(e.model, rows, degrees) + of(e.objective, rows, degrees)


def unstated(e: Experiment) -> str:
    """Why the counts of the experiment are unknown; empty where every part states them."""
    try:
        microbatch(e, 0, e.degrees, e.grads.microbatches)
    except Unstated as missing:
        return str(missing)
    return ""
