"""Topic 2: experts that know how much is masked: routing for diffusion language models.

Claims: a mixture of experts equals a dense loop over experts on every mesh, and sends what its
formula says; routers that read the share of masked tokens lower the NELBO by more than three
standard errors, or tie while every step of a sampler loads the ranks of ep twice as evenly; the
balance of ranks within noise bins costs no likelihood and shortens a sampling step at ep = 8 by a
tenth.

    python -m fdp.train --config=configs/topic2.py        # 10 min on 2 cores, 8 virtual devices
    python -m fdp.train --config=configs/topic2.py:tiny   # ≤ 45 s
    python -m fdp.train --config=configs/topic2.py:pod --dry_run
    python -m fdp.train --config=configs/topic2.py \\
        --config.mesh.dp=1 --config.mesh.ep=8                       # one variation
"""

import ml_collections

from fdp.config import lock
from fdp.config_file import llama_like, start


def get_config(variant: str = "cpu") -> ml_collections.ConfigDict:
    """cpu | tiny | full | h100 | pod."""
    c = start("moe_dlm", variant)
    c.mesh.update(dp=2, ep=4)
    c.model.update(layers=2, width=64, heads=4, kv_heads=4, head_dim=16, ffn=128, vocab=32)
    c.model.moe.update(experts=16, topk=2, ffn=64, switch=0.01, bins=10, ranks=8, buffer=2.0)
    c.data.update(source="two_regimes", seq_len=32, vocab=512)
    c.train.update(batch=32, lr=3e-3, warmup=50)
    c.eval.update(every=0, batches=8, samples=1)
    {"cpu": _cpu, "tiny": _tiny, "full": _full, "h100": _h100, "pod": _pod}[variant](c)
    return lock(c)


def _cpu(c: ml_collections.ConfigDict) -> None:
    c.train.steps = 300
    c.router.arms = ("aux", "loss_free", "reverse", "low_rank_rank")
    c.router.tasks = ("markov", "two_regimes")


def _tiny(c: ml_collections.ConfigDict) -> None:
    c.model.update(width=32, heads=2, kv_heads=2, ffn=32)
    c.model.moe.ffn = 16
    c.train.update(steps=20, warmup=5, batch=16)
    c.eval.batches = 2
    c.router.update(arms=("aux", "low_rank_rank"), tasks=("two_regimes",), text=0, sequences=16)


def _full(c: ml_collections.ConfigDict) -> None:
    c.train.steps = 600
    c.mesh.update(dp=1, ep=1)
    c.seeds = (0, 1, 2, 3, 4, 5, 6, 7)
    c.router.update(tasks=("markov", "two_regimes"), text=2, sequences=128)


def _large(c: ml_collections.ConfigDict) -> None:
    c.model.dtype, c.model.remat = "bfloat16", "full"
    c.data.update(source="hf:HuggingFaceFW/fineweb-edu:sample-10BT", vocab=32_768)
    c.train.update(steps=20_000, lr=3e-4, warmup=2000, weight_decay=0.1, beta2=0.95)
    c.eval.update(every=1000, batches=4)
    c.checkpoint.every = 1000
    c.router.update(arms=("low_rank_rank",), text=1)


def _h100(c: ml_collections.ConfigDict) -> None:
    """1.05 billion parameters, 0.26 of them active for a token; 0.98 and 0.19 without embedding
    and head. Dropless: rows are grouped by expert, and no buffer has a row for every expert."""
    _large(c)
    c.mesh.update(dp=1, ep=1)
    llama_like(c.model, layers=18, width=1024, heads=16, kv_heads=4, vocab=32_768)
    c.model.moe.update(experts=32, topk=4, ffn=512, shared=1, buffer=0.0)
    c.data.seq_len = 4096
    c.train.update(batch=96, microbatches=4)
    c.hardware.topology = "h100:1"


def _pod(c: ml_collections.ConfigDict) -> None:
    """A trillion parameters, 44 billion of them active for a token, on 512 v5p. Masters, moments
    and gradients in float32 take 16 bytes each: 64 cards of 80 GB cannot hold them. 64 nodes of
    eight H100 can, whose fast links join eight devices of ep:

        --config.hardware.topology=h100:64x8 --config.mesh.dp=8 --config.mesh.tp=1 \\
        --config.train.batch=512
    """
    _large(c)
    c.mesh.update(dp=4, ep=64, tp=2)
    llama_like(c.model, layers=64, width=7168, heads=64, kv_heads=8, vocab=32_768)
    c.model.head_dim = 128
    c.model.moe.update(
        experts=256,
        topk=8,
        ffn=2816,
        shared=1,
        dispatch="two_level",
        node=8,
        buffer=1.5,
        wire="bfloat16",
        ranks=64,
    )
    c.data.seq_len = 4096
    c.train.update(batch=256, zero=3)
    c.hardware.topology = "v5p:8x8x8"
