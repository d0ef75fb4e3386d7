"""What a compiled program runs between the start and the done of its collectives.

Input is `compiled.as_text()` of a TPU or GPU program: its instructions are in the order of the
schedule. XLA:CPU splits no collective. What stands between can hide the transfer; whether it is
long enough, only a measurement says."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from fdp.count.hlo_text import HloModule, Instruction

WORK = ("fusion", "while", "custom-call", "dot", "convolution", "call", "conditional")
PRODUCTS = ("dot", "convolution", "custom-call")


@dataclass(frozen=True)
class Overlap:
    """Collectives of one kind in a program, each counted once whatever loop it stands in.

    apart: start and done are two instructions, and the transfer runs beside what stands between.
    busy: of these, with work between. beside: of these, with a matrix product of the given scope
    between."""

    total: int
    apart: int
    busy: int
    beside: int


def overlap(text: str, op: str, scope: str = "") -> Overlap:
    """`Overlap` of the collectives `op`, such as "ragged-all-to-all". `scope`: a part of the
    product's op_name, as `jax.named_scope` gives it."""
    module = HloModule(text)
    inside = _inside(module)
    total = apart = busy = beside = 0
    for order in (list(b.values()) for n, b in module.computations.items() if n not in inside):
        for at, i in enumerate(order):
            if op not in _ops(module, i):
                continue
            total += 1
            done = _done(order, at)
            if done is None:
                continue
            between = [x for x in order[at + 1 : done] if x.opcode in WORK]
            apart, busy = apart + 1, busy + bool(between)
            beside += any(_any(module, x, lambda y: _product(y, scope)) for x in between)
    return Overlap(total, apart, busy, beside)


def _inside(module: HloModule) -> set[str]:
    """Computations that hold the collective of an asynchronous instruction."""
    every = (i for body in module.computations.values() for i in body.values())
    return {c for i in every if i.opcode.startswith("async-") for c in i.called}


def _ops(module: HloModule, i: Instruction) -> set[str]:
    """The collectives that this instruction starts, or runs by itself."""
    if i.collective:
        return {i.collective[0]}
    if i.opcode != "async-start":
        return set()
    bodies = (module.computations.get(c, {}) for c in i.called)
    return {x.collective[0] for body in bodies for x in body.values() if x.collective}


def _done(order: list[Instruction], at: int) -> int | None:
    """Where the transfer that starts at `at` is waited for; None where it does not run beside
    others."""
    i = order[at]
    if not i.opcode.endswith("-start") or (i.collective and not i.collective[1]):
        return None
    names = {i.name}
    for n in range(at + 1, len(order)):
        x = order[n]
        if names.intersection(x.operands) and x.opcode.endswith(("-update", "-done")):
            names.add(x.name)
            if x.opcode.endswith("-done"):
                return n
    return None


def _any(module: HloModule, i: Instruction, holds: Callable[[Instruction], bool]) -> bool:
    """Whether something holds for this instruction, or for one that it runs."""
    inner = (x for c in i.called for x in module.computations.get(c, {}).values())
    return holds(i) or any(_any(module, x, holds) for x in inner)


def _product(i: Instruction, scope: str) -> bool:
    scopes = re.split(r"[/()]+", i.op_name)
    return i.opcode in PRODUCTS and (not scope or scope in scopes)
