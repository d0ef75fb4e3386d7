"""What a finished run has trained, on one device: for commands that use it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from fdp import config as fdp_config
from fdp.arm import Arm
from fdp.checkpoint import Checkpoints
from fdp.keys import UserError, closest
from fdp.mesh import AXES, make_mesh
from fdp.run import seeds_of, study_of


def config_of(workdir: Path) -> ml_collections.ConfigDict:
    """The config that a run was started with, on one device. Raises UserError where there is none,
    or where it is of another version."""
    path = workdir / "config.json"
    try:
        flat = json.loads(path.read_text(encoding="utf8"))["config"]
        c = fdp_config.base(**fdp_config.topic_sections(flat["topic"]))
        with c.unlocked():
            c.update_from_flattened_dict(
                {k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()}
            )
            c.mesh.update(dict.fromkeys(AXES, 1))
            c.checkpoint.allow_config_change = False
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}: name the workdir of a run, such as runs/topic8-cpu"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no config of this version of fdp: {error}") from error
    fdp_config.validate(c)
    return c


class TrainedArm(NamedTuple):
    """An arm, and what it has learnt: {"params", "state"} after `step` steps."""

    arm: Arm
    variables: Any
    step: int


def restored(
    c: ml_collections.ConfigDict, workdir: Path, label: str | None, prefer: tuple[str, ...] = ()
) -> TrainedArm:
    """The newest checkpoint of an arm and seed, such as gdn-s0. None: of the first whose name
    begins with one of `prefer`, or else the first. Raises UserError for an arm that is not there or
    has no checkpoint."""
    study = study_of(c.topic)
    experiments, seeds = study.arms(c), seeds_of(study, c)
    labels = [f"{name}-s{seed}" for name in experiments for seed in seeds.get(name, c.seeds)]
    label = label or next((x for x in labels if x.startswith(prefer)), labels[0])
    if label not in labels:
        raise UserError(f"--arm={label} is unknown: {closest(label, labels)}")
    name, _, seed = label.rpartition("-s")
    e = experiments[name]
    alone = replace(e, degrees=dict.fromkeys(AXES, 1), zero=0)
    arm = Arm.of(name, alone, make_mesh(alone.degrees, jax.devices()[:1])).with_seed(int(seed))
    folder = workdir / "checkpoints" / label
    if not folder.is_dir():
        raise UserError(f"{folder} is not there: train the run first")
    checkpoints = Checkpoints(folder, read_only=True)
    found = checkpoints.restore(arm.program.specs.abstract_state(), arm.init)
    checkpoints.close()
    if found is None:
        raise UserError(f"{folder} has no checkpoint: train the run first")
    return TrainedArm(arm, found[1].variables, found[0])
