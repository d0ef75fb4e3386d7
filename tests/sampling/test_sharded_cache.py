"""The key/value cache over cp: prompts of unlike lengths are filled in by a pass of any plan, and
cached decoding writes the ids of one device.

Legend: B sequences, L inputs of the longest prompt, M positions of the cache."""

import functools

import build as builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import shard_map
from fdp.count import context as cost
from fdp.count import hlo
from fdp.count.counts import EXCHANGE, REDUCE
from fdp.mesh import AXES, BATCH_AXES, factor, make_mesh
from fdp.models import module
from fdp.models.shape import ModelShape
from fdp.models.transformer import transformer
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.masks import Mask
from fdp.sampling import autoregressive
from fdp.sampling.noise import Draw

pytestmark = pytest.mark.fast
B, L, M, NEW, BOS, N_IDS = 4, 16, 24, 8, 14, 13
TEXTS = [list(np.random.default_rng(b).integers(0, N_IDS, n)) for b, n in enumerate((0, 15, 8, 3))]
SHAPE = ModelShape(**(builders.SMALL | {"heads": 4, "kv_heads": 2, "head_dim": 8}))
PROMPTS = autoregressive.prompts_of(TEXTS, BOS, CONTIGUOUS, 1)
LENGTHS = PROMPTS.lengths_B
KEY, IDS, MASK = jax.random.key(3), jnp.arange(B), Mask("causal", window=6)


@functools.cache
def parameters():
    return builders.drawn(builders.shapes_and_specs(transformer(SHAPE, MASK), L)[0])


def written(model, params, prompts, ids):
    """(the new tokens, the cache): a pass over the prompts, then token by token."""
    draw = Draw(KEY, ids, NEW, N_IDS)
    return autoregressive.complete(model, {"params": params}, prompts, draw, M)


@functools.cache
def one_device():
    model = transformer(SHAPE, MASK)
    run = jax.jit(functools.partial(written, model))
    return run(parameters(), PROMPTS, IDS)


@jax.jit
def _whole(params, inputs):
    noised = {"inputs": inputs, "noise": jnp.zeros(B)}
    return module.run(transformer(SHAPE, MASK), {"params": params}, noised)[0]


def whole(inputs):
    """The logits of all M positions on one device, without a cache."""
    return _whole(parameters(), inputs)


def test_ids_after_ragged_prompts_are_those_of_a_sampler_that_recomputes():
    """All logits after what was written: token by token they draw the same ids, so these are those
    of a sampler that reads all it wrote again."""
    (got, _), inputs = one_device(), np.full((B, M), BOS, np.int32)
    for b, n in enumerate(LENGTHS):
        inputs[b, : n + NEW] = [BOS, *TEXTS[b], *np.asarray(got[b])]
    at_BxN = LENGTHS[:, None] - 1 + jnp.arange(NEW)

    rows_BxNxV = jnp.take_along_axis(whole(inputs), at_BxN[..., None], 1)

    def drawn(row_V, sample, i):
        draw = Draw(KEY, sample[None], NEW, N_IDS)
        return autoregressive.next_token(row_V[None], draw, i)[0]

    of_sequence = jax.vmap(drawn, (0, None, 0))
    want = jax.jit(jax.vmap(of_sequence))(rows_BxNxV, IDS, at_BxN)
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(got)) > 6


PLANS = {
    "cp2": ({"cp": 2}, CommPlan("ring", layout=SequenceLayout("striped"))),
    "cp4": ({"cp": 4}, CommPlan("ring", layout=ZIGZAG)),
    "cp2 tp2": ({"cp": 2, "tp": 2}, CommPlan("all_gather")),
    "dp2 cp2": ({"dp": 2, "cp": 2}, CommPlan("ulysses", 2, layout=SequenceLayout("striped", 4))),
}


@pytest.mark.parametrize("name", [pytest.param("cp2", marks=pytest.mark.slow), *list(PLANS)[1:]])
def test_ids_over_cp_are_those_of_one_device(name):
    degrees, plan = PLANS[name]
    model = transformer(SHAPE, MASK, plan)
    mesh = factor(make_mesh(dict.fromkeys(AXES, 1) | degrees), "cp")
    _, specs = builders.shapes_and_specs(model, L)
    rows, (_, kv) = P(BATCH_AXES), model.decode_state(B, M)
    given = specs, autoregressive.Prompts(P(BATCH_AXES, "cp"), rows, rows), rows
    run = jax.jit(shard_map(functools.partial(written, model), mesh, given, (rows, kv)))
    args = parameters(), autoregressive.prompts_of(TEXTS, BOS, plan.layout, degrees["cp"]), IDS
    program = run.lower(*args).compile()
    got, kept = program(*args)
    want, cache = one_device()
    np.testing.assert_array_equal(got, want)
    order = layouts.permutation(SequenceLayout("striped"), M, degrees["cp"])
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(one, np.asarray(other)[:, :, order], atol=3e-6)
        share = one.addressable_shards[0].data.shape[2]
        assert share == M // degrees["cp"]
    assert_bytes(hlo.collectives(program.as_text(), dict(mesh.shape)), degrees, plan)


def assert_bytes(found, degrees, plan):
    """All exchanges are those of the plan and of the prompt's way to the cache, all reductions over
    cp those that merge."""
    cp, tp, dp = (degrees.get(axis, 1) for axis in ("cp", "tp", "dp"))
    shape = cost.AttentionShape.of(SHAPE, B // dp, L, cp, tp)
    want = {EXCHANGE: 0.0, REDUCE: 0.0}
    for op, wire in cost.decode_bytes("tree", B // dp, 1, shape.heads, shape.head_dim, cp).items():
        want[op] += NEW * SHAPE.layers * wire
    for part in (cost.deal_bytes(plan.layout, shape), cost.forward_bytes(plan, shape, MASK)):
        want[EXCHANGE] += SHAPE.layers * part.get(EXCHANGE, 0)
    got = dict.fromkeys(want, 0.0)
    for c in found:
        if c.op in got and all(axis.startswith("cp") for axis in c.axes):
            got[c.op] += c.count * c.wire_bytes
    assert got == want


def test_what_exceeds_the_capacity_is_refused():
    model, draw = transformer(SHAPE, MASK), Draw(KEY, IDS, M - L + 1, N_IDS)
    message = r"prompt \+ new = 16 \+ 9 = 25 > M = 24 positions .* write at most 8 tokens"
    with pytest.raises(ValueError, match=message):
        autoregressive.complete(model, {}, PROMPTS, draw, M)


def test_prompts_are_filled_up_to_what_the_layout_divides():
    inputs, lengths, last = autoregressive.prompts_of([[5], [], [3, 4]], BOS, ZIGZAG, 2)
    order = layouts.permutation(ZIGZAG, 4, 2)
    rows = [[BOS, 5, BOS, BOS], [BOS] * 4, [BOS, 3, 4, BOS]]
    np.testing.assert_array_equal(inputs, np.array(rows)[:, order])
    assert list(lengths) == [2, 1, 3] and list(last) == [5, BOS, 4]
    with pytest.raises(ValueError, match="0 sequences: give at least one"):
        autoregressive.prompts_of([], BOS, ZIGZAG, 2)


def test_rows_after_a_rolled_back_draft_are_those_of_a_whole_pass():
    """Three rows a pass, of which every sequence keeps another number, under a window."""
    rows, kept = 3, jnp.array([0, 1, 3, 2])
    model, mesh = transformer(SHAPE, MASK), make_mesh(dict.fromkeys(AXES, 1) | {"cp": 4})
    params, (_, specs) = parameters(), builders.shapes_and_specs(model, L)
    inputs = np.random.default_rng(5).integers(0, N_IDS, (B, M), np.int32)
    drafted = jnp.where(jnp.arange(rows) < kept[:, None], inputs[:, :rows], N_IDS)
    after = jnp.take_along_axis(inputs, kept[:, None] + jnp.arange(rows), 1)

    def body(params, drafted, after, kept):
        variables = {"params": params}
        cache, _ = model.decode_state(B, 8)
        _, cache = autoregressive.read(model, variables, cache, drafted, 0)
        return autoregressive.read(model, variables, cache, after, kept)[0]

    given = specs, P(), P(), P()
    got = jax.jit(shard_map(body, mesh, given, P()))(params, drafted, after, kept)
    want = jnp.take_along_axis(whole(inputs), (kept + rows - 1)[:, None, None], 1)[:, 0]
    np.testing.assert_allclose(got, want, atol=1e-5)
