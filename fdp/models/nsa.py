"""Native Sparse Attention (Yuan et al. 2025, arXiv 2502.11089): compressed, selected and near tokens, gated and summed.

Heads are split over tp; the sequence is whole on every device of a tensor group. Each branch has its own keys and
values (section 3.2) and its own softmax; outputs are weighted by sigmoid gates and added, never merged by logsumexp.

Legend: B sequences, L positions, D width, H query heads, K key/value heads, G = H/K, C head_dim, M compression block,
I compression blocks, J selection blocks. Inside shard_map H and K are this device's shares over tp.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdp.collectives import size
from fdp.kernels_pallas.masks import Mask, allowed
from fdp.models.layers import RMSNorm, enter_tp, leave_tp, normal, partitioned, rotary

Array = jax.Array

BRANCHES = ("compressed", "selected", "window")


@dataclass(frozen=True)
class Budget:
    """What a query may read, in tokens unless said; the defaults are the paper's (section 4.1).

    Compression blocks of `compress_block` start every `stride` tokens. `selected` blocks of `select_block` are read in
    full, among them the `initial` first ones and the `local` nearest, the query's own included. `window`: the near
    tokens, the query itself included. Raises ValueError for sizes that do not fit each other.
    """

    compress_block: int = 32
    stride: int = 16
    select_block: int = 64
    selected: int = 16  # blocks
    initial: int = 1  # blocks
    local: int = 2  # blocks
    window: int = 512

    def __post_init__(self) -> None:
        for name in ("compress_block", "select_block"):
            if self.stride < 1 or getattr(self, name) < 1 or getattr(self, name) % self.stride:
                raise ValueError(
                    f"{name} {getattr(self, name)} is not a multiple of stride {self.stride}: their overlap is counted "
                    f"in strides; set {name}={self.stride * max(getattr(self, name) // max(self.stride, 1), 1)}"
                )
        if self.initial < 0 or self.local < 1 or self.window < 1:
            raise ValueError(
                f"initial {self.initial} ≥ 0, local {self.local} ≥ 1 and window {self.window} ≥ 1 must hold"
            )
        if self.selected < self.initial + self.local:
            raise ValueError(
                f"selected {self.selected} < initial + local = {self.initial} + {self.local}: "
                f"set selected={self.initial + self.local} or more"
            )

    def check_length(self, length: int) -> None:
        """Raise ValueError unless `length` tokens are whole selection blocks and hold a compression block."""
        if length % self.select_block or length < self.compress_block:
            whole = -(-max(length, self.compress_block) // self.select_block) * self.select_block
            raise ValueError(
                f"{length} tokens must be a multiple of select_block {self.select_block} and at least compress_block "
                f"{self.compress_block}: set the length to {whole}"
            )


def selection_scores(p_BxKxGxLxI: Array, budget: Budget) -> Array:
    """Importance of the selection blocks: compression probabilities, mapped by overlap, summed over the group's heads.

    f32 [B, K, G, L, I] → [B, K, L, J]. Compression block i counts for selection block j once for every stride of
    tokens that they share: Σ_m Σ_n p[(l'/d)·j + m - n], m < l'/d, n < l/d (equations 9 and 10).
    """
    p_BxKxLxI = p_BxKxGxLxI.sum(2)
    covered, together = budget.compress_block // budget.stride, budget.select_block // budget.stride
    strides = p_BxKxLxI.shape[-1] + covered - 1
    padded = jnp.pad(p_BxKxLxI, ((0, 0), (0, 0), (0, 0), (covered - 1, covered - 1)))
    # Of every stride, the sum over the compression blocks that cover it; then of every block, over its strides.
    shifted = [padded[..., covered - 1 - n : covered - 1 - n + strides] for n in range(covered)]
    return jnp.stack(shifted).sum(0).reshape(*p_BxKxLxI.shape[:3], -1, together).sum(-1)


def select(scores_BxKxLxJ: Array, budget: Budget) -> Array:
    """Which blocks every query reads: the forced ones and the best others up to `selected`, bool [B, K, L, J].

    Only blocks that begin at or before the query; ties go to the earlier block. Not differentiable, by design.
    """
    L, J = scores_BxKxLxJ.shape[-2:]
    own_Lx1, block_J = (jnp.arange(L) // budget.select_block)[:, None], jnp.arange(J)
    forced_LxJ = (block_J < budget.initial) | (block_J > own_Lx1 - budget.local)
    ranked = jnp.where(forced_LxJ, jnp.inf, jax.lax.stop_gradient(scores_BxKxLxJ))
    ranked = jnp.where(block_J <= own_Lx1, ranked, -jnp.inf)
    _, best = jax.lax.top_k(ranked, min(budget.selected, J))
    # Near the start fewer blocks are visible than slots: what fills the rest is masked out again.
    chosen_BxKxLxJ = jnp.put_along_axis(jnp.zeros_like(ranked), best, 1.0, axis=-1, inplace=False) > 0
    return chosen_BxKxLxJ & (block_J <= own_Lx1)


def compressed_attention(q_BxLxHxC: Array, k_BxIxKxC: Array, v_BxIxKxC: Array, last_I: Array) -> tuple[Array, Array]:
    """Attention to compression blocks that are wholly past: output [B, L, H, C] and probabilities f32 [B, K, G, L, I].

    `last_I`: position of every block's last token. A query before the end of the first block gets output 0.
    """
    B, L, H, C = q_BxLxHxC.shape
    q_BxLxKxGxC = q_BxLxHxC.reshape(B, L, k_BxIxKxC.shape[2], -1, C)
    logits = jnp.einsum("blkgc,bikc->bkgli", q_BxLxKxGxC, k_BxIxKxC, preferred_element_type=jnp.float32) * C**-0.5
    seen_LxI = last_I <= jnp.arange(L)[:, None]
    # A finite floor keeps rows without any key free of NaN, in the gradient too; their weights are zeroed after.
    p_BxKxGxLxI = jax.nn.softmax(jnp.where(seen_LxI, logits, -1e30), axis=-1) * seen_LxI
    out_BxLxKxGxC = jnp.einsum("bkgli,bikc->blkgc", p_BxKxGxLxI.astype(v_BxIxKxC.dtype), v_BxIxKxC)
    return out_BxLxKxGxC.reshape(B, L, H, C), p_BxKxGxLxI


def selected_attention(q_BxLxHxC: Array, k_BxLxKxC: Array, v_BxLxKxC: Array, chosen_BxKxLxJ: Array) -> Array:
    """Causal attention to the tokens of the chosen blocks: [B, L, H, C]."""
    L, G = q_BxLxHxC.shape[1], q_BxLxHxC.shape[2] // k_BxLxKxC.shape[2]
    seen_BxKxLxL = jnp.repeat(chosen_BxKxLxJ, L // chosen_BxKxLxJ.shape[-1], axis=-1) & jnp.tri(L, dtype=bool)
    return jax.nn.dot_product_attention(q_BxLxHxC, k_BxLxKxC, v_BxLxKxC, mask=jnp.repeat(seen_BxKxLxL, G, axis=1))


def window_attention(q_BxLxHxC: Array, k_BxLxKxC: Array, v_BxLxKxC: Array, window: int) -> Array:
    """Causal attention to the last `window` tokens: [B, L, H, C]."""
    position_L = jnp.arange(q_BxLxHxC.shape[1])
    seen_LxL = allowed(Mask("causal", window=window), position_L, position_L)
    return jax.nn.dot_product_attention(q_BxLxHxC, k_BxLxKxC, v_BxLxKxC, mask=seen_LxL[None, None])


class Compression(nn.Module):
    """phi (equation 7): a block of keys or values, with learned positions inside the block, through one hidden layer.

    Keys and values [2, B, L, K, C] → [2, B, I, K, C]; each of the two and every head has its own weights.
    """

    kv_heads: int
    head_dim: int
    budget: Budget
    dtype: Any

    @nn.compact
    def __call__(self, kv_2xBxLxKxC: Array) -> Array:
        C, M, K = self.head_dim, self.budget.compress_block, self.kv_heads // size("tp")
        heads = (None, "tp", None, None)
        position = self.param("position", partitioned(normal(0.02), *heads), (2, K, M, C)).astype(self.dtype)
        w_in = self.param("w_in", partitioned(normal((M * C) ** -0.5), *heads, None), (2, K, M, C, C))
        w_out = self.param("w_out", partitioned(normal(C**-0.5), *heads), (2, K, C, C)).astype(self.dtype)
        first_I = jnp.arange(0, kv_2xBxLxKxC.shape[2] - M + 1, self.budget.stride)
        blocks_2xBxIxMxKxC = kv_2xBxLxKxC[:, :, first_I[:, None] + jnp.arange(M)]
        blocks_2xBxIxMxKxC = blocks_2xBxIxMxKxC + position.swapaxes(1, 2)[:, None, None]
        hidden = nn.gelu(jnp.einsum("sbimkc,skmcd->sbikd", blocks_2xBxIxMxKxC, w_in.astype(self.dtype)))
        return jnp.einsum("sbikd,skdc->sbikc", hidden, w_out)


class NativeSparseAttention(nn.Module):
    """Causal grouped-query attention to a budget of tokens, in place of `Attention`: [B, L, D] → [B, L, D].

    Rotary positions as in `Attention`; a compressed key is rotated to the position of its last token, when it comes in
    sight. Gates are sigmoid(x W), one a head and branch (the paper leaves their network open). The sequence must be
    whole: ValueError when cp is bound, or for a length that `Budget.check_length` refuses.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    budget: Budget
    rope_base: float
    qk_norm: bool
    dtype: Any
    sequence_parallel: bool

    @nn.compact
    def __call__(self, x_BxLxD: Array) -> Array:
        if size("cp") > 1:
            raise ValueError(
                f"native sparse attention needs the whole sequence on a device, but cp = {size('cp')}: set mesh.cp=1"
            )
        D, C = self.width, self.head_dim
        H, K = self.heads // size("tp"), self.kv_heads // size("tp")
        column = partitioned(normal(D**-0.5), None, "tp", None)
        w_q = self.param("w_q", column, (D, H, C)).astype(self.dtype)
        per_branch = partitioned(normal(D**-0.5), None, None, None, "tp", None)
        w_kv = self.param("w_kv", per_branch, (len(BRANCHES), 2, D, K, C)).astype(self.dtype)
        w_gate = self.param("w_gate", column, (D, H, len(BRANCHES))).astype(self.dtype)
        row = partitioned(normal((self.heads * C) ** -0.5), "tp", None, None)
        w_o = self.param("w_o", row, (H, C, D)).astype(self.dtype)

        x_BxLxD = enter_tp(x_BxLxD, self.sequence_parallel)
        self.budget.check_length(x_BxLxD.shape[1])
        q_BxLxHxC = jnp.einsum("bld,dhc->blhc", x_BxLxD, w_q)
        kv_3x2xBxLxKxC = jnp.einsum("bld,nsdkc->nsblkc", x_BxLxD, w_kv)
        gate_BxLxHx3 = jax.nn.sigmoid(jnp.einsum("bld,dhn->blhn", x_BxLxD, w_gate))
        outputs = self._attend(q_BxLxHxC, kv_3x2xBxLxKxC)
        out_BxLxHxC = sum(gate_BxLxHx3[..., n, None] * out for n, out in enumerate(outputs))
        return leave_tp(jnp.einsum("blhc,hcd->bld", out_BxLxHxC, w_o), self.sequence_parallel)

    def _attend(self, q_BxLxHxC: Array, kv_3x2xBxLxKxC: Array) -> tuple[Array, Array, Array]:
        """Outputs of the three branches, in the order of BRANCHES."""
        b, L = self.budget, q_BxLxHxC.shape[1]
        compress = Compression(self.kv_heads, self.head_dim, b, self.dtype, name="compression")
        k_BxIxKxC, v_BxIxKxC = compress(kv_3x2xBxLxKxC[0])
        (k_selected, v_selected), (k_window, v_window) = kv_3x2xBxLxKxC[1], kv_3x2xBxLxKxC[2]
        if self.qk_norm:
            q_BxLxHxC = RMSNorm(name="q_norm")(q_BxLxHxC)
            k_BxIxKxC, k_selected, k_window = (
                RMSNorm(name=f"k_norm_{name}")(k)
                for name, k in zip(BRANCHES, (k_BxIxKxC, k_selected, k_window), strict=True)
            )
        position_L = jnp.arange(L)
        last_I = b.compress_block - 1 + b.stride * jnp.arange(k_BxIxKxC.shape[1])
        q_BxLxHxC = rotary(q_BxLxHxC, position_L, self.rope_base)
        k_BxIxKxC = rotary(k_BxIxKxC, last_I, self.rope_base)
        k_selected, k_window = (rotary(k, position_L, self.rope_base) for k in (k_selected, k_window))
        compressed, p_BxKxGxLxI = compressed_attention(q_BxLxHxC, k_BxIxKxC, v_BxIxKxC, last_I)
        chosen_BxKxLxJ = select(selection_scores(p_BxKxGxLxI, b), b)
        selected = selected_attention(q_BxLxHxC, k_selected, v_selected, chosen_BxKxLxJ)
        return compressed, selected, window_attention(q_BxLxHxC, k_window, v_window, b.window)
