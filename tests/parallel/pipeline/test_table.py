"""Tables of every schedule, played by hand: what an operation reads is what it needs.

Legend: p devices, u virtual stages, k microbatches."""

from dataclasses import replace

import numpy as np
import pytest

from fdp.parallel.pipeline.fixed import dualpipe_v, skip_wave, zb_h1
from fdp.parallel.pipeline.heuristics import Times, zb_heuristic, zbv_heuristic
from fdp.parallel.pipeline.library import FIXED, WAVES, WHOLE, named
from fdp.parallel.pipeline.table import (
    FIELDS,
    FIRST_B,
    FIRST_F,
    IDLE,
    LAST_B,
    NEXT,
    PREVIOUS,
    B,
    F,
    W,
    table,
)

pytestmark = pytest.mark.fast
KINDS = {FIRST_F: "F", F: "F", B: "B", FIRST_B: "B", LAST_B: "B", W: "W"}
TIMES = Times(1.0, 1.3, 0.8)
ORDERS = {
    f"{name} p={p} v={v}": named(name, p, 2 * p, v)
    for name in FIXED
    for p in (1, 2, 4)
    for v in ((1,) if name in (*WHOLE, *WAVES) else (1, 3))
}
ORDERS |= {
    "skip wave": skip_wave(4, 6),
    "few of zbv": named("zbv", 4, 2),
    "zb-1p": zb_heuristic(4, 8, TIMES),
    "zb-2p": zb_heuristic(4, 8, TIMES, 8),
    "zbv from times": zbv_heuristic(4, 8, TIMES),
    "dualpipe-v": dualpipe_v(3, 9),
}


def played(found, place):
    """Operations that ran. Slots hold what was put there: (what, virtual stage, microbatch). Fails
    where an operation reads anything but the message, residuals or stash of its own."""
    p, last = place.p, len(place.devices) - 1
    box, kept, stash = ([{} for _ in range(p)] for _ in range(3))
    ran = []
    for row in found.rows:
        at = [dict(zip(FIELDS, mine, strict=True)) for mine in row.tolist()]
        out = [None] * p
        for i, a in enumerate(at):
            if a["kind"] == IDLE:
                continue
            kind, u, k = KINDS[a["kind"]], place.stages[i][a["chunk"]], a["microbatch"]
            ran.append((kind, u, k))
            if kind == "F":
                assert u == 0 or box[i].get(a["input"]) == ("F", u - 1, k)
                out[i] = kept[i][a["residual"]] = ("F", u, k)
            elif kind == "B":
                came = ("B", u + 1, k) if u < last else ("F", u, k)
                assert box[i].get(a["input"]) == came and (a["kind"] == LAST_B) == (u == last > 0)
                assert kept[i].get(a["residual"]) == ("F", u, k)
                out[i] = stash[i][a["stash"]] = ("B", u, k)
            else:
                assert stash[i].get(a["stash"]) == ("B", u, k)
        for i, a in enumerate(at):
            before, after = at[(i - 1) % p]["send"] == NEXT, at[(i + 1) % p]["send"] == PREVIOUS
            box[i][a["plus"]] = out[(i - 1) % p] if before else None
            box[i][a["minus"]] = out[(i + 1) % p] if after else None
            box[i][a["own"]] = out[i]
    return ran


@pytest.mark.parametrize("name", ORDERS)
def test_every_operation_reads_its_own_slots(name):
    order = ORDERS[name]
    ran = played(table(order), order.placement)
    every = [
        (kind, u, k)
        for kind in "FBW"
        for u in range(len(order.placement.devices))
        for k in range(order.microbatches)
    ]
    assert sorted(ran) == sorted((kind, u, k) for kind, u, k in every)


@pytest.mark.parametrize("field", ["input", "residual", "stash", "microbatch"])
def test_a_slot_of_another_microbatch_is_noticed(field):
    order = zb_h1(4, 8)
    found, at = table(order), FIELDS.index(field)
    rows = found.rows.copy()
    kind = W if field == "stash" else B
    t = next(t for t, row in enumerate(rows) if row[1, 0] == kind)
    others = rows[np.isin(rows[:, 1, 0], (F, B, W)), 1, at]
    rows[t, 1, at] = others[others != rows[t, 1, at]][0]
    with pytest.raises(AssertionError):
        played(replace(found, rows=rows), order.placement)
