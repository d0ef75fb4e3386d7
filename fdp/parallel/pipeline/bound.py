"""What no order of a placement can beat, with any sequence of the microbatches.

Legend: p devices, V virtual stages, u one of them, m microbatches, k one of them, i a device."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fdp.parallel.pipeline.costs import SLACK, Costs
from fdp.parallel.pipeline.placement import Placement


def needed_bytes(placement: Placement, m: int, costs: Costs) -> list[float]:
    """[p]: what any order holds on a device: all its chunks of the largest microbatch, which are
    all there when the last virtual stage starts its B."""
    held_Vxm = np.array(costs.on(placement, m).activation)
    return [float(held_Vxm[list(stages)].sum(0).max()) for stages in placement.stages]


def check_caps(placement: Placement, m: int, costs: Costs, caps: Sequence[float]) -> None:
    """Raises ValueError where a device may hold less than the least that any schedule needs."""
    if len(caps) != placement.p:
        raise ValueError(f"{len(caps)} memory caps for p={placement.p} stages: give one or p")
    for i, (need, cap) in enumerate(zip(needed_bytes(placement, m, costs), caps, strict=True)):
        if not cap >= need * (1 - SLACK):
            raise ValueError(
                f"stage {i} may hold {cap:g} bytes, but any schedule holds the {placement.v} "
                f"chunks of one microbatch at once: {need:g}; {need - cap:g} more are needed"
            )


def lower_bound(placement: Placement, m: int, costs: Costs, caps: Sequence[float]) -> float:
    """Seconds. The largest of: a microbatch's own way; for each device its work and what it must
    idle.

    A device idles until its first F can arrive, and until its first B can arrive less the F that
    fit its memory before (a fraction of the last one counts); after its last B, whose gradient
    still goes on to virtual stage 0, it idles less the W whose stash fits its memory."""
    t = costs.on(placement, m)
    F, B, W = (np.array(x) for x in (t.F, t.B, t.W))
    held, kept = np.array(t.activation), np.array(t.stash)
    devices = placement.devices
    send = t.send * np.array([0, *(a != b for a, b in pairwise(devices))])
    come_Vxm = np.cumsum(F, 0) - F + np.cumsum(send)[:, None]  # F of u starts
    back_Vxm = np.cumsum(B, 0) - B + np.cumsum(send)[:, None]  # from the end of B of u to that of 0
    turn_m = F.sum(0) + send.sum()
    after_Vxm = turn_m + B.sum(0) + send.sum() - back_Vxm - B  # B of u starts
    bound = float((turn_m + B.sum(0) + send.sum() + W[0]).max())
    for i, stages in enumerate(placement.stages):
        u = list(stages)
        work = float((F[u] + B[u] + W[u]).sum())
        first_b = float(after_Vxm[u[-1]].min())
        most_f = _most(F[u].ravel(), held[u].ravel(), caps[i])
        start = max(float(come_Vxm[u[0]].min()), first_b - most_f)
        end = (back_Vxm[u[0]] + (W[0] if u[0] else 0)).min() - _most(
            W[u].ravel(), kept[u].ravel(), caps[i]
        )
        bound = max(bound, work + start + max(0.0, float(end)))
    return bound


def _most(seconds: np.ndarray, sizes: np.ndarray, cap: float) -> float:
    """The most seconds of what fits a cap, fractions allowed."""
    free = sizes <= 0
    total = float(seconds[free].sum())
    order = np.argsort(-seconds[~free] / sizes[~free])
    for s, size in zip(seconds[~free][order], sizes[~free][order], strict=True):
        if cap <= 0:
            break
        total += float(s) * min(1.0, cap / size)
        cap -= size
    return total
