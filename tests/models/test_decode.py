"""Decoding of every layer with a state: a sequence read in pieces of any size, or token by token,
is the sequence read at once.

Legend: B sequences, L positions.
"""

import functools
from dataclasses import replace

import build as builders
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from build import experiment, tiny
from jax.sharding import PartitionSpec as P

from fdp.collectives import shard_map
from fdp.mesh import AXES, BATCH_AXES, make_mesh
from fdp.models import module
from fdp.models.attention import Attention, Softmax
from fdp.models.lact import LaCT
from fdp.models.layers import SwiGLU
from fdp.models.recurrent import GatedDeltaNet
from fdp.models.stack import Block, Layer, layer
from fdp.models.ttt import TTTMLP
from fdp.models.two_memories import TwoMemories
from fdp.parallel.masks import Mask
from fdp.sampling import autoregressive
from fdp.sampling.noise import Draw

pytestmark = pytest.mark.fast
B, L, CHUNK = 4, 24, 8
IDS = jax.random.randint(jax.random.key(1), (B, L), 0, 16)
NOISE = jnp.zeros(B)
STATES = (
    layer(GatedDeltaNet, chunk=CHUNK),
    # LaCT, and beside it another memory.
    layer(TwoMemories, chunk=CHUNK, rate=0.1, muon=True, near=2, reset=6),
    layer(TTTMLP, chunk=CHUNK, hidden=2),
)


@functools.cache
def build(*mixing: Layer):
    """(a model with each of these layers, parameters)."""
    sizes = {"layers": len(mixing), "heads": 2, "kv_heads": 2, "head_dim": 8, "conv": 4}
    changes = {f"model.{name}": n for name, n in sizes.items()} | {"data.seq_len": L}
    base = experiment(tiny(**changes, **{"objective.name": "autoregressive"})).model
    blocks = tuple(layer(Block, mixing=m, ffn=layer(SwiGLU)) for m in mixing)
    model = base.clone(pattern=blocks)
    drawn = builders.drawn(builders.shapes_and_specs(model, L)[0])
    return model, jax.tree.map(jnp.asarray, drawn)


@functools.cache
def hybrid():
    return build(*STATES, layer(Attention, core=Softmax(Mask("causal"))))


@functools.partial(jax.jit, static_argnums=(0, 3))
def whole(model, params, ids, keep_cache=False):
    hidden, _, cache = module.run(
        model, {"params": params}, ids, NOISE, method="hidden", keep_cache=keep_cache
    )
    return hidden, cache


@functools.partial(jax.jit, static_argnums=0)
def rows(model, params, cache, ids, start):
    index = jnp.broadcast_to(start + jnp.arange(ids.shape[1]), ids.shape)
    args = model, {"params": params}, ids, NOISE, index
    hidden, _, cache = module.run(*args, method="hidden", cache=cache)
    return hidden, cache


def near(got, want):
    assert np.linalg.norm(got - want) <= 4e-6 * np.linalg.norm(want)


def all_near(got, want):
    chex.assert_trees_all_equal_shapes(got, want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def in_pieces(model, params, ids, sizes):
    cache, at, out = model.decode_state(B, L)[0], 0, []
    for n in sizes:
        hidden, cache = rows(model, params, cache, ids[:, at : at + n], at)
        at, out = at + n, [*out, hidden]
    return jnp.concatenate(out, 1), cache


def test_pieces_of_any_size_are_the_whole_sequence():
    model, params = hybrid()
    want = whole(model, params, IDS)[0]
    by_token, after = in_pieces(model, params, IDS, [1] * L)
    in_parts, cache = in_pieces(model, params, IDS, [11, 1, 11, 1])
    for got in (by_token, in_parts):
        near(got, want)
    all_near(cache, after)
    wrong = jnp.zeros_like(IDS).at[:, 1:].set(IDS[:, 1:])  # another first token
    assert np.abs(whole(model, params, wrong)[0][:, -1] - want[:, -1]).max() > 1e-3


def test_a_pass_over_all_rows_keeps_the_state_without_momentum_and_a_window_too():
    model, params = build(
        layer(LaCT, chunk=CHUNK, rate=0.1, momentum=False, window=5, prenorm=True)
    )
    want, after = whole(model, params, IDS[:, :11], True)
    near(want, whole(model, params, IDS[:, :11])[0])  # without a cache: nothing lies before
    got, cache = in_pieces(model, params, IDS[:, :11], [1] * 11)
    near(got, want)
    all_near(cache, after)


def test_what_is_kept_does_not_grow_with_the_length():
    model, _ = build(*STATES, layer(LaCT, chunk=CHUNK, window=5))
    sizes = [jax.eval_shape(lambda n=n: model.decode_state(B, n)[0]) for n in (2**10, 2**20)]
    assert sizes[0] == sizes[1]


def test_a_cached_sampler_writes_the_ids_of_the_recomputing_one():
    model, params = hybrid()
    draw = Draw(jax.random.key(3), jnp.arange(B), L, 30)

    @jax.jit
    def written(cache, last, start):
        half = replace(draw, length=L // 2)
        return autoregressive.write(model, {"params": params}, cache, last, start, half)

    first, cache = written(model.decode_state(B, L)[0], jnp.full(B, 31), 0)
    rest, _ = written(cache, first[:, -1], L // 2)
    got = jnp.concatenate([first, rest], 1)
    # All logits after what was written: token by token they draw the same ids, so they are those
    # of a sampler that reads all it wrote again.
    hidden, _ = whole(model, params, jnp.roll(got, 1, 1).at[:, 0].set(31))
    logits = module.run(model, {"params": params}, hidden, method="outputs")[0]
    want, _ = jax.jit(lambda: autoregressive.sample(lambda _, i: logits[:, i], draw, 31))()
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(np.asarray(got))) > 8


def test_tensor_parallel_decoding_is_that_of_one_device():
    model, params = hybrid()
    want, after = in_pieces(model, params, IDS, [11])
    want = want[:, -2:]
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"dp": 2, "tp": 2})
    _, specs = builders.shapes_and_specs(model, L)
    rows_spec, (_, cache_spec) = P(BATCH_AXES), model.decode_state(B, L)

    def body(params, ids):
        cache, _ = model.decode_state(len(ids), L)
        for start, end in ((0, 9), (9, 11)):  # the second reads a memory that lies over tp
            index = jnp.broadcast_to(jnp.arange(start, end), (len(ids), end - start))
            args = model, {"params": params}, ids[:, start:end], NOISE[: len(ids)], index
            hidden, _, cache = module.run(*args, method="hidden", cache=cache)
        return hidden, cache

    run = jax.jit(shard_map(body, mesh, (specs, rows_spec), (rows_spec, cache_spec)))
    got, cache = run(params, IDS)
    near(got, want)
    for name in ("0", "1", "2"):  # attention's tail has a copy on every device of tp
        one, other = (tree["layers"][name]["attention"] for tree in (cache, after))
        for memory in one.keys() & {"memory", "near_memory"}:
            all_near(one[memory], other[memory])


def test_a_sequence_that_is_not_a_number_spoils_no_other():
    model, params = hybrid()
    ids, table = IDS.at[1, 5].set(17), params["embed"]["table"]  # an id that no other has
    clean, _ = whole(model, params, ids)
    nan = params | {"embed": {"table": table.at[17].set(jnp.nan)}}
    spoilt, _ = whole(model, nan, ids)
    assert np.isnan(spoilt[1, 5:]).any()
    np.testing.assert_array_equal(np.delete(spoilt, 1, 0), np.delete(clean, 1, 0))


def test_refusals():
    model, params = build(*STATES)
    index = jnp.zeros((B, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"no cache holds .*decode_state"):
        module.run(model, {"params": params}, IDS[:, :1], NOISE, index, method="hidden")
    one = model.clone(shape=replace(model.shape, conv=1))
    with pytest.raises(ValueError, match=r"conv = 1 taps mix no positions: set 0"):
        one.check(B, {"inputs": IDS}, dict.fromkeys(AXES, 1))
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"cp": 2})
    _, specs = builders.shapes_and_specs(model, L)
    f = shard_map(
        lambda p, ids: whole(model, p, ids, True)[0], mesh, (specs, P(None, "cp")), P(None, "cp")
    )
    with pytest.raises(ValueError, match=r"whole sequences, and cp = 2: set mesh.cp=1"):
        jax.eval_shape(f, params, IDS)
