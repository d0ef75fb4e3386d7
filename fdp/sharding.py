"""Where every parameter lives: PartitionSpecs from the model's metadata, ZeRO storage over dp, and
a report of both.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from tabulate import tabulate

from fdp.collectives import all_gather, vary
from fdp.mesh import AXES, DATA_AXES, AnyMesh, expand

P = PartitionSpec
LAYERS = "layers"  # the stacked part of the parameter tree: leaves are [n_layers, …]


def abstract_params(model: nn.Module, seq_len: int) -> tuple[Any, Any]:
    """(ShapeDtypeStructs, PartitionSpecs) of the parameters at their global shapes; nothing is
    computed.
    """
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0), seq_len, unbox=False))
    return nn.meta.unbox(boxed), nn.get_partition_spec(boxed)


def init_params(model: nn.Module, key: jax.Array, seq_len: int, unbox: bool = True) -> Any:
    """Parameters at their global shapes, equal on every mesh; jit with out_shardings so that no
    replica is made.
    """
    boxed = model.init(key, jnp.zeros((1, seq_len), jnp.int32), jnp.zeros((1,)))["params"]
    return nn.meta.unbox(boxed) if unbox else boxed


def zero_dim(shape: tuple[int, ...], spec: PartitionSpec, dp: int) -> int | None:
    """The dim that ZeRO shards over dp: the largest that no other axis uses and dp divides (None:
    replicate).
    """
    entries = tuple(spec) + (None,) * (len(shape) - len(spec))
    free = [
        d for d, (n, s) in enumerate(zip(shape, entries, strict=True)) if s is None and n % dp == 0
    ]
    return max(free, key=lambda d: shape[d], default=None)


def stored_specs(shapes: Any, specs: Any, zero: int, dp: int) -> Any:
    """Specs in which parameters (and so gradients and optimizer state) rest between steps."""
    if not zero:
        return specs

    def one(leaf: Any, spec: PartitionSpec) -> PartitionSpec:
        dim = zero_dim(leaf.shape, spec, dp)
        entries = list(spec) + [None] * (len(leaf.shape) - len(spec))
        if dim is not None:
            entries[dim] = "dp"
        return P(*entries)

    return jax.tree.map(one, shapes, specs)


def _gather_tree(params: Any, specs: Any, drop: int = 0) -> Any:
    """All-gather every leaf over dp along the dim its stored spec names, first `drop` dims already
    sliced away.
    """

    def one(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        dims = [d for d, entry in enumerate(spec) if entry == "dp"]
        return all_gather(x, "dp", dim=dims[0] - drop) if dims else x

    return jax.tree.map(one, params, specs)


def materialise(stored: Any, specs: Any, zero: int) -> Any:
    """Inside shard_map: stored parameters → the ones the model computes with.

    Marking them as varying first puts the gradient reduction in float32, once a step, outside every
    scan; the transpose of the gather is the reduce-scatter. ZeRO-3 leaves the stacked layers to
    `layer_gather`."""
    params = vary(stored, DATA_AXES)
    if zero == 1:
        return _gather_tree(params, specs)
    if zero == 3:
        rest = {k: v for k, v in params.items() if k != LAYERS}
        return _gather_tree(rest, {k: specs[k] for k in rest}) | {LAYERS: params[LAYERS]}
    return params


def layer_gather(specs: Any, zero: int) -> Callable[[Any], Any] | None:
    """For ZeRO-3, the function that gathers one layer's parameters; None otherwise.

    Inside the layer scan the stacked dim is gone, hence drop=1; Linen hands over {"params": one
    layer}."""
    if zero != 3:
        return None
    return lambda variables: {"params": _gather_tree(variables["params"], specs[LAYERS], drop=1)}


def shardings(mesh: AnyMesh, specs: Any) -> Any:
    """NamedShardings of a tree of PartitionSpecs."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, expand(mesh, s)),
        specs,
        is_leaf=lambda s: isinstance(s, PartitionSpec),
    )


def bytes_per_device(
    shape: tuple[int, ...], spec: PartitionSpec, mesh: AnyMesh, itemsize: int = 4
) -> int:
    """Bytes of one device's shard."""
    ways = math.prod(
        mesh.shape[a]
        for entry in spec
        if entry
        for a in ((entry,) if isinstance(entry, str) else entry)
    )
    return math.prod(shape) * itemsize // ways


def report(shapes: Any, specs: Any, mesh: AnyMesh) -> str:
    """Table of parameter, shape, spec, bytes per device and the mesh axes (degree > 1) along which
    it is replicated.
    """
    rows, total = [], 0
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, leaf), spec in zip(
        leaves, jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P)), strict=True
    ):
        used = {
            a for entry in spec if entry for a in ((entry,) if isinstance(entry, str) else entry)
        }
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
