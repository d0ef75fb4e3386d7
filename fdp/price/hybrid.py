"""The fitted cost model: analytic step time with physical coefficients, times a learned residual,
with intervals.

    log T = log T_analytic(job; θ) + r(features)

r is the mean of an ensemble of radial-basis networks and 0 far from data. θ lies within the bounds
of fdp.price.step_time on a logit scale; chips, clusters and software stacks shift it by fitted
effects that are zero for what was never measured. A pipeline on a cluster where stalls were seen
has two regimes (see `stall_features`); memory comes from fdp.price.footprint, feasibility from its
distance to the chip's HBM. What ships is coefficients/step_time.json, with its provenance and
held-out errors, rewritten by `python -m tools.fit_step_time FOLDER` (fdp.price.fit). Prices are
plain numpy: nothing is compiled.

Legend: N jobs, K features, M centres, E members; times in seconds, memory in bytes.
"""

import functools
import importlib.resources
import json
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.special

from fdp.price import footprint, network, step_time
from fdp.price.workload import Columns

Array = Any

# (coefficient, what shifts it): prior standard deviation of the shift on the logit scale (log scale
# for "scale").
EFFECTS = {
    ("gemm", "chip"): 0.3,
    ("gemm_fp8", "chip"): 0.3,
    ("attention", "chip"): 0.7,
    ("hbm", "chip"): 0.3,
    ("link_up", "chip"): 0.5,
    ("link_out", "cluster"): 0.7,
    ("congestion", "cluster"): 1.0,
    ("exposed_pp", "cluster"): 0.5,
    ("overlap_dp", "family"): 0.5,
    ("overlap_tp", "family"): 0.5,
    ("uneven", "family"): 2.0,
    ("exposed_gather", "family"): 1.0,
    ("launch", "family"): 0.5,
    ("launch_rank", "family"): 3.0,
    ("launch_moe", "family"): 0.5,
    ("step", "family"): 0.5,
    ("bubble", "family"): 0.3,
    ("balanced", "family"): 2.0,
    ("scale", "family"): 0.1,
    ("scale", "stack"): 0.06,
}
MEMORY_EFFECTS = {
    (name, "cluster"): 0.7 for name in ("constant", "fragments", "kept_width", "kept_hidden")
}
GROUPS = ("chip", "cluster", "family", "stack")
STALLING = ("playbook",)  # clusters where point-to-point transfers were seen to stall
TERMS = ("compute", "tp", "ep", "cp", "pp", "dp", "optimizer", "step")
CODE = 6
LENGTH = 2.5  # of the radial basis functions, in standard deviations of the features


@dataclass(frozen=True)
class Model:
    """Fitted numbers. `time`, `memory`: logit-scale coefficients; `effects`: {"coefficient|group":
    {member: shift}}.
    """

    time: dict[str, float]
    effects: dict[str, dict[str, float]]
    gate: np.ndarray  # weights of stall_features
    memory: dict[str, float]
    memory_effects: dict[str, dict[str, float]]
    residual: dict[
        str, np.ndarray
    ]  # mean_K, scale_K, centres_ExMxK, weights_ExM; empty: no residual
    spread: dict[str, float]  # of the log error: seen and unseen stacks, ensemble factor, quantile
    fit: dict[str, float]  # memory margin of feasibility and its slope
    provenance: dict[str, Any]


@dataclass(frozen=True)
class PricedJobs:
    """Arrays (N,): seconds a step with a 90 % interval, bytes a device, probability that it runs,
    parts of the time.
    """

    time: np.ndarray
    low: np.ndarray
    high: np.ndarray
    log_std: np.ndarray
    memory: np.ndarray
    # not exceeded by nine in ten runs of models and clusters that the fit had not seen
    memory_high: np.ndarray
    feasible: np.ndarray
    stalled: np.ndarray  # probability
    analytic: np.ndarray  # seconds without the residual
    terms: dict[str, np.ndarray]

    def at(self, index: np.ndarray | slice) -> "PricedJobs":
        """Those at some places."""
        return _each(lambda v: v[index], self)

    def bottleneck(self) -> list[str]:
        """The largest term of each job by its name in `BOTTLENECKS`."""
        share = np.stack([self.terms[name] for name in BOTTLENECKS])
        names = list(BOTTLENECKS.values())
        return [names[i] for i in share.argmax(0)]


def _each(change: Callable[..., np.ndarray], *parts: PricedJobs) -> PricedJobs:
    """Every array of the parts through `change`."""
    arrays = [vars(p) | p.terms for p in parts]
    done = {k: change(*(a[k] for a in arrays)) for k in arrays[0] if k != "terms"}
    terms = {k: done.pop(k) for k in parts[0].terms}
    return PricedJobs(**done, terms=terms)


def joined(parts: Sequence[PricedJobs]) -> PricedJobs:
    """All jobs of the parts, in order."""

    return _each(lambda *v: np.concatenate(v), *parts)


BOTTLENECKS = {
    "compute": "compute",
    "tp": "tensor-parallel communication",
    "ep": "expert all-to-all",
    "cp": "context ring",
    "pp": "pipeline bubble and transfers",
    "dp": "data-parallel communication",
    "optimizer": "optimizer update",
    "step": "fixed cost of a step and its microbatches",
    "stall": "stalled transfers",
}


def groups_of(x: Columns) -> dict[str, np.ndarray]:
    """The members (N,) of every group in `GROUPS`; a family is a stack without its release."""
    family = np.array([s.rpartition("/")[0] for s in x["stack"]], object)
    return {"chip": x["chip"], "cluster": x["cluster"], "family": family, "stack": x["stack"]}


def resolved(families: np.ndarray, known: Collection[str]) -> np.ndarray:
    """Families (N,) of software, an unmeasured one replaced by a measured one of the same framework
    if there is one.
    """
    same = {
        name.rpartition("/")[2]: name
        for name in sorted(known, reverse=True)
        if name.rpartition("/")[2]
    }
    names, inverse = np.unique(families.astype(str), return_inverse=True)
    return np.array(
        [n if n in known else same.get(n.rpartition("/")[2], n) for n in names], object
    )[inverse]


def numeric(x: Columns) -> dict[str, Array]:
    """The columns without names, as what the analytic functions read."""
    return {k: v for k, v in x.items() if k not in ("stack", "cluster", "chip")}


def sigmoid(value: Array) -> Array:
    """1 / (1 + e^-value), in the kind of array that it is given."""
    if network.namespace(value) is np:
        return scipy.special.expit(value)
    import jax

    return jax.nn.sigmoid(value)


def bounded(
    raw: Mapping[str, Array], bounds: Mapping[str, tuple[float, float, float]]
) -> dict[str, Array]:
    """Logit-scale values inside their bounds."""
    return {n: low + (high - low) * sigmoid(raw[n]) for n, (low, high, _) in bounds.items()}


def time_coefficients(
    x: Mapping[str, Array], raw: dict[str, Array], shift: Mapping[str, Array]
) -> dict[str, Array]:
    """Coefficients of fdp.price.step_time per job from logit-scale values and the summed shifts of
    its groups.
    """
    k = bounded({n: raw[n] + shift.get(n, 0.0) for n in step_time.BOUNDS}, step_time.BOUNDS)
    xp = step_time.array_module(x, raw)
    k["linear"] = xp.where(
        x["fp4"] > 0, k["gemm_fp4"], xp.where(x["fp8"] > 0, k["gemm_fp8"], k["gemm"])
    )
    k["scale"] = xp.exp(shift.get("scale", 0.0))
    return k


def shifts(
    effects: Mapping[str, Mapping[str, float]], groups: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Summed shift (N,) of every coefficient; members without a fitted effect add nothing."""
    places = {g: np.unique(v.astype(str), return_inverse=True) for g, v in groups.items()}
    total: dict[str, np.ndarray] = {}
    for key, members in effects.items():
        name, _, group = key.partition("|")
        names, inverse = places[group]
        values = np.array([members.get(n, 0.0) for n in names])[inverse]
        total[name] = total.get(name, 0.0) + values
    return total


def family_code(groups: Mapping[str, np.ndarray]) -> np.ndarray:
    """(N, CODE) points on a sphere, one per software family, far from each other: errors of one
    family say little about another's. The point is drawn from the name, so that a family needs no
    table."""
    names, inverse = np.unique(groups["family"].astype(str), return_inverse=True)
    drawn = [
        np.random.default_rng(zlib.crc32(name.encode())).standard_normal(CODE) for name in names
    ]
    return np.array([d / np.linalg.norm(d) for d in drawn])[inverse]


def _log2(value: Array) -> Array:
    xp = network.namespace(value)
    return xp.log2(xp.maximum(value, 1e-9))


def nodes(x: Mapping[str, Array]) -> Array:
    """Scale-up domains that a job spans."""
    xp = step_time.array_module(x)
    return xp.maximum(x["tp"] * x["pp"] * x["dp"] * x["cp"] / x["domain"], 1.0)


def stall_features(x: Mapping[str, Array], pressure: Array) -> Array:
    """(N, K) of the regime head: nodes, gradient exchange without ZeRO, degrees, and memory near
    its limit.

    The Ultra-Scale Playbook's pipelines run either as the analytic model says or with about 1.2·(1
    − p^-1.2) s more per microbatch, whatever the model's size; which one depends on these."""
    xp = step_time.array_module(x, {"pressure": pressure})
    span = _log2(nodes(x))
    plain = xp.where((x["zero"] == 0) & (x["dp"] > 1) & (nodes(x) > 1), 1.0, 0.0)
    replicas = _log2(x["dp"])
    columns = [
        xp.ones_like(span),
        span,
        xp.maximum(span - 4, 0),
        plain,
        plain * (span - 2),
        plain * xp.maximum(span - 3, 0),
        *(plain * xp.maximum(bend, 0) for bend in (2 - replicas, replicas - 3, replicas - 4)),
        0.3 * _log2(x["tp"]),
        0.3 * _log2(x["microbatch"]),
        0.3 * _log2(x["pp"]),
        xp.maximum(pressure, -2.0),
        3 * xp.maximum(pressure + 0.3, 0.0),
    ]
    return xp.stack(columns, -1)


def residual_features(
    x: Mapping[str, Array], terms: Mapping[str, Array], rank_shift: Array
) -> Array:
    """(N, K) dimensionless inputs of the residual: shares of the time, log degrees, kind of
    software.
    """
    xp = step_time.array_module(x, terms)
    shares = [terms[n] / terms["total"] for n in TERMS]
    tokens = x["microbatch"] * x["seq"] / x["cp"]
    scaled = (
        ("tp", 1.0),
        ("pp", 1.0),
        ("dp", 0.5),
        ("cp", 1.0),
        ("ep", 0.5),
        ("microbatches", 0.3),
        ("virtual", 0.3),
    )
    degrees = [factor * _log2(x[name]) for name, factor in scaled]
    sizes = [
        0.5 * (_log2(tokens) - 12),
        _log2(x["width"]) - 12,
        _log2(x["layers"]) - 5,
        0.5 * (_log2(x["seq"]) - 12),
    ]
    kinds = [
        x["zero"] >= 3,
        x["zero"] == 0,
        x["full"],
        x["modern"],
        x["fp8"],
        x["fp4"],
        x["moe_layers"] > 0,
    ]
    columns = [
        *shares,
        *degrees,
        0.5 * _log2(nodes(x)),
        *sizes,
        *(xp.asarray(v, float) for v in kinds),
        rank_shift,
    ]
    columns += [x["code"][..., i] for i in range(CODE)]
    return xp.stack(xp.broadcast_arrays(*columns), -1)


def radial(z_NxK: np.ndarray, centres_MxK: np.ndarray) -> np.ndarray:
    """(N, M) Gaussians of the distance, in units that do not grow with the number of features."""
    scale = -1 / (2 * LENGTH**2 * z_NxK.shape[-1] / 10)

    def columns(left: np.ndarray, *more: np.ndarray | float) -> np.ndarray:
        return np.column_stack([left, *(np.full(len(left), m, left.dtype) for m in more)])

    # |z - c|² = |z|² - 2 z·c + |c|² as one product of matrices.
    left = columns(-2 * scale * z_NxK, scale * (z_NxK**2).sum(-1), 1.0)
    right = columns(centres_MxK, 1.0, scale * (centres_MxK**2).sum(-1))
    found_NxM = left @ right.T
    np.maximum(found_NxM, -80.0, out=found_NxM)  # beyond, float32 falls into slow denormals
    return np.exp(found_NxM, out=found_NxM)


def corrections(features_NxK: np.ndarray, residual: Mapping[str, np.ndarray]) -> np.ndarray:
    """(E, N) log corrections by each member: radial basis functions of the standardised features
    around its centres, weighted."""
    kind = features_NxK.dtype
    parts = {k: np.asarray(v, kind) for k, v in residual.items()}
    z_NxK = (features_NxK - parts["mean"]) / parts["scale"]
    members = zip(parts["centres"], parts["weights"], strict=True)
    return np.stack([radial(z_NxK, centres_MxK) @ w_M for centres_MxK, w_M in members])


def predict(model: Model, x: Columns, single: bool = False) -> PricedJobs:
    """Price the jobs of `x` (fdp.price.workload.columns). `single`: the residual in float32, for
    many thousand jobs; it changes seconds by some 1e-6 of them."""
    groups = groups_of(x)
    measured = model.effects.get("scale|family", {})
    seen = np.isin(groups["family"].astype(str), list(measured))
    groups["family"] = resolved(groups["family"], measured.keys())
    inputs = numeric(x) | {"code": family_code(groups)}
    shift = shifts(model.effects, groups)
    terms = step_time.step_time(inputs, time_coefficients(inputs, model.time, shift))
    terms = {n: np.broadcast_to(v, x["layers"].shape) for n, v in terms.items()}
    memory, pressure = _memory(model, inputs, groups)
    stalled = _stalled(model, inputs, groups, pressure)
    more_ExN = np.zeros((1, len(memory)))
    if model.residual:
        features = residual_features(inputs, terms, shift.get("launch_rank", 0.0))
        more_ExN = corrections(features.astype(np.float32 if single else float), model.residual)
    return _with_intervals(model, x, (terms, memory, pressure, stalled, more_ExN), seen)


def _memory(
    model: Model, x: Mapping[str, Array], groups: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(bytes a device, log of their share of the HBM)."""
    shift = shifts(model.memory_effects, groups)
    used = {n: model.memory[n] + shift.get(n, 0.0) for n in footprint.BOUNDS}
    memory = footprint.memory(x, bounded(used, footprint.BOUNDS))
    return memory, np.log(memory / x["hbm_bytes"])


def _stalled(
    model: Model, x: Mapping[str, Array], groups: Mapping[str, np.ndarray], pressure: np.ndarray
) -> np.ndarray:
    """Probability that transfers stall."""
    may = (x["pp"] > 1) & np.isin(groups["cluster"].astype(str), STALLING)
    return np.where(may, sigmoid(stall_features(x, pressure) @ model.gate), 0.0)


def _with_intervals(
    model: Model, x: Columns, parts: tuple[Any, ...], seen: np.ndarray
) -> PricedJobs:
    """What is predicted from its parts: (terms, memory, log pressure, stalled, corrections)."""
    terms, memory, pressure, stalled, more_ExN = parts
    # The regime with the smaller expected relative error: a stall is a factor, so it needs odds
    # beyond that factor.
    factor = terms["stalled"] / terms["total"]
    analytic = np.where(stalled > (1 - stalled) * factor, terms["stalled"], terms["total"])
    s = model.spread
    known = np.maximum(
        np.where(seen, s["seen"], s["unseen"]), np.where(x["moe_layers"] > 0, s["experts"], 0.0)
    )
    log_std = np.sqrt(known**2 + (s["ensemble"] * more_ExN.std(0)) ** 2)
    time = analytic * np.exp(more_ExN.mean(0))
    shown = {n: terms[n] for n in TERMS} | {"stall": analytic - terms["total"]}
    width = np.exp(s["quantile"] * log_std)
    high = np.where(
        (stalled > 0.05) & (analytic < terms["stalled"]), terms["stalled"] * width, time * width
    )
    low = np.where(
        (stalled < 0.95) & (analytic > terms["total"]), terms["total"] / width, time / width
    )
    feasible = scipy.special.expit(-model.fit["slope"] * (pressure - model.fit["margin"]))
    most = memory * np.exp(s["memory"])
    return PricedJobs(time, low, high, log_std, memory, most, feasible, stalled, analytic, shown)


def to_json(model: Model) -> str:
    """The model as JSON text with four significant digits more than its error needs."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, float | np.floating | np.ndarray):
            return (
                np.vectorize(lambda v: float(f"{v:.6g}"))(np.asarray(value, float)).tolist()
                if np.size(value)
                else []
            )
        return value

    return (
        json.dumps(
            {k: plain(getattr(model, k)) for k in Model.__dataclass_fields__}, separators=(",", ":")
        )
        + "\n"
    )


def from_json(text: str) -> Model:
    """The model of `to_json`. Raises ValueError naming a missing part."""
    data = json.loads(text)
    missing = [k for k in Model.__dataclass_fields__ if k not in data]
    if missing:
        raise ValueError(f"the cost model's file lacks {', '.join(missing)}")
    data["gate"] = np.array(data["gate"])
    data["residual"] = {k: np.array(v) for k, v in data["residual"].items()}
    return Model(**data)


@functools.cache
def shipped() -> Model:
    """The model fitted on all published measurements; see its `provenance`."""
    return from_json(
        importlib.resources.files("fdp.price")
        .joinpath("coefficients/step_time.json")
        .read_text("utf8")
    )
