"""Topic 12: layers that learn while they read, and what it costs to share them over cp.

Claims: every plan of Gated DeltaNet, TTT-Linear and LaCT equals one device and sends what its
closed formula says; their cost is linear in the length; LaCT recalls at least 5 points more than
Gated DeltaNet at equal bytes of state (`full` decides; expected to fail or to be undecided).

    python -m fdp.train --config=configs/topic12.py        # 10 to 15 min on 2 cores
    python -m fdp.train --config=configs/topic12.py:tiny   # ≤ 60 s
    python -m fdp.train --config=configs/topic12.py:full   # pairs with three seeds; resumable
    python -m fdp.topics.ttt_cp.read runs/topic12-cpu book.txt --save=book.npz   # then ask it
    python -m fdp.train --config=configs/topic12.py:pod --dry_run   # 1M tokens on 16 H100 nodes
    python -m fdp.train --config=configs/topic12.py \\
        --config.mesh.cp=4 --config.mesh.dp=2               # one variation: the same losses
"""

import ml_collections

from fdp.config import lock
from fdp.config_file import llama_like, start


def get_config(variant: str = "cpu") -> ml_collections.ConfigDict:
    """cpu | tiny | full | h100 | pod."""
    c = start("ttt_cp", variant)
    c.objective.name = "autoregressive"
    {"cpu": _cpu, "tiny": _tiny, "full": _full, "h100": _h100, "pod": _pod}[variant](c)
    return lock(c)


def _cpu(c: ml_collections.ConfigDict) -> None:
    # Eight pairs of 31 keys and 32 values; a convolution lets a key carry the token before it.
    c.data.update(source="mqar", seq_len=64, vocab=64)
    c.model.update(layers=2, width=32, heads=2, kv_heads=2, head_dim=16, ffn=64, vocab=72, conv=4)
    c.train.update(steps=1000, batch=16, lr=2e-2)
    c.eval.update(every=0, batches=4, samples=1)
    c.memory.update(
        arms=("attention", "window", "gdn", "ttt_linear", "lact", "lact_1to1"),
        needle=("attention", "window", "gdn", "lact", "lact_1to1"),
        kjv=("gdn",),
        capacity=("gdn", "ttt_linear", "lact"),
        sizes=(4, 6, 8, 16),
        sequences=128,
    )
    c.checkpoint.every = 200


def _tiny(c: ml_collections.ConfigDict) -> None:
    _cpu(c)
    c.model.layers = 1
    c.train.update(steps=20, batch=8, warmup=5)
    c.memory.update(arms=("attention", "gdn", "lact"), needle=(), kjv=(), capacity=(), sequences=16)


def _full(c: ml_collections.ConfigDict) -> None:
    _cpu(c)
    c.model.layers = 4
    c.seeds = (0, 1, 2)  # of pairs, and of LaCT and Gated DeltaNet at equal bytes
    hybrids = ("gdn_1to1", "gdn_1to3", "lact_1to1", "lact_1to3")
    c.memory.update(
        arms=(
            "attention",
            "window",
            "gdn",
            "ttt_linear",
            "ttt_mlp",
            "lact",
            "lact_muon",
            "lact_window",
            "two_memories",
            *hybrids,
        ),
        needle=("attention", "window", "gdn", "lact", "lact_1to3"),
        pairs=(8, 12, 16, 24),
        kjv=("attention", "gdn", "lact", "lact_1to3"),
        text=("attention", "gdn", "lact", "lact_1to3"),
        chunks=(8, 32),
    )


def _large(c: ml_collections.ConfigDict) -> None:
    c.model.dtype, c.model.remat, c.model.conv = "bfloat16", "full", 4
    c.data.update(source="hf:HuggingFaceFW/fineweb-edu:sample-10BT", vocab=32_768)
    c.train.update(steps=20_000, lr=3e-4, warmup=2000, weight_decay=0.1, beta2=0.95)
    c.eval.update(every=1000, batches=4)
    c.checkpoint.every = 1000
    c.memory.update(arms=("lact",), chunk=2048, rate=1e-3)


def _h100(c: ml_collections.ConfigDict) -> None:
    _large(c)
    llama_like(c.model, layers=12, width=768, heads=6, kv_heads=6, vocab=32_768)
    c.data.update(source="bible+stdlib", seq_len=32_768)
    c.train.update(batch=2, steps=2000, warmup=200)
    c.memory.arms = ("lact_1to3",)
    c.hardware.topology = "h100:1"


def _pod(c: ml_collections.ConfigDict) -> None:
    _large(c)
    c.mesh.update(dp=4, cp=8, tp=4)
    llama_like(c.model, layers=24, width=2048, heads=32, kv_heads=32, vocab=32_768)
    c.data.seq_len = 1_048_576
    c.train.update(batch=4, zero=3)
    c.memory.update(arms=("lact_1to3",), chunk=16_384)
    c.hardware.topology = "h100:16x8"
