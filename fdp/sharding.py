"""Where every array is stored: PartitionSpecs from metadata and named dims, ZeRO sharding over dp,
and a table of both."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from tabulate import tabulate

from fdp.collectives import all_gather, vary
from fdp.kernels_pallas.walks import choose_backend
from fdp.mesh import AXES, BATCH_AXES, DATA_AXES, AnyMesh, expand
from fdp.models.module import spec_leaf

P = PartitionSpec
DIMS = {"batch": BATCH_AXES, "sequence": "cp", None: None}  # mesh axes of a named dim


def batch_specs(batch: Any, dims: Any) -> Any:
    """PartitionSpecs of a batch. `dims` names the dims of every array; a tuple of names there holds
    for all arrays below it. Raises ValueError for an unknown name or key."""
    if isinstance(dims, Mapping):
        if unknown := batch.keys() - dims.keys():
            raise ValueError(
                f"dims of {sorted(unknown)} are not named: {dict(dims)} names {sorted(dims)}"
            )
        return {name: batch_specs(part, dims[name]) for name, part in batch.items()}
    if unknown := set(dims) - DIMS.keys():
        raise ValueError(f"dims {sorted(unknown)} are unknown: batch, sequence or None")
    return jax.tree.map(lambda _: P(*(DIMS[d] for d in dims)), batch)


def check_dims(batch: Any, dims: Any, degrees: Mapping[str, int]) -> None:
    """Raises ValueError, with equation, values and fix, unless the degrees divide every named dim
    of an abstract batch."""
    specs = jax.tree.leaves(batch_specs(batch, dims), is_leaf=spec_leaf)
    for (path, x), spec in zip(jax.tree_util.tree_leaves_with_path(batch), specs, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if x.ndim != len(spec):
            raise ValueError(
                f"{name} has {x.ndim} dims {x.shape}, but {len(spec)} are named: {spec}"
            )
        for n, entry in zip(x.shape, spec, strict=True):
            axes = (entry,) if isinstance(entry, str) else entry or ()
            ways = math.prod(degrees[a] for a in axes)
            if n % ways:
                raise ValueError(
                    f"{name} {x.shape}: {n} is not divisible by {'·'.join(axes)} = {ways}: choose "
                    f"{-(-n // ways) * ways}, or other degrees of {' and '.join(axes)}"
                )


def zero_dim(shape: tuple[int, ...], spec: PartitionSpec, dp: int) -> int | None:
    """The dim that ZeRO shards over dp: the largest one that no other axis shards and that dp
    divides. None: replicate."""
    entries = tuple(spec) + (None,) * (len(shape) - len(spec))
    free = [
        d for d, (n, s) in enumerate(zip(shape, entries, strict=True)) if s is None and n % dp == 0
    ]
    return max(free, key=lambda d: shape[d], default=None)


def stored_specs(shapes: Any, specs: Any, zero: int, dp: int) -> Any:
    """Specs of parameters between steps; gradients and optimizer state have the same."""
    if not zero:
        return specs

    def one(leaf: Any, spec: PartitionSpec) -> PartitionSpec:
        dim = zero_dim(leaf.shape, spec, dp)
        entries = list(spec) + [None] * (len(leaf.shape) - len(spec))
        if dim is not None:
            entries[dim] = "dp"
        return P(*entries)

    return jax.tree.map(one, shapes, specs)


def _gathered(x: jax.Array, spec: PartitionSpec, drop: int = 0) -> jax.Array:
    """All-gather over dp along the dim that the stored spec shards. `drop`: leading dims that are
    absent, as inside the scan over layers.

    There the shards of a GPU arrive along a new leading dim, as they lie in memory: to gather along
    another dim, XLA:GPU keeps a transposed copy of all layers, so that each shard is contiguous. A
    TPU gathers along any dim, and would only hold a layer twice."""
    dims = [d for d, entry in enumerate(spec) if entry == "dp"]
    if not dims:
        return x
    dim = dims[0] - drop
    if not (drop and dim and choose_backend(None) == "gpu"):
        return all_gather(x, "dp", dim=dim)
    whole = jnp.moveaxis(all_gather(x[None], "dp", dim=0), 0, dim)
    return whole.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def gather(stored: Any, specs: Any, metas: Any, zero: int) -> Any:
    """Inside shard_map: from the stored parameters to those that the model computes with.

    Marking them as varying first makes the gradient reduction float32 and puts it outside every
    scan, once a step. The transpose of the gather is the reduce-scatter. ZeRO-3 leaves stacked
    layers to `LayerGather`."""
    params = vary(stored, DATA_AXES)
    if zero == 0:
        return params

    def one(x: jax.Array, spec: PartitionSpec, meta: Any) -> jax.Array:
        return x if zero == 3 and meta.stacked else _gathered(x, spec)

    return jax.tree.map(one, params, specs, metas)


class LayerGather:
    """For ZeRO-3: by the name of a stack, the function that gathers the parameters of one period.

    Inside the scan the stacked dim is absent, hence drop=1."""

    def __init__(self, specs: Any):
        self.specs = specs

    def __call__(self, stack: str) -> Callable[[Any], Any]:
        """From the stored parameters of one period to the gathered ones."""
        return lambda one: jax.tree.map(lambda x, s: _gathered(x, s, 1), one, self.specs[stack])


def shardings(mesh: AnyMesh, specs: Any) -> Any:
    """NamedShardings of a tree of PartitionSpecs."""
    return jax.tree.map(lambda s: NamedSharding(mesh, expand(mesh, s)), specs, is_leaf=spec_leaf)


def bytes_per_device(
    shape: tuple[int, ...], spec: PartitionSpec, mesh: AnyMesh, itemsize: int = 4
) -> int:
    """Bytes of one device's shard."""
    return math.prod(shape) * itemsize // math.prod(mesh.shape[a] for a in axes_of(spec))


def axes_of(spec: PartitionSpec) -> list[str]:
    """All axes that a spec names."""
    return [a for e in spec if e for a in ((e,) if isinstance(e, str) else e)]


def report(shapes: Any, specs: Any, mesh: AnyMesh) -> str:
    """A table of parameter, shape, spec, bytes per device and the mesh axes (degree > 1) over which
    it is replicated."""
    rows, total = [], 0
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs, is_leaf=spec_leaf), strict=True):
        used = axes_of(spec)
        unused = [a for a in AXES if mesh.shape[a] > 1 and a not in used]
        size = bytes_per_device(leaf.shape, spec, mesh)
        total += size
        name = "/".join(str(k.key) for k in path)
        rows.append(
            (
                name,
                "×".join(map(str, leaf.shape)),
                str(tuple(spec)),
                f"{size:,}",
                " ".join(unused) or "-",
            )
        )
    rows.append(("total", "", "", f"{total:,}", ""))
    return tabulate(rows, headers=("parameter", "shape", "spec", "bytes/device", "replicated over"))
