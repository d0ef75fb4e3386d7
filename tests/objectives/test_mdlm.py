"""Masked diffusion: exact identities on an enumerable joint, unbiasedness, variance, balance and
capacity.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from fdp.collectives import index
from fdp.data.synthetic import MarkovChain
from fdp.objectives import base
from fdp.objectives.mdlm import MDLM, mask_exact_k, masked_capacity
from fdp.objectives.noise_schedules import schedule
from tests.oracles import EnumerableJoint, nelbo_exact

pytestmark = pytest.mark.fast

JOINT = EnumerableJoint()
EVERY_X = np.stack(np.unravel_index(np.arange(81), JOINT.table.shape), 1).astype(np.int32)


def rough(z_BxL):
    """A fixed denoiser that is wrong, so that its NELBO is above the NLL and the estimators have
    variance.
    """
    return jax.nn.log_softmax(jnp.maximum(0.4 * JOINT.denoiser(z_BxL), -3.0), axis=-1)


def test_exact_conditionals_have_nelbo_equal_to_nll_for_every_sequence():
    with jax.enable_x64(True):
        nelbo = nelbo_exact(JOINT.denoiser, EVERY_X, 3)
    np.testing.assert_allclose(nelbo, JOINT.nll(EVERY_X), rtol=0, atol=2e-14)
    assert (nelbo_exact(rough, EVERY_X, 3) * JOINT.table.reshape(-1)).sum() > 1.02 * (
        JOINT.nll(EVERY_X) * JOINT.table.reshape(-1)
    ).sum()


def test_the_loss_function_itself_meets_the_identity():
    """`loss` with weights L/k over every mask: weighting, masking, suppression and cross entropy
    together.
    """
    objective = MDLM(n_ids=3)
    masks = np.array(list(itertools.product([False, True], repeat=4)))[1:]
    x = np.repeat(EVERY_X[:, None], 15, 1)
    sizes = masks.sum(1)
    weights = np.broadcast_to(np.where(masks, 4 / sizes[:, None], 0), x.shape).astype(np.float32)
    logits = JOINT.denoiser(np.where(masks, 3, x).reshape(-1, 4)).reshape(81, 15, 4, 3)
    logits = jnp.concatenate([logits, jnp.full((81, 15, 4, 5), 7.0)], -1)
    loss = np.asarray(
        objective.loss(logits, {"targets": jnp.asarray(x), "weights": jnp.asarray(weights)})
    ).sum(-1)
    subsets = np.array([np.sum(sizes == k) for k in sizes])
    np.testing.assert_allclose((loss / (4 * subsets)).sum(1), JOINT.nll(EVERY_X), rtol=3e-6)


ESTIMATORS = {
    "k": MDLM(3, "k"),
    "k iid": MDLM(3, "k", antithetic=False),
    "t": MDLM(3, "t", schedule("linear", eps=0.0)),
    "t iid": MDLM(3, "t", schedule("linear", eps=0.0), antithetic=False),
    "t md4_cosine": MDLM(3, "t", schedule("md4_cosine", eps=0.0)),
    "t mdlm_cosine": MDLM(3, "t", schedule("mdlm_cosine", eps=0.0)),
    "t poly2": MDLM(3, "t", schedule("poly2", eps=0.0)),
    "t geometric": MDLM(3, "t", schedule("geometric")),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_unbiased_for_each_row_of_a_fixed_batch(name):
    """z-test against enumeration; B = 6 is no power of two, and every row on its own must be
    unbiased.
    """
    objective, n = ESTIMATORS[name], 6000
    x_BxL = EVERY_X[[5, 17, 33, 48, 60, 77]]

    def estimate(key):
        batch = objective.corrupt(key, {"tokens": x_BxL})
        return objective.loss(rough(batch["inputs"]), batch["rows"]).sum(1)

    draws = np.asarray(
        jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(1), n)), np.float64
    )
    exact = nelbo_exact(rough, x_BxL, 3)
    z_rows = (draws.mean(0) - exact) / (draws.std(0) / n**0.5)
    z_batch = (draws.mean(1).mean() - exact.mean()) / (draws.mean(1).std() / n**0.5)
    assert abs(z_batch) < 4
    assert (abs(z_rows) < 4).all()


def test_stratified_counts_have_a_fifth_of_the_variance_of_independent_times():
    chain = MarkovChain()
    x_BxL = jnp.asarray(chain.sample(0, 0, 64, 32))

    def spread(objective):
        def estimate(key):
            batch = objective.corrupt(key, {"tokens": x_BxL})
            return objective.loss(chain.denoiser(batch["inputs"]), batch["rows"]).sum() / x_BxL.size

        return np.asarray(
            jax.jit(lambda k: jax.lax.map(estimate, k))(jax.random.split(jax.random.key(0), 300))
        ).std()

    ours, independent = spread(MDLM(27, "k")), spread(MDLM(27, "t", antithetic=False))
    assert independent**2 > 5 * ours**2, (independent, ours)


def test_exact_k_masks_are_exact_and_uniform_over_subsets():
    masks = np.asarray(mask_exact_k(jax.random.key(0), jnp.full(12000, 2), 4))
    assert (masks.sum(1) == 2).all()
    counts = np.unique(masks @ (1 << np.arange(4)), return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 2000) ** 2 / 2000).sum() < 25  # chi-square, 5 degrees of freedom
    np.testing.assert_array_equal(
        mask_exact_k(jax.random.key(0), jnp.arange(9), 8).sum(1), np.arange(9)
    )


@pytest.mark.parametrize("batch", [1, 2, 7, 49, 98, 103, 107, 196, 197, 256])
def test_strata_are_each_used_once_for_any_batch(batch):
    t = np.sort(np.asarray(base.stratified_uniform(jax.random.key(batch), batch), np.float64))
    assert t.shape == (batch,)
    np.testing.assert_array_equal(
        np.clip(np.floor(t * batch + 1e-4), 0, batch - 1), np.arange(batch)
    )
    np.testing.assert_allclose(np.diff(t), 1 / batch, atol=1e-6)
    k = np.sort(np.asarray(base.stratified_counts(jax.random.key(batch), batch, 64)))
    assert k[0] >= 1
    assert k[-1] <= 64
    assert k.sum() == pytest.approx(batch * 32.5, abs=batch / 2 + 32.5)


def test_each_rows_count_is_uniform():
    keys = jax.random.split(jax.random.key(3), 8000)
    k_NxB = np.asarray(jax.vmap(lambda key: base.stratified_counts(key, 12, 5))(keys))
    for row in k_NxB.T:
        assert ((np.bincount(row, minlength=6)[1:] - 1600) ** 2 / 1600).sum() < 25


@given(
    st.integers(1, 7),
    st.integers(0, 6).map(lambda e: 2**e),
    st.integers(1, 96),
    st.integers(0, 2**31 - 1),
)
@settings(max_examples=60, deadline=None)
def test_capacity_is_never_exceeded(odd, shards, length, seed):
    """A numpy replay of `stratified_counts` at random shifts and offsets, with random masks cut
    over the sequence.
    """
    odd, rng = 2 * (odd // 2) + 1, np.random.default_rng(seed)
    batch = odd * shards * 2 ** int(rng.integers(0, 2))
    seq_shards = [s for s in (1, 2, 4) if length % s == 0][-1]
    columns = batch & -batch
    order = base.shifted_order(
        batch, int(rng.integers(columns)), int(rng.integers(batch // columns))
    )
    k = 1 + (order * length + int(rng.integers(length))) // batch
    mask = rng.random((batch, length)).argsort(1) < k[:, None]
    held = mask.reshape(shards, batch // shards, seq_shards, -1).sum((1, 3))
    assert held.max() <= masked_capacity(batch, length, shards, seq_shards)
    assert held.sum(1).max() <= masked_capacity(batch, length, shards)


@pytest.mark.parametrize(
    ("batch", "shards"), [(8, 2), (8, 8), (12, 4), (6, 3), (10, 5), (20, 4), (5, 1)]
)
def test_capacity_is_attained_and_never_exceeded_over_all_draws(batch, shards):
    length, columns = 12, batch & -batch
    worst = 0
    for xor, turn, v in itertools.product(range(columns), range(batch // columns), range(length)):
        k = 1 + (base.shifted_order(batch, xor, turn) * length + v) // batch
        worst = max(worst, k.reshape(shards, -1).sum(1).max())
    assert worst == masked_capacity(batch, length, shards)


def test_capacity_is_about_half_the_rows_on_every_power_of_two_split():
    for batch, shards in itertools.product((64, 96, 512, 768), (1, 2, 4, 8, 16)):
        ideal = (batch + 1) * 1024 / 2 / shards
        assert ideal <= masked_capacity(batch, 1024, shards) <= 1.01 * ideal
    assert masked_capacity(1, 64, 1) == 64
    with pytest.raises(ValueError, match="must divide"):
        masked_capacity(10, 64, 4)
    assert MDLM(9, "t").capacity(8, 32, 2) == 4 * 32
    assert MDLM(9, "k").capacity(8, 32, 2) == masked_capacity(8, 32, 2)


def test_real_draws_stay_within_capacity():
    objective = MDLM(5)
    count = jax.jit(
        lambda key: (
            objective.corrupt(key, {"tokens": jnp.zeros((16, 24), jnp.int32)})["rows"]["weights"]
            > 0
        ).sum(1)
    )
    for seed in range(50):
        k = np.asarray(count(jax.random.key(seed)))
        for shards in (1, 2, 4, 8):
            assert k.reshape(shards, -1).sum(1).max() <= masked_capacity(16, 24, shards)


@pytest.mark.parametrize("form", ["t", "k"])
def test_permuting_or_padding_the_batch_leaves_each_row_alone(form):
    objective = MDLM(3, form)
    batch = objective.corrupt(jax.random.key(0), {"tokens": EVERY_X[:10]})
    loss = lambda b: objective.loss(rough(b["inputs"]), b["rows"])
    order = np.random.default_rng(0).permutation(10)
    shuffled = jax.tree.map(lambda a: a[order], batch)
    np.testing.assert_array_equal(loss(shuffled), loss(batch)[order])
    padded = jax.tree.map(lambda a: jnp.pad(a, [(0, 6)] + [(0, 0)] * (a.ndim - 1)), batch)
    np.testing.assert_allclose(loss(padded)[:10], loss(batch), rtol=1e-6)
    assert (loss(padded)[10:] == 0).all()


def test_corruption_is_consistent():
    for form, antithetic in itertools.product("tk", (True, False)):
        batch = MDLM(3, form, antithetic=antithetic).corrupt(
            jax.random.key(2), {"tokens": EVERY_X[:16]}
        )
        masked = np.asarray(batch["inputs"] == 3)
        np.testing.assert_array_equal(masked, np.asarray(batch["rows"]["weights"]) > 0)
        np.testing.assert_array_equal(np.where(masked, EVERY_X[:16], batch["inputs"]), EVERY_X[:16])
        if form == "k":
            np.testing.assert_allclose(masked.mean(1), batch["noise"])
            np.testing.assert_allclose(np.asarray(batch["rows"]["weights"]).sum(1), 4, rtol=1e-6)
    with pytest.raises(ValueError, match="'t'"):
        MDLM(3, "K")


@pytest.mark.parametrize("tp", [2, 8])
def test_loss_and_gradient_do_not_depend_on_the_vocabulary_shards(tp):
    from fdp.objectives.sedd import SEDDAbsorbing, SEDDUniform

    axes = ("pp", "dp", "ep", "cp", "tp")
    mesh = jax.make_mesh(
        (1, 1, 1, 1, tp),
        axes,
        axis_types=(jax.sharding.AxisType.Auto,) * 5,
        devices=jax.devices()[:tp],
    )
    logits = jax.random.normal(jax.random.key(0), (4, 6, 16)) * 2
    tokens = jax.random.randint(jax.random.key(1), (4, 6), 0, 11)
    for objective in (MDLM(11), SEDDAbsorbing(11), SEDDUniform(11)):
        rows = objective.corrupt(jax.random.key(2), {"tokens": tokens})["rows"]
        total = lambda l, r, o=objective: o.loss(l, r).sum()
        sharded = jax.jit(
            jax.shard_map(
                jax.value_and_grad(total),
                mesh=mesh,
                in_specs=(P(None, None, "tp"), P()),
                out_specs=(P(), P(None, None, "tp")),
                check_vma=True,
            )
        )
        value, grad = jax.value_and_grad(total)(logits, rows)
        got_value, got_grad = sharded(logits, rows)
        np.testing.assert_allclose(got_value, value, rtol=1e-5)
        np.testing.assert_allclose(got_grad, grad, rtol=1e-4, atol=1e-5 * float(abs(grad).max()))
    assert index("tp") == 0
