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
from fdp.parallel.context.layouts import SequenceLayout
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.masks import Mask
from fdp.sampling import autoregressive
from fdp.sampling.noise import Draw

pytestmark = pytest.mark.fast
B, L, M, NEW, BOS, N_IDS = 4, 16, 24, 8, 14, 13
LENGTHS = jnp.array([1, 16, 9, 4])  # inputs: the first has no prompt but the start token
SHAPE = ModelShape(**(builders.SMALL | {"heads": 4, "kv_heads": 2, "head_dim": 8}))
INPUTS = jax.random.randint(jax.random.key(1), (B, L), 0, N_IDS).at[:, 0].set(BOS)
LAST = jnp.take_along_axis(INPUTS, LENGTHS[:, None] - 1, 1)[:, 0]
KEY, IDS = jax.random.key(3), jnp.arange(B)


@functools.cache
def parameters():
    return builders.drawn(builders.shapes_and_specs(transformer(SHAPE, Mask("causal")), L)[0])


def written(model, params, inputs, lengths, last, ids):
    """(the new tokens, the cache): a pass over the prompts, then token by token."""
    draw = Draw(KEY, ids, NEW, N_IDS)
    return autoregressive.complete(model, {"params": params}, inputs, lengths, last, draw, M)


@functools.cache
def one_device():
    model = transformer(SHAPE, Mask("causal"))
    run = jax.jit(functools.partial(written, model))
    return run(parameters(), INPUTS, LENGTHS, LAST, IDS)


def test_ids_after_ragged_prompts_are_those_of_a_sampler_that_recomputes():
    """All logits after what was written: token by token they draw the same ids, so these are those
    of a sampler that reads all it wrote again."""
    model, (got, _) = transformer(SHAPE, Mask("causal")), one_device()
    whole = np.full((B, M), BOS, np.int32)
    for b, n in enumerate(LENGTHS):
        whole[b, : int(n) + NEW] = np.concatenate([INPUTS[b, :n], got[b]])
    noised = {"inputs": whole, "noise": jnp.zeros(B)}
    logits = jax.jit(lambda p, x: module.run(model, {"params": p}, x)[0])(parameters(), noised)
    at_BxN = LENGTHS[:, None] - 1 + jnp.arange(NEW)

    def drawn(logits, at_B):
        row_BxV = jnp.take_along_axis(logits, at_B[:, None, None], 1)[:, 0]
        return autoregressive.next_token(row_BxV, Draw(KEY, IDS, NEW, N_IDS), at_B)

    want = jax.jit(jax.vmap(drawn, (None, 1), 1))(logits, at_BxN)
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(got)) > 6


PLANS = {
    "cp2": ({"cp": 2}, CommPlan("all_gather")),
    "cp4": ({"cp": 4}, CommPlan("ring", layout=SequenceLayout("zigzag"))),
    "cp2 tp2": ({"cp": 2, "tp": 2}, CommPlan("ring", layout=SequenceLayout("striped"))),
    "dp2 cp2": ({"dp": 2, "cp": 2}, CommPlan("ulysses", 2, layout=SequenceLayout("striped", 4))),
}


@pytest.mark.parametrize("name", PLANS)
def test_ids_over_cp_are_those_of_one_device(name):
    degrees, plan = PLANS[name]
    model = transformer(SHAPE, Mask("causal"), plan)
    mesh = factor(make_mesh(dict.fromkeys(AXES, 1) | degrees), "cp")
    _, specs = builders.shapes_and_specs(model, L)
    rows, (_, cache) = P(BATCH_AXES), model.decode_state(B, M)
    given = specs, P(BATCH_AXES, "cp"), rows, rows, rows
    run = jax.jit(shard_map(functools.partial(written, model), mesh, given, (rows, cache)))
    dealt = layouts.permute(INPUTS, plan.layout, degrees["cp"])
    args = parameters(), dealt, LENGTHS, LAST, IDS
    program = run.lower(*args).compile()
    got, kept = program(*args)
    want, whole = one_device()
    np.testing.assert_array_equal(got, want)
    order = layouts.permutation(SequenceLayout("striped"), M, degrees["cp"])
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(whole), strict=True):
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
    for part in (
        cost.deal_bytes(plan.layout, shape),
        cost.forward_bytes(plan, shape, Mask("causal")),
    ):
        want[EXCHANGE] += SHAPE.layers * part.get(EXCHANGE, 0)
    got = dict.fromkeys(want, 0.0)
    for c in found:
        if c.op in got and all(axis.startswith("cp") for axis in c.axes):
            got[c.op] += c.count * c.wire_bytes
    assert got == want


def test_what_exceeds_the_capacity_is_refused():
    model, draw = transformer(SHAPE, Mask("causal")), Draw(KEY, IDS, M - L + 1, N_IDS)
    message = r"prompt \+ new = 16 \+ 9 = 25 > M = 24 positions .* write at most 8 tokens"
    with pytest.raises(ValueError, match=message):
        autoregressive.complete(model, {}, INPUTS, LENGTHS, LAST, draw, M)
