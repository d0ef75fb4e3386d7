"""The key/value cache of Attention and Transformer: whole passes fill it, row passes update and
read it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp import config, sharding
from fdp.collectives import shard_map
from fdp.cost import jaxpr
from fdp.mesh import AXES, BATCH_AXES, make_mesh
from fdp.models import transformer
from fdp.models.attention import CACHE

pytestmark = pytest.mark.fast
B, L = 4, 8
IDS = jax.random.randint(jax.random.key(1), (B, L), 0, 16)
NOISE = jnp.linspace(0.1, 0.9, B)


@functools.cache
def build(attention="bidirectional", **changes):
    c = config.base()
    sizes = {
        "layers": 2,
        "width": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn": 16,
        "vocab": 16,
    }
    c.model.update({**sizes, "dtype": "float32", **changes})
    model = transformer.from_config(c, attention, 2)
    return model, jax.jit(lambda key: sharding.init_params(model, key, L))(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, ids):
    """(hidden, cache) of a pass over all rows."""
    hidden, kept = model.apply(
        {"params": params}, ids, NOISE[: len(ids)], mutable=[CACHE], method="hidden"
    )
    return hidden, kept[CACHE]


@functools.partial(jax.jit, static_argnums=0)
def rows(model, params, cache, ids, positions):
    """(hidden, cache) of a pass over the rows at `positions` [B, R]."""
    at = jnp.take_along_axis(ids, positions, 1)
    variables = {"params": params, CACHE: cache}
    hidden, kept = model.apply(
        variables, at, NOISE[: len(ids)], positions, mutable=[CACHE], method="hidden"
    )
    return hidden, kept[CACHE]


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True, "time_conditioning": True}, {"remat": "full"}]
)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_rows_against_a_fresh_cache_are_those_of_a_whole_pass(attention, changes):
    model, params = build(attention, **changes)
    hidden, cache = whole(model, params, IDS)
    plain = jax.jit(lambda p: model.apply({"params": p}, IDS, NOISE, method="hidden"))(params)
    np.testing.assert_array_equal(hidden, plain)  # to fill the cache changes nothing
    positions = jnp.array(
        [[5, 2], [0, 7], [3, 4], [1, 6]]
    )  # another choice for every sequence, in any order
    some, kept = rows(model, params, cache, IDS, positions)
    np.testing.assert_allclose(
        some, jnp.take_along_axis(hidden, positions[..., None], 1), atol=2e-6
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), kept, cache)


def test_rows_update_the_cache_at_their_positions_alone():
    model, params = build()
    _, cache = whole(model, params, IDS)
    changed = IDS.at[:, 3:5].add(1) % 16
    positions = jnp.broadcast_to(jnp.array([3, 4]), (B, 2))
    hidden, kept = rows(model, params, cache, changed, positions)
    first = lambda tree: tree["layers"]["attention"]["k"][0]
    # Layer 0 reads embeddings, so its cache is that of a whole pass over the changed ids; deeper
    # ones go stale.
    np.testing.assert_allclose(first(kept), first(whole(model, params, changed)[1]), atol=2e-6)
    for name in ("k", "v"):
        old, new = (tree["layers"]["attention"][name] for tree in (cache, kept))
        np.testing.assert_array_equal(np.delete(new, [3, 4], 2), np.delete(old, [3, 4], 2))
        assert np.abs(new[:, :, 3:5] - old[:, :, 3:5]).min(axis=(2, 3, 4)).max() > 0
    exact, _ = whole(model, params, changed)
    assert np.abs(hidden - exact[:, 3:5]).max() > 1e-4, (
        "two layers: stale keys outside the rows must show"
    )


def test_causal_rows_do_not_see_what_lies_behind_them():
    model, params = build("causal")
    _, cache = whole(model, params, IDS)
    positions = jnp.full((B, 1), 3)
    clean, _ = rows(model, params, cache, IDS, positions)
    spoilt = jax.tree.map(lambda x: x.at[:, :, 4:].set(9.0), cache)
    np.testing.assert_array_equal(rows(model, params, spoilt, IDS, positions)[0], clean)
    behind = jax.tree.map(lambda x: x.at[:, :, 2].set(9.0), cache)
    assert np.abs(rows(model, params, behind, IDS, positions)[0] - clean).max() > 1e-3
    both, both_params = build()
    _, cache = whole(both, both_params, IDS)
    clean, _ = rows(both, both_params, cache, IDS, positions)
    spoilt = jax.tree.map(lambda x: x.at[:, :, 7].set(9.0), cache)
    assert np.abs(rows(both, both_params, spoilt, IDS, positions)[0] - clean).max() > 1e-3


def test_a_causal_cache_filled_row_by_row_is_that_of_a_whole_pass():
    model, params = build("causal")
    hidden, expected = whole(model, params, IDS)
    cache = transformer.empty_cache(model.m, B, L)
    step = jax.jit(lambda cache, i: rows(model, params, cache, IDS, jnp.full((B, 1), i)))
    for i in range(L):
        one, cache = step(cache, i)
        np.testing.assert_allclose(one[:, 0], hidden[:, i], atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), cache, expected)


@pytest.mark.parametrize("changes", [{}, {"sequence_parallel": True}])
def test_on_a_mesh_the_cache_is_sharded_and_the_values_are_equal(changes):
    model, params = build(**changes)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"dp": 2, "tp": 2})
    _, specs = sharding.abstract_params(model, L)
    state, kv = P(BATCH_AXES), transformer.cache_specs()
    positions = jnp.broadcast_to(jnp.array([2, 5]), (B, 2))
    changed = IDS.at[:, 2].add(1) % 16
    plain, _ = build()
    hidden, cache = whole(plain, params, IDS)
    expected, after = rows(plain, params, cache, changed, positions)

    def body(params, ids, noise):
        apply = lambda variables, *args: model.apply(
            variables, *args, mutable=[CACHE], method="hidden"
        )
        first, kept = apply({"params": params}, ids[0], noise)
        at = jnp.take_along_axis(ids[1], positions[: len(noise)], 1)
        second, again = apply({"params": params} | kept, at, noise, positions[: len(noise)])
        if model.m.sequence_parallel:  # gathered, so typed varying over tp: equal on all of it
            first, second = (jax.lax.pmax(x, "tp") for x in (first, second))
        return first, second, kept[CACHE], again[CACHE]

    f = jax.jit(shard_map(body, mesh, (specs, P(None, BATCH_AXES), state), (state, state, kv, kv)))
    got = f(params, jnp.stack([IDS, changed]), NOISE)
    for a, b in zip(
        jax.tree.leaves(got), jax.tree.leaves((hidden, expected, cache, after)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=5e-6)
    shard = jax.tree.leaves(got[2])[0].addressable_shards[0].data.shape
    assert shard == (2, B // 2, L, 1, 8)


def test_the_plain_program_keeps_nothing():
    model, params = build()
    assert set(jax.eval_shape(model.init, jax.random.key(0), IDS, NOISE)) == {"params"}
    _, cache = whole(model, params, 0 * IDS)
    apply = jax.jit(lambda variables: model.apply(variables, IDS, NOISE))
    np.testing.assert_array_equal(
        apply({"params": params}), apply({"params": params, CACHE: cache})
    )
    filling = jax.make_jaxpr(lambda: whole(model, params, IDS))()
    plain = jax.make_jaxpr(lambda: model.apply({"params": params}, IDS, NOISE, method="hidden"))()
    assert jaxpr.dot_flops(filling) == jaxpr.dot_flops(plain)


def test_refusals():
    model, params = build()
    positions = jnp.zeros((B, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"there is none that can be written: .* mutable=\['kv'\]"):
        model.apply(
            {"params": params}, IDS[:, :1], NOISE, positions, method="hidden", mutable=[CACHE]
        )
    _, cache = whole(model, params, IDS)
    with pytest.raises(ValueError, match="there is none that can be written"):
        model.apply({"params": params, CACHE: cache}, IDS[:, :1], NOISE, positions, method="hidden")
    blocks, params = build("block_diffusion")
    with pytest.raises(ValueError, match="no key/value cache for attention='block_diffusion'"):
        whole(blocks, params, IDS)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"cp": 2})
    _, specs = sharding.abstract_params(model, L)
    f = shard_map(
        lambda p, ids: whole(model, p, ids)[0], mesh, (specs, P(None, "cp")), P(None, "cp")
    )
    with pytest.raises(ValueError, match=r"S = L·cp = L·1, and cp = 2: set mesh.cp=1"):
        jax.eval_shape(f, params, IDS)
