"""Experiments and programs for tests: a tiny Transformer on random tokens, and a toy that is no
language model.

Legend: B examples, L positions (rows of an image), D width, F hidden, K classes.
"""

from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fdp import config
from fdp.collectives import psum, size, vary
from fdp.data.batches import Arrays, Data
from fdp.experiment import Experiment, Fit, standard
from fdp.mesh import AXES, make_mesh
from fdp.models import module
from fdp.models.module import Module, compact, initializers, stack
from fdp.models.shape import ModelShape
from fdp.models.transformer import Transformer, transformer
from fdp.objectives.base import Objective
from fdp.optimizer import adamw, warmup_cosine
from fdp.parallel.masks import Mask
from fdp.step import TrainStep


@dataclass(frozen=True)
class Ids:
    """What the stock experiment reads of a tokenizer."""

    n_data: int = 60
    eos_id: int = 3
    vocab_size: int = 61


def tokens(c: ml_collections.ConfigDict, n: int | None = None, ids: int = 60) -> np.ndarray:
    """Random token ids int32 [B, L], the same for equal sizes."""
    shape = (n or c.train.batch, c.data.seq_len)
    return np.random.default_rng(0).integers(0, ids, shape, np.int32)


def data(c: ml_collections.ConfigDict, ids: Ids | None = None, **fields: np.ndarray) -> Data:
    """Random tokens as data, with more `fields` [B, L] beside them."""
    ids = ids or Ids()
    arrays = {"tokens": tokens(c, ids=ids.n_data), **fields}
    split = Arrays(arrays, "random tokens", "make more")
    dims = dict.fromkeys(arrays, ("batch", "sequence"))
    tokenizer: Any = ids
    return Data("random", "0" * 64, "none", tokenizer, split, split, dims)


def tiny(**overrides: object) -> ml_collections.ConfigDict:
    """Two layers of width 32 on 8 sequences of 32 tokens; `overrides` by dotted key."""
    c = config.base()
    c.model.update(layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ffn=64, vocab=64)
    c.data.seq_len, c.train.batch, c.train.warmup = 32, 8, 0
    c.update_from_flattened_dict(overrides)
    config.validate(c)
    return c


def experiment(c: ml_collections.ConfigDict, **fields: np.ndarray) -> Experiment:
    """The stock experiment of `c` on random tokens."""
    return standard(c, data(c, **fields))


def program(c: ml_collections.ConfigDict, **fields: np.ndarray) -> TrainStep:
    """Its program on the mesh of `c`."""
    return TrainStep(experiment(c, **fields), make_mesh(c.mesh))


def place(p: TrainStep, batch: dict[str, np.ndarray]) -> Any:
    """A host batch on the program's mesh."""
    return jax.device_put(batch, p.batch_shardings())


SMALL = {"layers": 2, "width": 16, "heads": 8, "kv_heads": 8, "head_dim": 4, "ffn": 16, "vocab": 16}


def model(kind: str = "bidirectional", **sizes: Any) -> Transformer:
    """The stock model of two small layers; `sizes` are fields of its ModelShape."""
    return transformer(ModelShape(**(SMALL | sizes)), Mask(kind))


def blank_input(length: int) -> dict[str, jax.Array]:
    """What a model of tokens is initialised with."""
    return {"inputs": jnp.zeros((1, length), jnp.int32), "noise": jnp.zeros(1)}


def parameters(m: Transformer, length: int, seed: int = 0) -> Any:
    """Initial parameters, global."""
    init = jax.jit(lambda key: module.init(m, key, blank_input(length))["params"])
    return init(jax.random.key(seed))


def drawn(shapes: Any, scale: float = 0.3) -> Any:
    """Normal numbers in the place of an initialisation, which takes long to compile."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: scale * rng.normal(size=s.shape).astype(np.float32), shapes)


def shapes_and_specs(m: Transformer, length: int) -> tuple[Any, Any]:
    """Abstract parameters and their PartitionSpecs."""
    shapes, specs, _ = module.abstract(m, blank_input(length))
    return shapes["params"], specs["params"]


class ToyBlock(Module):
    """A residual block whose hidden layer lies over tp, which reads the mean of its whole sequence
    over cp and keeps a running mean as model state."""

    width: int
    hidden: int

    @compact
    def __call__(self, x_BxLxD: jax.Array, shared: Any, given: Any = None) -> tuple[Any, None]:
        d, f, draw = self.width, self.hidden, initializers.normal(0.3)
        mean_D = self.model_state("mean", jnp.zeros, (d,), (None,))
        ticks_F = self.model_state("ticks", jnp.zeros, (f,), ("tp",))
        w_DxF = self.weight("w_in", draw, (d, f), (None, "tp"))
        w_FxD = self.weight("w_out", draw, (f, d), ("tp", None))
        scale_D = self.weight("scale", initializers.ones, (d,), (None,))
        self.aux("sum", x_BxLxD.sum((0, 1)))
        self.aux("seen", jnp.full((), x_BxLxD.shape[0] * x_BxLxD.shape[1], jnp.float32))
        all_BxD = psum(x_BxLxD.sum(1), "cp") / (x_BxLxD.shape[1] * size("cp"))
        h_BxLxD = (x_BxLxD - mean_D + all_BxD[:, None]) * scale_D
        h_BxLxF = jnp.tanh(h_BxLxD @ w_DxF + 0.01 * ticks_F)
        return x_BxLxD + psum(h_BxLxF @ w_FxD, "tp"), None


class Toy(Module):
    """Class scores of every row of an image [B, L, W, C], whose rows lie over cp."""

    layers: int = 2
    width: int = 8
    hidden: int = 16
    classes: int = 4
    gather: Any = None

    def setup(self) -> None:
        draw = initializers.normal(0.3)
        self.w_embed = self.weight("w_embed", draw, (self.classes, self.width), (None, None))
        self.w_head = self.weight("w_head", draw, (self.width, self.classes), (None, None))
        gather = None if self.gather is None else self.gather("blocks")
        made = stack(ToyBlock, self.layers, None, gather)
        self.blocks = made(self.width, self.hidden, name="blocks")

    def embed(self, noised: dict[str, Any]) -> jax.Array:
        """[B, L, D] of noised["inputs"] [B, L, W, C]."""
        return vary(noised["inputs"].mean(2) @ self.w_embed, "pp")

    def stack(self, x_BxLxD: jax.Array, noised: Any, inputs_N: Any = None) -> jax.Array:
        """All blocks."""
        return self.blocks(x_BxLxD, None, inputs_N)[0]

    def outputs(self, x_BxLxD: jax.Array) -> jax.Array:
        """[B, L, K]."""
        return x_BxLxD @ self.w_head

    def __call__(self, noised: dict[str, Any]) -> jax.Array:
        """[B, L, K]."""
        return self.outputs(self.stack(self.embed(noised), noised))


class Classify(Objective):
    """Weighted cross-entropy of every row of a noisy image; the sum of weights is the count."""

    dims = MappingProxyType({"inputs": ("batch", "sequence", None, None), "rows": ("batch",)})

    def corrupt(self, key: jax.Array, batch: dict[str, Any]) -> Any:
        """Gaussian noise on the image."""
        image = batch["image"]
        rows = {"label": batch["label"], "weight": batch["weight"]}
        return {"inputs": image + jax.random.normal(key, image.shape), "rows": rows}

    def count(self, noised: Any) -> Any:
        """Σ of the weights of all rows."""
        return noised["rows"]["weight"].sum() * noised["inputs"].shape[1]

    def loss(self, outputs: jax.Array, rows: Any) -> jax.Array:
        """[B, L]."""
        chosen = jax.nn.one_hot(rows["label"], outputs.shape[-1])[:, None]
        return -(jax.nn.log_softmax(outputs) * chosen).sum(-1) * rows["weight"][:, None]


def running_mean(state: Any, aux: Any, step: jax.Array) -> Any:
    """A rule: the running mean of what each block sees, and how often it was called."""
    old, new = state["blocks"], aux["blocks"]
    mean = new["sum"] / new["seen"][:, None]
    return {"blocks": {"mean": 0.9 * old["mean"] + 0.1 * mean, "ticks": old["ticks"] + 1}}


def images(n: int, seed: int, what: str = "training images", **fields: np.ndarray) -> Arrays:
    """`n` images f32 [8, 3, 4] whose brightest channel is their label, weights from 0 to 3."""
    draw = np.random.default_rng(seed)
    image = draw.normal(size=(n, 8, 3, 4)).astype(np.float32)
    label = draw.integers(0, 4, n).astype(np.int32)
    image[np.arange(n), ..., label] += 1.0
    weight = draw.integers(0, 4, n).astype(np.float32)
    arrays = {"image": image, "label": label, "weight": weight} | fields
    return Arrays(arrays, what, "make more")


def image_data(train: Arrays | None = None, val: Arrays | None = None) -> Data:
    """96 training and 16 validation images, unless given: 12 steps of 8 see each once."""
    dims = {"image": ("batch", "sequence", None, None), "label": ("batch",), "weight": ("batch",)}
    train = train or images(96, 0)
    val = val or images(16, 1, "validation images")
    return Data("images", "0" * 64, "none", None, train, val, dims)


TOY_FIT = Fit(steps=12, batch=8, eval_every=3, eval_batches=2, checkpoint_every=4, log_every=1)


def toy(*, fit: Fit = TOY_FIT, **changes: Any) -> Experiment:
    """An experiment that is no language model; degrees are those named in `changes` by axis."""
    degrees = {axis: changes.pop(axis, 1) for axis in AXES}
    rate = warmup_cosine(3e-2, 2, fit.steps)
    base = Experiment(
        model=Toy(),
        objective=Classify(),
        data=image_data(),
        optimizer=adamw(rate, beta2=0.95, weight_decay=0.1, clip=1.0),
        degrees=degrees,
        fit=fit,
        rules=(running_mean,),
    )
    return replace(base, **changes)


@cache
def toy_program() -> TrainStep:
    """The toy on two devices, compiled once for all tests of the loop."""
    e = toy(dp=2)
    return TrainStep(e, make_mesh(e.degrees))
