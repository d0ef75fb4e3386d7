"""From a model and a cluster to the ten fastest parallel plans: every structurally valid plan is
priced and ranked.

    here = cluster("h100:32x8")
    job = job_on(named("llama3-70b"), here, 1024, 4096)
    print(ranking_text.describe(rank(hybrid.shipped(), job, here)))

Search space and its divisibility: Narayanan et al. 2021 (arXiv 2104.04473; interleaving),
Korthikanti et al. 2022 (sequence parallelism, recomputation), Rajbhandari et al. 2020 (ZeRO),
Megatron Core's parallel folding of experts.

Legend: N plans of the space, K of them ranked; seconds, bytes, joules."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_collections
import numpy as np

from fdp.config import UserError
from fdp.models.shape import ModelShape
from fdp.price import hardware, hybrid, shapes, workload
from fdp.price.hardware import GIB, Chip, Cluster
from fdp.price.hybrid import Model, Prediction
from fdp.price.workload import RECOMPUTE, Columns, Job, Plan
from fdp.topics.parallelism_search.traffic import AXES, joules, traffic

Space = dict[str, np.ndarray]  # "tp", "pp", … (N,) integers; "recompute" indexes RECOMPUTE

KEYS = ("tp", "pp", "dp", "cp", "ep", "etp", "virtual", "microbatch", "recompute", "zero")
# chunks a stage; published runs hold hardly any above, and their cost per chunk is not known
VIRTUAL_LIMIT = 12
# more ranks than this leave matmuls too thin for any chip; fewer are priced, also across nodes
TP_LIMIT = 64
# fewest tokens of a sequence on a rank: the balanced ring halves them, kernels work in tiles of 128
CP_SHARE = 256
# plans priced at once: one compiled program, whose radial basis functions stay in a cache of 8 MB
CHUNK = 2048
KEPT = 10
LIKELY = 0.5  # least probability of running that is ranked
# Most that the compiler takes for a step of this code base, over `footprint.memory` of the same
# plan: float32 gradients and the FFN's float32 intermediates. Compiled for v5p and H100 by the
# ahead-of-time tests.
OWN_MEMORY = 1.5


def _divisors(n: int) -> np.ndarray:
    return np.flatnonzero(n % np.arange(1, n + 1) == 0) + 1


def _cross(points: Space, name: str, values: np.ndarray) -> Space:
    """Every point with every value of a further coordinate."""
    n = len(next(iter(points.values())))
    out = {k: np.repeat(v, len(values)) for k, v in points.items()}
    return out | {name: np.tile(values, n)}


def _keep(points: Space, mask: np.ndarray) -> Space:
    return {k: v[mask] for k, v in points.items()}


def _degrees(a: ModelShape, chips: int, seq: int) -> Space:
    """(tp, pp, cp, dp) with tp·pp·cp·dp = chips that the model's shapes allow, before the batch is
    looked at.
    """
    sides = _divisors(chips)
    tp, pp, cp = (
        g.ravel() for g in np.meshgrid(*[sides[sides <= m] for m in (TP_LIMIT, a.layers, seq)])
    )
    fits = (chips % (tp * pp * cp) == 0) & (a.heads % tp == 0)
    # Sequence parallelism splits a context rank's tokens once more over tp.
    fits &= (seq % (cp * tp) == 0) & ((cp == 1) | (seq // cp >= CP_SHARE))
    points = _keep({"tp": tp, "pp": pp, "cp": cp}, fits)
    return points | {"dp": chips // (points["tp"] * points["pp"] * points["cp"])}


def space(a: ModelShape, chips: int, batch: int, seq: int) -> Space:
    """Every structurally valid plan of `chips` chips: integer arrays (N,) under `KEYS`, N = 0 where
    there is none.

    tp | heads (key/value heads are replicated where tp exceeds them), tp·cp | seq, pp·virtual |
    layers or an uneven partition with virtual = 1, dp·microbatch | batch with microbatch a power of
    two, virtual > 1 only where pp divides the microbatches, ep | experts, ep | dp·cp·tp with whole
    experts (no published run splits them), zero in {0, 1, 3}, which is 0 where nothing is
    replicated, recomputation none or full (fused attention keeps no scores to recompute). tp may
    leave the node: that is priced, not forbidden. Raises ValueError for sizes < 1."""
    if min(chips, batch, seq) < 1:
        raise ValueError(f"chips={chips}, batch={batch} and seq={seq} must be at least 1")
    points = _degrees(a, chips, seq)
    points = _cross(points, "microbatch", 2 ** np.arange(batch.bit_length()))
    points = _keep(points, batch % (points["dp"] * points["microbatch"]) == 0)
    microbatches = batch // (points["dp"] * points["microbatch"])
    chunks = _divisors(a.layers)
    points = _cross(points | {"m": microbatches}, "virtual", chunks[chunks <= VIRTUAL_LIMIT])
    pp, virtual = points["pp"], points["virtual"]
    interleaved = (pp > 1) & (points["m"] % pp == 0) & (a.layers % (pp * virtual) == 0)
    points = _keep(points, (virtual == 1) | interleaved)
    points = _cross(points, "ep", _divisors(a.experts) if a.experts else np.ones(1, int))
    points = _cross(points, "etp", np.ones(1, int))
    points = _keep(points, (points["dp"] * points["cp"] * points["tp"]) % points["ep"] == 0)
    modes = np.array([RECOMPUTE.index(mode) for mode in ("none", "full")])
    points = _cross(_cross(points, "recompute", modes), "zero", np.array([0, 1, 3]))
    points = _keep(points, (points["zero"] == 0) | (points["dp"] * points["cp"] > 1))
    return {k: points[k] for k in KEYS}


def size_of(points: Space) -> int:
    """N."""
    return len(points["tp"])


def plan_at(points: Space, i: int) -> Plan:
    """Plan number `i` of the space."""
    values = {k: int(points[k][i]) for k in KEYS}
    return Plan(**values | {"recompute": RECOMPUTE[values["recompute"]]})  # type: ignore[arg-type]


def _plan_columns(job: Job, points: Space) -> Columns:
    """The columns (N,) that depend on the plan, float64."""
    p = {k: points[k].astype(float) for k in KEYS}
    recompute = p.pop("recompute")
    derived = {
        "microbatches": np.maximum(job.batch / (p["dp"] * p["microbatch"]), 1.0),
        "shards": p["dp"] * p["cp"],
        "full": recompute == RECOMPUTE.index("full"),
        "selective": recompute == RECOMPUTE.index("selective"),
        "sp": p["tp"] > 1,
    }
    return {k: np.asarray(v, float) for k, v in (p | derived).items()}


def columns_of(job: Job, points: Space) -> Columns:
    """`workload.columns` (N,) of the job with every plan of the space, without building N jobs."""
    base, n = workload.columns([job]), size_of(points)
    return {k: np.repeat(v, n) for k, v in base.items()} | _plan_columns(job, points)


def price(model: Model, job: Job, points: Space) -> Prediction:
    """Predictions (N,) of the space in chunks of one padded size, so that nothing is compiled
    twice. N ≥ 1.
    """
    n, parts = size_of(points), []
    for start in range(0, n, CHUNK):
        index = np.minimum(np.arange(start, start + CHUNK), n - 1)
        parts.append(
            hybrid.predict(model, _broadcast(job, {k: v[index] for k, v in points.items()}))
        )
    names = [f.name for f in dataclasses.fields(Prediction) if f.name != "terms"]
    arrays = {k: np.concatenate([getattr(p, k) for p in parts])[:n] for k in names}
    return Prediction(
        **arrays, terms={k: np.concatenate([p.terms[k] for p in parts])[:n] for k in parts[0].terms}
    )


def _broadcast(job: Job, points: Space) -> Columns:
    """`columns_of` with what no plan changes as arrays (1,), which is what most of the time went
    into.
    """
    base, changed = workload.columns([job]), _plan_columns(job, points)
    return (
        base | changed | {"layers": np.repeat(base["layers"], size_of(points))}
    )  # its shape is the predictions'


def _take(p: Prediction, index: np.ndarray) -> Prediction:
    names = [f.name for f in dataclasses.fields(Prediction) if f.name != "terms"]
    return Prediction(
        **{k: getattr(p, k)[index] for k in names}, terms={k: v[index] for k, v in p.terms.items()}
    )


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
        able = [name for name, c in hardware.CHIPS.items() if getattr(c, f"peak_{precision}_flops")]
        raise UserError(
            f"{cluster.name} has a chip without {precision}: set plan.precision=bf16 or take one "
            f"of {able}"
        )
    domain = domain_of(cluster)
    return Job(a, Plan(dp=cluster.size), chip, batch, seq, precision, domain, causal=causal)


@dataclass(frozen=True)
class Ranked:
    """One plan: seconds a step with a 90 % interval, bytes a device, joules a step (nan: power not
    published).
    """

    plan: Plan
    time: float
    low: float
    high: float
    memory: float
    feasible: float  # probability that it runs
    joules: float
    tokens_per_joule: float
    traffic: dict[str, float]  # bytes a device sends per step, by axis
    bottleneck: str
    terms: dict[str, float]  # seconds; "correction" is what the learned residual adds
    why: str  # against the first


@dataclass(frozen=True)
class Ranking:
    """The fastest plans, best first, out of `valid` ones of which `feasible` probably run."""

    job: Job
    cluster: Cluster
    valid: int
    feasible: int
    plans: tuple[Ranked, ...]
    trainable: (
        Ranked | None
    )  # the fastest that this code base can train, priced as it runs: attention is not fused


def why(terms: Mapping[str, float], best: Mapping[str, float]) -> str:
    """The terms that explain a plan's distance to the best one, in % of the best time, largest
    first.
    """
    whole = sum(best.values())
    delta = {k: 100 * (terms[k] - best[k]) / whole for k in best}
    told = [k for k in sorted(delta, key=lambda k: -abs(delta[k])) if abs(delta[k]) >= 0.5][:4]
    names = hybrid.BOTTLENECKS | {"correction": "learned correction"}
    return ", ".join(
        f"{'+' if delta[k] > 0 else '−'}{abs(delta[k]):.0f} % {names[k]}" for k in told
    )


def _terms_at(p: Prediction, i: int) -> dict[str, float]:
    terms = {k: float(v[i]) for k, v in p.terms.items()}
    return terms | {"correction": float(p.time[i]) - sum(terms.values())}


def _ranked(model: Model, job: Job, cluster: Cluster, points: Space, p: Prediction) -> list[Ranked]:
    """The plans of a small space in its order, explained against its first."""
    x = columns_of(job, points)
    spent, moved, slow = joules(model, job, cluster, x, p), traffic(x), p.bottleneck()
    terms = [_terms_at(p, i) for i in range(size_of(points))]
    return [
        Ranked(
            plan_at(points, i),
            float(p.time[i]),
            float(p.low[i]),
            float(p.high[i]),
            float(p.memory[i]),
            float(p.feasible[i]),
            float(spent[i]),
            job.batch * job.seq / float(spent[i]),
            {a: float(moved[a][i]) for a in AXES},
            slow[i],
            terms[i],
            why(terms[i], terms[0]) or "as fast within 0.5 % in every term" if i else "fastest",
        )
        for i in range(size_of(points))
    ]


def rank(model: Model, job: Job, cluster: Cluster) -> Ranking:
    """Price every valid plan of the job on all chips of the cluster and keep the ten fastest that
    probably run.

    The job's chip and domain are those of the cluster: of a mixed one the weakest, see `weakest`.
    Raises UserError with the binding constraint and the nearest relaxation where no plan is valid
    or none fits into memory."""
    job = dataclasses.replace(job, chip=weakest(cluster), domain=domain_of(cluster))
    points = space(job.shape, cluster.size, job.batch, job.seq)
    if not size_of(points):
        raise UserError(_indivisible(job, cluster))
    p = price(model, job, points)
    likely = np.flatnonzero(p.feasible >= LIKELY)
    if not len(likely):
        raise UserError(_too_large(model, job, cluster, points, p))
    order = likely[np.argsort(p.time[likely], kind="stable")][:KEPT]
    plans = _ranked(model, job, cluster, _keep(points, order), _take(p, order))
    return Ranking(
        job, cluster, size_of(points), len(likely), tuple(plans), _own(model, job, cluster, points)
    )


def _own(model: Model, job: Job, cluster: Cluster, points: Space) -> Ranked | None:
    """The fastest plan that this code base trains: its XLA attention keeps its scores, as software
    before 2022 did.
    """
    job, ours = dataclasses.replace(job, modern=False), trainable(job, points)
    if not ours.any():
        return None
    points = _keep(points, ours)
    p = price(model, job, points)
    fits = np.flatnonzero(p.memory * OWN_MEMORY <= job.chip.hbm_bytes)
    if not len(fits):
        return None
    first = fits[[p.time[fits].argmin()]]
    return _ranked(model, job, cluster, _keep(points, first), _take(p, first))[0]


def _indivisible(job: Job, cluster: Cluster) -> str:
    """Why no plan is structurally valid, with the nearest batch and number of chips for which one
    is.

    dp = chips is always open to the model, so it is the batch that none of the possible dp divides.
    """
    chips, batch = cluster.size, job.batch
    dp = np.unique(_degrees(job.shape, chips, job.seq)["dp"])
    larger = int((-(-batch // dp) * dp).min())
    fewer = next(n for n in range(chips - 1, 0, -1) if size_of(space(job.shape, n, batch, job.seq)))
    shown = ", ".join(map(str, dp[:8])) + (", …" if len(dp) > 8 else "")
    a = job.shape
    return (
        f"no plan uses all {chips} chips of {cluster.name}: tp·pp·cp·dp = {chips} with tp | "
        f"{a.heads} heads, pp ≤ "
        f"{a.layers} layers and tp·cp | {job.seq} tokens leaves dp in {{{shown}}}, and none "
        f"divides the batch {batch}: "
        f"set plan.batch={larger} or use {fewer} chips"
    )


def _too_large(model: Model, job: Job, cluster: Cluster, points: Space, p: Prediction) -> str:
    """Which plan comes closest to fitting, and what would: more nodes of the weakest group, or
    shorter sequences.
    """
    i = int(p.memory.argmin())
    least, hbm = p.memory[i] / GIB, job.chip.hbm_bytes / GIB
    offers = [o for o in (_more_chips(model, job, cluster), _shorter(model, job, cluster)) if o]
    nothing = (
        f"no cluster up to {MOST_CHIPS} such chips fits it either; take chips with more memory"
    )
    return (
        f"{job.shape.name} fits no plan on {cluster.size} chips of {cluster.name}: the "
        "smallest footprint is "
        f"{least:.1f} GiB a device ({name_of(plan_at(points, i))}), where {hbm:.0f} GiB of HBM "
        "leave room for about "
        f"{hbm * np.exp(model.fit['margin']):.1f}: {' or '.join(offers) or nothing}"
    )


MOST_CHIPS = 16384


def _fits(model: Model, job: Job, chips: int, seq: int) -> bool:
    points = space(job.shape, chips, job.batch, seq)
    if not size_of(points):
        return False
    return bool((price(model, dataclasses.replace(job, seq=seq), points).feasible >= LIKELY).any())


def _more_chips(model: Model, job: Job, cluster: Cluster) -> str:
    """The fewest chips, in whole nodes, that hold a plan: doubled until one fits, then every count
    below it.
    """
    group = next(g for g in cluster.groups if g.chip.name == job.chip.name)
    low = high = -(-cluster.size // group.chips)
    while not _fits(model, job, high * group.chips, job.seq):
        low, high = high, 2 * high
        if high * group.chips > MOST_CHIPS:
            return ""
    nodes = next(
        (n for n in range(low + 1, high) if _fits(model, job, n * group.chips, job.seq)), high
    )
    return f"use {nodes * group.chips} {job.chip.name}"


def _shorter(model: Model, job: Job, cluster: Cluster) -> str:
    """The longest halving of the sequence that fits."""
    halves = (
        job.seq >> i for i in range(1, 5) if job.seq % (1 << i) == 0 and job.seq >> i >= CP_SHARE
    )
    seq = next((s for s in halves if _fits(model, job, cluster.size, s)), None)
    return f"set plan.seq_len={seq}" if seq else ""


def for_config(config: ml_collections.ConfigDict, model: Model) -> Ranking:
    """Rank the plans for `config.plan`, of a published model or of the config's own. Raises
    UserError where there is none.
    """
    c, cluster = config.plan, hardware.cluster(config.plan.cluster)
    a = shapes.named(c.model) if c.model else ModelShape.of(config.model)
    causal = bool(c.model) or config.objective.name == "autoregressive"
    return rank(model, job_on(a, cluster, c.batch, c.seq_len, c.precision, causal), cluster)


def name_of(plan: Plan) -> str:
    """`tp8 pp4 dp8 mb2 zero1 full`: degrees of 1 are left out."""
    degrees = [
        f"{k}{getattr(plan, k)}"
        for k in ("tp", "cp", "pp", "virtual", "dp", "ep", "etp")
        if getattr(plan, k) > 1
    ]
    return " ".join(
        [*degrees, f"mb{plan.microbatch}", f"zero{plan.zero}", f"recompute {plan.recompute}"]
    )


def trainable(job: Job, points: Space) -> np.ndarray:
    """(N,) whether this code base can train the plan: no pipeline, no expert axes, whole heads, FFN
    and vocabulary per rank, and a recomputation that it has."""
    a, tp = job.shape, points["tp"]
    if a.unbuildable:
        return np.zeros(size_of(points), bool)
    ok = (points["pp"] == 1) & (points["ep"] == 1) & (points["etp"] == 1)
    ok &= (a.kv_heads % tp == 0) & (a.ffn % tp == 0) & (a.vocab % tp == 0)
    return (
        ok
        & (points["recompute"] != RECOMPUTE.index("selective"))
        & ((points["zero"] == 0) | (a.width % points["dp"] == 0))
    )


def throughput(model: Model, job: Job, chips: int, repeats: int = 3) -> float:
    """Plans priced per second when warm, arrays from the space to the predictions included; median
    of `repeats`.
    """
    points = space(job.shape, chips, job.batch, job.seq)
    price(model, job, points)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        price(model, job, points)
        seconds.append(time.perf_counter() - start)
    return size_of(points) / float(np.median(seconds))
