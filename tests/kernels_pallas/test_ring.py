"""The remote-DMA ring in TPU interpret mode on four devices with race detection, and compiled for a
TPU.
"""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, PartitionSpec

from fdp.kernels_pallas import flash
from fdp.kernels_pallas.flash import reference, seen_by
from fdp.kernels_pallas.masks import Mask
from fdp.kernels_pallas.ring import ring_attention
from tests.kernels_pallas.compiled import compiled_text, kernels
from tests.kernels_pallas.oracle import assert_close, inputs, with_gradients

P = PartitionSpec
ROOT = Path(__file__).parents[2]
CASES = {"striped causal": (4, Mask("causal")), "packed window": (2, Mask(window=30, packed=True))}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_without_a_race(name, monkeypatch, capfd):
    """Odd shards (19 tokens), two heads a key head; the shorter ring is the minor axis of a mesh of
    four.
    """
    degree, mask = CASES[name]
    monkeypatch.setattr(flash, "tile_sizes", lambda *_: (32, 16))
    mesh = Mesh(
        np.array(jax.devices()[:4]).reshape(-1, degree),
        ("dp", "cp"),
        axis_types=(AxisType.Auto,) * 2,
    )
    L = 19 * degree
    arrays = inputs(B=4 // degree, N=L, M=L, H=2, K=1)
    position = (
        jnp.arange(L).reshape(19, degree).T.reshape(-1) if "striped" in name else jnp.arange(L)
    )
    tags = (position, position // 15)[: 1 + mask.packed]
    interpret = pltpu.InterpretParams(detect_races=True)

    def local(q, k, v, *tags):
        both = [x for tag in tags for x in (tag, tag)]
        return ring_attention(q, k, v, mask, *both, axis="cp", interpret=interpret)

    specs = {
        "in_specs": (P("dp", "cp"),) * 3 + (P("cp"),) * len(tags),
        "out_specs": (P("dp", "cp"), P("dp", None, "cp")),
    }
    ring = jax.shard_map(
        local, mesh=mesh, **specs, check_vma=False
    )  # the interpreter cannot type varying axes
    got = jax.jit(partial(with_gradients, lambda q, k, v: ring(q, k, v, *tags)))(*arrays)
    dense = lambda q, k, v: reference(q, k, v, seen_by(mask, tags, tags))
    assert_close(got, jax.jit(partial(with_gradients, dense))(*arrays))
    assert "RACE DETECTED" not in "".join(
        capfd.readouterr()
    )  # jax < 0.12 prints where jax 0.12 raises


RACE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, PartitionSpec as P
from fdp.kernels_pallas import ring

def kernel(x_ref, o_ref, send, receive):
    ring.neighbour_is_ready("cp")
    (copy,) = ring.remote_copies([x_ref], [o_ref], send, receive, "cp")
    copy.start()
    if sys.argv[1] == "early":
        o_ref[...] += 1.0
    copy.wait()

def shift(x):
    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=pltpu.InterpretParams(detect_races=True),
        scratch_shapes=[pltpu.SemaphoreType.DMA((1,))] * 2, compiler_params=pltpu.CompilerParams(collective_id=3),
    )(x)

mesh = Mesh(np.array(jax.devices()), ("cp",), axis_types=(AxisType.Auto,))
f = jax.jit(jax.shard_map(shift, mesh=mesh, in_specs=P("cp"), out_specs=P("cp"), check_vma=False))
y = f(jnp.repeat(jnp.arange(4.0), 8)[:, None] * jnp.ones((32, 128)))
assert (y == jnp.repeat(jnp.array([3.0, 0, 1, 2]), 8)[:, None]).all(), "wrong values"
print("values are right")
"""


@pytest.mark.parametrize("when", ["after", "early"])
def test_a_buffer_touched_before_its_dma_has_arrived_is_reported(when):
    """The detector that the test above trusts does fire. In a process of its own: an exception
    breaks the session.
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RACE, when], env=env, capture_output=True, text=True, timeout=300
    )
    said = done.stdout + done.stderr
    assert ("RACE DETECTED" in said) == (when == "early"), said
    assert when == "early" or "values are right" in said, said


@pytest.mark.fast
def test_outside_shard_map_the_axis_is_missing():
    q, k, v = inputs(1, 8, 8, 2, 1)[:3]
    with pytest.raises(
        ValueError,
        match=r"axis 'cp' is not among the bound mesh axes .*: call inside shard_map over it",
    ):
        ring_attention(q, k, v, Mask(), jnp.arange(8), jnp.arange(8), axis="cp")


@pytest.mark.aot
@pytest.mark.parametrize(
    ("dtype", "C"), [(jnp.bfloat16, 128), (jnp.bfloat16, 64), (jnp.float32, 128)]
)
def test_forward_and_backward_compile(dtype, C):
    """Forward: a hop with DMA and the last one. Backward: two kernels in the first, the looped and
    the last hop.

    The types of varying axes are checked; the compiler runs the gradient kernels while keys travel.
    """
    local = lambda q, k, v, p: ring_attention(q, k, v, Mask("causal"), p, p, axis="dp")
    spec = P(None, "dp")
    avals = [((1, 2000, h, C), dtype, spec) for h in (8, 2, 2)] + [((2000,), jnp.int32, P("dp"))]
    text = compiled_text("v5e:2x2", local, *avals, devices=4, out_specs=(spec, P(None, None, "dp")))
    assert kernels(text) == 8
    assert (
        hidden_permutes(text) >= 8
    )  # two shifts of keys, one of gradients, each twice; looped and unlooped


def hidden_permutes(text):
    """Permutes between whose start and done the schedule has a kernel."""
    waiting, hidden = {}, 0
    for line in text.splitlines():
        name = re.match(r"\s*(?:ROOT )?%(\S+) = ", line)
        if "tpu_custom_call" in line:
            waiting = dict.fromkeys(waiting, True)
        elif name and " collective-permute-start(" in line:
            waiting[name[1]] = False
        elif done := re.search(r" collective-permute-done\(.*%([\w.-]+)\)", line):
            hidden += waiting.pop(done[1])
    return hidden
