"""Topic 1, training: sharded losses, the head on masked rows, the estimators of the loss (T1.1 to
T1.3).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import shard_map
from fdp.count.compare import outcome
from fdp.data.batches import Arrays
from fdp.mesh import AXES, make_mesh
from fdp.models import module
from fdp.parallel.tensor import cross_entropy
from fdp.step import TrainStep
from fdp.topics.parallel_dlm import estimators, head
from tests.topics.parallel_dlm.arms import IDS, L, an_arm, tiny


def weights() -> Any:
    return {"params": an_arm().trained_on_host.params, "state": {}}


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_loss_and_gradients_equal_one_device_for_every_tp(tp: int) -> None:
    batch = {"tokens": np.random.default_rng(0).integers(0, IDS, (8, L), np.int32)}
    whole = outcome(an_arm().program, weights(), batch)
    e = tiny(**{"mesh.tp": tp})
    split = outcome(TrainStep(e, make_mesh(e.degrees)), weights(), batch)
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
    for a, b in zip(jax.tree.leaves(split.grads), jax.tree.leaves(whole.grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.fast
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_vocabulary_parallel_loss_is_the_sum_of_shards_done_by_hand(tp: int) -> None:
    rng = np.random.default_rng(tp)
    logits, targets = rng.normal(0, 3, (5, 32)).astype(np.float32), rng.integers(0, 32, 5)
    shards = np.split(logits.astype(np.float64), tp, axis=1)
    top = np.max([s.max(1) for s in shards], 0)
    exponentials = sum(np.exp(s - top[:, None]).sum(1) for s in shards)
    width = 32 // tp
    picked = sum(
        np.where(targets // width == r, s[np.arange(5), targets % width] - top, 0.0)
        for r, s in enumerate(shards)
    )
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": tp})
    loss = jax.jit(shard_map(cross_entropy, mesh, (P(None, "tp"), P()), P()))
    ours = loss(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(ours, np.log(exponentials) - picked, rtol=1e-5)


def test_masked_rows_head_is_the_full_head_on_those_rows() -> None:
    arm = an_arm()
    batch = {"tokens": np.random.default_rng(1).integers(0, IDS, (8, L), np.int32)}
    noised = arm.program.corrupt(batch, jax.random.key(3))
    logits, _, _ = module.run(arm.model, weights(), noised)
    full = arm.objective.loss(logits, noised["rows"])
    saving = head.head_saving(arm.program, batch)
    assert saving.loss_error < 1e-6
    assert saving.flops[0] < saving.flops[1]
    assert saving.masked_rows / saving.every_row <= 0.6
    assert float(full[noised["rows"]["weights"] == 0].sum()) == 0


def test_scatter_tells_the_estimators_apart() -> None:
    ids = np.random.default_rng(0).integers(0, IDS, (8, L)).astype(np.int32)
    arm, val = an_arm(), Arrays({"tokens": ids}, "random ids", "draw more")
    data = dataclasses.replace(arm.data, train=val, val=val)
    arm.experiment = dataclasses.replace(arm.experiment, data=data)
    found = estimators.scatter(arm, 40)
    assert {name: x.shape for name, x in found.losses.items()} == dict.fromkeys(
        estimators.ESTIMATORS, (40,)
    )
    assert found.variance(estimators.BASELINE) > 2 * found.variance(estimators.METHOD)
    assert abs(estimators.z_score([found])) < 4
    biased = estimators.Scatter(
        found.losses | {estimators.METHOD: 1.5 * found.losses[estimators.METHOD]}
    )
    assert abs(estimators.z_score([biased])) > 4
