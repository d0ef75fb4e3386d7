"""Objectives of images against a mixture of Gaussians, and cost classes of samples."""

from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fdp.count.compare import relative_error
from fdp.data.synthetic import GaussianMixture
from fdp.models import module
from fdp.models.dit import dit
from fdp.models.image import ImageShape
from fdp.models.shape import ModelShape
from fdp.objectives import DDPM, EDM, CostLaw, Flow, ImageObjective
from fdp.objectives.cost import CostClass, CostClasses
from fdp.step import stages

pytestmark = pytest.mark.fast
MIX = GaussianMixture(size=4, channels=2, classes=3, spread=0.3)
OBJECTIVES: dict[str, ImageObjective] = {
    "epsilon": DDPM(3),
    "v·cosine": DDPM(3, predict="v", beta="cosine", steps=100),
    "edm": EDM(3),
    "flow": Flow(3),
}
LAW = CostLaw(coarse=Fraction(1, 2), dropped=Fraction(1, 4), group=2, twice=True)
SHAPE = ModelShape(
    layers=1, width=8, heads=2, kv_heads=2, head_dim=4, ffn=8, vocab=8, time_conditioning=True
)


def batch(n: int, size: int = 4) -> dict[str, Any]:
    return dict(replace(MIX, size=size).sample(0, n))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_network_beats_the_exact_denoiser(name: str) -> None:
    """The network that the exact denoiser amounts to has the loss that theory gives, and gives the
    denoiser back."""
    objective = replace(OBJECTIVES[name], drop=0.0)
    noised = jax.jit(objective.corrupt)(jax.random.key(0), batch(4096))
    c = jax.tree.map(
        lambda x: x[:, None, None, None], objective.coefficients(noised["sigma"])._asdict()
    )

    def network(noised: Any) -> jax.Array:
        z = noised["inputs"] / c["c_in"]
        exact = MIX.denoise(z, noised["sigma"], noised["labels"])
        return (exact - c["c_skip"] * z) / c["c_out"]

    outputs = network(noised)
    floor = np.mean(MIX.floor(np.asarray(noised["sigma"])) / np.asarray(c["c_out"]).ravel() ** 2)
    loss = float(objective.loss(outputs, noised["rows"]).sum() / objective.count(noised))
    assert loss == pytest.approx(floor, rel=0.02)
    for worse in (0.9 * outputs, outputs + 0.1):
        assert objective.loss(worse, noised["rows"]).mean() > 1.005 * loss
    z = noised["inputs"] / c["c_in"]
    denoise = objective.denoiser(network, noised["labels"])
    want = MIX.denoise(z, noised["sigma"], noised["labels"])
    np.testing.assert_allclose(denoise(z, noised["sigma"], z), want, atol=2e-4)


def test_targets_are_those_of_the_papers() -> None:
    x, noise, sigma_B = jnp.full((1, 1, 1, 1), 0.5), jnp.full((1, 1, 1, 1), 2.0), jnp.array([0.75])
    a, s = 0.8, 0.6  # √ᾱ and √(1 - ᾱ)
    found = {n: o.noised(x, noise, sigma_B) for n, o in OBJECTIVES.items()}
    assert float(found["epsilon"]["rows"].squeeze()) == pytest.approx(2.0)
    assert float(found["epsilon"]["inputs"].squeeze()) == pytest.approx(a * 0.5 + s * 2.0)
    assert float(found["v·cosine"]["rows"].squeeze()) == pytest.approx(a * 2.0 - s * 0.5)
    t = 0.75 / 1.75
    assert float(found["flow"]["rows"].squeeze()) == pytest.approx(2.0 - 0.5)
    assert float(found["flow"]["inputs"].squeeze()) == pytest.approx((1 - t) * 0.5 + t * 2.0)
    total = 0.75**2 + 0.25
    skip, out = 0.25 / total, 0.75 * 0.5 / np.sqrt(total)
    want = (0.5 - skip * (0.5 + 0.75 * 2)) / out
    assert float(found["edm"]["rows"].squeeze()) == pytest.approx(want)
    assert DDPM(3).alpha_bar[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    assert DDPM(3, beta="cosine").alpha_bar[499] == pytest.approx(0.4940, rel=1e-3)
    with pytest.raises(ValueError, match="must be 'epsilon' or 'v'"):
        DDPM(3, predict="x")


def test_levels_have_the_law_that_is_stated() -> None:
    for objective, law in ((EDM(3), stats.norm(-1.2, 1.2)), (Flow(3), stats.norm(0, 1))):
        sigma = np.asarray(jax.jit(objective.corrupt)(jax.random.key(1), batch(512))["sigma"])
        assert stats.kstest(np.log(sigma), law.cdf).statistic < 0.01  # stratified
    one = jax.jit(Flow(3).corrupt)(jax.random.key(1), batch(512))
    dropped = np.asarray(one["labels"]) == 3
    assert 0.05 < dropped.mean() < 0.16
    again = jax.jit(Flow(3).corrupt)(jax.random.key(1), batch(512))
    np.testing.assert_array_equal(one["labels"], again["labels"])
    other = jax.jit(Flow(3).corrupt)(jax.random.key(2), batch(512))
    assert (dropped != (np.asarray(other["labels"]) == 3)).any()


# Cost classes
# -------------------------------------------------------------------------------------------------


def test_a_batch_repeats_its_pattern_of_classes() -> None:
    """Every contiguous share of whole patterns has as many rows of each class, whose noise is that
    of the class."""
    fine, coarse = CostClass(), CostClass(patch=2)
    both = CostClass(patch=2, group=2)
    pattern = [replace(c, twice=t) for c in (fine, fine, coarse, both) for t in (False, True)]
    assert LAW.costs.pattern == tuple(pattern) and LAW.ranks == 4
    noised = jax.jit(Flow(3, law=LAW).corrupt)(jax.random.key(0), batch(32))
    rank = np.asarray(noised["sigma"]).argsort().argsort() // 8
    np.testing.assert_array_equal(rank.reshape(4, 8), [[0, 0, 1, 1, 2, 2, 3, 3]] * 4)
    parts = noised["cost"].parts(noised)
    assert [p["cost"].only for p in parts] == list(LAW.costs.classes)
    assert [len(p["inputs"]) for p in parts] == [8, 8, 4, 4, 4, 4]
    with pytest.raises(ValueError, match=r"= 12 % 8; set train\.batch=16"):
        Flow(3, law=LAW).corrupt(jax.random.key(0), batch(12))
    with pytest.raises(ValueError, match="one: split the batch"):
        _ = noised["cost"].only
    with pytest.raises(ValueError, match=r"objective\.antithetic=True"):
        Flow(3, law=LAW, stratified=False)


def levels_of_row(corrupt: Any, law: CostLaw, runs: int = 400) -> np.ndarray:
    """The noise level of the first image of a batch, and whether it is self-conditioned, in many
    steps. Images are told apart by a huge pixel."""
    images = np.zeros((8, 2, 2, 1), np.float32)
    images[0] = 1e6
    given = {"images": images, "labels": np.zeros(8, np.int32)}

    @jax.jit
    @jax.vmap
    def one(key: jax.Array) -> Any:
        noised = corrupt(key, given)
        clean = noised["inputs"] * (1 + noised["sigma"])[:, None, None, None]
        place = jnp.abs(clean[:, 0, 0, 0]).argmax()
        return noised["sigma"][place], place

    sigma, place = one(jax.random.split(jax.random.key(7), runs))
    twice = np.array([cost.twice for cost in law.costs.pattern])
    return np.stack([np.log(sigma), twice[np.asarray(place) % len(twice)]])


def test_noise_is_drawn_before_rows_are_sorted() -> None:
    """The level of an image is normal in log σ, and half of the times it is self-conditioned.
    Negative control: rows that go to their places first, and are given the noise of the place, are
    not."""
    objective = Flow(3, law=LAW)
    log_sigma, twice = levels_of_row(objective.corrupt, LAW)
    assert stats.kstest(log_sigma, "norm").pvalue > 1e-3
    assert stats.binomtest(int(twice.sum()), len(twice)).pvalue > 1e-3

    def sorted_first(key: jax.Array, given: Any) -> Any:
        """Image i lies in place i, and the place decides its level."""
        stratum_B = jnp.arange(8)  # places are in the order of their ranks
        u_B = (stratum_B + jax.random.uniform(key)) / 8
        noise = jax.random.normal(key, given["images"].shape)
        return objective.noised(given["images"], noise, objective.sigma(u_B))

    log_sigma, _ = levels_of_row(sorted_first, LAW)
    assert stats.kstest(log_sigma, "norm").pvalue < 1e-6


@cache
def graded(twice: bool) -> tuple[Any, Any, Any]:
    """(stages, parameters, corrupted batch) of a model of two classes: half of the samples are
    self-conditioned, or have coarse patches."""
    half = Fraction(0 if twice else 1, 2)
    image = ImageShape(8, 2, 3, 2, coarse=not twice, self_conditioned=twice)
    model, objective = dit(SHAPE, image), Flow(3, law=CostLaw(half, twice=twice))
    noised = jax.jit(objective.corrupt)(jax.random.key(0), batch(8, 8))
    shapes = module.abstract(model, jax.tree.map(lambda x: x[:1], noised))[0]["params"]
    rng = np.random.default_rng(0)
    shaken = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), shapes)
    return stages(model, objective, {}, objective.count(noised)), shaken, noised


def test_gradients_do_not_depend_on_the_order_of_microbatches() -> None:
    """One program a class; microbatches of one class in any order add up to the whole batch."""
    stage, params, noised = graded(False)
    program = jax.jit(jax.grad(lambda p, one: stage.part_loss(p, one)[0]))
    parts = stage.parts(noised)
    cut = [
        jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], part)
        for part in parts
        for i in range(len(part["inputs"]) // 2)
    ]
    grads = [jax.device_get(program(params, one)) for one in cut]
    assert len(cut) == 4 and program._cache_size() == len(parts) == 2
    for order in (range(4), range(3, -1, -1), (2, 0, 3, 1)):
        total = jax.tree.map(lambda *x: sum(x), *(grads[i] for i in order))
        if order == range(4):
            first = total
        assert relative_error(total, first) < 1e-6
    whole = jax.jit(jax.grad(lambda p: stage.loss(p, noised)[0]))(params)
    assert relative_error(whole, first) < 1e-6


def test_self_conditioned_rows_read_the_first_estimate_without_gradient() -> None:
    stage, params, noised = graded(True)
    plain, twice = stage.parts(noised)[:2]
    assert stage.refine(params, plain) is plain
    refined = jax.jit(stage.refine)(params, twice)
    assert refined["estimate"].shape == twice["inputs"].shape and np.any(refined["estimate"])
    slope = jax.jit(jax.grad(lambda p: stage.refine(p, twice)["estimate"].sum()))(params)
    assert not any(x.any() for x in jax.tree.leaves(slope))
    loss = jax.jit(stage.loss)
    assert loss(params, twice)[0] != loss(params, twice | {"cost": CostClasses()})[0]
