"""What a compiled program runs between the start and the done of its collectives.

Input is `compiled.as_text()` of a TPU or GPU program: its instructions are in the order of the
schedule. XLA:CPU splits no collective. What stands between can hide the transfer; whether it is
long enough, only a measurement says."""

import re
from typing import NamedTuple

from fdp.count.hlo_text import HloModule, Instruction

WORK = ("fusion", "while", "custom-call", "dot", "convolution", "call", "conditional")
PRODUCTS = ("dot", "convolution", "custom-call")


class Overlap(NamedTuple):
    """Collectives of one kind in a program, each counted once whatever loop it stands in.

    apart: start and done are two instructions, and the transfer runs beside what stands between.
    busy: of these, with work between. beside: of these, with a matrix product of the given scope
    between."""

    total: int
    apart: int
    busy: int
    beside: int


def overlap(text: str, op: str, scope: str) -> Overlap:
    """`Overlap` of the collectives `op`, such as "ragged-all-to-all". `scope`: a part of the
    product's op_name, as `jax.named_scope` gives it."""
    module = HloModule(text)
    every = [i for body in module.computations.values() for i in body.values()]
    wrapped = {c for i in every if i.opcode == "async-start" for c in i.called}
    total = apart = busy = beside = 0
    for name, body in module.computations.items():
        order = list(body.values())
        found = [] if name in wrapped else [n for n, i in enumerate(order) if _op(module, i) == op]
        total += len(found)
        for start in found:
            done = _done(order, start)
            between = [i for i in order[start + 1 : done] if i.opcode in WORK]
            apart, busy = apart + (done > start), busy + bool(between)
            beside += any(_product(module, i, scope) for i in between)
    return Overlap(total, apart, busy, beside)


def _op(module: HloModule, i: Instruction) -> str:
    """The collective that this instruction runs or starts, "" for none."""
    if i.opcode == "async-start":
        inner = (x for c in i.called for x in module.computations.get(c, {}).values())
        return next((x.collective[0] for x in inner if x.collective), "")
    return i.collective[0] if i.collective else ""


def _done(order: list[Instruction], start: int) -> int:
    """Where the transfer that starts at `start` is waited for: there, if it runs beside nothing."""
    i = order[start]
    if not i.opcode.endswith("-start") or (i.collective and not i.collective[1]):
        return start
    names = {i.name}
    for n, x in enumerate(order[start + 1 :], start + 1):
        if names.intersection(x.operands):
            if x.opcode.endswith("-done"):
                return n
            names.add(x.name)  # an update, or a tuple's element
    return start


def _product(module: HloModule, i: Instruction, scope: str) -> bool:
    """Whether this instruction, or one that it runs, is a matrix product of the scope."""
    if i.opcode in PRODUCTS and scope in re.split(r"[/()]+", i.op_name):
        return True
    inner = (x for c in i.called for x in module.computations.get(c, {}).values())
    return any(_product(module, x, scope) for x in inner)
