"""Topic 15: a hybrid cost model validated on what it has not seen, and searches that spend real
runs.

The arm is a small model of this code base, trained on the mesh that the planner chose for it.
"""

import functools
from collections.abc import Iterator
from functools import partial
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
    claims.
    """
    c, best = run.config.plan, ranked(run.config)
    path = run.workdir / "planned.py"
    write_atomic(path, ranking_text.fragment(best, trainer(best.job.causal)))
    print(f"\n{best}\n\nconfig    {path}")
    drawn, group = partial(figures.landscape, best), "Planner"
    return run.report(
        measure("landscape", planning.landscape, best.job, best.cluster.size, plot=drawn),
        _published(Path(c.measurements), tuple(c.cases), c.steps, c.searches),
        measure("uneven stages", planning.uneven, rows=rows.uneven, group=group),
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
    kinds = {
        kind: measure(
            f"hold-out {kind}",
            validate.run_case,
            data,
            each([c.name for c in cases if c.kind == kind]),
            steps,
            raw=scores.raw,
        )
        for kind in dict.fromkeys(c.kind for c in cases)
    }
    yield from _validated(data, kinds)
    if "model" in kinds:
        given = landscapes.compare, data, each(kinds["model"]), seeds
        drawn = {"rows": rows.searched, "plot": figures.regret, "raw": landscapes.needed}
        yield measure("searches", *given, **drawn, group="Search")


def _validated(data: Published, kinds: dict[str, Measurement]) -> Iterator[Measurement]:
    """What the cost model says of what its fits had not seen."""
    every = list(kinds.values())
    if "model" in kinds:
        given = validate.five_points, data, each(kinds["model"])
        five, group = measure("five points", *given), "Unseen models"
        yield derive("models", kinds["model"], five, rows=rows.models, group=group)
    group = "All hold-outs"
    yield derive("coverage", every, rows=rows.coverage, plot=figures.predicted, group=group)
    yield derive("ablations", every, rows=rows.ablations, group=group)
    for kind, label in rows.KINDS.items():
        if kind in kinds:
            one = measure(f"one point {kind}", validate.one_point, data, each(kinds[kind]))
            judged = partial(rows.kind, label)
            yield derive(f"kind {kind}", kinds[kind], one, rows=judged, group=group)
    if "release" in kinds:
        copies = measure("copies", validate.copied, data, each(kinds["release"]))
        yield derive("release", kinds["release"], copies, rows=rows.release, group=group)
    if "cluster" in kinds:
        yield derive("cluster", kinds["cluster"], rows=rows.unseen, group=group)
    yield derive("memory", every, rows=rows.memory, plot=figures.memory, group="Memory")


def _counted(count: int) -> Measurement | Row:
    """Formulas of this code base against the compiler, on random programs."""
    if jax.device_count() < DEVICES:
        claim = "bytes, FLOPs and memory equal the compiled program"
        return claims.needs_devices(claim, "entries that differ", "== 0", DEVICES)
    configs = random_programs.random_configs(0, count, DEVICES)
    planned = each([i < PLANNED for i in range(count)])
    return measure(
        "program",
        random_programs.compare,
        each(configs),
        planned,
        rows=rows.programs,
        raw=random_programs.summarise,
        group="Own programs",
    )
