"""From measurements to rows of the report."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fdp.count.random_programs import ProgramCheck, summarise
from fdp.study.report import Row
from fdp.topics.parallelism_search import scores
from fdp.topics.parallelism_search.landscapes import Searched
from fdp.topics.parallelism_search.validate import HoldOut, error

ZERO_SHOT = "unseen models at 64-512 GPUs"
KINDS = {"moe": "mixtures of experts", "long": "sequences of 16k and more"}
SEARCHING = "searching with the model as prior"
MEAN = "mean error"


def _row(
    claim: str,
    metric: str,
    values: float | Sequence[float],
    threshold: str,
    note: str,
    unit: str = "%",
    baseline: tuple[str, float | Sequence[float] | None] = ("", None),
    evidence: str = "simulated",
    **more: Any,
) -> Row:
    """A judged row, of hold-outs where nothing else is said."""
    given = claim, metric, values, unit, threshold, evidence
    return Row.judged(*given, *baseline, note=note, **more)


def untestable(reason: str) -> list[Row]:
    """The claims about measured runs, without any."""
    note = f"{reason}: set plan.measurements to a folder of published measurements"
    claims = (
        (f"zero-shot step time, {ZERO_SHOT}", MEAN, "%", "<= 8", "simulated"),
        (SEARCHING, "runs to within 5 %", "", "<= 5", "counted"),
    )
    return [Row.untestable(*claim, note, decides=True) for claim in claims]


# Hold-outs
# -------------------------------------------------------------------------------------------------


def models(outcomes: list[HoldOut], five_points: list[list[tuple[float, float]]]) -> Iterator[Row]:
    """Each model unseen by its fit."""
    found = [scores.score(o) for o in outcomes]
    errors, correlations, regrets = (
        [x for s in found for x in getattr(s, name)]
        for name in ("errors", "correlations", "regrets")
    )
    n = f"{len(errors)} landscapes of {len(outcomes)} models, each model unseen by its fit"
    claim, metric = f"zero-shot step time, {ZERO_SHOT}", "mean error per landscape"
    yield _row(claim, metric, errors, "value <= 8", n, decides=True)
    pairs = [pair for many in five_points for pair in many]
    if pairs:
        five, before = ([pair[i] for pair in pairs] for i in (0, 1))
        note = "five random points, five draws, landscapes of at least ten plans: the large sweeps"
        claim, same = f"{claim}, after five measured points", ("the same rows before", before)
        yield _row(claim, metric, five, "value <= 5", note, "%", same)
    claim, note = f"ranking, {ZERO_SHOT}", f"landscapes of at least {scores.RANKED} plans"
    yield _row(claim, "Spearman", correlations, ">= 0.85", note, "", decides=True)
    claim, note = f"choosing without a run, {ZERO_SHOT}", "against the best measured plan"
    yield _row(claim, "top-1 regret", regrets, "value <= 2", note, decides=True)


def every(outcomes: list[HoldOut]) -> Iterator[Row]:
    """Intervals; and hybrid, physics alone and learning alone on every hold-out, each hold-out
    weighing the same."""
    covered, share = scores.coverage(outcomes), "share of measured times inside"
    yield _row("90 % intervals cover", share, covered, ">= 85", "all hold-outs")
    yield _row("… and are not too wide", share, covered, "<= 95", "all hold-outs")
    ours, physics, learning = (
        [float(np.mean(scores.score(o, which).errors)) for o in outcomes]
        for which in ("hybrid", "analytic", "learned")
    )
    note = f"{len(outcomes)} hold-outs, one value each"
    claim, same = "the residual helps: hybrid against physics alone", ("analytic only", physics)
    yield _row(claim, MEAN, ours, "ratio <= 1", note, "%", same, decides=True)
    note = f"{note}; learning is given the FLOPs"
    claim, same = "the physics helps: hybrid against learning alone", ("learned only", learning)
    yield _row(claim, MEAN, ours, "ratio <= 1", note, "%", same, decides=True)


def _error(o: HoldOut) -> float:
    return error(o.timed.hybrid.time, o.timed.measured)


def kind(label: str, outcomes: list[HoldOut], one_point: list[list[float]]) -> list[Row]:
    """Unseen models, or lengths, of one kind: without a run, and after one of each model and
    chip."""
    zero, one = [_error(o) for o in outcomes], [float(np.mean(draws)) for draws in one_point]
    note = ", ".join(f"{o.name} {e:.1f}" for o, e in zip(outcomes, zero, strict=True))
    claim = f"{label}, one measured point per (model, chip)"
    return [
        _row(f"zero-shot step time, {label}", MEAN, zero, "value <= 20", note),
        _row(claim, MEAN, one, "value <= 10", "five draws of the points"),
    ]


def unseen(outcomes: list[HoldOut]) -> list[Row]:
    """A release or a cluster."""
    given = [(f"zero-shot step time, unseen {o.name}", _error(o), o.timed) for o in outcomes]
    return [_row(claim, MEAN, e, "value <= 20", f"{len(o.index)} rows") for claim, e, o in given]


def release(outcomes: list[HoldOut], copies: list[list[tuple[float, float]]]) -> Iterator[Row]:
    """Against copying what another release measured."""
    yield from unseen(outcomes)
    for o, pairs in zip(outcomes, copies, strict=True):
        if pairs:
            ours, copied = ([pair[i] for pair in pairs] for i in (0, 1))
            note = f"{len(pairs)} of {len(o.timed.index)} rows have such a twin"
            claim, same = f"predicting {o.name} beats copying", "same configuration, other release"
            yield _row(claim, MEAN, ours, "ratio <= 1", note, "%", (same, copied))


def memory(outcomes: list[HoldOut]) -> Iterator[Row]:
    """Failed runs of the playbook, the one collection that publishes them, and measured peaks."""
    alarms = [scores.memory_alarm(o) for o in outcomes if o.name.startswith("ultrascale")]
    if not alarms:
        return
    recall, false = ([a[i] for a in alarms] for i in (0, 1))
    claim, note = "failed runs are foreseen on unseen models", "one value per playbook model"
    yield _row(claim, "recall", recall, ">= 90", note)
    yield _row("… with few false alarms", "false alarms among runs that ran", false, "<= 10", "")
    below, count = scores.memory_coverage(outcomes)
    if count:
        claim, note = "peak memory stays below its 90 % quantile", "hold-outs with measured memory"
        yield _row(claim, "share of measured peaks", below, ">= 85", f"{count} {note}")


def searched(found: list[list[Searched]]) -> list[Row]:
    """Runs that each search needs on measured landscapes: those of the playbook, where there are
    any."""
    every = [s for many in found for s in many]
    chosen = [s.needed for s in every if s.name.startswith("ultrascale")]
    chosen = chosen or [s.needed for s in every]
    if not chosen:
        return []
    mean = {a: [float(per[a].mean()) for per in chosen] for a in chosen[0]}
    others = sorted((float(np.mean(v)), a) for a, v in mean.items() if a != "bayes")
    best, told = others[0][1], ", ".join(f"{a} {v:.1f}" for v, a in others)
    note = (
        f"replayed on {len(chosen)} landscapes that others measured, failed runs counted; "
        f"others: {told}"
    )
    more = "", (best, mean[best]), "counted"
    metric = "runs to within 5 % of the best"
    return [_row(SEARCHING, metric, mean["bayes"], "value <= 5", note, *more, decides=True)]


# What needs no measurements
# -------------------------------------------------------------------------------------------------


def uneven(stages: int, microbatches: int, found: dict[str, float]) -> list[Row]:
    """Stages of llama3-8b by two methods, and against equal ones."""
    head = f"the head costs {found['head']:.2f} layers"
    note = f"llama3-8b, {stages} stages, {microbatches} microbatches, {head}"
    claim = "uneven pipelines: dynamic program and ILP agree"
    gap = abs(found["program"] / found["integer"] - 1)
    better = "uneven pipelines beat equal ones", "pipeline time", found["program"], "ratio <= 1"
    return [
        _row(claim, "relative difference", gap, "<= 1e-9", note, "", evidence="counted"),
        _row(*better, note, "layers", ("equal layers a stage", found["equal"])),
    ]


def speed(found: dict[str, float]) -> list[Row]:
    """Of the planner on this machine."""
    note = f"{found['valid']:,} plans, warm, space and columns included"
    cheap = "predictions are cheap", "predictions per second", found["rate"], ">= 100000"
    whole = "a whole 512-GPU space is ranked at once", "time", found["seconds"], "<= 2"
    return [
        _row(*cheap, "warm, this machine's CPU", "1/s", evidence="measured"),
        _row(*whole, note, "s", evidence="measured"),
    ]


def programs(found: list[ProgramCheck]) -> list[Row]:
    """Closed formulas against the compiler."""
    f = summarise(found)
    programs = f"{f.configs} random programs of this code base on meshes of up to 8 devices"
    note = (
        f"{f.entries} entries of {programs}; one-layer models with remat or ZeRO-3 are not drawn: "
        "XLA unrolls them and merges collectives, so that they send less"
    )
    sent = "bytes per axis equal the compiled program", "(op, axes) entries that differ"
    flops = "FLOPs equal the program's", "largest relative error", f.flops_error
    held = "analytic memory against the compiler's plan", "median relative error", f.memory_error
    largest = f"train steps of {f.memory_configs} of them; largest {f.memory_error_max:.2f}"
    return [
        _row(*sent, f.mismatches, "== 0", note, "", evidence="counted"),
        _row(*flops, "<= 0.01", programs, "", evidence="counted"),
        _row(*held, "<= 0.25", largest, "", evidence="counted"),
    ]
