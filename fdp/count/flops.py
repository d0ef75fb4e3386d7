"""FLOPs of a train step, to the unit, as sums over what layers state (`fdp.count.counts`, which
holds the convention)."""

from fdp.count.step import microbatch
from fdp.experiment import Experiment
from fdp.step import TrainStep


def train_step(e: Experiment, head_rows: int) -> int:
    """Model FLOPs of one train step on the whole mesh, whose outputs run on `head_rows` rows in all.

    Raises Unstated for a model or objective that does not state them."""
    return microbatch(e, head_rows).flops


def executed(p: TrainStep) -> int:
    """Matmul FLOPs that all devices together execute in loss and gradients: beyond the model's, what
    rematerialised blocks compute again and what devices compute alike.

    Raises as `train_step`."""
    e, d, micro = p.experiment, p.experiment.degrees, p.experiment.grads.microbatches
    counts = microbatch(e, p.head_rows(), d, micro)
    return d["dp"] * d["ep"] * micro * counts.executed(d)
