"""The shape of a Transformer as data, shared by the builder, the counts, the prices and the
planner.

Legend: D width, H query heads, K key/value heads, C head_dim, F FFN hidden, E experts, V
vocabulary."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

NOISE_FEATURES = 64  # of the noise level, with time conditioning
SIZES = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab")


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of one architecture; all sizes are global.

    `joint_norm`: norms of queries and keys are over all heads together. `dtype`: of compute
    (parameters and logits are float32). `remat`: none | dots | full, what the backward pass
    recomputes. `sequence_parallel`: between blocks the sequence is sharded over tp. `vocab_axes`:
    mesh axes over which the output head shards the vocabulary. `gated`: the FFN has a gate.
    `experts` = 0 is dense. The first `first_dense` layers have no experts; of the others every
    `moe_every`-th has them. `shared_gate`: a sigmoid of the token weighs the shared experts.

    Multi-head latent attention (DeepSeek) is given by its two ranks and the rotary part of a head.
    `head_dim` is then that of queries and keys, and `value_dim` that of values (0: the same).

    The stock builder builds a part of these shapes (see `unbuildable`); all of them can be priced.
    Raises ValueError for sizes that do not fit each other."""

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
    joint_norm: bool = False
    bias: bool = False
    tied: bool = False
    conv: int = 0
    time_conditioning: bool = False
    dtype: str = "float32"
    remat: str = "none"
    sequence_parallel: bool = False
    vocab_axes: tuple[str, ...] = ("tp",)
    gated: bool = True
    experts: int = 0
    topk: int = 0
    moe_ffn: int = 0
    shared_experts: int = 0
    shared_gate: bool = False
    first_dense: int = 0
    moe_every: int = 1
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    name: str = "this model"

    def __post_init__(self) -> None:
        for key in SIZES:
            if not getattr(self, key) >= 1:
                raise ValueError(
                    f"model {self.name!r}: {key}={getattr(self, key)} must be at least 1"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model {self.name!r}: {self.heads} heads are not divisible by "
                f"{self.kv_heads} kv_heads"
            )
        if self.experts and not 1 <= self.topk <= self.experts:
            raise ValueError(
                f"model {self.name!r}: topk={self.topk} is not within 1..experts={self.experts}"
            )

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "ModelShape":
        """The shape in the `model` section of a config; other keys there are ignored."""
        given = {f.name: section[f.name] for f in fields(cls) if f.name in section}
        moe = section["moe"]
        if moe["experts"]:
            given |= {"experts": moe["experts"], "topk": moe["topk"], "moe_ffn": moe["ffn"]}
            given |= {"shared_experts": moe["shared"], "shared_gate": moe["shared_gate"]}
            given |= {"first_dense": moe["first_dense"], "moe_every": moe["every"]}
        return cls(**given)

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def unbuildable(self) -> list[str]:
        """Names of the features that the stock builder lacks."""
        parts = {
            "an FFN that is not gated": not self.gated,
            "latent attention": self.kv_rank or self.q_rank,
            "values of another width than keys": self.value_dim not in (0, self.head_dim),
            "an odd head_dim": self.head_dim % 2,
        }
        return [part for part, present in parts.items() if present]

    def check(self) -> None:
        """Raises ValueError, by name, for features that the stock builder lacks."""
        if self.unbuildable:
            raise ValueError(
                f"model {self.name!r} cannot be built: the stock blocks lack "
                f"{', '.join(self.unbuildable)}; give Transformer a pattern of layers that "
                "have them"
            )

    @property
    def moe_layers(self) -> int:
        """Layers whose FFN is a mixture of experts."""
        return (self.layers - self.first_dense) // self.moe_every if self.experts else 0

    @property
    def projections(self) -> int:
        """Matrices of an FFN: 3 (gate, up, down) or 2 (up, down)."""
        return 3 if self.gated else 2

    def attention_parameters(self) -> tuple[int, int]:
        """Weights of one layer of attention: (input projections, output projection)."""
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

    def layer_parameters(self) -> int:
        """Weights of one layer without its FFN: attention, norms, biases, convolution and
        modulations."""
        C, found = self.head_dim, sum(self.attention_parameters()) + 2 * self.width
        found += C * (self.heads + 2 * self.kv_heads) if self.bias else 0
        heads = self.heads + self.kv_heads if self.joint_norm else 2
        found += heads * C if self.qk_norm else 0
        found += 2 * NOISE_FEATURES * 3 * self.width if self.time_conditioning else 0
        return found + self.conv * self.width

    def parameters(self) -> int:
        """All weights: matrices, scales of norms, router, noise embedding, embedding and head."""
        moe = self.moe_layers
        layers = self.layers * self.layer_parameters() + (self.layers - moe) * self.ffn_parameters()
        layers += moe * (
            (self.experts + self.shared_experts) * self.expert_parameters()
            + self.width * (self.experts + self.shared_gate)
        )
        layers += NOISE_FEATURES**2 if self.time_conditioning else 0
        return layers + (1 if self.tied else 2) * self.vocab * self.width + self.width

    def active_parameters(self) -> int:
        """Weights used for one token, embedding and head included."""
        idle = self.experts - self.topk
        return self.parameters() - self.moe_layers * idle * self.expert_parameters()

    def forward_flops(self, seq: int, causal: bool) -> float:
        """Matmul FLOPs of the forward pass per token of a sequence of length `seq`, without time
        conditioning.

        A causal mask halves the scores, as the field reports throughput. Our own programs are
        counted by another convention (`fdp.count.counts`)."""
        attention, moe = sum(self.attention_parameters()), self.moe_layers
        ffn = (self.layers - moe) * self.ffn_parameters()
        ffn += moe * (
            (self.topk + self.shared_experts) * self.expert_parameters() + self.width * self.experts
        )
        width = self.heads * (self.head_dim + (self.value_dim or self.head_dim))
        scores = 2 * seq * width * (0.5 if causal else 1)
        return 2 * (self.layers * attention + ffn + self.vocab * self.width) + self.layers * scores
