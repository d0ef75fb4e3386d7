"""The cache of block diffusion is exact: logits and ids are those of the model that recomputes
everything, and the states of a window share one prefix.
"""

import functools
from dataclasses import replace

import build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import shard_map
from fdp.mesh import AXES, make_mesh
from fdp.models import module
from fdp.models.transformer import transformer
from fdp.objectives import BlockDiffusion
from fdp.objectives.noise_schedules import schedule
from fdp.sampling.block_cache import BlockCache, sample
from fdp.sampling.chain import Ancestral, Chain, follow
from fdp.sampling.noise import Draw
from fdp.sampling.speculative import JacobiDrafter, StaleDrafter

pytestmark = pytest.mark.fast

L, R, N_IDS, B = 12, 4, 13, 3
EOS = 8  # ends two samples in the first block, one in the second
DRAW = Draw(jax.random.key(3), jnp.arange(40, 40 + B), L, N_IDS)
PROMPT = np.arange(B * R, dtype=np.int32).reshape(B, R) % N_IDS
CHAINS = {
    "first_hitting": Chain(DRAW, "random", block=R),
    "threshold": Chain(DRAW, "margin", threshold=0.1, block=R, eos=EOS),
}


def trained(length=L, **changes):
    """A model of the shape that block diffusion trains."""
    objective, shape = BlockDiffusion(N_IDS, R), build.model(**changes).shape
    return transformer(shape, objective.mask(length), position=objective.position(length))


@functools.cache
def built():
    """(model, variables): two layers of width 16, two queries for each key."""
    model = trained(heads=4, kv_heads=2)
    return model, {"params": build.drawn(build.shapes_and_specs(model, 2 * L)[0], 0.6)}


def recomputed(model, variables):
    """The denoiser without a cache, as samples are drawn from trained models."""

    def denoise(z_BxL, noise_B):
        both = jnp.concatenate([z_BxL, z_BxL], 1)
        hidden = module.run(model, variables, both, noise_B, method="hidden")[0]
        return module.run(model, variables, hidden[:, :L], method="outputs")[0]

    return denoise


def test_logits_are_those_of_the_model_without_a_cache():
    model, variables = built()
    how, rng = BlockCache(model), np.random.default_rng(0)
    x_BxL = rng.integers(0, N_IDS, (B, L), np.int32)
    noisy = np.where(rng.random((2, B, L)) < 0.6, N_IDS, x_BxL)  # two states of each sample

    @jax.jit
    def every(variables, x_BxL, noisy):
        def block(cache, start):
            z, x = (jax.lax.dynamic_slice_in_dim(y, start, R, -1) for y in (noisy, x_BxL))
            z = z.reshape(-1, R)
            logits = how.denoise(variables, cache, start)(z, jnp.zeros(len(z)))
            return how.fill(variables, cache, x, start), logits

        cache, found = jax.lax.scan(block, how.empty(B, L), jnp.arange(0, L, R))
        at_once = how.fill(variables, how.empty(B, L), x_BxL, 0)
        both = jnp.concatenate([noisy, jnp.broadcast_to(x_BxL, noisy.shape)], 2)
        both = both.reshape(-1, 2 * L)
        hidden = module.run(model, variables, both, jnp.zeros(2 * B), method="hidden")[0]
        want = module.run(model, variables, hidden[:, :L], method="outputs")[0]
        return jnp.concatenate(list(found), 1), want, cache, at_once

    got, want, cache, at_once = every(variables, x_BxL, noisy)
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), cache, at_once)


@functools.cache
def alone(name, prompt):
    """Ids of the chain over whole sequences, without a cache."""
    z_BxL = np.full((B, L), N_IDS)
    z_BxL[:, :R] = PROMPT
    asked = replace(DRAW, start_BxL=jnp.asarray(z_BxL) if prompt else None)
    chain = replace(CHAINS[name], draw=asked)
    run = jax.jit(lambda variables: follow(chain, recomputed(built()[0], variables))[0])
    return np.asarray(run(built()[1]))


def with_cache(name, window, drafter, prompt):
    """variables → (ids, info)."""
    how, given = BlockCache(built()[0]), {"prompt_BxP": jnp.asarray(PROMPT)} if prompt else {}
    return lambda v: sample(how, v, CHAINS[name], drafter, window=window, **given)


@functools.cache
def drawn(*how):
    """(ids, info) on one device."""
    return jax.tree.map(np.asarray, jax.jit(with_cache(*how))(built()[1]))


PLAIN = ("first_hitting", 1, StaleDrafter(), True)
JACOBI = ("first_hitting", 3, JacobiDrafter(), True)
ENDING = ("threshold", 2, StaleDrafter(), False)


@pytest.mark.parametrize("how", [PLAIN, JACOBI, ENDING], ids=["plain", "jacobi", "ending"])
def test_ids_are_those_of_the_sampler_without_a_cache(how):
    ids, info = drawn(*how)
    np.testing.assert_array_equal(ids, alone(how[0], how[-1]))
    assert (ids < N_IDS).all()
    passes = info["nfe"] * how[1] + info["fills"]
    assert info["rows"] == R * passes  # here the prompt is one block
    assert info["states"] == how[1] * info["rounds"].sum()


def test_every_finished_block_that_is_read_is_filled_once():
    _, plain = drawn(*PLAIN)
    assert (plain["nfe"], plain["fills"]) == (L - R, 2)  # the prompt and the block after it
    assert (plain["steps"] == L - R).all() and (plain["rounds"] == L - R).all()
    _, drafted = drawn(*JACOBI)
    assert drafted["fills"] == 2 and (drafted["steps"] == L - R).all()
    assert (drafted["rounds"] < L - R).all() and drafted["accepted"].sum() > 0


def test_blocks_after_the_end_of_all_samples_cost_nothing():
    ids, info = drawn(*ENDING)
    for row in ids[(ids == EOS).any(1)]:
        assert (row[row.tolist().index(EOS) :] == EOS).all()
    last = np.where((ids == EOS).any(1), (ids == EOS).argmax(1), L - 1).max()
    assert last // R < L // R - 1, "some block after the end is there to be left out"
    assert info["fills"] == last // R and info["rounds"].max() <= last + 1


def test_ids_do_not_depend_on_tp():
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": 2})
    specs = {"params": build.shapes_and_specs(built()[0], 2 * L)[1]}
    run = jax.jit(shard_map(lambda v: with_cache(*JACOBI)(v)[0], mesh, (specs,), P()))
    np.testing.assert_array_equal(run(built()[1]), drawn(*JACOBI)[0])


def test_states_of_a_window_share_one_prefix():
    how, variables = BlockCache(built()[0]), built()[1]

    def temporary(states, length):
        """Bytes that a pass over so many states needs besides parameters, cache and logits."""
        cache = jax.eval_shape(lambda: how.empty(B, length))
        z = jax.ShapeDtypeStruct((states * B, R), jnp.int32)
        run = jax.jit(lambda v, c, z: how.denoise(v, c, length - R)(z, None))
        return run.lower(variables, cache, z).compile().memory_analysis().temp_size_in_bytes

    one, many = ([temporary(states, length) for length in (512, 1024)] for states in (1, 8))
    assert many[1] - many[0] == one[1] - one[0], (one, many)


def causal():
    """A model without blocks."""
    return build.model("causal")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (causal, r"only where no layer shows .*kind='causal'.* train with objective.name=block"),
        (lambda: trained(time_conditioning=True), "time_conditioning = True: set it to False"),
    ],
)
def test_models_without_final_keys_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        BlockCache(model())


@pytest.mark.parametrize(
    ("chain", "prompt", "message"),
    [
        (
            Chain(DRAW, "random", block=3),
            0,
            r"block = 3 is not the model's block = 4.* set block=4",
        ),
        (Chain(DRAW, "random"), 0, "block = None is not the model's block = 4"),
        (CHAINS["threshold"], 6, r"prompt % block = 6 % 4 = 2, .* cut the prompt to 4 tokens"),
        (CHAINS["threshold"], 12, r"prompt < length .* set length=16"),
        (Chain(replace(DRAW, length=10), block=R), 0, r"10 % 4 = 2; .* set length=12"),
        (Chain(replace(DRAW, trace=True), block=R), 0, "trace=True: set it to False"),
        (Ancestral(DRAW, grid=3, schedule=schedule("linear")), 0, "use a Chain with block=4"),
    ],
)
def test_chains_that_do_not_go_block_by_block_are_refused(chain, prompt, message):
    with pytest.raises(ValueError, match=message):
        BlockCache(built()[0]).check(chain, prompt)


def test_cp_is_refused():
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"cp": 2})
    specs = {"params": build.shapes_and_specs(built()[0], 2 * L)[1]}
    run = shard_map(lambda v: with_cache(*PLAIN)(v)[0], mesh, (specs,), P())
    with pytest.raises(ValueError, match=r"S = L·cp .* cp = 2: set mesh.cp=1"):
        jax.eval_shape(run, built()[1])
