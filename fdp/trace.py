"""The command: whom the routers of a trained run choose on validation batches, as a trace.

    python -m fdp.trace --config=configs/topic2.py --workdir=runs/topic2-cpu

Takes the flags of the run and writes the shards of every arm with experts to WORKDIR/traces/ARM,
which `fdp.data.traces.read` and `python -m fdp.price.moe --trace` take.

Legend: B sequences, L positions, M layers with experts, K choices of a token."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

os.environ.setdefault("NPROC", "64")  # before jax, as in `fdp.train`

import jax
import numpy as np
from jax.sharding import PartitionSpec

from fdp import command, config_file, train
from fdp import config as fdp_config
from fdp.arm import Arm
from fdp.checkpoint import Checkpoints
from fdp.collectives import pmax
from fdp.data.batches import eval_batches
from fdp.data.traces import Writer
from fdp.mesh import BATCH_AXES, make_mesh, use_virtual_devices
from fdp.models import module
from fdp.parallel.context import layouts
from fdp.run import build_arms, study_of
from fdp.step import TrainStep


def chosen(program: TrainStep) -> Callable[..., dict[str, jax.Array]]:
    """(variables, corrupted batch) → the ids of every kind of layer with experts, by the path of
    the layer: int32 [periods, B, L, K] in the order of the sequence layout."""

    def local(variables: Any, noised: Any, _: Any, __: Any) -> dict[str, jax.Array]:
        given = variables | {"params": program.gather(variables["params"])}
        seen = jax.tree_util.tree_leaves_with_path(module.probed(program.model, given, noised)[1])
        by_path = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in seen}
        # Devices of tp know the same ids; under sequence parallelism they are not typed so.
        return {path: pmax(x, "tp") for path, x in by_path.items() if path.endswith("/ids")}

    def run(variables: Any, noised: Any) -> dict[str, jax.Array]:
        specs = PartitionSpec("pp", BATCH_AXES, "cp")
        return program.mapped(local, noised, specs)(variables, noised, None, None)

    return jax.jit(run)


def append(writer: Writer, arm: Arm, found: dict[str, Any], noised: Any, first: int) -> int:
    """One shard of a batch whose sequences count from `first`; the number of tokens."""
    layout = arm.model.layout
    paths = sorted(found, key=lambda path: [int(p) for p in path.split("/") if p.isdigit()])
    ids = np.stack([np.asarray(found[path]) for path in paths], 1)
    ids = ids.reshape(-1, *ids.shape[2:])  # [M, B, L, K]: periods, and the blocks of each in turn
    M, B, L, K = ids.shape
    place = layouts.permutation(layout, L, arm.experiment.degrees["cp"])
    noise = np.asarray(noised["noise"]) if "noise" in noised else np.full(B, np.nan)
    writer.append(
        ids.transpose(1, 2, 0, 3).reshape(B * L, M, K),
        sequence_N=np.repeat(np.arange(first, first + B), L),
        position_N=np.tile(place, B),
        noise_N=np.repeat(noise, L),
    )
    return B * L


def write(arm: Arm, workdir: Path) -> tuple[Path, int]:
    """Trace an arm's newest checkpoint; the folder and the number of tokens. Raises UserError
    without a checkpoint, and for a folder that holds a trace."""
    folder = workdir / "traces" / arm.label
    if any(folder.glob("*")):
        raise fdp_config.UserError(f"{folder} holds a trace: move it away")
    checkpoints = Checkpoints(workdir / "checkpoints" / arm.label, read_only=True)
    found = checkpoints.restore(arm.program.specs.abstract_state(), arm.init)
    checkpoints.close()
    if found is None:
        raise fdp_config.UserError(f"{workdir} has no checkpoint of {arm.label}: train it first")
    program, fit, tokens = arm.program, arm.experiment.fit, 0
    run, writer = chosen(program), Writer(folder, arm.model.shape.experts)
    for i, batch in enumerate(eval_batches(arm.data.val, fit.batch, fit.eval_batches)):
        noised = program.corrupt(arm.place(batch), jax.random.fold_in(jax.random.key(1), i))
        ids = jax.device_get(run(found[1].variables, noised))
        tokens += append(writer, arm, ids, jax.device_get(noised), i * fit.batch)
    return folder, tokens


def main(argv: list[str]) -> None:
    """Every arm that has experts."""
    command.refuse_arguments(argv)
    config = train.CONFIG.value
    train.quiet()
    fdp_config.validate(config)
    workdir = train.workdir()
    use_virtual_devices(math.prod(config.mesh.values()))
    arms = build_arms(config, study_of(config.topic), make_mesh(config.mesh))
    every = [arm for seeds in arms.values() for arm in seeds]
    shapes = {arm.label: getattr(arm.model, "shape", None) for arm in every}
    routed = [arm for arm in every if getattr(shapes[arm.label], "experts", 0)]
    if not routed:
        raise fdp_config.UserError("no arm of this config has experts: there is no routing")
    for arm in routed:
        folder, tokens = write(arm, workdir)
        print(f"wrote     {tokens:,} tokens of {arm.label} to {folder}", flush=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.launch(main, config_file.parse_flags)
