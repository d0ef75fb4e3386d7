"""Fits `fdp/price/coefficients/network.json` to measured collectives and scores the fit on classes
it has not seen.

    python -m tools.fit_network DATA              # rewrites the json, prints the errors; ~1-2 min
    python -m tools.fit_network DATA --out=fit.json

DATA holds planning/comm/collectives.csv.gz, planning/ultrascale_playbook_sweeps.csv,
moe/nccl_intranode.csv.gz and moe/deepep_normal_h100_1node.csv.gz. A class is one (chip, op, ranks,
ranks per node) of one source; every class has equal weight in a fit, however many points it has.
Errors are absolute percentage errors of the time, over points. Left out: pairwise-NVLink machines
and the A40, which are not the chips of the hardware table, and the L40S of the NCCL file, a virtual
machine whose traffic bounces through the host.

Legend: P points, C coefficients.
"""

import argparse
import csv
import dataclasses
import datetime
import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from scipy.optimize import least_squares

from fdp.price import network
from fdp.price.network import LinkCoefficients

FIELDS = tuple(f.name for f in dataclasses.fields(LinkCoefficients))
# (low, high, start): seconds ≥ 0, shares in (0, 1]. Past these bounds a fit is better on its data
# and wrong elsewhere.
BOUNDS = {
    **dict.fromkeys(("launch", "ramp"), (0.0, 100e-6, 5e-6)),
    "launch_out": (0.0, 30e-6, 5e-6),
    "hop": (0.0, 5e-6, 1e-6),
    # the wire and two adapters take 1 µs, NCCL's proxy threads a few more
    "hop_out": (1e-6, 10e-6, 4e-6),
    **dict.fromkeys(("all_reduce", "all_gather", "all_to_all", "point_to_point"), (0.02, 1.0, 0.7)),
    "short": (0.02, 1.0, 0.3),
    "scale_out": (0.02, 1.0, 0.5),
    "congestion": (0.0, 1.0, 0.1),
}
# Seconds that the host of a source adds to every call. Vidur times a framework's calls, not the
# library's: up to 60 µs at sizes where NCCL's own benchmark shows 7. Fitted beside the coefficients
# and not shipped.
HARNESS = (0.0, 100e-6, 20e-6)
THIN = 40
# pull of every coefficient to its start, in units of its range: decides only what no class shows
PRIOR = 0.05
OPS = {"send_recv": "point_to_point", "alltoall": "all_to_all"}
SOURCES = {"vidur a100_dgx": "a100", "vidur h100_dgx": "h100", "vtrain a100 nvlink node": "a100"}
SOURCES |= {"vtrain v100 nvlink node": "v100"}
POOLED = ("a100", "h100", "h200")  # switched nodes
# Not measured here. JAX scaling book: about 1 µs per hop, links that reach 0.95 of their peak.
TORUS = LinkCoefficients(1e-6, 0, 1e-6, 0, 0, 1.0, 0.95, 0.95, 0.95, 0.95, 1.0, 0)
START = LinkCoefficients(**{f: BOUNDS[f][2] for f in FIELDS})
FILES = {
    "nccl": "moe/nccl_intranode.csv.gz (ai-dynamo/aiconfigurator, Apache-2.0)",
    "playbook": "planning/ultrascale_playbook_sweeps.csv "
    "(nanotron/ultrascale-playbook, Apache-2.0)",
    "vidur": "planning/comm/collectives.csv.gz (microsoft/vidur, MIT)",
    "vtrain": "planning/comm/collectives.csv.gz (VIA-Research/vTrain, MIT)",
}


@dataclasses.dataclass(frozen=True)
class Fit:
    """Coefficients and the seconds that Vidur's host adds."""

    coefficients: LinkCoefficients
    harness: float


@dataclasses.dataclass(frozen=True)
class Class:
    """Points of one class. bytes, seconds [P]."""

    source: str
    chip: str
    op: str
    ranks: int
    local: int
    nbytes_P: np.ndarray
    seconds_P: np.ndarray


def thin(one: Class) -> Class:
    """Every k-th point, so that a fit sees at most THIN of a class; errors are over all of them."""
    step = max(1, len(one.seconds_P) // THIN)
    return dataclasses.replace(one, nbytes_P=one.nbytes_P[::step], seconds_P=one.seconds_P[::step])


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a csv or csv.gz."""
    packed = path.read_bytes()
    text = gzip.decompress(packed) if path.suffix == ".gz" else packed
    return list(csv.DictReader(text.decode("utf-8").splitlines()))


def classes(rows: Iterable[tuple[Any, ...]]) -> list[Class]:
    """Groups (source, chip, op, ranks, local, bytes, seconds)."""
    found: dict[Any, list[tuple[float, float]]] = {}
    for *key, nbytes, seconds in rows:
        found.setdefault(tuple(key), []).append((nbytes, seconds))
    return [Class(*key, *np.array(points).T) for key, points in sorted(found.items())]


def measured(data: Path) -> list[Class]:
    """Every class that is fitted."""
    rows: list[Any] = []
    for r in read(data / "planning/comm/collectives.csv.gz"):
        if r["source"] in SOURCES:
            op, seconds = OPS.get(r["op"], r["op"]), 1e-6 * float(r["time_us"])
            shape = int(r["ranks"]), int(r["ranks_per_node"])
            rows.append(
                (
                    r["source"].split()[0],
                    SOURCES[r["source"]],
                    op,
                    *shape,
                    float(r["bytes"]),
                    seconds,
                )
            )
    for r in read(data / "moe/nccl_intranode.csv.gz"):
        if r["gpu"] != "L40S":
            op, n = OPS.get(r["op_name"], r["op_name"]), int(r["num_gpus"])
            nbytes, seconds = 2 * float(r["message_size"]), 1e-3 * float(r["latency"])
            rows.append(("nccl", r["gpu"].lower(), op, n, n, nbytes, seconds))
    for r in read(data / "planning/ultrascale_playbook_sweeps.csv"):
        if r["metric"].endswith("bus_bw_mean"):
            op, n = r["metric"].removesuffix("_bus_bw_mean"), 8 * int(r["x"])
            volume = (2 if op == "all_reduce" else 1) * (n - 1) / n * 256e6
            rows.append(("playbook", "h100", op, n, 8, 256e6, volume / (1e9 * float(r["value"]))))
    return classes(rows)


def deepep(data: Path) -> list[Class]:
    """Expert dispatch (1 byte per element) and combine (2) inside 8 H100, on the most SMs; never
    fitted.

    A token goes once to every rank that holds one of its experts, so that bytes are tokens ×
    expected distinct ranks."""
    rows: list[Any] = []
    for r in read(data / "moe/deepep_normal_h100_1node.csv.gz"):
        if int(r["num_token"]) >= 512:
            experts, k = int(r["num_experts"]), int(r["num_topk"])
            missed = np.prod(
                [1 - experts / 8 / (experts - i) for i in range(k)]
            )  # a rank holds none of the k
            elements = int(r["num_token"]) * int(r["hidden_size"]) * 8 * (1 - missed)
            for way, width in (("dispatch", 1), ("combine", 2)):
                if int(r[f"{way}_sms"]) == 24:
                    seconds = 1e-6 * (float(r[f"{way}_transmit_us"]) + float(r[f"{way}_notify_us"]))
                    rows.append(
                        (f"deepep {way}", "h100", "all_to_all", 8, 8, elements * width, seconds)
                    )
    return classes(rows)


def predict(c: LinkCoefficients, one: Class, harness: float = 0.0) -> np.ndarray:
    """Seconds [P] of a class."""
    added = harness if one.source == "vidur" else 0.0
    return network.collective_time(one.op, one.nbytes_P, one.ranks, one.local, one.chip, c) + added


def fit(found: list[Class], prior: LinkCoefficients = START) -> Fit:
    """Bounded least squares of log(predicted/measured); coefficients that no class shows stay at
    `prior`.
    """
    low_C, high_C = np.array([*(BOUNDS[f][:2] for f in FIELDS), HARNESS[:2]]).T
    prior_C = (np.array([*dataclasses.astuple(prior), HARNESS[2]]) - low_C) / (high_C - low_C)
    thinned = [thin(one) for one in found]

    def residuals(unit_C: np.ndarray) -> np.ndarray:
        value_C = low_C + unit_C * (high_C - low_C)
        c = LinkCoefficients(*value_C[:-1])
        logs = (
            np.log(predict(c, one, value_C[-1]) / one.seconds_P) / len(one.seconds_P) ** 0.5
            for one in thinned
        )
        return np.concatenate([PRIOR * (unit_C - prior_C), *logs])

    solution = least_squares(residuals, np.clip(prior_C, 1e-3, 1 - 1e-3), bounds=(0, 1))
    *values, harness = (round(float(f"{v:.4g}"), 10) for v in low_C + solution.x * (high_C - low_C))
    return Fit(LinkCoefficients(*values), harness)


def score(scored: Iterable[tuple[Fit, Class]]) -> dict[str, Any]:
    """Median and p90 absolute percentage error and the count of points, by place and size of the
    message.
    """
    ape: dict[str, list[float]] = {}
    for made, one in scored:
        error_P = 100 * np.abs(predict(made.coefficients, one, made.harness) / one.seconds_P - 1)
        place = "in a node" if one.local >= one.ranks else "across nodes"
        for error, nbytes in zip(error_P, one.nbytes_P, strict=True):
            size = "below" if nbytes < network.SMALL else "from"
            ape.setdefault(f"{place}, {size} 1 MiB", []).append(error)
    return {group: summary(ape[group]) for group in sorted(ape)}


def summary(errors: list[float]) -> dict[str, float]:
    """Median, p90 and count of errors in per cent."""
    median, p90 = np.percentile(errors, (50, 90))
    return {
        "median_pct": round(float(median), 1),
        "p90_pct": round(float(p90), 1),
        "points": len(errors),
    }


def held_out(found: list[Class], key: Callable[[Class], Any]) -> list[tuple[Fit, Class]]:
    """Every class with a fit on the others: those whose `key` differs."""
    out = []
    for value in sorted({key(one) for one in found}):
        made = fit([one for one in found if key(one) != value])
        out += [(made, one) for one in found if key(one) == value]
    return out


def one_bandwidth(n: Any, local: Any, scale_up: Any, scale_out: Any) -> Any:
    """The ablation: a group over several nodes has one bandwidth, however many of its ranks share a
    node.
    """
    return np.where(local >= n, scale_up, np.minimum(scale_up, 8 * scale_out))


def nic_rule(found: list[Class]) -> dict[str, Any]:
    """Held-out classes over several nodes, fitted and predicted with the NIC-sharing rule and
    without it.

    Only the A100 cluster has groups with 1, 2, 4 and 8 ranks of a node; the mean over its classes
    decides."""
    own = [one for one in found if one.chip == "a100"]
    out: dict[str, Any] = {}
    for name, law in (("with", network.group_bandwidth), ("without", one_bandwidth)):
        with mock.patch.object(network, "group_bandwidth", law):
            pairs = held_out(
                own, lambda one: (one.ranks, one.local) if one.local < one.ranks else (0, 0)
            )
            pairs = [(made, one) for made, one in pairs if one.local < one.ranks]
            classes = per_class(pairs)
            mean = round(float(np.mean(list(classes.values()))), 1)
            out[name] = {
                "mean_over_classes_pct": mean,
                "median_by_class_pct": classes,
                "points": score(pairs),
            }
    return out


def per_class(scored: list[tuple[Fit, Class]]) -> dict[str, float]:
    """Median error in per cent from 1 MiB, by "op ranks/local"."""
    out = {}
    for made, one in scored:
        error_P = 100 * np.abs(predict(made.coefficients, one, made.harness) / one.seconds_P - 1)
        large_P = error_P[one.nbytes_P >= network.SMALL]
        out[f"{one.op} {one.ranks}/{one.local}"] = round(float(np.median(large_P)), 1)
    return out


def validate(found: list[Class], dispatch: list[Class], made: dict[str, Fit]) -> dict[str, Any]:
    """Errors in sample, on held-out classes, on held-out chips, of the NIC rule, and on expert
    dispatch.
    """
    own = {chip: [one for one in found if one.chip == chip] for chip in made if chip != "default"}
    pooled = held_out([one for one in found if one.chip in POOLED], lambda one: one.chip)
    return {
        "in_sample": {chip: score((made[chip], one) for one in ones) for chip, ones in own.items()},
        "held_out_class": {
            c: score(held_out(ones, lambda one: (one.ranks, one.local))) for c, ones in own.items()
        },
        "held_out_chip": {chip: score(p for p in pooled if p[1].chip == chip) for chip in POOLED},
        "nic_rule_a100_held_out_class": nic_rule(found),
        "expert_dispatch_never_fitted": score((made["h100"], one) for one in dispatch),
    }


def fits(found: list[Class]) -> dict[str, Fit]:
    """The pooled fit and that of each chip, whose prior is the pooled one."""
    made = {"default": fit([one for one in found if one.chip in POOLED])}
    for chip in sorted({one.chip for one in found}):
        made[chip] = fit([one for one in found if one.chip == chip], made["default"].coefficients)
    return made


def document(data: Path) -> dict[str, Any]:
    """The json: coefficients, bounds, provenance, errors."""
    found = measured(data)
    made = fits(found)
    shipped = {name: dataclasses.asdict(one.coefficients) for name, one in made.items()}
    return {
        "about": "alpha-beta coefficients of collectives: seconds, and shares of the peaks of "
        "fdp.price.hardware",
        "made_by": "python -m tools.fit_network DATA",
        "date": datetime.date.today().isoformat(),
        "evidence": {
            "default": f"measured, pooled over {', '.join(POOLED)}; used for GPUs without data",
            "torus": "assumed, nothing measured: JAX scaling book",
            "h100": "scale_out and congestion: one congested cluster; replace them for another",
            "a100": "scale_out: one cluster, 2 nodes; congestion: the pool's; point_to_point, "
            "hop_out at their bounds",
            "h200": "in the node only; across nodes as the pool",
            "v100": "all-reduce in a cube mesh whose bandwidth depends on which ranks take part; "
            "the rest as the pool",
        },
        "bounds": {name: list(bound[:2]) for name, bound in BOUNDS.items()},
        "coefficients": shipped | {"torus": dataclasses.asdict(TORUS)},
        "harness_s": {name: one.harness for name, one in made.items()},
        "sources": {f: sources(found, f) for f in sorted({one.source for one in found})},
        "errors": validate(found, deepep(data), made),
    }


def sources(found: list[Class], source: str) -> dict[str, Any]:
    """Classes and points of one source."""
    own = [one for one in found if one.source == source]
    file = FILES[source]
    return {"file": file, "classes": len(own), "points": sum(len(one.seconds_P) for one in own)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--out", type=Path, default=Path(network.__file__).parent / "coefficients" / "network.json"
    )
    flags = parser.parse_args()
    made = document(flags.data)
    flags.out.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    print(json.dumps({"coefficients": made["coefficients"], "errors": made["errors"]}, indent=1))


if __name__ == "__main__":
    main()
