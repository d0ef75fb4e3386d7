"""The routing of a run as a trace, on a mesh and on one device."""

import jax
import numpy as np

from fdp import config, trace
from fdp.arm import Arm
from fdp.data.batches import blank
from fdp.data.traces import Layout, Writer, read
from fdp.experiment import standard
from fdp.mesh import make_mesh

MOE = {"experts": 4, "topk": 2, "ffn": 16, "every": 2}
SIZES = {"layers": 4, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 32, "vocab": 64}


def traced(tmp_path, **degrees):
    c = config.base()
    c.model.update(SIZES | {"sequence_parallel": degrees.get("tp", 1) > 1})
    c.model.moe.update(MOE)
    c.objective.name = "mdlm"
    c.data.seq_len, c.train.batch, c.train.zero = 8, 4, 3
    c.context.layout = "zigzag"
    c.mesh.update(degrees)
    arm = Arm.of("moe", standard(c, blank(8, 64)), make_mesh(c.mesh))
    tokens = np.random.default_rng(0).integers(0, 62, (4, 8)).astype(np.int32)
    noised = arm.program.corrupt(arm.place({"tokens": tokens}), jax.random.key(0))
    ids = trace.chosen(arm.program)(arm.init().variables, noised)
    assert set(ids) == {"layers/1/mlp/ids"}  # every second layer has experts
    writer = Writer(tmp_path / str(degrees), 4)
    assert trace.append(writer, arm, jax.device_get(ids), jax.device_get(noised), 7) == 32
    found = read(writer.folder, Layout(4, 2, 2))
    order = np.lexsort((found.position_N, found.sequence_N))
    return found.take(order)


def test_a_mesh_traces_what_one_device_traces(tmp_path):
    one, many = traced(tmp_path), traced(tmp_path, dp=2, cp=2, tp=2)
    for name in ("ids_NxLxK", "sequence_N", "position_N", "noise_N"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name))
    assert set(one.sequence_N) == {7, 8, 9, 10} and len(np.unique(one.ids_NxLxK)) == 4
