"""Small pieces that several topic configs share."""

import ml_collections

from fdp import config


def start(topic: str, variant: str) -> ml_collections.ConfigDict:
    """The base config of `topic` with its own sections; raises UserError for an unknown variant."""
    c = config.base(**config.topic_sections(topic))
    c.topic, c.variant = topic, config.check_variant(variant)
    return c


def llama_like(
    m: ml_collections.ConfigDict, layers: int, width: int, heads: int, kv_heads: int, vocab: int
) -> None:
    """Fill the model section with the usual proportions: head_dim = width/heads, SwiGLU of
    8/3·width rounded to 128.
    """
    m.update(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        vocab=vocab,
    )
    m.ffn = -(-8 * width // 3 // 128) * 128
