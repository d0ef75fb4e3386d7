"""Every plan with lists of key blocks equals block-sparse attention on one device and sends what
its formula says.

Legend: B sequences, S positions, H query heads, K key heads, C head_dim, Y block, W blocks, L width
of a list."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import psum, shard_map, vary
from fdp.count import jaxpr
from fdp.count.blocks import BlockCounts
from fdp.count.context import AttentionShape
from fdp.count.gather import BlockGather, listed_bytes
from fdp.mesh import AXES, factor, make_mesh
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout
from fdp.parallel.context.lists import attend_blocks, topk_ids
from fdp.parallel.context.plan import CommPlan, check
from fdp.parallel.context.requests import block_ids
from fdp.parallel.masks import Mask

pytestmark = pytest.mark.fast

B, S, H, K, C, Y = 2, 64, 8, 4, 4, 2
W, L = S // Y, 12
STRIPED = SequenceLayout("striped", Y)
CAUSAL, PACKED = Mask("causal"), Mask("causal", packed=True)
LEADS = {"shared": (1, 1), "heads": (1, K), "sequences": (B, 1)}


@functools.cache
def data() -> tuple[np.ndarray, ...]:
    """q, k, v, the output's gradient, segments."""
    rng = np.random.default_rng(0)
    normal = lambda heads: rng.normal(size=(B, S, heads, C)).astype(np.float32)
    return (
        normal(H),
        normal(K),
        normal(K),
        normal(H),
        np.cumsum(rng.random((B, S)) < 0.1, axis=1).astype(np.int32),
    )


@functools.cache
def wanted_blocks(lead: tuple[int, int]) -> np.ndarray:
    """bool [b, k, W, W]: own block, the first and random earlier ones, at most L; block 5 sees
    nothing.
    """
    rng = np.random.default_rng(sum(lead))
    score = np.where(np.tri(W, k=-1), rng.random((*lead, W, W)), 2.0)
    masks = (score.argsort(-1).argsort(-1) < L - 2) & np.tri(W, dtype=bool) | np.eye(W, dtype=bool)
    masks[..., 0] = True
    masks[..., 5, :] = False
    return masks


def ids_of(lead: tuple[int, int], layout: SequenceLayout, cp: int) -> np.ndarray:
    return np.concatenate([block_ids(m, Y, layout, cp, L) for m in wanted_blocks(lead)])


def attention(plan: CommPlan, mask: Mask, *arguments: jax.Array) -> tuple:
    """(out, dq, dk, dv, overflow) of local arrays."""
    q, k, v, dout, segment, ids, position = arguments
    f = lambda q, k, v: attend_blocks(q, k, v, ids, Y, mask, plan, position, segment)
    out, pull, overflow = jax.vjp(f, q, k, v, has_aux=True)
    return out, *pull(dout), psum(vary(overflow, ("dp", "tp")), ("dp", "tp"))


def program(plan: CommPlan, mask: Mask, lead: tuple[int, int], degrees: dict[str, int]):
    """(sharded function, mesh)."""
    mesh = make_mesh(dict.fromkeys(AXES, 1) | degrees)
    mesh = factor(mesh, "cp") if degrees["cp"] > 1 else mesh
    each, lists = (
        P("dp", "cp", "tp"),
        P("dp" if lead[0] > 1 else None, "tp" if lead[1] > 1 else None, "cp"),
    )
    specs = (each, each, each, each, P("dp", "cp"), lists, P("cp"))
    return shard_map(
        functools.partial(attention, plan, mask), mesh, specs, (each,) * 4 + (P(),)
    ), mesh


def arguments(plan: CommPlan, lead: tuple[int, int], cp: int) -> list[np.ndarray]:
    order = layouts.permutation(plan.layout, S, cp)
    return [*(x[:, order] for x in data()), ids_of(lead, plan.layout, cp), order]


@functools.cache
def reference(mask: Mask, lead: tuple[int, int]) -> list[np.ndarray]:
    plan = CommPlan("all_gather")
    one = jax.jit(functools.partial(attention, plan, mask))
    return [np.asarray(x) for x in one(*arguments(plan, lead, 1))]


def capacity(lead: tuple[int, int], layout: SequenceLayout, cp: int) -> int:
    masks = wanted_blocks(lead).reshape(-1, W, W)
    return BlockCounts.laid_out(masks, layout, cp, Y).capacity


@pytest.mark.parametrize("lead", LEADS.values(), ids=LEADS)
@pytest.mark.parametrize("kind", ["gather", "ulysses", "all_gather"])
def test_equals_one_device_and_sends_the_closed_formula(kind: str, lead) -> None:
    """In every layout, by one program: positions and lists are data. The capacity is exact for the
    layout that needs most."""
    every = [CONTIGUOUS, ZIGZAG, STRIPED]
    fits = max(capacity(lead, layout, 8) for layout in every) if kind == "gather" else 0
    plan = CommPlan(kind, 8 if kind == "ulysses" else 1, capacity=fits)
    f, mesh = program(plan, CAUSAL, lead, {"cp": 8})
    run = jax.jit(f)
    for layout in every:
        *got, overflow = run(*arguments(replace(plan, layout=layout), lead, 8))
        order = layouts.permutation(layout, S, 8)
        for a, b in zip(got, reference(CAUSAL, lead)[:4], strict=True):
            np.testing.assert_allclose(a, b[:, order], atol=1e-5 * max(1.0, float(np.abs(b).max())))
        assert int(overflow) == 0
    given = arguments(plan, lead, 8)
    counted: dict[str, float] = {}
    for one in jaxpr.collectives(jax.make_jaxpr(f)(*given), mesh.shape, {"gather_attend": 0}):
        counted[one.op] = counted.get(one.op, 0.0) + one.wire_bytes * one.count
    gather = BlockGather(AttentionShape(B, S, H, K, C, 8, 4), Y, fits, int(np.prod(lead)))
    parts = listed_bytes(plan, gather, L, CAUSAL)
    assert counted == pytest.approx(
        {op: sum(p.get(op, 0.0) for p in parts) for op in parts[0].keys() | parts[1]}
    )


@pytest.mark.parametrize("mask", [CAUSAL, PACKED], ids=["causal", "packed"])
@pytest.mark.parametrize("kind", ["gather", "ulysses", "all_gather"])
def test_equals_one_device_on_a_mixed_mesh_and_with_documents(kind: str, mask: Mask) -> None:
    lead, degrees = (B, K), {"dp": 2, "cp": 2, "tp": 2}
    plan = CommPlan(
        kind, 2 if kind == "ulysses" else 1, capacity=3 if kind == "gather" else 0, layout=ZIGZAG
    )
    f, _ = program(plan, mask, lead, degrees)
    *got, overflow = jax.jit(f)(*arguments(plan, lead, 2))
    order = layouts.permutation(ZIGZAG, S, 2)
    for a, b in zip(got, reference(mask, lead)[:4], strict=True):
        np.testing.assert_allclose(a, b[:, order], atol=1e-5 * max(1.0, float(np.abs(b).max())))
    assert (int(overflow) > 0) == (
        kind == "gather"
    )  # three blocks a pair of devices are too few, and it is right


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_fewer_key_heads_than_devices_travel_with_their_own_lists(kv_heads: int) -> None:
    q, k, v, dout, segment = data()
    lead = (1, kv_heads)
    ids = ids_of(lead, CONTIGUOUS, 1)
    given = q, k[:, :, :kv_heads], v[:, :, :kv_heads], dout, segment, ids, np.arange(S)
    want = jax.jit(functools.partial(attention, CommPlan("all_gather"), CAUSAL))(*given)
    f, _ = program(CommPlan("ulysses", 8), CAUSAL, lead, {"cp": 8})
    for a, b in zip(jax.jit(f)(*given), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())))


def test_an_impossible_id_is_no_block_and_is_counted() -> None:
    plan = CommPlan("ulysses", 8)
    given = arguments(plan, (1, 1), 8)
    given[-2] = np.concatenate([given[-2], np.full((1, 1, W, 1), W, np.int32)], -1)
    *got, overflow = jax.jit(program(plan, CAUSAL, (1, 1), {"cp": 8})[0])(*given)
    assert int(overflow) == W
    np.testing.assert_allclose(got[0], reference(CAUSAL, (1, 1))[0], atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (CommPlan("ring"), "'ring' has no lists of blocks: use gather, ulysses, all_gather"),
        (CommPlan("gather", hops=(1,)), "with hops has no lists"),
        (
            CommPlan("ulysses", 8, capacity=2),
            "capacity = 2: plan ulysses has room for every block, set capacity=0",
        ),
        (CommPlan("ulysses", 4), "needs head_split = 8, not 4"),
        (CommPlan("gather", 2, capacity=2), "needs head_split = 1, not 2"),
        (CommPlan("gather", capacity=9), r"capacity = 9 is not in 0 … N/block = 8/2 = 4"),
    ],
    ids=lambda x: x.kind if isinstance(x, CommPlan) else "",
)
def test_plans_without_lists_are_refused(plan: CommPlan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(program(plan, CAUSAL, (1, 1), {"cp": 8})[0], *arguments(plan, (1, 1), 8))


def test_heads_that_cannot_be_shared_out_are_refused() -> None:
    q, k, v, dout, *rest = arguments(CommPlan("ulysses", 8), (1, 1), 8)
    f, _ = program(CommPlan("ulysses", 8), CAUSAL, (1, 1), {"cp": 8})
    with pytest.raises(
        ValueError, match="heads = 4 and kv_heads = 4 cannot be shared out by head_split = cp = 8"
    ):
        jax.eval_shape(f, q[:, :, :4], k, v, dout[:, :, :4], *rest)


def test_a_gather_without_lists_is_refused() -> None:
    with pytest.raises(ValueError, match="'gather' needs lists of key blocks"):
        check(
            CommPlan("gather", capacity=2), CAUSAL, seq_len=64, cp=8, heads=8, kv_heads=4, batch=2
        )


def best_blocks(q: np.ndarray, k: np.ndarray, width: int) -> np.ndarray:
    """The lists of a whole sequence, row by row in float64: [B, K, W, width], -1 unused."""
    pooled = lambda x: x.astype(float).reshape(B, W, Y, x.shape[2], C).mean(2)
    q_BxWxHxC, k_BxWxKxC = pooled(q), pooled(k)
    out = np.full((B, K, W, width), -1)
    for b, head, row in np.ndindex(B, K, W):
        group = q_BxWxHxC[b, row, head * (H // K) : (head + 1) * (H // K)]
        logits = group @ k_BxWxKxC[b, : row + 1, head].T / C**0.5
        mass = np.exp(logits - logits.max(-1, keepdims=True))
        score = (mass / mass.sum(-1, keepdims=True)).sum(0)
        score[[0, row]] = np.inf
        kept = np.argsort(-score, kind="stable")[:width]
        out[b, head, row, : len(kept)] = kept
    return out


@pytest.mark.parametrize("layout", [CONTIGUOUS, ZIGZAG, STRIPED], ids=lambda at: at.kind)
def test_lists_from_the_input_hold_the_best_blocks(layout: SequenceLayout) -> None:
    q, k = data()[:2]
    width, order = 5, layouts.permutation(layout, S, 8)
    mesh = factor(make_mesh(dict.fromkeys(AXES, 1) | {"cp": 8}), "cp")
    f = lambda q, k: topk_ids(q, k, Y, width, layouts.positions(layout, S // 8))
    spec = P(None, "cp")
    ids = np.asarray(
        jax.jit(shard_map(f, mesh, (spec, spec), P(None, None, "cp")))(q[:, order], k[:, order])
    )
    want = best_blocks(q, k, width)
    rows = order[::Y] // Y
    np.testing.assert_array_equal(np.sort(ids, -1), np.sort(want[:, :, rows], -1))
    found = jaxpr.collectives(
        jax.make_jaxpr(shard_map(f, mesh, (spec, spec), P(None, None, "cp")))(q, k), mesh.shape
    )
    sent = sum(one.wire_bytes * one.count for one in found)
    shape = AttentionShape(B, S, H, K, C, 8, 4)
    assert (
        sent == 7 * shape.unit / (2 * Y) + 7 * 4 * W / 8
    )  # mean keys, and which blocks a device holds


def test_selection_is_not_differentiated_and_bad_lists_are_refused() -> None:
    q, k = map(jnp.asarray, data()[:2])
    ids = topk_ids(q, k, Y, 4, jnp.arange(S))
    slopes = jax.grad(lambda q: (topk_ids(q, k, Y, 4, jnp.arange(S)) * 0.0 + q.sum()).sum())(q)
    assert ids.shape == (B, K, W, 4) and np.ptp(slopes) == 0
    with pytest.raises(
        ValueError, match="N = 64 positions of a device are not divisible by block = 3"
    ):
        topk_ids(q, k, 3, 4, jnp.arange(S))
    with pytest.raises(ValueError, match=r"width = 1 is not in 2 … 32 blocks"):
        topk_ids(q, k, Y, 1, jnp.arange(S))
