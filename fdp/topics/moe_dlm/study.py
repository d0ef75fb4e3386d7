"""Topic 2: should the router of a diffusion language model see the noise, and which balance keeps
every step of a sampler level?"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import ml_collections

from fdp.config import UserError
from fdp.count.experts import expert_memory, shared_beside
from fdp.experiment import Experiment, standard
from fdp.mesh import AXES
from fdp.models.stack import Layer
from fdp.models.transformer import Transformer
from fdp.run import Run
from fdp.study import claims
from fdp.study.claims import needs_devices
from fdp.study.measure import Measurement, Part, derive, each, measure
from fdp.study.report import Report
from fdp.topics.moe_dlm import figures, rows
from fdp.topics.moe_dlm.exactness import batch_mates
from fdp.topics.moe_dlm.observe import observe, sample
from fdp.topics.moe_dlm.settings import ARMS, DECIDING, NOISE_AWARE, OTHERS

QUESTION = (
    "Should the router of a diffusion language model see the noise, and which balance keeps every "
    "step of a sampler level?"
)
TEXT = "text"
MESHES: dict[str, dict[str, int]] = {
    "ep2·dp2·tp2, ZeRO-3, SP": {"dp": 2, "ep": 2, "tp": 2},
    "ep8, two levels": {"ep": 8},
    "ep4·cp2, gather": {"ep": 4, "cp": 2},
}
UNLIKE: dict[str, dict[str, Any]] = {
    "ep2·dp2·tp2, ZeRO-3, SP": {"train.zero": 3, "model.sequence_parallel": True},
    "ep8, two levels": {"model.moe.dispatch": "two_level", "model.moe.node": 2},
    "ep4·cp2, gather": {"model.moe.dispatch": "gather"},
}


def tasks(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The oracles, and text where it has seeds."""
    return (*config.router.tasks, *((TEXT,) if config.router.text else ()))


def arms(config: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """Every router on every task: those that decide on both oracles, all on two regimes and on
    text. One seed of text has one arm.
    """
    if not config.model.moe.experts:
        raise UserError("topic moe_dlm trains experts: set model.moe.experts=16")
    found: dict[str, Experiment] = {}
    for task in tasks(config):
        names = config.router.arms
        if task == "markov":
            names = [n for n in names if n in DECIDING]
        if task == TEXT and config.router.text == 1:
            names = names[-1:]
        found |= {f"{task}-{name}": arm(config, task, name) for name in names}
    return found


def seeds(config: ml_collections.ConfigDict) -> Mapping[str, tuple[int, ...]]:
    """All seeds for the arms that decide; a few for the others, and on text."""
    found = {}
    for name in arms_named(config):
        task, _, router = name.partition("-")
        few = config.router.text if task == TEXT else OTHERS if router not in DECIDING else 10**6
        found[name] = tuple(config.seeds)[:few]
    return found


def arms_named(config: ml_collections.ConfigDict) -> list[str]:
    """Names that `arms` may give."""
    return [f"{task}-{name}" for task in tasks(config) for name in config.router.arms]


def arm(config: ml_collections.ConfigDict, task: str, name: str) -> Experiment:
    """The experiment of a router on a task."""
    c = config.copy_and_resolve_references()
    moe = c.model.moe
    with c.unlocked():
        if task == TEXT:
            c.data.source = "bible" if c.data.source in config.router.tasks else c.data.source
            c.model.vocab = max(c.model.vocab, c.data.vocab)
        else:
            c.data.source = task
        moe.update(ARMS[name])
        if name == "dense":
            c.model.ffn = moe.topk * moe.ffn
        if moe.choice == "expert":
            moe.scale = moe.experts / moe.topk  # a mean gate of 1/k
        if name == "reverse":
            moe.update(low=float(moe.topk - 1), high=float(moe.topk + 1))
        if moe.noise == "none" and not moe.rank:
            moe.ranks = 1
    e = standard(c)
    if name.endswith("_blind"):
        assert isinstance(e.model, Transformer)
        e = replace(e, model=blind(e.model))
    return e


def blind(model: Transformer) -> Transformer:
    """`model` whose routers read r = 0 in place of the noise."""
    fields = dict(model.pattern[-1].fields)
    ffn: Layer = fields["ffn"]
    inside = dict(ffn.fields)
    inside["routing"] = replace(inside["routing"], blind=True)
    fields["ffn"] = Layer(ffn.cls, tuple(sorted(inside.items())))
    last = Layer(model.pattern[-1].cls, tuple(sorted(fields.items())))
    return model.clone(pattern=(*model.pattern[:-1], last))


def build(config: ml_collections.ConfigDict, name: str, degrees: Mapping[str, int]) -> Experiment:
    """The experiment of the mesh comparison: the router that decides, with every loss."""
    c = config.copy_and_resolve_references()
    with c.unlocked():
        c.data.source, c.seeds = "two_regimes", (0,)
        c.train.update(batch=16, microbatches=1)
        c.model.update(dtype="float32", width=32, heads=4, kv_heads=4, head_dim=8, ffn=32)
        moe = c.model.moe
        moe.update(ARMS["low_rank_rank"] | {"switch": 0.01, "z": 0.001, "sequence": 0.01})
        moe.update(ffn=16, bias=0.001, shared=1, buffer=0.0)
        c.update_from_flattened_dict(UNLIKE.get(name, {}))
        c.mesh.update(dict.fromkeys(AXES, 1) | dict(degrees))
    return standard(c)


def study(run: Run) -> Report:
    """Exactness, likelihood by noise, load along samplers, prices."""
    tiny = run.config.variant == "tiny"
    parts: list[Part] = [*_exact(run, tiny)]
    some = run.config.router.sequences
    seen: dict[str, Measurement] = {}
    sampled: dict[str, Measurement] = {}
    for name, of_seeds in run.arms.items():
        seen[name] = measure(f"noise {name}", observe, each(of_seeds), some)
        sampled[name] = measure(f"samples {name}", sample, each(of_seeds), some)
    for task in tasks(run.config):
        names = [n for n in run.arms if n.startswith(f"{task}-")]
        short = [n.partition("-")[2] for n in names]
        data = run.arms[names[0]][0].data
        given = [seen[n] for n in names], [sampled[n] for n in names]
        parts.append(
            derive(
                f"likelihood {task}",
                *given,
                rows=partial(rows.task, task, short, data),
                plot=partial(figures.task, task, short),
                raw=rows.raw(short),
                group=task,
            )
        )
    deciding = [n for n in run.arms if not n.startswith(TEXT) and n.partition("-")[2] in DECIDING]
    if any(n.partition("-")[2] in NOISE_AWARE for n in deciding):
        given = [seen[n] for n in deciding], [sampled[n] for n in deciding]
        verdict = partial(rows.pays, deciding)
        parts.append(derive("pays", *given, rows=verdict, group="Answer"))
    costs = partial(measure, "plans", rows.plans, rows=rows.plan_rows, plot=figures.plans)
    parts.append(costs(group="Bytes"))
    if not tiny:
        parts.append(measure("expert memory", expert_memory, rows=rows.memory, group="GPU"))
        parts.append(measure("shared beside", shared_beside, rows=rows.beside, group="GPU"))
    return run.report(*parts)


def _exact(run: Run, tiny: bool) -> list[Part]:
    """Against one device, on meshes and in a batch."""
    group = "Exactness"
    first = next(iter(run.arms.values()))[0]
    mates = measure("batch mates", batch_mates, first, rows=rows.batch_mates, group=group)
    if jax.device_count() < 8:
        return [needs_devices("a mesh equals one device", "errors", "<= 1e-5", 8), mates]
    meshes = dict(list(MESHES.items())[:1]) if tiny else MESHES
    return [*claims.sharded_equals_unsharded(build, run.config, meshes, group=group), mates]
