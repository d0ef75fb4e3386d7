"""Topic 1: what a diffusion LM lets tensor and data parallelism leave out, in training and in
sampling.

Claims: sums over tp at ≤ 35 % of the bytes keep what is sampled from (KL ≤ 1e-3 nats, N = L and L/4
steps); antithetic exact-k losses scatter ≥ 5 times less than iid t, with half the head; sampling
sends ids and scalars, and the same ids for every tp; a tp degree for each denoising phase beats the
best fixed one. Sharded equals unsharded; MDLM against AR at equal budget (a small MDLM is expected
to be behind).

    python -m fdp.train --config=configs/topic1.py        # 10 to 15 min on 2 cores, 8 devices
    python -m fdp.train --config=configs/topic1.py:tiny   # two minutes, one when compiled
    python -m fdp.train --config=configs/topic1.py:pod --dry_run
    python -m fdp.train --config=configs/topic1.py \\
        --config.mesh.dp=1 --config.mesh.tp=8                       # one variation
"""

import ml_collections

from fdp.config import lock
from fdp.config_file import llama_like, start


def get_config(variant: str = "cpu") -> ml_collections.ConfigDict:
    """cpu | tiny | full | h100 | pod."""
    c = start("parallel_dlm", variant)
    c.mesh.update(dp=2, tp=4)
    c.model.update(heads=8, kv_heads=8, head_dim=16)  # so that tp may be 8
    {"cpu": _cpu, "tiny": _tiny, "full": _full, "h100": _h100, "pod": _pod}[variant](c)
    return lock(c)


def _cpu(c: ml_collections.ConfigDict) -> None:
    # MDLM's training loss at step 600 in a trial: 5.28 so, 5.57 without the norm at 3e-3 (5.28
    # without it at 1e-3).
    c.model.qk_norm = True
    c.train.update(steps=400, batch=32, lr=2e-3)
    c.eval.every = 200
    c.sampling.update(draws=64, sequences=16)
    c.checkpoint.every = 200
    c.sampling.policies = (
        "exact",
        "exact, read rows only",
        "stale, K=3",
        "int8",
        "attention",
        "drift 0.4",
        "drift, int8",
    )


def _tiny(c: ml_collections.ConfigDict) -> None:
    c.model.update(layers=2, width=64, heads=8, kv_heads=8, head_dim=8, ffn=128, vocab=512)
    c.data.update(vocab=512, seq_len=32)
    c.train.update(steps=60, batch=16, warmup=10)
    c.eval.update(every=0, batches=2, samples=2)
    c.sampling.update(policies=("exact", "stale, K=3", "drift, int8"), sequences=8, draws=16)
    c.checkpoint.every = 30


def _full(c: ml_collections.ConfigDict) -> None:
    _cpu(c)
    c.train.steps = 800
    c.sampling.update(policies=(), sequences=32, draws=128)
    c.seeds = (0, 1, 2, 3, 4)


def _large(c: ml_collections.ConfigDict) -> None:
    c.model.dtype, c.model.remat, c.model.qk_norm = "bfloat16", "full", True
    c.data.update(source="hf:HuggingFaceFW/fineweb-edu:sample-10BT", vocab=32_768, seq_len=4096)
    c.train.update(steps=20_000, lr=3e-4, warmup=2000, weight_decay=0.1, beta2=0.95)
    c.eval.update(every=1000, batches=16)
    c.checkpoint.every = 1000


def _h100(c: ml_collections.ConfigDict) -> None:
    _large(c)
    c.mesh.update(dp=1, tp=1)
    llama_like(c.model, layers=24, width=2048, heads=16, kv_heads=16, vocab=32_768)
    c.data.seq_len = 2048
    c.train.update(batch=288, microbatches=4)  # fills the card
    c.hardware.topology = "h100:1"


def _pod(c: ml_collections.ConfigDict) -> None:
    _large(c)
    c.mesh.update(dp=16, cp=2, tp=4)
    llama_like(c.model, layers=32, width=4096, heads=32, kv_heads=8, vocab=32_768)
    c.model.sequence_parallel = True
    c.train.update(batch=64, zero=3)
    c.hardware.topology = "v5p:4x4x8"
