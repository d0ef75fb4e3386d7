"""Layers of a model, from the order in which they are stored to the chunks of a placement.

Stored, device i of pp holds the i-th p-th of the layers. A placement gives it v virtual stages from
anywhere in the model. Blocks of one virtual stage travel in v rounds, in each of which every device
sends one block and gets one. Where a model has several stacks of layers, each is placed by the
placement of its own virtual stages.

Legend: p devices, v chunks, N layers of a device, C = N/v layers of a chunk."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.collectives import index, permute
from fdp.parallel.pipeline.placement import Placement, looped

Round = list[tuple[int, int]]  # of each device: which of its stored blocks leaves, and whereto


def rounds(placement: Placement) -> list[Round]:
    """v rounds in which each device sends one block and gets one. Every device holds v blocks and
    wants v, so a perfect matching is always left (König)."""
    p, v = placement.p, placement.v
    left = [[placement.devices[i * v + r] for r in range(v)] for i in range(p)]
    found = []
    for _ in range(v):
        giver: dict[int, int] = {}
        for i in range(p):
            _augment(i, left, giver, set())
        to = {i: j for j, i in giver.items()}
        chosen = []
        for i in range(p):
            block = left[i].index(to[i])
            left[i][block] = -1
            chosen.append((block, to[i]))
        found.append(chosen)
    return found


def _augment(i: int, left: list[list[int]], giver: dict[int, int], seen: set[int]) -> bool:
    """Give device i a target, moving others where that is needed."""
    for j in left[i]:
        if j < 0 or j in seen:
            continue
        seen.add(j)
        if j not in giver or _augment(giver[j], left, giver, seen):
            giver[j] = i
            return True
    return False


def place(tree: Any, placement: Placement) -> Any:
    """Stored layers [N, ...] → chunks, one after the other: [N, ...]."""
    if placement == looped(placement.p):
        return tree
    return jax.tree.map(lambda x: _moved(x, placement, False), tree)


def unplace(tree: Any, placement: Placement) -> Any:
    """The inverse of `place`."""
    if placement == looped(placement.p):
        return tree
    return jax.tree.map(lambda x: _moved(x, placement, True), tree)


def _moved(x: jax.Array, placement: Placement, back: bool) -> jax.Array:
    p, v = placement.p, placement.v
    if len(x) % v:
        raise ValueError(
            f"layers are not divisible by stages: layers % (p·v) = {len(x) * p} % ({p}·{v}); set "
            f"model.layers={-(-len(x) // v) * v * p}"
        )
    blocks = x.reshape(v, x.shape[0] // v, *x.shape[1:])
    out = jnp.zeros_like(blocks)
    for chosen in rounds(placement):
        stored = np.array([block for block, _ in chosen])
        chunk = np.zeros(p, int)
        for i, (block, j) in enumerate(chosen):
            chunk[j] = placement.chunks[i * v + block]
        pairs = [(i, j) for i, (_, j) in enumerate(chosen)]
        leave, arrive = (chunk, stored) if back else (stored, chunk)
        pairs = [(j, i) for i, j in pairs] if back else pairs
        own = jax.lax.dynamic_index_in_dim(blocks, jnp.asarray(leave)[index("pp")], 0, False)
        at = jnp.asarray(arrive)[index("pp")]
        out = jax.lax.dynamic_update_index_in_dim(out, permute(own, "pp", pairs), at, 0)
    return out.reshape(x.shape)
