"""Masked diffusion block by block with a key/value cache: refresh steps compute all rows, reuse
steps the rows of one block.

This is the dual cache of Fast-dLLM (Wu et al. 2025, arXiv 2505.22618), whose phases dLLM-Serve
(arXiv 2512.17077) schedules. A refresh runs the whole sequence and caches all keys and values. The
reuse steps after it run only the rows of the current block against the cache. Both reveal tokens of
the block in random order. Reuse is an approximation: keys outside the block are those of the last
refresh. With a refresh in every step the ids are those of
`fdp.sampling.masked.reveal(order="random", per_step=…, block=…)`.

The phases are separate pure functions, so they can be compiled for different meshes. The noise
depends only on sample, step and position, so ids do not depend on dp, tp or the batch.

Legend: B sequences, L positions, R = block rows, P prompt, D width, V vocabulary (tp: V/tp
columns)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import vary_like
from fdp.models import module
from fdp.models.transformer import Transformer, core_of
from fdp.sampling.chain import Chain, initial_state
from fdp.sampling.noise import Draw

Array = jax.Array


@dataclass(frozen=True)
class BlockDecoder:
    """How blocks are decoded: each step reveals `per_step` positions of a block of `block`; ids ≥
    n_ids are never drawn.

    Raises ValueError for a causal model and for counts below 1."""

    model: Transformer
    n_ids: int
    block: int
    per_step: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.model.softmax.mask.kind != "bidirectional":
            raise ValueError(
                f"blocks are denoised by a bidirectional model, not under {self.model.softmax.mask}"
            )
        for block in self.model.pattern:
            if core_of(block) is None:
                raise ValueError(
                    f"rows are denoised in any order, again and again, and {block} is no attention:"
                    " its state would learn them twice; use attention in every layer"
                )
        if self.block < 1 or self.per_step < 1:
            raise ValueError(
                f"block and per_step must be at least 1, not {self.block} and {self.per_step}"
            )

    @property
    def steps(self) -> int:
        """Steps per block: ⌈block / per_step⌉."""
        return -(-self.block // self.per_step)

    def blocks(self, length: int, prompt: int = 0) -> int:
        """Blocks to decode after a prompt. Raises ValueError unless both are whole blocks."""
        if length % self.block or prompt % self.block or not 0 <= prompt < length:
            raise ValueError(
                f"length {length} and prompt {prompt} must be whole blocks of {self.block}, with "
                "prompt < length: "
                f"{length} % {self.block} = {length % self.block}, {prompt} % {self.block} = "
                f"{prompt % self.block}; "
                f"set length={-(-max(length, prompt + 1) // self.block) * self.block} and pad the "
                "prompt"
            )
        return (length - prompt) // self.block

    def refresh(
        self, params: Any, key: Array, ids_B: Array, z_BxL: Array, step: Array, start: Array
    ) -> tuple:
        """One step that computes all rows: (z after revealing tokens of the block at `start`, the
        filled cache)."""
        args = (self.model, {"params": params}, z_BxL, self._noise(z_BxL))
        hidden_BxLxD, _, cache = module.run(*args, method="hidden", keep_cache=True)
        rows_BxRxD = jax.lax.dynamic_slice_in_dim(hidden_BxLxD, start, self.block, 1)
        return self._reveal(params, rows_BxRxD, key, ids_B, z_BxL, step, start), cache

    def reuse(
        self,
        params: Any,
        cache: Any,
        key: Array,
        ids_B: Array,
        z_BxL: Array,
        step: Array,
        start: Array,
    ) -> tuple:
        """One step that computes the rows of the block at `start`: (z, the cache with new keys and
        values of those rows)."""
        rows_BxR = jax.lax.dynamic_slice_in_dim(z_BxL, start, self.block, 1)
        positions_BxR = jnp.broadcast_to(start + jnp.arange(self.block), rows_BxR.shape)
        args = (self.model, {"params": params}, rows_BxR, self._noise(z_BxL), positions_BxR)
        rows_BxRxD, _, cache = module.run(*args, method="hidden", cache=cache)
        return self._reveal(params, rows_BxRxD, key, ids_B, z_BxL, step, start), cache

    def _noise(self, z_BxL: Array) -> Array:
        return (z_BxL == self.n_ids).mean(1)

    def _reveal(
        self,
        params: Any,
        rows_BxRxD: Array,
        key: Array,
        ids_B: Array,
        z_BxL: Array,
        step: Array,
        start: Array,
    ) -> Array:
        variables = {"params": params}
        logits_BxRxV, _, _ = module.run(self.model, variables, rows_BxRxD, method="outputs")
        rows_BxR = jax.lax.dynamic_slice_in_dim(z_BxL, start, self.block, 1)
        draw = Draw(key, ids_B, self.block, self.n_ids, self.temperature, rows_BxR)
        chain = Chain(draw, "random", self.per_step, start=start)
        state = chain.begin()
        state = state._replace(step_B=state.step_B + step)
        rows_BxR = chain.step(logits_BxRxV, state).z_BxL
        return jax.lax.dynamic_update_slice_in_dim(z_BxL, rows_BxR, start, 1)


def start_state(
    decoder: BlockDecoder, ids_B: Array, length: int, prompt_BxP: Array | None = None
) -> Array:
    """The prompt followed by masks, int32 [B, L]. Raises ValueError unless prompt and length are
    whole blocks."""
    decoder.blocks(length, 0 if prompt_BxP is None else prompt_BxP.shape[1])
    z_BxL = initial_state(ids_B, length, decoder.n_ids, None)
    return (
        z_BxL
        if prompt_BxP is None
        else z_BxL.at[:, : prompt_BxP.shape[1]].set(vary_like(prompt_BxP, ids_B))
    )


def refresh_period(decoder: BlockDecoder, refresh_every: int | None) -> int:
    """Number of steps from one refresh to the next; every block begins with one. Raises ValueError
    below 1."""
    if refresh_every is not None and refresh_every < 1:
        raise ValueError(
            f"refresh_every={refresh_every} must be at least 1; None refreshes once a block"
        )
    return min(refresh_every or decoder.steps, decoder.steps)


def sample(
    decoder: BlockDecoder,
    params: Any,
    key: Array,
    ids_B: Array,
    length: int,
    *,
    refresh_every: int | None = None,
    prompt_BxP: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Decode all blocks from left to right: (ids int32 [B, L], {"refreshes", "reuses"}: number of
    each).

    `ids_B` are global sample ids. Inside a block the cache is refreshed every `refresh_every` steps
    (None: at the start of the block only; 1: always, which is exact). Runs unsharded and inside
    shard_map. Raises ValueError for lengths that are not whole blocks and under cp > 1."""
    prompt = 0 if prompt_BxP is None else prompt_BxP.shape[1]
    steps, period = decoder.steps, refresh_period(decoder, refresh_every)
    total = steps * decoder.blocks(length, prompt)
    z_BxL = start_state(decoder, ids_B, length, prompt_BxP)

    def body(step: Array, carry: tuple) -> tuple:
        z_BxL, cache, refreshes = carry
        start, again = prompt + step // steps * decoder.block, step % steps % period == 0
        z_BxL, cache = jax.lax.cond(
            again,
            lambda: decoder.refresh(params, key, ids_B, z_BxL, step, start),
            lambda: decoder.reuse(params, cache, key, ids_B, z_BxL, step, start),
        )
        return z_BxL, cache, refreshes + again

    cache, _ = decoder.model.decode_state(len(ids_B), length)
    carry = (z_BxL, cache, jnp.int32(0))
    z_BxL, _, refreshes = jax.lax.fori_loop(0, total, body, carry)
    return z_BxL, {"refreshes": refreshes, "reuses": total - refreshes}
