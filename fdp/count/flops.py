"""FLOPs of a train step as exact sums over what layers state. The convention is that of
`fdp.count.counts`."""

from fdp.count.step import microbatch
from fdp.experiment import Experiment
from fdp.step import TrainStep


def train_step(e: Experiment, head_rows: int) -> int:
    """Model FLOPs of one train step on the whole mesh; the output head computes `head_rows` rows in
    all. Raises Unstated for a model or objective that states none."""
    return microbatch(e, head_rows).flops


def executed(p: TrainStep) -> int:
    """Matmul FLOPs that all devices execute in loss and gradients: the model FLOPs, what
    rematerialised blocks compute again, and what several devices compute alike. Raises as
    `train_step`."""
    e, d, micro = p.experiment, p.experiment.degrees, p.experiment.grads.microbatches
    counts = microbatch(e, p.head_rows(), d, micro)
    return d["dp"] * d["ep"] * micro * counts.executed(d)
