"""Topic 8: zero-bubble pipeline schedules for diffusion training.

Claims: every schedule and executor gives the gradients of the model without a pipeline, with the
FLOPs of the fused backward; a searched schedule beats every fixed one at equal memory where
microbatches cost unlike; fillers in idle slots lower the held-out loss. And: where is a pipeline
worth having at all against ZeRO-3 with context parallelism?

    python -m fdp.train --config=configs/topic8.py        # 13 min on 2 busy cores, virtual devices
    python -m fdp.train --config=configs/topic8.py:tiny   # about 50 s when compiled
    python -m fdp.train --config=configs/topic8.py:pod --dry_run
    python -m fdp.train --config=configs/topic8.py \\
        --config.mesh.pp=2 --config.mesh.dp=4                       # the same losses
"""

import ml_collections

from fdp.config import lock
from fdp.config_file import start


def get_config(variant: str = "cpu") -> ml_collections.ConfigDict:
    """cpu | tiny | full | h100 | pod."""
    c = start("zero_bubble", variant)
    c.mesh.update(pp=4, dp=2)
    c.pipeline.schedule = "searched"
    c.model.update(kind="dit", layers=4, width=128, heads=4, kv_heads=4, head_dim=32, ffn=512)
    c.model.image.update(size=32, channels=3, classes=10, patch=4)
    c.objective.update(name="flow", antithetic=True)
    c.data.update(source="openmoji", val_fraction=0.1)
    c.train.update(batch=32, microbatches=8, lr=1e-3, warmup=50, weight_decay=0.01)
    c.eval.update(every=0, batches=4)
    {"cpu": _cpu, "tiny": _tiny, "full": _full, "h100": _h100, "pod": _pod}[variant](c)
    return lock(c)


def _cpu(c: ml_collections.ConfigDict) -> None:
    c.train.steps = 300


def _tiny(c: ml_collections.ConfigDict) -> None:
    c.model.update(width=32, heads=2, kv_heads=2, head_dim=16, ffn=64)
    c.model.image.update(size=16)
    c.train.update(batch=16, steps=20, warmup=5)
    c.eval.batches = 2
    c.images.update(samples=16, steps=5, classifier=20)


def _full(c: ml_collections.ConfigDict) -> None:
    """Digits, whose classes a small judge tells apart; they need the extra `mnist`."""
    c.mesh.update(pp=1, dp=1)
    c.data.source, c.model.image.channels = "mnist", 1
    c.model.update(width=96, heads=3, kv_heads=3, ffn=384)
    c.train.update(steps=1200, microbatches=1, lr=3e-3)
    c.eval.every = 200
    c.seeds = (0, 1, 2)
    c.images.update(costs=("uniform", "coarse", "uvit"), fillers=("none", "stable", "larger"))
    c.images.update(samples=250, classifier=1000)


def _large(c: ml_collections.ConfigDict) -> None:
    c.model.update(dtype="bfloat16", remat="full")
    c.train.update(steps=20_000, lr=3e-4, warmup=2000, beta2=0.95)
    c.eval.update(every=1000, batches=4)
    c.checkpoint.every = 1000


def _h100(c: ml_collections.ConfigDict) -> None:
    """The shape of DiT-XL/2 in the space of pixels: 28 layers, 675 million parameters."""
    _large(c)
    c.mesh.update(pp=1, dp=1)
    c.model.update(layers=28, width=1152, heads=16, kv_heads=16, head_dim=72, ffn=4608)
    c.model.image.patch = 2
    c.train.update(batch=64, microbatches=1)
    c.hardware.topology = "h100:1"


def _pod(c: ml_collections.ConfigDict) -> None:
    """30 billion parameters on 512 v5p: pp4·dp16·cp4·tp2. On 64 nodes of eight H100:

    --config.hardware.topology=h100:64x8 --config.mesh.tp=8 --config.mesh.dp=4 \\
    --config.train.microbatches=128
    """
    _large(c)
    c.mesh.update(pp=4, tp=2, dp=16, cp=4)
    c.pipeline.schedule = "zb_h1"
    c.model.update(layers=44, width=6144, heads=48, kv_heads=48, head_dim=128, ffn=24_576)
    c.model.image.update(size=128, patch=2)
    c.data.source = "blank"
    c.train.update(batch=512, microbatches=16, zero=1)
    c.hardware.topology = "v5p:8x8x8"
