"""Steps without a barrier between them are those of one device."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from fdp import config
from fdp.count.compare import relative_error
from fdp.data.batches import blank
from fdp.experiment import standard
from fdp.mesh import make_mesh
from fdp.mpmd_steps import StagedSteps
from fdp.parallel.pipeline.fixed import gpipe, zb_h1, zb_h2, zbv
from fdp.parallel.pipeline.orders import Op, Order, repeat
from fdp.parallel.pipeline.table import STEPPED, ticks
from fdp.step import TrainStep

L, V, BATCH, MICRO, STEPS = 8, 64, 8, 4, 4
TINY = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 32, "vocab": V}
CLIP = 1.8  # between the norms of the steps
FREE = repeat(zb_h2(2, MICRO), STEPS)


def experiment(pp: int, **changes):
    c = config.base()
    c.model.update(TINY)
    c.objective.name = "mdlm"
    c.data.seq_len, c.mesh.pp = L, pp
    c.train.update(batch=BATCH, microbatches=MICRO, warmup=0, clip=CLIP)
    c.update_from_flattened_dict(changes)
    return standard(c, blank(L, V))


class Given(TrainStep):
    """Trains on batches that are corrupted already."""

    def corrupt(self, batch, key):
        return batch


def one_device(steps: int, spoilt: int = -1, **changes):
    """(first state, corrupted batches, last state, losses and norms) of training on one device. A
    weight of batch `spoilt` is infinite."""
    e = experiment(1, **changes)
    plain = Given(e, make_mesh(e.degrees))
    draw, rng = jax.jit(super(Given, plain).corrupt), np.random.default_rng(1)
    noised = []
    for k in range(steps):
        tokens = rng.integers(0, V - 2, (BATCH, L)).astype(np.int32)
        batch = jax.device_get(draw({"tokens": tokens}, jax.random.key(k)))
        if k == spoilt:
            weights = batch["rows"]["weights"]
            batch["rows"]["weights"] = np.where(weights > 0, np.float32(np.inf), weights)
        noised.append(batch)
    first = state = plain.init(0)
    step, told = jax.jit(plain.train_step), []
    for batch in noised:
        state, metrics = step(state, batch)
        told.append((metrics["loss"], metrics["grad_norm"]))
    return first, noised, state, np.array(told).T


def errors(got, want):
    """Relative errors of (parameters, optimizer state)."""
    pairs = (got.params, want.params), (got.opt_state, want.opt_state)
    return [relative_error(a, b) for a, b in map(jax.device_get, pairs)]


def test_three_ways_to_clip():
    """Steps 0 and 1 are clipped, step 2 is not finite, step 3 is neither."""
    first, noised, want, (losses, norms) = one_device(STEPS, spoilt=2)
    assert min(norms[:2]) > CLIP > norms[3] and want.skipped == 1
    staged = StagedSteps(experiment(2), FREE)
    assert not staged.shared
    found = {}
    for clipping in ("barrier", "validated", "delayed"):
        found[clipping] = staged.train(first, noised, clipping)
        updates = [e for e in staged.groups.events() if e.op.startswith("U")]
        assert len(updates) == 2 * (STEPS + len(found[clipping][1].rolled))
    for clipping in ("barrier", "validated"):
        got, told = found[clipping]
        assert max(errors(got, want)) < 1e-6
        assert (got.step, got.skipped) == (STEPS, 1)
        np.testing.assert_allclose(told.losses, losses, rtol=1e-6)
        np.testing.assert_allclose(told.norms, norms, rtol=1e-6)
        np.testing.assert_array_equal(told.skipped, [False, False, True, False])
    assert found["barrier"][1].rolled == found["delayed"][1].rolled == ()
    assert found["validated"][1].rolled == (0, 1, 2)
    assert found["validated"][1].again >= 3
    assert errors(found["delayed"][0], want)[0] > 1e-5

    # Without a barrier the first stage is in the next step before the last one has updated.
    for clipping, before in (("validated", True), ("delayed", True), ("barrier", False)):
        tasks = staged.tasks(clipping)
        for k in range(STEPS - 1):
            begun, ended = tasks.index(("F", 0, MICRO * (k + 1))), tasks.index(("U", 1, k))
            assert (begun < ended) == before


def test_parameters_of_several_stages():
    """The head is the embedding, and every block reads the noise embedding; stages have meshes."""
    changes = {"model.tied": True, "model.time_conditioning": True, "train.microbatches": 1}
    first, noised, want, _ = one_device(2, **changes)
    meshes = {"mesh.dp": 2, "mesh.tp": 2, "train.zero": 1}
    staged = StagedSteps(experiment(2, **changes, **meshes), repeat(gpipe(2, 1), 2))
    assert any("embed/" in name for name in staged.shared)
    assert any("noise_embedding/" in name for name in staged.shared)
    assert staged.tasks("validated") == staged.tasks("barrier")
    got, told = staged.train(first, noised, "validated")
    assert max(errors(got, want)) < 1e-6
    assert told.again == 0


def test_a_rule_of_whole_trees_is_refused():
    e = experiment(2)
    whole = replace(e.optimizer, elementwise=False)
    with pytest.raises(ValueError, match=r"elementwise.* use fdp\.optimizer\.adamw"):
        StagedSteps(replace(e, optimizer=whole), FREE)


def test_what_is_refused():
    ops = [list(x) for x in repeat(zb_h1(2, MICRO), 2).ops]
    early = ops[1].index(Op("U", 0))
    ops[1][early - 1 : early + 1] = reversed(ops[1][early - 1 : early + 1])
    swapped = Order(FREE.placement, tuple(map(tuple, ops)), 2)
    row = rf"stage 1, row {early - 1}: U0 of chunk 0 is too early: it needs W3 of chunk 0"
    with pytest.raises(ValueError, match=row):
        StagedSteps(experiment(2), swapped)
    # A U of one chunk before the last W of another: only a barrier forbids it.
    ops = [list(x) for x in repeat(zbv(2, 2), 2).ops]
    soon = ops[0].index(Op("W", 1, 1)) + 1
    ops[0].insert(soon, ops[0].pop(ops[0].index(Op("U", 0, 1))))
    mixed = Order(zbv(2, 2).placement, tuple(map(tuple, ops)), 2)
    assert len(ticks(mixed, STEPPED)) == len(mixed)
    with pytest.raises(ValueError, match=rf"stage 0, row {soon}: U0 of chunk 1 waits for the last"):
        ticks(mixed, STEPPED, barrier=True)
    with pytest.raises(ValueError, match="1 rules change the model state"):
        StagedSteps(replace(experiment(2), rules=(lambda state, aux, step: state,)), FREE)
    staged = StagedSteps(experiment(2), FREE)
    with pytest.raises(ValueError, match="clipping='none': choose one of barrier, delayed, "):
        staged.train(None, [], "none")
    with pytest.raises(ValueError, match="0 batches for an order of 4 steps"):
        staged.train(None, [])
