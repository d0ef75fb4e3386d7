"""What models of images share: patches, positions, embeddings of time and label, the output layer.

Rows of an image lie over cp, so patches do, too. Devices of tp hold the same patches until, under
sequence parallelism, each keeps its share of the tokens.

Legend: B images, H rows (local over cp), W columns, L tokens, D width, E features, P pixels and
channels of a patch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.collectives import index, psum, size, vary
from fdp.count.counts import REDUCE, Counts, Degrees, Ledger, Rows, Work
from fdp.models.layers import LayerNorm, Modulation, hidden_bytes, normal, zeros
from fdp.models.module import Module, compact, silu
from fdp.models.shape import ModelShape
from fdp.objectives.cost import PLAIN, CostClass

Array = jax.Array
FEATURES = 256  # of the time


@dataclass(frozen=True)
class ImageShape:
    """What images a model reads. `size`: rows and columns. `patch`: edge of the finest patch.
    `coarse`: patches of twice the edge have an embedding and an output of their own. `dropping`:
    tokens may be dropped. `self_conditioned`: the last estimate is an input, too. `registers`:
    learned tokens (Darcet et al. 2023) beside those of time and label, where these are tokens."""

    size: int = 32
    channels: int = 3
    classes: int = 10
    patch: int = 4
    coarse: bool = False
    dropping: bool = False
    self_conditioned: bool = False
    registers: int = 0

    def __post_init__(self) -> None:
        edge = self.patches[-1]
        if self.size % edge:
            raise ValueError(
                f"image size is not whole patches: size % patch = {self.size} % {edge} = "
                f"{self.size % edge}; set model.image.size={-(-self.size // edge) * edge} or "
                "another model.image.patch"
            )

    @property
    def patches(self) -> tuple[int, ...]:
        """Edges of all patches, the finest first."""
        return (self.patch, 2 * self.patch) if self.coarse else (self.patch,)

    @property
    def inputs(self) -> int:
        """Channels that the patch embedding reads."""
        return self.channels * (2 if self.self_conditioned else 1)

    def tokens(self, cost: CostClass = PLAIN, kept: bool = False) -> int:
        """Tokens of an image; `kept`: those that the layers see."""
        return (self.size // (self.patch * cost.patch)) ** 2 // (cost.group if kept else 1)

    def edge(self, tokens: int) -> int:
        """Edge of the patches of which so many are an image."""
        return next(p for p in self.patches if (self.size // p) ** 2 == tokens)


def patchify(x_BxHxWxC: Array, patch: int) -> Array:
    """[B, H, W, C] → [B, L, P], row by row; the channels of a pixel lie together."""
    B, H, W, C = x_BxHxWxC.shape
    x = x_BxHxWxC.reshape(B, H // patch, patch, W // patch, patch, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, patch * patch * C)


def unpatchify(x_BxLxP: Array, patch: int, width: int) -> Array:
    """The inverse of `patchify` for images of `width` columns."""
    B, L, P = x_BxLxP.shape
    columns, channels = width // patch, P // patch**2
    x = x_BxLxP.reshape(B, L // columns, columns, patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, width, channels)


def waves(position: np.ndarray, features: int) -> np.ndarray:
    """Sine and cosine of positions at `features`/2 wavelengths: [...] → [..., features]."""
    frequency = 10_000.0 ** (-np.arange(features // 2) / (features / 2))
    angle = position[..., None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


def grid(tokens: int, width: int, step: int = 1) -> np.ndarray:
    """Fixed positions f32 [L, D] of a square grid of tokens, half of the width for the column and
    half for the row (Dosovitskiy et al. 2021). `step`: edge of a patch in those of the finest, in
    the middle of which a coarse patch lies."""
    n = int(tokens**0.5)
    at = np.arange(n) * step + (step - 1) / 2
    row, column = np.meshgrid(at, at, indexing="ij")
    both = [waves(x.reshape(-1), width // 2) for x in (column, row)]
    return np.concatenate(both, axis=-1).astype(np.float32)


def own_rows(x: Array, axis: str, dim: int) -> Array:
    """This device's share of `dim` of what all devices of `axis` hold."""
    n = x.shape[dim] // size(axis)
    return x if size(axis) == 1 else jax.lax.dynamic_slice_in_dim(x, index(axis) * n, n, dim)


class PatchEmbedding(Module):
    """[B, L, P] → [B, L, D] with a bias. Under sequence parallelism its rows will be shared out
    over tp, so the gradient of the weights is reduced, not that of the rows."""

    shape: ModelShape
    pixels: int

    @compact
    def __call__(self, x_BxLxP: Array) -> Array:
        D, dtype = self.shape.width, jnp.dtype(self.shape.dtype)
        w = self.weight("w", normal(self.pixels**-0.5), (self.pixels, D), (None, None))
        b = self.weight("b", zeros, (D,), (None,))
        if self.shape.sequence_parallel:
            w, b = vary((w, b), "tp")
        return x_BxLxP.astype(dtype) @ w.astype(dtype) + b.astype(dtype)

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Its input is data: the backward pass has one product. All devices of tp compute it."""
        s, flops = self.shape, 2 * rows.positions * self.pixels * self.shape.width
        weights, back = (self.pixels + 1) * s.width, Ledger(degrees)
        if s.sequence_parallel:
            back.add(REDUCE, ("tp",), 4 * weights)
        again = Work((degrees["tp"] - 1) * 2 * flops)
        inputs = rows.tokens(degrees) * self.pixels * s.itemsize
        return Counts(weights, Work(flops), Work(flops, sent=back.sent), again=again, saved=inputs)


def time_features(time_B: Array, features: int) -> Array:
    """Cosine and sine of a time in 0..1000 at `features`/2 wavelengths: f32 [B] → [B, features]."""
    half = features // 2
    frequency = jnp.asarray(10_000.0 ** (-np.arange(half) / half), jnp.float32)
    angle = time_B[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedding(Module):
    """`time_features`, then a hidden layer: f32 [B] → [B, D] (Peebles & Xie 2022)."""

    shape: ModelShape
    features: int = FEATURES

    @compact
    def __call__(self, time_B: Array) -> Array:
        E, D = self.features, self.shape.width
        x_BxE = time_features(time_B, E)
        w_in = self.weight("w_in", normal(0.02), (E, D), (None, None))
        b_in = self.weight("b_in", zeros, (D,), (None,))
        w_out = self.weight("w_out", normal(0.02), (D, D), (None, None))
        b_out = self.weight("b_out", zeros, (D,), (None,))
        return silu(x_BxE @ w_in + b_in) @ w_out + b_out

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """All devices of cp and tp compute the same; the input is data."""
        E, D = self.features, self.shape.width
        first, second = 2 * rows.batch * E * D, 2 * rows.batch * D * D
        forward = Work(first + second, replicated=first + second)
        backward = Work(first + 2 * second, replicated=first + 2 * second)
        last = Work(second, replicated=second)
        return Counts((E + 1) * D + (D + 1) * D, forward, backward, last)


class LabelEmbedding(Module):
    """A vector for every class and one for no label, id `classes`: int32 [B] → [B, D]."""

    shape: ModelShape
    classes: int

    @compact
    def __call__(self, labels_B: Array) -> Array:
        sizes = (self.classes + 1, self.shape.width)
        return self.weight("table", normal(0.02), sizes, (None, None), decay=False)[labels_B]

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """A lookup."""
        return Counts((self.classes + 1) * self.shape.width)


class FinalNorm(Module):
    """The norm before the output: modulated by features of time and label [B, D], or with a scale
    and bias of its own where there are none."""

    shape: ModelShape

    @compact
    def __call__(self, x_BxLxD: Array, features_BxD: Array | None) -> Array:
        s = self.shape
        h_BxLxD = LayerNorm(s, features_BxD is None, name="norm")(x_BxLxD)
        if features_BxD is None:
            return h_BxLxD
        shift, scale = Modulation(s, s.width, bias=True, parts=2, name="modulation")(features_BxD)
        return (h_BxLxD * (1 + scale) + shift).astype(x_BxLxD.dtype)

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Norm and modulation."""
        s = self.shape
        norm = LayerNorm(s, not s.time_conditioning, parent=None)
        found = norm.counts(s.width, s.sequence_parallel, degrees)
        if s.time_conditioning:
            one = Modulation(s, s.width, bias=True, parts=2, parent=None)
            found += one.counts(rows, degrees, s.sequence_parallel)
        return found


class Output(Module):
    """[B, L, D] → float32 [B, L, P], zero at initialisation. All devices of tp compute all rows of
    their images; under sequence parallelism the rows were gathered, and the mean over tp states
    that devices agree."""

    shape: ModelShape
    pixels: int

    @compact
    def __call__(self, x_BxLxD: Array) -> Array:
        s, dtype = self.shape, jnp.dtype(self.shape.dtype)
        w = self.weight("w", zeros, (s.width, self.pixels), (None, None)).astype(dtype)
        b = self.weight("b", zeros, (self.pixels,), (None,))
        out = jnp.matmul(x_BxLxD, w, preferred_element_type=jnp.float32) + b
        return psum(out, "tp") / size("tp") if s.sequence_parallel else out

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Also of the gradients of the weights, which vary over tp under sequence parallelism."""
        s, flops = self.shape, 2 * rows.positions * self.shape.width * self.pixels
        weights, there, back = (s.width + 1) * self.pixels, Ledger(degrees), Ledger(degrees)
        out = 4 * rows.tokens(degrees) * self.pixels
        if s.sequence_parallel:
            there.add(REDUCE, ("tp",), out)
            back.add(REDUCE, ("tp",), 4 * weights)
        forward, again = Work(flops, sent=there.sent), Work((degrees["tp"] - 1) * 3 * flops)
        saved = hidden_bytes(s, rows, degrees)[1] + out
        return Counts(weights, forward, forward.backward(back.sent), again=again, saved=saved)


def with_estimate(image: ImageShape, noised: Mapping[str, Any]) -> Array:
    """The inputs [B, H, W, C], and beside them the last estimate, or zeros, where the model reads
    one."""
    x = noised["inputs"]
    if not image.self_conditioned:
        return x
    return jnp.concatenate([x, noised.get("estimate", jnp.zeros_like(x))], axis=-1)


def check_size(
    image: ImageShape, cost: CostClass, extras: int, degrees: Mapping[str, int], sp: bool
) -> None:
    """Raises ValueError, with equation, values and fix, where cp, or tp under sequence parallelism,
    cannot share out the patches and the `extras` tokens before them."""
    edge, cp, shards = image.patch * cost.patch, degrees["cp"], degrees["tp"] if sp else 1
    if (image.size // edge) % cp:
        raise ValueError(
            f"rows of patches are not shared out over cp: size / patch % cp = {image.size} / "
            f"{edge} % {cp}; set mesh.cp to a divisor of {image.size // edge}"
        )
    kept = image.tokens(cost, kept=True)
    if image.size // edge % cost.group:
        raise ValueError(
            f"groups of dropped tokens are not whole: size / patch % group = {image.size} / {edge} "
            f"% {cost.group}; set model.image.group to a divisor of {image.size // edge}"
        )
    if extras % cp or (kept + extras) % (cp * shards):
        more = -extras % cp
        while (kept + extras + more) % (cp * shards) and more < cp * shards:
            more += cp
        fix = f"set model.image.registers={image.registers + more} or" if extras else "set"
        raise ValueError(
            f"tokens are not shared out: patches + tokens before them = {kept} + {extras}; their "
            f"sum must be divisible by cp·tp = {cp}·{shards}, the latter by cp; {fix} "
            "model.sequence_parallel=False or another mesh.cp"
        )
