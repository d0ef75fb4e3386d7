"""Seconds of the grouped matmuls of a device's experts, from measured kernels.

Gate, up and down, with the gathering of rows and the weighted sum, as one layer of kernels in
bfloat16. The log of their time over `bound` is interpolated: linear in the log of rows an expert on
the curve of one shape; another shape takes the mean of the NEAR nearest in (log D, log W, log e),
weighted by 1/distance². Past the measured rows that ratio is kept, and a chip without data has the
ratio of its stand-in. Each step away from the data has a held-out error of its own; the largest
that applies is stated. Data, licence and errors: `coefficients/moe_matmul.json`, rewritten by
`python -m tools.fit_moe DATA`.

Legend: D width, W hidden of an expert, e experts of the device, R rows.
"""

import functools
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fdp.price import hardware

NEAR = 4  # shapes that an unmeasured one is taken from
# steps away from the data, each with its held-out error
STEPS = (
    "a measured shape",
    "a shape between measured ones",
    "fewer experts than measured",
    "past the measured rows",
    "a chip that was not measured",
)
LAUNCH = 20e-6  # s: least time of the kernels of a layer, of `bound`


class Curve(NamedTuple):
    """Measured times of one shape: rows an expert and log(time / bound), ascending in rows."""

    width: int
    hidden: int
    experts: int
    rows: np.ndarray
    ratio: np.ndarray


def bound(chip: hardware.Chip, rows: Any, width: int, hidden: int, experts: int) -> Any:
    """Seconds of 6·rows·D·W FLOPs and of reading the experts that have rows, and the rows."""
    rows = np.asarray(rows, float)
    compute = 6 * rows * width * hidden / (0.8 * chip.peak_bf16_flops)
    moved = np.minimum(rows, experts) * 6 * width * hidden + rows * (4 * width + 6 * hidden)
    return LAUNCH + (compute**4 + (moved / (0.9 * chip.hbm_bandwidth)) ** 4) ** 0.25


def curve(chip: hardware.Chip, shape: Sequence[int], rows: Any, seconds: Any) -> Curve:
    """The curve through measured `seconds` at `rows` of the device."""
    rows = np.asarray(rows, float)
    ratio = np.log(np.asarray(seconds) / bound(chip, rows, *shape))
    width, hidden, experts = shape
    return Curve(width, hidden, experts, rows / experts, ratio)


@functools.cache
def document() -> dict[str, Any]:
    """The shipped table with its source, licence, stand-ins and held-out errors."""
    found = importlib.resources.files("fdp.price") / "coefficients" / "moe_matmul.json"
    return json.loads(found.read_text("utf-8"))


@functools.cache
def curves(chip_name: str) -> tuple[Curve, ...]:
    """Curves of a measured chip."""
    chip, made = hardware.chip(chip_name), []
    for *shape, first, micros in document()["curves"][chip.name]:
        rows = first * 2.0 ** np.arange(len(micros))
        made.append(curve(chip, shape, rows, 1e-6 * np.array(micros)))
    return tuple(made)


def stand_in(chip_name: str) -> str:
    """The measured chip whose curves price `chip_name`: itself where it has been measured."""
    name, d = hardware.chip(chip_name).name, document()
    return name if name in d["curves"] else d["stand_in"].get(name, d["stand_in"]["default"])


def interpolate(
    found: Sequence[Curve], chip: hardware.Chip, rows: Any, shape: tuple[int, int, int]
) -> np.ndarray:
    """Seconds at `rows` of the device of a `shape` (D, W, e), from these curves."""
    logs = np.log([c[:3] for c in found])
    distance = np.linalg.norm(logs - np.log(shape), axis=1)
    near = np.argsort(distance)[: 1 if distance.min() < 1e-9 else NEAR]
    weight = 1 / np.maximum(distance[near], 1e-9) ** 2
    x = np.log(np.maximum(rows, 1e-9) / shape[2])
    ratios = [np.interp(x, np.log(found[i].rows), found[i].ratio) for i in near]
    ratio = sum(w * r for w, r in zip(weight / weight.sum(), ratios, strict=True))
    return np.where(np.asarray(rows) > 0, np.exp(ratio) * bound(chip, rows, *shape), 0.0)


def seconds(chip: str, rows: Any, width: int, hidden: int, experts: int) -> np.ndarray:
    """Forward seconds of the grouped matmuls of a device: `rows` rows of `width` D through
    `experts` experts of `hidden` W; nothing for no rows. Raises ValueError for sizes below 1,
    negative rows or an unknown chip."""
    if min(width, hidden, experts) < 1 or np.any(np.asarray(rows) < 0):
        raise ValueError(
            f"rows {rows}, width {width}, hidden {hidden}, experts {experts}: rows ≥ 0 and sizes ≥ "
            "1 are needed"
        )
    shape = (width, hidden, experts)
    return interpolate(curves(stand_in(chip)), hardware.chip(chip), rows, shape)


def error(chip: str, rows: Any, width: int, hidden: int, experts: int) -> tuple[str, float, float]:
    """(how far from the data, median, 90 % quantile) of |error| of `seconds`."""
    found, shape = curves(stand_in(chip)), (width, hidden, experts)
    same = [c for c in found if c[:3] == shape]
    each = np.asarray(rows) / experts
    used = same or found
    nearest = min(abs(np.log(c.width / width)) for c in found)
    alike = [c for c in found if abs(np.log(c.width / width)) == nearest]
    low, high = min(c.rows[0] for c in used), max(c.rows[-1] for c in used)
    outside = (each > 0) & ((each < low) | (each > high))
    holds = (
        bool(same),
        not same,
        experts < min(c.experts for c in alike),
        bool(np.any(outside)),
        stand_in(chip) != hardware.chip(chip).name,
    )
    how = [name for name, step in zip(STEPS, holds, strict=True) if step]
    errors = document()["errors"]
    worst = [max(errors[name][key] for name in how) for key in ("median_pct", "p90_pct")]
    return ", ".join(how), worst[0] / 100, worst[1] / 100
