"""An arm whose attention the tests of plans as data and of topic 3 look at.

Legend: S positions, W blocks, N layers.
"""

import dataclasses
import functools

import jax
import numpy as np
from build import experiment, tiny

from fdp.arm import Arm
from fdp.mesh import make_mesh

S, W = 64, 32
BLOCK = S // W


@functools.cache
def an_arm() -> Arm:
    """Trained, or so it says: initial parameters, enlarged so that attention is not even."""
    sizes = {"model.heads": 8, "model.kv_heads": 8, "model.head_dim": 4, "data.seq_len": S}
    c = tiny(**sizes, **{"objective.name": "autoregressive", "train.batch": 2})
    arm = Arm.of("text", experiment(c), make_mesh(c.mesh))
    state = arm.init()
    arm.keep(dataclasses.replace(state, params=jax.tree.map(lambda p: 1.5 * p, state.params)))
    return arm


def variables() -> dict:
    return an_arm().trained_on_host.variables


def tokens() -> np.ndarray:
    return an_arm().data.val.take([0, 1])["tokens"]
