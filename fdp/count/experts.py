"""Memory of an expert layer, compiled for an H100 that need not be there.

    python -m fdp.count.experts        # JSON: layer → bytes of temporaries

A process of its own: the compilers want their environment before jax is imported.

Legend: R rows, D width, F hidden width, E experts."""

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from fdp.count import aot

if TYPE_CHECKING:
    import jax

PLATFORM = "h100:1"


class ExpertLayer(NamedTuple):
    """An expert layer on one device: rows that arrive (token copies), width, hidden width and
    experts of the device."""

    rows: int
    D: int
    F: int
    E: int

    @property
    def kept(self) -> int:
        """Bytes of the bfloat16 activations that the backward pass must keep: rows, gate and up."""
        return 2 * self.rows * (self.D + 2 * self.F)


# 8,192 tokens of 2 choices, all experts on the device; 4,096 tokens of 8 choices on each of 8
# devices that share 256 experts.
LAYERS = {
    "Mixtral-8x7B": ExpertLayer(16384, 4096, 14336, 8),
    "DeepSeek-V3, ep = 8": ExpertLayer(32768, 7168, 2048, 32),
}


class Temporaries(NamedTuple):
    """Bytes of temporaries of forward and backward, ours and `lax.ragged_dot`'s, and what the
    backward pass must keep."""

    ours: int
    ragged: int
    kept: int


def temporaries(layer: ExpertLayer, platform: str, ours: bool) -> int:
    """Bytes of temporaries of forward and backward of an expert layer in bfloat16 on one absent
    device, by `grouped_ffn` or by `lax.ragged_dot`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from fdp.kernels_pallas.grouped import Groups, choose_block, grouped_ffn, most_blocks

    rows, D, F, E = layer
    block = choose_block(rows, E, "gpu" if platform.startswith("h100") else "tpu")
    blocks = most_blocks(rows, E, block)
    rows = blocks * block if ours else rows
    mesh = Mesh(np.array(aot.topology_devices(platform)[:1]), ("dp",), axis_types=(AxisType.Auto,))

    def both(x: Any, w_in: Any, w_out: Any, dy: Any, sizes: Any) -> Any:
        def call(x: Any, w_in: Any, w_out: Any) -> "jax.Array":
            if ours:
                return grouped_ffn(x, w_in, w_out, Groups(sizes, block, blocks))
            gate, up = (lax.ragged_dot(x, w_in[:, p], sizes) for p in (0, 1))
            return lax.ragged_dot(jax.nn.silu(gate) * up, w_out, sizes)

        y, back = jax.vjp(call, x, w_in, w_out)
        return y, back(dy)

    shapes = (rows, D), (E, 2, D, F), (E, F, D), (rows, D)
    where = NamedSharding(mesh, PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=where) for s in shapes]
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32, sharding=where)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = aot.compile(jax.jit(both).lower(*arrays, sizes))
    return aot.memory(program).temp


def table(platform: str = PLATFORM) -> dict[str, Temporaries]:
    """Of every layer."""

    def of(layer: ExpertLayer) -> Temporaries:
        ours, ragged = (temporaries(layer, platform, how) for how in (True, False))
        return Temporaries(ours, ragged, layer.kept)

    return {name: of(layer) for name, layer in LAYERS.items()}


def expert_memory() -> dict[str, Temporaries] | None:
    """`table` of a new process; None where the compiler for it is not installed."""
    if not aot.available(PLATFORM):
        return None
    command = [sys.executable, "-m", "fdp.count.experts"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return {name: Temporaries(*found) for name, found in json.loads(done.stdout).items()}


if __name__ == "__main__":
    aot.prepare_environment()
    print(json.dumps(table()))
