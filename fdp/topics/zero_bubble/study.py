"""Topic 8: what schedule does a diffusion model deserve, what is it worth at equal memory, and when
is a pipeline worth having at all?"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import ml_collections
import numpy as np

from fdp.arm import Arm
from fdp.experiment import Experiment, standard
from fdp.hooks import Hook
from fdp.mesh import AXES, make_mesh
from fdp.metrics import read_metrics
from fdp.run import Run
from fdp.study import claims
from fdp.study.claims import needs_devices
from fdp.study.figures import training_curves
from fdp.study.measure import Part, derive, each, measure
from fdp.study.report import Report
from fdp.topics.zero_bubble import (
    figures,
    fillers,
    judge,
    op_costs,
    parts_simulated,
    processes,
    quality,
    rows,
    steps,
)
from fdp.topics.zero_bubble.fillers import References, stable
from fdp.topics.zero_bubble.parts_simulated import SIZES, nothing
from fdp.topics.zero_bubble.settings import COARSE

QUESTION = (
    "What schedule does a diffusion model deserve, what is it worth at equal memory, and when is "
    "a pipeline worth having at all?"
)
STAGES = 4  # of the measured op costs
MESHES: dict[str, dict[str, int]] = {
    "pp4·dp2, searched": {"pp": 4, "dp": 2},
    "pp2·dp2·tp2, ZB-V, ZeRO-1": {"pp": 2, "dp": 2, "tp": 2},
    "pp2·cp2·dp2, 1F1B, remat": {"pp": 2, "cp": 2, "dp": 2},
}
UNLIKE: dict[str, dict[str, Any]] = {
    "pp4·dp2, searched": {"pipeline.schedule": "searched"},
    "pp2·dp2·tp2, ZB-V, ZeRO-1": {"pipeline.schedule": "zbv", "train.zero": 1},
    "pp2·cp2·dp2, 1F1B, remat": {"pipeline.schedule": "1f1b", "model.remat": "full"},
    "no barrier": {  # in-context, no parameter is read by all stages
        "pipeline.schedule": "zb_h2",
        "model.image.conditioning": "tokens",
        "train.microbatches": 4,
        "train.warmup": 0,
    },
}
SPLITS = {"pp1·dp4": (1, 4), "pp2·dp2": (2, 2), "pp4·dp1": (4, 1)}  # (pp, dp) of equal losses
SHORT = 10  # steps of it


def arms(config: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """Every cost of a sample with every filler; a U-ViT has none."""
    found: dict[str, Experiment] = {}
    for cost in config.images.costs:
        for filler in config.images.fillers[: 1 if cost == "uvit" else None]:
            name = cost if filler == "none" else f"{cost}-{filler}"
            found[name] = arm(config, cost, filler)
    return found


def seeds(config: ml_collections.ConfigDict) -> dict[str, tuple[int, ...]]:
    """One for the U-ViT, which nothing is compared with."""
    return {"uvit": tuple(config.seeds)[:1]}


def arm(config: ml_collections.ConfigDict, cost: str, filler: str) -> Experiment:
    """The experiment of a cost and a filler."""
    c = config.copy_and_resolve_references()
    with c.unlocked():
        if cost == "coarse":
            c.model.image.coarse = COARSE
        if cost == "uvit":
            c.model.update(kind="uvit", layers=c.model.layers + 1)
            c.model.image.conditioning = "tokens"
            c.mesh.pp = 1  # four stages would need halves of four blocks
        if filler == "larger":
            c.train.batch += c.train.batch // 8
    e = standard(c)
    if filler == "stable":
        images = References(*judge.whole(e.data.train))
        e = replace(e, objective=stable(e.objective, images, config.images.references))
    watch = quality.Watch(c.model.image.classes, c.images.steps)
    hooks = []
    if filler == "none":
        hooks.append(Hook("samples", max(1, c.train.steps // 5), watch))
    if len(config.images.fillers) > 1 and cost != "uvit":
        hooks.append(Hook("held-out", max(1, c.train.steps // 20), quality.watch_held_out))
    return replace(e, hooks=tuple(hooks))


def build(config: ml_collections.ConfigDict, name: str, degrees: Mapping[str, int]) -> Experiment:
    """The experiment of the mesh comparison: a small DiT in float32."""
    c = config.copy_and_resolve_references()
    with c.unlocked():
        c.seeds = (0,)
        c.train.update(batch=32, microbatches=8, zero=0)
        c.model.update(dtype="float32", width=32, heads=4, kv_heads=4, head_dim=8, ffn=32)
        c.model.update(layers=4, remat="none")
        c.model.image.update(size=16, patch=4, channels=3)
        c.data.source = "gaussians"  # of any size, and drawn at once
        c.update_from_flattened_dict(UNLIKE.get(name, {}))
        c.mesh.update(dict.fromkeys(AXES, 1) | dict(degrees))
    return standard(c)


def stage_losses(config: ml_collections.ConfigDict) -> dict[str, float]:
    """Largest relative difference of the losses of SHORT steps to those of pp = 1, by mesh."""
    found: dict[str, list[float]] = {}
    for name, (pp, dp) in SPLITS.items():
        e = build(config, name, {"pp": pp, "dp": dp})
        e = replace(e, fit=replace(e.fit, steps=SHORT))
        one = Arm.of(name, e, make_mesh(e.degrees))
        state, step = one.init(), one.train_function()
        losses = []
        for n in range(SHORT):
            taken = range(n * e.fit.batch, (n + 1) * e.fit.batch)
            state, metrics = step(state, one.place(e.data.train.take(taken)))
            losses.append(float(metrics["loss"]))
        found[name] = losses
    base = np.array(found.pop("pp1·dp4"))
    return {name: float(np.abs(np.array(x) / base - 1).max()) for name, x in found.items()}


def clipped_steps(config: ml_collections.ConfigDict) -> steps.Clipped:
    """Steps without a barrier of a small DiT over two stages."""
    return steps.clipped(build(config, "no barrier", {"pp": 2}))


def study(run: Run) -> Report:
    """Exactness, op costs, what training gives, and schedules."""
    tiny, c = run.config.variant == "tiny", run.config
    first = next(iter(run.arms.values()))[0]
    parts: list[Part] = [] if tiny else _exact(run)  # tests hold the same of smaller models
    timed = partial(measure, "op costs", op_costs.measured, first, STAGES, c.train.batch)
    of_costs = None if tiny else rows.op_costs  # operations of microseconds have no stable ratio
    costs = timed(rows=of_costs, plot=figures.costs, group="Op costs")
    parts += [costs, *parts_simulated.parts(SIZES.get(c.variant, SIZES["cpu"]), costs)]
    if not tiny:
        runs = partial(measure, "two processes", processes.measured, processes.orders())
        parts.append(runs(rows=rows.processes, group="A real run"))
        unbroken = partial(measure, "clipped steps", clipped_steps, c, rows=rows.clipped)
        parts.append(unbroken(group="Without a barrier"))
    parts += _quality(run)
    if stable_arms := [arms[0] for name, arms in run.arms.items() if name.endswith("-stable")]:
        given = stable_arms[0], STAGES, costs
        parts.append(measure("idle", fillers.growth, *given, rows=rows.growth, group="Fillers"))
    return run.report(*parts)


def _exact(run: Run) -> list[Part]:
    """Against one device, and of one run on three meshes."""
    group = "Exactness"
    if jax.device_count() < 8:
        return [needs_devices("a mesh equals one device", "errors", "<= 1e-5", 8)]
    equal = claims.sharded_equals_unsharded(build, run.config, MESHES, group=group)
    return [*equal, measure("losses", stage_losses, run.config, rows=rows.losses, group=group)]


def _quality(run: Run) -> list[Part]:
    """What the arms learnt."""
    c, group = run.config, "Images"
    names = list(run.arms)
    first = run.arms[names[0]][0]
    judged = measure("judge", quality.judge_of, first, c.images.classifier, raw=nothing)
    floor = measure("held-out images", quality.floor, first, judged)
    drawn = [
        measure(f"samples {n}", quality.samples, each(run.arms[n]), judged, *_asked(c), raw=nothing)
        for n in names
    ]
    losses = [measure(f"held-out {n}", quality.held_out, each(run.arms[n])) for n in names]
    plots = partial(_pictures, run, names)
    # What the other variants train for is too short to be judged.
    judged_rows = partial(rows.quality, names) if c.variant in ("full", "h100") else None
    return [
        derive("samples", drawn, floor, rows=judged_rows, group=group),
        derive("pictures", drawn, losses, plot=plots),
        derive("fillers", losses, rows=partial(_fillers, run), group="Fillers"),
    ]


def _asked(c: ml_collections.ConfigDict) -> tuple[int, int]:
    return c.images.samples, c.images.steps


def _pictures(run: Run, names: list[str], drawn: Any, losses: Any) -> dict[str, Any]:
    """Samples while training and beside their nearest images, loss curves, loss by noise."""
    first = run.arms[names[0]][0]
    train = judge.whole(first.data.train)[0]
    found = {
        f"nearest {name}": figures.beside_nearest(name, seeds[0], train)
        for name, seeds in zip(names, drawn, strict=True)
        if "-" not in name
    }
    seen: dict[str, dict[int, np.ndarray]] = {}
    for row in read_metrics(run.workdir):
        if "hook/images" in row and row["seed"] == first.seed:
            seen.setdefault(row["arm"], {})[row["step"]] = np.array(row["hook/images"])
    for name, by_step in seen.items():
        title = f"{name}: samples of each class while training"
        found[f"training {name}"] = figures.while_training(by_step, title)
    curves = {name: name for name in names}
    found["loss"] = training_curves(run.workdir, curves, "Loss of training", "loss per pixel")
    means = {n: np.mean(x, axis=0) for n, x in zip(names, losses, strict=True)}
    found["noise"] = figures.by_noise(means)
    return found


def _fillers(run: Run, _: Any) -> list[Any]:
    """Rows of the fillers, from the held-out losses that the runs logged."""
    found: list[Any] = []
    logged = read_metrics(run.workdir)
    for cost in run.config.images.costs:
        named = {"none": cost} | {f: f"{cost}-{f}" for f in ("stable", "larger")}
        curves = {
            filler: [_curve(logged, name, arm.seed) for arm in run.arms[name]]
            for filler, name in named.items()
            if name in run.arms
        }
        if len(curves) > 1:
            found += rows.fillers(cost, curves)
    return found


def _curve(logged: list[dict[str, Any]], name: str, seed: int) -> dict[int, float]:
    """Held-out loss by step, the same measure for every arm."""
    loss = "hook/loss"
    mine = [r for r in logged if (r["arm"], r["seed"]) == (name, seed) and loss in r]
    return {r["step"]: r[loss] for r in mine}
