"""What a step of a plan sends, computes and spends: bytes by mesh axis, FLOPs, HBM traffic, joules.

Legend: N plans of the space, K of them ranked, T tokens of a microbatch on a device, D width;
bytes, joules."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fdp.price import energy, hybrid, network, step_time
from fdp.price.hardware import Cluster
from fdp.price.hybrid import Model, PricedJobs
from fdp.price.workload import Columns, Job

AXES = ("tp", "cp", "ep", "pp", "dp")


def traffic(x: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Bytes (N,) that a device sends per step over each axis, as fdp.price.step_time prices them
    (ring wire bytes).

    tp: four all-reduces of 2·T·D a layer and microbatch, six with full recomputation (Shoeybi et
    al. 2019); cp: keys and values round the ring, once forward and twice backward; ep: four
    all-to-alls an expert layer, six with full recomputation; pp: two messages a microbatch and
    chunk; dp: gradients, or ZeRO's gathers and scatters, over dp·cp."""
    T, D, t, m = x["microbatch"] * x["seq"] / x["cp"], x["width"], x["tp"], x["microbatches"]
    layers, moe = m * x["layers"] / x["pp"], m * x["moe_layers"] / x["pp"]
    again = 4 + 2 * x["full"]

    def ring(n: Any) -> Any:
        return 2 * (n - 1) / n

    plain, experts, embedding = step_time.local_parameters(x)
    ranks, body, g = x["dp"] * x["cp"], plain + embedding, np.where(x["fp16"] > 0, 2.0, 4.0)
    expert_ranks = np.maximum(ranks * t / (x["ep"] * x["etp"]), 1.0)
    last = body * (g + np.where(x["zero"] >= 1, 2.0, g)) / 2 * ring(ranks)
    shards = x["shards"]
    every = body * (2 + g / 2) * m * ring(shards) + body * g / shards * ring(ranks / shards)
    once, each = (experts * n * ring(expert_ranks) for n in ((g + 2) / 2, (2 + g / 2) * m))
    out = {
        "tp": step_time.reductions(x) * ring(t) * 2 * T * D * layers,
        "cp": 3 * (x["cp"] - 1) * 4 * T * step_time.kv_width(x) * layers,
        "ep": again * 2 * T / t * x["topk"] * D * (x["ep"] - 1) / x["ep"] * moe,
        "pp": np.where(
            x["pp"] > 1, 2 * x["virtual"] * m * 2 * T * D / np.where(x["sp"] > 0, t, 1.0), 0.0
        ),
        "dp": np.where(x["lora"] > 0, 0.0, np.where(x["zero"] >= 3, every + each, last + once)),
    }
    return {k: np.asarray(v, float) for k, v in out.items()}


def _leaving(x: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Share (N,) of each axis's bytes that leaves the scale-up domain: of a ring one link in every
    `local`.
    """
    degrees = {"tp": x["tp"], "cp": x["cp"], "ep": x["ep"], "pp": x["pp"], "dp": x["dp"] * x["cp"]}
    inner = {
        "tp": 1.0,
        "cp": x["tp"],
        "ep": x["etp"],
        "pp": x["tp"] * x["cp"] * x["dp"],
        "dp": x["tp"],
    }
    out = {}
    for axis, n in degrees.items():
        local = network.local_ranks(n, inner[axis], x["domain"])
        crossing = (n - local) / np.maximum(n - 1, 1) if axis == "ep" else 1 / local
        out[axis] = np.where(n > local, crossing, 0.0)
    return out


def _work(model: Model, job: Job, x: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({"linear", "rest"} FLOPs, HBM bytes) of a chip in a step, recomputation included, mean over
    chips. A causal mask halves the scores, the convention of `ModelShape.forward_flops`. Bytes are
    those of activations, weights, gradients, optimizer state and float32 logits."""
    a, tokens = job.shape, job.batch * job.seq / (x["tp"] * x["pp"] * x["dp"] * x["cp"])
    scores = (
        2
        * a.layers
        * job.seq
        * a.heads
        * (a.head_dim + (a.value_dim or a.head_dim))
        * (0.5 if job.causal else 1.0)
    )
    head = 2.0 * a.vocab * a.width
    linear = (3 + x["full"]) * (a.forward_flops(job.seq, job.causal) - scores - head) * tokens
    rest = (3 * head + step_time.score_passes(x) * scores) * tokens
    k = hybrid.bounded(model.time, step_time.BOUNDS)
    ffn = (a.layers - a.moe_layers) * a.ffn + a.moe_layers * (a.topk + a.shared_experts) * a.moe_ffn
    split = np.where(
        x["sp"] > 0, 1.0, x["tp"]
    )  # without sequence parallelism every tensor rank repeats it
    streams = tokens * (
        a.layers * a.width * k["bytes_width"] * split
        + (a.layers * a.heads * a.head_dim + ffn) * k["bytes_hidden"]
    )
    plain, experts, embedding = step_time.local_parameters(x)
    held = plain + experts + embedding
    shards = np.where(x["zero"] >= 1, x["shards"], 1.0)
    weights = 2 * held * (3 + x["full"]) * x["microbatches"]
    return {"linear": linear, "rest": rest}, (
        3 + x["full"]
    ) * streams + weights + 30 * held / shards + 24 * tokens * a.vocab


def joules(model: Model, job: Job, cluster: Cluster, x: Columns, p: PricedJobs) -> np.ndarray:
    """Energy (K,) of a step over all nodes and chips; nan where a chip's power is not published."""
    total = np.zeros(len(p.time))
    if any(g.chip.peak_power is None for g in cluster.groups):
        return total + np.nan
    flops, hbm = _work(model, job, x)
    moved, leaving = traffic(x), _leaving(x)
    out = sum(moved[a] * leaving[a] for a in AXES)
    up = sum(moved.values()) - out
    busy = (p.terms["compute"] + p.terms["optimizer"]) / sum(p.terms.values()) * p.time
    low = job.precision if job.precision in ("fp8", "fp4") else "bf16"
    done = (
        {"bf16": flops["linear"] + flops["rest"]}
        if low == "bf16"
        else {low: flops["linear"], "bf16": flops["rest"]}
    )
    for g in cluster.groups:  # a faster chip computes as much in less time, then waits
        active = np.clip(busy * job.chip.peak_bf16_flops / g.chip.peak_bf16_flops, 0.0, p.time)
        activity = energy.Activity(
            g.chip.name, g.count * g.chips, g.count, p.time, active, done, hbm, up, out
        )
        total = total + energy.step_energy(activity, g.host_power).joules
    return total
