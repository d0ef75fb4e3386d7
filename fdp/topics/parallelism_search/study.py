"""Topic 15: a hybrid cost model validated on what it has not seen, and searches that spend real
runs.

The arm is a small model of this code base, trained on the mesh that the planner chose for it.
"""

import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from threadpoolctl import threadpool_limits

from fdp.config import UserError, digest
from fdp.experiment import Experiment, standard
from fdp.models.shape import ModelShape
from fdp.price import hardware, hybrid, shapes
from fdp.run import Run
from fdp.study.report import Report, Row
from fdp.topics.parallelism_search import (
    counts,
    figures,
    fit,
    landscapes,
    plan,
    ranking_text,
    stages,
    validate,
)
from fdp.topics.parallelism_search.measurements import Malformed, published

ZERO_SHOT = "unseen models at 64-512 GPUs"


def arms(config: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """The model of the config on the mesh that the planner finds for as many chips as the config's
    mesh has.

    Raises UserError where the config asks for a plan that does not exist, before anything is
    trained."""
    plan.for_config(config, hybrid.shipped())
    c = config.copy_and_resolve_references()
    chips = int(np.prod(list(c.mesh.values())))
    cluster = hardware.cluster(c.hardware.topology or f"h100:1x{chips}")
    sizes = ModelShape.of(c.model), cluster, c.train.batch, c.data.seq_len
    job = plan.job_on(*sizes, causal=c.objective.name == "autoregressive")
    best = plan.rank(hybrid.shipped(), job, cluster).trainable
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
    ranking = plan.for_config(c, hybrid.shipped())
    print(f"\n{ranking_text.describe(ranking)}\n")
    fragment = run.workdir / "planned.py"
    fragment.write_text(ranking_text.fragment(ranking), encoding="utf8")
    print(f"config    {fragment}")
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    plots: list[str | Path] = [figures.landscape(run.workdir, ranking)]
    folder = Path(c.plan.measurements)
    if folder.is_dir():
        # Many small factorisations: threads of the BLAS would only wait for each other.
        with jax.enable_x64(True), threadpool_limits(1, "blas"):
            found, plots_found = _measured(run, _data(folder), raw)
        rows += found
        plots += plots_found
    else:
        rows += _untestable(f"no folder {folder}")
    rows += _stages() + _speed() + _counted(c.plan.counted)
    return Report(c.topic, c.variant, digest(c), rows, plots, raw)


def _data(folder: Path) -> fit.Data:
    """The folder's rows. Raises UserError for a malformed file; rows that cannot be priced are
    counted, three shown.
    """
    try:
        priced, refused = published(folder)
    except Malformed as error:
        raise UserError(f"plan.measurements: {error}") from error
    print(
        f"measured  {len(priced)} rows priced, {len(refused)} refused"
        + ("".join(f"\n  {r}" for r in refused[:3]))
    )
    return fit.gather(priced)


def _untestable(reason: str) -> list[Row]:
    note = f"{reason}: set plan.measurements to a folder of published measurements"
    return [
        Row.untestable(
            f"zero-shot step time, {ZERO_SHOT}", "mean error", "%", "<= 8", "simulated", note
        ),
        Row.untestable(
            "searching with the model as prior", "runs to within 5 %", "", "<= 5", "counted", note
        ),
    ]


def _measured(run: Run, data: fit.Data, raw: dict) -> tuple[list[Row], list[str]]:
    c = run.config
    print("fitting   hold-outs:")
    fitter, outcomes = fit.Fitter(data), []
    for case in validate.CASES:
        if c.plan.cases and case.name not in c.plan.cases:
            continue
        start = time.perf_counter()
        try:
            outcome = validate.run_case(fitter, case, c.plan.steps)
        except validate.NothingToJudge as absent:
            print(f"  {absent}")
            continue
        outcomes.append(outcome)
        s = validate.score(data, outcome.rows, outcome.predicted, outcome.measured)
        raw[case.name] = {
            "errors_pct": s.errors,
            "spearman": s.correlations,
            "regret_pct": s.regrets,
        }
        print(
            f"  {case.kind:8}{case.name:28}{len(outcome.rows):4} rows, mean error "
            f"{np.mean(s.errors):5.1f} % "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    if not outcomes:
        return _untestable(f"{c.plan.measurements} has no row of the hold-outs"), []
    rows = (
        _model_rows(data, outcomes)
        + _ablation_rows(data, outcomes)
        + _kind_rows(data, outcomes)
        + _memory_rows(data, outcomes)
    )
    print(
        f"searching the measured landscapes, {c.plan.searches} seeds of every algorithm", flush=True
    )
    traces = landscapes.compare(data, outcomes, c.plan.searches)
    raw["evaluations to within 5 %"] = {
        n: {a: e.tolist() for a, e in per.items()} for n, per in traces.needed.items()
    }
    rows += _search_rows(traces)
    plots = [figures.predicted(run.workdir, outcomes), figures.memory(run.workdir, data, outcomes)]
    if traces.needed:
        plots.append(figures.regret(run.workdir, traces))
    return rows, plots


def _of(outcomes: list[validate.Outcome], *kinds: str) -> list[validate.Outcome]:
    return [o for o in outcomes if o.case.kind in kinds]


def _scores(data: fit.Data, outcomes: list[validate.Outcome], which: str) -> validate.Scores:
    """Scores of all outcomes together; which: hybrid, analytic or learned."""
    total = validate.Scores([], [], [])
    for o in outcomes:
        predicted = {
            "hybrid": o.predicted,
            "analytic": o.hybrid.analytic[o.rows],
            "learned": o.learned,
        }[which]
        s = validate.score(data, o.rows, predicted, o.measured)
        total.errors.extend(s.errors)
        total.correlations.extend(s.correlations)
        total.regrets.extend(s.regrets)
    return total


def _model_rows(data: fit.Data, outcomes: list[validate.Outcome]) -> list[Row]:
    models = _of(outcomes, "model")
    if not models:
        return []
    s = _scores(data, models, "hybrid")
    n = f"{len(s.errors)} landscapes of {len(models)} models, each model unseen by its fit"
    pairs = [validate.with_anchors(data, o, 5, 5) for o in models]
    five, before = ([e for pair in pairs for e in pair[i]] for i in (0, 1))
    claim, covered = f"zero-shot step time, {ZERO_SHOT}", validate.coverage(outcomes)
    rows = [
        Row.judged(
            claim, "mean error per landscape", s.errors, "%", "value <= 8", "simulated", note=n
        ),
        Row.judged(
            f"ranking, {ZERO_SHOT}",
            "Spearman",
            s.correlations,
            "",
            ">= 0.85",
            "simulated",
            note="landscapes of at least 8 plans",
        ),
        Row.judged(
            f"choosing without a run, {ZERO_SHOT}",
            "top-1 regret",
            s.regrets,
            "%",
            "value <= 2",
            "simulated",
            note="against the best measured plan",
        ),
        Row.judged(
            "90 % intervals cover",
            "share of measured times inside",
            covered,
            "%",
            ">= 85",
            "simulated",
            note="all hold-outs",
        ),
        Row.judged(
            "… and are not too wide",
            "share of measured times inside",
            covered,
            "%",
            "<= 95",
            "simulated",
            note="all hold-outs",
        ),
    ]
    if five:
        note = "five random points, five draws, landscapes of at least ten plans: the large sweeps"
        rows.insert(
            1,
            Row.judged(
                f"{claim}, after five measured points",
                "mean error per landscape",
                five,
                "%",
                "value <= 5",
                "simulated",
                "the same rows before",
                before,
                note=note,
            ),
        )
    return rows


def _ablation_rows(data: fit.Data, outcomes: list[validate.Outcome]) -> list[Row]:
    """Hybrid, physics alone and learning alone on every hold-out, each hold-out weighing the
    same.
    """
    e = {
        w: [float(np.mean(_scores(data, [o], w).errors)) for o in outcomes]
        for w in ("hybrid", "analytic", "learned")
    }
    note = f"{len(outcomes)} hold-outs, one value each"
    return [
        Row.judged(
            "the residual helps: hybrid against physics alone",
            "mean error",
            e["hybrid"],
            "%",
            "ratio <= 1",
            "simulated",
            "analytic only",
            e["analytic"],
            note=note,
        ),
        Row.judged(
            "the physics helps: hybrid against learning alone",
            "mean error",
            e["hybrid"],
            "%",
            "ratio <= 1",
            "simulated",
            "learned only",
            e["learned"],
            note=f"{note}; learning is given the FLOPs",
        ),
    ]


def _kind_rows(data: fit.Data, outcomes: list[validate.Outcome]) -> list[Row]:
    rows = []
    for kind, label in (("moe", "mixtures of experts"), ("long", "sequences of 16k and more")):
        chosen = _of(outcomes, kind)
        if not chosen:
            continue
        zero = [validate.error(o.predicted, o.measured) for o in chosen]
        one = [float(np.mean(validate.one_anchor_each(data, o, 5))) for o in chosen]
        note = ", ".join(f"{o.case.name} {e:.1f}" for o, e in zip(chosen, zero, strict=True))
        rows += [
            Row.judged(
                f"zero-shot step time, {label}",
                "mean error",
                zero,
                "%",
                "value <= 20",
                "simulated",
                note=note,
            ),
            Row.judged(
                f"{label}, one measured point per (model, chip)",
                "mean error",
                one,
                "%",
                "value <= 10",
                "simulated",
                note="five draws of the points",
            ),
        ]
    for kind in ("release", "cluster"):
        for o in _of(outcomes, kind):
            rows.append(
                Row.judged(
                    f"zero-shot step time, unseen {o.case.name}",
                    "mean error",
                    validate.error(o.predicted, o.measured),
                    "%",
                    "value <= 20",
                    "simulated",
                    note=f"{len(o.rows)} rows",
                )
            )
            rows += _copied_row(data, o) if kind == "release" else []
    return rows


def _copied_row(data: fit.Data, o: validate.Outcome) -> list[Row]:
    places, seconds = validate.copied(data, o)
    if not places.size:
        return []
    errors, baseline = (
        100 * np.abs(t / o.measured[places] - 1) for t in (o.predicted[places], seconds)
    )
    return [
        Row.judged(
            f"predicting {o.case.name} beats copying",
            "mean error",
            errors.tolist(),
            "%",
            "ratio <= 1",
            "simulated",
            "same configuration, other release",
            baseline.tolist(),
            note=f"{len(places)} of {len(o.rows)} rows have such a twin",
        )
    ]


def _memory_rows(data: fit.Data, outcomes: list[validate.Outcome]) -> list[Row]:
    alarms = [validate.memory_alarm(o) for o in outcomes if o.case.name.startswith("ultrascale")]
    if not alarms:
        return []
    below, count = validate.memory_coverage(data, outcomes)
    recall, false = zip(*alarms, strict=True)
    rows = [
        Row.judged(
            "failed runs are foreseen on unseen models",
            "recall",
            list(recall),
            "%",
            ">= 90",
            "simulated",
            note="one value per playbook model",
        ),
        Row.judged(
            "… with few false alarms",
            "false alarms among runs that ran",
            list(false),
            "%",
            "<= 10",
            "simulated",
        ),
    ]
    if count:
        rows.append(
            Row.judged(
                "peak memory stays below its 90 % quantile",
                "share of measured peaks",
                below,
                "%",
                ">= 85",
                "simulated",
                note=f"{count} hold-outs with measured memory",
            )
        )
    return rows


def _search_rows(traces: landscapes.Comparison) -> list[Row]:
    playbook = {
        n: per for n, per in traces.needed.items() if n.startswith("ultrascale")
    } or traces.needed
    if not playbook:
        return []
    mean = {
        a: [float(per[a].mean()) for per in playbook.values()]
        for a in next(iter(playbook.values()))
    }
    others = {a: np.mean(v) for a, v in mean.items() if a != "bayes"}
    best = min(others, key=lambda a: others[a])
    note = ", ".join(f"{a} {v:.1f}" for a, v in sorted(others.items(), key=lambda kv: kv[1]))
    return [
        Row.judged(
            "searching with the model as prior",
            "runs to within 5 % of the best",
            mean["bayes"],
            "",
            "value <= 5",
            "counted",
            best,
            mean[best],
            note=f"replayed on {len(playbook)} landscapes that others measured, failed runs "
            "counted; "
            f"others: {note}",
        )
    ]


def _stages() -> list[Row]:
    """A pipeline of llama3-8b, its head as one more layer of as many FLOPs, over four stages."""
    a, p, m = shapes.named("llama3-8b"), 4, 16
    layer = (a.forward_flops(8192, causal=True) - 2 * a.vocab * a.width) / a.layers
    times_L = np.array([1.0] * a.layers + [2 * a.vocab * a.width / layer])
    program, integer = stages.partition_dp(times_L, p, m), stages.partition_ilp(times_L, p, m)
    equal = [a.layers // p * 1.0] * (p - 1) + [a.layers // p + float(times_L[-1])]
    note = f"{a.name}, {p} stages, {m} microbatches, the head costs {times_L[-1]:.2f} layers"
    return [
        Row.judged(
            "uneven pipelines: dynamic program and ILP agree",
            "relative difference",
            abs(program.time / integer.time - 1),
            "",
            "<= 1e-9",
            "counted",
            note=note,
        ),
        Row.judged(
            "uneven pipelines beat equal ones",
            "pipeline time",
            program.time,
            "layers",
            "ratio <= 1",
            "simulated",
            "equal layers a stage",
            stages.pipeline_time(equal, m),
            note=note,
        ),
    ]


def _speed() -> list[Row]:
    target = hardware.cluster("h100:64x8")
    job = plan.job_on(shapes.named("llama3-70b"), target, 1024, 8192)
    per_second = plan.throughput(hybrid.shipped(), job, target.size)
    start = time.perf_counter()
    points = plan.rank(hybrid.shipped(), job, target).valid
    seconds = time.perf_counter() - start
    return [
        Row.judged(
            "predictions are cheap",
            "predictions per second",
            per_second,
            "1/s",
            ">= 100000",
            "measured",
            note="warm, this machine's CPU",
        ),
        Row.judged(
            "a whole 512-GPU space is ranked at once",
            "time",
            seconds,
            "s",
            "<= 2",
            "measured",
            note=f"{points:,} plans, warm, space and columns included",
        ),
    ]


def _counted(count: int) -> list[Row]:
    print(
        f"counting  {count} random programs of this code base, formulas against the compiler",
        flush=True,
    )
    found = counts.summary(counts.random_configs(0, count))
    programs = f"{found.configs} random programs of this code base on meshes of up to 8 devices"
    memory = f"train steps of {found.memory_configs} of them; largest {found.memory_error_max:.2f}"
    return [
        Row.judged(
            "bytes per axis equal the compiled program",
            "(op, axes) entries that differ",
            found.mismatches,
            "",
            "== 0",
            "counted",
            note=f"{found.entries} entries of {programs}; one-layer models with remat or ZeRO-3 "
            "are not drawn: "
            "XLA unrolls them and merges collectives, so that they send less",
        ),
        Row.judged(
            "FLOPs equal the program's",
            "largest relative error",
            found.flops_error,
            "",
            "<= 0.01",
            "counted",
            note=programs,
        ),
        Row.judged(
            "analytic memory against the compiler's plan",
            "median relative error",
            found.memory_error,
            "",
            "<= 0.25",
            "counted",
            note=memory,
        ),
    ]
