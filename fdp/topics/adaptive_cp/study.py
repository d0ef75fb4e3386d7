"""Topic 3: does a comm plan of its own for every layer pay, on what trained models really attend
to?"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import ml_collections

from fdp.arm import Arm
from fdp.config import UserError
from fdp.experiment import Experiment, standard
from fdp.hooks import Hook
from fdp.metrics import read_metrics
from fdp.models.layers import SwiGLU
from fdp.models.nsa import Budget, NativeSparseAttention
from fdp.models.stack import Block, layer
from fdp.parallel.context.layouts import CONTIGUOUS
from fdp.run import Run
from fdp.study import context_exactness as exactness
from fdp.study import context_switching as switching
from fdp.study.claims import needs_devices, validation_loss
from fdp.study.measure import Measurement, Part, derive, each, measure
from fdp.study.report import Report, Row
from fdp.topics.adaptive_cp import figures, rows
from fdp.topics.adaptive_cp.densities import Densities, history
from fdp.topics.adaptive_cp.measured import measured
from fdp.topics.adaptive_cp.planned import Planned, planned
from fdp.topics.adaptive_cp.predict import LENGTHS, region
from fdp.topics.adaptive_cp.runtime import adapt, switch_listed
from fdp.topics.adaptive_cp.settings import BLOCKS

QUESTION = (
    "Does a comm plan of its own for every layer beat the best plan for all of them, on what "
    "trained models attend to?"
)
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
    for name, e in found.items():
        if e.data.name != "blank":  # of a dry run
            _check_profile(name, p.sequences, len(e.data.val))
    return found


def _check_profile(name: str, sequences: int, held_out: int) -> None:
    if 3 * sequences > held_out:
        raise UserError(
            f"profile.sequences={sequences}: masks, coverage and judgement take 3 × {sequences} = "
            f"{3 * sequences} validation sequences of {name}, which has {held_out}: set "
            f"profile.sequences={held_out // 3}"
        )


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


def study(run: Run) -> Report:
    """Measure, plan, judge."""
    names, tiny = ("text", *run.config.profile.tasks), run.config.variant == "tiny"
    some = run.config.profile.sequences
    masks = {
        name: [measure(f"{arm.label} masks", measured, arm, some) for arm in run.arms[name]]
        for name in names
    }
    enough = jax.device_count() >= exactness.DEVICES
    parts: list[Part] = []
    for name in names:
        parts += _attended(run, name, masks[name])
        if enough and not tiny:
            parts.append(_training_on(run, name, masks[name]))
    if "nsa" in run.arms:
        parts += _native_sparse(run)
    if enough:
        parts += _exact(run.arms["text"][0], masks["text"][0], tiny)
    else:
        parts.append(needs_devices("every plan equals one device", "errors", "<= 1e-4", 8))
    lengths = LENGTHS[:1] if tiny else LENGTHS
    pays = measure("region", region, lengths, 100, rows=rows.region, plot=figures.region)
    return run.report(*parts, replace(pays, group="Where it would pay"))


def _attended(run: Run, name: str, masks: list[Measurement]) -> list[Measurement]:
    """Densities, masks and what they cost, and the plans for them, of the seeds of an arm."""
    arms_, decides = run.arms[name], name == "text"
    histories = [history(arm, run.workdir) for arm in arms_]
    length = arms_[0].experiment.input_length

    def pictures(found: list[Planned]) -> dict[str, Any]:
        first = found[0]
        return {
            f"needs {name}": figures.needs(name, first.units_NxDxD),
            f"bytes {name}": figures.methods(name, first.methods),
            f"plan {name}": figures.plan(name, first.layers),
        }

    density = partial(rows.density, name, decides), partial(figures.density, name)
    costs, plans = partial(rows.masks, name, length), partial(rows.planned, name, decides)
    return [
        derive(
            f"density {name}", histories, rows=density[0], plot=density[1], raw=list, group=name
        ),
        derive(f"masks {name}", masks, rows=costs, group=name),
        measure(f"plans {name}", planned, each(masks), rows=plans, plot=pictures, group=name),
    ]


def _training_on(run: Run, name: str, masks: list[Measurement]) -> Measurement:
    """With the coverage that was found, for a sixth of the steps in WINDOWS windows."""
    arms_, sequences = run.arms[name], run.config.profile.sequences
    steps = max(1, arms_[0].experiment.fit.steps // (6 * WINDOWS))

    given = each(arms_), each(masks), sequences, WINDOWS, steps
    return measure(f"windows {name}", adapt, *given, rows=partial(rows.adapted, name), group=name)


def _native_sparse(run: Run) -> list[Measurement]:
    """Validation losses after the same steps as dense attention, which went on."""
    arms_ = run.arms["nsa"]
    fit, length = arms_[0].experiment.fit, arms_[0].experiment.input_length
    dense = {
        r["seed"]: r["val_loss"]
        for r in read_metrics(run.workdir)
        if (r["arm"], r["step"]) == ("text", fit.steps) and "val_loss" in r
    }

    def costs(sparse: list[float]) -> Row:
        of_seeds = [dense[arm.seed] for arm in arms_]
        return rows.native_sparse(of_seeds, sparse, fit.steps, budget(length), length)

    return [measure("validation loss nsa", validation_loss, each(arms_), rows=costs, group="text")]


def _exact(arm: Arm, masks: Measurement, tiny: bool) -> list[Measurement]:
    """Exact plans against one device, and plans and lists as data in one compiled program; `tiny`:
    two plans and no such program."""
    plans = exactness.PLANS[::9] if tiny else exactness.PLANS
    found = [measure("plans", exactness.compare, each(plans), rows=rows.plans, group="Exactness")]
    if tiny or arm.model.shape.heads % exactness.DEVICES:
        return found
    listed = measure("switch listed", switch_listed, arm, masks)
    more = [
        measure("switch plans", switching.switch_plans, arm),
        measure("switch indexed", switching.switch_indexed, arm, BLOCKS, 8),
    ]
    return [*found, derive("switched", listed, more, rows=rows.switched, group="Exactness")]
