"""The block gather on virtual devices equals block-sparse attention on one: values, gradients,
overflow, bytes, FLOPs.

Programs scan two layers as models do, rematerialised: the first has lists that fit (in contiguous
and zig-zag layouts), the second, in one sequence and head where lists are not shared, lists that do
not. Both branches, and different ones in different groups of cp, thus run in every program.

Legend: B sequences, S positions, H query heads, K key heads, C head_dim, Y block, W blocks, L width
of a list; arrays lead with the 2 layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import shard_map
from fdp.count import hlo, jaxpr
from fdp.count.blocks import BlockCounts
from fdp.count.context import AttentionShape
from fdp.count.gather import BlockGather
from fdp.mesh import factor, make_mesh
from fdp.parallel.context import layouts
from fdp.parallel.context.gather import SCOPE, gather_attend
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout, block_order
from fdp.parallel.context.requests import block_ids
from fdp.parallel.masks import Mask

B, S, H, K, C, Y = 2, 64, 4, 2, 4, 2
W, L = S // Y, 16
STRIPED = SequenceLayout("striped", 2 * Y)
CAUSAL, PACKED = Mask("causal"), Mask("causal", packed=True)
CP8, MIXED = (("cp", 8),), (("dp", 2), ("cp", 2), ("tp", 2))
SHARED = (1, 1)


def mesh_of(degrees, split: bool = True):
    mesh = make_mesh({"pp": 1, "dp": 1, "ep": 1, "cp": 1, "tp": 1, **dict(degrees)})
    return factor(mesh, "cp") if split else mesh


@functools.cache
def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = lambda heads: rng.normal(size=(2, B, S, heads, C)).astype(np.float32)
    segment = np.cumsum(rng.random((B, S)) < 0.1, axis=1).astype(np.int32)
    return {"q": normal(H), "k": normal(K), "v": normal(K), "dout": normal(H), "segment": segment}


@functools.cache
def wanted_blocks(lead: tuple[int, int]) -> np.ndarray:
    """bool [2, b, k, W, W]: near blocks and the first, except of query block 5, which sees nothing;
    random ones in the second layer's first list."""
    i, j = np.arange(W)[:, None], np.arange(W)
    near = (i - j <= 1) & (i >= j) | (j == 0)
    near[5] = False
    masks = np.broadcast_to(near, (2, *lead, W, W)).copy()
    masks[1, 0, 0] = np.random.default_rng(1).random((W, W)).argsort(1) < 9
    return masks


def ids_of(masks: np.ndarray, layout: SequenceLayout, cp: int, width: int = L) -> np.ndarray:
    """int32 [2, b, k, W, width] in the order of the layout."""
    return np.stack(
        [np.concatenate([block_ids(m, Y, layout, cp, width) for m in layer]) for layer in masks]
    )


def dense(mask: Mask, q, k, v, segment, blocks_bxkxWxW):
    """The oracle of one layer: repeated heads, all scores, no shared code."""
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    i, j = np.arange(S)[:, None], np.arange(S)[None, :]
    seen = blocks_bxkxWxW.repeat(Y, 2).repeat(Y, 3)
    seen = np.broadcast_to(seen, (B, K, S, S)).repeat(H // K, 1)
    if mask.kind == "causal":
        seen = seen & (j <= i)
    if mask.window:
        seen = seen & (abs(i - j) < mask.window)
    if mask.packed:
        seen = seen & (segment[:, :, None] == segment[:, None, :])[:, None]
    s = jnp.where(seen, jnp.einsum("bnhc,bmhc->bhnm", q, k) / C**0.5, -1e30)
    p = jnp.where(seen, jax.nn.softmax(s), 0.0)
    return jnp.einsum("bhnm,bmhc->bnhc", p, v)


def wanted(mask: Mask, masks: np.ndarray, **changed) -> tuple[np.ndarray, ...]:
    d = {**data(), **changed}
    layer = lambda q, k, v: jnp.stack(
        [dense(mask, *x, d["segment"], m) for *x, m in zip(q, k, v, masks, strict=True)]
    )
    out, pull = jax.vjp(jax.jit(layer), d["q"], d["k"], d["v"])
    return tuple(np.asarray(x) for x in (out, *pull(d["dout"])))


def missing(masks: np.ndarray, layout: SequenceLayout, cp: int, capacity: int) -> np.ndarray:
    """Blocks that do not fit, by layer and list, int [2, b, k]: counted from sets, device by
    device.
    """
    order = block_order(layout, W, Y, cp).reshape(cp, -1)
    out = np.zeros(masks.shape[:3], int)
    for at in np.ndindex(*out.shape):
        unions = [masks[at][order[d]].any(0) for d in range(cp)]
        needs = [unions[d][order[s]].sum() for d in range(cp) for s in range(cp) if s != d]
        out[at] = np.maximum(np.array(needs) - capacity, 0).sum()
    return out


def layers(mask: Mask, capacity: int):
    """(q, k, v, ids, position, segment) → (out, overflow) of two layers."""

    def run(q, k, v, ids, position, segment):
        segment = segment if mask.packed else None
        layer = jax.checkpoint(lambda *x: gather_attend(*x, capacity, Y, mask, position, segment))
        out, overflow = jax.lax.scan(lambda _, x: (None, layer(*x)), None, (q, k, v, ids))[1]
        return out, overflow[:, None, None]

    return run


def sharded(mesh, mask: Mask, capacity: int, lead: tuple[int, int], inner=None):
    cp = tuple(n for n in mesh.shape if n.startswith("cp"))
    act, b, k = (
        P(None, "dp", cp, "tp"),
        "dp" if lead[0] > 1 else None,
        "tp" if lead[1] > 1 else None,
    )
    specs = (act, act, act, P(None, b, k, cp), P(cp), P("dp", cp))
    return shard_map(
        inner or layers(mask, capacity),
        mesh,
        specs,
        (act, P(None, b if not mask.packed else "dp", k)),
    )


def with_gradients(f):
    def run(q, k, v, dout, *rest):
        out, pull, overflow = jax.vjp(lambda *x: f(*x, *rest), q, k, v, has_aux=True)
        return (out, *pull(dout)), overflow

    return run


@functools.cache
def compiled(degrees, mask: Mask, capacity: int, lead=SHARED, width: int = L, split: bool = True):
    d, ids = data(), np.zeros((2, *lead, W, width), np.int32)
    f = with_gradients(sharded(mesh_of(degrees, split), mask, capacity, lead))
    arguments = (d["q"], d["k"], d["v"], d["dout"], ids, np.arange(S, dtype=np.int32), d["segment"])
    return jax.jit(f).lower(*arguments).compile()


def outcome(program, ids: np.ndarray, layout=CONTIGUOUS, cp: int = 8, **changed):
    """((out, dq, dk, dv) in the order of positions, overflow [2, ·, ·]) of ids in the order of the
    layout.
    """
    d = {**data(), **changed}
    qkv = layouts.permute([d[name] for name in ("q", "k", "v", "dout")], layout, cp, dim=2)
    position = layouts.permutation(layout, S, cp)
    got, overflow = program(*qkv, ids, position, layouts.permute(d["segment"], layout, cp))
    return layouts.permute([np.asarray(x) for x in got], layout, cp, dim=2, undo=True), np.asarray(
        overflow
    )


def assert_equal(got, want) -> None:
    forward = np.abs(got[0] - want[0]).max()
    gradient = max(
        np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got[1:], want[1:], strict=True)
    )
    assert forward <= 1e-5 and gradient <= 1e-4, f"forward {forward:.1e}, gradients {gradient:.1e}"


CASES = [
    (CP8, CAUSAL, 2, SHARED),
    ((("cp", 4),), PACKED, 3, (B, K)),
    ((("cp", 2),), Mask(window=9), 2, (1, K)),
    (MIXED, CAUSAL, 3, (B, K)),
    (MIXED, PACKED, 3, (B, 1)),
]


@pytest.mark.parametrize(("degrees", "mask", "capacity", "lead"), CASES)
def test_values_gradients_and_overflow_equal_one_device(
    degrees, mask: Mask, capacity: int, lead
) -> None:
    cp, masks = dict(degrees)["cp"], wanted_blocks(lead)
    program, want = compiled(degrees, mask, capacity, lead), wanted(mask, masks)
    for layout in (CONTIGUOUS, ZIGZAG, STRIPED):
        got, overflow = outcome(program, ids_of(masks, layout, cp), layout, cp)
        assert_equal(got, want)
        lost = missing(masks, layout, cp, capacity)
        assert lost[1].any() and (layout == STRIPED or not lost[0].any())  # both branches run
        # One figure for each group of cp: summed over the lists that its devices hold.
        groups = overflow.shape[1:]
        assert (
            overflow.tolist()
            == lost.reshape(2, groups[0], -1, groups[1], lost.shape[2] // groups[1])
            .sum((2, 4))
            .tolist()
        )
    assert (
        not got[0][:, :, 5 * Y : 6 * Y][0].any() and not got[1][:, :, 5 * Y : 6 * Y][0].any()
    )  # sees nothing


def test_an_unfactored_axis_and_one_device_give_the_same() -> None:
    masks, mask = wanted_blocks((1, K)), CAUSAL
    ids, want = ids_of(masks, CONTIGUOUS, 1), wanted(mask, wanted_blocks((1, K)))
    got, overflow = outcome(compiled((("cp", 2),), mask, 2, (1, K), split=False), ids, cp=2)
    assert_equal(got, want)
    assert overflow[1].any()
    d = data()
    one = jax.jit(with_gradients(layers(mask, 2)))(
        *(d[n] for n in ("q", "k", "v", "dout")), ids, np.arange(S), d["segment"]
    )
    assert_equal([np.asarray(x) for x in one[0]], want)
    assert not one[1].any()
    order = layouts.permutation(ZIGZAG, S, 8)  # the reference takes any order too
    one, _ = jax.jit(layers(mask, 2))(
        *(d[n][:, :, order] for n in "qkv"), ids_of(masks, ZIGZAG, 8), order, d["segment"]
    )
    assert np.abs(one - want[0][:, :, order]).max() < 1e-5


def test_all_blocks_are_dense_causal_attention_and_leave_no_second_branch() -> None:
    everything = np.ones((2, 1, 1, W, W), bool)
    program = compiled(CP8, CAUSAL, W // 8, width=W)
    got, overflow = outcome(program, ids_of(everything, ZIGZAG, 8, W), ZIGZAG)
    assert_equal(got, wanted(CAUSAL, everything))
    assert not overflow.any() and "conditional" not in program.as_text()


def test_capacity_0_keeps_local_lists_local() -> None:
    local = np.broadcast_to(
        np.kron(np.eye(8, dtype=bool), np.ones((W // 8, W // 8), bool)), (2, 1, 1, W, W)
    ).copy()
    program = compiled(CP8, CAUSAL, 0)
    for masks, lost in (
        (local, 0),
        (wanted_blocks(SHARED), missing(wanted_blocks(SHARED), CONTIGUOUS, 8, 0)),
    ):
        got, overflow = outcome(program, ids_of(masks, CONTIGUOUS, 8))
        assert_equal(got, wanted(CAUSAL, masks))
        assert (overflow == lost).all()


def test_impossible_ids_are_counted_and_repeated_ones_count_once() -> None:
    near = wanted_blocks(SHARED)[[0, 0]]
    ids = ids_of(near, CONTIGUOUS, 8)
    repeated = ids.copy()
    repeated[..., 4:6] = ids[
        ..., :1
    ]  # of one block only: a softmax does not notice that all count twice
    got, overflow = outcome(compiled(CP8, CAUSAL, 2), repeated)
    assert_equal(got, wanted(CAUSAL, near))
    assert not overflow.any()
    wrong = ids.copy()
    wrong[0, 0, 0, :3, -1] = W, -2, 2**31 - 1
    got, overflow = outcome(compiled(CP8, CAUSAL, 2), wrong)
    assert_equal(got, wanted(CAUSAL, near))
    assert overflow[:, 0, 0].tolist() == [3, 0]


def test_the_negative_control_notices_lists_that_are_off_by_one() -> None:
    ids = ids_of(wanted_blocks(SHARED), CONTIGUOUS, 8)
    got, _ = outcome(compiled(CP8, CAUSAL, 2), np.where(ids > 0, ids - 1, ids))
    assert np.abs(got[0] - wanted(CAUSAL, wanted_blocks(SHARED))[0]).max() > 0.1


@pytest.mark.parametrize(("name", "block"), [("k", 7), ("v", 7), ("v", 8), ("v", 0)])
def test_nan_reaches_only_queries_whose_list_holds_its_block(name: str, block: int) -> None:
    """Blocks 8 and 0 are the first of a device and of all: what unused places of a list would
    read.
    """
    x = data()[name].copy()
    x[:, 1, block * Y] = np.nan
    masks = wanted_blocks(SHARED)
    got, _ = outcome(compiled(CP8, CAUSAL, 2), ids_of(masks, CONTIGUOUS, 8), **{name: x})
    bad = np.isnan(got[0]).any((3, 4))  # [layer, B, S]
    listed = masks[:, 0, 0, :, block].repeat(Y, 1)
    assert not bad[:, 0].any() and not (bad[:, 1] & ~listed).any()
    assert bad[:, 1][listed & (np.arange(S) >= block * Y)].all()


def test_positions_that_are_not_whole_blocks_give_nan() -> None:
    d, ids = data(), ids_of(wanted_blocks(SHARED), CONTIGUOUS, 8)
    divided = layouts.permutation(SequenceLayout("striped", 1), S, 8)
    twice = np.r_[np.arange(Y), np.arange(S - Y)].astype(np.int32)
    for position in (divided, twice, np.arange(S, dtype=np.int32) + Y):
        got, _ = compiled(CP8, CAUSAL, 2)(
            *(d[n] for n in ("q", "k", "v", "dout")), ids, position, d["segment"]
        )
        assert np.isnan(got[0]).all()


def test_keys_replicated_over_dp_get_the_sum_of_their_gradients_though_one_group_overflows() -> (
    None
):
    """Without the keys made varying before the branch, its transpose would wait for the other
    group: a deadlock.
    """
    mesh, masks = mesh_of((("dp", 2), ("cp", 4))), wanted_blocks((B, 1))
    cp, d = tuple(n for n in mesh.shape if n.startswith("cp")), data()
    act, shared = P(None, "dp", cp), P(None, None, cp)
    specs = (act, shared, shared, P(None, "dp", None, cp), P(cp), P(None, cp))
    f = with_gradients(shard_map(layers(CAUSAL, 2), mesh, specs, (act, P(None, "dp"))))
    k, v = d["k"][:, :1], d["v"][:, :1]
    ids, position = ids_of(masks, CONTIGUOUS, 4), np.arange(S, dtype=np.int32)
    got, overflow = jax.jit(f)(d["q"], k, v, d["dout"], ids, position, d["segment"][:1])
    both = [np.repeat(x, B, 1) for x in (k, v)]
    out, dq, dk, dv = wanted(CAUSAL, masks, k=both[0], v=both[1])
    assert_equal(
        [np.asarray(x) for x in got], (out, dq, dk.sum(1, keepdims=True), dv.sum(1, keepdims=True))
    )
    assert overflow[1, 0, 0] > 0 and not overflow[1, 1].any() and not overflow[0].any()


def test_new_lists_and_layouts_compile_nothing() -> None:
    d = data()
    f = jax.jit(with_gradients(sharded(mesh_of(CP8), CAUSAL, 2, SHARED)))
    for layout in (CONTIGUOUS, ZIGZAG):
        ids, position = ids_of(wanted_blocks(SHARED), layout, 8), layouts.permutation(layout, S, 8)
        f(*(d[n] for n in ("q", "k", "v", "dout")), ids, position, d["segment"])
    assert f._cache_size() == 1


# Bytes, FLOPs, memory
# ------------------------------------------------------------------------------------------------


def wire(collectives) -> dict[str, float]:
    """Wire bytes by op; also asserts that no collective leaves cp."""
    out: dict[str, float] = {}
    for c in collectives:
        assert all(axis.startswith("cp") for axis in c.axes), c
        out[c.op] = out.get(c.op, 0.0) + c.count * c.wire_bytes
    return out


def total(*parts: dict[str, float]) -> dict[str, float]:
    return {op: sum(p.get(op, 0.0) for p in parts) for op in {op for p in parts for op in p}}


def one_layer(mask: Mask, capacity: int):
    def run(q, k, v, ids, position, segment):
        segment = segment if mask.packed else None
        out, overflow = gather_attend(
            q[0], k[0], v[0], ids[0], capacity, Y, mask, position, segment
        )
        return out[None], overflow[None, None, None]

    return run


def arguments(lead, dtype=jnp.float32):
    q, k = (jax.ShapeDtypeStruct((1, B, S, heads, C), dtype) for heads in (H, K))
    labels = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, *lead, W, L), (S,), (B, S))]
    return q, k, k, q, *labels


BYTES = [
    (CP8, CAUSAL, 2, SHARED, jnp.float32),
    (CP8, PACKED, 3, (B, K), jnp.bfloat16),
    (CP8, CAUSAL, 0, (B, 1), jnp.float32),
    (CP8, CAUSAL, 1, (1, K), jnp.float32),
    (CP8, CAUSAL, 4, (1, 1), jnp.bfloat16),
    (MIXED, PACKED, 5, (B, K), jnp.float32),
]


@pytest.mark.fast
@pytest.mark.parametrize(("degrees", "mask", "capacity", "lead", "dtype"), BYTES)
def test_bytes_equal_the_closed_forms(degrees, mask: Mask, capacity: int, lead, dtype) -> None:
    mesh, sizes = mesh_of(degrees), {"dp": 1, "tp": 1, **dict(degrees)}
    batch, kv_heads = B // sizes["dp"], K // sizes["tp"]
    shape = AttentionShape(
        batch, S, H // sizes["tp"], kv_heads, C, sizes["cp"], jnp.dtype(dtype).itemsize
    )
    lists = (batch if lead[0] > 1 else 1) * (kv_heads if lead[1] > 1 else 1)
    cost = BlockGather(shape, Y, capacity, lists)
    f = sharded(mesh, mask, capacity, lead, one_layer(mask, capacity))
    q, k, v, dout, *rest = arguments(lead, dtype)
    there = jax.make_jaxpr(f)(q, k, v, *rest)
    both = jax.make_jaxpr(with_gradients(f))(q, k, v, dout, *rest)
    for branch in (0, 1) if capacity < cost.blocks else (0,):
        count = lambda traced, branch=branch: wire(
            jaxpr.collectives(traced, dict(mesh.shape), {SCOPE: branch})
        )
        forward = total(cost.forward_bytes(branch == 1), cost.label_bytes(mask))
        assert count(there) == forward
        assert count(both) == total(forward, cost.backward_bytes(branch == 1))


def test_the_compiled_program_moves_the_same_bytes() -> None:
    mesh, cost = mesh_of(CP8), BlockGather(AttentionShape(B, S, H, K, C, 8, 4), Y, 2)
    f = with_gradients(sharded(mesh, CAUSAL, 2, SHARED, one_layer(CAUSAL, 2)))
    text = jax.jit(f).lower(*arguments(SHARED)).compile().as_text()
    for branch in (0, 1):
        parts = (
            cost.forward_bytes(branch == 1),
            cost.backward_bytes(branch == 1),
            cost.label_bytes(CAUSAL),
        )
        assert wire(hlo.collectives(text, dict(mesh.shape), {SCOPE: branch})) == total(*parts)


@pytest.mark.fast
def test_work_follows_the_width_of_the_lists() -> None:
    mesh = mesh_of(CP8)
    q, k, v, _, *rest = arguments(SHARED)
    traced = jax.make_jaxpr(sharded(mesh, CAUSAL, 2, SHARED, one_layer(CAUSAL, 2)))(q, k, v, *rest)
    for branch in (0, 1):
        flops = jaxpr.dot_flops(traced, dict(mesh.shape), {SCOPE: branch})
        assert (
            flops == 4 * B * H * C * (S // 8) * L * Y
        )  # of S/8 queries with L blocks of Y keys, two matmuls


def residual_bytes(cp: int) -> float:
    """Bytes a device keeps of one layer for the backward pass, with 8 blocks a device and capacity
    1.
    """
    mesh, local = mesh_of((("cp", cp),)), 8
    f = sharded(mesh, CAUSAL, 1, SHARED, one_layer(CAUSAL, 1))
    n = cp * local * Y
    q, k = (jax.ShapeDtypeStruct((1, B, n, heads, C), jnp.float32) for heads in (H, K))
    labels = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 1, 1, n // Y, L), (n,), (B, n))]
    kept = jax.eval_shape(
        lambda q, k, v, *rest: jax.vjp(lambda *x: f(*x, *rest), q, k, v, has_aux=True)[1],
        q,
        k,
        k,
        *labels,
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) / cp


@pytest.mark.fast
def test_keys_that_would_be_gathered_are_not_kept() -> None:
    """From 2 to 8 devices the residuals grow by the six fetched blocks and integers, not by 6·8
    gathered blocks.
    """
    block_bytes = 2 * B * Y * K * C * 4
    growth = residual_bytes(8) - residual_bytes(2)
    assert 6 * block_bytes <= growth < 6 * block_bytes * 8 / 2


# Plan time, refusals
# -------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_block_ids_hold_exactly_the_mask() -> None:
    masks = np.random.default_rng(2).random((K, W, W)) < 0.2
    masks[0, 3] = False
    for layout, cp in ((CONTIGUOUS, 1), (ZIGZAG, 8), (STRIPED, 4)):
        ids, order = block_ids(masks, Y, layout, cp), block_order(layout, W, Y, cp)
        assert ids.shape == (1, K, W, masks.sum(-1).max()) and ids.dtype == np.int32
        for k, slot in np.ndindex(K, W):
            row = ids[0, k, slot]
            assert row[row >= 0].tolist() == np.flatnonzero(masks[k, order[slot]]).tolist()
            assert (row[(row >= 0).sum() :] == -1).all()
        assert (
            BlockCounts.laid_out(masks, layout, cp, Y).capacity
            == max(
                [c for c in range(W + 1) if missing(masks[None, None], layout, cp, c).any()],
                default=-1,
            )
            + 1
        )
    assert block_ids(masks[0], Y, width=W + 3).shape == (1, 1, W, W + 3)
    assert (block_ids(np.zeros((W, W), bool), Y) == -1).all()


GOOD = {"ids": (1, 1, W, L), "capacity": 2, "block": Y, "n": S, "positions": S, "dtype": jnp.int32}
REFUSED = [
    ({"block": 3}, r"N = 64 .* block = 3: N mod block = 1; choose"),
    ({"block": 0}, "N mod block = undefined"),
    ({"capacity": -1}, r"capacity = -1 is not in 0 … N/block = 64/2 = 32"),
    ({"capacity": W + 1}, "capacity = 33"),
    ({"ids": (1, 1, W - 1, L)}, r"block_ids \(1, 1, 31, 16\) must be .*N/block = 32"),
    ({"ids": (3, 1, W, L)}, "1 or B = 2"),
    ({"ids": (1, 4, W, L)}, "1 or K = 2"),
    ({"ids": (1, W, L)}, "must be"),
    ({"ids": (1, 1, W, 0)}, "width of at least 1"),
    ({"dtype": jnp.float32}, "needs integers"),
    ({"positions": S - 1}, "need the same positions"),
    ({"n": S - Y}, "need the same positions"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refusals_name_the_equation_and_the_fix(change: dict, message: str) -> None:
    a = {**GOOD, **change}
    q, k = jnp.zeros((B, S, H, C)), jnp.zeros((B, a["n"], K, C))
    ids = jnp.zeros(a["ids"], a["dtype"])
    with pytest.raises(ValueError, match=message):
        gather_attend(q, k, k, ids, a["capacity"], a["block"], CAUSAL, jnp.arange(a["positions"]))


@pytest.mark.fast
def test_more_refusals() -> None:
    q, k, v, _, *rest = arguments(SHARED)
    with pytest.raises(ValueError, match=r"capacity = 5 is not in 0 … N/block = 8/2 = 4"):
        jax.eval_shape(
            sharded(mesh_of(CP8), CAUSAL, 5, SHARED, one_layer(CAUSAL, 5)), q, k, v, *rest
        )
    x = jnp.zeros((B, S, H, C))
    with pytest.raises(ValueError, match="pass the segment ids"):
        jax.eval_shape(
            layers(PACKED, 2),
            x[None],
            x[None],
            x[None],
            jnp.zeros((1, 1, 1, W, L), int),
            jnp.arange(S),
            None,
        )
    mask = np.ones((W, W), bool)
    with pytest.raises(ValueError, match=r"width = 3 < 32 .*set width=32"):
        block_ids(mask, Y, width=3)
    with pytest.raises(ValueError, match="divides blocks"):
        block_ids(mask, Y, SequenceLayout("striped", 1), 8)
    with pytest.raises(ValueError, match=r"bool \[W, W\]"):
        block_ids(mask.astype(int), Y)
    shape = AttentionShape(B, S, H, K, C, 8)
    for change, message in (
        ({"block": 3}, "no multiple"),
        ({"capacity": 5}, "capacity = 5"),
        ({"lists": 3}, "lists = 3"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockGather(shape, **{"block": Y, "capacity": 2, **change})
    with pytest.raises(ValueError, match="nothing overflows"):
        BlockGather(shape, Y, 4).forward_bytes(overflow=True)
