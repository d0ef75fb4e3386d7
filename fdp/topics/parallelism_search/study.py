"""Topic 15: a hybrid cost model validated on what it has not seen, and searches that spend real
runs.

The arm is a small model of this code base, trained on the mesh that the planner chose for it."""

import functools
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import jax
import ml_collections
import numpy as np

from fdp.config import UserError
from fdp.count import random_programs
from fdp.experiment import Experiment, standard
from fdp.files import write_atomic
from fdp.models.shape import ModelShape
from fdp.price import planner, ranking_text
from fdp.price.ranking import Ranking
from fdp.run import Run
from fdp.study import claims
from fdp.study.measure import Measurement, derive, each, measure
from fdp.study.report import Report, Row
from fdp.topics.parallelism_search import figures, landscapes, planning, rows, scores, validate
from fdp.topics.parallelism_search.validate import Published

QUESTION = (
    "Which parallel plan for a model on a cluster: does a cost model know it for what it has not "
    "seen, and how few real runs find it?"
)
DEVICES = 8  # of the largest random program
STAGES = 4, 16  # of a pipeline, and its microbatches
PLANNED = 10  # random programs whose train step is compiled too, for its memory
_plan = functools.cache(planner.plan)


def ranked(config: ml_collections.ConfigDict) -> Ranking:
    """Plans for `config.plan`, of a published model or of the config's own. Raises UserError where
    there is none."""
    c = config.plan
    causal = bool(c.model) or config.objective.name == "autoregressive"
    model = c.model or ModelShape.of(config.model)
    try:
        return _plan(model, c.cluster, c.batch, c.seq_len, c.precision, causal)
    except UserError as error:
        raise UserError(f"config.plan: {error}") from error


def trainer(causal: bool) -> str:
    """The topic whose study judges the config that the planner writes."""
    return "adaptive_cp" if causal else "parallel_dlm"


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
    claims."""
    c, best = run.config.plan, ranked(run.config)
    path = run.workdir / "planned.py"
    write_atomic(path, ranking_text.fragment(best, trainer(best.job.causal)))
    print(f"\n{best}\n\nconfig    {path}")
    drawn, stages = partial(figures.landscape, best), partial(rows.uneven, *STAGES)
    group = "Planner"
    return run.report(
        measure("landscape", planning.landscape, best.job, best.cluster.size, plot=drawn),
        _published(Path(c.measurements), tuple(c.cases), c.steps, c.searches),
        measure("uneven stages", planning.uneven, *STAGES, rows=stages, group=group),
        measure("speed", planning.speed, rows=rows.speed, group=group),
        _counted(c.counted),
    )


def _published(
    folder: Path, chosen: tuple[str, ...], steps: int, seeds: int
) -> Iterator[Measurement | Row]:
    """Hold-outs and searches; where there are no measurements, the claims are not testable."""
    if not folder.is_dir():
        yield from rows.untestable(f"no folder {folder}")
        return
    data = Published.of(folder)
    cases = [c for c in validate.present(data) if not chosen or c.name in chosen]
    if not cases:
        yield from rows.untestable(f"{folder} has no row of the hold-outs")
        return
    kinds: dict[str, list[Measurement]] = {}
    for case in cases:
        given = f"hold-out {case.name}", validate.run_case, data, case.name, steps
        kinds.setdefault(case.kind, []).append(measure(*given, raw=scores.score))
    yield from _validated(data, kinds)
    if "model" in kinds:
        replayed = landscapes.compare, data, each(kinds["model"]), seeds
        drawn = {"rows": rows.searched, "plot": figures.regret, "raw": landscapes.needed}
        yield measure("searches", *replayed, **drawn, group="Search")


def _validated(data: Published, kinds: dict[str, list[Measurement]]) -> Iterator[Measurement]:
    """What the cost model says of what its fits had not seen."""
    every, group = list(chain.from_iterable(kinds.values())), "Unseen models"
    if models := kinds.get("model"):
        five = measure("five points", validate.five_points, data, each(models))
        yield derive("models", models, five, rows=rows.models, group=group)
    group = "All hold-outs"
    yield derive("predicted", every, rows=rows.every, plot=figures.predicted, group=group)
    for kind, label in rows.KINDS.items():
        if some := kinds.get(kind):
            one = measure(f"one point {kind}", validate.one_point, data, each(some))
            yield derive(kind, some, one, rows=partial(rows.kind, label), group=group)
    if releases := kinds.get("release"):
        copies = measure("copies", validate.copied, data, each(releases))
        yield derive("release", releases, copies, rows=rows.release, group=group)
    yield derive("cluster", kinds.get("cluster", []), rows=rows.unseen, group=group)
    yield derive("memory", every, rows=rows.memory, plot=figures.memory, group="Memory")


def _counted(count: int) -> Measurement | Row:
    """Formulas of this code base against the compiler, on random programs."""
    if jax.device_count() < DEVICES:
        claim = "bytes, FLOPs and memory equal the compiled program"
        return claims.needs_devices(claim, "entries that differ", "== 0", DEVICES)
    configs = random_programs.random_configs(0, count, DEVICES)
    given = each(configs), each([i < PLANNED for i in range(count)])
    judged = {"rows": rows.programs, "raw": random_programs.summarise, "group": "Own programs"}
    return measure("program", _program, *given, **judged)  # type: ignore[arg-type]


def _program(config: ml_collections.ConfigDict, memory: bool) -> random_programs.ProgramCheck:
    """Of one random config; `memory`: of its whole train step, too."""
    return random_programs.compare(random_programs.experiment(config), memory)
