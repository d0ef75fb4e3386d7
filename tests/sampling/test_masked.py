"""Masked samplers: their laws by exact enumeration, the programs against those laws, and
independence of the mesh.
"""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import index, size
from fdp.data.synthetic import MarkovChain
from fdp.objectives.noise_schedules import schedule
from fdp.parallel.tensor import NEVER
from fdp.sampling import autoregressive, chain, masked, score
from fdp.sampling.noise import Draw
from tests.oracles import EnumerableJoint

pytestmark = pytest.mark.fast

JOINT = EnumerableJoint()
KEY = jax.random.key(11)
LINEAR = schedule("linear", eps=0.0)
CELLS = np.array([JOINT.index(x) for x in itertools.product(range(3), repeat=4)])


def denoise(z_BxL, noise_B):
    """Exact conditionals, with two padding columns that must never be drawn."""
    return jnp.pad(JOINT.denoiser(z_BxL), ((0, 0), (0, 0), (0, 2)), constant_values=9.0)


def start_law():
    """All probability on the fully masked state."""
    law = np.zeros(len(JOINT.states))
    law[-1] = 1
    return law


def total_variation(law):
    """Distance between a law over states and the joint; states with masks left count as errors."""
    return 0.5 * (np.abs(law[CELLS] - JOINT.table.reshape(-1)).sum() + np.delete(law, CELLS).sum())


def ancestral_law(steps, noise):
    """Law of N factorised steps, by multiplying out the kernel of every state with the sampler's
    own probability.
    """
    law = start_law()
    for step in range(steps):
        q, new = float(chain.unmask_prob(noise, step, steps)), np.zeros_like(law)
        for row in np.flatnonzero(law):
            kernel = np.ones(1)
            for i, c in enumerate(JOINT.states[row]):
                one = np.eye(4)[c] if c < 3 else np.append(q * JOINT.conditionals[row, i], 1 - q)
                kernel = (kernel[:, None] * one).reshape(-1)
            new += law[row] * kernel
        law = new
    return law


def reveal_law(order, per_step=1, threshold=None):
    """Law of `reveal` at temperature 1: every state and token combination goes through its own
    scores and choice.
    """
    combos = np.array(list(itertools.product(range(3), repeat=4)))
    states, tokens = np.repeat(JOINT.states, 81, 0), np.tile(combos, (256, 1))
    hidden = states == 3
    p = np.take_along_axis(np.repeat(JOINT.conditionals, 81, 0), tokens[..., None], -1)[..., 0]
    # A revealed position draws nothing: count each combination of the hidden ones once.
    chance = np.where(hidden, p, tokens == 0).prod(1)
    scores = chain.ORDERS[order](JOINT.denoiser(states), jnp.asarray(tokens), None)
    chosen = np.asarray(chain.choose(scores, jnp.asarray(hidden), per_step, threshold))
    target = JOINT.index(np.where(chosen, tokens, states))
    law = start_law()
    for _ in range(4):
        done = np.where((JOINT.states == 3).any(1), 0, law)
        law = np.bincount(target, np.repeat(law - done, 81) * chance, minlength=256) + done
    return law


def first_hitting_law():
    """Law of revealing one uniformly random masked position a step."""
    law = start_law()
    for _ in range(4):
        new = np.zeros_like(law)
        for row in np.flatnonzero(law):
            z = JOINT.states[row]
            hidden = np.flatnonzero(z == 3)
            for i, v in itertools.product(hidden, range(3)):
                to = z.copy()
                to[i] = v
                new[JOINT.index(to)] += law[row] * JOINT.conditionals[row, i, v] / len(hidden)
        law = new
    return law


def agrees(ids_BxL, law):
    """Chi-square of drawn sequences against an exact law, rare cells pooled: within five sigmas."""
    assert int(ids_BxL.min()) >= 0
    assert int(ids_BxL.max()) < 3
    counts = np.bincount(np.asarray(JOINT.index(np.asarray(ids_BxL))), minlength=256)[CELLS]
    expected = len(ids_BxL) * law[CELLS]
    common = expected >= 5
    counts, expected = (
        np.append(counts[common], counts[~common].sum()),
        np.append(expected[common], expected[~common].sum() + 1e-9),
    )
    chi = ((counts - expected) ** 2 / np.maximum(expected, 1)).sum()
    return chi < common.sum() + 5 * (2 * common.sum()) ** 0.5


def draw(sampler, n=20_000, **options):
    """Ids and info of `n` samples of the toy joint."""
    asked = {name: options.pop(name) for name in ("temperature", "trace") if name in options}
    run = jax.jit(lambda key, ids: sampler(denoise, Draw(key, ids, 4, 3, **asked), **options))
    return run(KEY, jnp.arange(n))


# Exact laws.


def test_ancestral_error_falls_as_one_over_steps():
    published = {1: 0.533, 2: 0.314, 4: 0.171, 8: 0.0895, 16: 0.0457}
    for steps, distance in published.items():
        assert total_variation(ancestral_law(steps, LINEAR)) == pytest.approx(distance, abs=6e-4)


def test_first_hitting_and_orders_chosen_from_z_alone_are_exact():
    assert total_variation(first_hitting_law()) < 1e-14
    for order in ("top_prob", "entropy", "margin"):
        assert total_variation(reveal_law(order)) < 1e-14


def test_orders_that_look_at_the_token_thresholds_and_several_tokens_are_not_exact():
    assert total_variation(reveal_law("sampled_prob")) == pytest.approx(0.457, abs=6e-4)
    assert total_variation(reveal_law("top_prob", per_step=2)) > 0.1
    assert total_variation(reveal_law("top_prob", threshold=0.6)) > 0.01


# The programs against those laws.


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_ancestral_draws_follow_the_exact_law(steps):
    ids, info = draw(masked.ancestral, steps=steps, schedule=LINEAR)
    assert agrees(ids, ancestral_law(steps, LINEAR))
    assert int(info["nfe"]) == steps
    assert not agrees(
        ids, first_hitting_law()
    )  # the test has the power to see the factorisation error


def test_ancestral_in_another_schedule():
    cosine = schedule("md4_cosine")
    ids, _ = draw(masked.ancestral, steps=4, schedule=cosine)
    assert agrees(ids, ancestral_law(4, cosine))
    assert not agrees(ids, ancestral_law(4, LINEAR))


@pytest.mark.parametrize("block", [None, 1, 2])
def test_first_hitting_draws_the_joint(block):
    ids, info = draw(masked.first_hitting, block=block)
    assert agrees(ids, first_hitting_law())
    assert int(info["nfe"]) == 4


@pytest.mark.parametrize("order", ["entropy", "sampled_prob"])
def test_reveal_draws_follow_the_exact_law(order):
    ids, _ = draw(masked.reveal, order=order)
    assert agrees(ids, reveal_law(order))
    assert agrees(ids, first_hitting_law()) == (order != "sampled_prob")


def test_threshold_draws_follow_the_exact_law_in_fewer_calls():
    ids, _ = draw(masked.reveal, threshold=0.6)
    assert agrees(ids, reveal_law("top_prob", threshold=0.6))
    _, info = draw(masked.reveal, n=50, threshold=0.0)
    assert int(info["nfe"]) == 1
    _, info = draw(masked.reveal, n=50, per_step=3)
    assert int(info["nfe"]) == 2


def test_greedy_reveal_is_deterministic():
    ids, _ = draw(masked.reveal, n=20, temperature=0.0)
    assert (ids == ids[0]).all()


def test_lazy_ancestral_draws_the_same_ids_in_as_many_calls_as_predicted():
    chain, steps = MarkovChain(), 20
    run = jax.jit(
        lambda ids, lazy: masked.ancestral(
            lambda z, noise: chain.denoiser(z),
            Draw(KEY, ids, 8, 27),
            steps=steps,
            schedule=LINEAR,
            lazy=lazy,
        ),
        static_argnums=1,
    )
    calls = []
    for sample in range(200):
        ids, info = run(jnp.array([sample]), True)
        calls.append(int(info["nfe"]))
        if sample < 5:
            eager, eager_info = run(jnp.array([sample]), False)
            np.testing.assert_array_equal(ids, eager)
            assert int(eager_info["nfe"]) == steps
    expected = steps * (1 - (1 - 1 / steps) ** 8)
    assert abs(np.mean(calls) - expected) < 4 * np.std(calls) / 200**0.5


# Score entropy.


def test_the_probability_of_unmasking_is_tweedies():
    for step in range(4):
        before, after = (
            (-np.log(a) for a in (step / 5, (step + 1) / 5)) if step else (np.inf, -np.log(1 / 5))
        )
        tweedie = np.expm1(before - after) / np.expm1(before) if step else np.exp(-after)
        assert float(chain.unmask_prob(LINEAR, step, 5)) == pytest.approx(tweedie, abs=1e-6)


def test_tweedie_uniform_is_the_posterior_of_one_token():
    p, sigma, delta = np.array([0.5, 0.3, 0.15, 0.05]), 1.3, 0.8
    kernel = lambda s: np.exp(-s) * np.eye(4) - np.expm1(-s) / 4
    now, before = p @ kernel(sigma), p @ kernel(sigma - delta)
    for z in range(4):
        posterior = before * kernel(delta)[:, z]
        logits = np.append(np.log(now / now[z]), [5.0, 5.0])
        got = score.tweedie_uniform(
            jnp.asarray(logits, jnp.float32), jnp.asarray(z), 4, jnp.float32(delta)
        )
        np.testing.assert_allclose(jax.nn.softmax(got)[:4], posterior / posterior.sum(), rtol=1e-5)
        assert (got[4:] == NEVER).all()


@pytest.mark.parametrize("steps", [1, 6])
def test_analytic_uniform_draws_one_token_exactly(steps):
    p = jnp.array([0.5, 0.3, 0.2])

    def log_score(z_BxL, sigma_B):
        q = p * jnp.exp(-sigma_B)[:, None] - jnp.expm1(-sigma_B)[:, None] / 3
        return (jnp.log(q)[:, None] - jnp.log(jnp.take_along_axis(q, z_BxL, 1))[..., None]).astype(
            jnp.float32
        )

    # σ = 20 would leave e^-20 of the data in the score, below f32's resolution, for the first large
    # step to amplify.
    noise = schedule("geometric", sigma_max=7.0)
    run = jax.jit(
        lambda ids: score.analytic_uniform(
            log_score, Draw(KEY, ids, 1, 3), steps=steps, schedule=noise
        )
    )
    ids, info = run(jnp.arange(20_000))
    counts = np.bincount(np.asarray(ids)[:, 0], minlength=3)
    assert ((counts - 20_000 * p) ** 2 / (20_000 * p)).sum() < 20
    assert int(info["nfe"]) == steps


# Interface.


def test_trace_shows_each_state_and_start_keeps_the_prompt():
    start = jnp.array([[3, 1, 3, 3], [3, 3, 3, 3]])
    ids, info = jax.jit(
        lambda s: masked.first_hitting(
            denoise, Draw(KEY, jnp.arange(2), 4, 3, start_BxL=s, trace=True)
        )
    )(start)
    trace = np.asarray(info["trace"])
    assert trace.shape == (5, 2, 4)
    np.testing.assert_array_equal(trace[0], start)
    np.testing.assert_array_equal(trace[-1], ids)
    np.testing.assert_array_equal((trace == 3).sum(2), [[3, 4], [2, 3], [1, 2], [0, 1], [0, 0]])
    assert (trace[:, 0, 1] == 1).all()
    early = draw(masked.reveal, n=2, threshold=0.0, trace=True)[1]["trace"]
    np.testing.assert_array_equal(early[1:], np.broadcast_to(early[1], (4, 2, 4)))


def test_blocks_are_finished_left_to_right():
    trace = draw(masked.reveal, n=50, order="random", block=2, trace=True)[1]["trace"]
    hidden = np.asarray(trace) == 3
    assert not (hidden[:, :, :2].any(2) & ~hidden[:, :, 2:].all(2)).any()


def test_samples_do_not_depend_on_their_batch():
    whole, _ = draw(masked.first_hitting, n=16)
    few, _ = jax.jit(lambda ids: masked.first_hitting(denoise, Draw(KEY, ids, 4, 3)))(
        jnp.array([9, 2])
    )
    np.testing.assert_array_equal(few, whole[jnp.array([9, 2])])


def test_bad_arguments():
    asked = Draw(KEY, jnp.arange(2), 4, 3)
    run = functools.partial(masked.reveal, denoise, asked)
    with pytest.raises(ValueError, match="unknown order 'confidence'"):
        run(order="confidence")
    with pytest.raises(ValueError, match="at least 1"):
        run(per_step=0)
    with pytest.raises(ValueError, match="shape"):
        masked.reveal(denoise, replace(asked, start_BxL=jnp.zeros((3, 4))))
    with pytest.raises(ValueError, match="at least 1"):
        masked.ancestral(denoise, asked, steps=0, schedule=LINEAR)


# The mesh.

N_IDS, V, L = 11, 16, 6
TABLE = np.random.default_rng(0).normal(size=(V, L, L, V)).astype(np.float32)


def table_logits(z_BxL):
    """Logits of a function that every device computes alike: this device's columns of [B, L, V]."""
    full = 2 * jnp.sin(jnp.asarray(TABLE)[z_BxL, jnp.arange(L)].sum(1))
    columns = V // size("tp")
    return (
        jax.lax.dynamic_slice_in_dim(full, index("tp") * columns, columns, -1)
        if size("tp") > 1
        else full
    )


def sample_all_ways(key, ids_B):
    """Every sampler in one program: ({name: ids}, {name: nfe})."""
    d = lambda z, noise: table_logits(z)
    run = functools.partial
    noise = schedule("linear")
    ways = {
        "ancestral": run(masked.ancestral, steps=5, schedule=noise, lazy=False),
        "lazy": run(masked.ancestral, steps=5, schedule=noise),
        "first_hitting": masked.first_hitting,
        "margin": run(masked.reveal, order="margin", threshold=0.3, block=3),
        "entropy": run(masked.reveal, order="entropy", per_step=2),
        "sampled_prob": run(masked.reveal, order="sampled_prob"),
        "analytic_uniform": run(score.analytic_uniform, steps=4, schedule=schedule("geometric")),
    }
    asked = Draw(key, ids_B, L, N_IDS)
    cooler = {"sampled_prob": replace(asked, temperature=0.7)}
    out = {name: way(d, cooler.get(name, asked)) for name, way in ways.items()}
    out["autoregressive"] = autoregressive.sample(lambda z, i: table_logits(z)[:, 0] + i, asked, 0)
    return {name: ids for name, (ids, _) in out.items()}, {
        name: info["nfe"] for name, (_, info) in out.items()
    }


@functools.cache
def reference():
    return jax.jit(sample_all_ways)(KEY, jnp.arange(100, 108))


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (1, 8), (2, 4), (4, 2), (4, 1)])
def test_ids_do_not_depend_on_the_mesh(dp, tp):
    axes, kinds = ("pp", "dp", "ep", "cp", "tp"), (jax.sharding.AxisType.Auto,) * 5
    mesh = jax.make_mesh(
        (1, dp, 1, 1, tp), axes, axis_types=kinds, devices=jax.devices()[: dp * tp]
    )
    sharded = jax.shard_map(
        sample_all_ways,
        mesh=mesh,
        in_specs=(P(), P("dp")),
        out_specs=(P("dp"), P()),
        check_vma=True,
    )
    ids, nfe = jax.jit(sharded)(KEY, jnp.arange(100, 108))
    expected_ids, expected_nfe = reference()
    for name in expected_ids:
        np.testing.assert_array_equal(ids[name], expected_ids[name], err_msg=name)
        assert int(ids[name].max()) < N_IDS
        assert int(nfe[name]) == int(expected_nfe[name]), name
