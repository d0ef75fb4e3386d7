"""Topic 3: does a context plan of its own for every layer pay, on what trained models really attend
to?

Legend: B sequences, S positions, W blocks of a sequence, N layers, T checkpoints.
"""

from pathlib import Path
from typing import Any

import jax
import ml_collections

from fdp.arm import Arm
from fdp.config import digest
from fdp.data.batches import eval_batches
from fdp.loop import evaluate
from fdp.report import Report, Row
from fdp.run import Run
from fdp.topics.adaptive_cp import checks, figures, rows, runtime, simulate
from fdp.topics.adaptive_cp.measured import TAU, Measured, measure
from fdp.topics.adaptive_cp.settings import BLOCKS

WINDOWS = 4  # of training with sparse attention


def arms(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """The same causal model on text and on each recall task of the config."""
    found = {"text": config.copy_and_resolve_references()}
    for task in config.profile.tasks:
        found[task] = config.copy_and_resolve_references()
        found[task].data.source = task
    return found


def study(run: Run) -> Report:
    """Measure, plan, judge."""
    found: list[Row] = []
    raw: dict[str, Any] = {}
    folder, drawn = run.workdir / "plots", []
    tiny, enough = run.config.variant == "tiny", jax.device_count() >= checks.DEVICES
    for name, arms_ in run.arms.items():
        measured = [measure(arm, run.workdir) for arm in arms_]
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
            adapted = [adapt(arm, m) for arm, m in zip(arms_, measured, strict=True)]
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


def adapt(arm: Arm, m: Measured) -> runtime.Adapted:
    """Train on with the coverage that was found, for a sixth of the steps in WINDOWS windows."""
    (tokens,) = eval_batches(arm.data.val, arm.c.profile.sequences, 1)
    steps = max(1, arm.c.train.steps // (6 * WINDOWS))
    return runtime.adapt(arm, tokens, BLOCKS, m.coverage, WINDOWS, steps)
