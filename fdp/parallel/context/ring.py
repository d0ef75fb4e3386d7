"""Ring attention whose backward pass sends the keys round the ring again instead of storing them
(Liu et al. 2023).

Keys and values circulate as one array kv [2, B, L, K, C], so a hop is one permute. The forward pass
makes r-1 hops. The backward pass makes r-1 hops of keys and r-1 of their gradients in float32. The
gradient of a device's keys starts on the next device and ends at home. A plan with few hops fetches
each of them directly, and of a causal window only the keys that it reaches. Residuals (queries,
keys, values, output, log-sum-exp) are local: O(S/cp) for any ring.

Legend: B sequences, L positions of one ring member, r ring members, H query heads, K key/value
heads, C head_dim."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdp.collectives import index, shift, size, vary_like
from fdp.kernels_pallas.attend import attend, attend_backward
from fdp.kernels_pallas.blockwise import merge_lse, vary_alike
from fdp.parallel.masks import Mask

Array = jax.Array


@dataclass(frozen=True)
class Ring:
    """What is known before tracing: the mask, the mesh axes of the ring (outermost first), the
    offsets that are fetched (None: all), and how many of the last positions of each."""

    mask: Mask
    axes: tuple[str, ...]
    hops: tuple[int, ...] | None
    tails: tuple[int, ...] = ()

    @property
    def jumps(self) -> list[tuple[int, int]] | None:
        """(offset, positions) to fetch directly, one by one; None when the keys go round the whole
        ring."""
        if self.hops is None or len(self.hops) == size(self.axes) - 1:
            return None
        return [(o, tail) for o, tail in zip(self.hops, self.tails, strict=True) if tail]

    def shift(self, x: Array, by: int = 1) -> Array:
        """What the member `by` places before this one holds."""
        return shift(x, self.axes, by)


class RingLabels(NamedTuple):
    """Positions int [r, L] of every ring member, and segment ids int [B, r, L] for a packed
    mask; None where the mask reads none.
    """

    position_rxL: Array | None
    segment_BxrxL: Array | None

    def member(self, i: Any, tail: int = 0) -> tuple[Array | None, Array | None]:
        """Positions [L] and segments [B, L] of ring member i; of the last `tail` alone where that
        is not 0."""

        def take(x: Array | None, axis: int) -> Array | None:
            if x is None:
                return None
            return lax.dynamic_index_in_dim(x, i, axis, keepdims=False)[..., -tail:]

        return take(self.position_rxL, 0), take(self.segment_BxrxL, 1)


def ring_attention(ring: Ring, q_BxLxHxC: Array, kv: Array, members: RingLabels) -> Array:
    """Attention of the local queries to the keys of all ring members (or of `ring.hops`): [B, L, H,
    C], in q's type.

    Call inside shard_map; every member holds the same shapes."""
    q, kv = vary_alike(
        (q_BxLxHxC, kv), members
    )  # a custom_vjp's cotangents must vary like its arguments
    return _ring(ring, q, kv, members)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: Ring, q: Array, kv: Array, members: RingLabels) -> Array:
    return _forward(ring, q, kv, members)[0].astype(q.dtype)


def _forward(ring: Ring, q: Array, kv: Array, members: RingLabels) -> tuple[Array, Array]:
    """(out, lse), both float32, over all members."""
    n, here = size(ring.axes), index(ring.axes)
    q_position, q_segment = members.member(here)

    def block(kv: Array, offset: Any) -> tuple[Array, Array]:
        k_position, k_segment = members.member((here - offset) % n, kv.shape[2])
        labels = (q_position, k_position, q_segment, k_segment)
        return attend(q, kv[0], kv[1], ring.mask, *labels, out_type=jnp.float32)

    if ring.jumps is not None:
        state = block(kv, 0)
        for offset, tail in ring.jumps:
            state = merge_lse(*state, *block(ring.shift(kv[:, :, -tail:], offset), offset))
        return state

    def turn(carry: Any, offset: Array) -> tuple[Any, None]:
        kv, out, lse = carry
        ahead = ring.shift(kv)  # under way while this block is computed
        return (ahead, *merge_lse(out, lse, *block(kv, offset))), None

    B, L, H, _ = q.shape
    nothing = (
        vary_like(jnp.zeros(q.shape, jnp.float32), q),
        vary_like(jnp.full((B, H, L), -jnp.inf), q),
    )
    (kv, out, lse), _ = lax.scan(turn, (kv, *nothing), jnp.arange(n - 1))
    return merge_lse(out, lse, *block(kv, n - 1))


def _ring_forward(ring: Ring, q: Array, kv: Array, members: RingLabels) -> tuple[Array, Any]:
    out, lse = _forward(ring, q, kv, members)
    out = out.astype(q.dtype)
    return out, (q, kv, members, out, lse)


def _ring_backward(ring: Ring, residuals: Any, dout: Array) -> tuple[Array, Array, None]:
    q, kv, members, out, lse = residuals
    kv = lax.optimization_barrier(
        kv
    )  # or what the forward pass received is kept, which may be O(S)
    n, here = size(ring.axes), index(ring.axes)
    q_position, q_segment = members.member(here)

    def block(kv: Array, offset: Any) -> tuple[Array, Array]:
        """(dq, dkv) that the keys of the member `offset` places before contribute."""
        k_position, k_segment = members.member((here - offset) % n, kv.shape[2])
        labels = (q_position, k_position, q_segment, k_segment)
        dq, dk, dv = attend_backward(q, kv[0], kv[1], out, lse, dout, ring.mask, *labels)
        return dq, jnp.stack([dk, dv])

    dq, dkv = (_jumps_backward if ring.jumps is not None else _turns_backward)(ring, n, kv, block)
    return dq.astype(q.dtype), dkv.astype(kv.dtype), None


def _jumps_backward(ring: Ring, n: int, kv: Array, block: Any) -> tuple[Array, Array]:
    dq, dkv = block(kv, 0)
    for offset, tail in ring.jumps or ():
        more, back = block(ring.shift(kv[:, :, -tail:], offset), offset)
        dq, dkv = dq + more, dkv.at[:, :, -tail:].add(ring.shift(back, n - offset))
    return dq, dkv


def _turns_backward(ring: Ring, n: int, kv: Array, block: Any) -> tuple[Array, Array]:
    """n-1 hops of keys and n-1 of gradients. Each hop overlaps with the computation of a block."""
    kv_1 = ring.shift(kv)
    dq, own = block(kv, 0)
    kv_2 = ring.shift(kv_1) if n > 2 else kv_1
    more, travelling = block(kv_1, 1)  # the sum over devices of one owner's gradient starts here
    dq = dq + more

    def turn(carry: Any, offset: Array) -> tuple[Any, None]:
        kv, travelling, dq = carry
        ahead, travelling = ring.shift(kv), ring.shift(travelling)
        more, dkv = block(kv, offset)
        return (ahead, travelling + dkv, dq + more), None

    if n > 2:
        (last, travelling, dq), _ = lax.scan(turn, (kv_2, travelling, dq), jnp.arange(2, n - 1))
        travelling = ring.shift(travelling)
        more, dkv = block(last, n - 1)
        dq, travelling = dq + more, travelling + dkv
    return dq, own + ring.shift(travelling)


_ring.defvjp(_ring_forward, _ring_backward)
