"""Topic 3: does a context plan of its own for every layer pay, on what trained models really attend
to?

Legend: B sequences, S positions, W blocks of a sequence, N layers, T steps of training.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import ml_collections

from fdp.config import digest
from fdp.experiment import Experiment, standard
from fdp.hooks import Hook
from fdp.loop import evaluate
from fdp.metrics import read_metrics
from fdp.models.layers import SwiGLU
from fdp.models.nsa import Budget, NativeSparseAttention
from fdp.models.stack import Block, layer
from fdp.parallel.context.layouts import CONTIGUOUS
from fdp.run import Run
from fdp.study.report import Report, Row
from fdp.topics.adaptive_cp import checks, figures, rows, runtime
from fdp.topics.adaptive_cp import predict as simulate
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
        found["nsa"] = nsa = native_sparse(text)
        fit = replace(text.fit, eval_every=nsa.fit.steps)
        found["text"] = replace(found["text"], fit=fit)
    return found


def _recall(config: ml_collections.ConfigDict, task: str) -> ml_collections.ConfigDict:
    """The config of a recall task, one that is solved: a convolution lets a key carry the token
    before it, and only answers are learnt from, so a step needs many."""
    c = config.copy_and_resolve_references()
    c.data.update(source=task, seq_len=128)
    c.model.update(conv=4, layers=2)
    c.train.update(batch=32, lr=1e-2)
    return c


def native_sparse(dense: Experiment) -> Experiment:
    """The first third of the same training with native sparse attention in every layer, on a budget
    that grows with the length."""
    mixing = layer(NativeSparseAttention, budget=budget(dense.input_length))
    block = layer(Block, mixing=mixing, ffn=layer(SwiGLU))
    model = dense.model.clone(pattern=(block,), layout=CONTIGUOUS)
    return replace(dense, model=model, fit=replace(dense.fit, steps=-(-dense.fit.steps // 3)))


def budget(length: int) -> Budget:
    """Compression blocks of 1/16 of the sequence, at every half; four of 32 blocks read in full; a
    window of 1/16."""
    part = length // BLOCKS
    return Budget(2 * part, part, part, selected=4, initial=1, local=1, window=2 * part)


@dataclass
class ArmResult:
    """What measurements add up to: rows, raw numbers, pictures."""

    rows: list[Row] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    plots: list[Path] = field(default_factory=list)


def study(run: Run) -> Report:
    """Measure, plan, judge."""
    found, tiny = ArmResult(), run.config.variant == "tiny"
    enough = jax.device_count() >= checks.DEVICES
    exact = [_needs_devices()]
    for name in ("text", *run.config.profile.tasks):
        measured = _masks_and_plans(run, found, name)
        if enough and (name == "text" or not tiny):
            _training_on(run, found, name, measured)
        if enough and name == "text":
            exact = rows.exactness(run.arms[name][0], measured[0].masks_NxWxW, tiny)
    if "nsa" in run.arms:
        _native_sparse(run, found)
    found.rows += exact
    _region(run, found, tiny)
    c, plots = run.config, [path.relative_to(run.workdir) for path in found.plots]
    return Report(c.topic, c.variant, digest(c), found.rows, [*plots], found.raw)


def _masks_and_plans(run: Run, found: ArmResult, name: str) -> list[Measured]:
    """Densities, masks and what they cost, and the plans for them, of one arm."""
    arms_, sequences = run.arms[name], run.config.profile.sequences
    measured = [measure(arm, run.workdir, sequences) for arm in arms_]
    planned, table, plan = rows.planned(name, measured)
    length = arms_[0].experiment.input_length
    found.rows += [*rows.density(name, measured), *rows.masks(name, measured, length), *planned]
    both = zip(measured, arms_, strict=True)
    found.raw[name] = [m.plain() | {"val_loss": evaluate(a, a.trained)} for m, a in both]
    found.raw[f"{name} plans"] = [vars(row) for row in table]
    first, folder = measured[0], run.workdir / "plots"
    units, found.raw[f"{name} needs"] = rows.needs(rows.problem_of(first.masks_NxWxW, "bytes"))
    density, title = first.density_NxT, f"{name}: blocks for {TAU:.0%} of the mass"
    needs, wire = f"{name}: what devices need, zig-zag over {rows.CP}", f"{name}: wire bytes"
    found.plots += [
        figures.density_map(folder / f"density_{name}.png", density, first.steps, title),
        figures.need_map(folder / f"needs_{name}.png", units, needs),
        figures.bytes_chart(folder / f"bytes_{name}.png", table, f"{wire}, cp = {rows.CP}"),
        figures.plan_picture(folder / f"plan_{name}.png", plan, f"{name}: plan by layer"),
    ]
    return measured


def _training_on(run: Run, found: ArmResult, name: str, measured: list[Measured]) -> None:
    """With the coverage that was found, for a sixth of the steps in WINDOWS windows."""
    adapted = []
    for arm, m in zip(run.arms[name], measured, strict=True):
        probe_BxS = arm.data.val.take(range(run.config.profile.sequences))["tokens"]
        steps = max(1, arm.experiment.fit.steps // (6 * WINDOWS))
        adapted.append(runtime.adapt(arm, probe_BxS, BLOCKS, m.coverage, WINDOWS, steps))
    found.raw[f"{name} windows"] = [[window.plain() for window in a.windows] for a in adapted]
    found.rows += rows.adapted(name, adapted)


def _native_sparse(run: Run, found: ArmResult) -> None:
    """Validation losses after the same steps as dense attention, which went on."""
    arms_ = run.arms["nsa"]
    e, written = arms_[0].experiment, read_metrics(run.workdir)
    dense = {
        r["seed"]: r["val_loss"]
        for r in written
        if (r["arm"], r["step"]) == ("text", e.fit.steps) and "val_loss" in r
    }
    pairs = [(dense[arm.seed], evaluate(arm, arm.trained)) for arm in arms_]
    found.raw["nsa"] = [{"dense loss": a, "sparse loss": b} for a, b in pairs]
    length = e.input_length
    found.rows.append(rows.native_sparse(pairs, e.fit.steps, budget(length), length))


def _region(run: Run, found: ArmResult, tiny: bool) -> None:
    """Where adaptive plans would pay, on synthetic masks."""
    region = simulate.region(draws=100, lengths=simulate.LENGTHS[:1] if tiny else simulate.LENGTHS)
    path, title = run.workdir / "plots" / "region.png", "Step time, adaptive / best uniform"
    found.plots.append(figures.region_map(path, region, title))
    found.rows.append(rows.region(region))


def _needs_devices() -> Row:
    claim = "every plan equals one device"
    return Row.untestable(claim, "errors", "", "<= 1e-4", "measured", "needs 8 devices")
