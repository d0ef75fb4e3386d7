"""Native Sparse Attention (Yuan et al. 2025, arXiv 2502.11089): attention to compressed, selected
and near tokens, weighted by gates and summed.

Heads are sharded over tp and contiguous parts of the sequence over cp. Each branch has its own keys
and values (section 3.2) and its own softmax. Outputs are weighted by sigmoid gates and added; they
are never merged by logsumexp.

Over cp, each device compresses the blocks that begin in its part. For the last of them it receives
the first tokens of the next part. Compressed keys and values, and those of the other two branches,
are all-gathered. Inside shard_map H and K are the shares of this device over tp; G = H/K, and S is
the length over all devices of cp.

Legend: B sequences, L positions (local over cp), D width, H query heads, K key/value heads, C
head_dim, I compression blocks, J selection blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.collectives import all_gather, index, shift, size
from fdp.count.counts import GATHER, PERMUTE, SCATTER, Counts, Degrees, Ledger, Rows, Work, merged
from fdp.models.attention import Where
from fdp.models.layers import (
    Reduction,
    RMSNorm,
    enter_tp,
    entered,
    hidden_bytes,
    leave_tp,
    left,
    normal,
    rotary,
)
from fdp.models.module import Module, compact
from fdp.models.shape import ModelShape
from fdp.parallel.masks import Mask, allowed

Array = jax.Array

BRANCHES = ("compressed", "selected", "window")


@dataclass(frozen=True)
class Budget:
    """What a query may read, in tokens unless said otherwise; the defaults are those of the paper
    (section 4.1).

    Compression blocks of `compress_block` tokens start every `stride` tokens. `selected` blocks of
    `select_block` tokens are read in full: the `initial` first ones, the `local` nearest ones (with
    the block of the query), and the best others. `window`: near tokens, including the query. Raises
    ValueError for sizes that do not fit each other."""

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
                    f"{name} {getattr(self, name)} is not a multiple of stride {self.stride}: "
                    "their overlap is counted "
                    "in strides; set "
                    f"{name}={self.stride * max(getattr(self, name) // max(self.stride, 1), 1)}"
                )
        if self.initial < 0 or self.local < 1 or self.window < 1:
            raise ValueError(
                f"initial {self.initial} ≥ 0, local {self.local} ≥ 1 and window {self.window} ≥ 1 "
                "must hold"
            )
        if self.selected < self.initial + self.local:
            raise ValueError(
                f"selected {self.selected} < initial + local = {self.initial} + {self.local}: "
                f"set selected={self.initial + self.local} or more"
            )

    def tokens(self, length: int) -> float:
        """Mean number of tokens that a query reads in a sequence of `length`: a compressed block
        counts as one, and branches are added. Dense causal attention reads (length + 1) / 2."""
        t = np.arange(length)
        compressed = np.maximum((t + 1 - self.compress_block) // self.stride + 1, 0)
        others = np.minimum(t // self.select_block, self.selected - 1)
        selected = others * self.select_block + t % self.select_block + 1
        return float((compressed + selected + np.minimum(t + 1, self.window)).mean())

    def blocks(self, length: int) -> int:
        """I: the number of compression blocks of `length` tokens."""
        return (length - self.compress_block) // self.stride + 1

    def check_length(self, length: int) -> None:
        """Raises ValueError unless `length` is a multiple of the selection block and holds a
        compression block."""
        if length % self.select_block or length < self.compress_block:
            whole = -(-max(length, self.compress_block) // self.select_block) * self.select_block
            raise ValueError(
                f"{length} tokens must be a multiple of select_block {self.select_block} and at "
                "least compress_block "
                f"{self.compress_block}: set the length to {whole}"
            )


def selection_scores(p_BxKxGxLxI: Array, budget: Budget) -> Array:
    """Importance of the selection blocks: probabilities of overlapping compression blocks, summed
    over the heads of a group. f32 [B, K, G, L, I] → [B, K, L, J].

    Compression block i counts for selection block j once for every stride of tokens that they
    share: Σ_m Σ_n p[(l'/d)·j + m - n], m < l'/d, n < l/d (equations 9 and 10)."""
    p_BxKxLxI = p_BxKxGxLxI.sum(2)
    covered, together = budget.compress_block // budget.stride, budget.select_block // budget.stride
    strides = p_BxKxLxI.shape[-1] + covered - 1
    padded = jnp.pad(p_BxKxLxI, ((0, 0), (0, 0), (0, 0), (covered - 1, covered - 1)))
    # Of every stride, the sum over the compression blocks that cover it; then of every block, over
    # its strides.
    shifted = [padded[..., covered - 1 - n : covered - 1 - n + strides] for n in range(covered)]
    return jnp.stack(shifted).sum(0).reshape(*p_BxKxLxI.shape[:3], -1, together).sum(-1)


def select(scores_BxKxLxJ: Array, budget: Budget, position_L: Array) -> Array:
    """The blocks that every query reads, bool [B, K, L, J]: the forced ones, and the best others up
    to `selected`.

    Only blocks that begin at or before the query are chosen; ties go to the earlier block.
    Selection is not differentiated."""
    J = scores_BxKxLxJ.shape[-1]
    own_Lx1, block_J = (position_L // budget.select_block)[:, None], jnp.arange(J)
    forced_LxJ = (block_J < budget.initial) | (block_J > own_Lx1 - budget.local)
    ranked = jnp.where(forced_LxJ, jnp.inf, jax.lax.stop_gradient(scores_BxKxLxJ))
    ranked = jnp.where(block_J <= own_Lx1, ranked, -jnp.inf)
    _, best = jax.lax.top_k(ranked, min(budget.selected, J))
    # Near the start fewer blocks are visible than slots: what fills the rest is masked out again.
    chosen_BxKxLxJ = (
        jnp.put_along_axis(jnp.zeros_like(ranked), best, 1.0, axis=-1, inplace=False) > 0
    )
    return chosen_BxKxLxJ & (block_J <= own_Lx1)


def compressed_attention(
    q_BxLxHxC: Array, k_BxIxKxC: Array, v_BxIxKxC: Array, last_I: Array, position_L: Array
) -> tuple[Array, Array]:
    """Attention to the compression blocks that end before the query: output [B, L, H, C] and
    probabilities f32 [B, K, G, L, I].

    `last_I`: position of the last token of every block. A query before the end of the first block
    gets output 0."""
    B, L, H, C = q_BxLxHxC.shape
    q_BxLxKxGxC = q_BxLxHxC.reshape(B, L, k_BxIxKxC.shape[2], -1, C)
    logits = (
        jnp.einsum("blkgc,bikc->bkgli", q_BxLxKxGxC, k_BxIxKxC, preferred_element_type=jnp.float32)
        * C**-0.5
    )
    seen_LxI = last_I <= position_L[:, None]
    # A finite floor keeps rows without any key free of NaN, in the gradient too; their weights are
    # zeroed after.
    p_BxKxGxLxI = jax.nn.softmax(jnp.where(seen_LxI, logits, -1e30), axis=-1) * seen_LxI
    out_BxLxKxGxC = jnp.einsum("bkgli,bikc->blkgc", p_BxKxGxLxI.astype(v_BxIxKxC.dtype), v_BxIxKxC)
    return out_BxLxKxGxC.reshape(B, L, H, C), p_BxKxGxLxI


def selected_attention(
    q_BxLxHxC: Array, k_BxSxKxC: Array, v_BxSxKxC: Array, chosen_BxKxLxJ: Array, position_L: Array
) -> Array:
    """Causal attention to the tokens of the chosen blocks: [B, L, H, C]."""
    S, G = k_BxSxKxC.shape[1], q_BxLxHxC.shape[2] // k_BxSxKxC.shape[2]
    past_LxS = jnp.arange(S) <= position_L[:, None]
    seen_BxKxLxS = jnp.repeat(chosen_BxKxLxJ, S // chosen_BxKxLxJ.shape[-1], axis=-1) & past_LxS
    return jax.nn.dot_product_attention(
        q_BxLxHxC, k_BxSxKxC, v_BxSxKxC, mask=jnp.repeat(seen_BxKxLxS, G, axis=1)
    )


def window_attention(
    q_BxLxHxC: Array, k_BxSxKxC: Array, v_BxSxKxC: Array, window: int, position_L: Array
) -> Array:
    """Causal attention to the last `window` tokens: [B, L, H, C]."""
    seen_LxS = allowed(Mask("causal", window=window), position_L, jnp.arange(k_BxSxKxC.shape[1]))
    return jax.nn.dot_product_attention(q_BxLxHxC, k_BxSxKxC, v_BxSxKxC, mask=seen_LxS[None, None])


def with_halo(kv_2xBxLxKxC: Array, tokens: int) -> Array:
    """[2, B, L, K, C] followed by the first `tokens` positions of the next device of cp (zeros
    after the last one): [2, B, L + tokens, K, C]."""
    if size("cp") == 1 or not tokens:
        return kv_2xBxLxKxC
    halo = shift(kv_2xBxLxKxC[:, :, :tokens], "cp", by=-1, cyclic=False)
    return jnp.concatenate([kv_2xBxLxKxC, halo], 2)


def check_parts(budget: Budget, length: int, cp: int) -> None:
    """Raises ValueError unless parts of `length` tokens on cp devices fit the budget."""
    budget.check_length(length * cp)
    reach = budget.compress_block - budget.stride
    if cp > 1 and (length % budget.stride or length < reach):
        raise ValueError(
            f"S/cp = {length * cp}/{cp} = {length} tokens of a device must be a multiple of stride "
            f"{budget.stride} and at least compress_block - stride = {reach}: lower mesh.cp or the "
            "stride"
        )


class Compression(Module):
    """phi (equation 7): each block of keys or values, with learned positions inside the block, goes
    through one hidden layer: [2, B, L, K, C] → [2, B, I, K, C].

    Keys and values, and all heads, have weights of their own."""

    shape: ModelShape
    budget: Budget

    @compact
    def __call__(self, kv_2xBxLxKxC: Array) -> Array:
        C, M, K = self.shape.head_dim, self.budget.compress_block, self.shape.kv_heads
        dtype, heads = jnp.dtype(self.shape.dtype), (None, "tp", None, None)
        position = self.weight("position", normal(0.02), (2, K, M, C), heads).astype(dtype)
        deep = normal((M * C) ** -0.5)
        w_in = self.weight("w_in", deep, (2, K, M, C, C), (*heads, None)).astype(dtype)
        w_out = self.weight("w_out", normal(C**-0.5), (2, K, C, C), heads).astype(dtype)
        first_I = jnp.arange(0, kv_2xBxLxKxC.shape[2] - M + 1, self.budget.stride)
        blocks_2xBxIxMxKxC = kv_2xBxLxKxC[:, :, first_I[:, None] + jnp.arange(M)]
        blocks_2xBxIxMxKxC = blocks_2xBxIxMxKxC + position.swapaxes(1, 2)[:, None, None]
        hidden = jax.nn.gelu(jnp.einsum("sbimkc,skmcd->sbikd", blocks_2xBxIxMxKxC, w_in))
        return jnp.einsum("sbikd,skdc->sbikc", hidden, w_out)

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Matrix products batched over heads. The saved input is that of the blocks, which
        overlap."""
        s, M, C = self.shape, self.budget.compress_block, self.shape.head_dim
        cp, tp, K = degrees["cp"], degrees["tp"], self.shape.kv_heads
        blocks = rows.batch * self.budget.blocks(rows.length)
        flops = 2 * blocks * 2 * K * (M * C * C + C * C)
        there, back = Ledger(degrees), Ledger(degrees)
        position = rows.batch * (K // tp) * C * s.itemsize  # of keys, or of values
        if cp > 1:
            halo = 2 * (M - self.budget.stride) * position
            compressed = 2 * rows.length // self.budget.stride // cp * position
            there.put(PERMUTE, ("cp",), halo).add(GATHER, ("cp",), compressed)
            back.put(PERMUTE, ("cp",), halo).add(SCATTER, ("cp",), compressed)
        forward = Work(flops, batched=flops, sent=there.sent)
        saved = 2 * blocks // cp * (K // tp) * (M + 3) * C * s.itemsize
        parameters = 2 * K * (M * C + M * C * C + C * C)
        return Counts(parameters, forward, forward.backward(back.sent), saved=saved)


class NativeSparseAttention(Module):
    """Causal grouped-query attention to a budget of tokens, in place of `Attention`: [B, L, D] →
    [B, L, D].

    Rotary positions are those of `Attention`; a compressed key is rotated to the position of its
    last token, where it becomes visible. Gates are sigmoid(x W), one per head and branch (the paper
    leaves their network open). Over cp the layout is contiguous. Raises ValueError for a length
    that `Budget.check_length` refuses, and for parts of the sequence that are no multiple of the
    stride or shorter than the halo of a compression block."""

    shape: ModelShape
    budget: Budget
    reduction: Reduction | None = None

    @compact
    def __call__(self, x_BxLxD: Array, where: Where, given: Any = None) -> Array:
        s, dtype = self.shape, jnp.dtype(self.shape.dtype)
        D, H, K, C, n = s.width, s.heads, s.kv_heads, s.head_dim, len(BRANCHES)
        column, heads = normal(D**-0.5), (None, "tp", None)
        w_q = self.weight("w_q", column, (D, H, C), heads).astype(dtype)
        axes = (None, None, None, "tp", None)
        w_kv = self.weight("w_kv", column, (n, 2, D, K, C), axes).astype(dtype)
        w_gate = self.weight("w_gate", column, (D, H, n), heads).astype(dtype)
        row = normal((H * C) ** -0.5)
        w_o = self.weight("w_o", row, (H, C, D), ("tp", None, None)).astype(dtype)

        x_BxLxD = enter_tp(x_BxLxD, s.sequence_parallel)
        check_parts(self.budget, x_BxLxD.shape[1], size("cp"))
        q_BxLxHxC = jnp.einsum("bld,dhc->blhc", x_BxLxD, w_q)
        kv_3x2xBxLxKxC = jnp.einsum("bld,nsdkc->nsblkc", x_BxLxD, w_kv)
        gate_BxLxHx3 = jax.nn.sigmoid(jnp.einsum("bld,dhn->blhn", x_BxLxD, w_gate))
        outputs = self._attend(q_BxLxHxC, kv_3x2xBxLxKxC)
        out_BxLxHxC = sum(gate_BxLxHx3[..., n, None] * out for n, out in enumerate(outputs))
        partial_BxLxD = jnp.einsum("blhc,hcd->bld", out_BxLxHxC, w_o)
        return leave_tp(partial_BxLxD, s.sequence_parallel, self.reduction, "attention")

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Selected and near keys are counted as the program computes them: all keys, under a mask.
        Over cp each device also computes blocks that reach beyond the end of the sequence; they are
        not counted."""
        s, n, S = self.shape, len(BRANCHES), rows.length
        D, H, K, C, tp, cp = s.width, s.heads, s.kv_heads, s.head_dim, degrees["tp"], degrees["cp"]
        into, out = D * H * C + 2 * n * D * K * C + D * H * n, H * C * D
        enter, enter_back = entered(s, rows, degrees)
        leave, leave_back = left(s, rows, degrees, self.reduction)
        there, back = Ledger(degrees), Ledger(degrees)
        of_keys = 4 * rows.tokens(degrees) * (K // tp) * C * s.itemsize  # of two branches
        there.add(GATHER, ("cp",), of_keys)
        back.add(SCATTER, ("cp",), of_keys)
        last = Work(2 * rows.positions * out, sent=leave)
        scores = 4 * rows.positions * (self.budget.blocks(S) + 2 * S) * H * C
        forward = Work(2 * rows.positions * into, sent=merged(enter, there.sent)) + last
        forward += Work(scores, batched=scores)
        between, inside = hidden_bytes(s, rows, degrees)
        heads = H + n * H + 2 * n * K  # queries, outputs, keys and values
        kept = between + rows.tokens(degrees) * heads * C // tp * s.itemsize
        probabilities = scores // (4 * cp * tp * C) * (4 + s.itemsize)
        found = Counts(
            into + out,
            forward,
            forward.backward(merged(enter_back, leave_back, back.sent)),
            last,
            saved=kept + inside + cp * of_keys + probabilities,
            kept=kept,
        )
        found += Compression(s, self.budget, parent=None).counts(rows, degrees)
        if s.qk_norm:
            norm = RMSNorm(s.epsilon, parent=None).counts(C, True, degrees)
            found = sum([norm] * (1 + n), found)
        return found

    def check(self, batch: int, length: int, degrees: Mapping[str, int]) -> None:
        """Raises ValueError for a length that the budget refuses on cp devices."""
        if length % degrees["cp"]:
            raise ValueError(f"S = {length} is not divisible by cp = {degrees['cp']}")
        check_parts(self.budget, length // degrees["cp"], degrees["cp"])
        if self.shape.joint_norm:
            raise ValueError("native sparse attention norms every head: set model.joint_norm=False")

    def _attend(self, q_BxLxHxC: Array, kv_3x2xBxLxKxC: Array) -> tuple[Array, Array, Array]:
        """Outputs of the three branches, in the order of BRANCHES."""
        b, L = self.budget, q_BxLxHxC.shape[1]
        S = L * size("cp")
        compress = Compression(self.shape, b, name="compression")
        blocks = b.blocks(S)
        compressed_2xBxIxKxC = compress(with_halo(kv_3x2xBxLxKxC[0], b.compress_block - b.stride))
        k_BxIxKxC, v_BxIxKxC = all_gather(compressed_2xBxIxKxC, "cp", dim=2)[:, :, :blocks]
        (k_selected, v_selected), (k_window, v_window) = kv_3x2xBxLxKxC[1], kv_3x2xBxLxKxC[2]
        if self.shape.qk_norm:
            q_BxLxHxC = RMSNorm(self.shape.epsilon, name="q_norm")(q_BxLxHxC)
            k_BxIxKxC, k_selected, k_window = (
                RMSNorm(self.shape.epsilon, name=f"k_norm_{name}")(k)
                for name, k in zip(BRANCHES, (k_BxIxKxC, k_selected, k_window), strict=True)
            )
        position_L = index("cp") * L + jnp.arange(L)
        last_I = b.compress_block - 1 + b.stride * jnp.arange(blocks)
        q_BxLxHxC = rotary(q_BxLxHxC, position_L, self.shape.rope_base)
        k_BxIxKxC = rotary(k_BxIxKxC, last_I, self.shape.rope_base)
        k_selected, k_window = (
            rotary(k, position_L, self.shape.rope_base) for k in (k_selected, k_window)
        )
        k_selected, v_selected, k_window, v_window = all_gather(
            jnp.stack([k_selected, v_selected, k_window, v_window]), "cp", dim=2
        )
        compressed, p_BxKxGxLxI = compressed_attention(
            q_BxLxHxC, k_BxIxKxC, v_BxIxKxC, last_I, position_L
        )
        chosen_BxKxLxJ = select(selection_scores(p_BxKxGxLxI, b), b, position_L)
        selected = selected_attention(q_BxLxHxC, k_selected, v_selected, chosen_BxKxLxJ, position_L)
        return (
            compressed,
            selected,
            window_attention(q_BxLxHxC, k_window, v_window, b.window, position_L),
        )
