"""Topic 3: does a context plan of its own for every layer pay, on what trained models really attend
to?

Legend: B sequences, S positions, W blocks of a sequence, N layers, T checkpoints.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_collections

from fdp.arm import Arm
from fdp.config import digest
from fdp.experiment import Experiment, standard
from fdp.hooks import Hook
from fdp.loop import evaluate
from fdp.models.layers import SwiGLU
from fdp.models.nsa import Budget, NativeSparseAttention
from fdp.models.stack import Block, layer
from fdp.parallel.layouts import CONTIGUOUS
from fdp.report import Report, Row
from fdp.run import Run
from fdp.topics.adaptive_cp import checks, figures, rows, runtime, simulate
from fdp.topics.adaptive_cp.measured import Measured, measure
from fdp.topics.adaptive_cp.profile import TAU, Densities
from fdp.topics.adaptive_cp.settings import BLOCKS

WINDOWS = 4  # of training with sparse attention


def arms(config: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """The same causal model on text and on each recall task of the config, and with native sparse
    attention on text.
    """
    text, p = standard(config), config.profile
    hooks = (Hook("densities", p.every, Densities(p.sequences)),)
    found = {"text": replace(text, hooks=hooks)}
    for task in p.tasks:
        found[task] = replace(standard(_recall(config, task)), hooks=hooks)
    if p.native_sparse:
        found["nsa"] = native_sparse(text)
    return found


def _recall(config: ml_collections.ConfigDict, task: str) -> ml_collections.ConfigDict:
    """The config of a recall task. A convolution lets a key carry the token before it; attention
    alone does not solve the tasks in so few steps."""
    c = config.copy_and_resolve_references()
    c.data.source, c.model.conv = task, 4
    return c


def native_sparse(dense: Experiment) -> Experiment:
    """The same with native sparse attention in every layer, on a budget that grows with the
    length."""
    mixing = layer(NativeSparseAttention, budget=budget(dense.input_length))
    block = layer(Block, mixing=mixing, ffn=layer(SwiGLU))
    model = dense.model.clone(pattern=(block,), layout=CONTIGUOUS)
    return replace(dense, model=model)


def budget(length: int) -> Budget:
    """Compression blocks of 1/16 of the sequence, at every half; four of 32 blocks read in full; a
    window of 1/16."""
    part = length // BLOCKS
    return Budget(2 * part, part, part, selected=4, initial=1, local=1, window=2 * part)


def study(run: Run) -> Report:
    """Measure, plan, judge."""
    found: list[Row] = []
    raw: dict[str, Any] = {}
    folder, drawn = run.workdir / "plots", []
    tiny, enough = run.config.variant == "tiny", jax.device_count() >= checks.DEVICES
    dense = {name: arms_ for name, arms_ in run.arms.items() if name != "nsa"}
    for name, arms_ in dense.items():
        measured = [measure(arm, run.workdir, run.config.profile.sequences) for arm in arms_]
        planned, table, plan = rows.planned(name, measured)
        found += [
            *rows.density(name, measured),
            *rows.masks(name, measured, run.config.data.seq_len),
            *planned,
        ]
        raw[name] = [
            m.plain() | {"val_loss": evaluate(a, a.trained)}
            for m, a in zip(measured, arms_, strict=True)
        ]
        raw[f"{name} plans"] = [vars(row) for row in table]
        first, title = measured[0], f"{name}: blocks for {TAU:.0%} of the mass"
        units, raw[f"{name} needs"] = rows.needs(rows.problem_of(first.masks_NxWxW, "bytes"))
        drawn += [
            figures.density_map(
                folder / f"density_{name}.png", first.density_NxT, first.steps, title
            ),
            figures.need_map(
                folder / f"needs_{name}.png",
                units,
                f"{name}: what devices need, zig-zag over {rows.CP}",
            ),
            figures.bytes_chart(
                folder / f"bytes_{name}.png", table, f"{name}: wire bytes, cp = {rows.CP}"
            ),
            figures.plan_picture(folder / f"plan_{name}.png", plan, f"{name}: plan by layer"),
        ]
        if enough and (name == "text" or not tiny):
            sequences = run.config.profile.sequences
            adapted = [adapt(arm, m, sequences) for arm, m in zip(arms_, measured, strict=True)]
            raw[f"{name} windows"] = [[window.plain() for window in a.windows] for a in adapted]
            found += rows.adapted(name, adapted)
        if enough and name == "text":
            exact = rows.exactness(arms_[0], first.masks_NxWxW, tiny)
    if enough:
        found += exact
    else:
        found.append(
            Row.untestable(
                "every plan equals one device",
                "errors",
                "",
                "<= 1e-4",
                "measured",
                "needs 8 devices",
            )
        )
    region = simulate.region(draws=100, lengths=simulate.LENGTHS[:1] if tiny else simulate.LENGTHS)
    drawn.append(
        figures.region_map(folder / "region.png", region, "Step time, adaptive / best uniform")
    )
    found.append(rows.region(region))
    plots: list[str | Path] = [path.relative_to(run.workdir) for path in drawn]
    return Report(run.config.topic, run.config.variant, digest(run.config), found, plots, raw)


def adapt(arm: Arm, m: Measured, sequences: int) -> runtime.Adapted:
    """Train on with the coverage that was found, for a sixth of the steps in WINDOWS windows."""
    probe_BxS = arm.data.val.take(range(sequences))["tokens"]
    steps = max(1, arm.experiment.fit.steps // (6 * WINDOWS))
    return runtime.adapt(arm, probe_BxS, BLOCKS, m.coverage, WINDOWS, steps)
