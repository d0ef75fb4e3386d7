"""V-Half and V-Min: half and a third of the memory of 1F1B (Qi et al. 2024, arXiv 2405.15362).

A building block of six unit slots, the same for every microbatch, is repeated; then the operations
of the ramps move to earlier slots where the peak memory allows it.

Legend: p devices, m microbatches, i a device, lane: a place of the block, F of chunk 0 and 1, B of
chunk 1 and 0, W."""

from collections.abc import Iterator

from fdp.parallel.pipeline.orders import Op, Order, build
from fdp.parallel.pipeline.placement import wave

PERIOD = 6
LANES = (("F", 0), ("F", 1), ("B", 1), ("B", 0))
W_LANE = len(LANES)
Slots = list[list[int]]  # of one device: [lane][microbatch]; lane 4, if there, holds the W of any B


def v_half(p: int, m: int) -> Order:
    """Holds about p/2 + 1 microbatches; the bubble of 1F1B is halved where F = B = W."""
    gap = 3 if p % 2 == 0 else 0
    return _squeezed(
        p,
        m,
        [(2 * i, 3 * p - i - 2, 3 * p + gap + 2 * i - 1, 6 * p + gap - i - 2) for i in range(p)],
    )


def v_min(p: int, m: int) -> Order:
    """Holds about p/3 + 1⅓ microbatches, the least of a block with equal lifetimes; two thirds
    of the bubble of 1F1B."""
    gap = 2 if p % 3 == 0 else 0
    return _squeezed(
        p, m, [(i, 2 * p - i - 1, 2 * p + gap + i, 4 * p + gap - i - 1) for i in range(p)]
    )


def _squeezed(p: int, m: int, block: list[tuple[int, int, int, int]]) -> Order:
    """Twice: first with the W in the way, then with F and B alone, as W fill what is left."""
    if m < 1:
        raise ValueError(f"a pipeline needs m ≥ 1 microbatches, got m={m}")
    devices = [[[t + PERIOD * k for k in range(m)] for t in lanes] for lanes in block]
    for slots in devices:
        slots.append(_weights(slots))
    devices = _eager(_moved(devices))
    devices = _moved([slots[:W_LANE] for slots in devices])
    for slots in devices:
        slots.append(_weights(slots))
    devices = [slots[:W_LANE] for slots in _eager(devices)]
    return build(wave(p), lambda i: _ops(devices[i]))


def _weights(slots: Slots) -> list[int]:
    """A W in every empty slot while one waits, and the rest at the end."""
    taken = {t: lane for lane in range(W_LANE) for t in slots[lane]}
    out, waiting = [], 0
    for t in range(max(taken) + 1):
        if t in taken:
            waiting += taken[t] >= 2
        elif waiting:
            out.append(t)
            waiting -= 1
    return out + [max(taken) + 1 + n for n in range(waiting)]


def _ops(slots: Slots) -> list[Op]:
    """Operations by slot; each empty slot takes a W, of chunk 1 first."""
    at = {
        t: Op(LANES[lane][0], k, LANES[lane][1])
        for lane, ts in enumerate(slots)
        for k, t in enumerate(ts)
    }
    waiting: dict[int, list[Op]] = {1: [], 0: []}
    out = []

    def weight() -> list[Op]:
        queue = waiting[1] or waiting[0]
        return [queue.pop(0)] if queue else []

    for t in range(max(at) + 1):
        if t not in at:
            out += weight()
            continue
        out.append(at[t])
        if at[t].kind == "B":
            waiting[at[t].chunk].append(at[t]._replace(kind="W"))
    while rest := weight():
        out += rest
    return out


def _peak(slots: Slots) -> int:
    """Chunks held. Without a lane for W an empty slot counts as one."""
    marks = sorted((t, lane) for lane, ts in enumerate(slots) for t in ts)
    held = most = waiting = 0
    before = -1
    for t, lane in marks:
        if len(slots) == W_LANE:
            ran = min(waiting, t - before - 1)
            held, waiting, before = held - ran, waiting - ran, t
        held += {0: 1, 1: 1, W_LANE: -1}.get(lane, 0)
        waiting += lane in (2, 3)
        most = max(most, held)
    return most


def _by_slot(devices: list[Slots]) -> Iterator[tuple[int, int, int]]:
    """(device, lane, microbatch) by slot."""
    marks = [
        (t, i, lane, k)
        for i, slots in enumerate(devices)
        for lane, ts in enumerate(slots)
        for k, t in enumerate(ts)
    ]
    return ((i, lane, k) for _, i, lane, k in sorted(marks))


def _source(i: int, lane: int, p: int) -> int | None:
    """The device before device i on a lane: lanes 0 and 2 go down the V, 1 and 3 up."""
    j = i + (-1 if lane in (0, 2) else 1)
    return j if lane < W_LANE and 0 <= j < p else None


def _moved(devices: list[Slots]) -> list[Slots]:
    """Every operation of the ramps in the earliest free slot behind its inputs that leaves the peak
    memory of the worst device as it is. Without W only the last ramp moves."""
    m, with_w = len(devices[0][0]), len(devices[0]) > W_LANE
    limit = max(map(_peak, devices))
    taken: list[set[int]] = [set() for _ in devices]
    phase = 0  # 1 from the end of the first microbatch on, 2 from the last F of chunk 0 on
    for i, lane, k in _by_slot(devices):
        slots = devices[i]
        if (i, lane, phase) == (0, 3, 0):
            phase = 1
        steady = phase == 1 or (phase == 0 and not with_w)
        if phase == 1 and (lane, k) == (0, m - 1):
            phase = 2
        if not steady:
            now = slots[lane][k]
            for t in range(_after(devices, i, lane, k) + 1, now):
                if t not in taken[i]:
                    slots[lane][k] = t
                    if _peak(slots) <= limit:
                        break
            else:
                slots[lane][k] = now
        taken[i].add(slots[lane][k])
    return devices


def _after(devices: list[Slots], i: int, lane: int, k: int) -> int:
    """The last slot of what (device i, lane, microbatch k) must follow."""
    slots, j = devices[i], _source(i, lane, len(devices))
    after = [-1]
    if j is not None:
        after.append(devices[j][lane][k])
    if 0 < lane < W_LANE:
        after.append(slots[lane - 1][k])
    if lane == W_LANE:
        after.append(sorted(slots[2] + slots[3])[k])
    if k:
        after.append(slots[lane][k - 1])
    return max(after)


def _eager(devices: list[Slots]) -> list[Slots]:
    """Slots where every operation starts as early as its inputs and its device's order allow."""
    out: list[Slots] = [[[0] * len(ts) for ts in slots] for slots in devices]
    free = [0] * len(devices)
    for i, lane, k in _by_slot(devices):
        begin, j = free[i], _source(i, lane, len(devices))
        if j is not None:
            begin = max(begin, out[j][lane][k] + 1)
        if 0 < lane < W_LANE:
            begin = max(begin, out[i][lane - 1][k] + 1)
        out[i][lane][k], free[i] = begin, begin + 1
    return out
