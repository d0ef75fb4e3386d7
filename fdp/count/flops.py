"""FLOPs of a train step as exact sums over what layers state. The convention is that of
`fdp.count.counts`."""

from fdp.count.step import microbatch, pipeline, staged
from fdp.step import TrainStep


def train_step(p: TrainStep) -> int:
    """Model FLOPs of one train step on the whole mesh. Raises Unstated for a model or objective
    that states none."""
    e, d = p.experiment, p.experiment.degrees
    shards = d["dp"] * d["ep"] * d["cp"] * e.grads.microbatches
    return microbatch(e, p.head_rows() * shards).flops


def executed(p: TrainStep) -> int:
    """Matmul FLOPs that all devices execute in loss and gradients: the model FLOPs, what
    rematerialised blocks compute again, and what several devices or stages compute alike. Raises
    as `train_step`."""
    e, d, micro = p.experiment, p.experiment.degrees, p.experiment.grads.microbatches
    if (grads := pipeline(e)) is None:
        counts = microbatch(e, p.head_rows(), d, micro)
    else:
        counts = staged(e, p.head_rows(), d, micro).pipelined(grads.table.stages)
    return d["dp"] * d["ep"] * micro * counts.executed(d)
