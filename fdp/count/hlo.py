"""Which collectives a compiled program runs, over which mesh axes, how often and with how many
bytes.

Input is `compiled.as_text()` of any XLA backend. Bytes are multiplied by loop trip counts; a
`-start`/`-done` pair counts once. XLA:CPU runs bfloat16 collectives in float32, so counts of CPU
programs are right for float32 and wider types only. For other types use `fdp.count.jaxpr` (logical
bytes), or programs compiled ahead of time for TPU or GPU (`fdp.count.aot`). Remote copies inside a
Pallas kernel are no XLA collectives and are not found."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from tabulate import tabulate

from fdp.count.hlo_text import HloModule, Instruction, attribute, ints, replica_groups

# Compiler options for programs that are only counted or run once. They shorten the generation of
# machine code, the slowest part of compiling. It follows the passes over collectives, so counts are
# the same; planned memory changes by about 0.1 %.
QUICK: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

# Of a conditional: the index of the branch that is executed, or, in a loop, how often each branch
# is; None: not known.
Choice = int | Sequence[int] | None
# Chooses it: {name or scope in its op_name: choice}, or (op_name, branches) -> choice.
Branches = Mapping[str, int] | Callable[[str, int], Choice]
# Where nothing else is said, experts are dispatched by the buffers that usually suffice
# (`fdp.parallel.expert.plan`), not by those of the worst case.
USUAL: Branches = {"fits": 1}

MAX_TRIPS = 1_000_000


@dataclass(frozen=True)
class Collective:
    """One collective instruction of the program, seen from one device.

    payload_bytes: bytes of the unsharded array of ONE execution. That is the operand of all-reduce,
    reduce-scatter, all-to-all, permute and broadcast, and the result of all-gather, so all-gather
    and its transpose, reduce-scatter, have the same payload. For ragged-all-to-all it is the whole
    operand buffer, an upper bound, as the sizes are data.

    wire_bytes: bytes this device SENDS in ONE execution by the ring algorithm, see `wire_bytes`."""

    op: str  # one of hlo_text.OPS
    axes: tuple[str, ...]  # mesh axes that vary inside a group, in mesh order
    group_size: int  # devices of one group; of a permute, the product of the degrees of `axes`
    payload_bytes: int
    wire_bytes: float
    count: int  # executions in one run of the program, loop trip counts multiplied in
    dtype: str  # HLO spelling: f32, bf16, s8, …; "bf16+f32" for a fused collective of several
    computation: str  # where it stands: HLO computation name, or scope path of a jaxpr
    is_async: (
        bool  # split into start and done, so that it may overlap with what stands between them
    )


def wire_bytes(op: str, group_size: int, payload_bytes: int) -> float:
    """Bytes sent per device by a ring over `group_size` = k devices: all-reduce 2(k-1)/k·n,
    all-gather, reduce-scatter and all-to-all (k-1)/k·n, permute and broadcast n, where n =
    `payload_bytes` as defined in `Collective`."""
    if op in ("collective-permute", "collective-broadcast"):
        return float(payload_bytes)
    passes = 2 if op == "all-reduce" else 1
    return passes * (group_size - 1) * payload_bytes / group_size


def type_bits(dtype: str) -> int:
    """Bits of one element of an HLO element type (f32, bf16, f8e4m3fn, s4, pred, …). Raises
    ValueError if unknown.
    """
    if dtype in ("pred", "token", "opaque"):
        return 8 if dtype == "pred" else 0
    if not (m := re.match(r"(?:bf|[sufc])(\d+)", dtype)):
        raise ValueError(f"unknown HLO element type {dtype!r}")
    return int(m[1])


def collectives(
    text: str,
    mesh_shape: Mapping[str, int],
    branches: Branches | None = None,
    trip_counts: Mapping[str, int] | None = None,
) -> list[Collective]:
    """Every collective of the program `text`: mesh axes, bytes, executions. Groups of one device
    are left out.

    mesh_shape: axis → degree in mesh order, as `dict(mesh.shape)`; a device id is a position in the
    flattened mesh. branches: which branch of a `conditional` is executed, or how often each; needed
    only where the branches' collectives differ. trip_counts: `while` instruction name → iterations,
    for loops whose bound is data. Raises ValueError for a mesh that does not fit the program, an
    unknown trip count, and a branch that was not chosen."""
    total = math.prod(mesh_shape.values())
    m = re.search(r"^HloModule .*?\bnum_partitions=(\d+)", text, re.M)
    if m and int(m[1]) != total:
        raise ValueError(
            f"the program has {m[1]} partitions but the mesh {dict(mesh_shape)} has {total} devices"
        )
    return _Audit(HloModule(text), dict(mesh_shape), branches, dict(trip_counts or {})).run()


def summary(
    cols: Iterable[Collective],
) -> dict[tuple[str, tuple[str, ...]], tuple[int, int, float]]:
    """(op, axes) → (executions, payload bytes, wire bytes) per device, summed over all
    executions."""
    out: dict[tuple[str, tuple[str, ...]], tuple[int, int, float]] = {}
    for c in cols:
        n, payload, wire = out.get((c.op, c.axes), (0, 0, 0.0))
        out[c.op, c.axes] = (
            n + c.count,
            payload + c.count * c.payload_bytes,
            wire + c.count * c.wire_bytes,
        )
    return out


def bytes_per_axis(cols: Iterable[Collective]) -> dict[tuple[str, ...], float]:
    """Axes → wire bytes sent per device, summed over all executions. A collective over several axes
    is one entry."""
    out: dict[tuple[str, ...], float] = defaultdict(float)
    for c in cols:
        out[c.axes] += c.count * c.wire_bytes
    return dict(out)


def table(cols: Sequence[Collective]) -> str:
    """`summary` for the terminal, largest wire bytes first."""
    overlappable: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for c in cols:
        overlappable[c.op, c.axes] += c.count if c.is_async else 0
    rows = [
        (op, "·".join(axes), n, overlappable[op, axes], f"{payload:,}", f"{wire:,.0f}")
        for (op, axes), (n, payload, wire) in sorted(
            summary(cols).items(), key=lambda kv: -kv[1][2]
        )
    ]
    headers = ("op", "axes", "executions", "async", "payload bytes", "wire bytes sent")
    return tabulate(
        rows, headers, colalign=("left", "left", *("right",) * 4), disable_numparse=True
    )


def choose_branch(
    branches: Branches | None, name: str, op_name: str, n: int, count: int
) -> list[int] | None:
    """How often each of `n` branches of the conditional `name` is executed, of `count` times in
    all, by `branches` (None: by USUAL); None where it does not say.

    A mapping key is the name of the instruction or one scope of its op_name ("cond" in
    "jit(f)/shard_map/cond")."""
    branches = USUAL if branches is None else branches
    chosen = choice(branches, op_name, n, name)
    if chosen is None:
        return None
    if isinstance(chosen, int):
        if not 0 <= chosen < n:
            raise ValueError(
                f"branch {chosen} was chosen for conditional {name} ({op_name}), which has {n} "
                "branches"
            )
        return [count if i == chosen else 0 for i in range(n)]
    total = sum(chosen)
    if len(chosen) != n or count % total:
        raise ValueError(
            f"executions {list(chosen)} were given for conditional {name} ({op_name}), which has "
            f"{n} branches and is executed {count} times"
        )
    return [count // total * i for i in chosen]


def choice(branches: Branches, op_name: str, n: int, name: str = "") -> Choice:
    """What `branches` says of a conditional of n branches: a mapping by the name of its
    instruction, its op_name or a scope of that."""
    if callable(branches):
        return branches(op_name or name, n)
    known = {name, op_name, *re.split(r"[/()]+", op_name)}
    return next((i for key, i in branches.items() if key in known), None)


def same_collectives(a: Iterable[Collective], b: Iterable[Collective]) -> bool:
    """Whether two branches communicate alike, at whatever place their instructions are."""

    def key(cols: Iterable[Collective]) -> Counter[tuple[Any, ...]]:
        return Counter(
            (c.op, c.axes, c.group_size, c.payload_bytes, c.dtype, c.count) for c in cols
        )

    return key(a) == key(b)


def varying_axes(groups: Iterable[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Axes along which the members of at least one group differ. `groups` hold positions in the
    flattened mesh."""
    sizes = tuple(mesh_shape.values())
    moving = np.zeros(len(sizes), bool)
    for group in groups:
        if max(group) >= math.prod(sizes):
            raise ValueError(
                f"the program names device {max(group)}, outside the mesh {dict(mesh_shape)}"
            )
        where = np.array(np.unravel_index(np.array(group), sizes))
        moving |= (where != where[:, :1]).any(axis=1)
    return tuple(a for a, moves in zip(mesh_shape, moving, strict=True) if moves)


# Trip counts: constant propagation through the scalars of a loop
# -----------------------------------------------------

Value = Any  # an int, a tuple of values, or None: not a known scalar

_SCALAR: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": lambda a: 1 - a,  # of a predicate
    "negate": lambda a: -a,
    "select": lambda p, a, b: a if p else b,
    "clamp": lambda low, x, high: min(max(x, low), high),
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_SAME = (
    "copy",
    "convert",
    "bitcast",
    "optimization-barrier",
    "opt-barrier",
    "copy-start",
    "copy-done",
)


@dataclass
class _Evaluator:
    """Evaluates integer scalars of one computation whose parameters are (partly) known."""

    module: HloModule
    computation: str
    params: Sequence[Value]
    memo: dict[str, Value] = field(default_factory=dict)

    def value(self, name: str) -> Value:
        if name not in self.memo:
            instruction = self.module.computations[self.computation].get(name)
            self.memo[name] = self._compute(instruction) if instruction else None
        return self.memo[name]

    def _compute(self, i: Instruction) -> Value:
        if not re.match(r"\(|(?:[su]\d+|pred)\[\]", i.type):  # arrays do not steer a counted loop
            return None
        if i.opcode == "parameter":
            index = int(i.args[0])
            return self.params[index] if index < len(self.params) else None
        if i.opcode == "constant":
            literal = {"true": "1", "false": "0"}.get(i.args[0].strip(), i.args[0].strip())
            return int(literal) if re.fullmatch(r"-?\d+", literal) else None
        if i.opcode in (
            "fusion",
            "call",
            "tuple",
            "get-tuple-element",
            "compare",
            *_SCALAR,
            *_SAME,
        ):
            return self._apply(i, [self.value(o) for o in i.operands])
        return None

    def _apply(self, i: Instruction, values: list[Value]) -> Value:
        if i.opcode == "tuple":
            return tuple(values)
        if i.opcode in ("fusion", "call"):
            return run(self.module, i.called[0], values)
        if any(v is None for v in values):
            return None
        if i.opcode == "get-tuple-element":
            return values[0][int(attribute(r"index=(\d+)", i.attrs))]
        if i.opcode == "compare":
            return int(_COMPARE[attribute(r"direction=(\w+)", i.attrs)](*values))
        return values[0] if i.opcode in _SAME else _SCALAR[i.opcode](*values)


def run(module: HloModule, computation: str, params: Sequence[Value]) -> Value:
    """Value of a computation's root; None where it is no scalar that follows from `params` and
    constants."""
    return _Evaluator(module, computation, params).value(module.roots[computation].name)


# The audit
# -------------------------------------------------------------------------------------------------


@dataclass
class _Audit:
    """Visits the computations from the entry and multiplies the executions."""

    module: HloModule
    mesh_shape: dict[str, int]
    branches: Branches | None
    trip_counts: dict[str, int]

    def run(self) -> list[Collective]:
        self.communicates = cache(self._communicates)
        return [c for c in self.walk(self.module.entry, 1, (), False) if c.count]

    def _communicates(self, computation: str) -> bool:
        """Whether a computation, or one that it runs, holds a collective."""
        for i in self.module.computations.get(computation, {}).values():
            inner = i.called
            if i.opcode == "while":
                inner = list(self.loop(i))
            elif i.opcode == "conditional":
                inner = [computation for computation, _ in i.branches]
            if i.collective or any(self.communicates(c) for c in inner):
                return True
        return False

    def walk(
        self, computation: str, count: int, params: Sequence[Value], is_async: bool
    ) -> Iterator[Collective]:
        """Collectives of one computation executed `count` times with (partly) known parameters."""
        known = _Evaluator(self.module, computation, params)
        chains: set[str] = set()
        for i in self.module.computations.get(computation, {}).values():
            if i.collective:
                yield from self.leaf(computation, i, count, is_async)
            elif i.opcode == "while":
                yield from self.while_loop(i, count, known)
            elif i.opcode == "conditional":
                yield from self.conditional(i, count, known)
            elif not i.opcode.endswith(("-done", "-update")):
                values = [known.value(o) for o in i.operands] if i.called else []
                for c in i.called:
                    if self.communicates(c) and not self._continues(i, c, chains):
                        later = (
                            is_async or i.opcode.endswith("-start") or self._chain(c) is not None
                        )
                        yield from self.walk(c, count, values, later)

    def leaf(
        self, computation: str, i: Instruction, count: int, is_async: bool
    ) -> Iterator[Collective]:
        assert i.collective is not None
        op, split = i.collective
        if op == "all-reduce" and computation.startswith("all-reduce-scatter"):
            op = "reduce-scatter"  # XLA:TPU writes a fused reduce-scatter as all-reduce and slice
        groups = replica_groups(i.attrs, math.prod(self.mesh_shape.values()))
        axes = varying_axes(groups, self.mesh_shape)
        if not axes:
            return
        size = max(len(g) for g in groups)
        if op == "collective-permute":
            size = math.prod(self.mesh_shape[a] for a in axes)
        types = list(self.module.operand_types(computation, i))
        arrays = re.findall(
            r"\b([a-z]\w*)\[([^\]]*)\]", " ".join(types[:1] if op == "ragged-all-to-all" else types)
        )
        payload = sum((math.prod(ints(dims)) * type_bits(dtype) + 7) // 8 for dtype, dims in arrays)
        payload *= size if op == "all-gather" else 1
        dtype = "+".join(sorted({d for d, _ in arrays}))
        wire = wire_bytes(op, size, payload)
        yield Collective(
            op, axes, size, payload, wire, count, dtype, computation, split or is_async
        )

    def loop(self, i: Instruction) -> tuple[str, str]:
        """(condition, body) computations of a while instruction."""
        condition, body = (
            attribute(rf"\b{part}=%?([\w.\-]+)", i.attrs) for part in ("condition", "body")
        )
        return condition, body

    def while_loop(self, i: Instruction, count: int, known: _Evaluator) -> Iterator[Collective]:
        condition, body = self.loop(i)
        if not (self.communicates(condition) or self.communicates(body)):
            return
        state = known.value(i.operands[0])
        trips = self.trips(i, condition, body, state)
        unchanged = (self._invariant(body, state),)
        yield from self.walk(body, count * trips, unchanged, False)
        yield from self.walk(condition, count * (trips + 1), unchanged, False)

    def trips(self, i: Instruction, condition: str, body: str, state: Value) -> int:
        """Number of iterations: given by the caller or the compiler, else found by running the
        scalars of the loop."""
        if i.name in self.trip_counts:
            return self.trip_counts[i.name]
        if m := re.search(r'"known_trip_count":\{"n":"?(\d+)"?\}', i.attrs):
            return int(m[1])
        for n in range(MAX_TRIPS):
            go = run(self.module, condition, (state,))
            if go is None:
                break
            if not go:
                return n
            state = run(self.module, body, (state,))
        raise ValueError(
            f"the trip count of loop {i.name} ({i.op_name}), which holds collectives, does not "
            "follow from constants: "
            f"pass trip_counts={{'{i.name}': n}}"
        )

    def _invariant(self, body: str, state: Value) -> Value:
        """The loop state, reduced to what every iteration leaves unchanged, for the trip counts of
        inner loops."""
        root = self.module.roots[body]
        if not isinstance(state, tuple) or root.opcode != "tuple":
            return None
        carry = self.module.parameter(body, 0)
        instructions = self.module.computations[body]

        def passes(name: str, index: int) -> bool:
            i = instructions[name]
            return (
                i.opcode == "get-tuple-element"
                and i.operands[0] == carry
                and f"index={index}," in i.attrs + ","
            )

        return tuple(
            v if passes(o, n) else None
            for n, (v, o) in enumerate(zip(state, root.operands, strict=True))
        )

    def conditional(self, i: Instruction, count: int, known: _Evaluator) -> Iterator[Collective]:
        executed = choose_branch(self.branches, i.name, i.op_name, len(i.branches), count)
        found = [
            list(self.walk(c, times, (known.value(operand),), False))
            if times and self.communicates(c)
            else []
            for (c, operand), times in zip(
                i.branches, executed or [count] * len(i.branches), strict=True
            )
        ]
        if executed is None:
            if not all(same_collectives(found[0], other) for other in found[1:]):
                raise ValueError(
                    f"the branches of {i.name} ({i.op_name}) communicate differently: "
                    f"pass branches={{'{i.name}': index}} with index in 0…{len(found) - 1} to "
                    "count one of them"
                )
            found = found[:1]
        for branch in found:
            yield from branch

    def _chain(self, computation: str) -> str | None:
        """Identity of a collective that XLA:TPU split into several fusions (start, steps beside
        matmuls, done); None for others."""
        for i in self.module.computations[computation].values():
            if i.collective and (m := re.search(r'chain_id="?([\w.\-]+)', i.attrs)):
                channel = re.search(r"channel_id=(\d+)", i.attrs)
                return f"{m[1]}/{channel[1] if channel else ''}"
        return None

    def _continues(self, i: Instruction, computation: str, chains: set[str]) -> bool:
        """Whether this fusion continues a collective that was already counted in the same
        computation."""
        chain = self._chain(computation)
        if chain is None:
            return False
        seen = chain in chains or i.name.startswith("async-collective-done")
        chains.add(chain)
        return seen
