"""From measurements to rows of the report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdp.count.compare import Comparison, Key
from fdp.data.recall import task_of
from fdp.models.nsa import Budget
from fdp.parallel.context.planner import describe
from fdp.parallel.context.planner_machine import CONGESTED, INFINIBAND, NVLINK
from fdp.study.context_switching import Switching
from fdp.study.grid import Grid
from fdp.study.report import Row
from fdp.topics.adaptive_cp.densities import History, spearman
from fdp.topics.adaptive_cp.measured import ANSWERS, WIDTHS, Measured, share
from fdp.topics.adaptive_cp.planned import CP, FAR, Planned
from fdp.topics.adaptive_cp.predict import SPREAD, evidence
from fdp.topics.adaptive_cp.runtime import Adapted
from fdp.topics.adaptive_cp.settings import BLOCKS

FASTER = "<= 0.9"  # step time of the adaptive plan over that of the best uniform one
BRANCHES = {  # of the programs of `fdp.study.context_switching`
    "listed blocks": "gather that fits, gather of at most one block with its exact fallback, "
    "Ulysses, all-gather",
    "all keys": "ring, USP, Ulysses",
    "8 blocks chosen by each input": "gather with its exact fallback, Ulysses, all-gather",
}


def _row(
    claim: str, metric: str, values: Any, threshold: str, evidence: str, note: str, **more: Any
) -> Row:
    """A number without unit."""
    return Row.judged(claim, metric, values, "", threshold, evidence, note=note, **more)


def _costs_little(claim: str, losses: Sequence[tuple[float, float]], note: str) -> Row:
    """(loss, loss of dense attention) of every seed."""
    change = [loss / dense - 1 for loss, dense in losses]
    metric = "relative change of the loss"
    return _row(claim, metric, change, "value <= 0.005", "measured", note)


def _bytes(claim: str, metric: str, mine: Any, bar: str, theirs: Any, **more: Any) -> Row:
    """Bytes on the wire against those of the best uniform plan."""
    given = claim, metric, mine, "bytes", "ratio <= 0.7", "counted", bar, theirs
    return Row.judged(*given, **more)


def _differ(claim: str, comparisons: Sequence[Comparison], note: str) -> Row:
    """Programs whose compiled bytes must be those of the formula."""
    wrong = sum(len(c.mismatches()) for c in comparisons)
    return _row(claim, "ops that differ", wrong, "== 0", "counted", note)


# What a model attends to
# -------------------------------------------------------------------------------------------------


def density(name: str, decides: bool, found: list[History]) -> list[Row]:
    """Do layers differ, and do they keep their order? Over the last 500 steps, or all there are."""
    last = [h.density_NxT[:, -1] for h in found]
    first = [next(i for i, s in enumerate(h.steps) if s >= h.steps[-1] - 500) for h in found]
    early = [h.density_NxT[:, i] for h, i in zip(found, first, strict=True)]
    span = found[0].steps[-1] - found[0].steps[first[0]]
    final = "; ".join(" ".join(f"{x:.2f}" for x in d) for d in last)
    return [
        _row(
            f"{name}: layers differ in density",
            "max/min over layers, blocks for 95 % of the mass",
            [float(d.max() / d.min()) for d in last],
            "value >= 4",
            "measured",
            f"densities by layer after training: {final}",
            decides=decides,
        ),
        _row(
            f"{name}: … in a stable order",
            f"Spearman correlation of layers, {span} steps apart",
            [spearman(a, b) for a, b in zip(early, last, strict=True)],
            "value >= 0.8",
            "measured",
            f"{len(found)} seed(s), {len(last[0])} layers",
        ),
    ]


def masks(name: str, seq_len: int, found: list[Measured]) -> list[Row]:
    """What the masks cost: loss, and answers of a recall task."""
    kept = "; ".join(" ".join(f"{s:.2f}" for s in share(m.masks_NxWxW)) for m in found)
    dense = [m.dense_loss for m in found]
    rows = [
        _costs_little(
            f"{name}: measured masks cost little",
            [(m.sparse_loss, m.dense_loss) for m in found],
            f"held-out sequences; share of causal blocks kept by layer {kept}; coverage "
            f"{_list(m.coverage for m in found)}; nats/token dense {np.mean(dense):.4f}",
        ),
        _costs_little(
            f"{name}: lists made from each input cost little",
            [(m.indexed_loss, m.dense_loss) for m in found],
            "pooled keys against pooled queries, own and first block always; lists of "
            f"{_list(m.width for m in found)} of {BLOCKS} blocks for each query block, sequence "
            f"and key head: the shortest of {_list(WIDTHS)} that are within half of that on other "
            "sequences",
        ),
    ]
    answers = [m.answers for m in found if m.answers is not None]
    return [*rows, *(_answers(name, answers, seq_len) if answers else [])]


def _answers(name: str, answers: list[tuple[float, float]], seq_len: int) -> list[Row]:
    known, chance = [dense for dense, _ in answers], task_of(name, seq_len).chance
    return [
        _row(
            f"{name}: … and no answers",
            "share of right answers lost",
            [dense - sparse for dense, sparse in answers],
            "value <= 0.005",
            "measured",
            f"dense attention gives {_list(f'{a:.3f}' for a in known)} of the answers of {ANSWERS} "
            f"fresh sequences; chance {chance:.3f}",
        ),
        _row(
            f"{name}: … which dense attention knows",
            "share of right answers",
            known,
            "value >= 0.95",
            "measured",
            f"length {seq_len}, {ANSWERS} fresh sequences; else the rows above say nothing",
        ),
    ]


def _list(values: Any) -> str:
    return ", ".join(map(str, values))


# Plans
# -------------------------------------------------------------------------------------------------


def planned(name: str, decides: bool, found: list[Planned]) -> list[Row]:
    """Bytes, balance and predicted time of the adaptive plan on the masks."""
    first, steps = found[0], [f.step for f in found]
    need_only = min(m.bytes for m in first.methods if np.isfinite(m.bytes))
    return [
        _bytes(
            f"{name}: adaptive plan sends less than the best uniform one",
            "bytes, forward and backward",
            [f.bytes for f in found],
            "best uniform plan of any kind",
            [f.uniform_bytes for f in found],
            note=f"these masks scaled up to {FAR:,} tokens, 32 query and 8 key heads, cp = {CP}; "
            f"closed formulas, padding of static shapes included: {first.plans} against "
            f"{first.uniform_plan}; need-only bound {need_only:,.0f}",
            decides=decides,
        ),
        _row(
            f"{name}: … in balance",
            "max/mean FLOPs",
            [f.imbalance for f in found],
            "value <= 1.1",
            "counted",
            note="a limit of the planner, adaptive and uniform alike",
        ),
        _row(
            f"{name}: … and is faster at 128K on InfiniBand",
            "step time over that of the best uniform plan",
            [s.ratio for s in steps],
            f"value {FASTER}",
            "simulated",
            ci=(min(s.low for s in steps), max(s.high for s in steps)),
            note=f"the same masks and shape, planned for time: {steps[0].adaptive_plan} against "
            f"{steps[0].uniform_plan}; {evidence()}",
            decides=decides,
        ),
    ]


def adapted(name: str, found: list[Adapted]) -> list[Row]:
    """Training that goes on with measured masks and plans of its own for every layer."""
    first, last = found[0], found[0].windows[-1]
    return [
        _row(
            f"{name}: training on with a plan for every layer costs little",
            "relative change of the validation loss",
            [f.loss / f.dense_loss - 1 for f in found],
            "value <= 0.005",
            "measured",
            f"{len(first.windows)} windows, {first.steps} steps after the trained state, against "
            "the same steps with dense attention; masks measured and plans chosen anew in each "
            f"window; last window keeps {' '.join(f'{s:.2f}' for s in last.share_N)} of the causal "
            f"blocks and runs {_list(map(describe, last.plans))}; plans changed "
            f"{_list(f.switches for f in found)} time(s)",
        ),
        _bytes(
            f"{name}: … and sends less than one plan for all",
            "bytes of attention a step and device",
            [float(np.mean([w.bytes for w in f.windows])) for f in found],
            "best uniform plan with lists",
            [float(np.mean([w.uniform for w in f.windows])) for f in found],
            note="the run's own shape, mean over windows, planned for bytes",
        ),
    ]


def region(found: Grid) -> Row:
    """Where adaptive plans would pay."""
    share = {fabric: found.share(FASTER, fabric=fabric) for fabric in found.axes["fabric"]}
    return _row(
        "adaptive plans pay on InfiniBand over densities and lengths",
        "share of the grid at least 10 % faster",
        share[INFINIBAND],
        "value >= 0.5",
        "simulated",
        note=f"synthetic masks, layers {SPREAD:g}-fold apart in density: densities "
        f"{found.axes['density']} × lengths {found.axes['length']}; NVLink {share[NVLINK]:.0%}, "
        f"congested InfiniBand {share[CONGESTED]:.0%}",
    )


# Exactness, native sparse attention
# -------------------------------------------------------------------------------------------------


def plans(found: list[Comparison]) -> list[Row]:
    """Exact plans against one device."""
    return [
        _row(
            "every plan equals attention on one device",
            "largest relative error, forward",
            max(f.output_error for f in found),
            "<= 1e-5",
            "measured",
            f"{len(found)} plans × layouts, causal, cp = 8, float32",
        ),
        _row(
            "… and so do its gradients",
            "largest relative error of dq, dk, dv",
            max(f.gradient_error for f in found),
            "<= 1e-4",
            "measured",
            "custom backward of the ring included",
        ),
        _differ(
            "bytes of every plan equal the closed formula",
            found,
            "compiled HLO, forward and backward, to the byte",
        ),
    ]


def switched(listed: tuple[Switching, Comparison], more: list[Switching]) -> list[Row]:
    """Plans and lists as data in one compiled program, and as constants of another."""
    fixed = listed[1]
    found = dict(zip(BRANCHES, (listed[0], *more), strict=False))
    arrays = "; ".join(f"{what}: {s.arrays} plan arrays" for what, s in found.items())
    branches = "; ".join(f"{what}: {BRANCHES[what]}, and all of them by layer" for what in found)
    return [
        _row(
            "a changed plan compiles nothing again",
            "programs compiled",
            max(s.compilations for s in found.values()),
            "== 1",
            "counted",
            note=f"loss and gradients of the trained model, one program each: {arrays}",
        ),
        _row(
            "… and gives one device's loss and gradients",
            "largest relative error",
            max(max(s.loss_error, s.gradient_error) for s in found.values()),
            "<= 1e-4",
            "measured",
            branches,
        ),
        _row(
            "a program compiled for one plan agrees",
            "largest relative error",
            max(fixed.output_error, fixed.gradient_error),
            "<= 1e-4",
            "measured",
            "gather, Ulysses and all-gather by layer as constants of the program, against one "
            "device",
        ),
        _differ(
            "… and sends what its layers' formulas add up to",
            [fixed],
            f"HLO, bytes a device: {_sent(fixed.counted)}",
        ),
    ]


def _sent(counted: Mapping[Key, float]) -> str:
    return _list(f"{op} {wire:,.0f}" for (op, _), wire in sorted(counted.items()) if wire)


def native_sparse(
    dense: list[float], sparse: list[float], steps: int, budget: Budget, length: int
) -> Row:
    """Validation losses of training with dense and with native sparse attention from the start."""
    read, all_keys = budget.tokens(length), (length + 1) / 2
    return _row(
        "text: native sparse attention trains as well",
        "relative change of the validation loss",
        [s / d - 1 for s, d in zip(sparse, dense, strict=True)],
        "value <= 0.005",
        "measured",
        f"{steps} steps of each; a query reads {read:.1f} tokens in the mean, "
        f"{read / all_keys:.2f} of what dense attention reads: blocks of {budget.compress_block} "
        f"compressed every {budget.stride}, {budget.selected} of {budget.select_block} in full, a "
        f"window of {budget.window}; nats/token dense {np.mean(dense):.4f}",
    )
