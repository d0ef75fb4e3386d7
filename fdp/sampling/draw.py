"""Samples from trained parameters, which are moved to a mesh for generation.

Legend: B sequences or images, L positions, H rows, W columns, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fdp import process, sharding
from fdp.collectives import shard_map
from fdp.experiment import Experiment
from fdp.keys import UserError
from fdp.mesh import AXES, BATCH_AXES
from fdp.models import module
from fdp.models.module import spec_leaf
from fdp.objectives import (
    DDPM,
    Autoregressive,
    BlockDiffusion,
    Flow,
    ImageObjective,
    SEDDUniform,
    TokenObjective,
)
from fdp.sampling import block_cache
from fdp.sampling.autoregressive import LeftToRight, sample
from fdp.sampling.block_cache import BlockCache, cacheable
from fdp.sampling.chain import Chain, Denoise, Info, follow
from fdp.sampling.image import SAMPLERS, ImageDraw, clipped, guided, karras, straight, strided
from fdp.sampling.noise import Draw
from fdp.sampling.score import analytic_uniform

P = PartitionSpec


def generation_mesh(mesh: Mesh) -> Mesh:
    """The same devices with pp·dp·ep·cp folded into dp: samples are short and independent, so cp
    has nothing to split, and a step of a sampler is one microbatch.
    """
    shape = (1, mesh.size // mesh.shape["tp"], 1, 1, mesh.shape["tp"])
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=mesh.axis_types)


def draw(e: Experiment, variables: Any, specs: Any, count: int, mesh: Mesh) -> np.ndarray:
    """`count` sequences int32 [B, L] of the experiment's seed and temperature 1, equal ids on every
    mesh. `variables` {"params", "state"} with their PartitionSpecs; `mesh`: whose devices draw.

    Masked objectives use first-hitting (without factorisation error; block by block for block
    diffusion, with a cache of finished blocks where the model allows one), autoregressive ones go
    from left to right, and uniform noise takes as many analytic steps as there are positions."""
    mesh = generation_mesh(mesh)
    variables = process.place(variables, sharding.shardings(mesh, specs))
    ways, objective = mesh.shape["dp"], e.objective
    assert isinstance(objective, TokenObjective)

    def drawn(variables: Any, ids_B: jax.Array) -> jax.Array:
        key = jax.random.key(e.fit.seed)
        asked = Draw(key, ids_B, e.data.seq_len, objective.n_ids)
        if isinstance(objective, BlockDiffusion) and cacheable(e.model):
            cache = BlockCache(e.model)
            return block_cache.sample(cache, variables, chain_of(e, asked))[0]
        return sampled(e, variables, asked)[0]

    sampler = jax.jit(shard_map(drawn, mesh, (specs, P(BATCH_AXES)), P(BATCH_AXES)))
    return process.fetch(sampler(variables, jnp.arange(-(-count // ways) * ways)))[:count]


def draw_images(
    e: Experiment,
    variables: Any,
    specs: Any,
    labels: Sequence[int],
    mesh: Mesh,
    *,
    steps: int,
    guidance: float = 1.0,
    method: str = "heun",
) -> np.ndarray:
    """One image f32 [B, H, W, C] of each of the `labels` (the number of classes stands for none),
    of the experiment's seed, equal on every mesh up to rounding. `variables` as in `draw`.
    `method`: one of SAMPLERS. Estimates are kept within the ±1 of images."""
    assert isinstance(e.objective, ImageObjective)
    mesh = generation_mesh(mesh)
    variables = process.place(variables, sharding.shardings(mesh, specs))
    count, ways = len(labels), mesh.shape["dp"]
    labels_B = np.resize(np.asarray(labels, np.int32), -(-count // ways) * ways)
    key, ids_B = jax.random.key(e.fit.seed), np.arange(len(labels_B))
    job = _ImageJob(e.model, e.objective, mesh, _Specs.of(specs), steps, guidance, method)
    return process.fetch(_images(job, variables, key, ids_B, labels_B))[:count]


@dataclass(frozen=True)
class _Specs:
    """A tree of PartitionSpecs that can be compared."""

    leaves: tuple[PartitionSpec, ...]
    structure: Any

    @classmethod
    def of(cls, specs: Any) -> "_Specs":
        leaves, structure = jax.tree.flatten(specs, is_leaf=spec_leaf)
        return cls(tuple(leaves), structure)

    @property
    def tree(self) -> Any:
        return jax.tree.unflatten(self.structure, self.leaves)


class _ImageJob(NamedTuple):
    """What a compiled sampler of images depends on: hooks draw again and again."""

    model: module.Module
    objective: ImageObjective
    mesh: Mesh
    specs: _Specs
    steps: int
    guidance: float
    method: str


@partial(jax.jit, static_argnums=0)
def _images(job: _ImageJob, variables: Any, key: Any, ids_B: Any, labels_B: Any) -> jax.Array:
    model: Any = job.model
    objective, image = job.objective, model.image
    sigmas = noise_levels(objective, job.steps)

    def predict(variables: Any, noised: Any) -> jax.Array:
        return module.run(model, variables, noised)[0]

    def drawn(variables: Any, key: jax.Array, ids_B: jax.Array, labels_B: jax.Array) -> jax.Array:
        asked = ImageDraw(key, ids_B, (image.size, image.size, image.channels))
        denoiser = partial(objective.denoiser, partial(predict, variables))
        denoise = guided(denoiser, labels_B, objective.classes, job.guidance)
        return SAMPLERS[job.method](clipped(denoise, 1.0), asked, sigmas)[0]

    rows = P(BATCH_AXES)
    given = job.specs.tree, P(), rows, rows
    return shard_map(drawn, job.mesh, given, rows)(variables, key, ids_B, labels_B)


def noise_levels(objective: ImageObjective, steps: int) -> np.ndarray:
    """The grid on which the objective's model is sampled: f64 [steps + 1]. Raises ValueError for a
    number of steps that it has not."""
    if isinstance(objective, DDPM):
        return strided(objective.sigmas, steps)
    return straight(steps, 200.0) if isinstance(objective, Flow) else karras(steps, 0.002, 80.0)


def chain_of(e: Experiment, draw: Draw, order: str = "random") -> Chain:
    """The sampler of an experiment's objective as a chain. `order`: of masked objectives, one of
    `chain.ORDERS`; random is first-hitting, block by block for block diffusion. Autoregressive
    ones go from left to right. Raises UserError for an objective without a chain."""
    objective = e.objective
    if isinstance(objective, Autoregressive):
        return LeftToRight(draw)
    if isinstance(objective, SEDDUniform) or not isinstance(objective, TokenObjective):
        raise UserError(
            f"objective {type(objective).__name__} has no chain, because its steps change tokens "
            "that stand already: take a run of mdlm, sedd_absorbing, block_diffusion or "
            "autoregressive"
        )
    block = objective.block if isinstance(objective, BlockDiffusion) else None
    return Chain(draw, order, block=block)


def denoiser_of(e: Experiment, variables: Any) -> Denoise:
    """What an experiment's model says of a state (z_BxL, noise_B): logits f32 [B, L, V/tp]. Of an
    autoregressive one, each position is predicted from those before it."""
    objective: Any = e.objective

    def denoise(z_BxL: jax.Array, noise_B: jax.Array) -> jax.Array:
        length = z_BxL.shape[1]
        if isinstance(objective, Autoregressive):
            # What is masked lies behind the positions that are asked for, and must not matter.
            known_BxL = jnp.where(z_BxL == objective.n_ids, objective.bos, z_BxL)
            z_BxL = jnp.roll(known_BxL, 1, axis=1).at[:, 0].set(objective.bos)
            noise_B = jnp.zeros_like(noise_B)
        if isinstance(objective, BlockDiffusion):
            # The clean half is the state itself: a block sees only earlier blocks of it, which are
            # already revealed.
            z_BxL = jnp.concatenate([z_BxL, z_BxL], 1)
        hidden = _run(e, variables, z_BxL, noise_B, method="hidden")
        return _run(e, variables, hidden[:, :length], method="outputs")

    return denoise


def sampled(
    e: Experiment, variables: Any, draw: Draw, order: str = "random"
) -> tuple[jax.Array, Info]:
    """(ids int32 [B, L], info) by the sampler of the objective: its chain, or as many analytic
    steps as there are positions for uniform noise."""
    objective: Any = e.objective
    if isinstance(objective, SEDDUniform):
        denoise, schedule = denoiser_of(e, variables), objective.schedule
        return analytic_uniform(denoise, draw, steps=draw.length, schedule=schedule)
    if isinstance(objective, Autoregressive) and draw.start_BxL is None:
        # The ids of the chain, with one position a step through the output head.
        return sample(partial(_logits_at, e, variables), draw, objective.bos)
    return follow(chain_of(e, draw, order), denoiser_of(e, variables))


def _run(e: Experiment, variables: Any, *args: Any, method: str) -> Any:
    return module.run(e.model, variables, *args, method=method)[0]


def _logits_at(e: Experiment, variables: Any, ids_BxL: jax.Array, i: jax.Array) -> Any:
    hidden_BxLxD = _run(e, variables, ids_BxL, jnp.zeros(ids_BxL.shape[0]), method="hidden")
    return _run(e, variables, hidden_BxLxD[:, i], method="outputs")
