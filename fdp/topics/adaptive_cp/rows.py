"""From measurements to rows of the report.

Legend: N layers, W blocks of a sequence.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fdp.arm import Arm
from fdp.count import context
from fdp.count.compare import Key
from fdp.data.recall import task_of
from fdp.models.nsa import Budget
from fdp.parallel.context.layouts import ZIGZAG
from fdp.study.report import Row
from fdp.topics.adaptive_cp import baselines, checks, planner, runtime
from fdp.topics.adaptive_cp import predict as simulate
from fdp.topics.adaptive_cp.baselines import Baseline
from fdp.topics.adaptive_cp.measured import ANSWERS, WIDTHS, Measured
from fdp.topics.adaptive_cp.planner import ModelPlan
from fdp.topics.adaptive_cp.problem import Masks, Problem
from fdp.topics.adaptive_cp.profile import spearman
from fdp.topics.adaptive_cp.settings import BLOCKS

CP = 8
FAR = 2**17  # positions of the simulated sequence
BALANCE = 1.1
LISTED, ALL, CHOSEN = "listed blocks", "all keys", "8 blocks chosen by each input"
BRANCHES = {  # of the programs of `checks`
    LISTED: "gather that fits, gather of at most one block with its exact fallback, Ulysses, "
    "all-gather",
    ALL: "ring, USP, Ulysses",
    CHOSEN: "gather with its exact fallback, Ulysses, all-gather",
}


def density(name: str, measured: list[Measured]) -> list[Row]:
    """Do layers differ, and do they keep their order? Over the last 500 steps, or all that were
    kept.
    """
    first = [next(i for i, s in enumerate(m.steps) if s >= m.steps[-1] - 500) for m in measured]
    span = measured[0].steps[-1] - measured[0].steps[first[0]]
    final = "; ".join(" ".join(f"{d:.2f}" for d in m.density_NxT[:, -1]) for m in measured)
    return [
        Row.judged(
            f"{name}: layers differ in density",
            "max/min over layers, blocks for 95 % of the mass",
            [float(m.density_NxT[:, -1].max() / m.density_NxT[:, -1].min()) for m in measured],
            "",
            "value >= 4",
            "measured",
            note=f"densities by layer after training: {final}",
        ),
        Row.judged(
            f"{name}: … in a stable order",
            f"Spearman correlation of layers, {span} steps apart",
            [
                spearman(m.density_NxT[:, i], m.density_NxT[:, -1])
                for m, i in zip(measured, first, strict=True)
            ],
            "",
            "value >= 0.8",
            "measured",
            note=f"{len(measured)} seed(s), {len(measured[0].density_NxT)} layers",
        ),
    ]


def problem_of(masks: np.ndarray, objective: str, draws: int = 1) -> Problem:
    """What is planned: the measured masks, magnified, as layers of Llama-8B shape (32 query, 8 key
    heads) at FAR tokens over eight devices on InfiniBand, bfloat16, with max/mean FLOPs of at most
    BALANCE."""
    on = simulate.machine(simulate.INFINIBAND, draws=draws)
    return replace(
        simulate.problem(simulate.GQA_8B, Masks(masks), FAR, CP, on, objective), balance=BALANCE
    )


def needs(found: Problem) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """(share [N, D, D] of each device's keys that each one needs, zig-zag; what each layer needs in
    every layout).

    A line of the table: units of keys and values that a device receives (mean), the most of any
    pair, max/mean work, and the bytes of the mean at simulate.LENGTHS in the shape that is planned.
    """
    s = found.shape
    units, table = [], []
    for layer in range(found.layers):
        mask_WxW = found.masks.masks_LxJxWxW[layer].any(0)
        for layout in found.places:
            need = context.needs(mask_WxW, layout, s.cp, found.block)
            remote_DxD = np.where(np.eye(s.cp, dtype=bool), 0.0, need.units)
            received = float(remote_DxD.sum(1).mean())
            wire = {n: received * replace(s, seq_len=n).unit for n in simulate.LENGTHS}
            line = {
                "layer": layer,
                "layout": layout.kind,
                "units": received,
                "most of a pair": float(remote_DxD.max()),
                "max/mean work": need.worker_imbalance,
                "bytes": wire,
            }
            table.append(line)
            if layout == ZIGZAG:
                units.append(need.units)
    return np.stack(units), table


def masks(name: str, measured: list[Measured], seq_len: int) -> list[Row]:
    """What the masks cost: loss, and answers of a recall task."""
    kept = "; ".join(" ".join(f"{s:.2f}" for s in m.share) for m in measured)
    found = [
        Row.judged(
            f"{name}: measured masks cost little",
            "relative change of the loss",
            [m.sparse_loss / m.dense_loss - 1 for m in measured],
            "",
            "value <= 0.005",
            "measured",
            note=f"held-out sequences; share of causal blocks kept by layer {kept}; coverage "
            f"{', '.join(str(m.coverage) for m in measured)}; nats/token dense "
            f"{np.mean([m.dense_loss for m in measured]):.4f}",
        ),
        Row.judged(
            f"{name}: lists made from each input cost little",
            "relative change of the loss",
            [m.indexed_loss / m.dense_loss - 1 for m in measured],
            "",
            "value <= 0.005",
            "measured",
            note="pooled keys against pooled queries, own and first block always; lists of "
            f"{', '.join(str(m.width) for m in measured)} of {BLOCKS} blocks for each query block, "
            "sequence and key "
            "head: the shortest of "
            f"{', '.join(map(str, WIDTHS))} that are within half of that on other sequences",
        ),
    ]
    if answers := [m.answers for m in measured if m.answers is not None]:
        found += _answers(name, answers, seq_len)
    return found


def _answers(name: str, answers: list[tuple[float, float]], seq_len: int) -> list[Row]:
    chance = task_of(name, seq_len).chance
    return [
        Row.judged(
            f"{name}: … and no answers",
            "share of right answers lost",
            [a - b for a, b in answers],
            "",
            "value <= 0.005",
            "measured",
            note=f"dense attention gives {', '.join(f'{a:.3f}' for a, _ in answers)} of "
            f"the answers of {ANSWERS} fresh sequences; chance {chance:.3f}",
        ),
        Row.judged(
            f"{name}: … which dense attention knows",
            "share of right answers",
            [a for a, _ in answers],
            "",
            "value >= 0.95",
            "measured",
            note=f"length {seq_len}, {ANSWERS} fresh sequences; else the rows above say nothing",
        ),
    ]


def planned(name: str, measured: list[Measured]) -> tuple[list[Row], list[Baseline], ModelPlan]:
    """Bytes, balance and predicted time of the adaptive plan on the masks; every method's bytes and
    the plan of the first seed."""
    problems = [problem_of(m.masks_NxWxW, "bytes") for m in measured]
    plans = [planner.plan(p) for p in problems]
    uniform = [baselines.uniform_any(p) for p in problems]
    table = baselines.baselines(problems[0])
    far = [
        simulate.predict(simulate.GQA_8B, problem_of(m.masks_NxWxW, "seconds", draws=200))
        for m in measured
    ]
    found = [
        Row.judged(
            f"{name}: adaptive plan sends less than the best uniform one",
            "bytes, forward and backward",
            [p.bytes for p in plans],
            "bytes",
            "ratio <= 0.7",
            "counted",
            "best uniform plan of any kind",
            [u.bytes for u in uniform],
            note=f"these masks magnified to {FAR:,} tokens, 32 query and 8 key heads, cp = {CP}; "
            "closed formulas, "
            f"padding of static shapes included: {baselines.summary(plans[0])} against "
            f"{baselines.describe(uniform[0].plans[0])}; need-only bound "
            f"{min(r.bytes for r in table):,.0f}",
        ),
        Row.judged(
            f"{name}: … in balance",
            "max/mean FLOPs",
            [p.imbalance for p in plans],
            "",
            "value <= 1.1",
            "counted",
            note="a limit of the planner, adaptive and uniform alike",
        ),
        Row.judged(
            f"{name}: … and is faster at 128K on InfiniBand",
            "step time over that of the best uniform plan",
            [f.ratio for f in far],
            "",
            "value <= 0.9",
            "simulated",
            ci=(min(f.low for f in far), max(f.high for f in far)),
            note=f"the same masks and shape, planned for time: {far[0].adaptive_plan} against "
            f"{far[0].uniform_plan}; {simulate.evidence(simulate.INFINIBAND)}",
        ),
    ]
    return found, table, plans[0]


def exactness(arm: Arm, masks_NxWxW: np.ndarray, tiny: bool) -> list[Row]:
    """Exact plans against one device, and plans and lists as data in one compiled program; `tiny`:
    fewer of them.
    """
    found = [checks.compare(plan) for plan in (checks.PLANS[::9] if tiny else checks.PLANS)]
    tokens = arm.data.val.take([0, 1])["tokens"]
    rows = [
        Row.judged(
            "every plan equals attention on one device",
            "largest relative error, forward",
            max(f.output_error for f in found),
            "",
            "<= 1e-5",
            "measured",
            note=f"{len(found)} plans × layouts, causal, cp = 8, float32",
        ),
        Row.judged(
            "… and so do its gradients",
            "largest relative error of dq, dk, dv",
            max(f.gradient_error for f in found),
            "",
            "<= 1e-4",
            "measured",
            note="custom backward of the ring included",
        ),
        Row.judged(
            "bytes of every plan equal the closed formula",
            "ops that differ",
            sum(len(f.mismatches()) for f in found),
            "",
            "== 0",
            "counted",
            note="compiled HLO, forward and backward, to the byte",
        ),
    ]
    if arm.model.shape.heads % checks.DEVICES:
        return rows
    switches = [(LISTED, checks.switch_listed(arm, tokens, masks_NxWxW))]
    if not tiny:
        switches.append((ALL, checks.switch_plans(arm, tokens)))
        switches.append((CHOSEN, checks.switch_indexed(arm, tokens, BLOCKS, 8)))
    fixed = checks.static_plan(arm, tokens, masks_NxWxW)
    arrays = "; ".join(f"{what}: {s.arrays} plan arrays" for what, s in switches)
    return [
        *rows,
        Row.judged(
            "a changed plan compiles nothing again",
            "programs compiled",
            max(s.compilations for _, s in switches),
            "",
            "== 1",
            "counted",
            note=f"loss and gradients of the trained model, one program each: {arrays}",
        ),
        Row.judged(
            "… and gives one device's loss and gradients",
            "largest relative error",
            max(max(s.loss_error, s.gradient_error) for _, s in switches),
            "",
            "<= 1e-4",
            "measured",
            note="; ".join(
                f"{what}: {BRANCHES[what]}, and all of them by layer" for what, _ in switches
            ),
        ),
        Row.judged(
            "a program compiled for one plan agrees",
            "largest relative error",
            max(fixed.output_error, fixed.gradient_error),
            "",
            "<= 1e-4",
            "measured",
            note="gather, Ulysses and all-gather by layer as constants of the program, against one "
            "device",
        ),
        Row.judged(
            "… and sends what its layers' formulas add up to",
            "ops that differ",
            len(fixed.mismatches()),
            "",
            "== 0",
            "counted",
            note=f"HLO, bytes a device: {_bytes_text(fixed.counted)}",
        ),
    ]


def _bytes_text(sent: Mapping[Key, float]) -> str:
    return ", ".join(f"{op} {wire:,.0f}" for (op, _), wire in sorted(sent.items()) if wire)


def adapted(name: str, found: list[runtime.Adapted]) -> list[Row]:
    """Training that goes on with measured masks and plans of its own for every layer."""
    first = found[0]
    last = first.windows[-1]
    mean = lambda key: [float(np.mean([getattr(w, key) for w in f.windows])) for f in found]
    plans = ", ".join(baselines.describe(plan) for plan in last.plans)
    return [
        Row.judged(
            f"{name}: training on with a plan for every layer costs little",
            "relative change of the validation loss",
            [f.loss / f.dense_loss - 1 for f in found],
            "",
            "value <= 0.005",
            "measured",
            note=f"{len(first.windows)} windows, {first.steps} steps after the trained state, "
            "against the same steps "
            "with dense attention; masks measured and plans chosen anew in each window; last "
            "window keeps "
            f"{' '.join(f'{s:.2f}' for s in last.share_N)} of the causal blocks and runs {plans}; "
            "plans changed "
            f"{', '.join(str(f.switches) for f in found)} time(s)",
        ),
        Row.judged(
            f"{name}: … and sends less than one plan for all",
            "bytes of attention a step and device",
            mean("bytes"),
            "bytes",
            "ratio <= 0.7",
            "counted",
            "best uniform plan with lists",
            mean("uniform"),
            note="the run's own shape, mean over windows, planned for bytes",
        ),
    ]


def native_sparse(pairs: list[tuple[float, float]], steps: int, budget: Budget, length: int) -> Row:
    """Training with native sparse attention from the start: (dense, sparse) validation losses."""
    read, all_keys = budget.tokens(length), (length + 1) / 2
    return Row.judged(
        "text: native sparse attention trains as well",
        "relative change of the validation loss",
        [sparse / dense - 1 for dense, sparse in pairs],
        "",
        "value <= 0.005",
        "measured",
        note=f"{steps} steps of each; a query reads {read:.1f} tokens in the mean, "
        f"{read / all_keys:.2f} of what dense attention reads: blocks of {budget.compress_block} "
        f"compressed every {budget.stride}, {budget.selected} of {budget.select_block} in full, a "
        f"window of {budget.window}; nats/token dense {np.mean([a for a, _ in pairs]):.4f}",
    )


def region(found: simulate.Region) -> Row:
    share = found.share(1)
    return Row.judged(
        "adaptive plans pay on InfiniBand over densities and lengths",
        "share of the grid at least 10 % faster",
        share,
        "",
        "value >= 0.5",
        "simulated",
        note=f"synthetic masks, layers {found.spread:g}-fold apart in density: densities "
        f"{found.densities} × lengths "
        f"{found.lengths}; NVLink {found.share(0):.0%}, congested InfiniBand {found.share(2):.0%}",
    )
