"""Experiments and programs for tests: a tiny Transformer on random tokens."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fdp import config
from fdp.data.batches import Arrays, Data
from fdp.experiment import Experiment, standard
from fdp.kernels_pallas.masks import Mask
from fdp.mesh import make_mesh
from fdp.models import module
from fdp.models.shape import ModelShape
from fdp.models.transformer import Transformer, transformer
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


def shapes_and_specs(m: Transformer, length: int) -> tuple[Any, Any]:
    """Abstract parameters and their PartitionSpecs."""
    shapes, specs, _ = module.abstract(m, blank_input(length))
    return shapes["params"], specs["params"]
