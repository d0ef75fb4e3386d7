"""Attention under a measured plan: block-sparse on one device, and any plan of a layer inside one
compiled program.

Legend: B sequences, S positions (N on this device), W blocks, A blocks of a list, H query and K
key/value heads, C head_dim."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import vary
from fdp.kernels_pallas.block_sparse import block_lists, block_sparse_attention
from fdp.kernels_pallas.masks import Mask
from fdp.models.attention import Mixer
from fdp.models.transformer import Block, Transformer
from fdp.parallel.context import CommPlan, attend
from fdp.parallel.context_sparse import attend_blocks, topk_ids

Array = jax.Array
CAUSAL = Mask("causal")


@lru_cache  # equal mixers, so that equal models compile once
def sparse(block: int) -> Mixer:
    """Attention to the blocks of the layer's list, `choice` int32 [W, A], on one device: the
    reference.
    """

    def mix(q: Array, k: Array, v: Array, position: Array, ids_WxA: Array) -> Array:
        ids = jnp.maximum(ids_WxA, 0)[None, None]
        lists = block_lists(ids, (ids_WxA >= 0).sum(-1)[None, None], q.shape[1] // block)
        return block_sparse_attention(q, k, v, lists, block, block, CAUSAL, position, position)[0]

    return mix


def switched(plans: Sequence[CommPlan]) -> Mixer:
    """Every layer by the plan whose number it is given, int32 []: one program for all of them.

    All devices must be given the same numbers: a collective waits for all members of its group.
    """

    def mix(q: Array, k: Array, v: Array, position: Array, number: Array) -> Array:
        branches = [lambda q, k, v, p=p: attend(q, k, v, CAUSAL, p, position) for p in plans]
        return jax.lax.switch(number, branches, q, k, v)

    return mix


def listed(plans: Sequence[CommPlan], block: int) -> Mixer:
    """As `switched`, attending to the blocks of the layer's lists, by plans of
    `fdp.parallel.context_sparse`.

    `choice`: (the plan's number int32 [], ids int32 [b, k, I, L] of this device's query blocks). An
    int for a number is a plan that is fixed when the program is built."""

    def mix(
        q: Array, k: Array, v: Array, position: Array, choice: tuple[Array | int, Array]
    ) -> Array:
        number, ids = choice
        branches = [
            lambda q, k, v, ids, p=p: attend_blocks(q, k, v, ids, block, CAUSAL, p, position)[0]
            for p in plans
        ]
        return (
            branches[number](q, k, v, ids)
            if isinstance(number, int)
            else jax.lax.switch(number, branches, q, k, v, ids)
        )

    return mix


@lru_cache  # as `sparse`
def indexed(plans: tuple[CommPlan, ...], block: int, width: int) -> Mixer:
    """As `listed` with lists of at most `width` blocks made from each input
    (`context_sparse.topk_ids`), for every sequence and key head; `choice`: (the plan's number, how
    many of the best blocks are listed), int32 [] both."""
    inner = listed(plans, block)

    def mix(q: Array, k: Array, v: Array, position: Array, choice: tuple[Array, Array]) -> Array:
        number, kept = choice
        ids = topk_ids(q, k, block, width, position)
        return inner(q, k, v, position, (number, jnp.where(jnp.arange(width) < kept, ids, -1)))

    return mix


class Planned(Transformer):
    """A Transformer with a `listed` mixer whose plans are constants of the program: `choice_N` is
    the lists alone.

    Layers are not scanned but written out, each with the one plan that it runs.
    """

    numbers: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: Transformer, numbers: Sequence[int]) -> "Planned":
        """`model` with the plans of its layers fixed."""
        fields = {
            name: getattr(model, name)
            for name in Transformer.__dataclass_fields__
            if name not in ("parent", "name")
        }
        return cls(**fields, numbers=tuple(int(n) for n in numbers))

    def hidden(
        self,
        ids_BxL: Array,
        noise_B: Array,
        positions_BxL: Array | None = None,
        choice_N: Any = None,
    ) -> Array:
        """As `Transformer.hidden`."""
        if self.is_initializing():
            return super().hidden(ids_BxL, noise_B)
        block = Block(self.m, self.attention, self.block, None, self.plan, self.mixer, parent=None)
        x_BxLxD = vary(self.embed(ids_BxL), "pp")
        for layer, number in enumerate(self.numbers):
            params, ids = jax.tree.map(
                lambda x, i=layer: x[i], (self.variables["params"]["layers"], choice_N)
            )
            x_BxLxD, _ = block.apply({"params": params}, x_BxLxD, None, None, (number, ids))
        return self.norm(x_BxLxD)
