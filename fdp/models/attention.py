"""Grouped-query attention: heads over tp, sequence over cp (keys and values all-gathered).

Legend: B sequences, L local positions, S all positions, D width, H query heads, K key/value heads, C head_dim.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdp.collectives import all_gather, index, size
from fdp.models.layers import RMSNorm, enter_tp, leave_tp, normal, partitioned, rotary
from fdp.objectives.block_diffusion import block_diffusion_mask

Array = jax.Array


def attention_mask(kind: str, q_index_L: Array, k_index_S: Array, block: int) -> Array | None:
    """Which keys a query may see, bool [1, 1, L, S]; None = all of them. Indices are global positions in the input."""
    q, k = q_index_L[:, None], k_index_S[None, :]
    if kind == "causal":
        return (k <= q)[None, None]
    if kind == "block_diffusion":
        return block_diffusion_mask(q, k, k_index_S.shape[0] // 2, block)[None, None]
    return None


class Attention(nn.Module):
    """Softmax attention with rotary positions. Heads are split over tp; the output projection is the one reduction."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    kind: str
    block: int
    rope_base: float
    qk_norm: bool
    dtype: Any
    sequence_parallel: bool

    @nn.compact
    def __call__(self, x_BxLxD: Array) -> Array:
        D, C = self.width, self.head_dim
        H, K = self.heads // size("tp"), self.kv_heads // size("tp")
        column = partitioned(normal(D**-0.5), None, "tp", None)
        w_q = self.param("w_q", column, (D, H, C)).astype(self.dtype)
        w_kv = self.param("w_kv", partitioned(normal(D**-0.5), None, None, "tp", None), (2, D, K, C)).astype(self.dtype)
        row = partitioned(normal((self.heads * C) ** -0.5), "tp", None, None)
        w_o = self.param("w_o", row, (H, C, D)).astype(self.dtype)

        x_BxLxD = enter_tp(x_BxLxD, self.sequence_parallel)
        q_BxLxHxC = jnp.einsum("bld,dhc->blhc", x_BxLxD, w_q)
        k_BxLxKxC = jnp.einsum("bld,dkc->blkc", x_BxLxD, w_kv[0])
        v_BxLxKxC = jnp.einsum("bld,dkc->blkc", x_BxLxD, w_kv[1])
        if self.qk_norm:
            q_BxLxHxC, k_BxLxKxC = RMSNorm(name="q_norm")(q_BxLxHxC), RMSNorm(name="k_norm")(k_BxLxKxC)
        out_BxLxHxC = self._attend(q_BxLxHxC, k_BxLxKxC, v_BxLxKxC)
        return leave_tp(jnp.einsum("blhc,hcd->bld", out_BxLxHxC, w_o), self.sequence_parallel)

    def _attend(self, q_BxLxHxC: Array, k_BxLxKxC: Array, v_BxLxKxC: Array) -> Array:
        L = q_BxLxHxC.shape[1]
        S = L * size("cp")
        q_index_L = index("cp") * L + jnp.arange(L)
        # Block diffusion reads [noisy ‖ clean]: both halves carry the same positions.
        positions_L = q_index_L % (S // 2) if self.kind == "block_diffusion" else q_index_L
        q_BxLxHxC = rotary(q_BxLxHxC, positions_L, self.rope_base)
        k_BxSxKxC = all_gather(rotary(k_BxLxKxC, positions_L, self.rope_base), "cp", dim=1)
        v_BxSxKxC = all_gather(v_BxLxKxC, "cp", dim=1)
        if self.kind == "causal" and size("cp") == 1:
            return jax.nn.dot_product_attention(q_BxLxHxC, k_BxSxKxC, v_BxSxKxC, is_causal=True)
        mask = attention_mask(self.kind, q_index_L, jnp.arange(S), self.block)
        return jax.nn.dot_product_attention(q_BxLxHxC, k_BxSxKxC, v_BxSxKxC, mask=mask)
