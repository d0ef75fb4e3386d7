"""U-ViT (Bao et al. 2022; arXiv 2209.12152): a transformer of images whose block i hands its output
to block L - i over a long skip. Time and label are tokens before the patches; that of the time is
not learned.

The first half is a scan that yields what every block puts out. The second half is a scan that
takes these, in reverse, as layer inputs. In a pipeline, the device that runs block i also runs
block L - i, so that the skip stays at home.

Legend: B images, H rows (local over cp), W columns, C channels, L tokens (local over cp), D width,
N blocks of a half."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import all_gather, index, size, vary
from fdp.count import counts
from fdp.count.counts import REDUCE, SCATTER, Counts, Degrees, Ledger, Rows, Staged, Work, of
from fdp.models.attention import GATHER, Attention, Softmax, Where
from fdp.models.dit import TOKENS
from fdp.models.image import (
    FinalNorm,
    ImageShape,
    LabelEmbedding,
    Output,
    PatchEmbedding,
    check_size,
    own_rows,
    patchify,
    time_features,
    unpatchify,
    with_estimate,
)
from fdp.models.layers import MLP, LayerNorm, bias_reduced, entered, hidden_bytes, normal, zeros
from fdp.models.module import Module, compact, initializers
from fdp.models.shape import ModelShape
from fdp.models.stack import Block, Layer, Stack, layer
from fdp.objectives.cost import PLAIN, CostClasses
from fdp.parallel.context import layouts
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.masks import Mask

Array = jax.Array


class Yielding(Module):
    """A block that a scan also collects the output of."""

    shape: ModelShape
    block: Layer

    @compact
    def __call__(self, x_BxLxD: Array, shared: tuple, given: Any = None) -> tuple[Array, Array]:
        x_BxLxD, _ = self.block(self.shape, name="block")(x_BxLxD, shared, given)
        return x_BxLxD, x_BxLxD

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Of the block; its output is read, so rematerialisation computes all of it again."""
        saved, _ = hidden_bytes(self.shape, rows, degrees)
        return of(self.block(self.shape, parent=None), rows, degrees) + Counts(saved=saved)


class Receiving(Module):
    """A block before which the output of an earlier one, its layer input, is merged in: [x, skip] w
    + b. Rows are independent, so tp and cp need nothing."""

    shape: ModelShape
    block: Layer

    @compact
    def __call__(self, x_BxLxD: Array, shared: tuple, skip_BxLxD: Array) -> tuple[Array, None]:
        D, dtype = self.shape.width, jnp.dtype(self.shape.dtype)
        w = self.weight("w", normal((2 * D) ** -0.5), (2 * D, D), (None, None)).astype(dtype)
        b = self.weight("b", zeros, (D,), (None,)).astype(dtype)
        x_BxLxD = jnp.concatenate([x_BxLxD, skip_BxLxD], axis=-1) @ w + b
        return self.block(self.shape, name="block")(x_BxLxD, shared, None)

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Devices of tp compute the merge alike, or, under sequence parallelism, for their own
        rows; the gradient of its weights is then reduced over tp."""
        s, D, tp = self.shape, self.shape.width, degrees["tp"]
        flops, back = 4 * rows.positions * D * D, Ledger(degrees)
        again = Work() if s.sequence_parallel else Work((tp - 1) * 3 * flops)
        if s.sequence_parallel:
            back.add(REDUCE, ("tp",), 4 * 2 * D * D)
        forward, saved = Work(flops), 2 * hidden_bytes(s, rows, degrees)[0]
        merge = Counts(
            2 * D * D + D, forward, forward.backward(back.sent), again=again, saved=saved
        )
        if s.sequence_parallel:
            merge += Counts(backward=Work(sent=bias_reduced(s, degrees)))
        inner = of(self.block(self.shape, parent=None), rows, degrees)
        return replace(merge + inner, last=inner.last)


class PositionTable(Module):
    """Learned positions f32 [L, D] of all tokens."""

    shape: ModelShape
    tokens: int

    @compact
    def __call__(self) -> Array:
        sizes = (self.tokens, self.shape.width)
        table = self.weight("table", initializers.normal(0.02), sizes, (None, None), decay=False)
        return vary(table, "tp") if self.shape.sequence_parallel else table


class Smoothing(Module):
    """A 3 × 3 convolution of the image: float32 [B, H, W, C] → same.

    The rows above and below those of a device come from its neighbours of cp. All devices of cp
    gather their first and last rows: a permute would wait for all stages of a pipeline, of which
    only the last one computes this."""

    channels: int

    @compact
    def __call__(self, x_BxHxWxC: Array) -> Array:
        C, W = self.channels, x_BxHxWxC.shape[2]
        w = self.weight("w", normal((9 * C) ** -0.5), (3, 3, C, C), (None,) * 4)
        b = self.weight("b", zeros, (C,), (None,))
        edges = jnp.concatenate([x_BxHxWxC[:, :1], x_BxHxWxC[:, -1:]], axis=1)
        edges = all_gather(edges, "cp", dim=1)  # first and last row of every device
        edges = jnp.pad(edges, ((0, 0), (1, 1), (0, 0), (0, 0)))
        above, below = (
            jax.lax.dynamic_slice_in_dim(edges, 2 * index("cp") + i, 1, 1) for i in (0, 3)
        )
        x = jnp.concatenate([above, x_BxHxWxC, below], axis=1)
        x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
        taps = [x[:, i : i + x.shape[1] - 2, j : j + W] for i in range(3) for j in range(3)]
        return jnp.concatenate(taps, axis=-1) @ w.reshape(9 * C, C) + b

    def counts(self, width: int, rows: Rows, degrees: Degrees) -> Counts:
        """Of images of so many rows and columns. Devices of tp compute it alike."""
        C, cp, tp = self.channels, degrees["cp"], degrees["tp"]
        flops, halo = 2 * rows.batch * width**2 * 9 * C * C, 2 * 4 * rows.batch * width * C
        forward = Work(flops, sent=Ledger(degrees).add(counts.GATHER, ("cp",), halo).sent)
        back = Ledger(degrees).add(SCATTER, ("cp",), halo).sent
        again, saved = Work((tp - 1) * 3 * flops), 9 * 4 * rows.batch * width**2 * C // cp
        return Counts(9 * C * C + C, forward, forward.backward(back), again=again, saved=saved)


class UViT(Module):
    """From noisy images to F of `fdp.objectives.image`, of the images' shape. `plan`: how attention
    communicates over cp. `gather`, for ZeRO-3: as in the Transformer. The shape has 2N + 1
    layers."""

    shape: ModelShape
    image: ImageShape
    plan: CommPlan = GATHER
    gather: Callable[[str], Any] | None = None

    layout = layouts.CONTIGUOUS
    stacks = ("rise", "fall")  # the layers of the two halves

    def setup(self) -> None:
        s, image = self.shape, self.image
        pixels = image.patch**2
        self.patches = PatchEmbedding(s, pixels * image.inputs, name="patch")
        self.positions = PositionTable(s, self.tokens)
        self.label = LabelEmbedding(s, image.classes)
        first, second = self.halves
        self.rise = first.build(None if self.gather is None else self.gather("rise"), "rise")
        self.middle = self.block(s)
        self.fall = second.build(None if self.gather is None else self.gather("fall"), "fall")
        self.norm = FinalNorm(s)
        self.final = Output(s, pixels * image.channels, name="output")
        self.smoothing = Smoothing(image.channels)

    @property
    def tokens(self) -> int:
        """Of an image: patches and `extras`."""
        return self.image.tokens() + self.extras

    @property
    def extras(self) -> int:
        """Label, time and registers, which are nothing but their learned positions."""
        return TOKENS + self.image.registers

    @property
    def block(self) -> Layer:
        """Pre-norm attention without biases but that of its output, and an MLP with exact gelu."""
        return layer(
            Block,
            mixing=layer(Attention, core=Softmax(Mask("bidirectional"), self.plan), bias_out=True),
            ffn=layer(MLP, exact=True),
            norm=layer(LayerNorm),
        )

    @property
    def halves(self) -> tuple[Stack, Stack]:
        """The stacks before and after the middle block."""
        half = replace(self.shape, layers=self.shape.layers // 2)
        first, second = layer(Yielding, block=self.block), layer(Receiving, block=self.block)
        return Stack(half, (first,)), Stack(half, (second,))

    def embed(self, noised: dict[str, Any]) -> Array:
        """Label, time and patches [B, L, D] of this device of cp, and under sequence parallelism of
        tp."""
        dtype, E = self.shape.dtype, self.extras
        patches = patchify(with_estimate(self.image, noised), self.image.patch)
        x_BxLxD = self.patches(patches)
        table_LxD = self.positions().astype(dtype)
        x_BxLxD = x_BxLxD + own_rows(table_LxD[E:], "cp", 0)
        time_BxD = time_features(noised["noise"], self.shape.width)
        tokens = jnp.stack([self.label(noised["labels"]), time_BxD], axis=1)
        tokens = jnp.pad(tokens, ((0, 0), (0, self.image.registers), (0, 0)))
        tokens = own_rows(tokens.astype(dtype), "cp", 1) + own_rows(table_LxD[:E], "cp", 0)
        x_BxLxD = jnp.concatenate([tokens, x_BxLxD], axis=1)
        x_BxLxD = own_rows(x_BxLxD, "tp", 1) if self.shape.sequence_parallel else x_BxLxD
        return vary(x_BxLxD, "pp")

    def start(self, noised: dict[str, Any]) -> Array:
        """What the first stage of a pipeline does before its layers."""
        return self.embed(noised)

    def where(self, x_BxLxD: Array, noised: Mapping[str, Any]) -> Where:
        """The place of the tokens of this device of cp: attention reads no positions."""
        n = x_BxLxD.shape[1] * (size("tp") if self.shape.sequence_parallel else 1)
        return Where(layouts.positions(self.layout, n), None)

    def first_half(self, x_BxLxD: Array, noised: dict[str, Any]) -> tuple[Array, Array]:
        """(output, output of every block [N, B, L, D]) of the blocks before the middle."""
        return self.rise(x_BxLxD, (None, self.where(x_BxLxD, noised)), None)

    def middle_block(self, x_BxLxD: Array, noised: dict[str, Any]) -> Array:
        """The middle block."""
        return self.middle(x_BxLxD, (None, self.where(x_BxLxD, noised)), None)[0]

    def second_half(self, x_BxLxD: Array, noised: dict[str, Any], skips_NxBxLxD: Array) -> Array:
        """The blocks after the middle; `skips`: of the blocks before it, in their order."""
        shared = None, self.where(x_BxLxD, noised)
        return self.fall(x_BxLxD, shared, skips_NxBxLxD[::-1])[0]

    def stack(self, x_BxLxD: Array, noised: dict[str, Any], inputs_N: Any = None) -> Array:
        """All blocks and the final norm: the patches [B, L, D] of this device of cp. Raises
        ValueError for layer inputs, which the skips are."""
        if inputs_N is not None:
            raise ValueError("the layer inputs of a U-ViT are its skips: give none")
        x, skips_NxBxLxD = self.first_half(x_BxLxD, noised)
        x = self.second_half(self.middle_block(x, noised), noised, skips_NxBxLxD)
        return self.finish(x, noised)

    def finish(self, x_BxLxD: Array, noised: dict[str, Any]) -> Array:
        """What the last stage of a pipeline does after its layers: the final norm, and the patches
        of all tokens."""
        x = self.norm(x_BxLxD, None)
        x = all_gather(x, "tp", dim=1) if self.shape.sequence_parallel else x
        return x[:, self.extras // size("cp") :]

    def outputs(self, x_BxLxD: Array) -> Array:
        """F: [B, L, D] → float32 [B, H, W, C]."""
        image = unpatchify(self.final(x_BxLxD), self.image.patch, self.image.size)
        return self.smoothing(image)

    def __call__(self, noised: dict[str, Any]) -> Array:
        """`outputs` of `stack` of `embed`."""
        return self.outputs(self.stack(self.embed(noised), noised))

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """The sum of `staged`."""
        return self.staged(rows, degrees).whole

    def staged(self, rows: Rows, degrees: Degrees) -> Staged:
        """Of images; `rows` state their number only."""
        s, image, pixels = self.shape, self.image, self.image.patch**2
        whole, full = replace(rows, length=image.tokens()), replace(rows, length=self.tokens)
        between, inside = hidden_bytes(s, full, degrees)
        start = PatchEmbedding(s, pixels * image.inputs, parent=None).counts(whole, degrees)
        start += LabelEmbedding(s, image.classes, parent=None).counts(rows, degrees)
        start += Counts(self.tokens * s.width, saved=inside)
        finish = Output(s, pixels * image.channels, parent=None).counts(whole, degrees)
        finish += FinalNorm(s, parent=None).counts(full, degrees)
        finish += Smoothing(image.channels, parent=None).counts(image.size, rows, degrees)
        if s.sequence_parallel:
            there, back = entered(s, full, degrees)
            more = Ledger(degrees).add(REDUCE, ("tp",), 4 * self.tokens * s.width)
            each = s.itemsize * rows.batch * self.extras // degrees["cp"] * s.width
            more.add(REDUCE, ("tp",), each)
            start += Counts(backward=Work(sent=more.sent))
            finish += Counts(forward=Work(sent=there), backward=Work(sent=back))
        layers = sum((half.counts(full, degrees) for half in self.halves), Counts())
        middle = of(self.block(s, parent=None), full, degrees)
        return Staged(start, Counts(), layers, finish, message=between, middle=middle)

    def check(self, batch: int, noised: dict[str, Any], degrees: Mapping[str, int]) -> None:
        """Raises ValueError for images and blocks that cannot run `batch` images a device on
        `degrees`, for layers that are not two halves and a middle, the halves shared out over pp,
        and for cost classes that change the tokens."""
        s, costs = self.shape, noised.get("cost", CostClasses())
        if s.layers % 2 == 0:
            raise ValueError(
                f"{s.layers} layers are not two halves and a middle: layers % 2 = 0; set "
                f"model.layers={s.layers + 1}"
            )
        if (half := s.layers // 2) % (pp := degrees["pp"]):
            raise ValueError(
                f"the halves of {s.layers} layers are not shared out over pp: (layers - 1) / 2 % "
                f"mesh.pp = ({s.layers} - 1) / 2 % {pp} = {half % pp}; set "
                f"model.layers={-(-half // pp) * pp * 2 + 1}"
            )
        if any(cost.patch > 1 or cost.group > 1 for cost in costs.classes):
            raise ValueError(
                "a U-ViT has learned positions of one grid of patches: set model.image.coarse=0 "
                "and model.image.dropped=0, or model.kind='dit'"
            )
        check_size(self.image, PLAIN, self.extras, degrees, s.sequence_parallel)
        self.block(s, parent=None).check(batch, self.tokens, degrees)
