"""Compile attention kernels, forward and backward, for accelerators that are not here."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fdp.count import aot

OVER_BATCH = PartitionSpec("dp")
PLATFORMS = ("v5e:2x2", "h100:2")
CALLS = ("tpu_custom_call", "__gpu$xla.gpu.triton")  # custom calls of Mosaic and of Pallas-Triton


def compiled_text(
    platform: str,
    f: Callable,
    *avals: tuple,
    gradient: bool = True,
    devices: int = 2,
    out_specs: Any = OVER_BATCH,
) -> str:
    """The compiled program of Σ f(...) inside a checked shard_map over an axis "dp" of absent
    devices.

    avals: (shape, dtype, spec) of every argument; f returns (out, lse). gradient: also by the first
    three arguments."""
    mesh = Mesh(
        np.array(aot.topology_devices(platform)[:devices]), ("dp",), axis_types=(AxisType.Auto,)
    )
    specs = tuple(spec for _, _, spec in avals)
    sharded = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_specs)
    args = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in avals]

    def total(*args):
        return sum(x.astype(jnp.float32).sum() for x in sharded(*args))

    program = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)) if gradient else total)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return aot.compile(program.lower(*args)).as_text()


def kernels(text: str) -> int:
    """How many Pallas kernels a compiled program holds."""
    return sum(text.count(f'custom_call_target="{call}"') for call in CALLS)
