"""One Transformer for every mesh: outside shard_map the single-device reference, inside it the sharded program.

Legend: B sequences, L positions (local over cp), D width, V vocabulary (local over tp).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from fdp.collectives import all_gather, size, vary
from fdp.models.attention import Attention
from fdp.models.layers import Embedding, Head, Modulation, NoiseEmbedding, RMSNorm, SwiGLU

Array = jax.Array

# What the backward pass keeps: everything; only the products with weights; only the block inputs.
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
    """Pre-norm residual block; with time conditioning each sublayer is modulated by the noise level."""

    m: ml_collections.FrozenConfigDict
    attention: str
    block: int

    @nn.compact
    def __call__(self, x_BxLxD: Array, noise_BxE: Array | None) -> tuple[Array, None]:
        m, dtype = self.m, jnp.dtype(self.m.dtype)
        attention = Attention(
            m.width, m.heads, m.kv_heads, m.head_dim, self.attention, self.block, m.rope_base, m.qk_norm, dtype,
            m.sequence_parallel, name="attention",
        )  # fmt: skip
        mlp = SwiGLU(m.width, m.ffn, dtype, m.sequence_parallel, name="mlp")
        for name, layer in (("attention", attention), ("mlp", mlp)):
            h_BxLxD = RMSNorm(name=f"{name}_norm")(x_BxLxD)
            if noise_BxE is None:
                x_BxLxD = x_BxLxD + layer(h_BxLxD)
            else:
                shift, scale, gate = Modulation(m.width, name=f"{name}_modulation")(noise_BxE)
                h_BxLxD = (h_BxLxD * (1 + scale) + shift).astype(dtype)
                x_BxLxD = (x_BxLxD + (1 + gate) * layer(h_BxLxD)).astype(dtype)
        return x_BxLxD, None


class Transformer(nn.Module):
    """Token ids to vocabulary-parallel logits.

    Attributes: `m`, the frozen `model` section of the config; `attention`, which keys a query sees (causal,
    bidirectional, block_diffusion); `block`, tokens per block of block diffusion;
    `gather`, for ZeRO-3, maps the stored parameters of one layer to the whole ones inside the rematerialised scan.
    """

    m: ml_collections.FrozenConfigDict
    attention: str = "bidirectional"
    block: int = 0
    gather: Callable[[Any], Any] | None = None

    def setup(self) -> None:
        m = self.m
        dtype = jnp.dtype(m.dtype)
        self.embed = Embedding(m.vocab, m.width, dtype, m.sequence_parallel)
        self.norm = RMSNorm()
        self.head = Head(m.vocab, dtype)
        if m.time_conditioning:
            self.noise_embedding = NoiseEmbedding()
        block: Any = Block
        if self.gather is not None:
            block = nn.map_variables(block, "params", trans_in_fn=self.gather)
        if m.remat != "none":
            block = nn.remat(block, policy=REMAT[m.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=m.layers // size("pp"),
            metadata_params={nn.PARTITION_NAME: "pp"},
        )(m, self.attention, self.block)

    def hidden(self, ids_BxL: Array, noise_B: Array) -> Array:
        """Final normed activations [B, L, D]; noise_B (any scale) is read only with time conditioning."""
        noise_BxE = self.noise_embedding(noise_B) if self.m.time_conditioning else None
        x_BxLxD = vary(self.embed(ids_BxL), "pp")  # the stacked layers are typed varying over pp
        x_BxLxD, _ = self.layers(x_BxLxD, noise_BxE)
        x_BxLxD = self.norm(x_BxLxD)
        # Not `enter_tp`: without SP the rows are marked varying in the head, after the caller has selected some.
        return all_gather(x_BxLxD, "tp", dim=1) if self.m.sequence_parallel else x_BxLxD

    def logits(self, x_D: Array) -> Array:
        """Head on any selection of rows: [..., D] → float32 [..., V/tp]."""
        return self.head(x_D)

    def __call__(self, ids_BxL: Array, noise_B: Array) -> Array:
        """Logits [B, L, V/tp], float32."""
        return self.logits(self.hidden(ids_BxL, noise_B))


def from_config(c: ml_collections.ConfigDict, attention: str, block: int = 0) -> Transformer:
    """The model that config `c` describes, seeing what `attention` allows (the objective decides)."""
    return Transformer(ml_collections.FrozenConfigDict(c.model), attention, block)
