"""Counts from the jaxpr, per device and without compiling: collectives with their exact dtypes, and
matmul FLOPs.

The jaxpr says what the program asks for; the compiled program (`fdp.count.hlo`) says what runs. XLA
merges collectives of equal groups, removes dead ones and, on CPU, widens bfloat16. Where it only
merges, bytes are equal. Shapes inside shard_map are local, so all counts are per device. Use
`jax.make_jaxpr(f)(*args)`."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from fdp.count import hlo
from fdp.count.hlo import Branches, Collective
from fdp.kernels_pallas.blockwise import AT_MOST

T = TypeVar("T")

# Primitive → HLO op. pvary, pcast and preduced change only the type of a value and are not
# communication.
_REDUCTIONS = (
    "psum",
    "psum_invariant",
    "pmax",
    "pmin",
    "unreduced_psum",
    "unreduced_pmax",
    "unreduced_pmin",
)
_OPS = {
    **dict.fromkeys(_REDUCTIONS, "all-reduce"),
    **dict.fromkeys(("all_gather", "all_gather_invariant", "all_gather_reduced"), "all-gather"),
    **dict.fromkeys(("reduce_scatter", "unreduced_reduce_scatter"), "reduce-scatter"),
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged-all-to-all",
    "ppermute": "collective-permute",
    "psend": "collective-permute",
    "pbroadcast": "collective-broadcast",
}


def collectives(
    closed_jaxpr: Any, mesh_shape: Mapping[str, int], branches: Branches | None = None
) -> list[Collective]:
    """Every collective of the jaxpr, in the terms of `hlo.Collective`; groups of one device are
    left out.

    mesh_shape: axis → degree in mesh order. branches: which branch of a cond is executed, or how
    often each, by a scope of its path, as in `hlo.collectives`. Raises ValueError for an axis
    outside the mesh, an unchosen branch, or a collective in a loop whose trip count is data."""

    def visit(eqn: Any, at: _Place) -> list[Collective]:
        name = eqn.primitive.name.removesuffix("_start")
        found = _collective(eqn, _OPS[name], at, mesh_shape) if name in _OPS else None
        return [found] if found else []

    return list(_Walk(visit, hlo.same_collectives, branches).walk(_open(closed_jaxpr), _Place()))


def dot_flops(
    closed_jaxpr: Any, mesh_shape: Mapping[str, int] | None = None, branches: Branches | None = None
) -> int:
    """Multiply-add FLOPs (2·m·n·k, with batch dimensions and loop trips) of all matmuls and
    convolutions.

    They are per device inside shard_map. Outside it shapes are global, and the partitioner chooses
    the share of each device. With `mesh_shape` of more than one device a matmul there raises
    ValueError; without it the global figure is counted. Ragged matmuls count every row once;
    convolutions count padding. A loop whose number of steps is data counts the upper bound in its
    scope (`at_most_36`), so attention with traced positions is an upper bound."""
    sharded = mesh_shape is not None and math.prod(mesh_shape.values()) > 1

    def visit(eqn: Any, at: _Place) -> list[int]:
        flops = _matmul_flops(eqn)
        if flops and sharded and not at.local:
            raise ValueError(
                f"{eqn.primitive.name} at {at.path or 'top level'} stands outside shard_map"
            )
        return [flops * at.count] if flops else []

    return sum(
        _Walk(visit, lambda a, b: sum(a) == sum(b), branches).walk(_open(closed_jaxpr), _Place())
    )


@dataclass(frozen=True)
class _Place:
    """Context of an equation: executions, scope path, and whether it is inside shard_map."""

    count: int = 1
    path: str = ""
    local: bool = False

    def inside(self, eqn: Any, times: int = 1) -> "_Place":
        names = [self.path, str(eqn.source_info.name_stack), eqn.primitive.name]
        path = "/".join(n for n in names if n)
        return _Place(self.count * times, path, self.local or eqn.primitive.name == "shard_map")


def _open(jaxpr: Any) -> Any:
    """The Jaxpr of a ClosedJaxpr, or the Jaxpr itself: parameters hold one or the other, depending
    on the jax version."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _read(jaxpr: Any) -> list[Any]:
    """The equations whose results are used, in order; compilers omit the others."""
    wanted = {v for v in jaxpr.outvars if not hasattr(v, "val")}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or wanted.intersection(eqn.outvars):
            wanted.update(v for v in eqn.invars if not hasattr(v, "val"))
            kept.append(eqn)
    return kept[::-1]


@dataclass
class _Walk(Generic[T]):
    """Depth-first over all equations; `visit` turns one into results, `same` tells whether two
    branches agree.
    """

    visit: Callable[[Any, _Place], list[T]]
    same: Callable[[list[T], list[T]], bool]
    branches: Branches | None

    def walk(self, jaxpr: Any, at: _Place) -> Iterator[T]:
        if not at.count:
            return
        for eqn in _read(jaxpr):
            yield from self.visit(eqn, at)
            kind = eqn.primitive.name
            if kind == "cond":
                yield from self._cond(eqn, at)
            elif kind == "while":
                yield from self._while(eqn, at)
            elif not _estimate(eqn):
                here = at.inside(eqn, _repeats(eqn))
                for inner in _inner(eqn):
                    yield from self.walk(inner, here)

    def _cond(self, eqn: Any, at: _Place) -> list[T]:
        here, branches = at.inside(eqn), eqn.params["branches"]
        executed = hlo.choose_branch(self.branches, "cond", here.path, len(branches), at.count)
        found = [
            list(self.walk(_open(b), replace(here, count=times)))
            for b, times in zip(branches, executed or [at.count] * len(branches), strict=True)
        ]
        if executed is None:
            if not all(self.same(found[0], other) for other in found[1:]):
                raise ValueError(
                    f"the branches of {here.path} differ in what is counted: pass "
                    f"branches={{'cond': index}}, or a "
                    f"named_scope around it as the key, with index in 0…{len(found) - 1} to count "
                    "one of them"
                )
            return found[0]
        return [x for branch in found for x in branch]

    def _while(self, eqn: Any, at: _Place) -> Iterator[T]:
        here = at.inside(eqn)
        if most := re.search(rf"{AT_MOST}_(\d+)\)*$", str(eqn.source_info.name_stack)):
            yield from self.walk(_open(eqn.params["body_jaxpr"]), at.inside(eqn, int(most[1])))
            return
        for part in ("cond_jaxpr", "body_jaxpr"):
            if list(self.walk(_open(eqn.params[part]), here)):
                raise ValueError(
                    f"{here.path} holds what is counted, but its trip count is data: use lax.scan "
                    "or a fori_loop with "
                    "constant bounds, or read the compiled program with hlo.collectives(…, "
                    "trip_counts=…)"
                )


def _estimate(eqn: Any) -> int:
    """FLOPs that a Pallas kernel states itself, or 0; its loops may depend on its data."""
    estimate = eqn.params.get("cost_estimate") if eqn.primitive.name == "pallas_call" else None
    return int(estimate.flops) if estimate is not None else 0


def _repeats(eqn: Any) -> int:
    """How often one execution of `eqn` runs its inner jaxpr: the length of a scan, or the programs
    of a Pallas grid."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "pallas_call":
        return math.prod(int(n) for n in eqn.params["grid_mapping"].grid)
    return 1


def _inner(eqn: Any) -> Iterator[Any]:
    """Jaxprs among an equation's parameters: jit, shard_map, remat, custom_vjp, custom_jvp, scan,
    pallas_call.
    """
    for param in eqn.params.values():
        for value in param if isinstance(param, tuple | list) else (param,):
            if hasattr(_open(value), "eqns"):
                yield _open(value)


def equations(closed_jaxpr: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Every equation that holds others, but for those in branches, with what its body holds."""
    for eqn in _open(closed_jaxpr).eqns:
        for inner in _inner(eqn) if eqn.primitive.name != "cond" else ():
            yield eqn, inner.eqns
            yield from equations(inner)


def largest_arrays(closed_jaxpr: Any, n: int) -> list[tuple[int, str]]:
    """The n largest arrays computed inside shard_map: (bytes per device, "float32[…] where"), one
    per shape and place.

    These are logical arrays, before the compiler fuses any away. They show where to look when a
    program does not fit, not what it holds."""
    found: dict[str, int] = {}

    def collect(jaxpr: Any, at: _Place) -> None:
        for eqn in jaxpr.eqns:
            scope = str(eqn.source_info.name_stack) or eqn.primitive.name
            bodies = list(_inner(eqn))
            for out in eqn.outvars if at.local and not bodies else ():
                shape, dtype = ",".join(map(str, out.aval.shape)), out.aval.dtype
                found[f"{dtype.name}[{shape}] {scope}"] = out.aval.size * dtype.itemsize
            for inner in bodies:
                collect(inner, at.inside(eqn))

    collect(_open(closed_jaxpr), _Place())
    return [(size, text) for text, size in sorted(found.items(), key=lambda item: -item[1])[:n]]


# Collectives
# -------------------------------------------------------------------------------------------------


def _collective(eqn: Any, op: str, at: _Place, mesh_shape: Mapping[str, int]) -> Collective | None:
    named = eqn.params.get("axes", eqn.params.get("axis_name"))
    named = (
        (named,) if isinstance(named, str) else tuple(a for a in named if isinstance(a, str))
    )  # ints: vmap's own
    if missing := [a for a in named if a not in mesh_shape]:
        raise ValueError(
            f"{eqn.primitive.name} at {at.path} names axes {missing}, not of mesh "
            f"{dict(mesh_shape)}"
        )
    axes = tuple(a for a in mesh_shape if a in named and mesh_shape[a] > 1)
    if "perm" in eqn.params:
        moved = (
            hlo.varying_axes(eqn.params["perm"], {a: mesh_shape[a] for a in named})
            if eqn.params["perm"]
            else ()
        )
        axes = tuple(a for a in axes if a in moved)
    if not axes:
        return None
    groups = eqn.params.get("axis_index_groups")
    size = len(groups[0]) if groups else math.prod(mesh_shape[a] for a in axes)
    operands = eqn.invars[:1] if op == "ragged-all-to-all" else eqn.invars
    payload = sum((v.aval.size * hlo.type_bits(_hlo_type(v.aval.dtype)) + 7) // 8 for v in operands)
    payload *= size if op == "all-gather" else 1
    dtype = "+".join(sorted({_hlo_type(v.aval.dtype) for v in operands}))
    split = eqn.primitive.name.endswith("_start")
    return Collective(
        op, axes, size, payload, hlo.wire_bytes(op, size, payload), at.count, dtype, at.path, split
    )


def _hlo_type(dtype: np.dtype) -> str:
    """float32 → f32, bfloat16 → bf16, int8 → s8, uint4 → u4, float8_e4m3fn → f8e4m3fn, bool →
    pred.
    """
    name = np.dtype(dtype).name
    if name == "bool":
        return "pred"
    kinds = {"bfloat": "bf", "float": "f", "uint": "u", "int": "s", "complex": "c"}
    m = re.match(r"(bfloat|float|uint|int|complex)(\d.*)", name)
    return (kinds[m[1]] + m[2]).replace("_", "") if m else name


# FLOPs
# -------------------------------------------------------------------------------------------------


def _matmul_flops(eqn: Any) -> int:
    """FLOPs of one execution of a dot, ragged dot or convolution equation; 0 for anything else."""
    kind = eqn.primitive.name
    if kind == "pallas_call":
        return _estimate(eqn)
    if kind == "dot_general":
        contract, batch = eqn.params["dimension_numbers"]
        return _contraction_flops(eqn, (*contract[1], *batch[1]))
    if kind in ("ragged_dot", "ragged_dot_general"):
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        contract, batch = numbers.dot_dimension_numbers
        return _contraction_flops(eqn, (*contract[1], *batch[1], *numbers.rhs_group_dimensions))
    if kind == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * eqn.outvars[0].aval.size * math.prod(kernel) // out_features
    return 0


def _contraction_flops(eqn: Any, shared: Sequence[int]) -> int:
    """2 · (elements of the left operand) · (right dimensions that are neither contracted, batched
    nor grouped).
    """
    left, right = (v.aval for v in eqn.invars[:2])
    return 2 * left.size * math.prod(n for d, n in enumerate(right.shape) if d not in shared)
