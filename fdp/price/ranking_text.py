"""A ranking of plans written out: the table with its reasons for the terminal, and the config file
that trains the fastest plan that this code base can train."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from tabulate import tabulate

from fdp.config import MODEL
from fdp.models.shape import SIZES, ModelShape
from fdp.price.hardware import GIB, Cluster
from fdp.price.space import name_of
from fdp.price.workload import Plan

if TYPE_CHECKING:
    from fdp.price.ranking import Ranking

PLANNED = ("dtype", "remat", "sequence_parallel")  # of a ModelShape, by the plan


def describe(ranking: "Ranking") -> str:
    """The table for the terminal and, below it, why each plan lost to the first."""
    job, heads = (
        ranking.job,
        ("", "plan", "s/step", "90 %", "GiB", "kJ", "tokens/J", "GB by axis", "bottleneck"),
    )
    rows = []
    for i, r in enumerate(ranking.plans, 1):
        power = (
            (f"{r.joules / 1e3:.4g}", f"{r.tokens_per_joule:.2f}")
            if np.isfinite(r.joules)
            else ("–", "–")
        )
        moved = " ".join(f"{a} {v / 1e9:.3g}" for a, v in r.traffic.items() if v > 0) or "none"
        interval = f"{r.low:.3g}–{r.high:.3g}"
        rows.append(
            (
                i,
                name_of(r.plan),
                f"{r.time:.3g}",
                interval,
                f"{r.memory / GIB:.0f}",
                *power,
                moved,
                r.bottleneck,
            )
        )
    mixed = (
        " (a mixed cluster, priced with its weakest chip)"
        if len({g.chip.name for g in ranking.cluster.groups}) > 1
        else ""
    )
    title = (
        f"{job.shape.name} on {ranking.cluster.name}{mixed}: {ranking.cluster.size} chips, "
        f"batch {job.batch} × "
        f"{job.seq} tokens, {job.precision}; {ranking.valid} valid plans, {ranking.feasible} "
        "probably run"
    )
    lost = [f"{i:2d}  {r.why}" for i, r in enumerate(ranking.plans, 1)]
    table = tabulate(rows, heads, disable_numparse=True)
    return "\n".join(
        [
            title,
            table,
            _evidence(ranking.cluster),
            "",
            "against the first, in % of its time:",
            *lost,
        ]
    )


def _evidence(cluster: Cluster) -> str:
    """What the numbers of a plan are worth."""
    unfitted = sorted({g.chip.name for g in cluster.groups if g.chip.scale_out_bandwidth is None})
    foreign = (
        f"; no {' or '.join(unfitted)}, no TPU at all, was in the fit: an extrapolation"
        if unfitted
        else ""
    )
    known = (
        "simulated: cost model fitted on published runs; intervals cover 90 % of held-out models"
    )
    return f"{known}{foreign}"


def fragment(ranking: "Ranking", topic: str) -> str:
    """Text of a config file for `python -m fdp.train --config=FILE --dry_run` with the fastest plan
    that is written out (no pipeline); comments alone where it cannot build the
    model or no such plan fits. `topic`: the one that trains it, to be named in the file."""
    job, best = ranking.job, ranking.plans[0]
    lines = [f'"""{job.shape.name} on {ranking.cluster.name}: written by the planner."""', ""]
    lines.append(f"# Fastest plan: {name_of(best.plan)}, {best.time:.3g} s a step (predicted).")
    r = ranking.trainable
    if r is None:
        missing = (
            ", ".join(job.shape.unbuildable)
            or "nothing of the model, but no plan without pipeline fits"
        )
        lines += [
            f"# No config can be written for it; what is missing: {missing}.",
            f"PLAN = {dataclasses.asdict(best.plan)!r}",
        ]
        return "\n".join(lines) + "\n"
    slower = 100 * (r.time / best.time - 1)
    lines += [
        "# Below: the fastest plan that can be written here (no pipeline, attention that "
        "is not fused),",
        f"# {name_of(r.plan)}, {r.time:.3g} s a step (predicted), {slower:.0f} % slower.",
    ]
    if job.precision in ("fp8", "fp4"):
        lines.append(
            f"# Planned in {job.precision}; this code base trains in bfloat16, so it will be "
            "slower than predicted."
        )
    return "\n".join([*lines, _config_text(ranking, r.plan, topic)]) + "\n"


def _experts(a: ModelShape) -> str:
    """Keys of `model.moe`."""
    named = {"experts": a.experts, "topk": a.topk, "ffn": a.moe_ffn, "shared": a.shared_experts}
    named |= {"first_dense": a.first_dense, "every": a.moe_every}
    return ", ".join(f"{key}={value}" for key, value in named.items())


def _config_text(ranking: "Ranking", p: Plan, topic: str) -> str:
    job, a = ranking.job, ranking.job.shape
    switches = [f.name for f in dataclasses.fields(a) if getattr(a, f.name) != f.default]
    switches = [k for k in switches if k in MODEL and k not in (*SIZES, *PLANNED)]
    shape = ", ".join(f"{k}={getattr(a, k)!r}" for k in (*SIZES, *switches))
    topology = ranking.cluster.name if len(ranking.cluster.groups) == 1 else ""
    target = (
        []
        if topology
        else [
            "    # hardware.topology holds one kind of chip, so a mixed cluster cannot be named "
            "there."
        ]
    )
    return "\n".join(
        [
            "from fdp import config",
            "",
            "",
            'def get_config(variant="pod"):',
            f'    c = config.base(**config.topic_sections("{topic}"))',
            f'    c.topic, c.variant = "{topic}", config.check_variant(variant)',
            f"    c.model.update({shape})",
            f'    c.model.update(dtype="bfloat16", remat="{p.recompute}", '
            f"sequence_parallel={p.tp > 1})",
            f'    c.objective.name = "{"autoregressive" if job.causal else "mdlm"}"',
            *([f"    c.model.moe.update({_experts(a)})"] if a.experts else []),
            f"    c.mesh.update(pp=1, dp={p.dp // p.ep}, ep={p.ep}, cp={p.cp}, tp={p.tp})",
            f"    c.data.update(seq_len={job.seq}, vocab={min(1024, a.vocab)})",
            f"    c.train.update(batch={job.batch}, "
            f"microbatches={job.batch // (p.dp * p.microbatch)}, zero={p.zero})",
            *target,
            f'    c.hardware.topology = "{topology}"',
            "    return config.lock(c)",
        ]
    )
