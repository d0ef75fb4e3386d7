"""The key/value cache of Attention and Transformer: whole passes fill it, row passes update and
read it.
"""

import functools

import build as builders
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import shard_map
from fdp.count import jaxpr
from fdp.mesh import AXES, BATCH_AXES, make_mesh
from fdp.models import module
from fdp.models.transformer import transformer
from fdp.objectives.block_diffusion import BlockDiffusionRule
from fdp.parallel.masks import Mask

pytestmark = pytest.mark.fast
B, L = 4, 8
KEY = jax.random.key(0)
IDS = jax.random.randint(jax.random.key(1), (B, L), 0, 16)
NOISE = jnp.linspace(0.1, 0.9, B)


@functools.cache
def build(attention="bidirectional", **changes):
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 8}
    model = builders.model(attention, **{**sizes, **changes})
    return model, builders.parameters(model, L)


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, ids):
    """(hidden, cache) of a pass over all rows."""
    args = model, {"params": params}, ids, NOISE[: len(ids)]
    hidden, _, cache = module.run(*args, method="hidden", keep_cache=True)
    return hidden, cache


@functools.partial(jax.jit, static_argnums=0)
def rows(model, params, cache, ids, positions):
    """(hidden, cache) of a pass over the rows at `positions` [B, R]."""
    at = jnp.take_along_axis(ids, positions, 1)
    args = model, {"params": params}, at, NOISE[: len(ids)], positions
    hidden, _, cache = module.run(*args, method="hidden", cache=cache)
    return hidden, cache


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True, "time_conditioning": True}, {"remat": "full"}]
)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_rows_against_a_fresh_cache_are_those_of_a_whole_pass(attention, changes):
    model, params = build(attention, **changes)
    hidden, cache = whole(model, params, IDS)
    args = IDS, NOISE
    plain = jax.jit(lambda p: module.run(model, {"params": p}, *args, method="hidden")[0])(params)
    np.testing.assert_array_equal(hidden, plain)  # to fill the cache changes nothing
    positions = jnp.array(
        [[5, 2], [0, 7], [3, 4], [1, 6]]
    )  # another choice for every sequence, in any order
    some, kept = rows(model, params, cache, IDS, positions)
    np.testing.assert_allclose(
        some, jnp.take_along_axis(hidden, positions[..., None], 1), atol=2e-6
    )
    chex.assert_trees_all_close(kept, cache, rtol=1e-7, atol=2e-6)


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
    cache = model.decode_state(B, L)[0]
    step = jax.jit(lambda cache, i: rows(model, params, cache, IDS, jnp.full((B, 1), i)))
    for i in range(L):
        one, cache = step(cache, i)
        np.testing.assert_allclose(one[:, 0], hidden[:, i], atol=2e-6)
    chex.assert_trees_all_close(cache, expected, rtol=1e-7, atol=2e-6)


@pytest.mark.parametrize("changes", [{}, {"sequence_parallel": True}])
def test_on_a_mesh_the_cache_is_sharded_and_the_values_are_equal(changes):
    model, params = build(**changes)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"dp": 2, "tp": 2})
    _, specs = builders.shapes_and_specs(model, L)
    state, (_, kv) = P(BATCH_AXES), model.decode_state(B, L)
    positions = jnp.broadcast_to(jnp.array([2, 5]), (B, 2))
    changed = IDS.at[:, 2].add(1) % 16
    plain, _ = build()
    hidden, cache = whole(plain, params, IDS)
    expected, after = rows(plain, params, cache, changed, positions)

    def body(params, ids, noise):
        variables, at = {"params": params}, positions[: len(noise)]
        args = model, variables, ids[0], noise
        first, _, kept = module.run(*args, method="hidden", keep_cache=True)
        args = model, variables, jnp.take_along_axis(ids[1], at, 1), noise, at
        second, _, again = module.run(*args, method="hidden", cache=kept)
        if model.shape.sequence_parallel:  # gathered, so typed varying over tp: equal on all of it
            first, second = (jax.lax.pmax(x, "tp") for x in (first, second))
        return first, second, kept, again

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
    variables = jax.eval_shape(lambda: module.init(model, KEY, builders.blank_input(L)))
    assert set(variables) == {"params", "state"} and variables["state"] == {}
    args = model, {"params": params}, IDS, NOISE
    filling = jax.make_jaxpr(lambda: whole(model, params, IDS))()
    plain = jax.make_jaxpr(lambda: module.run(*args, method="hidden")[0])()
    assert module.run(*args, method="hidden")[2] == {}
    assert jaxpr.dot_flops(filling) == jaxpr.dot_flops(plain)


def test_refusals():
    model, params = build()
    positions = jnp.zeros((B, 1), jnp.int32)
    args = {"params": params}, IDS[:, :1], NOISE, positions
    with pytest.raises(ValueError, match=r"no cache holds .k.*decode_state"):
        module.run(model, *args, method="hidden", keep_cache=True)
    with pytest.raises(ValueError, match="no cache holds 'k'"):
        module.run(model, *args, method="hidden")
    rule = Mask(rule=BlockDiffusionRule(4, 2))
    with pytest.raises(ValueError, match=r"no key/value cache for the mask .*BlockDiffusionRule"):
        whole(transformer(model.shape, rule), params, IDS)
    refused_over_cp(
        model, r"over cp = 2 needs a causal mask.*not Mask.*bidirectional.*: set mesh.cp=1 and give"
    )
    refused_over_cp(transformer(model.shape, rule), r"no key/value cache for the mask")
    packed = transformer(model.shape, Mask("causal", packed=True))
    refused_over_cp(packed, r"no key/value cache for the mask .*packed=True")
    message = r"keeps the last 2 positions, and over cp = 2 .*row by row .*or set mesh.cp=1"
    refused_over_cp(builders.model("causal", conv=3), message)


def refused_over_cp(model, message):
    """A pass over cp = 2 that would keep a cache."""
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"cp": 2})
    params, specs = builders.shapes_and_specs(model, L)
    f = shard_map(
        lambda p, ids: whole(model, p, ids)[0], mesh, (specs, P(None, "cp")), P(None, "cp")
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(f, params, IDS)


def test_a_cache_that_is_too_small_or_does_not_divide_is_refused():
    model, params = build("causal")
    cache = jax.eval_shape(lambda: model.decode_state(B, L - 2)[0])
    args = {"params": params}, IDS, NOISE
    with pytest.raises(
        ValueError,
        match=r"prompt \+ new = 8 \+ 0 = 8 > M = 6 positions .*make it 8 .*shorten the prompt",
    ):
        jax.eval_shape(lambda c: module.run(model, *args, method="hidden", cache=c)[2], cache)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"cp": 4})
    (_, specs), what = model.decode_state(B, L), r"M = 6 .* not divisible by cp = 4: make it 8 pos"
    with pytest.raises(ValueError, match=what):
        jax.eval_shape(shard_map(lambda: model.decode_state(B, 6)[0], mesh, (), specs))
