"""Topic 3: does a context plan of its own for every layer pay, on what trained models really attend to?

Legend: B sequences, S positions, W blocks of a sequence, N layers, T checkpoints.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fdp.arm import Arm
from fdp.checkpoint import Checkpoints
from fdp.config import digest
from fdp.data.batches import eval_batches
from fdp.loop import evaluate
from fdp.models.transformer import Transformer
from fdp.objectives.base import Objective
from fdp.report import Report, Row
from fdp.run import Run
from fdp.step import loss_sum
from fdp.topics.adaptive_cp import baselines, checks, figures, planner, runtime, simulate
from fdp.topics.adaptive_cp.mixers import sparse
from fdp.topics.adaptive_cp.problem import Masks, Problem
from fdp.topics.adaptive_cp.profile import Profile, block_ids, block_masks, profile, spearman

BLOCKS = 32  # of a sequence: four for each of eight devices
CP = 8
WINDOWS = 4  # of training with sparse attention
TAU = 0.95
COVERAGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
GAP = 0.005  # relative loss that sparsity may cost
FAR = 2**17  # positions of the simulated sequence
BALANCE = 1.1


def arms(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """The same causal model on text and on associative recall; for absent hardware, on text alone."""
    found = {"text": config.copy_and_resolve_references()}
    if config.variant in ("cpu", "tiny", "full"):
        recall = config.copy_and_resolve_references()
        recall.data.source = "mqar"
        found["recall"] = recall
    return found


@dataclass(frozen=True)
class Measured:
    """What one trained arm attends to: density [N, T] at `steps`, block masks, their coverage and loss."""

    density_NxT: np.ndarray
    steps: list[int]
    masks_NxWxW: np.ndarray
    coverage: float
    dense_loss: float
    sparse_loss: float

    @property
    def share(self) -> np.ndarray:
        """Share of the causal blocks that each layer's mask keeps, [N]."""
        W = self.masks_NxWxW.shape[-1]
        return self.masks_NxWxW.sum((1, 2)) / (W * (W + 1) / 2)


def study(run: Run) -> Report:
    """Measure, plan, judge."""
    found: list[Row] = []
    raw: dict[str, Any] = {}
    plots: list[str | Path] = []
    for name, arms_ in run.arms.items():
        measured = [measure(arm, run.workdir) for arm in arms_]
        raw[name] = [
            {"density": m.density_NxT, "steps": m.steps, "mask share": m.share, "coverage": m.coverage,
             "dense loss": m.dense_loss, "sparse loss": m.sparse_loss, "val_loss": evaluate(a, a.trained)}
            for m, a in zip(measured, arms_, strict=True)
        ]  # fmt: skip
        plots.append(
            figures.density_map(run.workdir / "plots" / f"density_{name}.png", measured[0].density_NxT,
                                measured[0].steps, f"{name}: blocks for {TAU:.0%} of the mass")
        )  # fmt: skip
        found += _density_rows(name, measured) + _plan_rows(run, name, measured, raw, plots)
        if name == "text":
            masks = measured[0].masks_NxWxW
        if jax.device_count() >= checks.DEVICES and (name == "text" or run.config.variant != "tiny"):
            adapted = [adapt(arm, m) for arm, m in zip(arms_, measured, strict=True)]
            raw[f"{name} windows"] = [[window.plain() for window in a.windows] for a in adapted]
            found += _adapted_rows(name, adapted)
    if jax.device_count() >= checks.DEVICES:
        found += _exactness_rows(run, masks)
    else:
        found.append(
            Row.untestable("every plan equals one device", "errors", "", "<= 1e-4", "measured", "needs 8 devices")
        )
    tiny = run.config.variant == "tiny"
    region = simulate.region(draws=100, lengths=simulate.LENGTHS[::3] if tiny else simulate.LENGTHS)
    plots.append(figures.region_map(run.workdir / "plots" / "region.png", region, "Step time, adaptive / best uniform"))
    found.append(_region_row(region))
    inside: list[str | Path] = [Path(plot).relative_to(run.workdir) for plot in plots]
    return Report(run.config.topic, run.config.variant, digest(run.config), found, inside, raw)


# Measuring -----------------------------------------------------------------------------------------------------------


def _states(arm: Arm, workdir: Path) -> Iterator[tuple[int, Any]]:
    """Parameters of every kept checkpoint, on the host."""
    checkpoints = Checkpoints(workdir / "checkpoints" / arm.label, keep=arm.c.checkpoint.keep)
    try:
        for step, state in checkpoints.history(arm.program.layout.abstract_state()):
            yield step, jax.device_get(state.params)
    finally:
        checkpoints.close()


def measure(arm: Arm, workdir: Path) -> Measured:
    """Densities over training, then the sparsest block masks whose loss stays within GAP on held-out sequences.

    The first half of the sequences yields masks, the second half chooses the coverage; the loss reported is of
    sequences that took part in neither.
    """
    c = arm.c
    block, n = c.data.seq_len // BLOCKS, c.eval.sequences
    (tokens,) = eval_batches(arm.data.val, 3 * n, 1)
    steps, densities, last = [], [], None
    for step, params in _states(arm, workdir):
        last = profile(arm, params, tokens[:n], block, TAU)
        steps.append(step)
        densities.append(last.density_N)
    assert isinstance(last, Profile)
    params = jax.device_get(arm.trained.params)
    choose, judge = tokens[n : 2 * n], tokens[2 * n :]
    dense = loss_of(arm, params, choose, None)
    for coverage in COVERAGES:
        masks = block_masks(last.mass_NxWxW, coverage)
        if loss_of(arm, params, choose, masks) <= (1 + GAP / 2) * dense:  # half, so that others meet the whole
            break
    losses = loss_of(arm, params, judge, None), loss_of(arm, params, judge, masks)
    return Measured(np.stack(densities, 1), steps, masks, coverage, *losses)


def loss_of(arm: Arm, params: Any, tokens_BxS: np.ndarray, masks_NxWxW: np.ndarray | None) -> float:
    """Mean loss in nats per token on one device, with the layers' block masks or with dense attention."""
    block = tokens_BxS.shape[1] // BLOCKS
    model: Any = arm.model if masks_NxWxW is None else arm.model.clone(mixer=sparse(block))
    ids = None if masks_NxWxW is None else block_ids(masks_NxWxW, BLOCKS)
    run = _loss(model, arm.objective)  # type: ignore[arg-type]
    return float(run(params, jnp.asarray(tokens_BxS), ids))


@lru_cache(maxsize=8)  # compiled once for all masks
def _loss(model: Transformer, objective: Objective) -> Any:
    """(params, tokens [B, S], lists of key blocks) → mean loss."""

    @jax.jit
    def run(params: Any, tokens: jax.Array, ids: Any) -> jax.Array:
        batch = objective.corrupt(jax.random.key(0), tokens)
        return loss_sum(model, objective, None, params, batch, ids) / tokens.size

    return run


def adapt(arm: Arm, m: Measured) -> runtime.Adapted:
    """Train on with the coverage that was found, for a sixth of the steps in WINDOWS windows."""
    (tokens,) = eval_batches(arm.data.val, arm.c.eval.sequences, 1)
    steps = max(1, arm.c.train.steps // (6 * WINDOWS))
    return runtime.adapt(arm, tokens, BLOCKS, m.coverage, WINDOWS, steps)


# Rows ----------------------------------------------------------------------------------------------------------------


def _density_rows(name: str, measured: list[Measured]) -> list[Row]:
    """Do layers differ, and do they keep their order? Over the last 500 steps, or all that were kept."""
    first = [next(i for i, s in enumerate(m.steps) if s >= m.steps[-1] - 500) for m in measured]
    span = measured[0].steps[-1] - measured[0].steps[first[0]]
    final = "; ".join(" ".join(f"{d:.2f}" for d in m.density_NxT[:, -1]) for m in measured)
    return [
        Row.judged(
            f"{name}: layers differ in density", "max/min over layers, blocks for 95 % of the mass",
            [float(m.density_NxT[:, -1].max() / m.density_NxT[:, -1].min()) for m in measured], "", "value >= 4",
            "measured", note=f"densities by layer after training: {final}",
        ),
        Row.judged(
            f"{name}: … in a stable order", f"Spearman correlation of layers, {span} steps apart",
            [spearman(m.density_NxT[:, i], m.density_NxT[:, -1]) for m, i in zip(measured, first, strict=True)], "",
            "value >= 0.8", "measured", note=f"{len(measured)} seed(s), {len(measured[0].density_NxT)} layers",
        ),
    ]  # fmt: skip


def problem_of(masks: np.ndarray, objective: str, draws: int = 1) -> Problem:
    """What is planned: the measured masks, magnified, as layers of Llama-8B shape (32 query, 8 key heads) at FAR tokens
    over eight devices on InfiniBand, bfloat16, with max/mean FLOPs of at most BALANCE."""
    on = simulate.machine(simulate.INFINIBAND, draws=draws)
    return replace(simulate.problem(simulate.GQA_8B, Masks(masks), FAR, CP, on, objective), balance=BALANCE)


def _plan_rows(
    run: Run, name: str, measured: list[Measured], raw: dict[str, Any], plots: list[str | Path]
) -> list[Row]:
    """Loss of the masks; bytes, balance and predicted time of the adaptive plan on them."""
    problems = [problem_of(m.masks_NxWxW, "bytes") for m in measured]
    plans = [planner.plan(p) for p in problems]
    uniform = [baselines.uniform_any(p) for p in problems]
    table = baselines.baselines(problems[0])
    raw[f"{name} plans"] = [replace(row).__dict__ for row in table]
    plots.append(figures.bytes_chart(run.workdir / "plots" / f"bytes_{name}.png", table, f"{name}: wire bytes, cp = 8"))
    plots.append(figures.plan_picture(run.workdir / "plots" / f"plan_{name}.png", plans[0], f"{name}: plan by layer"))
    far = [simulate.predict(simulate.GQA_8B, problem_of(m.masks_NxWxW, "seconds", draws=200)) for m in measured]
    kept = "; ".join(" ".join(f"{s:.2f}" for s in m.share) for m in measured)
    return [
        Row.judged(
            f"{name}: measured masks cost little", "relative change of the loss",
            [m.sparse_loss / m.dense_loss - 1 for m in measured], "", "value <= 0.005", "measured",
            note=f"held-out sequences; share of causal blocks kept by layer {kept}; coverage "
            f"{', '.join(str(m.coverage) for m in measured)}; nats/token dense "
            f"{np.mean([m.dense_loss for m in measured]):.4f}",
        ),
        Row.judged(
            f"{name}: adaptive plan sends less than the best uniform one", "bytes, forward and backward",
            [p.bytes for p in plans], "bytes", "ratio <= 0.7", "counted", "best uniform plan of any kind",
            [u.bytes for u in uniform],
            note=f"these masks magnified to {FAR:,} tokens, 32 query and 8 key heads, cp = {CP}; closed formulas, "
            f"padding of static shapes included: {baselines.summary(plans[0])} against "
            f"{baselines.describe(uniform[0].plans[0])}; need-only bound {min(r.bytes for r in table):,.0f}",
        ),
        Row.judged(
            f"{name}: … in balance", "max/mean FLOPs", [p.imbalance for p in plans], "", "value <= 1.1", "counted",
            note="a limit of the planner, adaptive and uniform alike",
        ),
        Row.judged(
            f"{name}: … and is faster at 128K on InfiniBand", "step time over that of the best uniform plan",
            [f.ratio for f in far], "", "value <= 0.9", "simulated",
            ci=(min(f.low for f in far), max(f.high for f in far)),
            note=f"the same masks and shape, planned for time: {far[0].adaptive_plan} against "
            f"{far[0].uniform_plan}; {simulate.evidence(simulate.INFINIBAND)}",
        ),
    ]  # fmt: skip


def _exactness_rows(run: Run, masks_NxWxW: np.ndarray) -> list[Row]:
    """Exact plans against one device, and plans and lists as data in one compiled program."""
    tiny = run.config.variant == "tiny"
    found = [checks.compare(plan) for plan in (checks.PLANS[::5] if tiny else checks.PLANS)]
    arm = run.arms["text"][0]
    (tokens,) = eval_batches(arm.data.val, 2, 1)
    rows = [
        Row.judged(
            "every plan equals attention on one device", "largest relative error, forward",
            max(f.forward_error for f in found), "", "<= 1e-5", "measured",
            note=f"{len(found)} plans × layouts, causal, cp = 8, float32",
        ),
        Row.judged(
            "… and so do its gradients", "largest relative error of dq, dk, dv", max(f.gradient_error for f in found),
            "", "<= 1e-4", "measured", note="custom backward of the ring included",
        ),
        Row.judged(
            "bytes of every plan equal the closed formula", "ops that differ", sum(f.mismatches() for f in found), "",
            "== 0", "counted", note="compiled HLO, forward and backward, to the byte",
        ),
    ]  # fmt: skip
    if arm.c.model.heads % checks.DEVICES:
        return rows
    switches = [("listed blocks", checks.switch_listed(arm, tokens, masks_NxWxW))]
    if not tiny:
        switches.append(("all keys", checks.switch_plans(arm, tokens)))
    fixed = checks.static_plan(arm, tokens, masks_NxWxW)
    arrays = "; ".join(f"{what}: {s.arrays} plan arrays" for what, s in switches)
    return [
        *rows,
        Row.judged(
            "a changed plan compiles nothing again", "programs compiled", max(s.compilations for _, s in switches), "",
            "== 1", "counted", note=f"loss and gradients of the trained model, one program each: {arrays}",
        ),
        Row.judged(
            "… and gives one device's loss and gradients", "largest relative error",
            max(max(s.loss_error, s.gradient_error) for _, s in switches), "", "<= 1e-4", "measured",
            note="listed blocks: gather that fits, gather of one block that overflows into its exact fallback, "
            "Ulysses, all-gather, and all of them by layer; all keys: ring, USP, Ulysses",
        ),
        Row.judged(
            "a program compiled for one plan agrees", "largest relative error",
            max(fixed.loss_error, fixed.gradient_error), "", "<= 1e-4", "measured",
            note="gather, Ulysses and all-gather by layer as constants of the program, against one device",
        ),
        Row.judged(
            "… and sends what its layers' formulas add up to", "ops that differ", fixed.mismatches, "", "== 0",
            "counted", note=f"HLO, bytes a device: {_bytes_text(fixed.counted)}",
        ),
    ]  # fmt: skip


def _bytes_text(traffic: dict[str, float]) -> str:
    return ", ".join(f"{op} {wire:,.0f}" for op, wire in traffic.items() if op != "all-reduce")


def _adapted_rows(name: str, found: list[runtime.Adapted]) -> list[Row]:
    """Training that goes on with measured masks and plans of its own for every layer."""
    first = found[0]
    last = first.windows[-1]
    mean = lambda key: [float(np.mean([getattr(w, key) for w in f.windows])) for f in found]
    plans = ", ".join(baselines.describe(plan) for plan in last.plans)
    return [
        Row.judged(
            f"{name}: training on with a plan for every layer costs little", "relative change of the validation loss",
            [f.loss / f.dense_loss - 1 for f in found], "", "value <= 0.005", "measured",
            note=f"{len(first.windows)} windows, {first.steps} steps after the trained state, against the same steps "
            f"with dense attention; masks measured and plans chosen anew in each window; last window keeps "
            f"{' '.join(f'{s:.2f}' for s in last.share_N)} of the causal blocks and runs {plans}; plans changed "
            f"{', '.join(str(f.switches) for f in found)} time(s)",
        ),
        Row.judged(
            f"{name}: … and sends less than one plan for all", "bytes of attention a step and device", mean("bytes"),
            "bytes", "ratio <= 0.7", "counted", "best uniform plan with lists", mean("uniform"),
            note="the run's own shape, mean over windows, planned for bytes",
        ),
    ]  # fmt: skip


def _region_row(region: simulate.Region) -> Row:
    share = region.share(1)
    return Row.judged(
        "adaptive plans pay on InfiniBand over densities and lengths", "share of the grid at least 10 % faster", share,
        "", "value >= 0.5", "simulated",
        note=f"synthetic masks, layers {region.spread:g}-fold apart in density: densities {region.densities} × lengths "
        f"{region.lengths}; NVLink {region.share(0):.0%}, congested InfiniBand {region.share(2):.0%}",
    )  # fmt: skip
