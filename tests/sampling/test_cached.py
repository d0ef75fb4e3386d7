"""Block-wise sampling with a key/value cache: exact with a refresh in every step, equal on every
mesh.
"""

import dataclasses
import functools

import build as builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import sample_cached

from fdp.collectives import shard_map
from fdp.mesh import AXES, make_mesh
from fdp.models import module
from fdp.models.layers import SwiGLU
from fdp.models.recurrent import GatedDeltaNet
from fdp.models.stack import Block, layer
from fdp.sampling import autoregressive, cached, masked
from fdp.sampling.noise import Draw

pytestmark = pytest.mark.fast

KEY, L, N_IDS = jax.random.key(3), 12, 13
IDS = jnp.arange(40, 48)


@functools.cache
def build(attention="bidirectional", **changes):
    """(model, parameters) of two small layers with weights large enough that tokens depend on one
    another.
    """
    model = builders.model(attention, **changes)
    return model, jax.tree.map(lambda x: 2 * x, builders.parameters(model, L))


@functools.cache
def decoder(block=4, per_step=1, **changes):
    model, params = build(**changes)
    return cached.BlockDecoder(model, N_IDS, block, per_step), params


def draw(made, ids=IDS, length=L, **options):
    """(ids, info) on one device."""
    how, params = made
    run = jax.jit(lambda params, ids: cached.sample(how, params, KEY, ids, length, **options))
    return jax.tree.map(np.asarray, run(params, ids))


def recomputed(made, ids=IDS, **options):
    """Ids of the sampler without a cache."""
    how, params = made
    denoise = lambda z, noise: module.run(
        how.model, {"params": params}, {"inputs": z, "noise": noise}
    )[0]
    start = options.pop("start_BxL", None)
    options = {"order": "random", "per_step": how.per_step, "block": how.block} | options
    asked = lambda ids: Draw(KEY, ids, L, N_IDS, start_BxL=start)
    run = jax.jit(lambda ids: masked.reveal(denoise, asked(ids), **options))
    return np.asarray(run(ids)[0])


@pytest.mark.parametrize(("block", "per_step"), [(L, 1), (L, 5), (4, 1), (4, 3)])
def test_a_refresh_in_every_step_is_the_recomputing_sampler(block, per_step):
    made = decoder(block, per_step)
    ids, info = draw(made, refresh_every=1)
    np.testing.assert_array_equal(ids, recomputed(made))
    assert info["refreshes"] == L // block * -(-block // per_step) and info["reuses"] == 0
    assert ids.min() >= 0 and ids.max() < N_IDS


@pytest.mark.parametrize("changes", [{"time_conditioning": True}, {"qk_norm": True, "kv_heads": 2}])
def test_other_models_too(changes):
    made = decoder(4, 2, **changes)
    np.testing.assert_array_equal(draw(made, refresh_every=1)[0], recomputed(made))


def test_reuse_is_an_approximation_and_counted():
    made = decoder(4)
    exact = recomputed(made)
    ids, info = draw(made)
    assert (info["refreshes"], info["reuses"]) == (3, 9)
    assert (ids != exact).any(), "a cache that never goes stale would be a recomputation"
    assert (ids == exact).mean() > 0.5
    assert draw(made, refresh_every=3)[1] == {"refreshes": 6, "reuses": 6}


def test_one_block_of_all_rows_needs_no_second_refresh():
    # Every row is in the block, so a reuse step rewrites the whole cache and recomputes everything.
    made = decoder(L, 2)
    ids, info = draw(made)
    assert info["refreshes"] == 1
    np.testing.assert_array_equal(ids, recomputed(made))


def test_samples_do_not_depend_on_their_batch():
    made = decoder(4, 2)
    whole, _ = draw(made)
    np.testing.assert_array_equal(draw(made, ids=IDS[jnp.array([6, 1])])[0], whole[[6, 1]])


def test_a_prompt_is_kept_and_conditions_what_follows():
    made = decoder(4, 2)
    prompt = np.asarray(recomputed(made))[:, 4:8]
    ids, info = draw(made, prompt_BxP=jnp.asarray(prompt), refresh_every=1)
    np.testing.assert_array_equal(ids[:, :4], prompt)
    assert info["refreshes"] == 4
    start = jnp.full((8, L), N_IDS).at[:, :4].set(prompt)
    np.testing.assert_array_equal(ids, recomputed(made, start_BxL=start))


def test_reuse_where_nothing_changed_since_the_refresh_is_a_refresh():
    how, params = decoder(4, 4, time_conditioning=True)
    # Modulations are zero at initialisation; here the noise level must matter.
    params = jax.tree.map(lambda x: x + 0.3 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params)
    z = cached.start_state(how, IDS, L).at[:, :4].set(jnp.arange(4))
    at = (KEY, IDS, z, jnp.int32(1), jnp.int32(4))
    fresh, cache = jax.jit(how.refresh)(params, *at)
    np.testing.assert_array_equal(jax.jit(how.reuse)(params, cache, *at)[0], fresh)
    assert (fresh[:, 4:8] < N_IDS).all() and (fresh[:, 8:] == N_IDS).all()


def test_phases_alone_give_the_sampler():
    how, params = decoder(4, 2)
    z = cached.start_state(how, IDS, L)
    refresh, reuse, cache = jax.jit(how.refresh), jax.jit(how.reuse), None
    for step in range(6):
        at = (KEY, IDS, z, jnp.int32(step), jnp.int32(step // 2 * 4))
        z, cache = refresh(params, *at) if step % 2 == 0 else reuse(params, cache, *at)
    np.testing.assert_array_equal(z, draw((how, params))[0])


def on_mesh(made, f, **degrees):
    """`f(params, ids)` inside shard_map over `degrees`."""
    how, params = made
    mesh = make_mesh({a: degrees.get(a, 1) for a in AXES})
    _, specs = builders.shapes_and_specs(getattr(how, "model", how), L)
    return jax.jit(shard_map(f, mesh, (specs, P("dp")), P("dp")))(params, IDS)


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 4), (1, 8), (8, 1)])
def test_ids_do_not_depend_on_the_mesh(dp, tp):
    made = decoder(4, 2)
    f = lambda params, ids: cached.sample(made[0], params, KEY, ids, L)[0]
    np.testing.assert_array_equal(on_mesh(made, f, dp=dp, tp=tp), draw(made)[0])


def test_sequence_parallel_passes_are_the_same():
    made, plain = decoder(4, 2, sequence_parallel=True), decoder(4, 2)
    f = lambda params, ids: cached.sample(made[0], params, KEY, ids, L)[0]
    np.testing.assert_array_equal(on_mesh(made, f, dp=2, tp=2), draw(plain)[0])


def recomputed_causal(model, params, ids, bos):
    def logits_at(z, i):
        args = model, {"params": params}
        hidden = module.run(*args, z, jnp.zeros(len(z)), method="hidden")[0]
        return module.run(*args, hidden[:, i], method="outputs")[0]

    return autoregressive.sample(logits_at, Draw(KEY, ids, L, N_IDS), bos)


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2, "qk_norm": True}])
def test_the_cached_autoregressive_sampler_reproduces_the_recomputing_one(changes):
    model, params = build("causal", **changes)
    expected, _ = jax.jit(lambda p, ids: recomputed_causal(model, p, ids, 14))(params, IDS)
    run = lambda p, ids: sample_cached(model, p, Draw(KEY, ids, L, N_IDS), 14)
    ids, info = jax.jit(run)(params, IDS)
    np.testing.assert_array_equal(ids, expected)
    assert int(info["nfe"]) == L
    if not changes:
        for degrees in ({"tp": 8}, {"dp": 4, "tp": 2}):
            np.testing.assert_array_equal(
                on_mesh((model, params), lambda p, i: run(p, i)[0], **degrees), expected
            )


def test_bad_arguments():
    how, params = decoder(4)
    causal, _ = build("causal")
    with pytest.raises(ValueError, match="bidirectional model, not under Mask"):
        cached.BlockDecoder(causal, N_IDS, 4)
    mixed = how.model.clone(
        pattern=(*how.model.pattern, layer(Block, mixing=layer(GatedDeltaNet), ffn=layer(SwiGLU)))
    )
    with pytest.raises(ValueError, match=r"GatedDeltaNet.* is no attention: .* every layer"):
        cached.BlockDecoder(mixed, N_IDS, 4)
    with pytest.raises(ValueError, match="at least 1, not 0 and 1"):
        dataclasses.replace(how, block=0)
    with pytest.raises(ValueError, match=r"10 % 4 = 2, .* set length=12"):
        cached.sample(how, params, KEY, IDS, 10)
    with pytest.raises(ValueError, match=r"prompt 3 must be whole blocks of 4"):
        cached.sample(how, params, KEY, IDS, L, prompt_BxP=jnp.zeros((8, 3), jnp.int32))
    with pytest.raises(ValueError, match="prompt < length"):
        cached.sample(how, params, KEY, IDS, L, prompt_BxP=jnp.zeros((8, L), jnp.int32))
    with pytest.raises(ValueError, match="refresh_every=0 must be at least 1"):
        cached.sample(how, params, KEY, IDS, L, refresh_every=0)
    with pytest.raises(ValueError, match="needs a causal model: under Mask"):
        sample_cached(how.model, params, Draw(KEY, IDS, L, N_IDS), 14)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"cp": 2})
    _, specs = builders.shapes_and_specs(how.model, L)
    f = shard_map(lambda p, ids: cached.sample(how, p, KEY, ids, L)[0], mesh, (specs, P()), P())
    with pytest.raises(ValueError, match=r"cp = 2 needs a causal mask.*: set mesh.cp=1"):
        jax.eval_shape(f, params, IDS)
