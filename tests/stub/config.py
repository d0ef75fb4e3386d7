"""A short topic for tests of the command: two arms, a report of one row and one picture."""

from pathlib import Path

import fdp.topics
from fdp import config

TOPICS = str(Path(__file__).parent / "topics")
if TOPICS not in fdp.topics.__path__:
    fdp.topics.__path__.append(TOPICS)


def get_config(variant="cpu"):
    c = config.base()
    c.topic, c.variant = "short", config.check_variant(variant)
    c.mesh.update(dp=2, tp=4)
    c.model.update(layers=2, width=64, heads=8, kv_heads=8, head_dim=8, ffn=128, vocab=512)
    c.data.update(vocab=512, seq_len=32)
    c.train.update(steps=60, batch=16, warmup=10)
    c.eval.update(every=0, batches=2, samples=2)
    return config.lock(c)
