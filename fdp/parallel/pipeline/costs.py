"""Seconds and bytes of the operations of a pipeline.

Legend: p devices, v chunks of a device, V = p·v virtual stages, m microbatches of a step."""

from dataclasses import dataclass, fields
from operator import gt
from typing import Any, NamedTuple

import numpy as np

from fdp.parallel.pipeline.placement import Placement

STASH = 0.4  # of an activation, which B leaves to W: a DiT block of width 384
SLACK = 1e-9  # relative: sums of the same bytes or seconds in another order are equal


@dataclass(frozen=True)
class Costs:
    """What an operation takes, by kind.

    F, B, W, R: seconds. A number, [p] or [p, m] (or [1, m]) is a device's time for all its chunks,
    so that a chunk takes 1/v of it; [V] or [V, m] is the time of each virtual stage. BW: its own
    time, B + W where not given. U: seconds of the optimizer, same shapes without microbatches. S:
    seconds on each device, a number, [p] or [p, m]. AUX: seconds, one number a class.
    send: seconds of a message between two devices. Each direction of a pair is one link, which
    carries one message at a time.
    activation: bytes held from F (from R, where an order has it) to the backward; stash: the part
    that B leaves to W; saved: what F keeps for R. Shapes as F, so a chunk holds 1/v of a device's
    number. message: bytes of a message.

    `on` raises ValueError for another shape, for a cost that is not finite or negative, and for
    stash or saved > activation."""

    F: Any = 1.0
    B: Any = 1.0
    W: Any = 1.0
    R: Any = 0.0
    BW: Any = None
    U: Any = 0.0
    S: Any = 0.0
    AUX: Any = 0.0
    send: float = 0.0
    activation: Any = 0.0
    stash: Any = 0.0
    saved: Any = 0.0
    message: float = 0.0

    def on(self, placement: Placement, m: int, steps: int = 1) -> "CostTable":
        """The costs of m microbatches in all, numbered through `steps` steps of equal costs."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.BW is None:
            del given["BW"]
        found = {name: _spread(name, x, placement, m // steps) for name, x in given.items()}
        if self.BW is None:
            found["BW"] = _sum(found["B"], found["W"])
        for part in ("stash", "saved"):
            _is_part(part, found[part], found["activation"])
        if steps > 1:
            wide = ("F", "B", "W", "R", "BW", "S", "activation", "stash", "saved")
            found |= {name: [row * steps for row in found[name]] for name in wide}
        return CostTable(**found)


class CostTable(NamedTuple):
    """Costs as nested lists: [V][m], of which U has [V][1], S [p][m], AUX [classes]."""

    F: list
    B: list
    W: list
    R: list
    BW: list
    U: list
    S: list
    AUX: list
    send: float
    activation: list
    stash: list
    saved: list
    message: float


def _spread(name: str, value: Any, placement: Placement, m: int) -> Any:
    """One field in the shape that `CostTable` names. Rows may be one list."""
    p, v = placement.p, placement.v
    x = np.asarray(value, dtype=float)
    if not (np.isfinite(x).all() and (x >= 0).all()):
        bad = np.argwhere(~(np.isfinite(x) & (x >= 0)))[0].tolist()
        where = "".join(f"[{n}]" for n in bad)
        raise ValueError(f"{name}{where} = {x[tuple(bad)]}: must be finite and ≥ 0")
    if name in ("send", "message"):
        return _shape(name, x, ((),)).item()
    if name == "AUX":
        return _shape(name, x, ((), (x.size,))).reshape(-1).tolist()
    m = 1 if name == "U" else m
    if name == "S":
        _shape(name, x, ((), (p,), (p, m), (1, m)))
        return np.broadcast_to(x[:, None] if x.ndim == 1 else x, (p, m)).tolist()
    _shape(name, x, ((), (p,), (p, m), (1, m), (p * v,), (p * v, m)))
    if x.ndim == 0:
        return [[x.item() / v] * m] * (p * v)
    x = x[:, None] if x.ndim == 1 else x
    if x.shape[0] == p * v:
        return np.broadcast_to(x, (p * v, m)).tolist()
    return np.broadcast_to(x / v, (p, m))[list(placement.devices)].tolist()


def _shape(name: str, x: np.ndarray, allowed: tuple[tuple[int, ...], ...]) -> np.ndarray:
    if x.shape not in allowed:
        shapes = ", ".join(map(str, dict.fromkeys(allowed)))
        raise ValueError(f"{name} has shape {x.shape}: must be one of {shapes}")
    return x


def _sum(one_Vxm: list, other_Vxm: list) -> list:
    return [
        [a + b for a, b in zip(x, y, strict=True)] for x, y in zip(one_Vxm, other_Vxm, strict=True)
    ]


def _is_part(name: str, part_Vxm: list, whole_Vxm: list) -> None:
    for u, (part, whole) in enumerate(zip(part_Vxm, whole_Vxm, strict=True)):
        if any(map(gt, part, whole)):
            a, b = next((a, b) for a, b in zip(part, whole, strict=True) if a > b)
            raise ValueError(
                f"{name} {a} > activation {b} on virtual stage {u}: it is a part of what F saved"
            )
