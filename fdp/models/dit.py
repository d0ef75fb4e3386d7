"""Diffusion transformers of images, for every mesh (Peebles & Xie 2022; arXiv 2212.09748).

They are the Transformer's stack and attention between layers of `fdp.models.image`: patches lie
over cp, heads and hidden width over tp, images over (dp, ep).

Legend: B images, H rows (local over cp), W columns, C channels, L tokens (local over cp), K tokens
that the layers see, D width."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import all_gather, size, vary
from fdp.count.counts import REDUCE, Counts, Degrees, Ledger, Rows, Staged, Work, of
from fdp.models.attention import GATHER, Attention, Softmax, Where
from fdp.models.image import (
    FinalNorm,
    ImageShape,
    LabelEmbedding,
    Output,
    PatchEmbedding,
    TimeEmbedding,
    check_size,
    grid,
    own_rows,
    patchify,
    unpatchify,
    with_estimate,
)
from fdp.models.layers import MLP, LayerNorm, Modulation, entered, hidden_bytes
from fdp.models.module import Module, compact, initializers, silu
from fdp.models.shape import ModelShape
from fdp.models.stack import Block, Layer, Stack, layer
from fdp.objectives.cost import PLAIN, CostClass, CostClasses
from fdp.parallel.context import layouts
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.masks import Mask

Array = jax.Array
TOKENS = 2  # that stand for time and label where they are not modulations


class Learned(Module):
    """Vectors that are learned as they are, of these sizes."""

    sizes: tuple[int, ...]

    @compact
    def __call__(self) -> Array:
        axes = (None,) * len(self.sizes)
        return self.weight("token", initializers.normal(0.02), self.sizes, axes, decay=False)


class DiT(Module):
    """From noisy images to F of `fdp.objectives.image`, of the images' shape.

    `pattern`: the blocks of one period. With the shape's time conditioning, time and label modulate
    every block (adaLN-zero). Without, they are two tokens before the patches (in-context). Where
    `image.dropping`, the layers see some tokens only, mask tokens fill the gaps, and one more block
    sees all. `gather`, for ZeRO-3: as in the Transformer."""

    shape: ModelShape
    image: ImageShape
    pattern: tuple[Layer, ...]
    gather: Callable[[str], Any] | None = None

    layout = layouts.CONTIGUOUS

    def setup(self) -> None:
        s, image = self.shape, self.image
        self.patches = [
            PatchEmbedding(s, p * p * image.inputs, name=f"patch_{p}") for p in image.patches
        ]
        self.final = [Output(s, p * p * image.channels, name=f"output_{p}") for p in image.patches]
        self.time, self.label = TimeEmbedding(s), LabelEmbedding(s, image.classes)
        gather = None if self.gather is None else self.gather("layers")
        self.layers = self._main.build(gather, "layers")
        if image.dropping:
            self.mask, self.last = Learned((s.width,)), self.pattern[-1](s)
        if self.extras and image.registers:
            self.registers = Learned((image.registers, s.width))
        self.norm = FinalNorm(s)

    @property
    def _main(self) -> Stack:
        return Stack(self.shape, self.pattern)

    @property
    def extras(self) -> int:
        """Tokens before the patches."""
        return 0 if self.shape.time_conditioning else TOKENS + self.image.registers

    def _conditions(self, noised: Mapping[str, Any]) -> tuple[Array, Array]:
        return self.time(noised["noise"]), self.label(noised["labels"])

    def features(self, noised: Mapping[str, Any]) -> Array | None:
        """What the modulations read, f32 [B, D]; None without time conditioning."""
        if not self.shape.time_conditioning:
            return None
        time_BxD, label_BxD = self._conditions(noised)
        return silu(time_BxD + label_BxD)

    def _positions(self, cost: CostClass) -> Array:
        """Of this device's patches, f32 [L, D]."""
        whole = grid(self.image.tokens(cost), self.shape.width, cost.patch)
        return own_rows(jnp.asarray(whole), "cp", 0)

    def embed(self, noised: dict[str, Any]) -> Array:
        """Tokens [B, K, D] of noised["inputs"], f32 [B, H, W, C]; under sequence parallelism this
        device's."""
        cost = _cost(noised)
        edge, dtype = self.image.patch * cost.patch, self.shape.dtype
        if self.is_initializing():
            self._touch_all(noised)
        patches = patchify(with_estimate(self.image, noised), edge)
        x_BxLxD = self.patches[cost.patch - 1](patches) + self._positions(cost).astype(dtype)
        x_BxKxD = _kept(x_BxLxD, noised, cost, edge)
        if self.extras:
            tokens = jnp.stack(self._conditions(noised), axis=1)
            if self.image.registers:
                learned = jnp.broadcast_to(self.registers(), (len(tokens), *self.registers.sizes))
                tokens = jnp.concatenate([tokens, learned], axis=1)
            tokens = own_rows(tokens.astype(dtype), "cp", 1)
            x_BxKxD = jnp.concatenate([tokens, x_BxKxD], axis=1)
        if self.shape.sequence_parallel:
            x_BxKxD = own_rows(x_BxKxD, "tp", 1)
        return vary(x_BxKxD, "pp")

    def _touch_all(self, noised: dict[str, Any]) -> None:
        """Make the parameters of all patch sizes, whichever the example has."""
        for p, patches, final in zip(self.image.patches, self.patches, self.final, strict=True):
            x = patches(patchify(with_estimate(self.image, noised), p))
            final(x)

    def stack(self, x_BxKxD: Array, noised: dict[str, Any], inputs_N: Any = None) -> Array:
        """`finish` of `blocks`."""
        features_BxD = self.features(noised)
        x_BxKxD = self._blocks(x_BxKxD, noised, features_BxD, inputs_N)
        return self._finish(x_BxKxD, noised, features_BxD)

    def start(self, noised: dict[str, Any]) -> Array:
        """What the first stage of a pipeline does before its layers."""
        return self.embed(noised)

    def blocks(self, x_BxKxD: Array, noised: dict[str, Any], inputs_N: Any = None) -> Array:
        """The layers of a stage of a pipeline, or all: [B, K, D]."""
        return self._blocks(x_BxKxD, noised, self.features(noised), inputs_N)

    def finish(self, x_BxKxD: Array, noised: dict[str, Any]) -> Array:
        """What the last stage does after its layers: the patches [B, L, D] of this device of cp
        after the final norm, under sequence parallelism all of its tokens."""
        return self._finish(x_BxKxD, noised, self.features(noised))

    def _blocks(self, x: Array, noised: Any, features_BxD: Array | None, inputs_N: Any) -> Array:
        self._main.check_inputs(inputs_N)
        return self.layers(x, (features_BxD, self._where(x, noised)), inputs_N)[0]

    def _finish(self, x: Array, noised: Any, features_BxD: Array | None) -> Array:
        if self.image.dropping:
            x = self._filled(x, noised, _cost(noised))
            x, _ = self.last(x, (features_BxD, self._where(x, noised)), None)
        x = self.norm(x, features_BxD)
        x = all_gather(x, "tp", dim=1) if self.shape.sequence_parallel else x
        return x[:, self.extras // size("cp") :]

    def _where(self, x_BxKxD: Array, noised: Mapping[str, Any]) -> Where:
        """The places of the tokens; attention reads no positions."""
        ways = size("tp") if self.shape.sequence_parallel else 1
        index = layouts.positions(self.layout, x_BxKxD.shape[1] * ways)
        return Where(index, None, noise=noised.get("sigma"))

    def _filled(self, x_BxKxD: Array, noised: Any, cost: CostClass) -> Array:
        """All tokens [B, L, D], mask tokens in the place of dropped ones."""
        g, mask_D = cost.group, self.mask()
        if g == 1:
            return x_BxKxD
        position_LxD = self._positions(cost)
        choice_BxK = _choices(noised, cost, self.image.patch * cost.patch)
        if self.shape.sequence_parallel:
            mask_D = vary(mask_D, "tp")
            choice_BxK, position_LxD = (
                own_rows(choice_BxK, "tp", 1),
                own_rows(position_LxD, "tp", 0),
            )
        empty_LxD = (position_LxD + mask_D).astype(x_BxKxD.dtype)
        here = (choice_BxK[..., None] == jnp.arange(g))[..., None]
        empty = empty_LxD.reshape(-1, g, empty_LxD.shape[-1])
        x = jnp.where(here, x_BxKxD[:, :, None], empty)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def outputs(self, x_BxLxD: Array) -> Array:
        """F: [B, L, D] → float32 [B, H, W, C]. The number of tokens tells the patch."""
        edge = self.image.edge(x_BxLxD.shape[1] * size("cp"))
        out = self.final[self.image.patches.index(edge)](x_BxLxD)
        return unpatchify(out, edge, self.image.size)

    def __call__(self, noised: dict[str, Any]) -> Array:
        """`outputs` of `stack` of `embed`."""
        return self.outputs(self.stack(self.embed(noised), noised))

    def counts(self, rows: Rows, degrees: Degrees, cost: CostClass = PLAIN) -> Counts:
        """The sum of `staged`."""
        return self.staged(rows, degrees, cost).whole

    def staged(self, rows: Rows, degrees: Degrees, cost: CostClass = PLAIN) -> Staged:
        """Of images of one cost class; `rows` state their number only. Modulations are computed
        from time and label wherever they are read."""
        s, image, cp = self.shape, self.image, degrees["cp"]
        edge, extras = image.patch * cost.patch, self.extras
        whole = replace(rows, length=image.tokens(cost))
        seen = replace(rows, length=image.tokens(cost, kept=True) + extras)
        between, inside = hidden_bytes(s, seen, degrees)
        start, finish = Counts(saved=inside), Counts()
        for p in image.patches:  # the parameters of all sizes, the work of one
            one = PatchEmbedding(s, p * p * image.inputs, parent=None).counts(whole, degrees)
            out = Output(s, p * p * image.channels, parent=None).counts(whole, degrees)
            start += one if p == edge else Counts(one.parameters)
            finish += out if p == edge else Counts(out.parameters)
        shared = TimeEmbedding(s, parent=None).counts(rows, degrees)
        shared += LabelEmbedding(s, image.classes, parent=None).counts(rows, degrees)
        if extras and s.sequence_parallel:  # of the tokens that are not data
            each = s.itemsize * rows.batch * extras // cp * s.width
            start += Counts(backward=Work(sent=Ledger(degrees).add(REDUCE, ("tp",), each).sent))
        if extras:
            start += Counts(image.registers * s.width)
        layers = self._main.counts(seen, degrees)
        finish += self._finished(replace(seen, length=image.tokens(cost) + extras), degrees, cost)
        if not s.time_conditioning:
            again = Counts(again=shared.forward - shared.last)  # before their backward pass
            return Staged(start + shared, Counts(), layers, finish, again, between)
        return Staged(start, shared, layers, finish, shared, between)

    def _finished(self, full: Rows, degrees: Degrees, cost: CostClass) -> Counts:
        """Mask tokens with the block that sees all, and the final norm."""
        s = self.shape
        found = FinalNorm(s, parent=None).counts(full, degrees)
        if self.image.dropping:
            found += of(self.pattern[-1](s, parent=None), full, degrees) + self._mask(cost, degrees)
        if s.sequence_parallel:
            there, back = entered(s, full, degrees)
            found += Counts(forward=Work(sent=there), backward=Work(sent=back))
        return found

    def _mask(self, cost: CostClass, degrees: Degrees) -> Counts:
        s, ledger = self.shape, Ledger(degrees)
        if s.sequence_parallel and cost.group > 1:
            ledger.add(REDUCE, ("tp",), 4 * s.width)
        return Counts(s.width, backward=Work(sent=ledger.sent))

    def check(self, batch: int, noised: dict[str, Any], degrees: Mapping[str, int]) -> None:
        """Raises ValueError for images, cost classes and blocks that cannot run `batch` images a
        device on `degrees`."""
        costs: CostClasses = noised.get("cost", CostClasses())
        check_batch(batch, costs)
        for cost in costs.classes:
            check_size(self.image, cost, self.extras, degrees, self.shape.sequence_parallel)
            length = self.image.tokens(cost, kept=True) + self.extras
            for block in set(self.pattern):
                block(self.shape, parent=None).check(batch, length, degrees)

    @property
    def stock(self) -> bool:
        """Whether this is the stock Transformer."""
        return False


def check_batch(batch: int, costs: CostClasses) -> None:
    """Raises ValueError unless a device's images are whole patterns of cost classes."""
    unit = len(costs.pattern)
    if batch % unit:
        raise ValueError(
            f"images of a microbatch on a device are not whole patterns of cost classes: {batch} % "
            f"{unit}; set train.batch to a multiple of dp·ep·microbatches·{unit}"
        )


def _cost(noised: Mapping[str, Any]) -> CostClass:
    """The class of a batch; of an example of one row with several classes the first."""
    costs: CostClasses = noised.get("cost", CostClasses())
    return costs.pattern[0] if len(noised["inputs"]) == 1 else costs.only


def _choices(noised: Mapping[str, Any], cost: CostClass, edge: int) -> Array:
    """Which token of each group is kept, int32 [B, K]."""
    kept_BxHxW = noised["kept"][:, ::edge]
    columns = kept_BxHxW.shape[2] // edge // cost.group
    return kept_BxHxW[:, :, :columns].reshape(kept_BxHxW.shape[0], -1) % cost.group


def _kept(x_BxLxD: Array, noised: Mapping[str, Any], cost: CostClass, edge: int) -> Array:
    """The kept tokens [B, K, D]; groups are neighbours in a row."""
    if cost.group == 1:
        return x_BxLxD
    choice_BxK = _choices(noised, cost, edge)
    x = x_BxLxD.reshape(x_BxLxD.shape[0], -1, cost.group, x_BxLxD.shape[-1])
    return jnp.take_along_axis(x, choice_BxK[..., None, None], axis=2)[:, :, 0]


def block(shape: ModelShape, plan: CommPlan = GATHER, ffn: Layer | None = None) -> Layer:
    """A block of DiT: layer norms, modulated with the shape's time conditioning, attention with
    biases and an MLP, or `ffn`."""
    return layer(
        Block,
        mixing=layer(Attention, core=Softmax(Mask("bidirectional"), plan), bias_out=True),
        ffn=ffn or layer(MLP),
        norm=layer(LayerNorm, affine=not shape.time_conditioning),
        modulation=layer(Modulation, features=shape.width, bias=True),
    )


def dit(
    shape: ModelShape, image: ImageShape, plan: CommPlan = GATHER, moe: Layer | None = None
) -> DiT:
    """The stock DiT; without the shape's time conditioning in-context. `moe`: the FFN of every
    `shape.moe_every`-th layer."""
    dense = block(shape, plan)
    if moe is None:
        return DiT(shape, image, (dense,))
    return DiT(shape, image, (dense,) * (shape.moe_every - 1) + (block(shape, plan, moe),))
