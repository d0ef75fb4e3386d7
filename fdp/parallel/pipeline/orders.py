"""A pipeline schedule as data: what every device runs, in which order.

Kinds: F forward; R recomputes what F did not keep; B gradient of the input; W gradient of the
weights; BW both in one; U optimizer of a stage; S share of a vocabulary-parallel head; AUX work
that nothing waits for.

Legend: p devices, v chunks of a device, V = p·v virtual stages, m microbatches of a step."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fdp.parallel.pipeline.placement import Placement

KINDS = ("F", "R", "B", "W", "BW", "U", "S", "AUX")


class Op(NamedTuple):
    """chunk: of the device. S has chunk 0. U carries its step in place of a microbatch, AUX its
    number, and its class in place of a chunk."""

    kind: str
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch} of chunk {self.chunk}"


@dataclass(frozen=True)
class Order:
    """ops [p]: the operations of each device. Microbatches of all steps are numbered through."""

    placement: Placement
    ops: tuple[tuple[Op, ...], ...]
    steps: int = 1

    @cached_property
    def microbatches(self) -> int:
        """Of all steps."""
        return 1 + max(
            (op.microbatch for ops in self.ops for op in ops if op.kind == "F"), default=-1
        )

    def __len__(self) -> int:
        return sum(map(len, self.ops))


def build(placement: Placement, device_ops: Callable[[int], Sequence[Op]]) -> Order:
    """An order of one step from the operations of device i."""
    return Order(placement, tuple(tuple(device_ops(i)) for i in range(placement.p)))


def relabel(order: Order, sequence: Sequence[int]) -> Order:
    """The same order with microbatch sequence[k] in the place of k. Raises ValueError unless it is
    a permutation of the microbatches."""
    if sorted(sequence) != list(range(order.microbatches)):
        raise ValueError(
            f"sequence {list(sequence)} must name each of m={order.microbatches} microbatches once"
        )
    keep = ("U", "AUX")
    return Order(
        order.placement,
        tuple(
            tuple(
                op if op.kind in keep else op._replace(microbatch=sequence[op.microbatch])
                for op in ops
            )
            for ops in order.ops
        ),
        order.steps,
    )


def split_backward(order: Order) -> Order:
    """BW as B and W, one after the other."""
    return _rewritten(
        order,
        lambda op: [op._replace(kind="B"), op._replace(kind="W")] if op.kind == "BW" else [op],
    )


def recompute(order: Order) -> Order:
    """R right before every B and BW."""
    return _rewritten(
        order, lambda op: [op._replace(kind="R"), op] if op.kind in ("B", "BW") else [op]
    )


def repeat(order: Order, steps: int) -> Order:
    """Steps without a barrier: after the last W of its step a device runs U for every chunk and
    goes on with the next step."""
    if steps < 1 or order.steps != 1:
        raise ValueError(f"repeat an order of 1 step, steps ≥ 1; got {order.steps}, steps={steps}")
    m, v = order.microbatches, order.placement.v

    def shifted(ops: Sequence[Op], step: int) -> list[Op]:
        """AUX work is numbered through as well."""
        extra = Counter(op.kind for op in ops)["AUX"]
        move = {"AUX": extra * step}
        moved = [op._replace(microbatch=op.microbatch + move.get(op.kind, m * step)) for op in ops]
        return moved + [Op("U", step, c) for c in range(v)]

    return Order(
        order.placement,
        tuple(tuple(op for k in range(steps) for op in shifted(ops, k)) for ops in order.ops),
        steps,
    )


def _rewritten(order: Order, change: Callable[[Op], list[Op]]) -> Order:
    return Order(
        order.placement,
        tuple(tuple(new for op in ops for new in change(op)) for ops in order.ops),
        order.steps,
    )
