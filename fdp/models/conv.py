"""A short causal convolution over positions, one filter per channel, with a halo exchange over cp
in every sequence layout.

Arora et al. 2023 (arXiv 2312.04927) put such a filter before attention, so that a key can be found
by the token before it. A run is a range of consecutive positions on one device; T = W - 1 positions
before a run are its halo.

Legend: B sequences, L positions (local over cp), D width, W taps, R runs of a device, N positions
of a run, T positions of a halo."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from fdp.collectives import index, shift, size, vary, vary_like
from fdp.count.counts import PERMUTE, REDUCE, Counts, Degrees, Ledger, Rows, Work
from fdp.mesh import BATCH_AXES
from fdp.models.layers import normal
from fdp.models.module import Module, compact
from fdp.models.shape import ModelShape
from fdp.parallel.context.layouts import SequenceLayout

Array = jax.Array


def runs(layout: SequenceLayout, length: int, cp: int) -> tuple[int, int]:
    """(R, N): number of runs on a device that holds `length` positions, and their length."""
    if cp == 1 or layout.kind == "contiguous":
        return 1, length
    if layout.kind == "zigzag":
        return 2, length // 2
    return length // layout.block, layout.block


def hops(layout: SequenceLayout, length: int, cp: int, reach: int) -> list[tuple[int, int]]:
    """From which devices the `reach` positions before each run come, nearest first: (offset of the
    device, number of positions of each run).

    Raises ValueError for runs shorter than `reach`, except in the striped layout."""
    _, n = runs(layout, length, cp)
    if layout.kind != "striped" and n < reach:
        raise ValueError(
            f"a convolution of {reach + 1} taps reads {reach} positions before each run, and a run "
            f"of the {layout.kind} layout has L = {n} on cp = {cp} devices: set "
            f"model.conv={n + 1}, lower mesh.cp, or use the striped layout"
        )
    far = range(-(-reach // n))
    return [((hop + 1) % cp, min(n, reach - hop * n)) for hop in far]


def halo_bytes(
    layout: SequenceLayout, length: int, cp: int, reach: int, bytes_of_position: int
) -> int:
    """Bytes that a device sends for one halo exchange; its gradient sends the same. The last
    positions of each run are sent once to every device that needs them."""
    if cp == 1:
        return 0
    sent: dict[int, int] = {}
    for ahead, tail in hops(layout, length, cp, reach):
        sent.setdefault(ahead, tail if ahead else 0)
    return runs(layout, length, cp)[0] * sum(sent.values()) * bytes_of_position


def before(x_BxRxNxD: Array, layout: SequenceLayout, reach: int) -> Array:
    """The `reach` positions before every run: [B, R, T, D]. Values before position 0 are
    undefined."""
    count, n = x_BxRxNxD.shape[1:3]
    cp, me = size("cp"), index("cp")
    if cp == 1:
        return jnp.zeros_like(x_BxRxNxD[:, :, :1]).repeat(reach, axis=2)
    if layout.kind == "zigzag":
        hops(layout, count * n, cp, reach)
        # Chunk i follows chunk i - 1; chunk 2cp - 1 - i follows that of device i + 1, but the
        # middle two chunks are both on the last device.
        early, late = x_BxRxNxD[:, 0, -reach:], x_BxRxNxD[:, 1, -reach:]
        late = jnp.where(me == cp - 1, early, shift(late, "cp", cp - 1))
        return jnp.stack([shift(early, "cp"), late], 1)
    arrived: dict[int, Array] = {}
    parts = []
    for hop, (ahead, tail) in enumerate(hops(layout, count * n, cp, reach), 1):
        if ahead not in arrived:  # a farther hop of the same distance needs no more
            arrived[ahead] = shift(x_BxRxNxD[:, :, -tail:], "cp", ahead)
        # Runs are dealt round-robin: `hop` runs back lies in this row or in one above.
        rows_above = -((me - hop) // cp)
        parts.append(jnp.roll(arrived[ahead][:, :, -tail:], rows_above, axis=1))
    return jnp.concatenate(parts[::-1], axis=2)


class ShortConvolution(Module):
    """y[p] = Σ_d w[d] · x[p - d], d < `taps`, for every channel: [B, L, D] → [B, L, D].

    Positions before the sequence, or before the document where `segment` is given, count as zero.
    `axis`: the mesh axis over which the channels are sharded. Where a cache is kept, it holds the
    last positions, and rows of indices [B, L] must be those that follow.
    Raises ValueError for runs shorter than the halo (`hops`)."""

    taps: int
    layout: SequenceLayout
    axis: str | None = None

    @compact
    def __call__(self, x_BxLxD: Array, index_L: Array, segment_BxL: Array | None = None) -> Array:
        B, L, D = x_BxLxD.shape
        channels = (self.taps, D * size(self.axis or ()))
        w_WxD = self.weight("w", normal(self.taps**-0.5), channels, (None, self.axis))
        w_WxD = w_WxD.astype(x_BxLxD.dtype)
        cached = index_L.ndim == 2
        shape = (1, L) if cached else runs(self.layout, L, size("cp"))

        def with_halo(x: Array) -> Array:
            return jnp.concatenate([before(x, self.layout, self.taps - 1), x], axis=2)

        if cached:
            tail = vary_like(self.cached("tail"), x_BxLxD)
            x = jnp.concatenate([tail, x_BxLxD], axis=1)[:, None]
        else:
            x = with_halo(x_BxLxD.reshape(B, *shape, D))
        self.cache("tail", x[:, -1, x.shape[2] - self.taps + 1 :])
        segment = None
        if segment_BxL is not None:
            segment = with_halo(segment_BxL.reshape(B, *shape, 1))
        index = index_L.reshape(*index_L.shape[:-1], *shape, 1)

        def tap(d: int, y: Array) -> Array:
            return lax.slice_in_dim(y, self.taps - 1 - d, self.taps - 1 - d + shape[1], axis=2)

        out = w_WxD[0] * tap(0, x)
        for d in range(1, self.taps):
            seen = index >= d
            if segment is not None:
                seen = seen & (tap(d, segment) == tap(0, segment))
            out = out + w_WxD[d] * jnp.where(seen, tap(d, x), 0)
        return out.reshape(B, L, D)

    def decode_state(self, batch: int, channels: int, dtype: Any) -> tuple[Any, Any]:
        """(zeros, PartitionSpecs) of the positions before the first: {"tail"} of [B, T, D].
        `channels`: D of a device. Every device of tp holds its own, also of equal channels."""
        tail = jnp.zeros((batch, self.taps - 1, channels), dtype)
        spec = PartitionSpec(BATCH_AXES, None, "tp")
        return {"tail": vary(tail, (*BATCH_AXES, "tp"))}, {"tail": spec}

    def counts(
        self, shape: ModelShape, rows: Rows, degrees: Degrees, channels: int | None = None
    ) -> Counts:
        """Counts of a filter of `channels` (None: the model's width), of all devices. The halo of
        document ids is shared by all layers. The gradient of weights that are not sharded is
        reduced over tp, because the activations vary over tp."""
        at = self.layout, rows.length // degrees["cp"], degrees["cp"], self.taps - 1
        channels = shape.width if channels is None else channels
        local = channels // (degrees[self.axis] if self.axis else 1)

        def ledger(wire: int) -> Ledger:
            return Ledger(degrees).put(PERMUTE, ("cp",), wire)

        halo = halo_bytes(*at, rows.batch * local * shape.itemsize)
        back = ledger(halo)
        if self.axis is None:
            back.add(REDUCE, ("tp",), 4 * self.taps * channels)
        ids = halo_bytes(*at, rows.batch * 4) if rows.segments else 0
        return Counts(
            self.taps * channels,
            Work(sent=ledger(halo).sent),
            Work(sent=back.sent),
            once=ledger(ids).sent,
            saved=rows.tokens(degrees) * local * shape.itemsize,
        )


def check_taps(taps: int) -> None:
    """Raises ValueError for a filter of one tap."""
    if taps == 1:
        raise ValueError("model.conv = 1 taps mix no positions: set 0, or 2 or more")


def refuse_cache(taps: int) -> str:
    """The error message for decoding with a cache whose rows come in any order."""
    return (
        f"model.conv = {taps} has no cached decoding under a mask that is not causal: its rows are "
        f"computed again in any order, without the {taps - 1} positions before each; set "
        "model.conv=0 or sample without a cache"
    )


def refuse_pass(taps: int, cp: int) -> str:
    """The error message for a pass over a sharded sequence that would keep the last positions."""
    return (
        f"model.conv = {taps} keeps the last {taps - 1} positions, and over cp = {cp} devices no "
        "device has those of the whole sequence: read the prompt row by row "
        "(fdp.sampling.autoregressive.read), or set mesh.cp=1 or model.conv=0"
    )
