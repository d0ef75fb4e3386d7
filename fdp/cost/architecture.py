"""Shapes of published models and the parameters they have, to price training them.

Legend: D width, H query heads, K key/value heads, C head_dim, F FFN hidden, E experts, V
vocabulary."""

import dataclasses
import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One decoder-style model. `experts` = 0 is dense; `moe_every` = 2 makes every second layer an
    MoE layer.

    Multi-head latent attention (DeepSeek) is given by its two ranks and the rotary part of a head;
    `head_dim` is then that of queries and keys and `value_dim` that of values."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True
    experts: int = 0
    topk: int = 0
    moe_ffn: int = 0
    shared_experts: int = 0
    first_dense: int = 0
    moe_every: int = 1
    tied: bool = False
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    causal: bool = True

    def __post_init__(self) -> None:
        for key in ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab"):
            if not getattr(self, key) >= 1:
                raise ValueError(
                    f"architecture {self.name!r}: {key}={getattr(self, key)} must be at least 1"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"architecture {self.name!r}: {self.heads} heads are not divisible by "
                f"{self.kv_heads} kv_heads"
            )
        if self.experts and not 1 <= self.topk <= self.experts:
            raise ValueError(
                f"architecture {self.name!r}: topk={self.topk} is not within "
                f"1..experts={self.experts}"
            )

    @property
    def moe_layers(self) -> int:
        """Layers whose FFN is a mixture of experts."""
        return (self.layers - self.first_dense) // self.moe_every if self.experts else 0

    @property
    def projections(self) -> int:
        """Matrices of an FFN: gate, up and down, or up and down."""
        return 3 if self.gated else 2

    def attention_parameters(self) -> tuple[int, int]:
        """(into attention, out of attention) weights of one layer."""
        D, H, K, C = self.width, self.heads, self.kv_heads, self.head_dim
        if not self.kv_rank:
            return D * C * (H + 2 * K), H * C * D
        value = self.value_dim or C
        queries = D * self.q_rank + self.q_rank * H * C if self.q_rank else D * H * C
        keys = D * (self.kv_rank + self.rope_dim) + self.kv_rank * H * (C - self.rope_dim + value)
        return queries + keys, H * value * D

    def ffn_parameters(self) -> int:
        """Weights of one dense FFN."""
        return self.projections * self.width * self.ffn

    def expert_parameters(self) -> int:
        """Weights of one routed expert."""
        return self.projections * self.width * self.moe_ffn

    def parameters(self) -> int:
        """All weights: matrices, one scale a norm (two norms a layer, one at the end), router,
        embedding and head.
        """
        attention, moe = sum(self.attention_parameters()), self.moe_layers
        layers = (
            self.layers * (attention + 2 * self.width) + (self.layers - moe) * self.ffn_parameters()
        )
        layers += moe * (
            (self.experts + self.shared_experts) * self.expert_parameters()
            + self.width * self.experts
        )
        return layers + (1 if self.tied else 2) * self.vocab * self.width + self.width

    def active_parameters(self) -> int:
        """Weights that one token meets, embedding and head included."""
        idle = self.experts - self.topk
        return self.parameters() - self.moe_layers * idle * self.expert_parameters()

    def forward_flops(self, seq: int) -> float:
        """Matmul FLOPs of one token's forward pass in a sequence of `seq`; a causal mask halves the
        scores.
        """
        attention, moe = sum(self.attention_parameters()), self.moe_layers
        ffn = (self.layers - moe) * self.ffn_parameters()
        ffn += moe * (
            (self.topk + self.shared_experts) * self.expert_parameters() + self.width * self.experts
        )
        scores = (
            2
            * seq
            * self.heads
            * (self.head_dim + (self.value_dim or self.head_dim))
            * (0.5 if self.causal else 1)
        )
        return 2 * (self.layers * attention + ffn + self.vocab * self.width) + self.layers * scores


def _dense(
    name: str, layers: int, width: int, heads: int, kv: int, ffn: int, vocab: int, **more: object
) -> Architecture:
    return Architecture(name, layers, width, heads, kv, width // heads, ffn, vocab, **more)  # type: ignore[arg-type]


def _mpt(name: str, layers: int, width: int, heads: int) -> Architecture:
    return _dense(name, layers, width, heads, heads, 4 * width, 50368, gated=False, tied=True)


def _moe(
    name: str,
    layers: int,
    width: int,
    heads: int,
    kv: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    experts: int,
    topk: int,
    moe_ffn: int,
    **more: object,
) -> Architecture:
    return Architecture(
        name, layers, width, heads, kv, head_dim, ffn, vocab, True, experts, topk, moe_ffn, **more  # type: ignore[arg-type]
    )  # fmt: skip


_MLA = {"kv_rank": 512, "rope_dim": 64, "value_dim": 128, "q_rank": 1536, "shared_experts": 1}

# From the models' public configuration files (and nanotron's scaling benchmark for the ultrascale
# ones).
ARCHITECTURES = {
    a.name: a
    for a in (
        _dense("llama3-8b", 32, 4096, 32, 8, 14336, 128256),
        _dense("llama3-70b", 80, 8192, 64, 8, 28672, 128256),
        _dense("llama3.1-405b", 126, 16384, 128, 8, 53248, 128256),
        _dense("llama2-7b", 32, 4096, 32, 32, 11008, 32000),
        _dense("llama2-70b", 80, 8192, 64, 8, 28672, 32000),
        _dense("gpt3-175b", 96, 12288, 96, 96, 49152, 51200, gated=False, tied=True),
        _dense("gpt-5b", 24, 4096, 32, 32, 16384, 51200, gated=False, tied=True),
        _dense("nemotron4-15b", 32, 6144, 48, 8, 24576, 256000, gated=False),
        _dense("nemotron4-340b", 96, 18432, 96, 8, 73728, 256000, gated=False),
        _dense("qwen2.5-7b", 28, 3584, 28, 4, 18944, 152064),
        _dense("qwen2.5-32b", 64, 5120, 40, 8, 27648, 152064),
        _dense("ultrascale-1b", 16, 2048, 32, 32, 8192, 131072, tied=True),
        _dense("ultrascale-3b", 28, 3072, 24, 24, 8192, 131072, tied=True),
        _dense("ultrascale-8b", 32, 4096, 32, 32, 14336, 131072),
        _mpt("mpt-125m", 12, 768, 12),
        _mpt("mpt-350m", 24, 1024, 16),
        _mpt("mpt-760m", 24, 1536, 12),
        _mpt("mpt-1b", 24, 2048, 16),
        _mpt("mpt-3b", 32, 2560, 20),
        _mpt("mpt-7b", 32, 4096, 32),
        _mpt("mpt-13b", 40, 5120, 40),
        _mpt("mpt-30b", 48, 7168, 56),
        _mpt("mpt-70b", 80, 8192, 64),
        _moe("grok1-314b", 64, 6144, 48, 8, 128, 32768, 131072, 8, 2, 32768, tied=True),
        _moe("mixtral-8x7b", 32, 4096, 32, 8, 128, 14336, 32000, 8, 2, 14336),
        _moe("mixtral-8x22b", 56, 6144, 48, 8, 128, 16384, 32768, 8, 2, 16384),
        _moe("deepseek-v3", 61, 7168, 128, 128, 192, 18432, 129280, 256, 8, 2048, first_dense=3, **_MLA),
        _moe("kimi-k2", 61, 7168, 64, 64, 192, 18432, 163840, 384, 8, 2048, first_dense=1, **_MLA),
        _moe("llama4-maverick", 48, 5120, 40, 8, 128, 16384, 202048, 128, 1, 8192, shared_experts=1, moe_every=2),
        _moe("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 6144, 151936, 128, 8, 768),
        _moe("qwen3-235b-a22b", 94, 4096, 64, 4, 128, 12288, 151936, 128, 8, 1536),
        _moe("gpt-oss-20b", 24, 2880, 64, 8, 64, 2880, 201088, 32, 4, 2880),
        _moe("gpt-oss-120b", 36, 2880, 64, 8, 64, 2880, 201088, 128, 4, 2880),
    )
}  # fmt: skip


def architecture(name: str) -> Architecture:
    """The model called `name` in `ARCHITECTURES`. Raises ValueError with the closest known name."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    close = difflib.get_close_matches(name.lower(), ARCHITECTURES, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown model {name!r}: did you mean {close!r}? Known: {', '.join(ARCHITECTURES)}"
    )


def of_model(m: object, causal: bool = False, name: str = "this model") -> Architecture:
    """The Architecture of a `config.model` section of this code base (SwiGLU, untied head)."""
    keys = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab")
    sizes: dict[str, int] = {key: getattr(m, key) for key in keys}
    return Architecture(name=name, causal=causal, **sizes)  # type: ignore[arg-type]


def replace(a: Architecture, **changes: object) -> Architecture:
    """A changed copy, checked again."""
    return dataclasses.replace(a, **changes)  # type: ignore[arg-type]
