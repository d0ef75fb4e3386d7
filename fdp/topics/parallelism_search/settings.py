"""Configuration of topic 15: what to find a parallel plan for, and how the cost model is judged.
Imports neither jax nor flax."""

import ml_collections

from fdp.keys import UserError, choice, count, section, string, words
from fdp.price import hardware
from fdp.price.shapes import named

# Hold-outs (fdp.topics.parallelism_search.validate).
MODELS = (
    "gpt-3.6b",
    "gpt-39.1b",
    "ultrascale-1b",
    "ultrascale-3b",
    "ultrascale-8b",
    "llama3-70b",
    "llama3.1-405b",
)
MIXTURES = ("deepseek-v3", "qwen3-235b-a22b", "qwen3-30b-a3b", "gpt-oss-120b")
LONG, RELEASE, CLUSTER = "sequences of 16k and more", "release 26.04.01", "cluster of DGX Cloud"
HOLD_OUTS = (*MODELS, *MIXTURES, LONG, RELEASE, CLUSTER)

SECTIONS = {
    "plan": section(
        model=string("", 'published, as llama3-70b or deepseek-v3; "" = the model section'),
        cluster=string("h100:32x8", "nodes x chips, or a TPU slice v5p:4x8x8; h100:4x8+a100:4x8"),
        batch=count(1024, "global batch", "sequences"),
        seq_len=count(4096, "length", "tokens"),
        precision=choice("bf16", ("bf16", "fp8", "fp4"), "of the planned training"),
        measurements=string(
            "../shared/data/planning", "folder of published runs to fit on; absent: what ships"
        ),
        steps=count(200, "optimizer iterations of one fit"),
        cases=words((), HOLD_OUTS, "hold-outs to run; () = all"),
        searches=count(5, "seeds of every search algorithm on every measured landscape"),
        counted=count(100, "random programs whose bytes and FLOPs the compiler checks"),
    )
}


def check(c: ml_collections.ConfigDict) -> None:
    """Raise UserError for a model or a cluster that is not known."""
    for key, known, value in (
        ("plan.model", named, c.plan.model),
        ("plan.cluster", hardware.cluster, c.plan.cluster),
        ("hardware.topology", hardware.cluster, c.hardware.topology),
    ):
        try:
            if value:
                known(value)
        except ValueError as error:
            raise UserError(f"{key}: {error}") from error


def shrink(c: ml_collections.ConfigDict) -> None:
    """For the audit: what is planned for does not follow the small model."""
    c.plan.model = "llama3-70b"
    c.plan.cluster, c.plan.batch = "h100:32x8", 1024
