"""A key/value cache that is sharded over cp by dealing positions round-robin.

Position p lies on device p mod cp, in slot ⌊p/cp⌋: the striped layout of single positions. So all
devices hold equally many, whatever the length, and to append moves nothing. A sequence has a length
of its own, which its owner keeps: the entries behind it are dead, because a causal mask hides what
comes after a query. To roll back is to shorten the length; the next rows replace what was rejected.

Legend: B sequences, R new rows, M positions of the cache (here M/cp of this device), N positions of
a pass on a device, K key/value heads, C head_dim, P positions that go from one device to another at
most."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdp.collectives import all_to_all, index, size, vary_like
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import SequenceLayout

Array = jax.Array
ROUND_ROBIN = SequenceLayout("striped")


def positions(slots: int) -> Array:
    """The position of each of the `slots` of this device: int32 [slots]."""
    return layouts.held(ROUND_ROBIN, slots, size("cp"), index("cp"), jnp)


def slots_of(index_BxR: Any, slots: int, cp: int, device: Any, xp: Any = np) -> Any:
    """The slot of each position on `device`, int [B, R]; `slots`, which is none, for positions that
    another device holds and for those beyond the capacity."""
    mine = (index_BxR % cp == device) & (index_BxR < slots * cp)
    return xp.where(mine, index_BxR // cp, slots)


def put(held_BxMxKxC: Array, rows_BxRxKxC: Array, index_BxR: Array) -> Array:
    """The cache of this device after the rows at positions `index_BxR`, which differ within a
    sequence, have been replaced; every device of cp is given all rows."""
    at_BxR = slots_of(index_BxR, held_BxMxKxC.shape[1], size("cp"), index("cp"), jnp)

    def one(held_MxKxC: Array, rows_RxKxC: Array, at_R: Array) -> Array:
        return held_MxKxC.at[at_R].set(rows_RxKxC, mode="drop")

    return jax.vmap(one)(vary_like(held_BxMxKxC, rows_BxRxKxC), rows_BxRxKxC, at_BxR)


def share(length: int) -> int:
    """Slots of a device of a cache of `length` positions. Raises ValueError unless cp divides
    them."""
    cp = size("cp")
    if length % cp:
        raise ValueError(
            f"a cache of M = {length} positions is not divisible by cp = {cp}: make it "
            f"{-(-length // cp) * cp} positions long"
        )
    return length // cp


def check_capacity(prompt: int, new: int, capacity: int) -> None:
    """Raises ValueError where `prompt` + `new` positions exceed the cache."""
    if prompt + new > capacity:
        fits = capacity - prompt
        less = f"write at most {fits} tokens" if fits > 0 else "shorten the prompt"
        raise ValueError(
            f"prompt + new = {prompt} + {new} = {prompt + new} > M = {capacity} positions of the "
            f"cache: make it {prompt + new} positions long, or {less}"
        )


class Routes(NamedTuple):
    """How the positions of a pass are dealt to the devices that cache them.

    `leave` [cp, cp, P]: the places, on each device, of what goes to each other one; filled up to P
    with any. `place` [cp, N]: where the value of each slot lies in what arrives at a device, [cp,
    P]."""

    leave: np.ndarray
    place: np.ndarray


@lru_cache
def routes(layout: SequenceLayout, length: int, cp: int) -> Routes:
    """From `layout`, with `length` positions on a device, to round-robin. Raises ValueError for a
    length that does not fit the layout."""
    layouts.check_length(layout, length * cp, cp)
    held = np.stack([layouts.held(layout, length, cp, device) for device in range(cp)])
    going = [[np.flatnonzero(places % cp == r) for r in range(cp)] for places in held]
    most = max(len(piece) for row in going for piece in row)
    leave = np.zeros((cp, cp, most), np.int32)
    place = np.zeros((cp, length), np.int32)
    for d, row in enumerate(going):
        for r, piece in enumerate(row):
            leave[d, r, : len(piece)] = piece
            place[r, held[d, piece] // cp] = d * most + np.arange(len(piece))
    return Routes(leave, place)


def deal(k_BxNxKxC: Array, v_BxNxKxC: Array, layout: SequenceLayout) -> tuple[Array, Array]:
    """Keys and values of a pass in `layout`, in the order of the cache: one all-to-all over cp.
    Nothing moves where the layout is that of the cache."""
    cp, length = size("cp"), k_BxNxKxC.shape[1]
    if cp == 1 or layout == ROUND_ROBIN:
        return k_BxNxKxC, v_BxNxKxC
    leave, place = (jnp.asarray(x)[index("cp")].reshape(-1) for x in routes(layout, length, cp))
    both = jnp.take(jnp.stack([k_BxNxKxC, v_BxNxKxC]), leave, 2)
    k, v = jnp.take(all_to_all(both, "cp", 2, 2), place, 2)
    return k, v
