"""How layers with a state communicate over cp: each plan gives exactly what one device computes.

- `tokens`: the devices hold parts of every chunk (striped layout) and sum each update;
- `tokens+ns`: the same, but the sum is scattered over heads, each device orthogonalises its own,
  and the results are gathered: the same bytes, less work;
- `heads`: an all-to-all gives each device the whole sequence of some heads;
- `affine`: for states that change by affine maps; each device exchanges the map of its part of the
  sequence (contiguous layout) once.

Legend: B sequences, L positions of a device, H heads, S all positions, n devices of cp."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fdp.collectives import all_gather, all_to_all, index, psum, reduce_scatter, size
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, SequenceLayout

Array = jax.Array
KINDS = ("tokens", "tokens+ns", "heads", "affine")


@dataclass(frozen=True)
class StatePlan:
    """What a layer with a state sends over cp (`kind`), and which positions a device holds. Raises
    ValueError for an unknown kind."""

    kind: str = "heads"
    layout: SequenceLayout = CONTIGUOUS

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"state plan {self.kind!r} is unknown: {', '.join(KINDS)}")

    def check(self, heads: int, length: int, degrees: Mapping[str, int], chunk: int) -> None:
        """Raises ValueError, with equation, values and fix, where `heads` (of a device of tp),
        sequences of `length` or chunks of `chunk` positions cannot be shared by cp devices."""
        cp = degrees["cp"]
        if cp == 1:
            return
        layouts.check_length(self.layout, length, cp)
        if self.kind == "affine" and self.layout != CONTIGUOUS:
            raise ValueError(
                f"the affine plan composes ranges of positions, and the {self.layout.kind} layout "
                "deals them out: set context.layout=contiguous"
            )
        if self.kind in ("heads", "tokens+ns") and heads % cp:
            raise ValueError(
                f"heads / tp = {heads} are not divisible by cp = {cp}, which plan {self.kind} "
                f"shares them among: set model.heads={-(-heads // cp) * cp * degrees['tp']}, or "
                "another plan"
            )
        if self.kind.startswith("tokens"):
            self._check_chunk(chunk, length, cp)

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


def total(x: Array) -> Array:
    """The sum over cp."""
    return psum(x, "cp")


def by_heads(run: Callable[..., Array], layout: SequenceLayout, *tokens: Array) -> Array:
    """`run` on the whole sequence and a share of the heads.

    `tokens`: arrays [B, L, H, …]; `run` takes them as [B, S, H/n, …], in the order of positions,
    and returns such an array; the result is [B, L, H, …], in the dtype of the first."""
    cp = size("cp")
    if cp == 1:
        return run(*tokens)
    order = layouts.permutation(layout, tokens[0].shape[1] * cp, cp)
    back = layouts.inverse(order)
    whole = [all_to_all(x, "cp", split_dim=2, concat_dim=1)[:, back] for x in tokens]
    out = run(*whole)[:, order].astype(tokens[0].dtype)
    return all_to_all(out, "cp", split_dim=1, concat_dim=2)


def own_heads(x: Array) -> Array:
    """This device's share of the heads of a parameter, [H, …] → [H/n, …]."""
    share = x.shape[0] // size("cp")
    return jax.lax.dynamic_slice_in_dim(x, index("cp") * share, share) if size("cp") > 1 else x


def before(map_BxH: Array, start: Array, fold: Callable[[Array, Array, Array], Array]) -> Array:
    """The state before the first position of this device: `fold(maps [n, B, H, …], start, i)` of
    the maps of all devices in order, for device i."""
    if size("cp") == 1:
        return start
    maps = all_gather(map_BxH[None], "cp", dim=0)
    return fold(maps, start, jnp.asarray(index("cp")))
