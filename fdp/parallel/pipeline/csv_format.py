"""The CSV of `torch.distributed.pipelining`: one line a rank, one cell an action, `<stage><action>
<microbatch>`.

Actions F, I (input gradient), W, B (both gradients) are F, B, W, BW here; stages are virtual
stages. A cell may be empty. A pair that torch overlaps, `(0F4;7B0)OVERLAP_F_B`, is read as one
after the other. Cells that torch adds when it lowers a schedule (sends, receives, sharding,
reduction) are left out: an order implies them.

Legend: p devices (ranks), V virtual stages."""

import csv
import re
from pathlib import Path

from fdp.parallel.pipeline.check import check
from fdp.parallel.pipeline.orders import Op, Order
from fdp.parallel.pipeline.placement import Placement

READ = {"F": "F", "I": "B", "W": "W", "B": "BW"}
WRITE = {kind: action for action, kind in READ.items()}
IMPLIED = ("SEND_F", "RECV_F", "SEND_B", "RECV_B", "UNSHARD", "RESHARD", "REDUCE_GRAD")
_CELL = re.compile(rf"(\d+)({'|'.join((*IMPLIED, *READ))})(\d*)")
_PAIR = re.compile(r"\((.*)\)OVERLAP_F_B")


def write_csv(order: Order, path: str | Path) -> None:
    """Raises ValueError, from `check`, for an order that does not run, and for operations that the
    format does not know (R, U, S, AUX)."""
    check(order)
    lines = []
    for i, ops in enumerate(order.ops):
        for row, op in enumerate(ops):
            if op.kind not in WRITE:
                raise ValueError(
                    f"stage {i}, row {row}: {op}: the CSV of torch.distributed.pipelining has F, "
                    "B, W and BW only"
                )
        stages = order.placement.stages[i]
        lines.append([f"{stages[op.chunk]}{WRITE[op.kind]}{op.microbatch}" for op in ops])
    with Path(path).open("w", newline="") as file:
        csv.writer(file).writerows(lines)


def read_csv(path: str | Path, p: int | None = None) -> Order:
    """An order of one step; the placement is what the cells say. It is not checked: see `check`.

    p: ranks that the file must have. Raises ValueError that names the
    rank and the cell for an unknown action, for a virtual stage of two ranks, for a rank or a
    virtual stage without a cell, and for another number than asked for; also for a file that is no
    text, and for a number of microbatches or stages that its cells cannot fill."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            ranks = [_line(i, cells) for i, cells in enumerate(csv.reader(file))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file: {error}; export it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not any(ranks):
        raise ValueError(f"{path} has no cell: write one line a rank, such as 0F0,0B0")
    if p is not None and len(ranks) != p:
        raise ValueError(f"{path} has {len(ranks)} ranks, not p={p}: export it for p={p}")
    owner: dict[int, int] = {}
    for i, actions in enumerate(ranks):
        for column, u, action, k in actions:
            if owner.setdefault(u, i) != i:
                raise ValueError(
                    f"{path}: rank {i}, cell {column}: {u}{action}{k}: virtual stage {u} is on "
                    f"rank {owner[u]} already"
                )
    count = 1 + max(owner)
    _filled(path, ranks, count)
    lost = [u for u in range(count) if u not in owner]
    if lost:
        raise ValueError(
            f"{path}: virtual stages {lost} of {count} have no cell in any of {len(ranks)} ranks"
        )
    idle = [i for i in range(len(ranks)) if i not in owner.values()]
    if idle:
        raise ValueError(f"{path}: rank {idle[0]} runs nothing: remove its line or give it a stage")
    placement = Placement(tuple(owner[u] for u in range(count)))
    chunks = placement.chunks
    return Order(
        placement,
        tuple(tuple(Op(READ[action], k, chunks[u]) for _, u, action, k in x) for x in ranks),
    )


def _filled(path: str | Path, ranks: list[list[tuple[int, int, str, int]]], count: int) -> None:
    """A number far beyond the cells would have all the absent ones listed. Raises ValueError."""
    cells = [cell for actions in ranks for cell in actions]
    m = 1 + max(k for *_, k in cells)
    if max(count, m) > len(cells):
        raise ValueError(
            f"{path}: {count} virtual stages of {m} microbatches in {len(cells)} cells: every "
            "microbatch needs a cell on every virtual stage; correct the largest number"
        )


def _line(rank: int, cells: list[str]) -> list[tuple[int, int, str, int]]:
    """(column, virtual stage, action, microbatch) of the actions of a rank."""
    found = []
    for column, cell in enumerate(cells):
        pair = _PAIR.fullmatch(cell.strip())
        for part in pair[1].split(";") if pair else [cell]:
            if not part.strip():
                continue
            match = _CELL.fullmatch(part.strip())
            known = match and (match[2] in IMPLIED or match[3])
            if not match or not known:
                raise ValueError(
                    f"rank {rank}, cell {column}: {part.strip()!r} is no action: write "
                    f"<stage><{'|'.join(READ)}><microbatch>, such as 2F0"
                )
            if match[2] in READ:
                found.append((column, int(match[1]), match[2], int(match[3])))
    return found
