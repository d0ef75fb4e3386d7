"""The text of a compiled XLA program, parsed: computations, their instructions, and the groups of
devices that an instruction names.

Input is `compiled.as_text()` of any XLA backend."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

OPS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


# Replica groups: one function per spelling
# -------------------------------------------------------------------------------------------------


def ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def attribute(pattern: str, attrs: str) -> str:
    """The first group of `pattern` in the attributes of an instruction. Raises ValueError where
    there is none."""
    if not (m := re.search(pattern, attrs)):
        raise ValueError(f"no {pattern} in the attributes of the instruction: {attrs}")
    return m[1]


def _iota(dims: str, transpose: str | None) -> np.ndarray:
    """`[4,2]T(1,0)` → arange(8).reshape(4, 2).transpose(1, 0), flattened."""
    ids = np.arange(math.prod(ints(dims))).reshape(ints(dims))
    return (ids.transpose(ints(transpose)) if transpose else ids).reshape(-1)


def _named_mesh_groups(mesh: str, order: str, use: str) -> list[list[int]]:
    """`'dp'=2,'tp'=4`, device order, `'tp':(2)2` → groups. A sub-axis `:(pre)size` splits its axis
    into three parts.
    """
    degrees = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(degrees.values()))
    if m := re.search(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", order):
        ids = _iota(m[2] or m[1], m[3])
    elif order:
        ids = np.array(ints(order))
    wanted = [
        (a, int(pre or 1), int(n or degrees[a]))
        for a, pre, n in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", use)
    ]
    dims: list[int] = []
    grouped: dict[tuple[str, int], int] = {}
    for axis, degree in degrees.items():
        done = 1
        for _, pre, size in sorted(w for w in wanted if w[0] == axis):
            dims += [pre // done, size]
            grouped[axis, pre] = len(dims) - 1
            done = pre * size
        dims.append(degree // done)
    inner = [grouped[a, pre] for a, pre, _ in wanted]
    outer = [i for i in range(len(dims)) if i not in inner]
    return (
        ids.reshape(dims)
        .transpose(outer + inner)
        .reshape(-1, math.prod(dims[i] for i in inner))
        .tolist()
    )


def replica_groups(attrs: str, total: int) -> list[list[int]]:
    """Groups of device ids of an instruction's attributes, in any of XLA's spellings; pairs for a
    permute.
    """
    if m := re.search(r"source_target_pairs=\{((?:\{\d+,\s*\d+\},?\s*)*)\}", attrs):
        return [ints(pair) for pair in re.findall(r"\{([^}]*)\}", m[1])]
    if m := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attrs):
        return _iota(m[2], m[3]).reshape(ints(m[1])[0], -1).tolist()
    if m := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:,?\s*device_ids=\((.*?)\)(?=\s*\{))?\s*\{([^}]*)\}",
        attrs,
    ):
        return _named_mesh_groups(m[1], m[2] or "", m[3])
    if m := re.search(r"replica_groups=\{((?:\{[\d,\s]*\},?\s*)*)\}", attrs):
        groups = [ints(g) for g in re.findall(r"\{([^}]*)\}", m[1])]
        # Without global ids a group lists replicas, and every partition of them takes part: {{0}}
        # means everyone.
        replicas_only = "channel_id=" in attrs and "use_global_device_ids=true" not in attrs
        if groups and not (groups == [[0]] and replicas_only and "to_apply=" in attrs):
            return groups
    elif "replica_groups=" in attrs:
        raise ValueError(f"unreadable replica groups: {attrs[:200]}")
    return [list(range(total))]


# Computations and instructions
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    name: str
    type: str  # result type with layout
    opcode: str
    args: tuple[str, ...]  # operands as written, or the literal of a constant
    attrs: str

    @property
    def operands(self) -> tuple[str, ...]:
        return tuple(a.split()[-1].lstrip("%") if a else "" for a in self.args)

    @property
    def op_name(self) -> str:
        m = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attrs)
        return m[1] if m else ""

    @property
    def called(self) -> list[str]:
        """Computations that this instruction runs. The reducer of a reduction (`to_apply`) is among
        them; it holds no collective."""
        names = [m for _, m in re.findall(r"\b(calls|to_apply)=%?([\w.\-]+)", self.attrs)]
        lists = re.findall(r"\bcalled_computations=\{([^}]*)\}", self.attrs)
        return names + [
            n.strip().lstrip("%") for group in lists for n in group.split(",") if n.strip()
        ]

    @property
    def branches(self) -> list[tuple[str, str]]:
        """(computation, operand) of every branch of a conditional in JAX's order: index 0 is
        False."""
        if m := re.search(r"branch_computations=\{([^}]*)\}", self.attrs):
            names = [n.strip().lstrip("%") for n in m[1].split(",")]
            return list(zip(names, self.operands[1:], strict=True))
        true, false = (
            attribute(rf"{which}_computation=%?([\w.\-]+)", self.attrs)
            for which in ("true", "false")
        )
        return [(false, self.operands[2]), (true, self.operands[1])]

    @property
    def collective(self) -> tuple[str, bool] | None:
        """(op, whether it is asynchronous); None for other instructions and for the `-done`
        half."""
        op = self.opcode.removesuffix("-start")
        if (
            op == "send" and "_xla_send_recv_source_target_pairs" in self.attrs
        ):  # a permute the compiler pipelined
            return "collective-permute", True
        # XLA:GPU keeps the start/done spelling for collectives it runs synchronously, and says so.
        is_async = op != self.opcode and not re.search(r'"is_sync":\s*true', self.attrs)
        return (op, is_async) if op in OPS else None


def _close(text: str, start: int) -> int:
    """Position after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "({[") - (text[i] in ")}]")
        if depth == 0:
            return i + 1
    return len(text)


def _split(text: str) -> tuple[str, ...]:
    """Split at top-level commas."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "({[") - (c in ")}]")
        if c == "," and depth == 0:
            parts.append(text[begin:i].strip())
            begin = i + 1
    return (*parts, text[begin:].strip())


def _parse_line(line: str) -> tuple[Instruction, bool] | None:
    """One instruction, and whether it is the root of its computation; None for any other line."""
    m = re.match(r"\s*(ROOT\s+)?%?([\w.\-]+)\s*=\s*(?=[(a-z])", line)
    if not m:
        return None
    line = re.sub(r"/\*.*?\*/", "", line)
    begin = m.end()
    end = _close(line, begin) if line[begin] == "(" else line.find(" ", begin)
    call = re.compile(r"\s*([\w\-]+)\(").match(line, end)
    if not call:
        return None
    stop = _close(line, call.end() - 1)
    args = line[call.end() : stop - 1]
    parts = (args,) if call[1] == "constant" else _split(args)
    return Instruction(m[2], line[begin:end], call[1], parts, line[stop:]), bool(m[1])


class HloModule:
    """Computations by name, in schedule order."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.entry = ""
        current = ""
        for line in text.splitlines():
            if m := re.match(r"(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?\{\s*$", line):
                current = m[2]
                self.computations[current] = {}
                self.entry = current if m[1] else self.entry
            elif current and (parsed := _parse_line(line)):
                self.computations[current][parsed[0].name] = parsed[0]
                if parsed[1] or current not in self.roots:
                    self.roots[current] = parsed[0]
        if not self.entry:
            raise ValueError(
                "no ENTRY computation: expected the text of a compiled program, compiled.as_text()"
            )

    def parameter(self, computation: str, index: int) -> str:
        for i in self.computations[computation].values():
            if i.opcode == "parameter" and i.args[0] == str(index):
                return i.name
        return ""

    def operand_types(self, computation: str, instruction: Instruction) -> Iterator[str]:
        """Types of the operands, from their definitions or, in older text, written inline."""
        for written, name in zip(instruction.args, instruction.operands, strict=True):
            known = self.computations[computation].get(name)
            if known is None and " " not in written:
                raise ValueError(
                    f"operand {name} of {instruction.name} is not defined in {computation}"
                )
            yield known.type if known else written.rsplit(" ", 1)[0]
