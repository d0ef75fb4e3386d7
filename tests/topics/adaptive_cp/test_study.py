"""Topic 3: profiles and masks of known attention, block-sparse evaluation, training on, its arms.

Legend: S positions, W blocks, N layers.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from build import experiment, tiny

from configs.topic3 import get_config
from fdp import loop
from fdp.arm import Arm
from fdp.config import UserError
from fdp.count import hlo
from fdp.count.compare import Comparison, relative_error
from fdp.experiment import Experiment
from fdp.hooks import Hook
from fdp.mesh import make_mesh
from fdp.metrics import read_metrics
from fdp.parallel.context.profile import block_masks, profile
from fdp.sharding import shardings
from fdp.step import TrainStep
from fdp.study.context_switching import Switching, block_ids
from fdp.topics.adaptive_cp import measured, rows, runtime, study
from fdp.topics.adaptive_cp.densities import Densities, history, spearman
from fdp.topics.adaptive_cp.settings import BLOCKS
from tests.study.attending_arm import BLOCK, S, an_arm, tokens, variables


def batch() -> dict:
    return {"tokens": tokens()}


def test_profile_equals_probabilities_done_by_hand() -> None:
    found = profile(an_arm().model, an_arm().objective, variables(), tokens(), BLOCK, 0.9)
    assert found.mass_NxWxW.shape == (2, S // BLOCK, S // BLOCK)
    np.testing.assert_allclose(found.mass_NxWxW.sum(-1), 1, rtol=1e-5)
    assert not np.triu(found.mass_NxWxW, 1).any()
    assert ((found.density_N > 0) & (found.density_N <= 1)).all()
    without_queries = lambda k, p: 0 * p if "w_q" in str(k) else p
    flat = jax.tree_util.tree_map_with_path(without_queries, variables())
    even = profile(
        an_arm().model, an_arm().objective, flat, tokens(), BLOCK, 0.9
    )  # every visible key weighs the same
    rows = np.arange(S)
    expected = (
        np.array(
            [
                [
                    (np.minimum(np.maximum(r + 1 - BLOCK * w, 0), BLOCK) / (r + 1))
                    for w in range(S // BLOCK)
                ]
                for r in rows
            ]
        )
        .reshape(S // BLOCK, BLOCK, -1)
        .mean(1)
    )
    np.testing.assert_allclose(even.mass_NxWxW[0], expected, atol=1e-6)


@pytest.mark.fast
def test_masks_hold_the_coverage_and_nothing_of_the_future() -> None:
    rng = np.random.default_rng(0)
    mass = np.tril(rng.random((3, 16, 16)) ** 8)
    mass /= mass.sum(-1, keepdims=True)
    shares = []
    for coverage in (0.5, 0.9, 1.0):
        masks = block_masks(mass, coverage)
        assert not np.triu(masks, 1).any()
        assert masks[:, np.arange(16), np.arange(16)].all() and masks[:, :, 0].all()
        assert ((mass * masks).sum(-1) >= coverage - 1e-9).all()
        shares.append(masks.mean())
    assert shares[0] < shares[1] < shares[2]
    ids = block_ids(block_masks(mass, 0.5))
    back = np.zeros((3, 16, 17), bool)
    np.put_along_axis(back, np.where(ids < 0, 16, ids), True, -1)
    np.testing.assert_array_equal(back[..., :16], block_masks(mass, 0.5))
    with pytest.raises(ValueError, match="coverage = 0 is no share"):
        block_masks(mass, 0)


def test_all_blocks_are_dense_attention_and_fewer_are_not() -> None:
    W, arm = BLOCKS, an_arm()
    loss = functools.partial(measured.loss_of, arm, variables(), batch())
    dense, layers = loss(None), (2, W, W)
    assert loss(np.broadcast_to(np.tri(W, dtype=bool), layers)) == pytest.approx(dense, rel=1e-6)
    own = np.broadcast_to(np.eye(W, dtype=bool), layers)
    assert loss(own) != pytest.approx(dense, rel=1e-4)
    # The same of lists that the input makes.
    indexed = functools.partial(measured.indexed_loss, arm, variables(), batch())
    assert indexed(W) == pytest.approx(dense, rel=1e-6)
    assert indexed(2) != pytest.approx(dense, rel=1e-4)


def test_training_goes_on_with_plans_as_data_and_leaves_the_arm_as_it_was() -> None:
    """With every block listed, sparse and dense training are the same, whatever plans run."""
    arm = an_arm()
    before = jax.tree.map(np.copy, arm.trained_on_host.params)
    whole = measured.Measured(np.ones((2, BLOCKS, BLOCKS), bool), 1.0, 1.0, 1.0, None, 32, 1.0)
    found = runtime.adapt(arm, whole, 2, windows=2, steps=1)
    assert found.loss == pytest.approx(found.dense_loss, rel=1e-5)
    assert (
        [len(w.plans) for w in found.windows] == [2, 2] and found.steps == 2 and found.switches == 0
    )
    assert all(0.9 < share <= 1 for w in found.windows for share in w.share_N)
    costs, sends = rows.adapted("text", [found])
    assert costs.verdict == "holds" and costs.value == pytest.approx(0, abs=1e-5)
    assert sends.value <= sends.baseline_value
    after = arm.trained_on_host.params
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_densities_of_every_step_are_in_the_rows_of_a_resumed_run(tmp_path: Path) -> None:
    """A run that stops in between and goes on has the rows of one that does not."""
    e = an_arm().experiment
    hook = Hook("densities", 2, Densities(2))

    def train(folder: Path, *stops: int) -> tuple[list[int], np.ndarray]:
        for steps in stops:
            fit = dataclasses.replace(e.fit, steps=steps, checkpoint_every=1, eval_batches=1)
            arm = Arm("text", dataclasses.replace(e, fit=fit, hooks=(hook,)), an_arm().program)
            loop.fit(arm, folder)
        found = history(arm, folder)
        last = profile(
            arm.model, arm.objective, arm.trained_on_host.variables, tokens(), BLOCK, 0.95
        ).density_N
        np.testing.assert_array_equal(found.density_NxT[:, -1], last)
        return found.steps, found.density_NxT

    steps, density_NxT = train(tmp_path / "whole", 5)
    assert steps == [2, 4, 5] and density_NxT.shape == (2, 3)
    assert (density_NxT > 0).all() and (density_NxT <= 1).all()
    again, resumed = train(tmp_path / "resumed", 3, 5)
    assert [s for s in again if s != 3] == steps
    np.testing.assert_array_equal(resumed[:, [s != 3 for s in again]], density_NxT)
    assert all("density" in r for r in read_metrics(tmp_path / "whole") if "hook/densities" in r)
    with pytest.raises(RuntimeError, match="no densities of arm text-s0"):
        history(an_arm(), tmp_path)


@pytest.mark.fast
def test_arms_are_text_recall_with_a_convolution_and_native_sparse_attention() -> None:
    c = get_config("cpu")
    c.data.source = "blank"  # whose text does not matter here
    arms = study.arms(c)
    assert list(arms) == ["text", "mqar", "nsa"]
    assert arms["mqar"].model.shape.conv == 4 and "weights" in arms["mqar"].data.dims
    assert arms["text"].model.shape.conv == 0 and arms["text"].hooks and not arms["nsa"].hooks
    # Dense attention is evaluated where the other ends, under the same learning rates.
    assert arms["text"].fit.eval_every == arms["nsa"].fit.steps == 200
    assert arms["text"].optimizer is arms["nsa"].optimizer


def test_a_profile_larger_than_the_validation_split_is_refused_before_training() -> None:
    c = get_config("tiny")
    c.data.source, c.profile.sequences = "mqar", 86
    said = r"profile.sequences=86: .* 3 × 86 = 258 validation sequences of text, which has 256: set"
    with pytest.raises(UserError, match=said + " profile.sequences=85"):
        study.arms(c)


def test_native_sparse_attention_of_the_study_equals_one_device_over_cp() -> None:
    c = tiny(**{"objective.name": "autoregressive", "data.seq_len": S, "model.kv_heads": 2})
    e, results = study.native_sparse(experiment(c)), []
    for cp in (1, 4):
        degrees = {**e.degrees, "cp": cp}
        p = TrainStep(dataclasses.replace(e, degrees=degrees), make_mesh(degrees))
        noised = jax.jit(p.corrupt)({"tokens": tokens_of(e)}, jax.random.key(0))
        grads = jax.jit(p.grads, compiler_options=hlo.QUICK)
        start = results[0][0] if results else jax.device_get(p.init(0).variables)
        placed = jax.device_put(start, shardings(p.mesh, p.specs.variable_specs()))
        results.append((start, *jax.device_get(grads(placed, noised)[:2])))
    (_, loss, of), (_, loss_4, of_4) = results
    assert abs(loss_4 / loss - 1) <= 1e-5 and relative_error(of_4, of) <= 1e-5


def tokens_of(e: Experiment) -> np.ndarray:
    return e.data.train.take(range(e.fit.batch))["tokens"]


@pytest.mark.fast
def test_compiled_plans_hold_gathers_of_every_size_and_ulysses_where_heads_allow_it() -> None:
    kinds = lambda heads: [(p.kind, p.capacity) for p in runtime.branches(heads, 64)]
    gathers = [("gather", n) for n in (1, 2, 4)]
    assert kinds(8) == [*gathers, ("ulysses", 0), ("all_gather", 0)]
    assert kinds(4) == [*gathers, ("all_gather", 0)]


@pytest.mark.fast
def test_rows_of_plans_as_data_name_every_program_and_fail_for_the_worst() -> None:
    """The values themselves are held by the tests of switching."""
    fixed = Comparison({("all-to-all", ("cp",)): 8.0}, {("all-to-all", ("cp",)): 8.0}, "", 0.0, 0.0)
    good, bad = Switching(1e-7, 1e-6, 5, 1), Switching(1e-7, 2e-4, 4, 2)
    assert [r.verdict for r in rows.switched((good, fixed), [good, good])] == ["holds"] * 4
    found = rows.switched((good, fixed), [good, bad])
    assert [r.verdict for r in found] == ["fails", "fails", "holds", "holds"]
    assert all(name in found[0].note for name in rows.BRANCHES)


def test_rank_correlation() -> None:
    assert spearman(np.array([1, 2, 3]), np.array([2, 4, 9])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    assert spearman(np.ones(3), np.ones(3)) == 1
    assert spearman(np.ones(3), np.arange(3)) == 0
