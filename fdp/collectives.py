"""Collectives by logical axis name; the identity where the axis is not bound.

A module written with these functions is at once the single-device reference (outside `shard_map`
nothing is bound, so every collective is the identity and `size` is 1) and the sharded program
(inside `shard_map` it sees its shard).

An axis may be factored into binary sub-axes (`mesh.factor`): "cp" then means all of cp0, cp1, …
that are bound."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from fdp.mesh import expand

Axes = str | Sequence[str]


def bound(axes: Axes) -> tuple[str, ...]:
    """Mesh axis names of degree > 1 bound here (inside shard_map) that make up the logical `axes`,
    outermost first.

    An axis of degree 1 is as good as unbound: a collective over it would compute nothing and still
    keep the compiler from fusing across it."""
    wanted = (axes,) if isinstance(axes, str) else tuple(axes)
    mesh = jax.sharding.get_abstract_mesh()
    names = (n for n in mesh.manual_axes if mesh.shape[n] > 1)
    return tuple(n for n in names if n in wanted or n.rstrip("0123456789") in wanted)


def size(axes: Axes) -> int:
    """Degree of `axes` (their product), 1 where unbound. A Python int: shapes may depend on it."""
    mesh = jax.sharding.get_abstract_mesh()
    total = 1
    for name in bound(axes):
        total *= mesh.shape[name]
    return total


def index(axes: Axes) -> jax.Array | int:
    """Position of this device along `axes`, 0 where unbound."""
    names = bound(axes)
    return lax.axis_index(names) if names else 0


def vary(tree: Any, axes: Axes) -> Any:
    """Mark every leaf as varying over `axes` (idempotent). Its transpose is the psum of the
    cotangent.
    """
    names = bound(axes)

    def one(x: jax.Array) -> jax.Array:
        missing = tuple(n for n in names if n not in jax.typeof(x).mat.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree) if names else tree


def vary_like(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Mark `x` as varying over every axis over which `reference` varies (for scan carries that
    start as constants).
    """
    return vary(x, tuple(jax.typeof(reference).mat.varying)) if in_shard_map() else x


def in_shard_map() -> bool:
    """Whether any mesh axis is bound, that is, whether this code runs inside shard_map."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def psum(x: Any, axes: Axes) -> Any:
    """Sum over `axes`; a value that does not vary along an axis counts once per device of it."""
    names = bound(axes)
    return lax.psum(vary(x, axes), names) if names else x


def broadcast(x: jax.Array, axes: Axes, holder: int) -> jax.Array:
    """What device `holder` of `axes` has, on all of them and typed equal over them. Its transpose
    gives the holder the cotangent."""
    return psum(jnp.where(index(axes) == holder, x, 0), axes) if bound(axes) else x


def pmax(x: jax.Array, axes: Axes) -> jax.Array:
    """Maximum over `axes`."""
    names = bound(axes)
    return lax.pmax(vary(x, axes), names) if names else x


def all_gather(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """Concatenate the shards along `dim`. The result is typed varying: the transpose is a
    reduce-scatter."""
    names = bound(axes)
    return lax.all_gather(vary(x, axes), names, axis=dim, tiled=True) if names else x


def reduce_scatter(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """Sum over `axes` and keep this device's slice of `dim` (its length must be divisible by the
    degree).
    """
    names = bound(axes)
    return lax.psum_scatter(vary(x, axes), names, scatter_dimension=dim, tiled=True) if names else x


def all_to_all(x: jax.Array, axes: Axes, split_dim: int, concat_dim: int) -> jax.Array:
    """Cut `split_dim` into one piece for each device of `axes` and join what arrives along
    `concat_dim`: [.., split, .., concat, ..] → [.., split/n, .., concat·n, ..] with n devices.
    """
    names = bound(axes)
    return lax.all_to_all(vary(x, axes), names, split_dim, concat_dim, tiled=True) if names else x


def ragged_all_to_all(
    x: jax.Array, axes: Axes, rows: int, here: tuple[Any, Any], there: tuple[Any, Any]
) -> jax.Array:
    """Pieces of dim 0 go to the devices of `axes`, equally many to each: [rows, ...], zero where
    none arrives. Accelerators only.

    here: (first row in `x`, rows) of every piece that leaves. there: (first row at its receiver of
    every piece that leaves, rows of every piece that arrives). All int32, by peer."""
    (start, send), (target, receive) = here, there
    names = bound(axes)
    x = vary(x, axes)
    whole = vary_like(jnp.zeros((rows, *x.shape[1:]), x.dtype), x)
    plan = [vary_like(jnp.asarray(a, jnp.int32), x) for a in (start, send, target, receive)]
    return lax.ragged_all_to_all(x, whole, *plan, axis_name=names)


def shift(x: jax.Array, axes: Axes, by: int = 1, *, cyclic: bool = True) -> jax.Array:
    """What the device `by` places before this one along `axes` holds (after it, where negative).

    Not cyclic: zeros where there is no such device.
    """
    names, n = bound(axes), size(axes)
    if by == 0 or (cyclic and by % n == 0):
        return x
    if not names:
        return jnp.zeros_like(x)
    pairs = [(i, (i + by) % n) for i in range(n) if cyclic or 0 <= i + by < n]
    return lax.ppermute(vary(x, axes), names, pairs)


def permute(x: jax.Array, axis: str, pairs: Sequence[tuple[int, int]]) -> jax.Array:
    """What the partner of this device in `pairs` (from, to) holds; zeros where it has none."""
    names = bound(axis)
    return lax.ppermute(vary(x, axis), names, pairs) if names else x


def split(axis: str, inner: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The bound names of `axis` as (outer, inner): the inner ones are the trailing sub-axes with
    `inner` devices, neighbours on the fastest links.

    Raises ValueError where no trailing sub-axes have that many devices.
    """
    names = bound(axis)
    for i in range(len(names) + 1):
        if size(names[i:]) == inner:
            return names[:i], names[i:]
    degrees = "·".join(str(size(n)) for n in names) or "1"
    raise ValueError(
        f"{inner} devices are not a product of trailing sub-axes of {axis} = {degrees}: "
        f"factor the axis, fdp.mesh.factor(mesh, {axis!r})"
    )


def shard_map(
    f: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map` over all axes with varying-axis types checked, axes of degree 1 taken out of
    the specs.

    A value whose spec names an axis counts as varying along it, even at degree 1; see `bound` for
    why that matters."""

    def entry(e: Any) -> Any:
        names = tuple(n for n in ((e,) if isinstance(e, str) else e or ()) if mesh.shape[n] > 1)
        return (names[0] if isinstance(e, str) else names) if names else None

    def strip(specs: Any) -> Any:
        return jax.tree.map(
            lambda s: PartitionSpec(*map(entry, expand(mesh, s))),
            specs,
            is_leaf=lambda s: isinstance(s, PartitionSpec),
        )

    return jax.shard_map(
        f, mesh=mesh, in_specs=strip(in_specs), out_specs=strip(out_specs), check_vma=True
    )
