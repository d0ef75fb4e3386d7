"""Grouped-query attention: heads over tp, sequence over cp by any plan of `fdp.parallel.context`.

With the collection "kv" mutable, a whole pass leaves its rotated keys and its values there; a pass
over a few rows (`positions`) then writes those rows' own into it and attends to all of it. Without
that collection nothing is kept and the program is the plain one.

Legend: B sequences, L local positions (rows of a pass), S all positions, D width, H query heads, K
key/value heads, C head_dim."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fdp.collectives import all_gather, index, size, vary_like
from fdp.kernels_pallas import attend as front
from fdp.kernels_pallas.masks import Mask
from fdp.models.layers import Reduction, RMSNorm, enter_tp, leave_tp, normal, partitioned, rotary
from fdp.objectives.block_diffusion import BlockDiffusionRule
from fdp.parallel import context, layouts
from fdp.parallel.context import CommPlan

Array = jax.Array
Seen = tuple[Mask, Any, Any]  # mask, and positions of queries and keys, None = 0, 1, …
CACHE = "kv"  # collection of rotated keys and values: {"k", "v"} of [B, S, K, C] a layer
# collection of rotated queries and keys: {"q", "k"}, for studies of what is attended to
PROBE = "probe"
GATHER = CommPlan("all_gather")

# In place of softmax attention: (rotated q_BxLxHxC, rotated k_BxLxKxC, v_BxLxKxC, position_L,
# choice) → [B, L, H, C], on this device's rows; `choice` is what the caller gave for this layer,
# such as the number of a plan.
Mixer = Callable[[Array, Array, Array, Array, Any], Array]


def attend(q_BxLxHxC: Array, k_BxSxKxC: Array, v_BxSxKxC: Array, seen: Seen) -> Array:
    """Softmax attention of rotated queries and keys: [B, L, H, C]."""
    return front.attend(q_BxLxHxC, k_BxSxKxC, v_BxSxKxC, *seen)[0]


class Attention(nn.Module):
    """Softmax attention with rotary positions. Heads are split over tp; the output projection is
    the one reduction.
    """

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
    window: int = 0
    reduction: Reduction | None = None
    plan: CommPlan = GATHER
    mixer: Mixer | None = None

    @nn.compact
    def __call__(
        self, x_BxLxD: Array, positions_BxL: Array | None = None, choice: Any = None
    ) -> Array:
        D, C = self.width, self.head_dim
        H, K = self.heads // size("tp"), self.kv_heads // size("tp")
        column = partitioned(normal(D**-0.5), None, "tp", None)
        w_q = self.param("w_q", column, (D, H, C)).astype(self.dtype)
        w_kv = self.param(
            "w_kv", partitioned(normal(D**-0.5), None, None, "tp", None), (2, D, K, C)
        ).astype(self.dtype)
        row = partitioned(normal((self.heads * C) ** -0.5), "tp", None, None)
        w_o = self.param("w_o", row, (H, C, D)).astype(self.dtype)

        x_BxLxD = enter_tp(x_BxLxD, self.sequence_parallel)
        q_BxLxHxC = jnp.einsum("bld,dhc->blhc", x_BxLxD, w_q)
        k_BxLxKxC = jnp.einsum("bld,dkc->blkc", x_BxLxD, w_kv[0])
        v_BxLxKxC = jnp.einsum("bld,dkc->blkc", x_BxLxD, w_kv[1])
        if self.qk_norm:
            q_BxLxHxC, k_BxLxKxC = (
                RMSNorm(name="q_norm")(q_BxLxHxC),
                RMSNorm(name="k_norm")(k_BxLxKxC),
            )
        if positions_BxL is None and (
            self.mixer is not None or self.window or self._communicates()
        ):
            out_BxLxHxC = self._mix(q_BxLxHxC, k_BxLxKxC, v_BxLxKxC, choice)
            partial_BxLxD = jnp.einsum("blhc,hcd->bld", out_BxLxHxC, w_o)
            return leave_tp(partial_BxLxD, self.sequence_parallel, self.reduction, "attention")
        if positions_BxL is None:
            q_BxLxHxC, k_BxSxKxC, v_BxSxKxC, mask = self._whole(q_BxLxHxC, k_BxLxKxC, v_BxLxKxC)
        else:
            q_BxLxHxC, k_BxSxKxC, v_BxSxKxC, mask = self._rows(
                q_BxLxHxC, k_BxLxKxC, v_BxLxKxC, positions_BxL
            )
        out_BxLxHxC = attend(q_BxLxHxC, k_BxSxKxC, v_BxSxKxC, mask)
        partial_BxLxD = jnp.einsum("blhc,hcd->bld", out_BxLxHxC, w_o)

        def weigh(value_BxS: Array) -> Array:
            values_BxSxKxC = jnp.broadcast_to(value_BxS[..., None, None], (*value_BxS.shape, K, C))
            values_BxSxKxC = all_gather(values_BxSxKxC.astype(v_BxSxKxC.dtype), "cp", dim=1)
            return attend(q_BxLxHxC, k_BxSxKxC, values_BxSxKxC, mask)[..., 0].mean(-1)

        return leave_tp(partial_BxLxD, self.sequence_parallel, self.reduction, "attention", weigh)

    def _communicates(self) -> bool:
        """Whether the plan is another than to gather contiguous keys, which needs no more than this
        file.
        """
        return size("cp") > 1 and self.plan != GATHER

    def _mix(self, q_BxLxHxC: Array, k_BxLxKxC: Array, v_BxLxKxC: Array, choice: Any) -> Array:
        """Attention by the plan, or the mixer: [B, L, H, C]. Raises ValueError for block
        diffusion.
        """
        if self.kind == "block_diffusion":
            raise ValueError(
                "block diffusion reads [noisy ‖ clean] with a mask of its own: set "
                "context.plan=all_gather, "
                "context.layout=contiguous and model.window=0"
            )
        position_L = layouts.positions(self.plan.layout, q_BxLxHxC.shape[1])
        q_BxLxHxC = rotary(q_BxLxHxC, position_L, self.rope_base)
        k_BxLxKxC = rotary(k_BxLxKxC, position_L, self.rope_base)
        self.sow(PROBE, "q", q_BxLxHxC)
        self.sow(PROBE, "k", k_BxLxKxC)
        if self.mixer is not None and not self.is_initializing():  # parameters need no choice
            return self.mixer(q_BxLxHxC, k_BxLxKxC, v_BxLxKxC, position_L, choice)
        mask = Mask(self.kind, self.window)
        return context.attend(q_BxLxHxC, k_BxLxKxC, v_BxLxKxC, mask, self.plan, position_L)

    def _whole(
        self, q_BxLxHxC: Array, k_BxLxKxC: Array, v_BxLxKxC: Array
    ) -> tuple[Array, Array, Array, Seen]:
        """Rotated queries, rotated keys and values of all positions, and what may be seen; fills a
        mutable cache.
        """
        L = q_BxLxHxC.shape[1]
        S = L * size("cp")
        q_index_L = index("cp") * L + jnp.arange(L)
        # Block diffusion reads [noisy ‖ clean]: both halves carry the same positions.
        positions_L = q_index_L % (S // 2) if self.kind == "block_diffusion" else q_index_L
        q_BxLxHxC = rotary(q_BxLxHxC, positions_L, self.rope_base)
        k_BxSxKxC = all_gather(rotary(k_BxLxKxC, positions_L, self.rope_base), "cp", dim=1)
        v_BxSxKxC = all_gather(v_BxLxKxC, "cp", dim=1)
        if self.is_mutable_collection(CACHE) and not self.is_initializing():
            self._check_cache()
            self.put_variable(CACHE, "k", k_BxSxKxC)
            self.put_variable(CACHE, "v", v_BxSxKxC)
        doubled = self.kind == "block_diffusion"
        mask = Mask(rule=BlockDiffusionRule(S // 2, self.block)) if doubled else Mask(self.kind)
        places = (None, None) if size("cp") == 1 else (q_index_L, np.arange(S))
        return q_BxLxHxC, k_BxSxKxC, v_BxSxKxC, (mask, *places)

    def _rows(
        self, q_BxLxHxC: Array, k_BxLxKxC: Array, v_BxLxKxC: Array, positions_BxL: Array
    ) -> tuple[Array, Array, Array, Seen]:
        """As `_whole` for rows at `positions_BxL`: their keys and values replace those in the
        cache.
        """
        self._check_cache()
        if not (self.has_variable(CACHE, "k") and self.is_mutable_collection(CACHE)):
            raise ValueError(
                "rows at given positions attend to the cache, and there is none that can be "
                "written: pass "
                f"{{'params': …, '{CACHE}': cache}} with mutable=['{CACHE}'], the cache from a "
                "whole pass with "
                f"mutable=['{CACHE}'] or from fdp.models.transformer.empty_cache"
            )
        turn = jax.vmap(rotary, (0, 0, None))
        q_BxLxHxC = turn(q_BxLxHxC, positions_BxL, self.rope_base)
        new = {"k": turn(k_BxLxKxC, positions_BxL, self.rope_base), "v": v_BxLxKxC}
        put = jax.vmap(lambda cache_SxKxC, rows_LxKxC, at_L: cache_SxKxC.at[at_L].set(rows_LxKxC))
        cache: dict[str, Array] = {}
        for name, rows_BxLxKxC in new.items():
            old_BxSxKxC = vary_like(self.get_variable(CACHE, name), rows_BxLxKxC)
            cache[name] = put(old_BxSxKxC, rows_BxLxKxC, positions_BxL)
            self.put_variable(CACHE, name, cache[name])
        seen = Mask(self.kind), positions_BxL, np.arange(cache["k"].shape[1])
        return q_BxLxHxC, cache["k"], cache["v"], seen

    def _check_cache(self) -> None:
        """Raises ValueError where a cache would be wrong or is not there yet."""
        if size("cp") > 1:
            raise ValueError(
                "the key/value cache holds whole sequences, S = L·cp = L·1, and cp = "
                f"{size('cp')}: set mesh.cp=1 and "
                "give its devices to dp or tp"
            )
        if self.kind not in ("causal", "bidirectional"):
            raise ValueError(
                f"no key/value cache for attention={self.kind!r}: its input is [noisy ‖ clean], "
                "2·L rows; use "
                "'causal' or 'bidirectional'"
            )
