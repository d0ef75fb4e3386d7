"""Stacks of patterns: residual blocks described by values, scanned over their repetitions.

`layer(Attention, core=…)` is a value that describes a layer. It compares and hashes by its content,
so equal models compile once.

Legend: B sequences, L positions, D width, E noise features."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fdp.collectives import size, vary
from fdp.count.counts import Counts, Degrees, Rows, Unstated, Work, of
from fdp.models import module
from fdp.models.layers import Modulation, RMSNorm, hidden_bytes
from fdp.models.module import Module, compact
from fdp.models.shape import ModelShape

Array = jax.Array

# What the backward pass keeps: only the products with weights; only the block inputs.
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class Layer:
    """A description of a module: `Layer(cls, fields)(shape, name=…)` builds it. Make one with
    `layer`."""

    cls: Callable[..., Module]
    fields: tuple[tuple[str, Any], ...] = ()

    def __call__(self, shape: ModelShape, **more: Any) -> Any:
        """The module, for a model of `shape`."""
        return self.cls(shape=shape, **(dict(self.fields) | more))


def layer(cls: type[Module], **fields: Any) -> Layer:
    """A layer of class `cls`. `fields`: its fields besides the shape, all hashable."""
    return Layer(cls, tuple(sorted(fields.items())))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInput:
    """Layer inputs of the two layers of a block."""

    mixing: Any = None
    ffn: Any = None


class Block(Module):
    """Pre-norm residual block: a mixing layer (attention) and an FFN. With time conditioning both
    are modulated by features of the noise level and start as the identity (adaLN-zero).

    `norm` builds the norms; None is RMSNorm. `modulation` builds the modulations.

    Both layers are modules `(x, where, layer input) → y`; a `LayerInput` gives each its own, other
    layer inputs are those of the mixing layer. `reduction` builds the module that replaces the
    all-reduce over tp at the end of both layers; it may keep state in the cache."""

    shape: ModelShape
    mixing: Layer
    ffn: Layer
    reduction: Layer | None = None
    norm: Layer | None = None
    modulation: Layer = layer(Modulation)

    def _norm(self, **named: Any) -> Any:
        s = self.shape
        return RMSNorm(s.epsilon, **named) if self.norm is None else self.norm(s, **named)

    @compact
    def __call__(self, x_BxLxD: Array, shared: tuple, given: Any = None) -> tuple[Array, None]:
        s, dtype = self.shape, jnp.dtype(self.shape.dtype)
        noise_BxE, where = shared
        own = given if isinstance(given, LayerInput) else LayerInput(given)
        more = {}
        if self.reduction is not None:
            reduction = self.reduction(s, name="reduction")
            more = {"reduction": functools.partial(reduction, given=where.given)}
        attention = self.mixing(s, name="attention", **more)
        ffn = self.ffn(s, name="mlp", **more)
        for name, part, part_given in (("attention", attention, own.mixing), ("mlp", ffn, own.ffn)):
            h_BxLxD = self._norm(name=f"{name}_norm")(x_BxLxD)
            if noise_BxE is None:
                x_BxLxD = x_BxLxD + part(h_BxLxD, where, part_given)
            else:
                modulation = self.modulation(s, name=f"{name}_modulation")
                shift, scale, gate = modulation(noise_BxE)
                h_BxLxD = (h_BxLxD * (1 + scale) + shift).astype(dtype)
                x_BxLxD = (x_BxLxD + gate * part(h_BxLxD, where, part_given)).astype(dtype)
        return x_BxLxD, None

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Both layers, norms and modulations. The backward pass does not read the output of the
        block, unless a gate multiplies it."""
        s = self.shape
        if self.reduction is not None:
            raise Unstated(f"{self.reduction.cls.__name__} has no counts")
        mixing = of(self.mixing(s, parent=None), rows, degrees)
        ffn = of(self.ffn(s, parent=None), rows, degrees)
        norm = self._norm(parent=None).counts(s.width, s.sequence_parallel, degrees)
        found = mixing + norm + ffn + norm
        if s.time_conditioning:
            one = self.modulation(s, parent=None).counts(rows, degrees, s.sequence_parallel)
            found += one + one
        return replace(found, last=Work() if s.time_conditioning else ffn.last)

    def check(self, batch: int, length: int, degrees: Mapping[str, int]) -> None:
        """Raises ValueError where a layer cannot run these sizes on these degrees. A mixing layer
        that states no `check` sees the positions of its device alone."""
        ffn = self.ffn(self.shape, parent=None)
        if hasattr(ffn, "check"):
            ffn.check(batch, length, degrees)
        mixing = self.mixing(self.shape, parent=None)
        if hasattr(mixing, "check"):
            mixing.check(batch, length, degrees)
            return
        cp, shards = degrees["cp"], degrees["tp"] if self.shape.sequence_parallel else 1
        if cp > 1 or shards > 1:
            raise ValueError(
                f"{type(mixing).__name__} states no check(batch, length, degrees), so nothing says "
                f"that it mixes positions of other devices, and L = S/(cp·tp) = {length}/({cp}·"
                f"{shards}): give it one, or set mesh.cp=1 and model.sequence_parallel=False"
            )

    def decode_state(self, batch: int, length: int) -> tuple[Any, Any]:
        """(values, PartitionSpecs) of the empty cache of this block. Raises ValueError for a mixing
        layer without cached decoding."""
        mixing = self.mixing(self.shape, parent=None)
        if not hasattr(mixing, "decode_state"):
            raise ValueError(f"{type(mixing).__name__} has no cached decoding")
        state, specs = mixing.decode_state(batch, length)
        return {"attention": state}, {"attention": specs}


class Pattern(Module):
    """One period of different blocks, named "0", "1", …. Each gets its own layer input, if there
    are any."""

    shape: ModelShape
    blocks: tuple[Layer, ...]

    @compact
    def __call__(self, x_BxLxD: Array, shared: tuple, given: Any = None) -> tuple[Array, None]:
        for i, block in enumerate(self.blocks):
            own = None if given is None else given[i]
            x_BxLxD, _ = block(self.shape, name=str(i))(x_BxLxD, shared, own)
        return x_BxLxD, None

    def decode_state(self, batch: int, length: int) -> tuple[Any, Any]:
        """(values, PartitionSpecs) of the empty caches of all blocks."""
        blocks = [block(self.shape, parent=None) for block in self.blocks]
        both = {str(i): b.decode_state(batch, length) for i, b in enumerate(blocks)}
        return {n: s for n, (s, _) in both.items()}, {n: p for n, (_, p) in both.items()}


@dataclass(frozen=True)
class Stack:
    """`pattern`, a tuple of blocks, repeated until the shape's number of layers is reached.

    A pattern of one block is scanned directly: its parameters are [layers, …]. In a pattern of
    several, the parameters of block i are [layers / len(pattern), …] under the name "i". Raises
    ValueError for a pattern that does not divide the layers."""

    shape: ModelShape
    pattern: tuple[Layer, ...]

    def __post_init__(self) -> None:
        n, layers = len(self.pattern), self.shape.layers
        if not n or layers % n:
            raise ValueError(
                f"{layers} layers are not whole patterns: layers % blocks of the pattern = "
                f"{layers} % {n}; set layers={-(-layers // max(n, 1)) * max(n, 1)}"
            )

    @property
    def periods(self) -> int:
        """Number of repetitions of the pattern."""
        return self.shape.layers // len(self.pattern)

    def check_inputs(self, inputs_N: Any) -> None:
        """Raises ValueError for layer inputs that do not lead with this pp shard's periods."""
        periods = self.periods // size("pp")
        for path, leaf in jax.tree_util.tree_leaves_with_path(inputs_N):
            if leaf.ndim == 0 or leaf.shape[0] != periods:
                raise ValueError(
                    f"layer input {jax.tree_util.keystr(path) or 'array'} of shape {leaf.shape} "
                    f"must lead with layers / blocks of the pattern / pp = {self.shape.layers} / "
                    f"{len(self.pattern)} / {size('pp')} = {periods}"
                )

    def build(self, gather: Any, name: str) -> Any:
        """The scanned module, called as `(x, (noise, where), layer inputs) → (x, None)`."""
        remat = REMAT[self.shape.remat] if self.shape.remat != "none" else None
        one = self._period()
        scanned = module.stack(one.cls, self.periods, remat, gather)
        return scanned(shape=self.shape, name=name, **dict(one.fields))

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Counts of all blocks, with what rematerialisation computes again in each period."""
        blocks = [of(block(self.shape, parent=None), rows, degrees) for block in self.pattern]
        period = replace(sum(blocks, Counts()), last=blocks[-1].last)
        inputs, _ = hidden_bytes(self.shape, rows, degrees)
        return period.repeated(self.periods, self.shape.remat, inputs, degrees["pp"])

    def _period(self) -> Layer:
        return self.pattern[0] if len(self.pattern) == 1 else layer(Pattern, blocks=self.pattern)

    def decode_state(self, batch: int, length: int) -> tuple[Any, Any]:
        """(values, PartitionSpecs) of all empty caches; the leading dim is this pp shard's
        periods."""
        state, specs = self._period()(self.shape, parent=None).decode_state(batch, length)
        n = self.periods // size("pp")
        many = jax.tree.map(lambda x: vary(jnp.broadcast_to(x, (n, *x.shape)), "pp"), state)
        return many, jax.tree.map(
            lambda p: PartitionSpec("pp", *p), specs, is_leaf=module.spec_leaf
        )
