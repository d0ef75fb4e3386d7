"""A parallel plan for a model on chips, checked, and a table of such jobs as arrays that the cost
models read.

Degrees: n = pp·dp·cp·tp chips; experts are sharded over `ep` inside dp·cp·tp (Megatron's parallel
folding), each expert over `etp`. Batches in sequences. One microbatch is `microbatch` sequences on
a dp rank."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fdp.keys import UserError
from fdp.models.shape import ModelShape
from fdp.price.hardware import CHIPS, Chip, Cluster

if TYPE_CHECKING:
    from fdp.experiment import Experiment

RECOMPUTE = ("none", "selective", "full")
PRECISIONS = ("fp16", "bf16", "fp8", "fp4")


@dataclass(frozen=True)
class Plan:
    """Degrees and schedule of one training job."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    virtual: int = 1  # interleaved chunks a stage
    microbatch: int = 1
    zero: int = 1  # 0 replicated, 1 optimizer state, 2 and gradients, 3 and parameters sharded
    shards: int = 0  # ranks that ZeRO-3 shards over (0: all of dp·cp); more are replicas (HSDP)
    recompute: str = "none"
    sequence_parallel: bool = True

    @property
    def chips(self) -> int:
        """Chips in all."""
        return self.tp * self.pp * self.dp * self.cp


@dataclass(frozen=True)
class Job:
    """What is trained, how, and on what. `causal`: whether a token sees only earlier ones, as its
    objective allows. `modern`: fused attention, sequence parallelism and overlap (after 2022).
    """

    shape: ModelShape
    plan: Plan
    chip: Chip
    batch: int
    seq: int
    precision: str = "bf16"
    domain: int = 0  # chips on one fast network; 0: as the chip has
    modern: bool = True
    lora: bool = False
    scale_out: float = 0.0  # bytes/s per chip between nodes; 0: as the chip has
    stack: str = ""  # software and release, where its speed was fitted
    cluster: str = ""  # where its network was fitted
    causal: bool = True

    @property
    def microbatches(self) -> int:
        """Microbatches a step and dp rank."""
        return self.batch // (self.plan.dp * self.plan.microbatch)


def of_experiment(e: "Experiment", chip: Chip) -> Job:
    """The job of an experiment of this code base on `chip`. Raises ValueError as `check` does.

    Without experts ep is data parallelism; the hidden width of experts lies over tp. ZeRO shards
    over dp alone, and ranks of ep and cp are replicas. remat=dots recomputes the scores, as
    selective recomputation does. Block diffusion reads twice its length. The XLA attention keeps
    its scores, as software before 2022 did: `modern` is False."""
    m, d, micro = e.model.shape, e.degrees, e.grads.microbatches
    dp = d["dp"] * d["ep"]
    plan = Plan(
        d["tp"],
        d["pp"],
        dp,
        d["cp"],
        microbatch=max(e.fit.batch // (dp * micro), 1),
        zero=e.zero,
        shards=d["dp"],
        recompute={"none": "none", "dots": "selective", "full": "full"}[m.remat],
        sequence_parallel=m.sequence_parallel,
        **({"ep": d["ep"], "etp": d["tp"]} if m.experts else {}),
    )
    mask = getattr(e.objective, "mask", None)  # of token objectives; others see everything
    causal = mask is not None and mask(e.data.seq_len or 1).kind == "causal"
    job = Job(m, plan, chip, e.fit.batch, e.input_length, causal=causal, modern=False)
    check(job)
    return job


def weakest(cluster: Cluster) -> Chip:
    """The chip that a mixed cluster is priced with: its slowest, with the least memory and links of
    any.

    A synchronous step waits for the slowest chip, and one plan has to fit into every one. FP8 and
    FP4 need all of them."""
    chips = [g.chip for g in cluster.groups]

    def least(key: str) -> Any:
        values = [getattr(c, key) for c in chips]
        return None if None in values else min(values)

    same = (
        "peak_fp8_flops",
        "peak_fp4_flops",
        "hbm_bytes",
        "hbm_bandwidth",
        "scale_up_bandwidth",
        "scale_up_links",
    )
    out = [c.scale_out_bandwidth for c in chips if c.scale_out_bandwidth]
    return dataclasses.replace(
        cluster.chip,
        **{key: least(key) for key in same},
        scale_out_bandwidth=min(out) if out else None,
    )


def domain_of(cluster: Cluster) -> int:
    """Chips on one fast network: a pod's torus, else an NVLink domain that no smaller node cuts
    short.
    """
    return min(
        g.chip.domain if g.chip.scale_out_bandwidth is None else min(g.chip.domain, g.chips)
        for g in cluster.groups
    )


def job_on(
    a: ModelShape,
    cluster: Cluster,
    batch: int,
    seq: int,
    precision: str = "bf16",
    causal: bool = True,
) -> Job:
    """The job to plan for; its own plan is a placeholder. Raises UserError where a chip lacks the
    precision.
    """
    chip = weakest(cluster)
    rates = {
        "fp16": chip.peak_bf16_flops,
        "bf16": chip.peak_bf16_flops,
        "fp8": chip.peak_fp8_flops,
        "fp4": chip.peak_fp4_flops,
    }
    if precision not in rates:
        raise UserError(f"precision {precision!r} is unknown: {', '.join(rates)}")
    if rates[precision] is None:
        able = [name for name, c in CHIPS.items() if getattr(c, f"peak_{precision}_flops")]
        raise UserError(
            f"{cluster.name} has a chip without {precision}: set precision=bf16 or take one "
            f"of {able}"
        )
    domain = domain_of(cluster)
    return Job(a, Plan(dp=cluster.size), chip, batch, seq, precision, domain, causal=causal)


def check(job: Job) -> None:
    """Raise ValueError with the equation, its values and a fix where the plan cannot run at all."""
    a, p = job.shape, job.plan
    for key in ("tp", "pp", "dp", "cp", "ep", "etp", "virtual", "microbatch"):
        if getattr(p, key) < 1:
            raise ValueError(f"{key}={getattr(p, key)} must be at least 1")
    if job.batch < 1 or job.seq < 1:
        raise ValueError(f"batch={job.batch} and seq={job.seq} must be at least 1")
    _divides("heads", a.heads, "tp", p.tp)
    _divides("batch", job.batch, "dp·microbatch", p.dp * p.microbatch)
    _divides("sequence length", job.seq, "cp", p.cp)
    if p.pp * p.virtual > a.layers:
        raise ValueError(
            f"pp·virtual = {p.pp}·{p.virtual} exceeds layers = {a.layers}: lower pp or virtual"
        )
    if p.ep > 1:
        if not a.experts:
            raise ValueError(f"ep={p.ep}, but {a.name} has no experts: set ep=1")
        _divides("experts", a.experts, "ep", p.ep)
        _divides("dp·cp·tp", p.dp * p.cp * p.tp, "ep·etp", p.ep * p.etp)
    if (
        p.recompute not in RECOMPUTE
        or job.precision not in PRECISIONS
        or p.zero not in (0, 1, 2, 3)
    ):
        raise ValueError(
            f"recompute={p.recompute!r}, precision={job.precision!r} or zero={p.zero} is none of "
            f"{RECOMPUTE}, {PRECISIONS}, 0..3"
        )


def _divides(what: str, value: int, by: str, divisor: int) -> None:
    if value % divisor:
        near = max(d for d in range(1, divisor + 1) if value % d == 0)
        raise ValueError(
            f"{what} {value} is not divisible by {by} = {divisor}: set {by} to {near} or another "
            "divisor"
        )


Columns = dict[str, np.ndarray]


def columns(jobs: Iterable[Job]) -> Columns:
    """One float64 array (N,) per quantity; lists `stack` and `cluster` as object arrays. Jobs are
    not checked.
    """
    rows = [_row(job) for job in jobs]
    names = rows[0] if rows else {}
    return {
        k: np.array([r[k] for r in rows], object if k in ("stack", "cluster", "chip") else float)
        for k in names
    }


def _row(job: Job) -> dict[str, object]:
    a, p, c = job.shape, job.plan, job.chip
    into, out = a.attention_parameters()
    peaks = {
        "fp16": c.peak_bf16_flops,
        "bf16": c.peak_bf16_flops,
        "fp8": c.peak_fp8_flops or c.peak_bf16_flops,
        "fp4": c.peak_fp4_flops or c.peak_fp8_flops or c.peak_bf16_flops,
    }
    links = c.scale_up_bandwidth * max(c.scale_up_links // 2, 1)
    return {
        "layers": a.layers,
        "moe_layers": a.moe_layers,
        "width": a.width,
        "heads": a.heads,
        "kv_width": a.kv_heads * a.head_dim,
        "head_dim": a.head_dim,
        "value_dim": a.value_dim or a.head_dim,
        "causal": job.causal,
        "into": into,
        "out": out,
        "ffn": a.ffn,
        "projections": a.projections,
        "experts": max(a.experts, 1),
        "topk": a.topk,
        "moe_ffn": a.moe_ffn,
        "shared": a.shared_experts,
        "vocab": a.vocab,
        "tied": a.tied,
        "tp": p.tp,
        "pp": p.pp,
        "dp": p.dp,
        "cp": p.cp,
        "ep": p.ep,
        "etp": p.etp,
        "virtual": p.virtual,
        "microbatch": p.microbatch,
        "microbatches": max(job.batch / (p.dp * p.microbatch), 1.0),
        "zero": p.zero,
        "shards": p.shards or p.dp * p.cp,
        "full": p.recompute == "full",
        "selective": p.recompute == "selective",
        "sp": p.sequence_parallel and p.tp > 1,
        "batch": job.batch,
        "seq": job.seq,
        "modern": job.modern,
        "lora": job.lora,
        "fp16": job.precision == "fp16",
        "fp8": job.precision == "fp8",
        "fp4": job.precision == "fp4",
        "peak": peaks[job.precision],
        "peak16": c.peak_bf16_flops,
        "hbm": c.hbm_bandwidth,
        "hbm_bytes": c.hbm_bytes,
        "up": links,
        "out_bw": job.scale_out or c.scale_out_bandwidth or 6.25e9,
        "domain": job.domain or c.domain,
        "stack": job.stack,
        "cluster": job.cluster,
        "chip": c.name,
    }
