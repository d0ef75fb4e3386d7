"""Inner products of attention under a measured plan: block-sparse on one device, and any plan of a
layer inside one compiled program.

Legend: B sequences, L positions of this device, W blocks, A blocks of a list, H query and K
key/value heads, C head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fdp.kernels_pallas.block_sparse import block_lists, block_sparse_attention
from fdp.models.attention import Core, Where
from fdp.models.transformer import Transformer, attention_block
from fdp.parallel.context.attend import attend
from fdp.parallel.context.layouts import CONTIGUOUS, SequenceLayout
from fdp.parallel.context.lists import attend_blocks, topk_ids
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.masks import Mask

Array = jax.Array
CAUSAL = Mask("causal")


@dataclass(frozen=True)
class Sparse:
    """Attention to the blocks of the layer's list, int32 [W, A], on one device: the reference."""

    block: int

    @property
    def layout(self) -> SequenceLayout:
        """Of one device."""
        return CONTIGUOUS

    def __call__(
        self, q_BxLxHxC: Array, k_BxLxKxC: Array, v: Array, where: Where, given: Any
    ) -> Array:
        """As `Core`."""
        ids_WxA, block = given, self.block
        used_1x1xW = (ids_WxA >= 0).sum(-1)[None, None]
        blocks = q_BxLxHxC.shape[1] // block
        lists = block_lists(jnp.maximum(ids_WxA, 0)[None, None], used_1x1xW, blocks)
        of = q_BxLxHxC, k_BxLxKxC, v, lists, block, block, CAUSAL, where.index, where.index
        return block_sparse_attention(*of)[0]


@dataclass(frozen=True)
class Switched:
    """Every layer by the plan whose number it is given, int32 []: one program for all of them.

    All devices must be given the same numbers: a collective waits for all members of its group.
    """

    plans: tuple[CommPlan, ...]

    @property
    def layout(self) -> SequenceLayout:
        """That of the plans, which must agree."""
        return self.plans[0].layout

    def __call__(
        self, q_BxLxHxC: Array, k_BxLxKxC: Array, v: Array, where: Where, given: Any
    ) -> Array:
        """As `Core`."""

        def by(plan: CommPlan) -> Any:
            return lambda q, k, v: attend(q, k, v, CAUSAL, plan, where.index)

        branches = [by(plan) for plan in self.plans]
        return jax.lax.switch(given, branches, q_BxLxHxC, k_BxLxKxC, v)


@dataclass(frozen=True)
class Listed:
    """As `Switched`, attending to the blocks of the layer's lists, by plans of
    `fdp.parallel.context.lists`.

    Input of a layer: (the plan's number int32 [], ids int32 [b, k, I, A] of this device's query
    blocks). With one plan, the number is not read: a program that is compiled for that plan.
    """

    plans: tuple[CommPlan, ...]
    block: int

    @property
    def layout(self) -> SequenceLayout:
        """That of the plans, which must agree."""
        return self.plans[0].layout

    def __call__(
        self, q_BxLxHxC: Array, k_BxLxKxC: Array, v: Array, where: Where, given: Any
    ) -> Array:
        """As `Core`."""

        def by(plan: CommPlan) -> Any:
            args = self.block, CAUSAL, plan, where.index
            return lambda q, k, v, ids: attend_blocks(q, k, v, ids, *args)[0]

        number, ids = given
        branches = [by(plan) for plan in self.plans]
        return jax.lax.switch(number, branches, q_BxLxHxC, k_BxLxKxC, v, ids)


@dataclass(frozen=True)
class Indexed:
    """As `Listed` with lists of at most `width` blocks made from each input
    (`lists.topk_ids`), for every sequence and key head.

    Input of a layer: (the plan's number, how many of the best blocks are listed), int32 [] both.
    """

    plans: tuple[CommPlan, ...]
    block: int
    width: int

    @property
    def layout(self) -> SequenceLayout:
        """That of the plans, which must agree."""
        return self.plans[0].layout

    def __call__(
        self, q_BxLxHxC: Array, k_BxLxKxC: Array, v: Array, where: Where, given: Any
    ) -> Array:
        """As `Core`."""
        number, kept = given
        ids = topk_ids(q_BxLxHxC, k_BxLxKxC, self.block, self.width, where.index)
        ids = jnp.where(jnp.arange(self.width) < kept, ids, -1)
        listed = Listed(self.plans, self.block)
        return listed(q_BxLxHxC, k_BxLxKxC, v, where, (number, ids))


def by_layer(model: Transformer, cores: Sequence[Core]) -> Transformer:
    """`model` with a core of its own in every layer. Each is a block of the pattern, so its
    parameters are those of `unstacked`."""
    return model.clone(pattern=tuple(map(attention_block, cores)), layout=cores[0].layout)


def unstacked(params: Any, layers: int) -> Any:
    """The parameters of a scanned stack as those of `by_layer`: layer i alone under its number."""

    def one(i: int) -> Any:
        return jax.tree.map(lambda x: x[i : i + 1], params["layers"])

    return {**params, "layers": {str(i): one(i) for i in range(layers)}}
