"""The cache of block diffusion is exact: logits and ids are those of the model that recomputes
everything, and the states of a window share one prefix.
"""

import functools
from dataclasses import replace
from types import SimpleNamespace

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
from fdp.sampling.draw import denoiser_of, draw, sampled
from fdp.sampling.noise import Draw
from fdp.sampling.speculative import JacobiDrafter, StaleDrafter

pytestmark = pytest.mark.fast

L, R, N_IDS, B = 12, 4, 13, 4
EOS = 8  # ends three samples in the first block, one in the second
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
    # These weights amplify rounding: one logit of 2304 may differ by 1.1e-6 of the largest.
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error <= 1e-6, error
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), cache, at_once)


@functools.cache
def alone(name, prompt):
    """Ids of the chain over whole sequences, without a cache."""
    z_BxL = np.full((B, L), N_IDS)
    z_BxL[:, :R] = PROMPT
    asked = replace(DRAW, start_BxL=jnp.asarray(z_BxL) if prompt else None)
    chain = replace(CHAINS[name], draw=asked)
    e = SimpleNamespace(model=built()[0], objective=BlockDiffusion(N_IDS, R))
    run = jax.jit(lambda variables: follow(chain, denoiser_of(e, variables))[0])
    return np.asarray(run(built()[1]))


def with_cache(name, window, drafter, prompt):
    """(variables, sample ids, prompt) → (ids, info)."""

    def run(variables, ids_B, prompt_BxR):
        chain = replace(CHAINS[name], draw=replace(DRAW, sample_ids_B=ids_B))
        given = {"prompt_BxP": prompt_BxR} if prompt else {}
        return sample(BlockCache(built()[0]), variables, chain, drafter, window=window, **given)

    return run


@functools.cache
def drawn(*how):
    """(ids, info) on one device."""
    return jax.tree.map(np.asarray, jax.jit(with_cache(*how))(*given()))


def given():
    """What a run takes."""
    return built()[1], DRAW.sample_ids_B, PROMPT


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


def on_mesh(how, **degrees):
    """`with_cache` inside shard_map."""
    mesh = make_mesh(dict.fromkeys(AXES, 1) | degrees)
    specs = {"params": build.shapes_and_specs(built()[0], 2 * L)[1]}, P("dp"), P("dp")
    return shard_map(lambda *x: with_cache(*how)(*x)[0], mesh, specs, P("dp"))


@pytest.mark.slow
def test_ids_do_not_depend_on_the_mesh():
    run = jax.jit(on_mesh(JACOBI, dp=2, tp=2))
    np.testing.assert_array_equal(run(*given()), drawn(*JACOBI)[0])


@pytest.mark.slow
def test_trained_arms_are_sampled_with_the_cache_and_the_same_ids():
    model, variables = built()
    numbers = {"data": SimpleNamespace(seq_len=L), "fit": SimpleNamespace(seed=3)}
    e = SimpleNamespace(model=model, objective=BlockDiffusion(N_IDS, R), **numbers)
    specs = {"params": build.shapes_and_specs(model, 2 * L)[1]}
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"dp": 2, "tp": 2})
    asked = Draw(jax.random.key(3), jnp.arange(B), L, N_IDS)
    want = jax.jit(lambda v: sampled(e, v, asked)[0])(variables)
    np.testing.assert_array_equal(draw(e, variables, specs, B, mesh), want)


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
    with pytest.raises(
        ValueError, match=r"cp = 2 needs a causal mask.*BlockCausalRule.*: set mesh.cp=1"
    ):
        jax.eval_shape(on_mesh(PLAIN, cp=2), *given())
