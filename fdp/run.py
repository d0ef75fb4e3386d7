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
from fdp.arm import Arm, load_data
from fdp.checkpoint import CheckpointError, bind_workdir
from fdp.data.batches import default_cache_dir, eval_batches
from fdp.mesh import degrees_equation, is_virtual, make_mesh


@dataclasses.dataclass
class Run:
    """What a study sees: the config, the mesh, the workdir and the trained arms, `arms[name][i]`
    for seed i.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    workdir: Path
    arms: dict[str, list[Arm]]


def study_of(topic: str) -> ModuleType:
    """The topic's study module; raises ValueError naming the closest folder."""
    folders = sorted(p.parent.name for p in (Path(__file__).parent / "topics").glob("*/study.py"))
    if topic not in folders:
        raise fdp_config.UserError(f"unknown topic {topic!r}: {fdp_config.closest(topic, folders)}")
    return importlib.import_module(f"fdp.topics.{topic}.study")


def use_compilation_cache() -> None:
    """Keep compiled programs between runs: a second start compiles nothing."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def banner(arm: Arm) -> str:
    """Devices, mesh, parameters, batch equation and corpus."""
    c, mesh, data = arm.c, arm.mesh, arm.data
    devices = list(mesh.devices.flat)
    kind = (
        "virtual CPU devices (their wall time says nothing about parallel speed)"
        if is_virtual(devices)
        else "devices"
    )
    count = sum(x.size for x in jax.tree.leaves(arm.program.layout.shapes))
    per_device = c.train.batch // (c.mesh.dp * c.mesh.ep * c.train.microbatches)
    return "\n".join(
        (
            f"devices   {len(devices)} {kind}, {devices[0].device_kind}",
            f"mesh      {degrees_equation(c.mesh)}, ZeRO-{c.train.zero}",
            f"model     {count:,} parameters, {c.model.dtype} compute",
            f"batch     {c.train.batch} sequences = dp·ep {c.mesh.dp * c.mesh.ep} × microbatches "
            f"{c.train.microbatches}"
            f" × {per_device}, of {c.data.seq_len} tokens",
            f"corpus    {data.name} (sha256 {data.sha256[:12]}, {data.licence}), "
            f"{len(data.train):,} train and {len(data.val):,} validation windows",
        )
    )


def build_arms(
    config: ml_collections.ConfigDict, study: ModuleType, mesh: Mesh
) -> dict[str, list[Arm]]:
    """Every arm of the study for every seed, built but not trained."""
    arms: dict[str, list[Arm]] = {}
    for name, c in study.arms(config).items():
        fdp_config.validate(c)
        for seed in config.seeds:
            one = c.copy_and_resolve_references()
            one.seeds = (seed,)
            # An arm may ask for a mesh of its own, such as the one that a planner found for it.
            arm = Arm(
                name, one, load_data(one), mesh if one.mesh == config.mesh else make_mesh(one.mesh)
            )
            for windows in (
                arm.data.train,
                arm.data.val,
            ):  # too small a split shows now, not after training
                next(eval_batches(windows, one.train.batch, 1))
            arms.setdefault(name, []).append(arm)
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
                    sharding.report(arm.program.layout.shapes, arm.program.layout.stored, mesh)
                    + "\n"
                )
            loop.fit(arm, workdir)
    except loop.Stopped as stopped:
        print(f"{stopped}; state saved. Resume with:\n  {resume}")
        return
    except CheckpointError as error:
        raise fdp_config.UserError(str(error)) from error
    except FloatingPointError as error:
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
