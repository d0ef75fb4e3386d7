"""Rows of what was trained and measured in topic 8.

Legend: J noise levels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdp.study.report import Row
from fdp.topics.zero_bubble.fillers import Growth
from fdp.topics.zero_bubble.op_costs import OpCosts
from fdp.topics.zero_bubble.quality import Floor, Samples
from fdp.topics.zero_bubble.steps import STEPS, Clipped

READ = 0.9  # share of samples that should be read as what was asked for


def op_costs(found: Sequence[OpCosts]) -> list[Row]:
    """How far apart repeats lie, and whether F, B and W cost alike."""
    rows = []
    for o in found:
        what = f"patches of {'twice the' if o.patch > 1 else 'the finest'} edge"
        one, b, w = o.ratio
        note = (
            f"F : B : W = {one:.0f} : {b:.2f} : {w:.2f} on {o.rows} images, F {o.median('F'):.3g} "
            f"s; spread between quartiles F {o.spread('F'):.0%}, B {o.spread('B'):.0%}, W "
            f"{o.spread('W'):.0%}; this CPU, no accelerator"
        )
        rows.append(
            Row.judged(
                f"B and W take no longer than the fused backward, {what}",
                "(B + W) / fused backward",
                o.median("B") + o.median("W"),
                "s",
                "ratio <= 1.1",
                "measured",
                "fused",
                o.median("BW"),
                note=note,
            )
        )
    return rows


def quality(names: Sequence[str], found: Sequence[Sequence[Samples]], floor: Floor) -> list[Row]:
    """Whether samples are what was asked for."""
    rows = []
    for name, seeds in zip(names, found, strict=True):
        note = (
            f"the judge reads {floor.accuracy:.0%} of held-out images rightly; Fréchet distance of "
            f"its features to the training images {np.mean([s.distance for s in seeds]):.3g}, of "
            f"held-out images {floor.distance:.3g}; nearest training image at "
            f"{np.mean([s.gap_B.mean() for s in seeds]):.3f} rms of a sample, "
            f"{np.mean([s.held_gap for s in seeds]):.3f} of a held-out image"
        )
        rows.append(
            Row.judged(
                f"samples are read as asked, {name}",
                "share of the samples",
                [s.as_asked for s in seeds],
                "",
                f">= {READ}",
                "measured",
                note=note,
            )
        )
    return rows


def steps_to(curve: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Steps that `other` takes to the losses of `curve`, over those of `curve`: the mean over its
    second half. Above 1 where `other` never comes so low, as if it did at its last step."""
    steps = sorted(curve)[len(curve) // 2 :]
    xs = np.array(sorted(other))
    lowest = np.minimum.accumulate([other[int(x)] for x in xs])
    shares = []
    for step in steps:
        at = int(np.searchsorted(-lowest, -curve[step]))
        if at == 0:
            shares.append(xs[0] / step)
        elif at == len(xs):
            shares.append(max(1.0, xs[-1] / step))
        else:
            high, low = lowest[at - 1], lowest[at]
            part = (high - curve[step]) / (high - low)
            shares.append((xs[at - 1] + part * (xs[at] - xs[at - 1])) / step)
    return float(np.mean(shares))


def fillers(cost: str, curves: Mapping[str, Sequence[Mapping[int, float]]]) -> list[Row]:
    """Whether stable targets save steps, and more than an eighth more images does. `curves`
    {filler: held-out loss by step, of every seed}."""
    base, rows = curves["none"], []
    saved = {
        name: [steps_to(a, b) for a, b in zip(base, seeds, strict=False)]
        for name, seeds in curves.items()
        if name != "none"
    }
    for name, ratios in saved.items():
        what = {"stable": "stable targets", "larger": "an eighth more images a step"}[name]
        steps = ", ".join(map(str, sorted(base[0])))
        note = (
            f"{len(ratios)} seeds, against no filler at its losses in its second half; held-out "
            f"loss at fixed noise, the same for all, at steps {steps}, linear between"
        )
        rows.append(
            Row.judged(
                f"{what} save a tenth of the steps, {cost}",
                "steps to equal held-out loss, share",
                ratios,
                "",
                "<= 0.9",
                "measured",
                note=note,
            )
        )
    if len(saved) == 2:
        rows.append(
            Row.judged(
                f"stable targets save more steps than a larger batch, {cost}",
                "steps with targets / steps with more images",
                saved["stable"],
                "",
                "ratio <= 1",
                "measured",
                "larger batch",
                saved["larger"],
            )
        )
    return rows


def growth(found: Growth) -> Row:
    """What stable targets cost in idle slots."""
    note = (
        f"searched schedule, p = {found.p}, m = {found.m}, bubble {found.bubble:.2%}, op costs "
        f"measured; targets of a microbatch {found.targets:.3g} s on one CPU, shared out over the "
        f"stages, F of a stage {found.F:.3g} s"
    )
    return Row.judged(
        "stable targets fit the idle slots",
        "growth of the makespan, share",
        found.share,
        "",
        "<= 0.01",
        "simulated",
        note=note,
    )


def losses(found: Mapping[str, float]) -> Row:
    """That the losses of one run do not depend on the stages. found: largest relative difference to
    pp = 1, by mesh."""
    return Row.judged(
        "losses do not depend on the number of stages",
        "largest relative difference to pp = 1",
        max(found.values()),
        "",
        "<= 1e-06",
        "measured",
        note="; ".join(f"{mesh}: {x:.1e}" for mesh, x in found.items()),
    )


def clipped(found: Clipped) -> Row:
    """That clipping which is checked afterwards is exact, and clipping by an older norm is not."""
    norms = ", ".join(f"{x:.3g}" for x in found.norms)
    note = (
        f"{STEPS} steps of a DiT in-context over two stages, ZB-H2, one program for every stage "
        f"and operation; clipped to {found.clip:.3g}, norms without clipping {norms}; rolled back "
        f"{len(found.rolled)} steps, {found.again} operations run again; by the last step's norm "
        f"the difference is {found.delayed:.1e}; {found.shared} parameters read by several stages: "
        "with adaLN there are some, whose gradients every update waits for"
    )
    return Row.judged(
        "clipping checked afterwards gives the parameters of a barrier",
        f"relative difference after {STEPS} steps",
        found.validated,
        "",
        "<= 1e-06",
        "measured",
        note=note,
    )


def processes(found: Mapping[str, Any]) -> Row:
    """How well the simulator tells the time of two stages, each a process on a core."""
    told = "; ".join(
        f"{r['order']} {r['simulated']:.3g} s, measured {np.median(r['measured']):.3g}"
        for r in found["rows"]
    )
    note = (
        f"{len(found['rows'][0]['measured'])} repeats on {found['cores']} cores, load before "
        f"{found['load']:.1f}; {told}; op costs measured alone in the same processes"
    )
    claim = "the simulator tells the time of a real run, two processes"
    metric = "median relative error"
    return Row.judged(claim, metric, found["error"], "", "<= 0.1", "measured", note=note)
