"""Programs of single operations, and processes of single stages, run a schedule exactly."""

import jax
import numpy as np
import pytest

from fdp import config
from fdp.count.compare import against_one_device
from fdp.data.batches import blank
from fdp.experiment import standard
from fdp.mesh import make_mesh
from fdp.parallel.pipeline.library import named
from fdp.parallel.pipeline.mpmd import StagedStep
from fdp.step import TrainStep

L, V, BATCH, MICRO = 8, 64, 8, 4
TOKENS = np.random.default_rng(0).integers(0, V - 2, (BATCH, L)).astype(np.int32)
DENSE = {"layers": 4, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 32, "vocab": V}
CASES = {"1f1b": {"pp": 4, "dp": 2}, "zbv": {"pp": 2, "tp": 2}}


def experiment(degrees: dict[str, int], **changes):
    c = config.base()
    c.model.update(DENSE)
    c.objective.name = "mdlm"
    c.data.seq_len, c.train.batch, c.train.microbatches = L, BATCH, MICRO
    c.mesh.update(degrees)
    c.update_from_flattened_dict(changes)
    return standard(c, blank(L, V))


@pytest.mark.parametrize("schedule", CASES)
def test_programs_of_single_operations_equal_the_plain_step(schedule):
    degrees = CASES[schedule]
    e = experiment({**degrees, "pp": 1})
    plain = TrainStep(e, make_mesh(e.degrees))
    state = plain.init(0)
    noised = jax.jit(plain.corrupt)({"tokens": TOKENS}, jax.random.key(0))
    want = jax.device_get(jax.jit(plain.grads)(state.variables, noised))
    variables, noised = jax.device_get((state.variables, noised))

    order = named(schedule, degrees["pp"], MICRO)
    staged = StagedStep(experiment(degrees), order)
    got = staged.grads(variables, noised)
    loss, grads = against_one_device(got[:2], want[:2])
    assert loss < 1e-6 and grads < 1e-5
    assert jax.tree.structure(got[2]) == jax.tree.structure(want[2])
    events = staged.groups.events()
    ran = [e for e in events if "virtual" in e.op]
    assert len(ran) == 3 * MICRO * len(order.placement.devices)
