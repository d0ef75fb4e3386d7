"""Whether an order can run, and which operation is the first that cannot.

Legend: p devices (stages of the mesh), v chunks of a device, m microbatches, row: position in a
device's list, counted from 0."""

from collections.abc import Iterator, Sequence

from fdp.parallel.pipeline.orders import KINDS, Op, Order

Place = tuple[str, int, int]  # kind, microbatch, chunk: an operation of one device


def check(order: Order) -> None:
    """Raises ValueError that names the first offending operation with its stage and its row.

    In this order: an unknown operation, one of no microbatch or chunk, a repeated one; one that is
    missing; one before its own input on its device (B before F, W before B, U before the last W of
    its step); operations of several devices that wait for each other in a circle."""
    placement, m = order.placement, order.microbatches
    if len(order.ops) != placement.p:
        raise ValueError(
            f"the order has {len(order.ops)} stages, its placement p={placement.p}: give one list "
            "of operations for each"
        )
    if m == 0 or m % order.steps:
        raise ValueError(
            f"{m} microbatches in {order.steps} steps: m must be a multiple, at least 1"
        )
    for i, ops in enumerate(order.ops):
        _known(order, i, ops)
    for i, ops in enumerate(order.ops):
        _complete(order, i, ops)
    for i, ops in enumerate(order.ops):
        _own_inputs(order, i, ops)
    _deadlock(order)


def _at(stage: int, row: int, op: Op) -> str:
    return f"stage {stage}, row {row}: {op}"


def _known(order: Order, i: int, ops: Sequence[Op]) -> None:
    seen: dict[tuple, int] = {}
    m, v = order.microbatches, order.placement.v
    for row, op in enumerate(ops):
        if op.kind not in KINDS:
            raise ValueError(f"{_at(i, row, op)}: unknown operation; kinds are {', '.join(KINDS)}")
        most = order.steps if op.kind == "U" else m
        inside = 0 <= op.microbatch < most and 0 <= op.chunk < (1 if op.kind == "S" else v)
        if op.kind != "AUX" and not inside:
            raise ValueError(
                f"{_at(i, row, op)} does not exist: {v} chunks and {most} "
                f"{'steps' if op.kind == 'U' else 'microbatches'} are numbered from 0"
            )
        for part in ("B", "W") if op.kind == "BW" else (op.kind,):
            key = (part, op.microbatch, op.chunk)
            if key in seen:
                raise ValueError(
                    f"{_at(i, row, op)} is repeated: row {seen[key]} has run {part} already; "
                    "remove one"
                )
            seen[key] = row


def _complete(order: Order, i: int, ops: Sequence[Op]) -> None:
    have = {(part, k, c) for kind, k, c in ops for part in ("BW" if kind == "BW" else (kind,))}
    m, v, steps = order.microbatches, order.placement.v, order.steps
    kinds = {op.kind for ops_N in order.ops for op in ops_N}
    want: list[Place] = [(kind, k, c) for k in range(m) for c in range(v) for kind in "FBW"]
    want += [("S", k, 0) for k in range(m)] if "S" in kinds else []
    if steps > 1 or "U" in kinds:
        want += [("U", k, c) for k in range(steps) for c in range(v)]
    lacks = next((x for x in want if x not in have), None)
    if lacks is None:
        return
    needs = {"F": ("B", "BW"), "B": ("W",), "W": ("U",)}.get(lacks[0], ())
    _, k, c = lacks
    user = next(
        (
            row
            for row, op in enumerate(ops)
            if op.kind in needs and (op.microbatch, op.chunk) == (k, c)
        ),
        None,
    )
    where = f"row {len(ops)}, its end" if user is None else f"row {user}, which needs it"
    raise ValueError(f"stage {i} never runs {Op(*lacks)}: missing before {where}")


def _own_inputs(order: Order, i: int, ops: Sequence[Op]) -> None:
    rows = {tuple(op): row for row, op in enumerate(ops)}
    each = order.microbatches // order.steps
    for row, op in enumerate(ops):
        for need in _own(op, rows, each):
            if need in rows and rows[need] > row:
                raise ValueError(
                    f"{_at(i, row, op)} is too early: it needs {Op(*need)} of row {rows[need]}; "
                    "move it behind"
                )


def _own(op: Op, rows: dict[tuple, int], each: int) -> list[Place]:
    """What an operation needs of its own device."""
    kind, k, c = op
    if kind == "F":
        return [("U", k // each - 1, c)] if k >= each else []
    if kind in ("R", "B", "BW"):
        return [("F", k, c)] + ([("R", k, c)] if kind != "R" else [])
    if kind == "W":
        return [("B", k, c)]
    if kind == "U":
        steps = range(k * each, (k + 1) * each)
        return [(part, n, c) for n in steps for part in ("W", "BW")]
    return []


def inputs(order: Order, i: int, op: Op) -> Iterator[tuple[int, tuple[str, ...], int, int]]:
    """What an operation needs of any device: (device, kinds one of which it is, microbatch,
    chunk)."""
    placement = order.placement
    kind, k, c = op
    if kind == "S":
        yield placement.devices[-1], ("F",), k, placement.v - 1
    if kind not in ("F", "B", "BW"):
        return
    u = placement.stages[i][c] + (-1 if kind == "F" else 1)
    if 0 <= u < len(placement.devices):
        kinds = ("F",) if kind == "F" else ("B", "BW")
        yield placement.devices[u], kinds, k, placement.chunks[u]
    elif kind != "F":
        for j in range(placement.p):
            yield j, ("S",), k, 0


def _deadlock(order: Order) -> None:
    """Plays the queues. Where nothing moves any more, follows who waits for whom around the
    circle."""
    row_of = [{tuple(op): row for row, op in enumerate(ops)} for ops in order.ops]
    at = [0] * order.placement.p

    def blocker(i: int) -> tuple[int, int] | None:
        """(device, row) of an input of the next operation of device i that has not run yet."""
        for j, kinds, k, c in inputs(order, i, order.ops[i][at[i]]):
            row = next((row_of[j][kind, k, c] for kind in kinds if (kind, k, c) in row_of[j]), None)
            if row is not None and row >= at[j]:
                return j, row
        return None

    moved = True
    while moved:
        moved = False
        for i, ops in enumerate(order.ops):
            while at[i] < len(ops) and blocker(i) is None:
                at[i] += 1
                moved = True
    stuck = [i for i, ops in enumerate(order.ops) if at[i] < len(ops)]
    if not stuck:
        return
    path: list[int] = []
    i = min(stuck, key=lambda i: at[i])
    while i not in path:
        path.append(i)
        blocked = blocker(i)
        assert blocked is not None
        i = blocked[0]
    circle = path[path.index(i) :]
    first = min(range(len(circle)), key=lambda n: at[circle[n]])
    circle = circle[first:] + circle[:first]
    waits = []
    for i in circle:
        blocked = blocker(i)
        assert blocked is not None
        j, row = blocked
        waits.append(
            f"{_at(i, at[i], order.ops[i][at[i]])} waits for {order.ops[j][row]} in row {row} of "
            f"stage {j}"
        )
    raise ValueError(f"deadlock: {'; '.join(waits)}: reorder one of these stages")
