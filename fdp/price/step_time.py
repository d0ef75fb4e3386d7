"""Analytic time of one training step from a job's columns and bounded physical coefficients;
differentiable in both.

Terms: matmuls with an efficiency that falls with small dimensions, attention, memory-bound
operations, launch floor; exposed communication over tp, ep, cp, dp with the NIC-sharing rule of
fdp.price.network (which says how its rates relate to these); the pipeline's bubble and transfers;
optimizer. FLOPs as the field reports them: a causal mask halves the scores
(`ModelShape.forward_flops`), unlike in `fdp.count.counts.CONVENTION`. Formulas: Shoeybi et al.
2019, Narayanan et al. 2021 (arXiv 2104.04473, interleaving), Korthikanti et al. 2022
(recomputation, sequence parallelism), Rajbhandari et al. 2020 (ZeRO). Experts are loaded evenly
unless `fdp.price.moe.columns_of_loads` stands among the columns.

Legend: T tokens of a microbatch on a device, D width; every array is (N,), one entry a job; times
in seconds."""

from collections.abc import Mapping
from typing import Any

from fdp.price.network import (
    all_gather,
    all_reduce,
    group_bandwidth,
    local_ranks,
    namespace,
    reduce_scatter,
)

Array = Any
Terms = dict[str, Array]

# name: (low, high, start). Nothing outside these bounds is physical, whatever the fit would like.
BOUNDS = {
    "gemm": (0.3, 0.97, 0.75),  # fraction of peak of a large 16-bit matmul
    "gemm_fp8": (0.2, 0.9, 0.55),
    "gemm_fp4": (0.1, 0.8, 0.35),
    "grouped": (0.2, 1.0, 0.7),  # of that, grouped expert matmuls
    "half_rows": (0.0, 1500.0, 150.0),  # tokens, columns, depth at which half of it is reached
    "half_columns": (0.0, 1500.0, 150.0),
    "half_depth": (0.0, 1500.0, 150.0),
    "attention": (0.1, 0.8, 0.5),  # fused attention, fraction of the 16-bit peak
    "hbm": (0.4, 0.95, 0.8),
    # bytes per token and residual element, forward: norms, residuals, dropout
    "bytes_width": (4.0, 60.0, 20.0),
    "bytes_hidden": (2.0, 40.0, 8.0),  # per token and hidden element: activations, rotary
    "bytes_score": (2.0, 40.0, 12.0),  # per attention score, where attention is not fused
    "launch": (0.0, 2e-3, 2e-4),  # least time of a layer's forward and backward, s
    "launch_moe": (0.0, 5e-3, 5e-4),  # more for an expert layer
    # more per further tensor-parallel rank where stages are pipelined
    "launch_rank": (0.0, 1e-2, 1e-4),
    "launch_alone": (0.0, 1.0, 0.2),  # share of launch_rank without a pipeline
    # s per microbatch while point-to-point transfers stall (see `stalled`)
    "stall": (0.2, 3.0, 1.2),
    "link_up": (0.3, 1.0, 0.8),  # fraction of the link rate
    "link_out": (0.15, 1.0, 0.7),
    "congestion": (0.0, 2.0, 0.1),  # loss of link_out per doubling of nodes
    "alpha_up": (0.0, 5e-5, 1e-5),  # s per hop
    "alpha_out": (0.0, 1e-4, 2e-5),
    "overlap_tp": (0.0, 0.9, 0.3),  # hidden share, software after 2022
    "overlap_dp": (0.0, 1.0, 0.5),  # share of the backward pass that hides it
    # ZeRO-1's scatter and gather of uneven shards, over the time of a ring
    "uneven": (0.8, 5.0, 1.2),
    "exposed_gather": (0.0, 1.0, 0.5),  # share of ZeRO-1's parameter gather that nothing hides
    "overlap_ep": (0.0, 0.9, 0.3),
    "overlap_cp": (0.0, 1.0, 0.7),
    "exposed_pp": (0.0, 1.0, 0.5),
    "bubble": (0.6, 1.5, 1.0),
    # share of the head's work that an uneven partition spreads over the stages
    "balanced": (0.0, 1.0, 0.3),
    "step": (0.0, 0.5, 0.02),  # s per step whatever the plan
    "stage": (0.0, 5e-3, 2e-4),  # s per microbatch
}


def array_module(*tables: Mapping[str, Array]) -> Any:
    """jax.numpy where one of the values is a jax array, else numpy: fits differentiate these
    formulas, predictions evaluate them without compiling anything."""
    return namespace(*(v for table in tables for v in table.values()))


def _gemm(
    flops: Array, rows: Array, columns: Array, depth: Array, peak: Array, k: Mapping[str, Array]
) -> Array:
    shape = (
        (1 + k["half_rows"] / rows)
        * (1 + k["half_columns"] / columns)
        * (1 + k["half_depth"] / depth)
    )
    return flops / peak * shape


def layer_compute(x: Mapping[str, Array], k: Mapping[str, Array]) -> Terms:
    """Forward seconds of one layer and microbatch: dense and expert FFN layers, attention scores,
    memory-bound rest.
    """
    xp = array_module(x, k)
    T, D, t = x["microbatch"] * x["seq"] / x["cp"], x["width"], x["tp"]
    linear = x["peak"] * k["linear"]
    rate = x["hbm"] * k["hbm"]
    into = _gemm(2 * T * x["into"] / t, T, x["into"] / D / t, D, linear, k)
    out = _gemm(2 * T * x["out"] / t, T, D, x["out"] / D / t, linear, k)
    up = _gemm(
        2 * T * (x["projections"] - 1) * D * x["ffn"] / t,
        T,
        (x["projections"] - 1) * x["ffn"] / t,
        D,
        linear,
        k,
    )
    down = _gemm(2 * T * D * x["ffn"] / t, T, D, x["ffn"] / t, linear, k)
    scores = 2 * T * x["seq"] * x["heads"] / t * (x["head_dim"] + x["value_dim"])
    fused = scores * xp.where(x["causal"] > 0, 0.5, 1.0) / (x["peak16"] * k["attention"])
    # What is not fused computes the masked half as well.
    unfused = (
        scores / (x["peak16"] * k["gemm"]) + T * x["seq"] * x["heads"] / t * k["bytes_score"] / rate
    )
    ffn = xp.where(
        x["moe_ffn"] > 0, x["topk"] * x["moe_ffn"] + x["shared"] * x["moe_ffn"], x["ffn"]
    )
    split = xp.where(x["sp"] > 0, t, 1.0)
    rest = (
        T
        * (
            D * k["bytes_width"] / split
            + (x["heads"] * x["head_dim"] + x["ffn"]) / t * k["bytes_hidden"]
        )
        / rate
    )
    rest_moe = (
        T
        * (
            D * k["bytes_width"] / split
            + (x["heads"] * x["head_dim"] + ffn) / t * k["bytes_hidden"]
        )
        / rate
    )
    mixed = _experts(x, k, T) if "topk" in x else 0.0
    return {
        "attention_matmuls": into + out,
        "scores": xp.where(x["modern"] > 0, fused, unfused),
        "dense_ffn": up + down,
        "expert_ffn": mixed,
        "rest": rest,
        "rest_moe": rest_moe
        + T / t * x["topk"] * D * k["bytes_width"] / rate,  # permutation of routed tokens
    }


def _experts(x: Mapping[str, Array], k: Mapping[str, Array], T: Array) -> Array:
    """Grouped matmuls: a rank sees the tokens of its whole expert group that chose its E/ep
    experts, all alike unless `routed_seconds` of given loads (fdp.price.moe) stands in `x`.
    """
    xp = array_module(x, k)
    D, t, g = x["width"], x["tp"], x["projections"]
    hidden = xp.maximum(x["moe_ffn"], 1.0)
    rows = xp.maximum(T / t * x["etp"] * x["topk"] * x["ep"] / x["experts"], 1.0)
    flops = 2 * T / t * x["topk"] * g * D * hidden
    shared = _gemm(
        2 * T * x["shared"] * g * D * hidden / t, T, hidden / t, D, x["peak"] * k["linear"], k
    )
    if "routed_seconds" in x:
        return x["routed_seconds"] + shared
    routed = _gemm(flops, rows, hidden / x["etp"], D, x["peak"] * k["linear"] * k["grouped"], k)
    # Weights are read whatever the number of tokens: the bound of small expert batches.
    weights = x["experts"] / x["ep"] * g * D * hidden / x["etp"] * 2 / (x["hbm"] * k["hbm"])
    return xp.maximum(routed, weights) + shared


def _links(
    x: Mapping[str, Array], k: Mapping[str, Array], degree: Array, inner: Array
) -> tuple[Array, Array, Array]:
    """(bandwidth, latency a hop, ranks in one domain) of a group of `degree` ranks outside `inner`
    others.
    """
    xp = array_module(x, k)
    local = local_ranks(degree, inner, x["domain"])
    nodes = xp.maximum(x["pp"] * x["dp"] * x["cp"] * x["tp"] / x["domain"], 1.0)
    out = x["out_bw"] * k["link_out"] / (1 + k["congestion"] * xp.log2(nodes))
    inside = degree <= local
    return (
        group_bandwidth(degree, local, x["up"] * k["link_up"], out),
        xp.where(inside, k["alpha_up"], k["alpha_out"]),
        local,
    )


def reductions(x: Mapping[str, Array]) -> Array:
    """All-reduces of hidden states over tp per layer and microbatch, mean over layers (Shoeybi et
    al. 2019).

    Two forward and two backward, two more with full recomputation. Where sequence parallelism
    leaves tokens split over tp and experts are whole (etp < tp), an expert layer sends tokens to
    their experts instead: half is left."""
    whole = (x["sp"] > 0) & (x["etp"] < x["tp"])
    share = x["moe_layers"] / x["layers"] * array_module(x).where(whole, 1.0, 0.0)
    return (4 + 2 * x["full"]) * (1 - share / 2)


def kv_width(x: Mapping[str, Array]) -> Array:
    """Key (or value) elements of a token on a device; heads are replicated where tp exceeds
    them.
    """
    heads = x["kv_width"] / x["head_dim"]
    return x["kv_width"] / array_module(x).minimum(x["tp"], heads)


def layer_communication(x: Mapping[str, Array], k: Mapping[str, Array], compute: Terms) -> Terms:
    """Exposed seconds of one layer and microbatch, forward and backward together: tp, ep (expert
    layers), cp.
    """
    xp = array_module(x, k)
    T, D, t = x["microbatch"] * x["seq"] / x["cp"], x["width"], x["tp"]
    bandwidth, alpha, _ = _links(x, k, t, 1.0)
    hidden = xp.where(x["modern"] > 0, k["overlap_tp"], 0.0)
    tp = reductions(x) * all_reduce(2 * T * D, t, alpha, bandwidth) * (1 - hidden)
    return {"tp": tp, "ep": _dispatch(x, k, T), "cp": _ring(x, k, T, compute["scores"])}


def _dispatch(x: Mapping[str, Array], k: Mapping[str, Array], T: Array) -> Array:
    """Dispatch and combine, forward and backward: four all-to-alls, every rank over its own NIC,
    equal unless `exchange_seconds` of given loads, there and back, stands in `x`.
    """
    xp, again = array_module(x, k), 4 + 2 * x["full"]
    if "exchange_seconds" in x:
        return again / 2 * x["exchange_seconds"] * (1 - k["overlap_ep"])
    e = x["ep"]
    local = local_ranks(e, x["etp"], x["domain"])
    nbytes = 2 * T / x["tp"] * x["topk"] * x["width"]
    _, alpha, _ = _links(x, k, e, x["etp"])
    out = x["out_bw"] * k["link_out"]
    wire = nbytes * (
        xp.maximum(local - 1, 0) / e / (x["up"] * k["link_up"]) + (e - local) / e / out
    )
    return again * (wire + alpha * xp.log2(xp.maximum(e, 1.0))) * (1 - k["overlap_ep"])


def _ring(x: Mapping[str, Array], k: Mapping[str, Array], T: Array, scores: Array) -> Array:
    """Keys and values around the ring, once forward and twice backward, behind the attention of the
    resident block.
    """
    xp = array_module(x, k)
    c = x["cp"]
    bandwidth, alpha, _ = _links(x, k, c, x["tp"])
    wire = 3 * (c - 1) * (2 * 2 * T * kv_width(x) / bandwidth + alpha)
    return xp.maximum(wire - k["overlap_cp"] * 3 * scores, 0.05 * wire)


def local_parameters(x: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """(attention and dense, expert, embedding and head) parameters on the fullest device, before
    ZeRO.
    """
    per_layer = (x["into"] + x["out"]) / x["tp"]
    dense = x["projections"] * x["width"] * x["ffn"] / x["tp"]
    shared = x["shared"] * x["projections"] * x["width"] * x["moe_ffn"] / x["tp"]
    one = x["projections"] * x["width"] * x["moe_ffn"]
    experts = x["moe_layers"] * one * x["experts"] / (x["ep"] * x["etp"]) / x["pp"]
    plain = (
        x["layers"] * per_layer + (x["layers"] - x["moe_layers"]) * dense + x["moe_layers"] * shared
    )
    one_matrix = (x["pp"] > 1) | (x["tied"] > 0)
    embedding = x["vocab"] * x["width"] / x["tp"] * array_module(x).where(one_matrix, 1.0, 2.0)
    return plain / x["pp"], experts, embedding


def _data_parallel(x: Mapping[str, Array], k: Mapping[str, Array], backward: Array) -> Array:
    """Exposed seconds of gradients and parameters over dp·cp (experts over what ep leaves)."""
    xp = array_module(x, k)
    plain, experts, embedding = local_parameters(x)
    ranks = x["dp"] * x["cp"]
    gradient = xp.where(x["fp16"] > 0, 2.0, 4.0)
    sharded = x["zero"] >= 3
    replicas = ranks / x["shards"]
    bandwidth, alpha, _ = _links(x, k, ranks, x["tp"])
    inner, inner_alpha, _ = _links(x, k, x["shards"], x["tp"])
    expert_ranks = xp.maximum(ranks * x["tp"] / (x["ep"] * x["etp"]), 1.0)
    expert_bandwidth, expert_alpha, _ = _links(x, k, expert_ranks, x["ep"] * x["etp"])
    body = plain + embedding
    layers = x["layers"] / x["pp"]
    # ZeRO-1 and 2 scatter gradients behind the backward pass, and gather parameters when nothing is
    # left to hide them.
    whole = xp.where(
        x["zero"] >= 1,
        k["uneven"] * reduce_scatter(body * gradient, ranks, alpha, bandwidth),
        all_reduce(body * gradient, ranks, alpha, bandwidth),
    )
    gather = k["uneven"] * all_gather(body * 2, ranks, alpha * layers, bandwidth)
    gathered = xp.where(sharded | (x["zero"] == 0), 0.0, gather)
    routed = all_reduce(experts * (gradient + 2) / 2, expert_ranks, expert_alpha, expert_bandwidth)
    gathers = all_reduce(body * 2, x["shards"], inner_alpha * layers, inner) * x["microbatches"]
    scatter = (
        all_reduce(body * gradient / 2, x["shards"], inner_alpha * layers, inner)
        * x["microbatches"]
    )
    outer, outer_alpha, _ = _links(x, k, replicas, x["tp"] * x["shards"])
    across = all_reduce(body * gradient / x["shards"], replicas, outer_alpha, outer)
    # Experts under ZeRO-3: gathered forward and backward, and their gradients scattered, in every
    # microbatch.
    routed_every = x["microbatches"] * all_reduce(
        experts * (2 + gradient / 2), expert_ranks, expert_alpha, expert_bandwidth
    )
    last = whole + routed
    every = gathers + scatter + across + routed_every
    hidden = xp.where(x["modern"] > 0, k["overlap_dp"], 0.0)
    window = xp.where(sharded, 1.5 * backward * x["microbatches"], backward)
    wire = xp.where(sharded, every, last)
    exposed = xp.maximum(wire - hidden * window, 0.05 * wire) + k["exposed_gather"] * gathered
    return xp.where(x["lora"] > 0, 0.0, exposed)


def score_passes(x: Mapping[str, Array]) -> Array:
    """How often a step computes the scores of attention, in forward passes: three, half a pass more
    where fused attention forms them again, and what is recomputed."""
    again = array_module(x).where(x["modern"] > 0, 3.5, 3.0)
    return again + x["full"] + x["selective"]


def step_time(x: Mapping[str, Array], k: Mapping[str, Array]) -> Terms:
    """Seconds a step by term: the sum is under `total`. `k` as `coefficients` gives."""
    xp = array_module(x, k)
    p, m, layers = x["pp"], x["microbatches"], x["layers"]
    compute = layer_compute(x, k)
    matmul = xp.where(x["lora"] > 0, 2.0, 3.0) + x["full"]
    score = score_passes(x)
    common = matmul * compute["attention_matmuls"] + score * compute["scores"]
    dense = common + matmul * compute["dense_ffn"] + (3 + x["full"]) * compute["rest"]
    mixed = common + matmul * compute["expert_ffn"] + (3 + x["full"]) * compute["rest_moe"]
    rank = k["launch_rank"] * xp.where(p > 1, 1.0, k["launch_alone"]) * (x["tp"] - 1)
    floor = (k["launch"] + rank) * (1 + x["full"] / 3)
    dense, mixed = _floor(dense, floor), _floor(mixed, floor + k["launch_moe"])
    wire = layer_communication(x, k, compute)
    share = x["moe_layers"] / layers
    layer = (1 - share) * dense + share * mixed
    layer_wire = wire["tp"] + share * wire["ep"] + wire["cp"]
    T = x["microbatch"] * x["seq"] / x["cp"]
    passes, columns = xp.where(x["lora"] > 0, 2.0, 3.0), x["vocab"] / x["tp"]
    matmul = _gemm(2 * T * x["width"] * columns, T, columns, x["width"], x["peak16"] * k["gemm"], k)
    head = passes * matmul + 24 * T * columns / (x["hbm"] * k["hbm"])
    held = xp.ceil(layers / p - 1e-6)  # whole layers of a stage
    work = layer + layer_wire
    mean = (layers * work + head) / p
    slowest = (1 - k["balanced"]) * (held * work + head) + k["balanced"] * xp.maximum(mean, head)
    inner = x["tp"] * x["cp"] * x["dp"]
    bandwidth, alpha, _ = _links(x, k, p, inner)
    message = 2 * T * x["width"] / xp.where(x["sp"] > 0, x["tp"], 1.0)
    # A point-to-point message uses one NIC whatever the group's size.
    one = xp.where(p * inner <= x["domain"], bandwidth, x["out_bw"] * k["link_out"])
    transfer = xp.where(
        p > 1, 2 * x["virtual"] * (message / one + alpha) * k["exposed_pp"] * (m + p - 1), 0.0
    )
    bubble = k["bubble"] * (p - 1) / x["virtual"] * (mean + k["stage"])
    data = _data_parallel(x, k, 2 / 3 * layers / p * layer)
    plain, experts, embedding = local_parameters(x)
    shards = xp.where(x["zero"] >= 1, x["shards"], 1.0)
    state = (plain + embedding) / shards + experts / xp.where(
        x["zero"] >= 1, xp.maximum(x["shards"] * x["tp"] / (x["ep"] * x["etp"]), 1.0), 1.0
    )
    update = xp.where(x["lora"] > 0, 0.0, 30 * state / (x["hbm"] * k["hbm"]))
    # Communication of the layers that the slowest stage holds; what is left of its time is compute.
    part = m * held * xp.minimum(slowest / (held * work + head), 1.0)
    tp, ep, cp = part * wire["tp"], part * share * wire["ep"], part * wire["cp"]
    terms = {
        "compute": m * slowest - tp - ep - cp,
        **{"tp": tp, "ep": ep, "cp": cp, "pp": bubble + transfer, "dp": data},
        **{"optimizer": update, "step": k["step"] + m * k["stage"]},
    }
    terms["total"] = sum(terms.values())
    terms["stalled"] = terms["total"] + k["stall"] * (1 - p**-1.2) * m
    return {name: value * k["scale"] for name, value in terms.items()}


def _floor(value: Array, floor: Array) -> Array:
    """Device time and launch time overlap: the larger one, with a soft corner."""
    return (value**4 + floor**4) ** 0.25
