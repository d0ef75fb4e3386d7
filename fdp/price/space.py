"""Every structurally valid parallel plan of a job, as arrays.

Divisibility: Narayanan et al. 2021 (arXiv 2104.04473; interleaving), Korthikanti et al. 2022
(sequence parallelism, recomputation), Rajbhandari et al. 2020 (ZeRO), Megatron Core's parallel
folding of experts.

Legend: N plans of the space."""

import numpy as np

from fdp.models.shape import ModelShape
from fdp.price import workload
from fdp.price.workload import RECOMPUTE, Columns, Job, Plan

Space = dict[str, np.ndarray]  # "tp", "pp", … (N,) integers; "recompute" indexes RECOMPUTE

KEYS = ("tp", "pp", "dp", "cp", "ep", "etp", "virtual", "microbatch", "recompute", "zero")
# chunks a stage; published runs hold hardly any above, and their cost per chunk is not known
VIRTUAL_LIMIT = 12
# more ranks than this leave matmuls too thin for any chip; fewer are priced, also across nodes
TP_LIMIT = 64
# fewest tokens of a sequence on a rank: the balanced ring halves them, kernels work in tiles of 128
CP_SHARE = 256


def _divisors(n: int) -> np.ndarray:
    return np.flatnonzero(n % np.arange(1, n + 1) == 0) + 1


def _cross(points: Space, name: str, values: np.ndarray) -> Space:
    """Every point with every value of a further coordinate."""
    n = len(next(iter(points.values())))
    out = {k: np.repeat(v, len(values)) for k, v in points.items()}
    return out | {name: np.tile(values, n)}


def keep(points: Space, mask: np.ndarray | slice) -> Space:
    """The plans where `mask` (N,) holds, or those at its indices."""
    return {k: v[mask] for k, v in points.items()}


def degrees_of(a: ModelShape, chips: int, seq: int) -> Space:
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
    points = keep({"tp": tp, "pp": pp, "cp": cp}, fits)
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
    points = degrees_of(a, chips, seq)
    points = _cross(points, "microbatch", 2 ** np.arange(batch.bit_length()))
    points = keep(points, batch % (points["dp"] * points["microbatch"]) == 0)
    microbatches = batch // (points["dp"] * points["microbatch"])
    chunks = _divisors(a.layers)
    points = _cross(points | {"m": microbatches}, "virtual", chunks[chunks <= VIRTUAL_LIMIT])
    pp, virtual = points["pp"], points["virtual"]
    interleaved = (pp > 1) & (points["m"] % pp == 0) & (a.layers % (pp * virtual) == 0)
    points = keep(points, (virtual == 1) | interleaved)
    points = _cross(points, "ep", _divisors(a.experts) if a.experts else np.ones(1, int))
    points = _cross(points, "etp", np.ones(1, int))
    points = keep(points, (points["dp"] * points["cp"] * points["tp"]) % points["ep"] == 0)
    modes = np.array([RECOMPUTE.index(mode) for mode in ("none", "full")])
    points = _cross(_cross(points, "recompute", modes), "zero", np.array([0, 1, 3]))
    points = keep(points, (points["zero"] == 0) | (points["dp"] * points["cp"] > 1))
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


def shared_columns(job: Job, points: Space) -> Columns:
    """`columns_of` with what no plan changes as arrays (1,), which is what most of the time went
    into.
    """
    base, changed = workload.columns([job]), _plan_columns(job, points)
    # its shape is the predictions'
    return base | changed | {"layers": np.repeat(base["layers"], size_of(points))}


def trainable(job: Job, points: Space) -> np.ndarray:
    """(N,) whether a config is written for the plan: no pipeline, as a plan names no schedule,
    experts over a part of dp and as wide over tp as the rest, whole heads, FFN and vocabulary per
    rank, and a recomputation that it has."""
    a, tp = job.shape, points["tp"]
    if a.unbuildable:
        return np.zeros(size_of(points), bool)
    ok = (points["pp"] == 1) & (points["dp"] % points["ep"] == 0)
    ok &= points["etp"] == (points["tp"] if a.experts else 1)
    ok &= (a.kv_heads % tp == 0) & (a.ffn % tp == 0) & (a.vocab % tp == 0)
    return (
        ok
        & (points["recompute"] != RECOMPUTE.index("selective"))
        & ((points["zero"] == 0) | (a.width % points["dp"] == 0))
    )


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
