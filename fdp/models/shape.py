"""The shape of a Transformer as data: what the builder builds, and what is counted and priced."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of one architecture, global.

    `dtype`: of compute (parameters and logits are float32). `remat`: none | dots | full, what the
    backward pass recomputes. `sequence_parallel`: between blocks the sequence is sharded over tp.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    epsilon: float = 1e-6
    rope_base: float = 10_000.0
    rope_scaling: float = 1.0
    qk_norm: bool = False
    bias: bool = False
    tied: bool = False
    conv: int = 0
    time_conditioning: bool = False
    dtype: str = "float32"
    remat: str = "none"
    sequence_parallel: bool = False

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "ModelShape":
        """From the `model` section of a config; keys that are no shape are left out."""
        return cls(**{f.name: section[f.name] for f in fields(cls) if f.name in section})

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return 2 if self.dtype == "bfloat16" else 4
