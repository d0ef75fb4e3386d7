"""Attention under a measured plan: block-sparse on one device, and any plan of a layer inside one compiled program.

Legend: B sequences, S positions (N on this device), W blocks, A blocks of a list, H query and K key/value heads, C
head_dim.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fdp.kernels_pallas.block_sparse import block_lists, block_sparse_attention
from fdp.kernels_pallas.masks import Mask
from fdp.models.attention import Mixer
from fdp.parallel.context import CommPlan, attend

Array = jax.Array
CAUSAL = Mask("causal")


def sparse(block: int) -> Mixer:
    """Attention to the blocks of the layer's list, `choice` int32 [W, A], on one device: the reference."""

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
