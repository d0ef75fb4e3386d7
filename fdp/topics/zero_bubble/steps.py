"""Training steps without a barrier, really run: what three ways of clipping give.

The simulated counterpart, which tells what they cost, is `fdp.topics.zero_bubble.barrier`."""

from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from fdp.count.compare import relative_error
from fdp.experiment import Experiment
from fdp.grads import plain
from fdp.mesh import make_mesh
from fdp.mpmd_steps import StagedSteps
from fdp.parallel.pipeline.executor import scheduled
from fdp.parallel.pipeline.orders import repeat
from fdp.state import TrainState
from fdp.step import TrainStep

STEPS = 4


class Clipped(NamedTuple):
    """Relative differences to the parameters behind a barrier. rolled: steps that were rolled back;
    again: operations of steps after them that ran twice. norms: of the gradients of STEPS steps.
    shared: parameters that several stages read."""

    validated: float
    delayed: float
    rolled: tuple[int, ...]
    again: int
    clip: float
    norms: tuple[float, ...]
    shared: int


def clipped(e: Experiment) -> Clipped:
    """STEPS steps of an experiment with a schedule, clipped to the median of the norms that they
    have without clipping, so that some clip and some do not."""
    assert isinstance(e.grads, scheduled)
    steps = StagedSteps(e, repeat(e.grads.order, STEPS))
    state, noised = _given(e)
    steps.clip = np.inf
    norms = steps.train(state, noised)[1].norms
    steps.clip = float(np.median(norms))
    found = {name: steps.train(state, noised, name) for name in ("barrier", "validated", "delayed")}
    want = found["barrier"][0].params
    told = found["validated"][1]
    return Clipped(
        relative_error(found["validated"][0].params, want),
        relative_error(found["delayed"][0].params, want),
        told.rolled,
        told.again,
        steps.clip,
        tuple(map(float, norms)),
        len(steps.shared),
    )


def _given(e: Experiment) -> tuple[TrainState, list[object]]:
    """A first state and corrupted batches, on one device."""
    one = replace(e, degrees=dict.fromkeys(e.degrees, 1), grads=plain(e.grads.microbatches))
    step = TrainStep(one, make_mesh(one.degrees, jax.local_devices()[:1]))
    state, corrupt, size = step.init(e.fit.seed), jax.jit(step.corrupt), e.fit.batch
    batches = [e.data.train.take(range(n * size, (n + 1) * size)) for n in range(STEPS)]
    keys = [jax.random.fold_in(state.key, n) for n in range(STEPS)]
    return state, [jax.device_get(corrupt(*x)) for x in zip(batches, keys, strict=True)]
