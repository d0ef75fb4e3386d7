"""Topic 4: speculation for masked diffusion language models.

Claims: speculative ids are those of the verifier alone, whatever drafts; with the best drafter a
sample takes at most 5 rounds at 32 and 64 tokens and 6 at 128, and at most 0.85 of those of the
best self-drafter in a window of 16 states; rule coupling keeps the law, edit distance does at no
tolerance.

    python -m fdp.train --config=configs/topic4.py        # 22 min on 2 loaded cores
    python -m fdp.train --config=configs/topic4.py:tiny   # 20 CPU s warm
    python -m fdp.train --config=configs/topic4.py:full   # three seeds; resumable
    python -m fdp.train --config=configs/topic4.py:pod --dry_run
    python -m fdp.train --config=configs/topic4.py \\
        --config.speculation.windows="(8, 16)"              # one variation
"""

import ml_collections

from fdp.config import lock
from fdp.config_file import llama_like, start
from fdp.topics.speculative_dlm.settings import TEXTS


def get_config(variant: str = "cpu") -> ml_collections.ConfigDict:
    """cpu | tiny | full | h100 | pod."""
    c = start("speculative_dlm", variant)
    c.objective.name = "mdlm"
    {"cpu": _cpu, "tiny": _tiny, "full": _full, "h100": _h100, "pod": _pod}[variant](c)
    return lock(c)


def _cpu(c: ml_collections.ConfigDict) -> None:
    c.data.update(source="markov", seq_len=32, vocab=24)
    c.model.update(layers=4, width=128, heads=4, kv_heads=4, head_dim=32, ffn=352, vocab=32)
    c.train.update(steps=400, batch=32, lr=3e-3, warmup=50)
    c.eval.update(every=0, batches=4, samples=1)
    c.speculation.update(drafts=("tenth",), lessons=("distilled", "hinted"), longer=5, taught=1024)
    c.checkpoint.every = 200


def _tiny(c: ml_collections.ConfigDict) -> None:
    _cpu(c)
    c.model.update(layers=1, width=32, head_dim=8, ffn=64)
    c.train.update(steps=10, batch=8, warmup=2)
    c.eval.batches = 1
    c.speculation.update(
        lengths=(32,),
        windows=(32,),
        drafters=("jacobi", "noisy 0.07"),
        lessons=(),
        longer=1,
        targets=("first-hitting",),
        sequences=16,
        law=1024,
    )


def _full(c: ml_collections.ConfigDict) -> None:
    _cpu(c)
    c.train.steps = 800
    c.seeds = (0, 1, 2)
    c.speculation.texts = tuple(TEXTS)


def _large(c: ml_collections.ConfigDict) -> None:
    c.model.dtype, c.model.remat = "bfloat16", "full"
    c.data.update(source="hf:HuggingFaceFW/fineweb-edu:sample-10BT", vocab=32_768)
    c.train.update(steps=20_000, lr=3e-4, warmup=2000, weight_decay=0.1, beta2=0.95)
    c.eval.update(every=1000, batches=4)
    c.checkpoint.every = 1000
    c.speculation.update(drafts=("tenth",), sequences=2)


def _h100(c: ml_collections.ConfigDict) -> None:
    _large(c)
    llama_like(c.model, layers=12, width=768, heads=12, kv_heads=12, vocab=32_768)
    c.data.seq_len = 1024
    c.train.update(batch=64, microbatches=2)
    c.hardware.topology = "h100:1"


def _pod(c: ml_collections.ConfigDict) -> None:
    _large(c)
    c.mesh.update(dp=16, tp=8)
    llama_like(c.model, layers=32, width=4096, heads=32, kv_heads=8, vocab=32_768)
    c.data.seq_len = 4096
    c.train.update(batch=64, zero=3)
    c.hardware.topology = "v5p:4x4x8"
