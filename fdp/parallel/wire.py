"""Collectives with fewer bits on the wire: formats of rows in an all-to-all, and a sum in int8 with
one scale for each row and chunk.

Legend: N rows, D width, t degree of the axis, C = D/t columns of a chunk."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from fdp.collectives import Axes, all_gather, all_to_all, index, ragged_all_to_all, size, vary
from fdp.kernels_pallas.walks import choose_backend

SCALE = jnp.bfloat16  # of a chunk's largest magnitude


class Wire(Protocol):
    """How rows [N, D] travel. Backward, their gradients travel in the same format, which follows
    from the derivatives of `encode` and `decode`."""

    def encode(self, x_NxD: jax.Array) -> Any:
        """A pytree of arrays [N, …]."""
        ...

    def decode(self, sent: Any, dtype: Any) -> jax.Array:
        """Rows [N, D] of `dtype`."""
        ...

    def row_bytes(self, width: int, itemsize: int) -> int:
        """Bytes of a row whose elements have `itemsize` bytes in compute."""
        ...


@dataclass(frozen=True)
class Cast:
    """Rows as they are, or in 16 bits: `dtype` "" or "bfloat16"."""

    dtype: str = ""

    def encode(self, x_NxD: jax.Array) -> jax.Array:
        """As `Wire`."""
        return x_NxD.astype(self.dtype or x_NxD.dtype)

    def decode(self, sent: jax.Array, dtype: Any) -> jax.Array:
        """As `Wire`."""
        return sent.astype(dtype)

    def row_bytes(self, width: int, itemsize: int) -> int:
        """As `Wire`."""
        return width * (jnp.dtype(self.dtype).itemsize if self.dtype else itemsize)


def exchange(x_NxD: jax.Array, axes: Axes, wire: Wire, sizes: Any = None) -> jax.Array:
    """Equal parts of the rows, one for each device of `axes`, go there: the parts that arrive, in
    the order of their senders.

    sizes: (send, receive) int32 [devices], how many first rows of each part are real. An
    accelerator sends only those."""
    n = size(axes)

    def send(a: jax.Array) -> jax.Array:
        if sizes is None or not ragged() or n == 1:
            return all_to_all(a, axes, 0, 0)
        part = len(a) // n
        place = jnp.full(n, index(axes) * part)
        here = jnp.arange(n) * part, sizes[0]
        return ragged_all_to_all(a, axes, len(a), here, (place, sizes[1]))

    return wire.decode(jax.tree.map(send, wire.encode(x_NxD)), x_NxD.dtype)


def ragged() -> bool:
    """Whether the platform has a ragged all-to-all."""
    return choose_backend(None) != "xla"


def quantise(x_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 [..., C], scale [...]) with x ≈ int8 · scale; a row of zeros has scale 0."""
    # Rounded up, so that no value exceeds 127 after the scale has lost its low bits.
    top = jnp.abs(x_C).max(-1) * (1 + 2.0**-7) / 127
    scale = top.astype(SCALE)
    step = jnp.where(scale > 0, scale.astype(jnp.float32), 1.0)
    return jnp.round(x_C / step[..., None]).astype(jnp.int8), scale


def dequantise(q_C: jax.Array, scale: jax.Array) -> jax.Array:
    """f32 [..., C]."""
    return q_C.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]


def int8_psum(x_D: jax.Array, axes: Axes) -> jax.Array:
    """Sum over `axes` as an all-to-all of int8 chunks, a float32 sum, and an all-gather of int8
    sums: [..., D] → same.

    Sends 2(t-1)/t · N·(D + 2t) bytes where the float32 all-reduce sends 2(t-1)/t · 4·N·D. The error
    of an element is at most (t + 1)/2 steps of its chunk's scale. Raises ValueError where t does
    not divide D."""
    t = size(axes)
    if t == 1:
        return x_D
    D = x_D.shape[-1]
    if D % t:
        raise ValueError(
            f"width {D} is not divisible by the {t} devices of {axes!r}: chunks would be uneven"
        )
    x_txNxC = jnp.moveaxis(vary(x_D, axes).astype(jnp.float32).reshape(-1, t, D // t), 1, 0)
    q, scale = (all_to_all(a, axes, 0, 0) for a in quantise(x_txNxC))
    sum_NxC = dequantise(q, scale).sum(0)
    q, scale = (all_gather(a[None], axes, dim=0) for a in quantise(sum_NxC))
    total_txNxC = dequantise(q, scale)
    return jnp.moveaxis(total_txNxC, 0, 1).reshape(x_D.shape).astype(x_D.dtype)
