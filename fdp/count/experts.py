"""Memory of an expert layer, and what runs beside its ragged all-to-all, compiled for accelerators
that need not be there.

    python -m fdp.count.experts memory    # JSON: layer → bytes of temporaries
    python -m fdp.count.experts beside    # JSON: compiler → `Overlap` with the shared experts

A process of its own: the compilers want their environment before jax is imported.

Legend: R rows, D width, F hidden width, E experts."""

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from fdp.count import aot
from fdp.count.overlap import Overlap, overlap

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


# Two nodes of eight devices, and compiler options. By default a v5p waits for every ragged
# all-to-all where it stands.
ASYNC = "xla_tpu_enable_async_ragged_all_to_all"
COMPILERS: dict[str, tuple[str, dict[str, Any]]] = {
    "h100": ("h100:2x8", {}),
    f"v5p with {ASYNC}": ("v5p:2x2x4", {ASYNC: True}),
}


def exchange(platform: str) -> Any:
    """The lowered forward and backward pass of a layer of experts on two nodes with a shared expert
    beside them, in bfloat16. Small: a compiler's time is the cost."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from fdp.collectives import shard_map
    from fdp.kernels_pallas.grouped import grouped_ffn
    from fdp.mesh import AXES, expand, factor, make_mesh
    from fdp.models.moe import SHARED
    from fdp.parallel.expert.exchange import Load
    from fdp.parallel.expert.plan import Dispatch

    tokens, choices, D, F, E = 1024, 2, 512, 512, 16
    devices = aot.topology_devices(platform)
    mesh = factor(make_mesh(dict.fromkeys(AXES, 1) | {"ep": len(devices)}, devices), "ep")
    plan = Dispatch("two_level", len(devices) // 2)

    def local(ids: Any, x: Any, gates: Any, weights: Any, dy: Any) -> Any:
        def run(x: Any, gates: Any, weights: Any) -> Any:
            w_in, w_out, s_in, s_out = weights

            @jax.named_scope(SHARED)
            def shared(x: Any) -> Any:
                return (jax.nn.silu(x @ s_in[0]) * (x @ s_in[1])) @ s_out

            load = Load(ids, gates, tokens * choices, tokens, E)
            return plan(x, load, lambda r, groups: grouped_ffn(r, w_in, w_out, groups), shared)[0]

        y, back = jax.vjp(run, x, gates, weights)
        return y, back(dy)

    def array(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> Any:
        where = NamedSharding(mesh, expand(mesh, spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    T, rows, whole = tokens * len(devices), PartitionSpec("ep"), PartitionSpec()
    x = array((T, D), jnp.bfloat16, rows)
    ids, gates = (array((T, choices), dtype, rows) for dtype in (jnp.int32, jnp.float32))
    shapes = (E, 2, D, F), (E, F, D), (2, D, F), (F, D)
    specs = rows, rows, whole, whole
    weights = [array(s, jnp.bfloat16, spec) for s, spec in zip(shapes, specs, strict=True)]
    grads = rows, rows, list(specs)
    program = shard_map(local, mesh, (rows, *grads, rows), (rows, grads))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(program).lower(ids, x, gates, weights, x)


def overlaps() -> dict[str, Overlap]:
    """Of every compiler of `COMPILERS` that is installed."""
    from fdp.count.counts import RAGGED
    from fdp.models.moe import SHARED

    found = {}
    for name, (platform, options) in COMPILERS.items():
        if aot.available(platform):
            text = aot.compile(exchange(platform), options).as_text()
            found[name] = overlap(text, RAGGED, SHARED)
    return found


def expert_memory() -> dict[str, Temporaries] | None:
    """`table` of a new process; None where the compiler for it is not installed."""
    if not aot.available(PLATFORM):
        return None
    return {name: Temporaries(*found) for name, found in _process("memory").items()}


def shared_beside() -> dict[str, Overlap]:
    """`overlaps` of a new process."""
    return {name: Overlap(*found) for name, found in _process("beside").items()}


def _process(what: str) -> Any:
    command = [sys.executable, "-m", "fdp.count.experts", what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    aot.prepare_environment()
    print(json.dumps(table() if sys.argv[1] == "memory" else overlaps()))
