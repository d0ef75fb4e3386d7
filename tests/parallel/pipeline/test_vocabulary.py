"""A vocabulary that all stages of a pipeline share: operation S.

Legend: p devices, m microbatches."""

import jax
import numpy as np
import pytest

from fdp import config
from fdp.count import bytes as closed
from fdp.count import flops, jaxpr, pipeline
from fdp.count.compare import against_one_device, mismatches, sent_by
from fdp.data.batches import blank
from fdp.experiment import standard
from fdp.mesh import make_mesh
from fdp.step import TrainStep

L, V, BATCH, MICRO = 8, 64, 8, 4
TOKENS = np.random.default_rng(0).integers(0, V - 2, (BATCH, L)).astype(np.int32)
SIZES = {"layers": 4, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 32, "vocab": V}
CASES = {
    "zb_h1, tp": ("zb_h1", {"pp": 2, "tp": 2}, {}),
    "zbv": ("zbv", {"pp": 2}, {}),
    "sp": ("1f1b", {"pp": 2, "tp": 2, "dp": 2}, {"train.zero": 3, "model.sequence_parallel": True}),
}


def setting(schedule: str, degrees: dict[str, int], changes: dict):
    c = config.base()
    c.model.update(SIZES)
    c.objective.name = "mdlm"
    c.data.seq_len, c.train.batch, c.train.microbatches = L, BATCH, MICRO
    c.pipeline.update(schedule=schedule, vocabulary=True)
    c.mesh.update(degrees)
    c.update_from_flattened_dict(changes)
    return c


def program(c) -> TrainStep:
    e = standard(c, blank(L, V))
    return TrainStep(e, make_mesh(e.degrees))


def run(p: TrainStep):
    state = p.init(0)
    noised = jax.jit(p.corrupt)({"tokens": TOKENS}, jax.random.key(0))
    traced = jax.jit(p.grads).trace(state.variables, noised)
    compiled = traced.lower().compile()
    return jax.device_get(compiled(state.variables, noised)), traced.jaxpr, compiled


@pytest.mark.parametrize("case", CASES)
def test_equal(case):
    s, d, ch = CASES[case]
    p = program(setting(s, d, ch))
    got, traced, compiled = run(p)
    want, _, _ = run(program(setting(s, {**d, "pp": 1}, ch)))
    loss, grads = against_one_device(got[:2], want[:2])
    print(loss, grads)
    assert loss < 1e-6 and grads < 1e-5
    for device in range(2):
        formula = closed.traffic(p, device=device)
        print(mismatches(formula, sent_by(p, compiled, device)))
    print(flops.executed(p), pipeline.dot_flops(p, traced))
