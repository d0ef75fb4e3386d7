"""Four unbiased estimators of one NELBO on trained parameters: how much do they scatter for the
same batch?

Legend: B sequences, L positions, R noise draws.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fdp import process
from fdp.arm import Arm
from fdp.collectives import psum, shard_map
from fdp.data.batches import eval_batches
from fdp.objectives.mdlm import MDLM
from fdp.sharding import batch_specs
from fdp.step import LOSS_AXES, P, stages

BASELINE, METHOD = "iid t", "antithetic exact k"
ESTIMATORS: dict[str, dict[str, Any]] = {
    BASELINE: {"form": "t", "antithetic": False},
    "antithetic t": {"form": "t", "antithetic": True},
    "iid exact k": {"form": "k", "antithetic": False},
    METHOD: {"form": "k", "antithetic": True},
}
CHUNK = 16  # draws in one program: few calls, and the queue of multi-device programs stays short


@dataclass(frozen=True)
class Scatter:
    """Losses of one batch in nats per token, one a noise draw, by estimator: {name: f64 [R]}."""

    losses: dict[str, np.ndarray]

    def variance(self, name: str) -> float:
        """Of a single draw."""
        return float(self.losses[name].var(ddof=1))

    def gap(self) -> tuple[float, float]:
        """Mean of METHOD less that of BASELINE, and the variance of that difference of means."""
        a, b = self.losses[METHOD], self.losses[BASELINE]
        return float(a.mean() - b.mean()), float(a.var(ddof=1) / a.size + b.var(ddof=1) / b.size)


def scatter(arm: Arm, draws: int) -> Scatter:
    """`draws` noise draws of every estimator on the first validation batch, two or more; every row
    through the head.
    """
    (host,) = eval_batches(arm.data.val, arm.experiment.fit.batch, 1)
    batch, params = arm.place(host), arm.trained.params
    assert isinstance(arm.objective, MDLM)
    found = {}
    for name, options in ESTIMATORS.items():
        objective = dataclasses.replace(arm.objective, **options)
        run = jax.jit(functools.partial(_losses, arm, objective))
        keys_R = jax.random.split(jax.random.key(arm.seed), math.ceil(draws / CHUNK) * CHUNK)
        parts = [
            process.fetch(run(params, batch, keys_R[i : i + CHUNK]))
            for i in range(0, len(keys_R), CHUNK)
        ]
        found[name] = np.concatenate(parts).astype(np.float64)[:draws]
    return Scatter(found)


def _losses(
    arm: Arm, objective: MDLM, params: Any, batch: dict[str, jax.Array], keys_R: jax.Array
) -> jax.Array:
    """Mean loss of the batch in nats per token under each key: f32 [R]."""
    whole = stages(arm.model, objective, {}, 1)

    def local(params: Any, noised: Any) -> jax.Array:
        return psum(whole.loss(params, noised)[0], LOSS_AXES)

    def one(key: jax.Array) -> jax.Array:
        noised = objective.corrupt(key, batch)
        specs = (arm.program.specs.specs, batch_specs(noised, objective.dims))
        return shard_map(local, arm.mesh, specs, P())(params, noised) / objective.count(noised)

    return jax.lax.map(one, keys_R)


def z_score(scatters: list[Scatter]) -> float:
    """Difference of the two estimators' means over all seeds, in standard errors: a bias would make
    it large.
    """
    gaps = [s.gap() for s in scatters]
    return sum(g for g, _ in gaps) / math.sqrt(sum(v for _, v in gaps))
