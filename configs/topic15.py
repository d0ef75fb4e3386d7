"""Topic 15: which (tp, dp, pp, cp, ep, microbatch, recomputation, ZeRO) for a model on a cluster,
and how fast.

Claims: a hybrid cost model prices models, clusters and releases it was not fitted on better than
physics or learning alone; searching with it as prior finds a plan within 5 % of the best in at most
five real runs; bytes and FLOPs of this code base's own programs are counted exactly.

    python -m fdp.train --config=configs/topic15.py            # ≤ 10 min on 2 cores
    python -m fdp.train --config=configs/topic15.py:tiny       # ≤ 60 s
    python -m fdp.train --config=configs/topic15.py:pod --dry_run    # really compiled, for a v5p

One variation, your own model and cluster (a table of the ten best plans, and a config that trains
one of them; the table alone is `python -m fdp.price.planner`):

    python -m fdp.train --config=configs/topic15.py:tiny --workdir=runs/mine \\
        --config.plan.model=qwen3-30b-a3b --config.plan.cluster=v5p:4x8x8 --config.plan.batch=2048

The measurements (plan.measurements) are not part of the package; without them the shipped
coefficients plan, and the claims about measured runs are reported as not testable. """

import ml_collections

from fdp.config import lock
from fdp.config_file import llama_like, start


def get_config(variant: str = "cpu") -> ml_collections.ConfigDict:
    """cpu | tiny | full | h100 | pod."""
    c = start("parallelism_search", variant)
    c.mesh.update(dp=8)
    c.plan.model = "llama3-70b"
    # The arm shows that the planner's mesh trains: it is small and short on purpose.
    c.train.update(steps=100, batch=32)
    c.eval.every, c.eval.samples = 0, 2
    {"cpu": _cpu, "tiny": _tiny, "full": _full, "h100": _h100, "pod": _pod}[variant](c)
    return lock(c)


def _cpu(c: ml_collections.ConfigDict) -> None:
    pass


def _tiny(c: ml_collections.ConfigDict) -> None:
    c.model.update(layers=2, width=64, heads=4, kv_heads=4, head_dim=16, ffn=128, vocab=512)
    c.data.update(vocab=512, seq_len=32)
    c.train.update(steps=20, batch=16, warmup=5)
    c.eval.batches = 2
    c.checkpoint.every = 10
    c.plan.update(steps=60, cases=("gpt-39.1b",), searches=2, counted=1)


def _full(c: ml_collections.ConfigDict) -> None:
    c.plan.update(steps=400, searches=20)


def _large(c: ml_collections.ConfigDict) -> None:
    c.plan.model = ""
    c.model.dtype, c.model.remat, c.model.qk_norm = "bfloat16", "full", True
    c.data.update(source="hf:HuggingFaceFW/fineweb-edu:sample-10BT", vocab=32_768, seq_len=4096)
    c.train.update(steps=20_000, lr=3e-4, warmup=2000, weight_decay=0.1, beta2=0.95)
    c.eval.update(every=1000, batches=16)
    c.checkpoint.every = 1000


def _h100(c: ml_collections.ConfigDict) -> None:
    _large(c)
    c.mesh.update(dp=1)
    llama_like(c.model, layers=24, width=1024, heads=16, kv_heads=16, vocab=32_768)
    c.data.seq_len = 2048
    c.train.update(batch=64, microbatches=4)
    c.plan.update(cluster="h100:1x1", batch=64, seq_len=2048)
    c.hardware.topology = "h100:1"


def _pod(c: ml_collections.ConfigDict) -> None:
    _large(c)
    c.mesh.update(dp=128)
    llama_like(c.model, layers=32, width=4096, heads=32, kv_heads=8, vocab=32_768)
    c.train.batch = 128
    c.plan.update(cluster="v5p:4x4x8", batch=128)
    c.hardware.topology = "v5p:4x4x8"
