"""An order as tasks of `fdp.price.simulate`, which knows critical paths and any resource.

Legend: p devices, V virtual stages."""

from dataclasses import dataclass

from fdp.parallel.pipeline.check import check, inputs
from fdp.parallel.pipeline.costs import Costs, CostTable
from fdp.parallel.pipeline.orders import Op, Order
from fdp.price.simulate import Resource, TimedTask


@dataclass(frozen=True)
class Tasks:
    """Arguments of `simulate`. Tasks are called (kind, device, microbatch, chunk), messages
    ("send", *task, receiver)."""

    tasks: list[TimedTask]
    resources: list[Resource]
    neighbours: dict[str, list[str]]


def tasks_of(order: Order, costs: Costs) -> Tasks:
    """F follows F of the virtual stage before, B follows F and B of the virtual stage after, W B.

    Tasks run on resources "0" … "p−1", which are also the devices of `peak_bytes`, messages on
    links "i>j". Raises ValueError for bad costs and for an order that does not run."""
    check(order)
    table = costs.on(order.placement, order.microbatches, order.steps)
    readers = _readers(order)
    tasks: list[TimedTask] = []
    links: dict[tuple[int, int], str] = {}
    recomputed = {
        (i, op.microbatch, op.chunk)
        for i, ops in enumerate(order.ops)
        for op in ops
        if op.kind == "R"
    }
    for i, ops in enumerate(order.ops):
        for op in ops:
            here = (op.kind, i, op.microbatch, op.chunk)
            takes, leaves = _bytes(order, table, i, op, (i, *op[1:]) in recomputed)
            after = _after(order, readers, i, op, table.send > 0)
            tasks.append(
                TimedTask(
                    here,
                    str(i),
                    _seconds(order, table, i, op),
                    after,
                    _on(i, takes),
                    _on(i, leaves),
                )
            )
            for to in sorted(readers.get(here, {})):
                links[i, to] = f"{i}>{to}"
                if table.send > 0:
                    tasks.append(TimedTask(("send", *here, to), links[i, to], 1.0, (here,)))
    resources = [Resource(str(i)) for i in range(order.placement.p)]
    if table.send > 0:
        resources += [Resource(name, 0.0, table.send, link=True) for name in links.values()]
    return Tasks(tasks, resources, _neighbours(order.placement.p, links, table.send > 0))


def _on(device: int, amount: float) -> tuple[tuple[str, float], ...]:
    return ((str(device), amount),) if amount else ()


def _seconds(order: Order, table: CostTable, i: int, op: Op) -> float:
    if op.kind == "AUX":
        return table.AUX[op.chunk]
    if op.kind == "S":
        return table.S[i][op.microbatch]
    u = order.placement.stages[i][op.chunk]
    return table.U[u][0] if op.kind == "U" else getattr(table, op.kind)[u][op.microbatch]


def _bytes(order: Order, table: CostTable, i: int, op: Op, recomputed: bool) -> tuple[float, float]:
    """(taken at the start, freed at the end)."""
    if op.kind not in ("F", "R", "B", "W", "BW"):
        return 0.0, 0.0
    u, k = order.placement.stages[i][op.chunk], op.microbatch
    held, kept, saved = table.activation[u][k], table.stash[u][k], table.saved[u][k]
    return {
        "F": (saved if recomputed else held, 0.0),
        "R": (held - saved, 0.0),
        "B": (0.0, held - kept),
        "W": (0.0, kept),
        "BW": (0.0, held),
    }[op.kind]


def _readers(order: Order) -> dict[tuple, set[int]]:
    """Operation → the other devices that need its output."""
    found: dict[tuple, set[int]] = {}
    have = {(op.kind, i, op.microbatch, op.chunk) for i, ops in enumerate(order.ops) for op in ops}
    for i, ops in enumerate(order.ops):
        for op in ops:
            for j, kinds, k, c in inputs(order, i, op):
                for source in ((kind, j, k, c) for kind in kinds):
                    if source in have:
                        found.setdefault(source, set()).update({i} - {j})
    return found


def _after(order: Order, readers: dict, i: int, op: Op, messages: bool) -> tuple:
    """Outputs of other devices or their messages, and what the device itself has done for it."""
    kind, _, k, c = here = (op.kind, i, op.microbatch, op.chunk)
    own = {"W": "B", "B": "F", "BW": "F", "R": "F"}.get(kind)
    after: list[tuple] = [(own, i, k, c)] if own else []
    for j, kinds, n, chunk in inputs(order, i, Op(kind, k, c)):
        sources = [(x, j, n, chunk) for x in kinds if (x, j, n, chunk) in readers]
        after += [("send", *x, i) if messages and j != i else x for x in sources if x != here]
    return tuple(after)


def _neighbours(p: int, links: dict[tuple[int, int], str], messages: bool) -> dict[str, list[str]]:
    """Devices that exchange messages, with the links between them: what a device waits for in mode
    "neighbour"."""
    near: dict[str, list[str]] = {str(i): [] for i in range(p)}
    for (a, b), link in links.items():
        for one, other in ((a, b), (b, a)):
            near[str(one)] += [
                x for x in (str(other), *([link] if messages else [])) if x not in near[str(one)]
            ]
    return near
