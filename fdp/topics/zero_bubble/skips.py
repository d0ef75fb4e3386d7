"""A U-ViT's long skips in a pipeline: messages of a microbatch by placement, and samples a second
on slow links.

Block i of the first half hands its output to block L − i of the second. A V holds both on one
device; a line sends every skip across the pipeline, and its gradient back.

Legend: p devices, V virtual stages, L blocks of both halves; one more is in the middle."""

from itertools import combinations, pairwise
from typing import NamedTuple

from fdp.parallel.pipeline.costs import STASH, Costs
from fdp.parallel.pipeline.placement import Placement, looped, wave
from fdp.parallel.pipeline.search import PipelineProblem, fixed_candidates, search

DEPTH, DEVICES = 28, 4
STATED = (0, 6, 14, 23)  # first block of each stage of the line whose messages are 34 and 58
LINKS = {"InfiniBand 400 Gbit/s": 50e9, "Ethernet 100": 12.5e9, "Ethernet 25": 3.125e9}
WIDTH, TOKENS, RATE = 1024, 256, 400e12  # of a U-ViT-L at 256 px on a chip of these FLOP/s
SKIP = 4  # FLOPs over tokens · width² of the product that joins a skip; a block has 24 + 4r


class Transfers(NamedTuple):
    """Messages of a microbatch, forwards and backwards: skips straight to where they are read, and
    handed on from device to device."""

    placement: str
    straight: int
    relayed: int


def pairs(first: tuple[int, ...]) -> list[tuple[int, int]]:
    """(virtual stage that keeps, virtual stage that reads) of each skip; first: the first block of
    every virtual stage."""

    def stage(block: int) -> int:
        return sum(block >= start for start in first) - 1

    return [(stage(i), stage(DEPTH - i)) for i in range(DEPTH // 2)]


def cuts(placement: Placement) -> tuple[int, ...]:
    """First blocks of the virtual stages: of a V the halves are cut alike, so that no skip leaves a
    device; else into stages of equal length, the longer ones in the middle, as in `STATED`."""
    count = len(placement.devices)
    if placement == wave(placement.p):
        p, half = placement.p, DEPTH // 2
        sizes = [half // p + (p - half % p - 1 <= i < p - 1) for i in range(p)]
        sizes = [*sizes[:-1], sizes[-1] + 1, *sizes[::-1]]  # the middle block is on the last device
    else:
        long = (DEPTH + 1) % count
        start = (count - long) // 2
        sizes = [(DEPTH + 1) // count + (start <= u < start + long) for u in range(count)]
    return tuple(sum(sizes[:u]) for u in range(count))


def transfers() -> list[Transfers]:
    """Of the V, a line cut as published, a line of equal stages, the line with fewest messages, and
    a loop."""

    def of(name: str, placement: Placement, first: tuple[int, ...]) -> Transfers:
        skips = pairs(first)
        straight, relayed = (placement.transfers(skips, relayed=x) for x in (False, True))
        return Transfers(name, straight, relayed)

    p, end = DEVICES, DEPTH + 1
    line, loop, longest = looped(p), looped(p, 2), -(-end // p)
    fair = [
        (0, *inner)
        for inner in combinations(range(1, end), p - 1)
        if max(b - a for a, b in pairwise((0, *inner, end))) <= longest
    ]
    least = min(fair, key=lambda first: line.transfers(pairs(first)))
    return [
        of("V", wave(p), cuts(wave(p))),
        of("line, stages of 6, 8, 9, 6 blocks", line, STATED),
        of("line, equal stages", line, cuts(line)),
        of(f"line, fewest with stages ≤ {longest} blocks", line, least),
        of("loop of two chunks", loop, cuts(loop)),
    ]


class OnLink(NamedTuple):
    """Makespans of m microbatches on one link, in units of the mean F of a device. message: seconds
    of one activation, in the same units. wave: whole backwards on the V; fixed: best fixed order on
    the V; line, loop: best fixed orders there, their skips relayed."""

    link: str
    m: int
    message: float
    searched: float
    wave: float
    fixed: float
    fixed_name: str
    line: float
    line_name: str
    loop: float
    loop_name: str


def stage_costs(placement: Placement, send: float) -> Costs:
    """[V]: blocks of each virtual stage, those of the second half with the product that joins a
    skip; the mean device takes 1 for its F. Skips on their way make messages longer: the mean of
    the boundaries."""
    p, first, r = placement.p, cuts(placement), TOKENS / WIDTH
    ends = (*first[1:], DEPTH + 1)
    joined = [max(0, b - max(a, DEPTH // 2 + 1)) for a, b in zip(first, ends, strict=True)]
    blocks = [b - a for a, b in zip(first, ends, strict=True)]
    parts = ((24 + 4 * r, SKIP), (24 + 12 * r, SKIP), (24.0, SKIP))
    unit = (sum(blocks) * parts[0][0] + sum(joined) * SKIP) / p
    f, b, w = (
        [(n * whole + j * skip) / unit for n, j in zip(blocks, joined, strict=True)]
        for whole, skip in parts
    )
    held = [n * p / sum(blocks) for n in blocks]
    stash = [STASH * x for x in held]
    plain = placement.transfers()
    longer = placement.transfers(pairs(first), relayed=True) / plain
    return Costs(f, b, w, send=send * longer, activation=held, stash=stash)


def message(bandwidth: float) -> float:
    """An activation on a link, in units of the mean F of a device."""
    seconds = 2 * TOKENS * WIDTH / bandwidth
    blocks = (DEPTH + 1) * (24 + 4 * TOKENS / WIDTH) + DEPTH // 2 * SKIP
    return seconds / (blocks * TOKENS * WIDTH**2 / DEVICES / RATE)


def on_links(m: int, effort: float) -> list[OnLink]:
    """The searched order on the V against fixed ones there and elsewhere. Every device holds what p
    microbatches take on the fullest one."""
    found, p = [], DEVICES
    for name, bandwidth in LINKS.items():
        send = message(bandwidth)
        costs = stage_costs(wave(p), send)
        cap = p * max(x + y for x, y in zip(costs.activation, costs.activation[::-1], strict=True))
        best = search(p, m, costs, cap, [wave(p)], effort)
        waves = [c.makespan for c in best.rivals if c.name == "skip wave"]
        line, loop = (_best_fixed(place, m, send, cap) for place in (looped(p), looped(p, 2)))
        numbers = (best.best.makespan, min(waves), best.rivals[0].makespan, best.rivals[0].name)
        found.append(OnLink(name, m, send, *numbers, *line, *loop))
    return found


def _best_fixed(placement: Placement, m: int, send: float, cap: float) -> tuple[float, str]:
    """(makespan, name)."""
    problem = PipelineProblem(placement.p, m, stage_costs(placement, send), cap)
    best = min(fixed_candidates(problem, [placement]), key=lambda c: c.makespan)
    return best.makespan, best.name
