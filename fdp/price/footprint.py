"""Memory per device of a training job from its plan alone: states by ZeRO stage, activations in
flight, logits, rest.

The parts follow Korthikanti et al. 2022 (arXiv 2205.05198, §4, with attention scores not kept where
attention is fused) and Rajbhandari et al. 2020 (ZeRO); what no formula holds (allocator,
communication buffers, context) is a fitted constant and factor. fdp.count.memory prices this code
base's own programs exactly; this file prices anybody's.

Legend: T tokens of a microbatch on a device, D width; arrays (N,), bytes.
"""

from collections.abc import Mapping
from typing import Any

from fdp.price.step_time import array_module, kv_width, local_parameters

Array = Any

# name: (low, high, start)
BOUNDS = {
    "kept_width": (4.0, 60.0, 16.0),  # bytes kept per token and residual element of a layer
    "kept_hidden": (2.0, 16.0, 5.0),  # per token and hidden element (queries, keys, values, FFN)
    "kept_score": (1.0, 10.0, 5.0),  # per attention score, where attention is not fused
    "kept_logit": (4.0, 24.0, 10.0),  # per token and vocabulary entry on the last stage
    "constant": (5e8, 1.2e10, 3e9),  # context, communication buffers
    "fragments": (1.0, 1.5, 1.08),  # allocated over used
    "gradient": (2.0, 8.0, 4.0),  # bytes of a gradient and its buffers, bfloat16 software
}


def state_bytes(x: Mapping[str, Array], gradient: Array) -> Array:
    """Parameters, gradients and optimizer: 2 + g + 12 bytes a parameter, split by ZeRO stage over
    dp·cp.
    """
    xp = array_module(x, {"gradient": gradient})
    plain, experts, embedding = local_parameters(x)
    g = xp.where(x["fp16"] > 0, 2.0, gradient)
    z, ranks = x["zero"], x["shards"]
    expert_ranks = xp.maximum(ranks * x["tp"] / (x["ep"] * x["etp"]), 1.0)

    def per_parameter(shards: Array) -> Array:
        optimizer = xp.where(z >= 1, 12 / shards, 12.0)
        gradients = xp.where(z >= 2, g / shards, g)
        return optimizer + gradients + xp.where(z >= 3, 2 / shards, 2.0)

    mixed = experts * x["pp"] / xp.maximum(x["moe_layers"], 1.0)
    gathered = xp.where(
        z >= 3, 2 * 2 * (plain * x["pp"] / x["layers"] + mixed) + 2 * embedding, 0.0
    )
    trained = (plain + embedding) * per_parameter(ranks) + experts * per_parameter(expert_ranks)
    return xp.where(x["lora"] > 0, 2 * (plain + embedding + experts), trained) + gathered


def layer_bytes(x: Mapping[str, Array], k: Mapping[str, Array]) -> tuple[Array, Array]:
    """(kept of a layer and microbatch without recomputation, kept with full recomputation)."""
    xp = array_module(x, k)
    T, t = x["microbatch"] * x["seq"] / x["cp"], x["tp"]
    split = xp.where(x["sp"] > 0, t, 1.0)
    attention = x["heads"] * (x["head_dim"] + x["value_dim"]) / t + 2 * kv_width(x)
    share = x["moe_layers"] / x["layers"]
    ffn = (1 - share) * x["ffn"] + share * (x["topk"] + x["shared"]) * x["moe_ffn"]
    kept = T * (
        k["kept_width"] * x["width"] / split
        + k["kept_hidden"] * (attention + x["projections"] * ffn / t) / 2
    )
    scores = xp.where(
        (x["modern"] > 0) | (x["selective"] > 0),
        0.0,
        k["kept_score"] * T * x["seq"] * x["heads"] / t,
    )
    routed = 2 * share * T / t * x["topk"] * x["width"]  # the copies that went to experts
    return kept + scores + routed, 2 * T * x["width"] / split


def memory(x: Mapping[str, Array], k: Mapping[str, Array]) -> Array:
    """Peak bytes per device, the larger of the first stage (most microbatches in flight) and the
    last (logits).
    """
    xp = array_module(x, k)
    p, m = x["pp"], x["microbatches"]
    layers = xp.ceil(x["layers"] / p - 1e-6)
    kept, inputs = layer_bytes(x, k)
    per_layer = xp.where(x["full"] > 0, inputs, kept)
    live = xp.where(x["full"] > 0, kept, 0.0)
    chunks = xp.where(x["virtual"] > 1, 1 + (p - 1) / (p * x["virtual"]), 1.0)
    first = layers * per_layer * xp.minimum(p, m) * chunks
    T = x["microbatch"] * x["seq"] / x["cp"]
    last = layers * per_layer + k["kept_logit"] * T * x["vocab"] / x["tp"]
    activations = xp.where(p > 1, xp.maximum(first, last), last) + live
    return (state_bytes(x, k["gradient"]) + activations) * k["fragments"] + k["constant"]
