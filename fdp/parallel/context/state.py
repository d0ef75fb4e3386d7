"""How layers with a state communicate over cp: each plan gives exactly what one device computes.

- `tokens`: the devices hold parts of every chunk (striped layout) and sum each update;
- `tokens+ns`: the same, but the sum is scattered over heads, each device orthogonalises its own,
  and the results are gathered: the same bytes, less work;
- `heads`: an all-to-all gives each device the whole sequence of some heads;
- `heads+tokens`: cp = r · u; u neighbours (the trailing sub-axes) exchange heads for positions, and
  the r groups sum each update of their heads;
- `wavefront`: each device runs its part of the sequence (contiguous layout) for one piece of the
  heads after the other, and hands the state on to its right neighbour: m pieces on n devices take
  m + n - 1 ticks;
- `affine`: for states that change by affine maps; each device exchanges the map of its part of the
  sequence (contiguous layout) once;
- `affine+scan`: the same maps, but composed on the way, from device to device: a prefix scan in
  ⌈log₂ n⌉ steps that wait for each other, of one map each, where `affine` receives n - 1 at once.

Legend: B sequences, L positions of a device, H heads, S all positions, n devices of cp."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.collectives import (
    Axes,
    all_gather,
    all_to_all,
    broadcast,
    index,
    reduce_scatter,
    shift,
    size,
    split,
    vary_like,
)
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, SequenceLayout

Array = jax.Array
KINDS = ("tokens", "tokens+ns", "heads", "heads+tokens", "wavefront", "affine", "affine+scan")


@dataclass(frozen=True)
class StatePlan:
    """What a layer with a state sends over cp (`kind`), and which positions a device holds.
    `head_split`: u, the devices that share out heads, of plan heads+tokens; 1 otherwise. `pieces`:
    m, into which plan wavefront cuts sequences and heads; 1 otherwise. Raises ValueError for an
    unknown kind, and for a split that it does not make."""

    kind: str = "heads"
    layout: SequenceLayout = CONTIGUOUS
    head_split: int = 1
    pieces: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"state plan {self.kind!r} is unknown: {', '.join(KINDS)}")
        if (self.head_split == 1) == (self.kind == "heads+tokens"):
            raise ValueError(
                f"state plan {self.kind} with head_split = {self.head_split}: heads+tokens splits "
                "heads among 2 devices or more, other plans leave it at 1"
            )
        if self.pieces < 1 or (self.pieces > 1 and self.kind != "wavefront"):
            raise ValueError(
                f"state plan {self.kind} with pieces = {self.pieces}: wavefront has 1 or more, "
                "other plans 1"
            )

    def ways(self, cp: int) -> int:
        """Devices that share out the heads, and hold the same positions."""
        return cp if self.kind == "heads" else min(self.head_split, cp)

    def axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The bound names of cp as (those that share out positions, those that share out heads)."""
        return split("cp", self.ways(size("cp")))

    def ticks(self, cp: int) -> int:
        """Of a wavefront over `cp` devices."""
        return self.pieces + cp - 1

    def scan_steps(self, cp: int) -> int:
        """Of a prefix scan over `cp` devices."""
        return (cp - 1).bit_length()

    def check(
        self, batch: int, heads: int, length: int, degrees: Mapping[str, int], chunk: int
    ) -> None:
        """Raises ValueError, with equation, values and fix, where `batch` sequences of `length`,
        `heads` (of a device of tp) or chunks of `chunk` positions cannot be shared by cp
        devices. A `chunk` of 0: all positions are read at once, in any layout."""
        cp = degrees["cp"]
        if cp == 1:
            return
        layouts.check_length(self.layout, length, cp)
        if self.kind.startswith("affine") and self.layout != CONTIGUOUS:
            raise ValueError(
                f"the {self.kind} plan composes ranges of positions, and the {self.layout.kind} "
                "layout deals them out: set context.layout=contiguous"
            )
        if self.kind == "wavefront":
            self._check_wavefront(batch, heads, length, cp, chunk)
        u = self.head_split
        if self.kind == "heads+tokens" and (cp & (cp - 1) or u & (u - 1) or not 1 < u < cp):
            splits = cp > 2 and not cp & (cp - 1)
            fix = f"a power of two below {cp}, or plan heads" if splits else "plan tokens or heads"
            raise ValueError(
                f"cp = {cp} is not head_split = {u} times 2 or more devices that share tokens, "
                f"both powers of two: use {fix}"
            )
        among = cp if self.kind == "tokens+ns" else self.ways(cp)
        if heads % among:
            name = f"head_split = {u}" if self.kind == "heads+tokens" else f"cp = {cp}"
            raise ValueError(
                f"heads / tp = {heads} are not divisible by {name}, which plan {self.kind} shares "
                f"them among: set model.heads={-(-heads // among) * among * degrees['tp']}, or "
                "another plan"
            )
        if "tokens" in self.kind and chunk:
            self._check_chunk(chunk, length, cp)

    def _check_wavefront(self, batch: int, heads: int, length: int, cp: int, chunk: int) -> None:
        if self.layout != CONTIGUOUS:
            raise ValueError(
                "the wavefront plan hands the state from one range of positions to the next, and "
                f"the {self.layout.kind} layout deals them out: set context.layout=contiguous"
            )
        if length % (cp * chunk):
            raise ValueError(
                f"{length} tokens / cp = {cp} are not divisible by mini-batches of {chunk}, which "
                "plan wavefront keeps whole: set data.seq_len="
                f"{-(-length // (cp * chunk)) * cp * chunk}"
            )
        if batch * heads % self.pieces:
            fix = max(m for m in range(1, self.pieces) if batch * heads % m == 0)
            raise ValueError(
                f"{batch} sequences · {heads} heads = {batch * heads} are not divisible by pieces "
                f"= {self.pieces} of plan wavefront: set pieces={fix}"
            )

    def _check_chunk(self, chunk: int, length: int, cp: int) -> None:
        if chunk % cp:
            raise ValueError(
                f"a chunk of {chunk} tokens is not divisible by cp = {cp}, which plan {self.kind} "
                f"shares it among: set a chunk of {-(-chunk // cp) * cp}"
            )
        if self.layout.kind != "striped" or self.layout.block * cp != chunk:
            raise ValueError(
                f"plan {self.kind} needs every chunk on all devices: with {self.layout}, later "
                f"tokens would be read first; set context.layout=striped, context.stripe = chunk / "
                f"cp = {chunk // cp}"
            )
        if length % chunk:
            raise ValueError(
                f"{length} tokens are not divisible by chunks of {chunk}, which plan {self.kind} "
                f"shares out: set data.seq_len={-(-length // chunk) * chunk}"
            )


def gather_heads(x_BxLxH: Array) -> Array:
    """The sum over cp of [B, H, …], of which this device keeps H/n heads."""
    return reduce_scatter(x_BxLxH, "cp", dim=1)


def spread_heads(x: Array) -> Array:
    """All heads, [B, H, …], from those of every device."""
    return all_gather(x, "cp", dim=1)


def of_the_last(x: Array, among: Axes = "cp") -> Array:
    """What the last device of `among` has."""
    return broadcast(x, among, size(among) - 1)


def _order(layout: SequenceLayout, length: int, u: int) -> np.ndarray:
    """Where the u · `length` positions of u neighbours are, in the order of positions. In stripes,
    every group holds its positions in the order of the first one."""
    held = layouts.permutation(layout, length * size("cp"), size("cp"))[: u * length]
    return np.argsort(held)


def in_order(x_BxL: Array, layout: SequenceLayout, among: Axes = "cp") -> Array:
    """[B, u·L] of the u devices `among`, as `by_heads` has them."""
    u = size(among)
    if u == 1:
        return x_BxL
    return all_gather(x_BxL, among, dim=1)[:, _order(layout, x_BxL.shape[1], u)]


def by_heads(
    run: Callable[..., Array], layout: SequenceLayout, *tokens: Array, among: Axes = "cp"
) -> Array:
    """`run` on a share of the heads, and on all positions that the u devices `among` (the trailing
    sub-axes of cp) hold: the whole sequence, or every chunk's share of a striped layout.

    `tokens`: arrays [B, L, H, …]; `run` takes them as [B, u·L, H/u, …], in the order of positions,
    and returns such an array; the result is [B, L, H, …], in the dtype of the first."""
    u = size(among)
    if u == 1:
        return run(*tokens)
    back = _order(layout, tokens[0].shape[1], u)
    whole = [all_to_all(x, among, split_dim=2, concat_dim=1)[:, back] for x in tokens]
    out = run(*whole)[:, np.argsort(back)].astype(tokens[0].dtype)
    return all_to_all(out, among, split_dim=1, concat_dim=2)


def own_heads(x: Array, among: Axes = "cp") -> Array:
    """This device's share of the heads of a parameter, [H, …] → [H/u, …] for u devices."""
    u = size(among)
    share = x.shape[0] // u
    return jax.lax.dynamic_slice_in_dim(x, index(among) * share, share) if u > 1 else x


def wavefront(
    run: Callable[..., tuple[Array, Any]], pieces: int, start: Any, fixed: Any, *tokens: Array
) -> Array:
    """`run` on all positions in order, for one of m = `pieces` pieces of sequences and heads after
    the other: device i runs piece p at tick p + i. [B, L, H, …] → [B, L, H, …].

    `start`, `fixed`: pytrees [H, …], the states before the first position and what else belongs to
    a head. `run(state, start, fixed, *tokens)` takes the state that arrives and those of a piece,
    [G, …] with G = B·H / m, and tokens [1, L, G, …]; it returns what is read, and the state after
    the last position."""
    B, _, H = tokens[0].shape[:3]
    me, shape = jnp.asarray(index("cp")), (pieces, B * H // pieces)
    # Before and after its pieces, a device repeats one, and nobody reads what comes out.
    at = jnp.clip(jnp.arange(pieces + size("cp") - 1) - me, 0, pieces - 1)

    def by_tick(x_BxH: Array) -> Array:
        return x_BxH.reshape(*shape, *x_BxH.shape[2:])[at]

    def of_sequences(
        x_H: Array,
    ) -> Array:  # varying first: its gradient is summed once, not B times
        return jnp.broadcast_to(vary_like(x_H, tokens[0]), (B, *x_H.shape))

    every = jax.tree.map(lambda x: by_tick(of_sequences(x)), (start, fixed))
    cut = [by_tick(jnp.moveaxis(x, 2, 1)) for x in tokens]

    def tick(arrived: Any, now: Any) -> tuple[Any, Array]:
        (first, fixed), parts = now
        state = jax.tree.map(lambda a, b: jnp.where(me == 0, a, b), first, arrived)
        out, state = run(state, first, fixed, *(jnp.moveaxis(x, 1, 0)[None] for x in parts))
        return jax.tree.map(lambda x: shift(x, "cp", cyclic=False), state), out[0]

    nothing = jax.tree.map(lambda x: vary_like(jnp.zeros(x.shape[1:]), cut[0]), every[0])
    _, outs = jax.lax.scan(tick, nothing, (every, cut))
    out = jnp.moveaxis(jax.lax.dynamic_slice_in_dim(outs, me, pieces), 2, 1)
    return jnp.moveaxis(out.reshape(B, H, *out.shape[2:]), 1, 2)


def before(map_BxH: Array, start: Array, fold: Callable[[Array, Array, Array], Array]) -> Array:
    """The state before the first position of this device: `fold(maps [n, B, H, …], start, i)` of
    the maps of all devices in order, for device i."""
    if size("cp") == 1:
        return start
    maps = all_gather(map_BxH[None], "cp", dim=0)
    return fold(maps, start, jnp.asarray(index("cp")))


def scanned_before(
    map_BxH: Array,
    compose: Callable[[Array, Array], Array],
    apply: Callable[[Array, Array], Array],
    constant: Callable[[Array], Array],
) -> Array:
    """As `before` of a state that starts at zero, by an exclusive prefix scan (Hillis and Steele
    1986).

    `compose(later, earlier)`: the map of two ranges, `apply(map, state)`, and `constant(map)`, what
    a map makes of zero. Zeros where no device sends are a map, too: one that forgets. So a range
    that begins at position 0 is right already, and any number of devices will do."""
    n = size("cp")
    if n == 1:
        return jnp.zeros_like(constant(map_BxH))
    # `seen`: the map of the `width` devices before this one; with its own map, it is sent on.
    seen, width = None, 0
    while 2 * width + 1 < n - 1:
        sent = map_BxH if seen is None else compose(map_BxH, seen)
        arrived = shift(sent, "cp", width + 1, cyclic=False)
        seen = arrived if seen is None else compose(seen, arrived)
        width = 2 * width + 1
    # The last range that arrives begins at position 0: of its map, the state is enough.
    if seen is None:
        return shift(constant(map_BxH), "cp", cyclic=False)
    state = shift(apply(map_BxH, constant(seen)), "cp", width + 1, cyclic=False)
    return apply(seen, state)
