"""Every context plan, mask and layout on virtual devices equals masked attention on one: values,
gradients, bytes.

Programs scan two layers with different inputs, as models do: in a straight line XLA:CPU would reuse
the permutes of the forward pass in the backward pass.

Legend: B sequences, S positions, H query heads, K key heads, C head_dim; arrays lead with the 2
layers."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import shard_map
from fdp.count import context as cost
from fdp.count import hlo, jaxpr
from fdp.kernels_pallas import blockwise
from fdp.mesh import factor, make_mesh
from fdp.objectives.block_diffusion import BlockDiffusionRule
from fdp.parallel.context import layouts
from fdp.parallel.context.attend import attend, decode
from fdp.parallel.context.layouts import SequenceLayout
from fdp.parallel.context.plan import SUPPORT, CommPlan, check, mask_kind, needed_hops
from fdp.parallel.masks import Mask

B, S, H, K, C = 4, 32, 8, 2, 4
LAYOUTS = (SequenceLayout("contiguous"), SequenceLayout("zigzag"), SequenceLayout("striped", 2))
MASKS = {
    "bidirectional": Mask(),
    "causal": Mask("causal"),
    "causal window": Mask("causal", window=6),
    "bidirectional window": Mask(window=6),
    "packed": Mask("causal", packed=True),
    "rule": Mask(rule=BlockDiffusionRule(S // 2, 4)),
}
PLANS = {
    "ring": CommPlan("ring"),
    "ulysses": CommPlan("ulysses", 8),  # 2 key heads on 8 devices: each is repeated 4 times
    "usp2": CommPlan("usp", 2),
    "usp4": CommPlan("usp", 4),
    "all_gather": CommPlan("all_gather"),
    "batch": CommPlan("batch", 2),
}


# Every plan with documents, which are data: with one document a packed mask is the causal one.
# Masks are told apart by the front alone, so that each of them needs a gather or a ring.
PAIRS = [(plan, "packed") for plan in PLANS]
PAIRS += [(plan, mask) for plan in ("ring", "usp2", "all_gather") for mask in list(MASKS)[:2]]
PAIRS += [("all_gather", "bidirectional window"), ("ring", "rule")]


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Several tiles of queries and of keys on a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", 3)
        yield


def mesh_of(degrees: tuple[tuple[str, int], ...], split: bool = True):
    mesh = make_mesh({"pp": 1, "dp": 1, "ep": 1, "cp": 1, "tp": 1, **dict(degrees)})
    return factor(mesh, "cp") if split else mesh


def specs(mesh) -> tuple[P, P, P]:
    """(activations, segments, positions)."""
    cp = tuple(n for n in mesh.shape if n.startswith("cp"))
    return P(None, ("dp", "ep"), cp, "tp"), P(("dp", "ep"), cp), P(cp)


@functools.cache
def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = lambda heads: rng.normal(size=(2, B, S, heads, C)).astype(np.float32)
    segment = np.cumsum(rng.random((B, S)) < 0.15, axis=1).astype(np.int32)
    return {"q": normal(H), "k": normal(K), "v": normal(K), "dout": normal(H), "segment": segment}


def dense(mask: Mask, q, k, v, segment):
    """The oracle: repeated heads, all scores, no shared code."""
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    i, j = np.arange(S)[:, None], np.arange(S)[None, :]
    seen = np.ones((1, S, S), bool)
    if mask.kind == "causal":
        seen = seen & (j <= i)
    if mask.window:
        seen = seen & (abs(i - j) < mask.window)
    if mask.packed:
        seen = seen & (segment[:, :, None] == segment[:, None, :])
    if mask.rule is not None:
        seen = seen & mask.rule(i, j)
    s = jnp.einsum("bnhc,bmhc->bhnm", q, k) / C**0.5
    return jnp.einsum("bhnm,bmhc->bnhc", jax.nn.softmax(jnp.where(seen[:, None], s, -1e30)), v)


@functools.cache
def wanted(mask: Mask) -> tuple[np.ndarray, ...]:
    d = data()
    layer = jax.vmap(lambda q, k, v: dense(mask, q, k, v, d["segment"]))
    out, pull = jax.vjp(layer, d["q"], d["k"], d["v"])
    return tuple(np.asarray(x) for x in (out, *pull(d["dout"])))


def layers(plan: CommPlan, mask: Mask):
    """(q, k, v, position, segment) -> out of two layers, one after the other."""

    def run(q, k, v, position, segment):
        segment = segment if mask.packed else None
        one = lambda _, qkv: (None, attend(*qkv, mask, plan, position, segment))
        return jax.lax.scan(one, None, (q, k, v))[1]

    return run


def sharded(mesh, plan: CommPlan, mask: Mask):
    """The global function (q, k, v, position, segment) -> out."""
    act, seg, pos = specs(mesh)
    return shard_map(layers(plan, mask), mesh, (act, act, act, pos, seg), act)


def with_gradients(f):
    def run(q, k, v, dout, *labels):
        out, pull = jax.vjp(lambda *x: f(*x, *labels), q, k, v)
        return (out, *pull(dout))

    return run


@functools.cache
def compiled(degrees: tuple[tuple[str, int], ...], plan: CommPlan, mask: Mask, split: bool = True):
    d = data()
    arguments = (d["q"], d["k"], d["v"], d["dout"], np.arange(S, dtype=np.int32), d["segment"])
    f = with_gradients(sharded(mesh_of(degrees, split), plan, mask))
    return jax.jit(f).lower(*arguments).compile()


def outcome(program, layout: SequenceLayout, cp: int, **changed) -> tuple[np.ndarray, ...]:
    """(out, dq, dk, dv) in the order of positions, computed in the order of `layout`."""
    d = {**data(), **changed}
    qkv = layouts.permute([d[name] for name in ("q", "k", "v", "dout")], layout, cp, dim=2)
    got = program(
        *qkv, layouts.permutation(layout, S, cp), layouts.permute(d["segment"], layout, cp)
    )
    return tuple(layouts.permute([np.asarray(x) for x in got], layout, cp, dim=2, undo=True))


def errors(got, want) -> tuple[float, float]:
    """(largest error of the output, largest error of a gradient, relative to its largest entry)."""
    forward = np.abs(got[0] - want[0]).max()
    return forward, max(
        np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got[1:], want[1:], strict=True)
    )


def assert_equal(got, want) -> None:
    forward, gradient = errors(got, want)
    assert forward <= 1e-5 and gradient <= 1e-4, f"forward {forward:.1e}, gradients {gradient:.1e}"


def shape_of(cp: int, tp: int = 1, dp: int = 1, itemsize: int = 4) -> cost.AttentionShape:
    return cost.AttentionShape(B // dp, S, H // tp, K // tp, C, cp, itemsize)


def wire(collectives) -> dict[str, float]:
    """Wire bytes by op; also asserts that no collective leaves cp."""
    out: dict[str, float] = {}
    for c in collectives:
        assert all(axis.startswith("cp") for axis in c.axes), c
        out[c.op] = out.get(c.op, 0.0) + c.count * c.wire_bytes
    return out


def total(*parts: dict[str, float]) -> dict[str, float]:
    return {op: sum(p.get(op, 0.0) for p in parts) for op in {op for p in parts for op in p}}


def two_layers(plan: CommPlan, shape: cost.AttentionShape, mask: Mask) -> dict[str, float]:
    """Forward and backward of a differentiated scan: labels are gathered once."""
    forward, backward = (
        cost.forward_bytes(plan, shape, mask),
        cost.backward_bytes(plan, shape, mask),
    )
    return total(forward, forward, backward, backward, cost.label_bytes(shape, mask))


def assert_bytes(program, degrees, plan: CommPlan, mask: Mask, split: bool = True) -> None:
    mesh, sizes = mesh_of(degrees, split), dict(degrees)
    shape = shape_of(sizes["cp"], sizes.get("tp", 1), sizes.get("dp", 1))
    forward, labels = cost.forward_bytes(plan, shape, mask), cost.label_bytes(shape, mask)
    assert wire(hlo.collectives(program.as_text(), dict(mesh.shape))) == two_layers(
        plan, shape, mask
    )
    d = data()
    traced = jax.make_jaxpr(sharded(mesh, plan, mask))(
        d["q"], d["k"], d["v"], np.arange(S), d["segment"]
    )
    assert wire(jaxpr.collectives(traced, dict(mesh.shape))) == total(
        forward, forward, labels, labels
    )


@pytest.mark.parametrize(("plan", "mask"), PAIRS)
def test_every_plan_mask_and_layout_equals_one_device(plan: str, mask: str) -> None:
    degrees, p, m = (("cp", 8),), PLANS[plan], MASKS[mask]
    program = compiled(degrees, p, m)  # positions are data: one program serves all layouts
    for layout in LAYOUTS:
        assert_equal(outcome(program, layout, 8), wanted(m))
    if m.packed:
        one = np.zeros((B, S), np.int32)
        assert_equal(outcome(program, LAYOUTS[1], 8, segment=one), wanted(MASKS["causal"]))
    assert_bytes(program, degrees, p, m)


SMALLER = [
    ((("cp", 2),), CommPlan("ring")),
    ((("cp", 4),), CommPlan("ring")),
    ((("cp", 4),), CommPlan("usp", 2)),
    ((("dp", 2), ("cp", 2), ("tp", 2)), CommPlan("ring")),
    (
        (("dp", 2), ("cp", 2), ("tp", 2)),
        CommPlan("ulysses", 2),
    ),  # one key head a tp shard: repeated twice
    ((("dp", 2), ("cp", 2), ("tp", 2)), CommPlan("all_gather")),
    ((("dp", 2), ("cp", 2), ("tp", 2)), CommPlan("batch", 2)),
]


@pytest.mark.parametrize(("degrees", "plan"), SMALLER)
def test_smaller_and_mixed_meshes_equal_one_device(degrees, plan: CommPlan) -> None:
    mask = Mask(packed=True) if plan.kind == "usp" else MASKS["packed"]
    program = compiled(degrees, plan, mask)
    for layout in LAYOUTS:
        assert_equal(outcome(program, layout, dict(degrees)["cp"]), wanted(mask))
    assert_bytes(program, degrees, plan, mask)


WINDOWS = [
    ("ring", LAYOUTS[0], "causal window", (1, 2)),
    ("ring", LAYOUTS[0], "bidirectional window", (1, 2, 6, 7)),
    ("ring", LAYOUTS[1], "causal window", None),
    ("usp2", LAYOUTS[0], "causal window", (1,)),
]


@pytest.mark.fast
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_needed_hops_are_those_of_all_pairs_of_positions(layout: SequenceLayout, kind: str) -> None:
    for window, u in itertools.product((0, 1, 2, 5, 9, 17), (1, 2)):
        r = 8 // u
        owner = layouts.inverse(layouts.permutation(layout, S, 8)) // (S // r)
        far = np.arange(S)[:, None] - np.arange(S)
        seen = (abs(far) < (window or S)) & ((far >= 0) | (kind == "bidirectional"))
        offsets = {int((owner[q] - owner[k]) % r) for q, k in np.argwhere(seen)} - {0}
        assert needed_hops(Mask(kind, window=window), layout, S, 8, u) == tuple(sorted(offsets))


@pytest.mark.parametrize(("name", "layout", "mask", "hops"), WINDOWS)
def test_a_window_needs_only_some_hops(name: str, layout: SequenceLayout, mask: str, hops) -> None:
    degrees, m = (("cp", 8),), MASKS[mask]
    plan = replace(PLANS[name], layout=layout)
    needed = needed_hops(m, layout, S, 8, plan.head_split)
    assert hops is None or needed == hops
    plan = replace(plan, hops=needed)
    program = compiled(degrees, plan, m)
    assert_equal(outcome(program, layout, 8), wanted(m))
    assert_bytes(program, degrees, plan, m)
    with pytest.raises(ValueError, match=r"miss offsets \[1\].*set hops="):
        shape_of(8).check(replace(plan, hops=needed[1:]), m)


@pytest.mark.parametrize("cp", [3, 8])
def test_an_unfactored_axis_runs_a_ring(cp: int) -> None:
    """cp = 3 has no scan in its backward pass; 30 positions divide by it."""
    mask, plan = MASKS["causal"], CommPlan("ring")
    if cp == 8:
        program = compiled((("cp", 8),), plan, mask, split=False)
        assert_equal(outcome(program, LAYOUTS[1], 8), wanted(mask))
        assert_bytes(program, (("cp", 8),), plan, mask, split=False)
        return
    d = {name: x[:, :30] if name == "segment" else x[:, :, :30] for name, x in data().items()}
    f = with_gradients(sharded(mesh_of((("cp", 3),), split=False), plan, mask))
    got = jax.jit(f)(d["q"], d["k"], d["v"], d["dout"], np.arange(30, dtype=np.int32), d["segment"])
    one = with_gradients(layers(plan, mask))  # cp unbound: the reference
    want = one(d["q"], d["k"], d["v"], d["dout"], np.arange(30, dtype=np.int32), d["segment"])
    assert_equal([np.asarray(x) for x in got], [np.asarray(x) for x in want])


@pytest.mark.parametrize(
    "plan",
    [
        CommPlan("all_gather", layout=LAYOUTS[0]),
        CommPlan("usp", 2, layout=LAYOUTS[1]),
        CommPlan("ring", layout=LAYOUTS[2]),
    ],
)
def test_without_positions_those_of_the_layout_are_meant_and_none_is_gathered(plan) -> None:
    mesh, mask, layout = mesh_of((("cp", 4),)), MASKS["causal"], plan.layout
    act, _, _ = specs(mesh)
    f = shard_map(
        lambda q, k, v: layers(plan, mask)(q, k, v, None, None), mesh, (act, act, act), act
    )
    d = data()
    order = layouts.permute([d["q"], d["k"], d["v"]], layout, 4, dim=2)
    out = np.asarray(jax.jit(f)(*order))
    assert np.abs(layouts.permute(out, layout, 4, dim=2, undo=True) - wanted(mask)[0]).max() <= 1e-5
    forward = cost.forward_bytes(plan, shape_of(4), mask)
    made, shape = jax.make_jaxpr(f)(*order), dict(mesh.shape)
    assert wire(jaxpr.collectives(made, shape)) == total(forward, forward)
    # At most all pairs, a little more where tiles are padded: 8 queries are three tiles of 3.
    pairs = 2 * 4 * B * H * C * S // 4 * S
    assert pairs <= jaxpr.dot_flops(made, shape) <= 1.5 * pairs


@pytest.mark.parametrize("plan", ["ring", "usp2", "all_gather"])
def test_wrong_positions_are_noticed(plan: str) -> None:
    """The negative control: zig-zag data under contiguous positions, and one device's positions off
    by one.
    """
    program = compiled((("cp", 8),), PLANS[plan], MASKS["causal"])
    d = data()
    qkv = layouts.permute([d[name] for name in ("q", "k", "v", "dout")], LAYOUTS[1], 8, dim=2)
    arguments = lambda p: (*qkv, p, d["segment"])
    back = lambda got: layouts.permute(
        [np.asarray(x) for x in got], LAYOUTS[1], 8, dim=2, undo=True
    )
    forward, gradient = errors(
        back(program(*arguments(np.arange(S, dtype=np.int32)))), wanted(MASKS["causal"])
    )
    assert forward > 0.1 and gradient > 0.1
    shifted = layouts.permutation(LAYOUTS[1], S, 8).copy()
    shifted[: S // 8] += 1
    forward, gradient = errors(back(program(*arguments(shifted))), wanted(MASKS["causal"]))
    assert forward > 0.01 and gradient > 0.01


@pytest.mark.parametrize("plan", ["ring", "usp2", "all_gather"])
def test_nan_in_a_key_reaches_every_query_that_sees_it(plan: str) -> None:
    program = compiled((("cp", 8),), PLANS[plan], MASKS["bidirectional"])
    k = data()["k"].copy()
    k[:, 1, 5] = np.nan
    out = outcome(program, LAYOUTS[0], 8, k=k)[0].swapaxes(0, 1)
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2, 3]]).all()


def test_keys_replicated_over_dp_get_the_sum_of_their_gradients() -> None:
    mesh, mask, plan = mesh_of((("dp", 2), ("cp", 2), ("tp", 2))), MASKS["causal"], CommPlan("ring")
    act, _, pos = specs(mesh)
    shared = P(None, None, *act[2:])
    f = lambda q, k, v, p: layers(plan, mask)(q, k, v, p, None)
    g = with_gradients(shard_map(f, mesh, (act, shared, shared, pos), act))
    one = with_gradients(
        lambda q, k, v, p: f(q, *(jnp.tile(x, (1, 2, 1, 1, 1)) for x in (k, v)), p)
    )
    d = data()
    arguments = (d["q"], d["k"][:, :2], d["v"][:, :2], d["dout"], np.arange(S, dtype=np.int32))
    assert_equal(
        [np.asarray(x) for x in jax.jit(g)(*arguments)], [np.asarray(x) for x in one(*arguments)]
    )


def temporary(cp: int, plan: CommPlan, local: int) -> int:
    """Bytes of temporaries per device of forward and backward with `local` positions on each of cp
    devices.
    """
    mesh = mesh_of((("cp", cp),))
    q, kv = (jax.ShapeDtypeStruct((2, 1, local * cp, heads, 16), jnp.float32) for heads in (4, 2))
    labels = (
        jax.ShapeDtypeStruct((local * cp,), jnp.int32),
        jax.ShapeDtypeStruct((1, local * cp), jnp.int32),
    )
    f = with_gradients(sharded(mesh, plan, MASKS["causal"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", 256)
        lowered = jax.jit(f).lower(q, kv, kv, q, *labels)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_the_default_plan_keeps_no_whole_scores() -> None:
    """8,192 positions on four devices: temporaries are less than an eighth of those with scores."""
    tiled = temporary(4, CommPlan("all_gather"), 2048)
    x, y = (jax.ShapeDtypeStruct((1, n, 4, 16), jnp.float32) for n in (2048, 8192))

    def whole(q, k, v, dout):
        seen = jnp.arange(8192)[None] <= 6144 + jnp.arange(2048)[:, None]
        f = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])
        out, pull = jax.vjp(f, q, k, v)
        return out, pull(dout)

    dense = jax.jit(whole).lower(x, y, y, x).compile().memory_analysis().temp_size_in_bytes
    assert tiled <= dense / 8


def test_ring_memory_does_not_grow_with_the_ring() -> None:
    """Residuals are local: 4x the sequence on 4x the devices needs the same memory. Gathered keys
    grow.
    """
    ring2, ring8 = (temporary(cp, CommPlan("ring"), 256) for cp in (2, 8))
    gather2, gather8 = (temporary(cp, CommPlan("all_gather"), 256) for cp in (2, 8))
    assert ring8 < 1.25 * ring2
    assert (
        gather8 - gather2 > 2 * 6 * 2 * 256 * 2 * 16 * 4
    )  # of each layer six more shards of keys, values


def test_bfloat16_bytes_with_gradients_in_float32() -> None:
    """Logical bytes from the jaxpr: XLA:CPU would run bfloat16 collectives in float32."""
    mesh, mask, plan = mesh_of((("cp", 8),)), MASKS["causal"], PLANS["usp2"]
    d = {k: jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for k, x in data().items()}
    f = with_gradients(sharded(mesh, plan, mask))
    traced = jax.make_jaxpr(f)(
        d["q"], d["k"], d["v"], d["dout"], np.arange(S, dtype=np.int32), d["segment"]
    )
    assert wire(jaxpr.collectives(traced, dict(mesh.shape))) == two_layers(
        plan, shape_of(8, itemsize=2), mask
    )
    got = np.asarray(
        jax.jit(f)(d["q"], d["k"], d["v"], d["dout"], np.arange(S), d["segment"])[0], np.float32
    )
    assert np.abs(got - wanted(mask)[0]).max() < 0.05


# Decoding
# -------------------------------------------------------------------------------------------------

T = 3  # new tokens
EMPTY = np.iinfo(np.int32).max  # position of an empty cache slot


def decode_program(kind: str, cp: int = 8):
    mesh, plan = mesh_of((("cp", cp),)), CommPlan(kind)
    axes = tuple(n for n in mesh.shape if n.startswith("cp"))
    cache, out = P(None, axes), P() if kind == "tree" else P(None, None, axes)
    f = lambda q, k, v, q_position, k_position: decode(
        q, k, v, Mask("causal"), plan, q_position, k_position
    )
    return mesh, jax.jit(shard_map(f, mesh, (P(), cache, cache, P(), P(axes)), out))


@pytest.mark.parametrize("kind", ["tree", "helix"])
def test_decode_equals_one_device_and_moves_what_the_formula_says(kind: str) -> None:
    """27 tokens dealt round-robin into 32 slots; the last three are the queries."""
    d, used = data(), 27
    slots = layouts.permutation(SequenceLayout("striped"), S, 8)
    k_position = np.where(slots < used, slots, EMPTY).astype(np.int32)
    k, v = (
        np.where((slots < used)[None, :, None, None], d[name][0][:, slots], 7.0) for name in "kv"
    )
    q, q_position = d["q"][0][:, used - T : used], np.arange(used - T, used, dtype=np.int32)
    mesh, f = decode_program(kind)
    program = f.lower(q, k, v, q_position, k_position).compile()
    assert (
        np.abs(
            np.asarray(program(q, k, v, q_position, k_position))
            - wanted(MASKS["causal"])[0][0][:, used - T : used]
        ).max()
        < 1e-5
    )
    assert wire(hlo.collectives(program.as_text(), dict(mesh.shape))) == cost.decode_bytes(
        kind, B, T, H, C, 8
    )
    nothing = np.asarray(program(q, k, v, q_position, np.full(S, EMPTY, np.int32)))
    assert (nothing == 0).all()


@pytest.mark.fast
def test_decode_refuses_what_it_cannot_do() -> None:
    x, p = jnp.zeros((1, 2, 4, 4)), jnp.arange(2)
    with pytest.raises(ValueError, match="needs a causal mask"):
        decode(x, x, x, Mask(), CommPlan("tree"), p, p)
    with pytest.raises(ValueError, match="call attend"):
        decode(x, x, x, Mask("causal"), CommPlan("ring"), p, p)
    with pytest.raises(ValueError, match="call decode"):
        attend(x, x, x, Mask("causal"), CommPlan("helix"), p)


# Refusals, before anything is built
# ----------------------------------------------------------------------------------

GOOD = {"seq_len": 64, "cp": 8, "heads": 8, "kv_heads": 2, "batch": 4}
REFUSED = [
    (
        CommPlan("ring", layout=LAYOUTS[1]),
        Mask(),
        {"seq_len": 60},
        r"60 is not divisible by 2·cp = 16 .*data.seq_len=64",
    ),
    (CommPlan("ring"), Mask(), {"seq_len": 60}, r"60 is not divisible by cp = 8 .*data.seq_len=64"),
    (
        CommPlan("ring", layout=LAYOUTS[2]),
        Mask(),
        {"seq_len": 56},
        r"cp·block = 8·2 = 16 .*data.seq_len=64",
    ),
    (CommPlan("star"), Mask(), {}, "context plan 'star' is unknown"),
    (
        CommPlan("ulysses", 8),
        Mask(),
        {"heads": 4},
        r"heads = 4 .*is not divisible by head_split = 8",
    ),
    (CommPlan("usp", 4), Mask(), {"heads": 2}, "heads = 2"),
    (CommPlan("ulysses", 4), Mask(), {}, "set head_split=8"),
    (CommPlan("usp", 3), Mask(), {}, "cp = 8 is not divisible by head_split = 3"),
    (CommPlan("usp", 2), Mask(), {"cp": 6, "seq_len": 96}, "cp = 6 is no power of two"),
    (CommPlan("usp", 4), Mask(), {"cp": 6, "seq_len": 96}, r"head_split = 4: set head_split=6"),
    (CommPlan("usp", 2), Mask(), {"heads": 6, "kv_heads": 3}, "one must divide the other"),
    (CommPlan("ring", 2), Mask(), {}, "splits no heads"),
    (CommPlan("batch", 8), Mask(), {}, r"4 sequence\(s\) .*head_split = 8"),
    (CommPlan("helix"), Mask("causal"), {"heads": 4}, "heads = 4"),
    (CommPlan("ring"), Mask("causal", 65), {}, "window = 65 > sequence length 64"),
    (CommPlan("ring"), Mask(), {"kv_heads": 3}, "no whole groups"),
    (CommPlan("ring", capacity=4), Mask(), {}, "capacity = 4"),
    (CommPlan("ring", hops=(1,)), Mask("causal"), {}, r"miss offsets \[2, 3, 4, 5, 6, 7\]"),
    (CommPlan("ring", hops=(1, 8)), Mask("causal", 4), {}, "must be distinct ring offsets in 1…7"),
    (CommPlan("ring", hops=(1, 1)), Mask("causal", 4), {}, "must be distinct"),
    (CommPlan("all_gather", hops=(1,)), Mask("causal", 4), {}, "has no ring"),
    (CommPlan("tree"), Mask("causal", packed=True), {}, "one sequence"),
    (CommPlan("tree", layout=LAYOUTS[1]), Mask("causal"), {}, "a cache grows"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("plan", "mask", "sizes", "message"), REFUSED)
def test_check_refuses_with_values_and_fix(
    plan: CommPlan, mask: Mask, sizes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(plan, mask, **{**GOOD, **sizes})


@pytest.mark.fast
def test_check_accepts_what_the_matrix_supports() -> None:
    plans = [*PLANS.values(), CommPlan("tree"), CommPlan("helix")]
    for mask in MASKS.values():
        for plan in (replace(p, layout=layout) for p in plans for layout in LAYOUTS):
            if not SUPPORT[mask_kind(mask), plan.kind, plan.layout.kind]:
                check(plan, mask, **GOOD)
    assert {m for m, _, _ in SUPPORT} == set(MASKS)
    check(CommPlan("ring", hops=()), Mask("causal", 1), **GOOD)  # every token sees itself only


@pytest.mark.fast
def test_a_head_split_inside_an_unfactored_axis_is_refused() -> None:
    x, p = jnp.zeros((2, B, S, H, C)), jnp.arange(S)
    f = sharded(mesh_of((("cp", 8),), split=False), CommPlan("usp", 2), Mask())
    with pytest.raises(ValueError, match=r"2 devices are not a product .*cp = 8.*fdp.mesh.factor"):
        jax.eval_shape(f, x, x, x, p, jnp.zeros((B, S), jnp.int32))
