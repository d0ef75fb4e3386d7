"""Topic 15: a hybrid cost model validated on what it has not seen, and searches that spend real
runs.

The arm is a small model of this code base, trained on the mesh that the planner chose for it.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from threadpoolctl import threadpool_limits

from fdp.config import UserError, digest
from fdp.count import random_programs
from fdp.experiment import Experiment, standard
from fdp.models.shape import ModelShape
from fdp.parallel.pipeline import partition
from fdp.price import fit, hybrid, planner, ranking, ranking_text, shapes, space
from fdp.price.measurements import Malformed, published
from fdp.price.ranking import Ranking
from fdp.run import Run
from fdp.study.report import Report, Row
from fdp.topics.parallelism_search import figures, landscapes, validate
from fdp.topics.parallelism_search.validate import HoldOut

ZERO_SHOT = "unseen models at 64-512 GPUs"
TRAINER = "parallel_dlm"  # the topic whose config the planner writes


@dataclass(frozen=True)
class Priced:
    """What one measurement adds to the report."""

    rows: list[Row] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    plots: list[str] = field(default_factory=list)


def ranked(config: ml_collections.ConfigDict) -> Ranking:
    """Plans for `config.plan`, of a published model or of the config's own. Raises UserError where
    there is none."""
    c = config.plan
    causal = bool(c.model) or config.objective.name == "autoregressive"
    model = c.model or ModelShape.of(config.model)
    try:
        return planner.plan(model, c.cluster, c.batch, c.seq_len, c.precision, causal)
    except UserError as error:
        raise UserError(f"config.plan: {error}") from error


def arms(config: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """The model of the config on the mesh that the planner finds for as many chips as the config's
    mesh has.

    Raises UserError where the config asks for a plan that does not exist, before anything is
    trained."""
    ranked(config)
    c = config.copy_and_resolve_references()
    where = c.hardware.topology or f"h100:1x{int(np.prod(list(c.mesh.values())))}"
    causal = c.objective.name == "autoregressive"
    shape = ModelShape.of(c.model)
    best = planner.plan(shape, where, c.train.batch, c.data.seq_len, causal=causal).trainable
    if best is not None:
        p = best.plan
        c.mesh.update(pp=1, dp=p.dp, ep=1, cp=p.cp, tp=p.tp)
        c.model.update(remat=p.recompute, sequence_parallel=p.tp > 1)
        c.train.update(microbatches=c.train.batch // (p.dp * p.microbatch), zero=p.zero)
    return {"planned": standard(c)}


def study(run: Run) -> Report:
    """Plan, validate on hold-outs, search measured landscapes, count real programs; judge the
    claims.
    """
    c = run.config
    found = [planned(run), *measured(run), uneven(), speed(), counted(c.plan.counted)]
    rows = [row for f in found for row in f.rows]
    plots: list[str | Path] = [plot for f in found for plot in f.plots]
    raw = {name: value for f in found for name, value in f.raw.items()}
    return Report(c.topic, c.variant, digest(c), rows, plots, raw)


def planned(run: Run) -> Priced:
    """The ten best plans, a config of the best that can be trained, and their landscape."""
    best = ranked(run.config)
    print(f"\n{best}\n")
    fragment = run.workdir / "planned.py"
    fragment.write_text(ranking_text.fragment(best, TRAINER), encoding="utf8")
    print(f"config    {fragment}")
    return Priced(plots=[figures.landscape(run.workdir, best)])


# Published measurements
# -------------------------------------------------------------------------------------------------


def measured(run: Run) -> list[Priced]:
    """Hold-outs and searches; where there are no measurements, the claims are not testable."""
    folder = Path(run.config.plan.measurements)
    if not folder.is_dir():
        return [untestable(f"no folder {folder}")]
    # Many small factorisations: threads of the BLAS would only wait for each other.
    with jax.enable_x64(True), threadpool_limits(1, "blas"):
        data = read(folder)
        outcomes = list(hold_outs(run.config.plan, data))
        if not outcomes:
            return [untestable(f"{folder} has no row of the hold-outs")]
        return [validated(run, data, outcomes), searched(run, data, outcomes)]


def read(folder: Path) -> fit.FitData:
    """The folder's rows. Raises UserError for a malformed file; rows that cannot be priced are
    counted, three shown.
    """
    try:
        priced, refused = published(folder)
    except Malformed as error:
        raise UserError(f"plan.measurements: {error}") from error
    print(f"measured  {len(priced)} rows priced, {len(refused)} refused")
    for reason in refused[:3]:
        print(f"  {reason}")
    return fit.gather(priced)


def untestable(reason: str) -> Priced:
    """The claims about measured runs, without any."""
    note = f"{reason}: set plan.measurements to a folder of published measurements"
    claims = (
        (f"zero-shot step time, {ZERO_SHOT}", "mean error", "%", "<= 8", "simulated"),
        ("searching with the model as prior", "runs to within 5 %", "", "<= 5", "counted"),
    )
    return Priced([Row.untestable(*claim, note) for claim in claims])


def hold_outs(plan: ml_collections.ConfigDict, data: fit.FitData) -> Iterator[HoldOut]:
    """Every hold-out that is asked for and measured."""
    print("fitting   hold-outs:")
    fitter = fit.Fitter(data)
    for case in validate.CASES:
        if plan.cases and case.name not in plan.cases:
            continue
        start = time.perf_counter()
        try:
            outcome = validate.run_case(fitter, case, plan.steps)
        except validate.NothingToJudge as absent:
            print(f"  {absent}")
            continue
        mean = np.mean(validate.score(data, outcome).errors)
        print(
            f"  {case.kind:8}{case.name:28}{len(outcome.rows):4} rows, mean error {mean:5.1f} % "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
        yield outcome


def row(
    claim: str,
    metric: str,
    values: float | Sequence[float],
    threshold: str,
    note: str,
    unit: str = "%",
    baseline: tuple[str, float | Sequence[float] | None] = ("", None),
    evidence: str = "simulated",
) -> Row:
    """A judged row, of hold-outs where nothing else is said."""
    return Row.judged(claim, metric, values, unit, threshold, evidence, *baseline, note=note)


def validated(run: Run, data: fit.FitData, outcomes: list[HoldOut]) -> Priced:
    """What the cost model says of what its fits had not seen."""
    rows = [
        *_model_rows(data, outcomes),
        *_ablation_rows(data, outcomes),
        *_kind_rows(data, outcomes),
        *_memory_rows(data, outcomes),
    ]
    raw = {o.case.name: validate.score(data, o).raw() for o in outcomes}
    plots = [figures.predicted(run.workdir, outcomes), figures.memory(run.workdir, data, outcomes)]
    return Priced(rows, raw, plots)


def _of(outcomes: list[HoldOut], *kinds: str) -> list[HoldOut]:
    return [o for o in outcomes if o.case.kind in kinds]


def _model_rows(data: fit.FitData, outcomes: list[HoldOut]) -> Iterator[Row]:
    models = _of(outcomes, "model")
    if not models:
        return
    s = validate.scores(data, models)
    n = f"{len(s.errors)} landscapes of {len(models)} models, each model unseen by its fit"
    pairs = [validate.with_anchors(data, o, 5, 5) for o in models]
    five, before = ([e for pair in pairs for e in pair[i]] for i in (0, 1))
    claim, error = f"zero-shot step time, {ZERO_SHOT}", "mean error per landscape"
    yield row(claim, error, s.errors, "value <= 8", n)
    if five:
        note = "five random points, five draws, landscapes of at least ten plans: the large sweeps"
        same = ("the same rows before", before)
        yield row(
            f"{claim}, after five measured points", error, five, "value <= 5", note, "%", same
        )
    note = "landscapes of at least 8 plans"
    yield row(f"ranking, {ZERO_SHOT}", "Spearman", s.correlations, ">= 0.85", note, "")
    claim, note = f"choosing without a run, {ZERO_SHOT}", "against the best measured plan"
    yield row(claim, "top-1 regret", s.regrets, "value <= 2", note)
    covered, share = validate.coverage(outcomes), "share of measured times inside"
    yield row("90 % intervals cover", share, covered, ">= 85", "all hold-outs")
    yield row("… and are not too wide", share, covered, "<= 95", "all hold-outs")


def _ablation_rows(data: fit.FitData, outcomes: list[HoldOut]) -> Iterator[Row]:
    """Hybrid, physics alone and learning alone on every hold-out, each hold-out weighing the
    same.
    """
    e = {
        which: [float(np.mean(validate.score(data, o, which).errors)) for o in outcomes]
        for which in ("hybrid", "analytic", "learned")
    }
    note = f"{len(outcomes)} hold-outs, one value each"
    claim, baseline = "the residual helps: hybrid against physics alone", e["analytic"]
    same = ("analytic only", baseline)
    yield row(claim, "mean error", e["hybrid"], "ratio <= 1", note, "%", same)
    claim, baseline = "the physics helps: hybrid against learning alone", e["learned"]
    note, same = f"{note}; learning is given the FLOPs", ("learned only", baseline)
    yield row(claim, "mean error", e["hybrid"], "ratio <= 1", note, "%", same)


def _kind_rows(data: fit.FitData, outcomes: list[HoldOut]) -> Iterator[Row]:
    for kind, label in (("moe", "mixtures of experts"), ("long", "sequences of 16k and more")):
        chosen = _of(outcomes, kind)
        if not chosen:
            continue
        zero = [validate.error(o.predicted, o.measured) for o in chosen]
        one = [float(np.mean(validate.one_anchor_each(data, o, 5))) for o in chosen]
        note = ", ".join(f"{o.case.name} {e:.1f}" for o, e in zip(chosen, zero, strict=True))
        yield row(f"zero-shot step time, {label}", "mean error", zero, "value <= 20", note)
        claim = f"{label}, one measured point per (model, chip)"
        yield row(claim, "mean error", one, "value <= 10", "five draws of the points")
    for o in (*_of(outcomes, "release"), *_of(outcomes, "cluster")):
        claim, note = f"zero-shot step time, unseen {o.case.name}", f"{len(o.rows)} rows"
        e = validate.error(o.predicted, o.measured)
        yield row(claim, "mean error", e, "value <= 20", note)
        if o.case.kind == "release":
            yield from _copied_row(data, o)


def _copied_row(data: fit.FitData, o: HoldOut) -> Iterator[Row]:
    places, seconds = validate.copied(data, o)
    if not places.size:
        return
    ours, copied = (
        100 * np.abs(t / o.measured[places] - 1) for t in (o.predicted[places], seconds)
    )
    baseline = ("same configuration, other release", copied.tolist())
    note = f"{len(places)} of {len(o.rows)} rows have such a twin"
    claim = f"predicting {o.case.name} beats copying"
    yield row(claim, "mean error", ours.tolist(), "ratio <= 1", note, "%", baseline)


def _memory_rows(data: fit.FitData, outcomes: list[HoldOut]) -> Iterator[Row]:
    alarms = [validate.memory_alarm(o) for o in outcomes if o.case.name.startswith("ultrascale")]
    if not alarms:
        return
    recall, false = ([a[i] for a in alarms] for i in (0, 1))
    claim, note = "failed runs are foreseen on unseen models", "one value per playbook model"
    yield row(claim, "recall", recall, ">= 90", note)
    yield row("… with few false alarms", "false alarms among runs that ran", false, "<= 10", "")
    below, count = validate.memory_coverage(data, outcomes)
    if count:
        claim, note = (
            "peak memory stays below its 90 % quantile",
            f"{count} hold-outs with measured memory",
        )
        yield row(claim, "share of measured peaks", below, ">= 85", note)


def searched(run: Run, data: fit.FitData, outcomes: list[HoldOut]) -> Priced:
    """Runs that each search needs on measured landscapes."""
    seeds = run.config.plan.searches
    print(f"searching the measured landscapes, {seeds} seeds of every algorithm", flush=True)
    found = landscapes.compare(data, outcomes, seeds)
    raw = {n: {a: e.tolist() for a, e in per.items()} for n, per in found.needed.items()}
    plots = [figures.regret(run.workdir, found)] if found.needed else []
    return Priced(_search_rows(found), {"evaluations to within 5 %": raw}, plots)


def _search_rows(found: landscapes.Searches) -> list[Row]:
    playbook = {n: per for n, per in found.needed.items() if n.startswith("ultrascale")}
    chosen = list((playbook or found.needed).values())
    if not chosen:
        return []
    mean = {a: [float(per[a].mean()) for per in chosen] for a in chosen[0]}
    others = sorted((float(np.mean(v)), a) for a, v in mean.items() if a != "bayes")
    best = others[0][1]
    told = ", ".join(f"{a} {v:.1f}" for v, a in others)
    note = (
        f"replayed on {len(chosen)} landscapes that others measured, failed runs counted; "
        f"others: {told}"
    )
    claim, metric = "searching with the model as prior", "runs to within 5 % of the best"
    baseline = (best, mean[best])
    return [row(claim, metric, mean["bayes"], "value <= 5", note, "", baseline, "counted")]


# What needs no measurements
# -------------------------------------------------------------------------------------------------


def uneven() -> Priced:
    """A pipeline of llama3-8b, its head as one more layer of as many FLOPs, over four stages."""
    a, p, m = shapes.named("llama3-8b"), 4, 16
    layer = (a.forward_flops(8192, causal=True) - 2 * a.vocab * a.width) / a.layers
    times_L = np.array([1.0] * a.layers + [2 * a.vocab * a.width / layer])
    program, integer = partition.partition_dp(times_L, p, m), partition.partition_ilp(times_L, p, m)
    equal = [a.layers // p * 1.0] * (p - 1) + [a.layers // p + float(times_L[-1])]
    note = f"{a.name}, {p} stages, {m} microbatches, the head costs {times_L[-1]:.2f} layers"
    gap, baseline = abs(program.time / integer.time - 1), partition.pipeline_time(equal, m)
    claim = "uneven pipelines: dynamic program and ILP agree"
    agree = row(claim, "relative difference", gap, "<= 1e-9", note, "", evidence="counted")
    claim, same = "uneven pipelines beat equal ones", ("equal layers a stage", baseline)
    gain = row(claim, "pipeline time", program.time, "ratio <= 1", note, "layers", same)
    return Priced([agree, gain])


def speed() -> Priced:
    """How fast plans are priced and a whole space is ranked, on this machine."""
    model, where = hybrid.shipped(), "h100:64x8"
    best = planner.plan("llama3-70b", where, 1024, 8192)
    points = space.space(best.job.shape, best.cluster.size, 1024, 8192)

    def seconds(run: Any, *args: Any) -> float:
        start = time.perf_counter()
        run(*args)
        return time.perf_counter() - start

    priced = np.median([seconds(ranking.price, model, best.job, points) for _ in range(3)])
    whole = seconds(ranking.rank, model, best.job, best.cluster)
    note = "warm, this machine's CPU"
    rate = space.size_of(points) / float(priced)
    claim, metric = "predictions are cheap", "predictions per second"
    cheap = row(claim, metric, rate, ">= 100000", note, "1/s", evidence="measured")
    claim, note = (
        "a whole 512-GPU space is ranked at once",
        f"{best.valid:,} plans, warm, space and columns included",
    )
    return Priced([cheap, row(claim, "time", whole, "<= 2", note, "s", evidence="measured")])


def counted(count: int) -> Priced:
    """Formulas of this code base against the compiler, on random programs."""
    print(
        f"counting  {count} random programs of this code base, formulas against the compiler",
        flush=True,
    )
    f = random_programs.summary(random_programs.random_configs(0, count))
    programs = f"{f.configs} random programs of this code base on meshes of up to 8 devices"
    unrolled = (
        "one-layer models with remat or ZeRO-3 are not drawn: XLA unrolls them and merges "
        "collectives, so that they send less"
    )
    claim, metric = "bytes per axis equal the compiled program", "(op, axes) entries that differ"
    note = f"{f.entries} entries of {programs}; {unrolled}"
    sent = row(claim, metric, f.mismatches, "== 0", note, "", evidence="counted")
    claim, metric = "FLOPs equal the program's", "largest relative error"
    flops = row(claim, metric, f.flops_error, "<= 0.01", programs, "", evidence="counted")
    claim, metric = "analytic memory against the compiler's plan", "median relative error"
    note = f"train steps of {f.memory_configs} of them; largest {f.memory_error_max:.2f}"
    held = row(claim, metric, f.memory_error, "<= 0.25", note, "", evidence="counted")
    return Priced([sent, flops, held])
