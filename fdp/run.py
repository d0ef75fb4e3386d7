"""One run: banner, every arm of every seed, the topic's study, the report."""

import contextlib
import dataclasses
import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType

import jax
import ml_collections
from jax.sharding import Mesh

from fdp import capacity, compilation_cache, loop, process, sharding, signals
from fdp import command as command_line
from fdp import config as fdp_config
from fdp.arm import Arm
from fdp.data.batches import Data, default_cache_dir, eval_batches
from fdp.files import sweep, write_atomic
from fdp.hooks import HookError
from fdp.mesh import degrees_equation, is_virtual, make_mesh
from fdp.metrics import ImpossibleSpeed
from fdp.parallel.pipeline import library
from fdp.parallel.pipeline.executor import scheduled
from fdp.study.cache import Cache
from fdp.study.measure import Part, clock, perform
from fdp.study.report import VERDICTS, BadReport, Report, devices, versions
from fdp.workdir import Record, SegmentLog, check, locked, record_of


@dataclasses.dataclass
class Run:
    """What a study is given: the config, the mesh, the workdir and the trained arms,
    `arms[name][i]` for seed i."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    workdir: Path
    arms: dict[str, list[Arm]]

    def report(self, *parts: Part, group: str = "") -> Report:
        """Measure what was not measured before, and report: `fdp.study` says how. `group`: of the
        rows that have none."""
        c, digest = self.config, fdp_config.digest(self.config)
        shape = "·".join(f"{axis}{n}" for axis, n in self.mesh.shape.items())
        every = [arm for seeds in self.arms.values() for arm in seeds]
        facts = {name: json.dumps(fact) for name, fact in record_of(c, every, {}).facts.items()}
        context = {"config": digest, "mesh": shape, "devices": devices(), **versions(), **facts}
        found = perform(parts, Cache(self.workdir, context), self.workdir, group)
        return Report(c.topic, c.variant, digest, found.rows, found.plots, found.raw)


def study_of(topic: str) -> ModuleType:
    """The topic's study module; raises UserError for a topic without one, naming the closest."""
    fdp_config.topic_settings(topic)
    name = f"fdp.topics.{topic}.study" if topic else ""
    if not name or importlib.util.find_spec(name) is None:
        raise fdp_config.UserError(
            f"topic={topic!r} has no study to run: set c.topic to the name of a folder of "
            "fdp/topics that has a study.py"
        )
    return importlib.import_module(name)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, so that a second start compiles nothing."""
    compilation_cache.use(default_cache_dir() / "xla")


def banner(arm: Arm) -> str:
    """Devices, mesh, parameters, batch equation and corpus."""
    e, mesh, data = arm.experiment, arm.mesh, arm.data
    devices = list(mesh.devices.flat)
    virtual = "virtual CPU devices (their wall time says nothing about parallel speed)"
    kind = virtual if is_virtual(devices) else "devices"
    count = sum(x.size for x in jax.tree.leaves(arm.program.specs.shapes))
    ways, micro = e.degrees["dp"] * e.degrees["ep"], e.grads.microbatches
    tokens = f", of {data.seq_len} tokens" if data.seq_len else ""
    unit, many = ("sequences", "windows") if data.seq_len else ("examples", "examples")
    shape = getattr(e.model, "shape", None)
    dtype = f", {shape.dtype} compute" if shape is not None else ""
    return "\n".join(
        (
            f"devices   {len(devices)} {kind}, {devices[0].device_kind}",
            f"mesh      {degrees_equation(e.degrees)}, ZeRO-{e.zero}",
            f"model     {count:,} parameters{dtype}",
            f"batch     {e.fit.batch} {unit} = dp·ep {ways} × microbatches {micro} × "
            f"{e.fit.batch // (ways * micro)}{tokens}",
            f"corpus    {data.name} (sha256 {data.sha256[:12]}, {data.licence}), "
            f"{len(data.train):,} train and {len(data.val):,} validation {many}",
            *(f"          {note}" for note in data.notes),
        )
    )


def seeds_of(study: ModuleType, config: ml_collections.ConfigDict) -> dict[str, tuple[int, ...]]:
    """{arm: seeds} of the arms that take others than `config.seeds`."""
    return study.seeds(config) if hasattr(study, "seeds") else {}


def build_arms(
    config: ml_collections.ConfigDict, study: ModuleType, mesh: Mesh
) -> dict[str, list[Arm]]:
    """Every arm of the study for every seed, built but not trained. A study may have
    `seeds(config)`, {arm: seeds} of the arms that take others than `config.seeds`. Raises
    ValueError for an arm that learns from one that is not trained before it."""
    arms: dict[str, list[Arm]] = {}
    seeds = seeds_of(study, config)
    for name, experiment in study.arms(config).items():
        # An arm may ask for a mesh of its own, such as the one that a planner found for it.
        same = dict(experiment.degrees) == dict(config.mesh)
        arm = Arm.of(name, experiment, mesh if same else make_mesh(experiment.degrees))
        if arm.mesh.size < process.count():
            raise ValueError(
                f"{degrees_equation(experiment.degrees)} devices for {process.count()} processes, "
                "of which each needs a part of the model or of the batch: raise mesh.dp, or start "
                "fewer processes"
            )
        for split in (arm.data.train, arm.data.val):
            # Too small a split shows now, not after training.
            next(eval_batches(split, experiment.fit.batch, 1))
        own = seeds.get(name, config.seeds)
        if arm.data.awaits and not hasattr(study, "examples"):
            raise ValueError(
                f"arm {name} learns from {', '.join(arm.data.awaits)}, and the topic makes no "
                "examples of it: define examples(arm, teachers) -> Data beside its study"
            )
        for teacher in arm.data.awaits:
            before = {one.seed for one in arms.get(teacher, [])}
            if missing := [seed for seed in own if seed not in before]:
                raise ValueError(
                    f"arm {name} learns from {teacher}, of which seed {missing[0]} is not trained "
                    f"before it: arms() of the topic must name {teacher} first, with the same seeds"
                )
        arms[name] = [arm.with_seed(seed) for seed in own]
    return arms


def run(config: ml_collections.ConfigDict, workdir: Path | str, command: str = "") -> int:
    """Train, study, report. Returns the exit status: 0, or after a signal 130 (Ctrl-C) or 143
    (SIGTERM), with what was finished on disk and on the screen what resumes: `command`, the
    arguments of fdp.train, or the same call. Raises UserError for what the user can fix.

    Works in any thread and in a notebook; only the main thread sees signals."""
    fdp_config.validate(config)
    workdir = command_line.folder(workdir, "workdir") if isinstance(workdir, str) else workdir
    again = f"Resume with:\n  python -m fdp.train {command}" if command else "Call again to resume."
    try:
        with signals.interruptible():
            _run(config, workdir)
        return 0
    except loop.Stopped as stopped:
        print(f"{stopped}; state saved. {again}")
        return signals.exit_status(stopped.number)
    except signals.Interrupted as stopped:
        text = f"\nstopped; what was finished is kept in {workdir}. {again}"
        if process.count() > 1:  # the others may be waiting for this one
            process.leave(signals.exit_status(stopped.number), text)
        print(text)
        return signals.exit_status(stopped.number)


def _run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    use_compilation_cache()
    study = study_of(config.topic)
    try:
        mesh = make_mesh(config.mesh)
        capacity.check(config, mesh)
        arms = build_arms(config, study, mesh)
        every = [arm for seeds in arms.values() for arm in seeds]
        record = record_of(config, every, versions())
    except OSError as error:
        raise fdp_config.UserError(command_line.os_text(error)) from error
    except ValueError as error:
        raise fdp_config.UserError(str(error)) from error
    run = Run(config, mesh, workdir, arms)
    with contextlib.ExitStack() as held:
        # After everything that can refuse a config: a mistake must leave nothing behind.
        for line in process.decided(lambda: _enter(held, run, record)):
            print(f"changed   {line}")
        _run_alone(run, study, SegmentLog(workdir, record))


def _enter(held: contextlib.ExitStack, run: Run, record: Record) -> list[str]:
    """Lock the workdir and check that it belongs to this record; what has changed and may."""
    held.enter_context(locked(run.workdir))
    changed = check(run.workdir, record, run.config.checkpoint.allow_config_change)
    sweep(run.workdir)
    return changed


def _run_alone(run: Run, study: ModuleType, ledger: SegmentLog) -> None:
    """What follows once no other run can write in the workdir."""
    workdir, every = run.workdir, [arm for seeds in run.arms.values() for arm in seeds]
    _check_imported(workdir, every)
    try:
        _train(run, study, ledger)
    except (FloatingPointError, HookError, ImpossibleSpeed) as error:
        raise fdp_config.UserError(
            f"{error}\nThe last checkpoint is intact in {workdir}/checkpoints"
        ) from error
    try:
        report = study.study(run)
        report.question = getattr(study, "QUESTION", "")
        report.training = ledger.told(arm.label for arm in every)
        report.distrust({arm.label: arm.skipped for arm in every})
        process.decided(lambda: report.write(workdir))
    except BadReport as error:
        raise fdp_config.UserError(
            f"{error}\nWhat was measured is kept in {workdir}/measured"
        ) from error
    _print_end(report, workdir)


def _check_imported(workdir: Path, arms: list[Arm]) -> None:
    """Raises UserError for an imported model (a checkpoint of step 0) that no arm starts from:
    training would start from random weights without a word."""
    labels = [arm.label for arm in arms]
    unused = [p.parent.name for p in (workdir / "checkpoints").glob("*/0")]
    if unused := sorted(set(unused) - set(labels)):
        raise fdp_config.UserError(
            f"{workdir} holds the imported {', '.join(unused)}, and this run trains "
            f"{', '.join(labels)}: import again with --arm={arms[0].name}, or use another workdir"
        )


def _train(run: Run, study: ModuleType, ledger: SegmentLog) -> None:
    """Every arm in turn, with the time that is left for all of them."""
    workdir, arms = run.workdir, [arm for seeds in run.arms.values() for arm in seeds]
    saved = [_newest(workdir, arm) for arm in arms]
    todo = [arm.experiment.fit.steps - step for arm, step in zip(arms, saved, strict=True)]
    started, done = time.perf_counter(), 0
    for i, arm in enumerate(arms):
        if i == 0:
            print(banner(arm))
            grads = arm.experiment.grads
            if isinstance(grads, scheduled) and (thin := library.warning(grads.order)):
                print(f"warning   {thin}")
            specs, path = arm.program.specs, workdir / "sharding.txt"
            if process.main():
                text = sharding.report(specs.shapes, specs.stored, arm.mesh)
                write_atomic(path, f"{text}\n")
        left = (time.perf_counter() - started) / done * sum(todo[i:]) if done else 0.0
        eta = f"; about {clock(left)} of training left" if done and sum(todo[i:]) else ""
        steps = f"{todo[i]} of {arm.experiment.fit.steps} steps to go"
        print(f"arm       {i + 1} of {len(arms)}: {arm.label}, {steps}{eta}", flush=True)
        with contextlib.ExitStack() as lent:
            if arm.data.awaits and todo[i]:
                lent.enter_context(arm.reading(_examples(arm, run, study)))
            loop.fit(arm, workdir, ledger=ledger)
        done += todo[i]


def _examples(arm: Arm, run: Run, study: ModuleType) -> Data:
    """What the study makes of the trained arms of the same seed that `arm` learns from."""
    started, names = time.perf_counter(), arm.data.awaits
    teachers = {n: next(one for one in run.arms[n] if one.seed == arm.seed) for n in names}
    data: Data = study.examples(arm, teachers)
    seconds = clock(time.perf_counter() - started)
    labels = ", ".join(teacher.label for teacher in teachers.values())
    print(f"data      {len(data.train):,} examples of {labels} in {seconds}", flush=True)
    return dataclasses.replace(data, awaits=())


def _newest(workdir: Path, arm: Arm) -> int:
    """Step of the arm's newest checkpoint, 0 without one."""
    folder = workdir / "checkpoints" / arm.label
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    return min(max(steps, default=0), arm.experiment.fit.steps)


def _print_end(report: Report, workdir: Path) -> None:
    """What was found, in short, and where the rest is."""
    counts = [(sum(row.verdict == v for row in report.rows), v) for v in VERDICTS]
    said = ", ".join(f"{n} {verdict}" for n, verdict in counts if n)
    print(f"\n{report.terminal()}\n")
    print(f"report    {workdir / 'report.md'} ({len(report.rows)} rows: {said})")
    print(f"plots     {', '.join(str(workdir / p) for p in report.plots)}")
