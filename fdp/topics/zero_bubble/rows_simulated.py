"""Rows of the simulated half of topic 8."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fdp.parallel.pipeline.published import Entry
from fdp.price import hybrid
from fdp.study.report import Row
from fdp.topics.zero_bubble.barrier import STATED, STEPS, Clipping, M, P
from fdp.topics.zero_bubble.simulated import MEASURED, Contest, Proof
from fdp.topics.zero_bubble.skips import DEPTH, DEVICES, RATE, OnLink, Transfers
from fdp.topics.zero_bubble.worth import Worth

MORE = 1.04  # samples a second over the best fixed order
PLAYED = "every operation played at the costs stated, no wire, no kernel"


def _row(
    claim: str,
    metric: str,
    value: Any,
    threshold: str,
    note: str,
    kind: str = "simulated",
    **more: Any,
) -> Row:
    return Row.judged(claim, metric, value, "", threshold, kind, note=note, **more)


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


# Contests
# -------------------------------------------------------------------------------------------------


def contests(found: Sequence[Contest]) -> Iterator[Row]:
    """At p microbatches held, which decides; with more memory; at measured costs."""
    plain = [c for c in found if c.held <= c.p and not c.name.startswith(MEASURED)]
    parts = {
        "": plain,
        ", measured costs": [c for c in found if c.name.startswith(MEASURED)],
        ", more memory": [c for c in found if c.held > c.p],
    }
    for label, some in parts.items():
        if some:
            yield from _fixed(label, some, decides=some is plain)
            yield from _others(label, some)


def _setting(found: Sequence[Contest]) -> str:
    first = found[0]
    return f"p = {first.p}, m = {first.m}, {first.held:.4g} microbatches held; {PLAYED}"


def _fixed(label: str, found: Sequence[Contest], decides: bool) -> list[Row]:
    """Against the best order of any fixed schedule."""
    gains = [c.over("fixed") for c in found]
    enough = -(-2 * len(found) // 3)  # four of six
    can = sum(c.possible >= MORE for c in found)
    each = "; ".join(
        f"{c.name}: {_percent(g)} over {c.fixed.name}, bound {_percent(c.possible)}, bubble "
        f"{c.searched.bubble:.4f} against {c.fixed.bubble:.4f}"
        for c, g in zip(found, gains, strict=True)
    )
    cannot = (
        f"; no order of any kind can: the lower bound leaves 4 % open in {can} of {len(found)}"
        if can < enough
        else ""
    )
    note = f"{_setting(found)}; best of its sequences for every schedule{cannot}; {each}"
    claim = f"a searched schedule beats every fixed one at equal memory{label}"
    metric = f"cases of {len(found)} with ≥ 4 % more samples/s"
    count = sum(g >= MORE for g in gains)
    return [
        _row(claim, metric, count, f"value >= {enough}", note, decides=decides),
        _row(
            f"… and never loses to one{label}",
            "least samples/s over the best fixed order",
            min(gains),
            "value >= 1",
            "by construction: the search starts from them",
        ),
    ]


def _others(label: str, found: Sequence[Contest]) -> list[Row]:
    """Against equalised microbatches and 1F1B."""
    equal = [c.over("equal_searched") for c in found]
    told = "; ".join(
        f"{c.name}: {e:.3f} ×, best fixed order there {c.over('equal_fixed'):.3f} ×"
        for c, e in zip(found, equal, strict=True)
    )
    rows = [
        _row(
            f"unequal microbatches cost nothing against equalised ones{label}",
            "least samples/s over equalised microbatches with their best schedule",
            min(equal),
            "value >= 0.99",
            f"{_setting(found)}; searched there, too; {told}",
        )
    ]
    sorted_, split, random = (
        [c.over(f"{kind}_1f1b") for c in found] for kind in ("sorted", "split", "random")
    )
    note = (
        f"{_setting(found)}; {_span(sorted_)} over sorted 1F1B, {_span(split)} where 1F1B runs B "
        f"and W apart, {_span(random)} over random order (median of 20)"
    )
    claim, metric = f"… and beats 1F1B in sorted order{label}", "least samples/s over 1F1B, sorted"
    return [*rows, _row(claim, metric, min(sorted_), "value >= 1.2", note)]


def _span(ratios: Sequence[float]) -> str:
    low, high = (100 * (x - 1) for x in (min(ratios), max(ratios)))
    return f"{low:.0f} to {high:.0f} %"


def proofs(found: Sequence[Proof]) -> Row:
    """One size."""
    p, m = found[0].p, found[0].m
    far = [f"{x.name}: within {x.gap:.2%}" for x in found if x.gap > 0]
    note = (
        "mixed integer program (HiGHS) over every order and sequence of one chunk a device, p "
        f"microbatches held; proven optimal: {len(found) - len(far)} of {len(found)}, the "
        f"others as near as it came; {'; '.join(far)}"
    )
    claim = f"searched orders are next to optimal, p = {p}, m = {m}"
    metric = "largest gap to what HiGHS proves, share of the makespan"
    return _row(claim, metric, max(x.gap for x in found), "<= 0.02", note.rstrip("; "), "counted")


def tables(found: Sequence[Entry]) -> Row:
    """Published numbers computed again."""
    wrong = [f"{e.table} {e.row} {e.column}: {e.found:.5f}" for e in found if not e.agrees]
    four = sum(e.decimals == 4 for e in found)
    note = (
        f"{four} numbers to 4 decimals (6 models × 6 schedules, span and makespan; the orders of "
        f"torch.distributed.pipelining), {len(found) - four} by shape to 3; {'; '.join(wrong)}"
    )
    claim = "published bubble rates are computed again to the digit"
    metric = f"of {len(found)} numbers that differ"
    return _row(claim, metric, len(wrong), "== 0", note.rstrip("; "), "counted")


# Without a barrier
# -------------------------------------------------------------------------------------------------


def no_barrier(found: dict[str, list[float]]) -> Row:
    """Bubbles of programs of several steps at F = B = W."""
    off = max(
        abs(x - y) for name, row in found.items() for x, y in zip(row, STATED[name], strict=True)
    )
    told = "; ".join(f"{name} {' '.join(f'{x:.4f}' for x in row)}" for name, row in found.items())
    note = f"F = B = W, p = {P}, m = {M}, bubbles after {', '.join(map(str, STEPS))} steps: {told}"
    claim = "without a barrier the stagger of a step is paid once"
    return _row(
        claim, "largest difference from the bubbles stated", off, "<= 0.0005", note, "counted"
    )


def clippings(found: Sequence[Clipping]) -> Iterator[Row]:
    """Clipping that is checked afterwards, one step in ten rolled back, against a barrier."""
    for c in found:
        told = ", ".join(f"{q:.0%}: {s:.4g}" for q, s in c.validated.items())
        yield Row.judged(
            f"{c.schedule}: clipping checked afterwards costs less than a barrier",
            "time of a step, one in ten rolled back",
            c.validated[0.1],
            "F",
            "ratio <= 1",
            "simulated",
            "barrier before every update",
            c.barrier,
            note=f"last step's norm {c.delayed:.4g}; by share rolled back {told}; {PLAYED}",
        )


# Skips of a U-ViT
# -------------------------------------------------------------------------------------------------


def transfers(found: Sequence[Transfers]) -> Row:
    """Messages of a microbatch."""
    first, line = found[0], min(found[1:], key=lambda t: t.straight)
    told = "; ".join(f"{t.placement}: {t.straight} ({t.relayed} relayed)" for t in found)
    return Row.judged(
        "a V keeps a U-ViT's skips on their devices",
        "messages of a microbatch, forwards and backwards",
        first.straight,
        "",
        "value == 12",
        "counted",
        line.placement,
        line.straight,
        note=f"depth {DEPTH}, {DEVICES} devices; {told}",
    )


def on_links(found: Sequence[OnLink]) -> Iterator[Row]:
    """Samples a second on slow links."""
    ratio = [o.fixed / o.searched for o in found]
    told = "; ".join(
        f"{o.link} (a message takes {o.message:.2f} F): {_percent(o.wave / o.searched)} over the "
        f"wave with whole backwards, {_percent(o.fixed / o.searched)} over {o.fixed_name}, "
        f"{_percent(o.line / o.searched)} over the best line ({o.line_name}, skips relayed), "
        f"{_percent(o.loop / o.searched)} over the best loop ({o.loop_name})"
        for o in found
    )
    claim = "U-ViT on slow links: searched against the best fixed order of the skip-collocated wave"
    note = (
        f"U-ViT-L shape at 256 px, p = {DEVICES}, m = {found[0].m}, {RATE / 1e12:g} TFLOP/s a "
        f"device; {told}; {PLAYED}"
    )
    yield _row(claim, "least samples/s over it", min(ratio), "value >= 1", note)
    ratio = [o.line / o.searched for o in found]
    claim, metric = "… and against stages in a line", "least samples/s over the best fixed order"
    yield _row(claim, metric, min(ratio), "value >= 1", "skips handed on from device to device")


# When a pipeline is worth having
# -------------------------------------------------------------------------------------------------


def worth(found: Sequence[Worth]) -> Iterator[Row]:
    """The map in numbers."""
    there = [w for w in found if np.isfinite(w.without) and np.isfinite(w.searched)]
    wins = [w for w in there if w.gain > 1]
    error = hybrid.shipped().provenance["held out, |log error|"]["models"]
    sure = sum(w.gain > 1 + error["median"] for w in there)
    lost = sum(w.gain < 1 / (1 + error["median"]) for w in there)
    models = ", ".join(dict.fromkeys(w.model for w in there))
    note = (
        f"{len(there)} cells: {models}, {min(w.tokens for w in there)} to "
        f"{max(w.tokens for w in there):,} tokens, {min(w.chips for w in there)} to "
        f"{max(w.chips for w in there)} H100, two batches, {_links(there)} GB/s a chip between "
        f"nodes; the planner's cost model, held-out error on unseen models median "
        f"{error['median']:.0%}, 90 % quantile {error['p90']:.0%}; wins in {len(wins)}, by more "
        f"than the median error in {sure}, loses by more in {lost}; F : B : W by matmul FLOPs; "
        f"memory of 1F1B of as many chunks; median gain where it wins {_by_link(wins)}; gradients "
        "in float32"
    )
    claim = "where a pipeline wins, it wins by 10 %"
    metric = "median gain in samples/s over the best plan without pp"
    if wins:
        gain = float(np.median([w.gain - 1 for w in wins]))
        yield _row(claim, metric, gain, "value >= 0.1", note, decides=True)
    yield from _decided(there, len(wins))


def _links(found: Iterable[Worth]) -> str:
    return " and ".join(f"{x / 1e9:g}" for x in sorted({w.link for w in found}, reverse=True))


def _by_link(wins: Sequence[Worth]) -> str:
    links = sorted({w.link for w in wins}, reverse=True)
    gains = {x: [w.gain for w in wins if w.link == x] for x in links}
    return ", ".join(
        f"{_percent(float(np.median(g)))} in {len(g)} cells at {x / 1e9:g} GB/s"
        for x, g in gains.items()
    )


def _decided(found: Sequence[Worth], wins: int) -> Iterator[Row]:
    """Whether the schedule, and not the pipeline, makes the difference."""
    decides = [w for w in found if w.decides]
    flips = [w for w in found if w.flips]
    plain = sum(w.interleaved < w.without for w in found)
    told = "; ".join(w.name for w in flips)
    bubble = [1 - w.free / w.interleaved for w in found]
    note = (
        f"pipelines win in {plain} cells as interleaved 1F1B, in {wins} searched, in "
        f"{sum(w.free < w.without for w in found)} without any bubble; searching turns: "
        f"{told or 'none'}; a step without any bubble would be {np.median(bubble):.1%} shorter in "
        "the median; the threshold is ours: less than half of the cells"
    )
    claim = "whether a pipeline wins is seldom up to its schedule"
    metric = "share of cells where interleaved 1F1B loses and no bubble at all would win"
    yield _row(claim, metric, len(decides) / len(found), "value <= 0.5", note)
    gain = [w.interleaved / w.searched for w in found]
    yield _row(
        "searched schedules shorten planned pipelines",
        "median samples/s over the best plan as interleaved 1F1B",
        float(np.median(gain)),
        "value >= 1",
        f"best cell {_percent(max(gain))}; plans are chosen anew for each schedule",
    )
