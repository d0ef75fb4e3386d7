"""Samples from a trained arm: the same parameters, laid out for generation.

Legend: B sequences, L positions.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fdp import sharding
from fdp.arm import Arm
from fdp.collectives import shard_map
from fdp.mesh import AXES, BATCH_AXES
from fdp.models import module
from fdp.objectives import Autoregressive, BlockDiffusion, SEDDUniform
from fdp.sampling import autoregressive
from fdp.sampling.masked import first_hitting
from fdp.sampling.score import analytic_uniform

P = PartitionSpec


def generation_mesh(mesh: Mesh) -> Mesh:
    """The same devices with dp·ep·cp folded into dp: samples are short and independent, so cp has
    nothing to split.
    """
    shape = (
        mesh.shape["pp"],
        mesh.size // (mesh.shape["pp"] * mesh.shape["tp"]),
        1,
        1,
        mesh.shape["tp"],
    )
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=mesh.axis_types)


def draw(arm: Arm, count: int, mesh: Mesh | None = None) -> np.ndarray:
    """`count` sequences int32 [B, L] from arm.state at temperature 1: equal ids on every mesh for
    equal seeds.

    `mesh`: where to draw, by default the arm's.

    First-hitting for masked objectives (no factorisation error; block by block for block
    diffusion), left to right for autoregressive ones, as many analytic steps as positions for
    uniform noise."""
    mesh = generation_mesh(mesh or arm.mesh)
    specs = arm.program.specs.specs
    params = jax.device_put(arm.trained_on_host.params, sharding.shardings(mesh, specs))
    ways = mesh.shape["dp"]

    sampler = jax.jit(shard_map(_method(arm), mesh, (specs, P(BATCH_AXES)), P(BATCH_AXES)))
    return np.asarray(sampler(params, jnp.arange(-(-count // ways) * ways)))[:count]


def _method(arm: Arm) -> Any:
    """(params, sample_ids_B) → ids_BxL by the sampler that suits the arm's objective."""
    objective, model, length = arm.objective, arm.model, arm.data.seq_len
    key = jax.random.key(arm.seed)

    def run(params: Any, *args: Any, method: str) -> Any:
        return module.run(model, {"params": params}, *args, method=method)[0]

    def logits_at(params: Any, ids_BxL: jax.Array, i: jax.Array) -> Any:
        hidden_BxLxD = run(params, ids_BxL, jnp.zeros(ids_BxL.shape[0]), method="hidden")
        return run(params, hidden_BxLxD[:, i], method="outputs")

    if isinstance(objective, Autoregressive):
        return lambda params, ids: autoregressive.sample(
            lambda z, i: logits_at(params, z, i),
            key,
            ids,
            length,
            objective.bos,
            n_ids=objective.n_ids,
        )[0]

    def denoise(params: Any) -> Any:
        def logits(z_BxL: jax.Array, noise_B: jax.Array) -> Any:
            if isinstance(objective, BlockDiffusion):
                # The clean half is the state itself: a block sees only earlier blocks of it, which
                # are already revealed.
                z_BxL = jnp.concatenate([z_BxL, z_BxL], 1)
            hidden = run(params, z_BxL, noise_B, method="hidden")
            return run(params, hidden[:, :length], method="outputs")

        return logits

    options: dict[str, Any] = {"n_ids": objective.n_ids}
    if isinstance(objective, SEDDUniform):
        options |= {"steps": length, "schedule": objective.schedule}
        return lambda params, ids: analytic_uniform(denoise(params), key, ids, length, **options)[0]
    if isinstance(objective, BlockDiffusion):
        options["block"] = objective.block
    return lambda params, ids: first_hitting(denoise(params), key, ids, length, **options)[0]
