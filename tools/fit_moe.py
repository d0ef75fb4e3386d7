"""Writes `fdp/price/coefficients/moe_matmul.json`: measured expert matmuls, thinned, with the
errors of what is made of them.

    python -m tools.fit_moe DATA              # rewrites the json, prints the errors; ~20 s
    python -m tools.fit_moe DATA --out=table.json

DATA holds moe/gpu_moe_gemm_latency_bf16.csv.gz and moe/deepep_normal_h100_1node.csv.gz. Of the
kernel times the minimum over frameworks counts, since some have rows with bad kernel
configurations; groups are balanced. Kept are token counts that are powers of two; the others are
held out. A kernel measured for more ranks than choices a token (ep > k) walks over tokens that have
no row on its device: twice the time and more at 4,096 tokens. After a dispatch a device holds no
such tokens, so that those kernels are left out, and only judge the extrapolation to few experts,
where tokens are few.

Legend: D width, W hidden of an expert, e experts of the device, k choices a token, R rows.
"""

import argparse
import datetime
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fdp.price import hardware, moe_matmul, network
from fdp.price.moe_matmul import Curve
from tools.fit_network import Class, deepep, predict, read, summary

FILE = "moe/gpu_moe_gemm_latency_bf16.csv.gz"
SMALL = 256  # tokens: up to here, walking over them costs little beside the kernel
# GB/s of a NIC of 50 in DeepEP's normal kernels (docs/legacy.md at dd758ca, H800): 58 and 51 on 4
# and 8 nodes count what stays in the node. No data has NCCL's all-to-all between nodes.
NIC = {"4 nodes": 58 * 3 / 4, "8 nodes": 51 * 7 / 8}
STAND_IN = {
    "v100": "a100",
    "v100_16gb": "a100",
    "a100_40gb": "a100",
    "h100_96gb_500w": "h100",
    "b300": "b200",
    "gb200": "b200",
    "gb300": "b200",
    "default": "h100",
}
PAIRS = [("h200", "h100"), ("h100", "a100"), ("b200", "h200"), ("l40s", "a100")]  # of generations

Shape = tuple[int, int, int]  # D, W, e
Times = dict[float, float]  # rows of the device: seconds
Rows = list[dict[str, str]]


def measured(rows: Rows, walking: bool = False) -> dict[tuple[str, *Shape], Times]:
    """Fastest times of balanced groups by (chip, D, W, e); `walking`: only where ep > k and tokens
    are few.

    Rows are counted for the device that holds the first experts; where two numbers of choices give
    one shape, the larger is taken."""
    best: dict[Any, float] = {}
    for r in rows:
        if r["distribution"] == "balanced":
            names = ("hidden_size", "inter_size", "moe_tp_size", "moe_ep_size", "topk")
            D, hidden, tp, ep, k = (int(r[name]) for name in names)
            experts, tokens = int(r["num_experts"]), int(r["num_tokens"])
            if (ep > k) == walking and (tokens <= SMALL or not walking):
                shape = (r["gpu"].lower(), D, hidden // tp, experts // ep)
                at = (shape, k, held_rows(tokens, experts, k, experts // ep))
                best[at] = min(best.get(at, np.inf), 1e-3 * float(r["latency"]))
    most = {shape: k for shape, k, _ in sorted(best)}
    found: dict[Any, Times] = {}
    for (shape, k, held), seconds in sorted(best.items()):
        if k == most[shape] and held >= 1:
            found.setdefault(shape, {})[held] = seconds
    return found


@functools.cache
def held_rows(tokens: int, experts: int, k: int, e: int) -> float:
    """Rows of the first `e` experts where choice i of token t is expert t + i·⌈E/k⌉, as the
    benchmark draws balanced groups; few tokens are spread."""
    stride = -(-experts // k)
    t = np.arange(tokens) * (1.0 if tokens >= stride else stride / tokens)
    return float(((t[:, None] + stride * np.arange(k)) % experts < e).sum())


def thin(times: Times) -> Times:
    """What ships of one shape: rows that double, from the fewest on, without a gap."""
    kept, rows = {}, min(times)
    while rows in times:
        kept[rows] = times[rows]
        rows *= 2
    return kept


def to_curve(chip: str, shape: Shape, times: Times) -> Curve:
    """Times as a curve; times as written in the file."""
    shipped = [1e-6 * rounded(s) for s in times.values()]
    return moe_matmul.curve(hardware.chip(chip), shape, list(times), shipped)


def rounded(seconds: float) -> float:
    """Microseconds with four digits."""
    return float(f"{1e6 * seconds:.4g}")


def logs(chip: str, shape: Shape, times: Times, found: list[Curve]) -> np.ndarray:
    """log(predicted / measured) at all rows of `times`."""
    rows, seconds = (np.array(list(v)) for v in (times.keys(), times.values()))
    made = moe_matmul.interpolate(found, hardware.chip(chip), rows, shape)
    return np.log(made / seconds)


def scores(groups: Iterable[np.ndarray]) -> dict[str, float]:
    """Errors in per cent, and the bias."""
    found = np.concatenate(list(groups))
    bias = 100 * float(np.expm1(np.median(found)))
    return summary(list(100 * np.abs(np.expm1(found)))) | {"bias_pct": round(bias, 1)}


def held_out(times: dict[tuple[str, *Shape], Times], few: Any) -> dict[str, dict[str, float]]:
    """Errors by how far a time is from the data, over all chips; names as in `moe_matmul.error`."""
    kept = {key: thin(points) for key, points in times.items()}
    own = {key: to_curve(key[0], key[1:], points) for key, points in kept.items()}
    chips = {c: [k for k in own if k[0] == c] for c in sorted({k[0] for k in own})}
    out: dict[str, list[np.ndarray]] = {name: [] for name in moe_matmul.STEPS}
    for key, points in times.items():
        chip, shape = key[0], key[1:]
        rest = {r: s for r, s in points.items() if r not in kept[key]}
        out["a measured shape"].append(logs(chip, shape, rest, [own[key]]))
        others = [own[k] for k in chips[chip] if k != key]
        out["a shape between measured ones"].append(logs(chip, shape, points, others))
        short = to_curve(chip, shape, dict(list(kept[key].items())[:-3]))  # an eighth of the rows
        past = {r: s for r, s in points.items() if r > short.rows[-1] * shape[2]}
        out["past the measured rows"].append(logs(chip, shape, past, [short]))
    for key, points in few.items():
        made = logs(key[0], key[1:], points, [own[k] for k in chips[key[0]]])
        out["fewer experts than measured"].append(made)
    for chip, other in PAIRS:
        for key in chips[chip]:
            stand = [own[k] for k in chips[other]]
            out["a chip that was not measured"].append(logs(chip, key[1:], kept[key], stand))
    return {name: scores(each) for name, each in out.items()}


def uneven(rows: Rows) -> dict[str, Any]:
    """Time of power-law groups over that of balanced ones with the same rows and experts."""
    best: dict[Any, float] = {}
    keys = ("gpu", "hidden_size", "inter_size", "moe_tp_size", "topk", "num_experts", "num_tokens")
    for r in rows:
        if r["moe_ep_size"] == "1":
            at = (r["distribution"], *(r[k] for k in keys))
            best[at] = min(best.get(at, np.inf), float(r["latency"]))
    even = {at: best.get(("balanced", *at[1:])) for at in best if "power" in at[0]}
    pairs = [(best[at] / seconds, at) for at, seconds in even.items() if seconds]
    out = {}
    for name, low, high in (("below 512 tokens", 0, 512), ("from 512 tokens", 512, np.inf)):
        ratios = [ratio for ratio, at in pairs if low <= int(at[-1]) < high]
        out[name] = dict(zip(("p10", "median", "p90"), _quantiles(ratios), strict=True))
    return out


def _quantiles(values: Iterable[float]) -> list[float]:
    return [round(float(q), 2) for q in np.quantile(list(values), (0.1, 0.5, 0.9))]


def dispatch(found: list[Class]) -> dict[str, Any]:
    """DeepEP inside 8 H100: α, β of seconds = α + bytes/β by least relative error, and what
    fdp.price.network makes of the same copies.

    Bytes leave the device: 7/8 of the copies, and 4 bytes a block of 128 for the scales of the fp8
    dispatch. In bf16 it would pass the links' peak."""
    out: dict[str, Any] = {}
    for way in ("dispatch", "combine"):
        own = [one for one in found if one.source == f"deepep {way}"]
        n, s = (np.concatenate([getattr(o, v) for o in own]) for v in ("nbytes_P", "seconds_P"))
        sent = 7 / 8 * n * (1 + 4 / 128 if way == "dispatch" else 1)
        line = np.column_stack([1 / s, sent / s])
        (alpha, slope), *_ = np.linalg.lstsq(line, np.ones_like(s))
        network_s = np.concatenate([predict(network.coefficients("h100"), one) for one in own])
        out[way] = {
            "alpha_us": round(1e6 * alpha, 1),
            "gbytes_per_s": round(1e-9 / slope, 1),
            "mape_pct": round(100 * float(np.abs(line @ [alpha, slope] - 1).mean()), 1),
            "network_mape_pct": round(100 * float(np.abs(network_s / s - 1).mean()), 1),
            "points": len(s),
        }
    return out


def document(data: Path) -> dict[str, Any]:
    """The json: provenance, errors, curves."""
    rows = read(data / FILE)
    times, few = measured(rows), measured(rows, walking=True)
    made: dict[str, list[Any]] = {}
    for (chip, *shape), points in times.items():
        kept = thin(points)
        micros = [rounded(s) for s in kept.values()]
        made.setdefault(chip, []).append([*shape, min(kept), micros])
    return {
        "about": "forward time of the grouped matmuls of a device's experts (gate, up, down, "
        "gather and weighted sum), bfloat16, balanced groups, minimum over frameworks",
        "made_by": "python -m tools.fit_moe DATA",
        "date": datetime.date.today().isoformat(),
        "source": f"{FILE}: ai-dynamo/aiconfigurator systems/data at 095f58a",
        "frameworks": sorted({r["src"] for r in rows}),
        "licence": "Apache-2.0, Copyright NVIDIA CORPORATION & AFFILIATES",
        "changes": "thinned to rows that double; no kernel measured for more ranks than choices a "
        "token, which walks over tokens without a row on its device",
        "stand_in": STAND_IN,
        "errors": held_out(times, few),
        "uneven_groups_over_balanced": uneven(rows),
        "nic_share": round(sum(NIC.values()) / len(NIC) / 50, 3),
        "nic_share_evidence": f"published, DeepEP on H800: {NIC} GB/s of 50; other chips assumed",
        "deepep_8_h100": dispatch(deepep(data)),
        "columns": "width, hidden of an expert, experts of the device, first rows of the device; "
        "microseconds at 1, 2, 4, ... times these rows",
        "curves": made,
    }


def text(made: dict[str, Any]) -> str:
    """JSON with one line a curve."""
    head = json.dumps({k: v for k, v in made.items() if k != "curves"}, indent=1)[:-2]
    chips = (
        f'  "{chip}": [\n' + ",\n".join(f"   {json.dumps(c)}" for c in found) + "\n  ]"
        for chip, found in made["curves"].items()
    )
    return head + ',\n "curves": {\n' + ",\n".join(chips) + "\n }\n}\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    place = Path(moe_matmul.__file__).parent / "coefficients" / "moe_matmul.json"
    parser.add_argument("--out", type=Path, default=place)
    flags = parser.parse_args()
    made = document(flags.data)
    flags.out.write_text(text(made), "utf-8")
    shown = ("errors", "uneven_groups_over_balanced", "deepep_8_h100")
    print(json.dumps({k: made[k] for k in shown}, indent=1))


if __name__ == "__main__":
    main()
