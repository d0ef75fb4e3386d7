"""Offsets of a ragged all-to-all that carries each (token, expert) pair from the sorted rows of its
device straight to its place in the block-aligned groups of its expert's device, and back.

There is one piece for each peer and expert of it, so that rows arrive grouped.

Legend: S devices, E experts (e of a device), P rows of a device sorted by expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Pieces(NamedTuple):
    """Arguments of `collectives.ragged_all_to_all`, int32 [E] by peer and its expert (on the way
    back: by peer and own expert)."""

    start: Array
    send: Array
    target: Array
    receive: Array

    @property
    def here(self) -> tuple[Array, Array]:
        """What leaves: first rows and sizes."""
        return self.start, self.send

    @property
    def there(self) -> tuple[Array, Array]:
        """Where it lands, and the sizes of what arrives."""
        return self.target, self.receive


def before(x: Array, axis: int) -> Array:
    """Exclusive cumulative sum."""
    return jnp.cumsum(x, axis) - x


def pieces(sizes_SxE: Array, me: Array | int, block: int) -> tuple[Pieces, Pieces]:
    """(way out, way back) of device `me`. sizes[s, i]: pairs of device s with expert i."""
    S, E = sizes_SxE.shape
    e = E // S
    total_E = sizes_SxE.sum(0)
    rows_E = -(-total_E // block) * block
    group_E = before(rows_E.reshape(S, e), 1).reshape(E)  # first row of a group on its device
    sorted_SxE = before(sizes_SxE, 1)  # first row of a piece among its sender's sorted rows
    landed_SxE = group_E + before(sizes_SxE, 0)  # first row of a piece on the expert's device
    mine = jnp.arange(e) + me * e

    def of_me(x_SxE: Array) -> Array:
        return x_SxE[:, mine].reshape(E)

    out = Pieces(sorted_SxE[me], sizes_SxE[me], landed_SxE[me], of_me(sizes_SxE))
    back = Pieces(of_me(landed_SxE), of_me(sizes_SxE), of_me(sorted_SxE), sizes_SxE[me])
    return out, back
