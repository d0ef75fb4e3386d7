"""One run: banner, every arm of every seed, the topic's study, the report."""

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType

import jax
import ml_collections
from jax.sharding import Mesh

from fdp import config as fdp_config
from fdp import loop, sharding
from fdp.arm import Arm
from fdp.checkpoint import CheckpointError, bind_workdir
from fdp.data.batches import default_cache_dir, eval_batches
from fdp.hooks import HookError
from fdp.mesh import degrees_equation, is_virtual, make_mesh
from fdp.metrics import ImpossibleSpeed


@dataclasses.dataclass
class Run:
    """What a study is given: the config, the mesh, the workdir and the trained arms,
    `arms[name][i]` for seed i."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    workdir: Path
    arms: dict[str, list[Arm]]


def study_of(topic: str) -> ModuleType:
    """The topic's study module; raises UserError naming the closest folder."""
    fdp_config.topic_settings(topic)
    return importlib.import_module(f"fdp.topics.{topic}.study")


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, so that a second start compiles nothing."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


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
        )
    )


def build_arms(
    config: ml_collections.ConfigDict, study: ModuleType, mesh: Mesh
) -> dict[str, list[Arm]]:
    """Every arm of the study for every seed, built but not trained."""
    arms: dict[str, list[Arm]] = {}
    for name, experiment in study.arms(config).items():
        # An arm may ask for a mesh of its own, such as the one that a planner found for it.
        same = dict(experiment.degrees) == dict(config.mesh)
        arm = Arm.of(name, experiment, mesh if same else make_mesh(experiment.degrees))
        for split in (arm.data.train, arm.data.val):
            # Too small a split shows now, not after training.
            next(eval_batches(split, experiment.fit.batch, 1))
        arms[name] = [arm.with_seed(seed) for seed in config.seeds]
    return arms


def run(config: ml_collections.ConfigDict, workdir: Path, command: str) -> None:
    """Train, study, report. Raises UserError for what the user can fix; exits 0 after a signal,
    state saved.
    """
    use_compilation_cache()
    study = study_of(config.topic)
    digest = fdp_config.digest(config)
    try:
        mesh = make_mesh(config.mesh)
        arms = build_arms(config, study, mesh)
        # After everything that can refuse a config: a mistake must not tie the workdir to itself.
        bind_workdir(
            workdir,
            fdp_config.flatten(config),
            digest,
            config.checkpoint.allow_config_change,
            fdp_config.FREE_KEYS,
        )
    except (ValueError, OSError, CheckpointError) as error:
        raise fdp_config.UserError(str(error)) from error
    resume = f"python -m fdp.train {command}"
    try:
        for i, arm in enumerate(a for seeds in arms.values() for a in seeds):
            if i == 0:
                print(banner(arm))
                (workdir / "sharding.txt").write_text(
                    sharding.report(arm.program.specs.shapes, arm.program.specs.stored, mesh) + "\n"
                )
            loop.fit(arm, workdir)
    except loop.Stopped as stopped:
        print(f"{stopped}; state saved. Resume with:\n  {resume}")
        return
    except CheckpointError as error:
        raise fdp_config.UserError(str(error)) from error
    except (FloatingPointError, HookError, ImpossibleSpeed) as error:
        raise fdp_config.UserError(
            f"{error}\nThe last checkpoint is intact in {workdir}/checkpoints"
        ) from error
    report = study.study(Run(config, mesh, workdir, arms))
    report.write(workdir)
    print(report.terminal())
    print(
        f"\nreport    {workdir / 'report.md'}\nplots     "
        f"{', '.join(str(workdir / p) for p in report.plots)}"
    )
