"""Compiling for absent hardware, and reading what its compilers say."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fdp.count import aot, hlo, jaxpr
from fdp.price import hardware

fast = pytest.mark.fast
P = PartitionSpec
SHAPE = {"dp": 2, "cp": 2, "tp": 2}
AXES = tuple(SHAPE)


def test_environment_is_prepared_without_importing_jax_and_keeps_what_is_set():
    code = """
import os, sys
from fdp.count import aot
aot.prepare_environment()
assert "jax" not in sys.modules and "numpy" not in sys.modules
names = "JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"
print(*(os.environ[name] for name in names))
print(os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"], os.environ["TPU_WORKER_HOSTNAMES"])
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "TPU"))} | {
        "TPU_WORKER_HOSTNAMES": "mine"
    }
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert out.split() == ["cpu", "1", "1", "1", "mine"]


@fast
def test_missing_compiler_is_reported_not_raised(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    for platform in ("tpu", "cuda", "v5e", "h100:8"):
        assert not aot.available(platform)
    with pytest.raises(
        ImportError, match=r"compiling for v5p needs the package libtpu: pip install -e '\.\[aot\]'"
    ):
        aot.topology_devices("v5p:4x4x4")
    with pytest.raises(
        ImportError, match=r"needs the package jax_plugins.xla_cuda13: pip install -e '\.\[aot\]'"
    ):
        aot.topology_devices("h100:8")

    def absent_parent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(aot.importlib.util, "find_spec", absent_parent)
    assert not aot.available("cuda")


@fast
@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5f:2x2", "unknown platform 'v5f': did you mean 'v5[ep]'"),
        ("H100:8", "unknown platform 'H100': did you mean 'h100'"),
        ("v5p", "topology 'v5p' is not of the form 'v5p:4x4x4'"),
        ("v5e:4x", "is not of the form 'v5e:16x16'"),
        ("v5e:0x4", "is not of the form"),
        ("h100:2x2x8", "is not of the form 'h100:2x8'"),
    ],
)
def test_bad_topologies_name_a_good_one(topology, message):
    with pytest.raises(ValueError, match=message):
        aot.topology_devices(topology)
    with pytest.raises(ValueError, match="unknown platform 'rocm'"):
        aot.available("rocm")


TOTAL = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total \
memory required for HLO temporaries (44.50G) exceeds available HBM (15.75G). HLO module: jit_big.
See https://openxla.org/xla/errors/error_1000 for more details."""
LISTED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory \
space hbm. Used 20.50G of 15.48G hbm. Exceeded hbm capacity by 5.02G.

Total hbm usage >= 21.02G:
    reserved        530.00M
    program          20.50G
    arguments            0B

  Largest program allocations in hbm:

  1. Size: 512.00M
     Operator: op_name="jit(step)/mul" source_file="model.py" source_line=3
     Shape: bf16[4096,65536]{1,0:T(8,128)(2,1)}
     Unpadded size: 512.00M
     XLA label: fusion.1 = fusion(p), kind=kLoop
     Allocation type: HLO temp
     ==========================

  2. Size: 16.00G
     Shape: f32[1,4096,1048576]{2,1,0:T(8,128)}
     Unpadded size: 16.00G
     Allocation type: HLO temp
     ==========================
"""


@fast
def test_hbm_overflow_is_read_from_either_message():
    gib = 2**30
    assert aot.hbm_error(RuntimeError(TOTAL)) == aot.HbmError(int(44.5 * gib), int(15.75 * gib), ())
    assert aot.hbm_error(
        RuntimeError(TOTAL.replace("E1000: CompileTimeHbmOom: ", ""))
    ).used_bytes == int(44.5 * gib)
    listed = aot.hbm_error(RuntimeError(LISTED))
    assert (listed.used_bytes, listed.limit_bytes) == (int(20.5 * gib), round(15.48 * gib))
    assert listed.buffers == (
        aot.Buffer(16 * gib, "f32[1,4096,1048576]{2,1,0:T(8,128)}", ""),
        aot.Buffer(512 * 2**20, "bf16[4096,65536]{1,0:T(8,128)(2,1)}", "jit(step)/mul"),
    )
    assert aot.hbm_error(ValueError("INVALID_ARGUMENT: something else")) is None
    assert aot.hbm_error(MemoryError("RESOURCE_EXHAUSTED: no figures here")) is None


@fast
def test_memory_of_a_cpu_program():
    """a[256, 256] donated and overwritten, a scalar beside it; XLA:CPU's own peak leaves the
    temporaries out.
    """

    def f(a):
        return jnp.sort(a @ a), a.sum()

    compiled = jax.jit(f, donate_argnums=0).lower(jnp.zeros((256, 256))).compile()
    m = aot.memory(compiled)
    block = 256 * 256 * 4
    assert (m.argument, m.alias) == (block, block)
    assert block + 4 <= m.output <= block + 64
    assert m.temp > 0
    assert m.peak == m.argument + m.output - m.alias + m.temp


# With the compilers
# -------------------------------------------------------------------------------------------------


def vary(x):
    missing = tuple(a for a in AXES if a not in jax.typeof(x).mat.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def ring(x, w):
    """Five rounds of a permute beside a matmul, each with three inner all-reduces; then a gather
    and its transpose.
    """

    def inner(c, _):
        return vary(lax.psum(c * 0.5, "tp")), None

    def outer(c, _):
        moved = lax.ppermute(c, "cp", [(0, 1), (1, 0)])
        return moved + lax.scan(inner, c @ w, None, length=3)[0], None

    y = lax.scan(outer, x, None, length=5)[0]
    return lax.psum_scatter(lax.all_gather(y, "dp", tiled=True) * 2, "cp", tiled=True)


def on(topology, f, *avals):
    """(compiled, jaxpr) of f inside shard_map on a 2x2x2 mesh of absent devices; the first argument
    is sharded.
    """
    devices = np.array(aot.topology_devices(topology)[:8]).reshape(2, 2, 2)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
    specs = (P(AXES), *(P(),) * (len(avals) - 1))
    g = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P(AXES))
    args = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, p))
        for s, p in zip(avals, specs, strict=True)
    ]
    return aot.compile(jax.jit(g).lower(*args)), jax.make_jaxpr(g)(*args)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("topology", "count", "chip"),
    [
        ("v5e:2x4", 8, "v5e"),
        ("v5p:4x4x4", 64, "v5p"),
        ("v6e:16x16", 256, "v6e"),
        ("h100:8", 8, "h100"),
        ("h100:2x8", 16, "h100"),
    ],
)
def test_topologies(topology, count, chip):
    assert aot.available(topology)
    devices = aot.topology_devices(topology)
    assert len(devices) == count
    assert hardware.detect(devices[0]) is hardware.chip(chip)
    if chip == "h100":
        nodes = {d.process_index for d in devices}
        assert len(nodes) == (2 if topology == "h100:2x8" else 1)


@pytest.mark.aot
def test_topology_the_compiler_refuses():
    with pytest.raises(ValueError, match=r"no such topology 'v5e:3x5', try 'v5e:16x16'"):
        aot.topology_devices("v5e:3x5")


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x4", "h100:8"])
def test_compiled_bytes_equal_the_jaxpr_in_bfloat16(topology):
    """TPU gives no trip counts, GPU gives them; both run bfloat16 as it is, and both overlap the
    ring.
    """
    compiled, closed = on(topology, ring, (128, 256), (256, 256))
    cols = hlo.collectives(compiled.as_text(), SHAPE)
    n = 16 * 256 * 2
    assert hlo.summary(cols) == {
        ("collective-permute", ("cp",)): (5, 5 * n, 5.0 * n),
        ("all-reduce", ("tp",)): (15, 15 * n, 15.0 * n),
        ("all-gather", ("dp",)): (1, 2 * n, 1.0 * n),
        ("reduce-scatter", ("cp",)): (1, 2 * n, 1.0 * n),
    }
    assert hlo.summary(cols) == hlo.summary(jaxpr.collectives(closed, SHAPE))
    assert {c.dtype for c in cols} == {"bf16"}
    assert [c.is_async for c in cols if c.op == "collective-permute"] == [True]


@pytest.mark.aot
def test_gathers_spread_over_matmuls_count_once_on_tpu():
    def f(x, *ws):
        for w in ws:
            x = jnp.maximum(x @ lax.all_gather(vary(w), "dp", tiled=True), 0)
        return x

    compiled, closed = on("v5e:2x4", f, (8192, 2048), *((1024, 2048),) * 4)
    text = compiled.as_text()
    cols = hlo.collectives(text, SHAPE)
    assert "chain_id" in text  # the program does contain what this test is about
    assert hlo.summary(cols) == hlo.summary(jaxpr.collectives(closed, SHAPE))
    assert any(c.is_async for c in cols)


@pytest.mark.aot
def test_compile_leaves_the_persistent_cache_alone(recwarn):
    """JAX would write an entry that it then fails to read, with a warning, in every later
    process.
    """
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    sharding = NamedSharding(Mesh(np.array(aot.topology_devices("v5e:2x2")[:1]), ("tp",)), P())
    new = float(
        np.random.default_rng().integers(2**30)
    )  # a program that no earlier run can have stored
    lowered = jax.jit(lambda x: x * new).lower(
        jax.ShapeDtypeStruct((3, 5), jnp.float32, sharding=sharding)
    )
    options = {"xla_tpu_enable_latency_hiding_scheduler": True}
    for _ in range(2):
        assert "ENTRY" in aot.compile(lowered, options).as_text()
        jax.clear_caches()
    assert not [w for w in recwarn if "compilation cache" in str(w.message)]
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before


@pytest.mark.aot
def test_overflow_and_memory_of_a_tpu():
    (device, *_) = aot.topology_devices("v5e:2x2")
    sharding = NamedSharding(Mesh(np.array([device]), ("tp",), axis_types=(AxisType.Auto,)), P())
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=sharding)
    m = aot.memory(aot.compile(jax.jit(lambda x: x @ x).lower(x)))
    assert (m.argument, m.output, m.alias) == (2**21, 2**21, 0)
    assert m.peak >= m.argument + m.output
    big = jax.ShapeDtypeStruct((2**20, 2**14), jnp.bfloat16, sharding=sharding)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        aot.compile(jax.jit(lambda x: (x * 2, x * 3)).lower(big))
    found = aot.hbm_error(error.value)
    assert found.limit_bytes == int(15.75 * 2**30)
    assert found.used_bytes >= 3 * 2**35
