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
from fdp.mesh import AXES, BATCH_AXES
from fdp.models import module
from fdp.models.module import spec_leaf
from fdp.objectives import DDPM, Autoregressive, BlockDiffusion, Flow, ImageObjective, SEDDUniform
from fdp.sampling.autoregressive import sample
from fdp.sampling.image import SAMPLERS, ImageDraw, clipped, guided, karras, straight, strided
from fdp.sampling.masked import first_hitting
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
    diffusion), autoregressive ones go from left to right, and uniform noise takes as many analytic
    steps as there are positions."""
    mesh = generation_mesh(mesh)
    variables = process.place(variables, sharding.shardings(mesh, specs))
    ways = mesh.shape["dp"]

    sampler = jax.jit(shard_map(_method(e), mesh, (specs, P(BATCH_AXES)), P(BATCH_AXES)))
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

    def sampled(variables: Any, key: jax.Array, ids_B: jax.Array, labels_B: jax.Array) -> jax.Array:
        asked = ImageDraw(key, ids_B, (image.size, image.size, image.channels))
        denoiser = partial(objective.denoiser, partial(predict, variables))
        denoise = guided(denoiser, labels_B, objective.classes, job.guidance)
        return SAMPLERS[job.method](clipped(denoise, 1.0), asked, sigmas)[0]

    rows = P(BATCH_AXES)
    given = job.specs.tree, P(), rows, rows
    return shard_map(sampled, job.mesh, given, rows)(variables, key, ids_B, labels_B)


def noise_levels(objective: ImageObjective, steps: int) -> np.ndarray:
    """The grid on which the objective's model is sampled: f64 [steps + 1]. Raises ValueError for a
    number of steps that it has not."""
    if isinstance(objective, DDPM):
        return strided(objective.sigmas, steps)
    return straight(steps, 200.0) if isinstance(objective, Flow) else karras(steps, 0.002, 80.0)


def _method(e: Experiment) -> Any:
    """The sampler of the objective: (variables, sample_ids_B) → ids_BxL."""
    objective: Any = e.objective
    model, length = e.model, e.data.seq_len

    def run(variables: Any, *args: Any, method: str) -> Any:
        return module.run(model, variables, *args, method=method)[0]

    def logits_at(variables: Any, ids_BxL: jax.Array, i: jax.Array) -> Any:
        hidden_BxLxD = run(variables, ids_BxL, jnp.zeros(ids_BxL.shape[0]), method="hidden")
        return run(variables, hidden_BxLxD[:, i], method="outputs")

    def logits(variables: Any, z_BxL: jax.Array, noise_B: jax.Array) -> Any:
        if isinstance(objective, BlockDiffusion):
            # The clean half is the state itself: a block sees only earlier blocks of it, which are
            # already revealed.
            z_BxL = jnp.concatenate([z_BxL, z_BxL], 1)
        hidden = run(variables, z_BxL, noise_B, method="hidden")
        return run(variables, hidden[:, :length], method="outputs")

    def sampled(variables: Any, sample_ids_B: jax.Array) -> jax.Array:
        draw = Draw(jax.random.key(e.fit.seed), sample_ids_B, length, objective.n_ids)
        if isinstance(objective, Autoregressive):
            return sample(partial(logits_at, variables), draw, objective.bos)[0]
        denoise = partial(logits, variables)
        if isinstance(objective, SEDDUniform):
            return analytic_uniform(denoise, draw, steps=length, schedule=objective.schedule)[0]
        block = objective.block if isinstance(objective, BlockDiffusion) else None
        return first_hitting(denoise, draw, block=block)[0]

    return sampled
