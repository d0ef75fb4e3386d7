"""A tiny masked diffusion LM that is as sharp as a trained one."""

import functools

import jax

from fdp import config
from fdp.arm import Arm
from fdp.data.batches import blank
from fdp.experiment import Experiment, standard
from fdp.mesh import make_mesh

L, IDS = 16, 30


def tiny(**overrides: object) -> Experiment:
    c = config.base()
    c.model.update(layers=2, width=32, heads=8, kv_heads=8, head_dim=4, ffn=64, vocab=32)
    c.data.seq_len, c.train.batch = L, 8
    c.update_from_flattened_dict(overrides)
    return standard(c, blank(L, IDS + 1))


@functools.cache
def an_arm() -> Arm:
    """With initial parameters made large enough for sharp distributions, as if trained."""
    e = tiny()
    arm = Arm.of("mdlm", e, make_mesh(e.degrees, jax.devices()[:1]))
    state = arm.init()
    arm.keep(state.replace(params=jax.tree.map(lambda p: 1.3 * p, state.params)))
    return arm
