"""Score entropy: equal to masked diffusion plus a penalty, zero at true ratios, and the
leave-one-out optimum.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.objectives.mdlm import MDLM
from fdp.objectives.sedd import SEDDAbsorbing, SEDDUniform, uniform_ratio
from tests.oracles import EnumerableJoint, score_of_mean

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("form", ["t", "k"])
def test_absorbing_is_mdlm_plus_a_penalty_for_a_score_that_is_not_normalised(form):
    n = 7
    logits = jax.random.normal(jax.random.key(0), (6, 10, 12)) * 2
    batch = SEDDAbsorbing(n, form).corrupt(
        jax.random.key(1), {"tokens": jnp.zeros((6, 10), jnp.int32) + jnp.arange(10) % n}
    )
    c = np.exp(np.asarray(logits, np.float64))[..., :n].sum(-1) / n
    penalty = np.asarray(batch["rows"]["weights"], np.float64) * (c - 1 - np.log(c))
    sedd, mdlm = (o(n, form).loss(logits, batch["rows"]) for o in (SEDDAbsorbing, MDLM))
    np.testing.assert_allclose(sedd, mdlm + penalty, rtol=2e-5, atol=2e-5)
    assert (penalty >= 0).all()
    assert penalty.max() > 1


def test_absorbing_matches_the_score_entropy_of_the_paper():
    """σ'·[Σ_y s_y - κ log s_x + κ(log κ - 1)] with the rate, κ and s written out."""
    n, t = 5, np.array([0.1, 0.5, 0.9])
    objective = SEDDAbsorbing(n, "t")
    sigma = -np.log1p(-(1 - 1e-3) * t)
    rate, kappa = (1 - 1e-3) / (1 - (1 - 1e-3) * t), 1 / np.expm1(sigma)
    logits = np.random.default_rng(0).normal(size=(3, n))
    score = np.exp(logits) * kappa[:, None] / n
    target = np.array([0, 3, 4])
    paper = rate * (
        score.sum(1) - kappa * np.log(score[range(3), target]) + kappa * (np.log(kappa) - 1)
    )
    rows = {
        "targets": jnp.asarray(target),
        "weights": objective.schedule.weight(jnp.asarray(t, jnp.float32)),
    }
    np.testing.assert_allclose(
        objective.loss(jnp.asarray(logits, jnp.float32), rows), paper, rtol=1e-5, atol=1e-6
    )


def rows_at(target, noisy, sigma, n):
    """Rows of unit weight for given clean and noisy ids."""
    return {
        "targets": jnp.asarray(target),
        "noisy": jnp.asarray(noisy),
        "weights": jnp.ones(np.shape(target)),
        "ratio": uniform_ratio(jnp.asarray(sigma, jnp.float32), n),
    }


def test_uniform_loss_is_zero_at_true_ratios_and_positive_elsewhere():
    n = 6
    target, noisy = (a.reshape(-1) for a in np.meshgrid(np.arange(n), np.arange(n)))
    for sigma in (1e-2, 0.3, 2.0, 10.0):
        rows = rows_at(target, noisy, np.full(n * n, sigma), n)
        transition = np.exp(-sigma) * np.eye(n) - np.expm1(-sigma) / n  # [clean, noisy]
        true = jnp.asarray(
            np.log(transition[target] / transition[target, noisy][:, None]), jnp.float32
        )
        scale = float(uniform_ratio(jnp.float32(sigma), n))
        loss = SEDDUniform(n).loss(true, rows)
        np.testing.assert_allclose(loss, 0, atol=1e-5 * scale)
        wrong = true + jax.random.normal(jax.random.key(0), true.shape) * 0.5
        assert (SEDDUniform(n).loss(wrong, rows) > 1e-5).all()
        # The column of the noisy id, padding and the mask column are not read.
        junk = jnp.concatenate(
            [true.at[np.arange(n * n), noisy].set(33.0), jnp.full((n * n, 3), 9.0)], 1
        )
        np.testing.assert_array_equal(SEDDUniform(n).loss(junk, rows), loss)


def nelbo_one_token(p, x, mean):
    """∫ dσ E_z loss for a sequence of one token x, by quadrature in log σ; `mean(sigma, z) ->
    probs` is the model.
    """
    n, grid = len(p), np.linspace(np.log(1e-5), np.log(30), 6000)
    sigma = np.exp(grid).astype(np.float32)
    total = np.zeros(len(grid))
    for z in range(n):
        noisy = np.full(len(grid), z)
        probs = jnp.asarray(np.stack([mean(s, z) for s in np.float64(sigma)]), jnp.float32)
        logits = score_of_mean(jnp.log(probs), jnp.asarray(noisy), jnp.asarray(sigma), n)
        loss = SEDDUniform(n).loss(logits, rows_at(np.full(len(grid), x), noisy, sigma, n))
        chance = np.exp(-np.float64(sigma)) * (z == x) - np.expm1(-np.float64(sigma)) / n
        total += chance * np.asarray(loss, np.float64)
    return np.trapezoid(total * sigma, grid)


def udlm_one_token(p, x, mean):
    """The same integral in the published mean parametrisation (Sahoo et al. 2025, Duo), in f64."""
    n, grid = len(p), np.linspace(np.log(1e-6), np.log(35), 4000)
    total = []
    for sigma in np.exp(grid):
        a, value = np.exp(-sigma), 0.0
        clean = n * a * np.eye(n)[x] + 1 - a
        for z in range(n):
            model = n * a * mean(sigma, z) + 1 - a
            ratios = clean / clean[z]
            bracket = (
                n / clean[z] - n / model[z] - (ratios * np.log(model[z] / model * ratios)).sum()
            )
            value -= clean[z] / n * bracket / n
        total.append(value * sigma)
    return np.trapezoid(total, grid)


def test_uniform_optimum_is_the_leave_one_out_law_not_the_posterior():
    p = np.array([0.5, 0.3, 0.15, 0.05])

    def posterior(sigma, z):
        joint = p * (np.exp(-sigma) * np.eye(4)[z] - np.expm1(-sigma) / 4)
        return joint / joint.sum()

    assert nelbo_one_token(p, 0, lambda sigma, z: p) == pytest.approx(np.log(2), abs=2e-3)
    assert udlm_one_token(p, 0, lambda sigma, z: p) == pytest.approx(np.log(2), abs=1e-4)
    assert nelbo_one_token(p, 0, posterior) == pytest.approx(
        udlm_one_token(p, 0, posterior), abs=2e-3
    )
    assert nelbo_one_token(p, 0, posterior) == pytest.approx(1.523, abs=3e-3)


def test_uniform_nelbo_of_the_exact_law_is_the_nll_for_each_token():
    p = np.array([0.6, 0.3, 0.1])
    for x in range(3):
        assert nelbo_one_token(p, x, lambda sigma, z: p) == pytest.approx(-np.log(p[x]), abs=3e-3)


def test_uniform_estimate_of_the_exact_score_is_unbiased():
    """A whole sequence: scores from the joint, E over t and noise of `corrupt` + `loss` against
    -log p(x).
    """
    joint = EnumerableJoint(n=3, length=2)
    objective = SEDDUniform(3)
    every = np.stack(np.unravel_index(np.arange(9), (3, 3)), 1)
    x_BxL = np.repeat(every[[0, 4, 7, 8]], 64, 0)

    def log_score(z_BxL, sigma_B):
        one = (
            jnp.exp(-sigma_B)[:, None, None] * jnp.eye(3) - (jnp.expm1(-sigma_B) / 3)[:, None, None]
        )
        law = jnp.einsum("uv,bux,bvy->bxy", jnp.asarray(joint.table, jnp.float32), one, one)
        here = jnp.arange(len(z_BxL))
        rows = jnp.stack([law[here, :, z_BxL[:, 1]], law[here, z_BxL[:, 0]]], 1)
        return jnp.log(rows) - jnp.log(law[here, z_BxL[:, 0], z_BxL[:, 1]])[:, None, None]

    def estimate(key):
        batch = objective.corrupt(key, {"tokens": x_BxL})
        loss = objective.loss(log_score(batch["inputs"], batch["noise"]), batch["rows"])
        return loss.sum(1).reshape(4, 64).mean(1)

    draws = np.asarray(
        jax.jit(lambda k: jax.lax.map(estimate, k))(jax.random.split(jax.random.key(0), 1500))
    )
    z = (draws.mean(0) - joint.nll(every[[0, 4, 7, 8]])) / (draws.std(0) / 1500**0.5)
    assert (abs(z) < 4).all(), z


def test_uniform_corruption():
    objective = SEDDUniform(5)
    tokens = jnp.zeros((64, 50), jnp.int32)
    batch = objective.corrupt(jax.random.key(0), {"tokens": tokens})
    noisy, sigma = np.asarray(batch["inputs"]), np.asarray(batch["noise"])
    assert noisy.min() == 0
    assert noisy.max() == 4
    expected = -np.expm1(-sigma) * 4 / 5  # a moved token keeps its id one time in five
    assert abs((noisy != 0).mean() - expected.mean()) < 0.02
    assert set(batch["rows"]) == {"targets", "weights", "noisy", "ratio"}
    assert all(row.shape == (64, 50) for row in batch["rows"].values())
    assert objective.capacity(64, 50, 4, 2) is None  # every position carries loss
