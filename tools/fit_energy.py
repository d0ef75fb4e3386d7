"""Fits `fdp/price/coefficients/energy.json` to measured power and scores the fit on kernels and
chips it has not seen.

    python -m tools.fit_energy DATA              # rewrites the json, prints the errors; seconds
    python -m tools.fit_energy DATA --out=fit.json

DATA holds moe/gpu_moe_power.csv.gz and moe/h200_gemm_power.csv.gz (power of the chip's own meter
while one kernel repeats) and planning/power/mlperf_v4.0_smc_h100_power_runs.csv (wall power of
nodes of 8 H100, immersion cooled). Two traps decide which kernels are fitted. The meter averages
over longer than a short kernel's burst, and shows the power of whatever ran before: kernels under 1
ms are left out, and their error is reported. Most long kernels draw the cap, which says only that
the model must reach it; the predicted power is capped before it is compared. The work of MLPerf
runs is not logged. Only LoRA on 1 and 8 nodes can be computed from its model.

Legend: K kernels, C coefficients.
"""

import argparse
import csv
import dataclasses
import datetime
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from fdp.price import energy, hardware
from fdp.price.energy import EnergyCoefficients

FITTED = ("busy", "flops_16", "flops_8", "hbm")
# Shares of the cap at the full rate. Above 1 the chip throttles before it is there, as H200 does
# from 30 % MFU.
LOW_C, HIGH_C, START_C = np.array(
    [(0.0, 0.9, 0.4), (0.1, 3.0, 1.0), (0.1, 3.0, 1.0), (0.05, 1.5, 0.4)]
).T
SHORTEST = 1e-3
TOKENS = 1024  # smaller batches have stale power samples (README of the data)
BYTES = {"bfloat16": 2, "fp8": 1, "fp8_block": 1}
# Not measured here: NVLink about 10 pJ/byte (NVIDIA states 1.3 pJ/bit for its chip-to-chip link);
# an adapter and its optics about 40 W at 50 GB/s.
LINKS = {"scale_up_joules": 1e-11, "scale_out_joules": 8e-10}
IDLE_SHARE = 0.1  # 70 W of 700
GENERATION = {"h200": "h200", "h100": "h200", "h100_96gb_500w": "h200"}
GENERATION |= dict.fromkeys(("b200", "b300", "gb200", "gb300"), "b200")
SEQ, LAYERS, WIDTH, KV, FFN, VOCAB = 8192, 80, 8192, 1024, 28672, 32000  # Llama-2 70B
# Samples to convergence at batch 8 in MLPerf's reference points for LoRA v4.0: 3,456-4,992 over 24
# runs, mean 3,984.
SAMPLES = (3456, 3984, 4992)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One measured kernel: shares of the peak rates, seconds, watts."""

    chip: str
    shape: tuple[int, ...]
    tokens: int
    flops: str  # precision
    flop_use: float
    hbm_use: float
    seconds: float
    watts: float
    limit: float


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a csv or csv.gz."""
    packed = path.read_bytes()
    text = gzip.decompress(packed) if path.suffix == ".gz" else packed
    return list(csv.DictReader(text.decode("utf-8").splitlines()))


def kernel(
    r: dict[str, str],
    chip: str,
    dtype: str,
    shape: tuple[int, ...],
    tokens: int,
    work: tuple[float, float],
) -> Kernel:
    """A kernel of (FLOPs, HBM bytes) of `work`."""
    seconds, found = 1e-3 * float(r["latency"]), hardware.chip(chip)
    precision = "bf16" if dtype == "bfloat16" else "fp8"
    flop_use = work[0] / seconds / energy.peak_rate(chip, precision)
    hbm_use = work[1] / seconds / found.hbm_bandwidth
    limit = float(r["power_limit"])
    return Kernel(
        chip, shape, tokens, precision, flop_use, hbm_use, seconds, float(r["power"]), limit
    )


def gemm_kernels(data: Path) -> list[Kernel]:
    """Dense matmuls on H200."""
    out = []
    for r in read(data / "moe/h200_gemm_power.csv.gz"):
        m, n, k = (int(r[x]) for x in "mnk")
        nbytes = BYTES[r["gemm_dtype"]] * (m * k + n * k) + 2 * m * n
        out.append(kernel(r, "h200", r["gemm_dtype"], (m, n, k), m, (2 * m * n * k, nbytes)))
    return out


def moe_kernels(data: Path) -> list[Kernel]:
    """Expert layers (gate, up, down) of balanced routing on H200 and B200: weights, inputs, hidden
    and outputs once.
    """
    out = []
    for r in read(data / "moe/gpu_moe_power.csv.gz"):
        if r["distribution"] == "balanced":
            tokens, width, k, experts = (
                int(r[x]) for x in ("num_tokens", "hidden_size", "topk", "num_experts")
            )
            ep, ffn = int(r["moe_ep_size"]), int(r["inter_size"]) // int(r["moe_tp_size"])
            item, rows = BYTES[r["moe_dtype"]], tokens * k / ep
            weights = item * 3 * min(experts / ep, rows) * width * ffn
            nbytes = weights + rows * (item * (width + ffn) + 2 * (2 * ffn + width))
            shape = (width, int(r["inter_size"]), k, experts)
            out.append(
                kernel(
                    r,
                    r["gpu"].lower(),
                    r["moe_dtype"],
                    shape,
                    tokens,
                    (6 * rows * width * ffn, nbytes),
                )
            )
    return out


def predict(made: EnergyCoefficients, kernels: list[Kernel]) -> np.ndarray:
    """Watts [K], kernels of one chip."""
    use = {
        p: np.array([k.flop_use if k.flops == p else 0.0 for k in kernels]) for p in ("bf16", "fp8")
    }
    return energy.kernel_power(kernels[0].chip, use, np.array([k.hbm_use for k in kernels]), made)


def by_chip(kernels: list[Kernel]) -> list[list[Kernel]]:
    """Kernels of each chip."""
    return [[k for k in kernels if k.chip == chip] for chip in sorted({k.chip for k in kernels})]


def fit(kernels: list[Kernel]) -> EnergyCoefficients:
    """Robust bounded least squares of log(capped prediction/measured)."""
    groups = by_chip(kernels)
    watts = [np.array([k.watts for k in group]) for group in groups]

    def residuals(value_C: np.ndarray) -> np.ndarray:
        made = EnergyCoefficients(*value_C, **LINKS)
        return np.concatenate(
            [np.log(predict(made, g) / w) for g, w in zip(groups, watts, strict=True)]
        )

    solution = least_squares(
        residuals, START_C, bounds=(LOW_C, HIGH_C), loss="soft_l1", f_scale=0.1
    )
    return EnergyCoefficients(*(float(f"{v:.4g}") for v in solution.x), **LINKS)


def score(scored: list[tuple[EnergyCoefficients, list[Kernel]]]) -> dict[str, dict[str, float]]:
    """Median and p90 absolute percentage error of the power, over all kernels and over those below
    the cap.
    """
    ape, free = [], []
    for made, kernels in scored:
        for group in by_chip(kernels):
            watts_K = np.array([k.watts for k in group])
            ape.append(100 * np.abs(predict(made, group) / watts_K - 1))
            free.append(watts_K < 0.95 * np.array([k.limit for k in group]))
    ape_K, free_K = np.concatenate(ape), np.concatenate(free)
    return {"all": summary(ape_K), "below 95 % of the cap": summary(ape_K[free_K])}


def summary(ape_K: np.ndarray) -> dict[str, float]:
    """Median, p90 and count of errors in per cent."""
    if not len(ape_K):
        return {"kernels": 0}
    median, p90 = np.percentile(ape_K, (50, 90))
    return {
        "median_pct": round(float(median), 1),
        "p90_pct": round(float(p90), 1),
        "kernels": len(ape_K),
    }


def held_out(
    kernels: list[Kernel], key: Callable[[Kernel], Any]
) -> list[tuple[EnergyCoefficients, list[Kernel]]]:
    """Every value of `key` with a fit on the others."""
    out = []
    for value in sorted({key(k) for k in kernels}):
        made = fit([k for k in kernels if key(k) != value])
        out.append((made, [k for k in kernels if key(k) == value]))
    return out


def aggregates(data: Path) -> dict[str, dict[str, float]]:
    """Means over the runs of each (benchmark, nodes): seconds, and watts of a node (mean, p01, p50,
    p99).
    """
    runs: dict[str, list[dict[str, str]]] = {}
    for r in read(data / "planning/power/mlperf_v4.0_smc_h100_power_runs.csv"):
        runs.setdefault(f"{r['benchmark']} {r['nodes']}", []).append(r)
    columns = {
        "seconds": "duration_s",
        "mean": "mean_node_W",
        "p01": "p01_W",
        "p50": "p50_W",
        "p99": "p99_W",
    }
    return {
        name: {new: float(np.mean([float(r[old]) for r in rows])) for new, old in columns.items()}
        for name, rows in sorted(runs.items())
    }


def host(found: dict[str, dict[str, float]]) -> float:
    """Watts per chip of a node beside its chips, where a run idled: p01 less eight idle chips."""
    idle, _ = energy.idle_and_peak("h100")
    return float(np.mean([a["p01"] / 8 - idle for a in found.values() if a["p01"] < 3000]))


def lora_flops(samples: int) -> tuple[float, float]:
    """(fp8, bf16) FLOPs of LoRA: linears forward and input gradients (4/6), causal attention
    forward and backward.
    """
    layer = 2 * WIDTH * WIDTH + 2 * WIDTH * KV + 3 * WIDTH * FFN
    linears = 4 * SEQ * (LAYERS * layer + VOCAB * WIDTH)
    return samples * linears, samples * 3 * 2 * SEQ**2 * WIDTH * LAYERS


def lora(found: dict[str, dict[str, float]], made: EnergyCoefficients) -> dict[str, Any]:
    """Predicted and measured node power of LoRA while it trains, with the host power of the other
    aggregates.

    Training seconds are those outside evaluations, (mean − p01)/(p50 − p01) of the run. One node is
    taken to compute all the time; what 8 nodes need beyond its chip-seconds is exposed
    communication. HBM bytes are not known and left out: one node is at the cap without them."""
    others = host({name: a for name, a in found.items() if "lora" not in name})
    train = {}
    for nodes in (1, 8):
        a = found[f"llama2_70b_lora {nodes}"]
        train[nodes] = a["seconds"] * (a["mean"] - a["p01"]) / (a["p50"] - a["p01"])
    out = {}
    for nodes in (1, 8):
        watts = []
        for samples in SAMPLES:
            fp8, bf16 = (f / (8 * nodes) for f in lora_flops(samples))
            work = {"fp8": fp8, "bf16": bf16}
            activity = energy.Activity(
                "h100", 8 * nodes, nodes, train[nodes], train[1] / nodes, work
            )
            watts.append(
                round(float(energy.step_energy(activity, 8 * others, made).mean_power_per_node))
            )
        measured = found[f"llama2_70b_lora {nodes}"]["p50"]
        out[f"{nodes} nodes"] = {
            "measured_p50_W": round(measured),
            "predicted_W": dict(zip(map(str, SAMPLES), watts, strict=True)),
            "error_pct": round(100 * (watts[1] / measured - 1), 1),
        }
    return out


def idle_left_out(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Signed error in per cent of the idle node power of each aggregate, with the host power of the
    others.
    """
    idle, _ = energy.idle_and_peak("h100")
    out = {}
    for name, a in found.items():
        if a["p01"] < 3000:
            watts = 8 * (host({n: b for n, b in found.items() if n != name}) + idle)
            out[name] = round(100 * (watts / a["p01"] - 1), 1)
    return out


def ceiling(found: dict[str, dict[str, float]], host_per_chip: float) -> dict[str, float]:
    """p99 node power over host + 8 caps, of runs on one node: a bound, since their utilisation is
    not known.
    """
    _, peak = energy.idle_and_peak("h100")
    ratios = {
        name: a["p99"] / (8 * (host_per_chip + peak))
        for name, a in found.items()
        if name.endswith(" 1")
    }
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


def document(data: Path) -> dict[str, Any]:
    """The json: coefficients, bounds, provenance, errors."""
    moe, gemm, found = moe_kernels(data), gemm_kernels(data), aggregates(data)
    long = [k for k in moe if k.tokens >= TOKENS and k.seconds >= SHORTEST]
    made = {"default": fit(long)} | {group[0].chip: fit(group) for group in by_chip(long)}
    short = [k for k in moe if k.tokens >= TOKENS and k.seconds < SHORTEST]
    return {
        "about": "shares of a chip's peak power at the full rate of each term; joules per byte of "
        "links; host watts",
        "made_by": "python -m tools.fit_energy DATA",
        "date": datetime.date.today().isoformat(),
        "coefficients": {n: {f: getattr(c, f) for f in FITTED} for n, c in made.items()},
        "bounds": {
            f: [float(lo), float(hi)] for f, lo, hi in zip(FITTED, LOW_C, HIGH_C, strict=True)
        },
        "same_generation": GENERATION,
        "links_joules_per_byte": LINKS,
        "host_watts_per_chip": round(host(found), 1),
        "idle_share": IDLE_SHARE,
        "evidence": {
            "h200, b200": "fitted on their own meter",
            "same_generation": "the shares of the measured chip times the chip's own cap and "
            "peaks, an assumption",
            "default": "pooled; every other chip, an assumption",
            "links_joules_per_byte": "assumed, nothing measured",
            "idle_share": "assumed where idle power is not published",
            "host_watts_per_chip": "8 idle aggregates of one H100 server, immersion cooled: fans "
            "are not in it",
        },
        "sources": {
            "kernels fitted": f"{len(long)} of {len(moe)} balanced in moe/gpu_moe_power.csv.gz, "
            "tokens ≥ 1024 and ≥ 1 ms (ai-dynamo/aiconfigurator, Apache-2.0)",
            "kernels scored": f"{len(gemm)} in moe/h200_gemm_power.csv.gz "
            "(ai-dynamo/aiconfigurator, Apache-2.0)",
            "nodes": "140 runs in planning/power/mlperf_v4.0_smc_h100_power_runs.csv "
            "(mlcommons/training_results_v4.0, Apache-2.0)",
        },
        "errors": {
            "kernel_power": kernel_errors(long, short, gemm, made),
            "node_power": node_errors(found, made[GENERATION["h100"]]),
        },
    }


def kernel_errors(
    long: list[Kernel], short: list[Kernel], gemm: list[Kernel], made: dict[str, EnergyCoefficients]
) -> dict:
    """Errors of kernel power in sample, by held-out shape and chip, and on what was never
    fitted.
    """
    groups, brief = by_chip(long), [k for k in gemm if k.seconds < 2e-4]
    return {
        "in_sample": {g[0].chip: score([(made[g[0].chip], g)]) for g in groups},
        "held_out_shape": {g[0].chip: score(held_out(g, lambda k: k.shape)) for g in groups},
        "held_out_chip": {g[0].chip: score([(c, g)]) for c, g in held_out(long, lambda k: k.chip)},
        "dense_gemm_from_0.2_ms_never_fitted": score(
            [(made["h200"], [k for k in gemm if k.seconds >= 2e-4])]
        ),
        "dense_gemm_shorter_never_fitted": score([(made["h200"], brief)]),
        "expert_layers_under_1_ms_never_fitted": {
            g[0].chip: score([(made[g[0].chip], g)]) for g in by_chip(short)
        },
    }


def node_errors(found: dict[str, dict[str, float]], made: EnergyCoefficients) -> dict[str, Any]:
    """Errors on MLPerf nodes of H100."""
    return {
        "idle_node_left_out_pct": idle_left_out(found),
        "lora_left_out": lora(found, made),
        "p99_over_ceiling": ceiling(found, host(found)),
        "not_validated": "power of bert, dlrm, resnet, ssd and unet3d under load: their "
        "utilisation is not logged",
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--out", type=Path, default=Path(energy.__file__).parent / "coefficients" / "energy.json"
    )
    flags = parser.parse_args()
    made = document(flags.data)
    flags.out.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(
        json.dumps(
            {"coefficients": made["coefficients"], "errors": made["errors"]},
            indent=1,
            ensure_ascii=False,
        )
    )


if __name__ == "__main__":
    main()
