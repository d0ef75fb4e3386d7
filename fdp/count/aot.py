"""Compile for TPU slices and H100 nodes that are not present, and read what the compiler found.

The compilers come with pip packages (`pip install -e '.[aot]'`); no accelerator, driver or CUDA
library is needed. A compiled program can be inspected (text, memory, overflow of HBM) but not run,
and without a device nothing is autotuned. The result is therefore evidence of what compiles, fits
and overlaps, never a timing.

    prepare_environment()                              # before jax is imported
    mesh = make_mesh(degrees, topology_devices("v5p:4x4x4"))
    compiled = compile(jax.jit(step).lower(*shapes))   # ShapeDtypeStructs, sharded on `mesh`
    memory(compiled), hlo.collectives(compiled.as_text(), dict(mesh.shape))

Importing this module does not import jax."""

import difflib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

# Platform → the package that holds its compiler, and an example of a topology.
_TPU = {"v4": "2x2x1", "v5e": "16x16", "v5p": "4x4x4", "v6e": "16x16", "tpu7x": "2x2x2"}
_GPU = {"h100": "2x8"}
_DEVICES = {"v4": 2, "tpu7x": 2}  # of a chip, where they are not one
_PACKAGES = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}

# An H100 SXM as XLA:GPU describes it (fields of its GpuTargetConfigProto); figures from NVIDIA's
# H100 data sheet and the CUDA programming guide's table for compute capability 9.0.
_H100_TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 13 minor: 0 patch: 0 }
dnn_version_info { major: 9 minor: 12 }
"""


def prepare_environment() -> None:
    """Set, where unset, the environment variables that let the compilers load without hardware.
    Call before jax is imported.

    No accelerator is touched: arrays of this process stay on the CPU."""
    defaults = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask a metadata server which TPU this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compiling processes at once
        # any valid values: they only silence warnings about a missing TPU
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # the plugin would refuse to load without the CUDA libraries
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def available(platform: str) -> bool:
    """Whether the compiler for "tpu", "cuda", a chip ("v5p", "h100") or a topology ("v5p:4x4x4") is
    installed.
    """
    name = platform.partition(":")[0]
    name = "tpu" if name in _TPU else "cuda" if name in _GPU else name
    if name not in _PACKAGES:
        raise ValueError(_unknown(name, [*_PACKAGES, *_TPU, *_GPU]))
    try:
        return importlib.util.find_spec(_PACKAGES[name]) is not None
    except ModuleNotFoundError:  # the parent package is absent
        return False


def size_of(platform_topology: str) -> int:
    """Devices of a topology, without a compiler; see `topology_devices`. Raises ValueError for an
    unknown name or shape."""
    name, sides = _parsed(platform_topology)
    return math.prod(sides) * _DEVICES.get(name, 1)


def _parsed(platform_topology: str) -> tuple[str, list[int]]:
    name, _, shape = platform_topology.partition(":")
    if name not in (*_TPU, *_GPU):
        raise ValueError(_unknown(name, [*_TPU, *_GPU]))
    example = f"{name}:{ {**_TPU, **_GPU}[name] }"
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", shape) or (
        name in _GPU and shape.count("x") > 1
    ):
        alone = f" or {name + ':8'!r}" if name in _GPU else ""
        raise ValueError(f"topology {platform_topology!r} is not of the form {example!r}{alone}")
    return name, [int(side) for side in shape.split("x")]


def topology_devices(platform_topology: str) -> "list[jax.Device]":
    """Devices of an absent machine, to build a Mesh from and to compile for.

    "v5p:4x4x4", "v5e:16x16", "v6e:16x16": TPU chips as a torus (v4 and tpu7x have two devices per
    chip). "h100:8", "h100:2x8": GPUs of one node, or nodes x GPUs. Raises ValueError for an unknown
    name or shape, and ImportError when the compiler is not installed."""
    name, sides = _parsed(platform_topology)
    if not available(name):
        package = _PACKAGES["tpu" if name in _TPU else "cuda"]
        raise ImportError(
            f"compiling for {name} needs the package {package}: pip install -e '.[aot]'"
        )
    prepare_environment()
    from jax.experimental import topologies

    if name in _GPU:  # XLA counts slices x nodes x GPUs
        nodes, gpus = (1, *sides)[-2:]
        kwargs = {
            "platform": "cuda",
            "target_config": _H100_TARGET,
            "topology": f"1x{nodes}x{gpus}",
        }
    else:
        kwargs = {"platform": "tpu", "topology_name": platform_topology}
    try:
        return list(topologies.get_topology_desc(**kwargs).devices)
    except RuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        example = f"{name}:{_TPU.get(name, _GPU.get(name))}"
        raise ValueError(
            f"no such topology {platform_topology!r}, try {example!r}: {error}"
        ) from error


_TILING = "Couldn't find output tile sizes"  # of XLA's Triton products (jaxlib 0.10)


def compile(lowered: Any, compiler_options: dict[str, Any] | None = None) -> Any:
    """`lowered.compile()` without the persistent compilation cache, which cannot load programs of
    absent devices.

    compiler_options: XLA flags of the platform, as Python values:
    {"xla_tpu_enable_latency_hiding_scheduler": True}."""
    import jax

    threshold = "jax_persistent_cache_min_compile_time_secs"  # below it nothing is stored
    before = getattr(jax.config, threshold)
    jax.config.update(threshold, float("inf"))
    try:
        return lowered.compile(compiler_options=compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if _TILING not in str(error):
            raise
        # Without the device nothing is autotuned, and the default tiles fit not every shape.
        options = {**(compiler_options or {}), "xla_gpu_enable_triton_gemm": False}
        return lowered.compile(compiler_options=options)
    finally:
        jax.config.update(threshold, before)


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
    return f"unknown platform {name!r}: did you mean {close!r}? Known: {', '.join(known)}"


@dataclass(frozen=True)
class CompiledMemory:
    """Bytes per device of a compiled program, as planned by the compiler."""

    argument: int
    output: int
    temp: int
    alias: int  # of the outputs, how much reuses donated arguments
    peak: int  # largest at any instant; on CPU, the sum argument + output - alias + temp


def memory(compiled: Any) -> CompiledMemory:
    """Memory per device of `jax.stages.Compiled`. Raises ValueError if the backend gives no
    analysis.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("the backend gives no memory analysis of this program")
    argument, output, alias = (
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
    )
    temp, peak = stats.temp_size_in_bytes, stats.peak_memory_in_bytes
    if _platform(compiled) == "cpu":  # its peak leaves temporaries out
        peak = argument + output - alias + temp
    return CompiledMemory(argument, output, temp, alias, peak)


def _platform(compiled: Any) -> str:
    import jax

    sharding = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))[0]
    return next(iter(sharding.device_set)).platform


@dataclass(frozen=True)
class Buffer:
    """One allocation of a program that does not fit."""

    bytes: int
    shape: str  # with layout, as the compiler prints it
    op_name: str  # the JAX operation it comes from, "" if none


@dataclass(frozen=True)
class HbmError:
    """A program that does not fit the device memory."""

    used_bytes: int
    limit_bytes: int
    buffers: tuple[Buffer, ...]  # largest first; empty where the compiler does not list them


def hbm_error(exc: BaseException) -> HbmError | None:
    """What the compiler reports about a program that overflows HBM; None if `exc` is another error.
    Figures are the compiler's, rounded to 0.01 of their unit."""
    text = str(exc)
    if not re.search(
        r"RESOURCE_EXHAUSTED|CompileTimeHbmOom|Ran out of memory in memory space hbm", text
    ):
        return None
    size = r"(\d[\d.]*[KMGT]?)B?"
    m = re.search(rf"required\b[^()]*\({size}\) exceeds available HBM \({size}\)", text)
    m = m or re.search(rf"Used {size} of {size} hbm", text)
    if not m:
        return None
    buffers = []
    for entry in re.split(r"^\s*\d+\. (?=Size: )", text, flags=re.M)[1:]:
        shape = re.search(r"^\s*Shape: (\S+)", entry, re.M)
        name = re.search(r'op_name="([^"]*)"', entry)
        held = re.match(rf"Size: {size}", entry)
        if held:
            buffers.append(
                Buffer(_bytes(held[1]), shape[1] if shape else "", name[1] if name else "")
            )
    buffers.sort(key=lambda b: -b.bytes)
    return HbmError(_bytes(m[1]), _bytes(m[2]), tuple(buffers))


def _bytes(text: str) -> int:
    """ "15.75G" → bytes; the compiler's K, M, G, T are powers of 1024."""
    powers = {unit: 1024**i for i, unit in enumerate(("", "K", "M", "G", "T"))}
    unit = text.lstrip("0123456789.")
    return round(float(text.removesuffix(unit)) * powers[unit])
