"""Layers with a state: chunks against recurrences, updates against autodiff, causality, and every
plan over cp against one device.

Legend: B sequences, L positions, H heads, K key dim, V value dim, F fast width.
"""

import functools
import itertools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from build import drawn, experiment, tiny, tokens
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from fdp.collectives import psum, shard_map
from fdp.count import bytes as closed
from fdp.count import flops, hlo, jaxpr
from fdp.count.compare import Comparison, mismatches, sent
from fdp.count.compare import outcome as outcome_of
from fdp.count.counts import PERMUTE, REDUCE, Ledger, Rows, merged
from fdp.count.step import microbatch
from fdp.kernels_pallas import newton_schulz
from fdp.kernels_pallas.newton_schulz import orthogonal
from fdp.mesh import AXES, factor, make_mesh
from fdp.models import delta, module
from fdp.models import fast_weights as fast
from fdp.models.attention import Where
from fdp.models.fast_weights import FastWeights, Read
from fdp.models.lact import LaCT
from fdp.models.layers import SwiGLU
from fdp.models.recurrent import GatedDeltaNet
from fdp.models.shape import ModelShape
from fdp.models.stack import Block, layer
from fdp.models.ttt import TTTMLP, TTTLinear
from fdp.parallel.context import layouts, state
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout
from fdp.parallel.context.state import StatePlan
from fdp.step import TrainStep

B, L, H, K, V, F = 2, 24, 2, 4, 6, 8
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# Gated DeltaNet
# -------------------------------------------------------------------------------------------------

TOKENS = delta.Tokens(
    unit(normal(B, L, H, K)),
    unit(normal(B, L, H, K)),
    normal(B, L, H, V),
    -np.logaddexp(0, normal(B, L, H)),
    1 / (1 + np.exp(-normal(B, L, H))),
)
FRESH = np.zeros((B, L), bool)
FRESH[0, [5, 6, 13]] = FRESH[1, 0] = True
STATE = normal(B, H, K, V)


FEW = 8  # positions of the first sequence and head


def part(tokens: delta.Tokens, start: int, stop: int) -> delta.Tokens:
    return jax.tree.map(lambda x: x[:, start:stop], tokens)


@functools.cache
def map_of(start: int, stop: int) -> jax.Array:
    """Of the positions `start` … `stop` of FEW; of none, the identity [I | 0]."""
    if start == stop:
        return jnp.eye(K, K + V)[None, None]
    few = jax.tree.map(lambda x: x[:1, :, :1], part(TOKENS, start, stop))
    return map_of_chunks(few)


@jax.jit
def map_of_chunks(tokens: delta.Tokens) -> jax.Array:
    return delta.affine(delta.prepare(tokens, 1))


@functools.cache
def last_state() -> jax.Array:
    few = jax.tree.map(lambda x: x[:1, :, :1], part(TOKENS, 0, FEW))
    return delta.recur(few, STATE[:1, :1])[1]


@jax.jit
def composed(maps: list[jax.Array], start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state after all `maps`: composed, composed in the wrong order, folded."""
    whole = functools.reduce(lambda earlier, later: delta.compose(later, earlier), maps)
    wrong = functools.reduce(delta.compose, maps)
    folded = delta.fold(jnp.stack(maps), start, jnp.asarray(len(maps)))
    return delta.apply(whole, start), delta.apply(wrong, start), folded


@pytest.mark.fast
@pytest.mark.parametrize("fresh", [None, FRESH], ids=["stream", "documents"])
def test_chunks_equal_the_recurrence(fresh):
    @functools.partial(jax.jit, compiler_options=hlo.QUICK)
    def run(tokens: delta.Tokens) -> tuple:
        chunked = [delta.scan(delta.prepare(tokens, chunk), STATE) for chunk in (1, 12)]
        return delta.recur(tokens, STATE), chunked

    want, chunked = run(TOKENS._replace(fresh=fresh))
    for got in chunked:
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.fast
@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, FEW), min_size=3, max_size=3).map(sorted))
@example([0, 3, 3])
@example([5, FEW, FEW])
def test_maps_of_parts_compose_in_order_to_the_map_of_the_whole(cuts):
    maps = [map_of(a, b) for a, b in itertools.pairwise([0, *cuts, FEW])]
    whole, wrong, folded = composed(maps, STATE[:1, :1])
    want = last_state()
    np.testing.assert_allclose(whole, want, atol=5e-6)
    np.testing.assert_allclose(folded, want, atol=5e-6)
    if len({0, *cuts, FEW}) > 2:  # the order matters
        assert np.abs(wrong - want).max() > 1e-3


@pytest.mark.fast
@pytest.mark.parametrize("cp", [2, 3, 5, 7])
def test_a_prefix_scan_composes_the_maps_of_any_number_of_devices(cp):
    maps, degrees = normal(cp, H, K, K + V), dict.fromkeys(AXES, 1) | {"cp": cp}
    want = [np.zeros((H, K, V), np.float32)]
    for both in maps[:-1]:
        want.append(both[..., :K] @ want[-1] + both[..., K:])
    mesh = make_mesh(degrees)

    def run(compose):
        parts = compose, delta.apply, delta.constant
        f = shard_map(lambda x: state.scanned_before(x, *parts), mesh, P("cp"), P("cp"))
        return jax.jit(f).lower(maps).compile(hlo.QUICK)

    right = run(delta.compose)
    np.testing.assert_allclose(right(maps), np.stack(want), rtol=1e-5, atol=1e-4)
    steps = (cp - 1).bit_length()
    wire = 4 * H * K * ((steps - 1) * (K + V) + V)
    assert sent(right, mesh) == Ledger(degrees).put(PERMUTE, ("cp",), wire).sent
    if cp == 7:  # the order matters
        wrong = run(lambda later, earlier: delta.compose(earlier, later))(maps)
        assert np.abs(wrong - np.stack(want)).max() > 0.1


@pytest.mark.fast
def test_chunks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"24 positions .* chunks of 7: set a chunk of 6"):
        delta.prepare(TOKENS, 7)


# Fast weights
# -------------------------------------------------------------------------------------------------

WEIGHTS = FastWeights(0.5 * normal(H, F, K), 0.5 * normal(H, F, K), 0.4 * normal(H, K, F))
READ = Read(
    unit(normal(B, L, H, K)),
    unit(normal(B, L, H, K)),
    normal(B, L, H, K),
    np.abs(normal(B, L, H, 3)) * 0.1,
    1 / (1 + np.exp(-normal(B, L, H))),
)


@pytest.fixture
def two_steps(monkeypatch):
    """Of Newton-Schulz, no less nonlinear than five, and compiled in less time."""
    monkeypatch.setattr(newton_schulz, "QUINTICS", newton_schulz.QUINTICS[-2:])


def batched(weights: FastWeights) -> FastWeights:
    return FastWeights(*(np.broadcast_to(w, (B, *w.shape)) for w in weights))


def by_head(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 2, 1)


@pytest.mark.fast
def test_an_update_is_minus_the_gradient_of_the_loss():
    k, v = by_head(READ.k), by_head(READ.v)
    grads = jax.grad(lambda w: -(fast.apply(w, k) * v).sum())(batched(WEIGHTS))
    got = fast.step(batched(WEIGHTS), k, v, np.ones((B, H, L, 3), np.float32))
    chex.assert_trees_all_close(got, jax.tree.map(jnp.negative, grads), rtol=1e-5, atol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("polish", [None, orthogonal], ids=["plain", "muon"])
@pytest.mark.usefixtures("two_steps")
def test_a_rate_of_zero_changes_nothing(polish):
    still = READ._replace(rates=0 * READ.rates)

    @functools.partial(jax.jit, compiler_options=hlo.QUICK)
    def run(read: Read) -> tuple[jax.Array, FastWeights, Read]:
        def loss(read: Read) -> tuple[jax.Array, tuple]:
            out, weights = fast.swiglu_scan(read, WEIGHTS, 8, polish)
            return (out**2).sum(), (out, weights)

        grads, outs = jax.grad(loss, has_aux=True)(read)
        return *outs, grads

    out, weights, grads = run(still)
    chex.assert_trees_all_equal(weights, batched(WEIGHTS))
    assert all(np.isfinite(g).all() for g in grads)
    # A chunk at a time, as the scan reads them: longer products round differently.
    for at in range(0, L, 8):
        want = fast.apply(batched(WEIGHTS), by_head(READ.q)[:, :, at : at + 8])
        np.testing.assert_array_equal(by_head(out)[:, :, at : at + 8], want)


@pytest.mark.fast
@pytest.mark.usefixtures("two_steps")
def test_a_chunk_is_read_before_it_is_learnt_from_and_its_order_is_free():
    run = functools.partial(fast.swiglu_scan, chunk=8, orthogonalise=orthogonal)
    run = jax.jit(run, compiler_options=hlo.QUICK)
    out, weights = run(READ, WEIGHTS)
    first = fast.apply(batched(WEIGHTS), by_head(READ.q)[:, :, :8])
    np.testing.assert_allclose(by_head(out)[:, :, :8], first, atol=1e-6)
    order = np.r_[np.random.default_rng(1).permutation(8), 8:L]
    moved, same = run(jax.tree.map(lambda x: x[:, order], READ), WEIGHTS)
    np.testing.assert_allclose(moved, out[:, order], atol=1e-5)
    chex.assert_trees_all_close(same, weights, atol=1e-5)
    # A longer chunk than the sequence is only read; a part of a chunk at the end, too.
    alone, untouched = fast.swiglu_scan(READ, WEIGHTS, L, orthogonal)
    np.testing.assert_allclose(by_head(alone), fast.apply(batched(WEIGHTS), by_head(READ.q)))
    chex.assert_trees_all_equal(untouched, batched(WEIGHTS))
    short = jax.tree.map(lambda x: x[:, :21], READ)
    np.testing.assert_allclose(run(short, WEIGHTS)[0], out[:, :21], atol=1e-6)


@pytest.mark.fast
def test_a_sequence_that_is_not_finite_spoils_no_other():
    run = functools.partial(fast.swiglu_scan, chunk=8, orthogonalise=orthogonal)
    run = jax.jit(run, compiler_options=hlo.QUICK)
    spoilt = READ._replace(v=READ.v.copy())
    spoilt.v[0, 3] = np.nan
    (want, kept), (out, weights) = run(READ, WEIGHTS), run(spoilt, WEIGHTS)
    np.testing.assert_array_equal(out[0, :8], want[0, :8])  # read before it is learnt from
    assert np.isnan(out[0, 8:]).all()
    np.testing.assert_array_equal(out[1], want[1])
    for got, before in zip(weights, kept, strict=True):
        np.testing.assert_array_equal(got[1], before[1])


@pytest.mark.fast
def test_groups_of_chunks_change_no_value():
    def loss(read: Read, weights: FastWeights, group: int) -> tuple:  # two, two and one
        found = fast.swiglu_scan(read, weights, 4, group=group)
        return sum((x**2).sum() for x in jax.tree.leaves(found)), found

    @functools.partial(jax.jit, compiler_options=hlo.QUICK)
    def run(read: Read, weights: FastWeights) -> list:
        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        return [grad(read, weights, group) for group in (0, 2)]

    want, got = run(READ, WEIGHTS)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.fast
def test_orthogonal_matrices_come_out_and_the_sum_comes_first():
    a, b = normal(3, 16, 8), normal(3, 16, 8)
    run = jax.jit(orthogonal, compiler_options=hlo.QUICK)
    values = np.linalg.svd(run(a), compute_uv=False)
    assert (np.abs(values - 1) < 0.15).all()
    whole, parts = run(a + b), run(a) + run(b)
    assert np.linalg.norm(parts - whole) > 0.3 * np.linalg.norm(whole)
    assert not np.asarray(run(0 * a)).any()
    gradient = jax.jit(jax.grad(lambda x: orthogonal(x).sum()))
    assert np.isfinite(gradient(0 * a)).all()


# Layers
# -------------------------------------------------------------------------------------------------

SHAPE = ModelShape(layers=1, width=12, heads=8, kv_heads=8, head_dim=4, ffn=8, vocab=8, conv=3)
S = 32
X, TARGET = normal(B, S, 12), normal(B, S, 12)
SHARED = SequenceLayout("striped", 2)  # chunks of 8 on four devices
LAYERS = {
    "gdn, affine": (GatedDeltaNet, "affine", CONTIGUOUS, {}),
    "gdn, affine+scan": (GatedDeltaNet, "affine+scan", CONTIGUOUS, {}),
    "lact, tokens": (LaCT, "tokens", SHARED, {"muon": True, "gate": False}),
    "lact, tokens+ns": (
        LaCT,
        "tokens+ns",
        SHARED,
        {"group": 3, "prenorm": True, "window": 8, "muon": True},
    ),
    "lact, heads+tokens": (LaCT, "heads+tokens", SHARED, {}),
    "lact, window": (LaCT, "heads+tokens", SHARED, {"window": 3}),
    "lact, whole": (LaCT, "tokens+ns", ZIGZAG, {"causal": False, "muon": True}),
    "ttt, heads": (TTTLinear, "heads", ZIGZAG, {}),
    "ttt, wavefront": (TTTLinear, "wavefront", CONTIGUOUS, {}),
    "ttt mlp, heads": (TTTMLP, "heads", ZIGZAG, {"hidden": 2}),
    "ttt mlp, wavefront": (TTTMLP, "wavefront", CONTIGUOUS, {"hidden": 2}),
}


# Plans of one layer: what they compute is compiled for one device once.
SAME = {
    "gdn, affine+scan": "gdn, affine",
    "lact, heads+tokens": "lact, tokens",
    "ttt, wavefront": "ttt, heads",
    "ttt mlp, wavefront": "ttt mlp, heads",
}


def make(name: str):
    cls, kind, layout, _ = LAYERS[name]
    more = LAYERS[SAME.get(name, name)][3]
    return cls(SHAPE, plan_of(kind, layout), 8, **more)


def all_kept(name: str) -> dict[str, int]:
    """What makes a layer keep all of every chunk for its backward pass."""
    return {"group": 0} if "group" in LAYERS[name][3] else {}


def plan_of(kind: str, layout: SequenceLayout) -> StatePlan:
    u, m = (2 if kind == "heads+tokens" else 1), (4 if kind == "wavefront" else 1)
    return StatePlan(kind, layout, u, m)


def where(layout: SequenceLayout, length: int) -> Where:
    at = layouts.positions(layout, length)
    return Where(at, at)


def outcome(layer, params, x, target):
    """((loss, y), gradients) of this device's share."""

    def loss(params):
        y, _, _ = module.run(layer, {"params": params}, x, where(layer.plan.layout, x.shape[1]))
        return psum(((y - target) ** 2).sum(), "cp"), y

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.cache
def one_device(name: str):
    """(program, parameters, what it makes of them)."""
    layer = make(name).clone(plan=StatePlan("heads"), **all_kept(name))
    params = drawn(module.abstract(layer, X, where(CONTIGUOUS, S))[0]["params"], 0.4)
    run = jax.jit(functools.partial(outcome, layer), compiler_options=hlo.QUICK)
    return run, params, jax.device_get(run(params, X, TARGET))


def slow_mlp(*names: str) -> list:
    """Those of TTT-MLP are slow: they run what TTT-Linear runs, with a map more."""
    return [pytest.param(n, marks=[pytest.mark.slow] if "mlp" in n else []) for n in names]


EACH = [
    "gdn, affine",
    "lact, tokens",
    "lact, tokens+ns",
    "lact, whole",
    "ttt, heads",
    "ttt mlp, heads",
]


@pytest.mark.parametrize("name", slow_mlp(*EACH, *SAME))
@pytest.mark.usefixtures("two_steps")
def test_every_plan_equals_one_device(name):
    layer, one = make(name), one_device(SAME.get(name, name))
    _, params, ((want_loss, want), want_grads) = one
    cp = 8 if name == "gdn, affine+scan" else 4  # fewer steps of a scan compose no maps
    degrees = dict.fromkeys(AXES, 1) | {"cp": cp}
    layer.check(B, S, degrees)
    mesh, order = make_mesh(degrees), layouts.permutation(layer.plan.layout, S, cp)
    mesh = factor(mesh, "cp") if layer.plan.head_split > 1 else mesh
    specs = module.abstract(layer, X, where(CONTIGUOUS, S))[1]["params"]
    of_x = P(None, "cp")
    f = shard_map(
        functools.partial(outcome, layer), mesh, (specs, of_x, of_x), ((P(), of_x), specs)
    )
    given = params, X[:, order], TARGET[:, order]
    run = jax.jit(f).lower(*given).compile(hlo.QUICK)
    (loss, y), grads = jax.device_get(run(*given))
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    np.testing.assert_allclose(y, want[:, order], rtol=1e-4, atol=1e-5)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(want_grads))
    chex.assert_trees_all_close(grads, want_grads, rtol=1e-3, atol=1e-5 * scale)
    ends = sum(x.size for x in jax.tree.leaves(params)) + 1  # the gradient's sum, and the loss'
    summed = Ledger(degrees).add(REDUCE, ("cp",), 4 * ends).sent
    assert not mismatches(
        merged(layer.counts(Rows(B, S, 0), degrees).passes, summed), sent(run, mesh)
    )


@pytest.mark.parametrize(
    "name", slow_mlp("gdn, affine", "lact, tokens", "ttt, heads", "ttt mlp, heads")
)
@pytest.mark.usefixtures("two_steps")
def test_no_output_depends_on_a_later_token(name):
    run, params, ((_, y), _) = one_device(name)
    later = X.copy()
    later[:, 19] += 1
    (_, moved), _ = run(params, later, TARGET)
    np.testing.assert_array_equal(moved[:, :19], y[:, :19])
    assert np.abs(moved[:, 24:] - y[:, 24:]).max() > 1e-4


REFUSED = [
    (GatedDeltaNet, "tokens", SHARED, 8, "GatedDeltaNet does not run plan tokens: choose affine"),
    (GatedDeltaNet, "affine", ZIGZAG, 8, "the zigzag layout deals them out"),
    (GatedDeltaNet, "affine+scan", SHARED, 8, "affine.scan plan .* the striped layout deals them"),
    (LaCT, "tokens", CONTIGUOUS, 8, "later tokens would be read first; .* chunk / cp = 2"),
    (LaCT, "tokens", SHARED, 6, "a chunk of 6 tokens is not divisible by cp = 4, .* chunk of 8"),
    (LaCT, "tokens", SequenceLayout("striped", 3), 12, r"set data.seq_len=36"),
    (LaCT, "heads", CONTIGUOUS, 8, r"heads / tp = 6 are not divisible by cp = 4, .*heads=8"),
    (LaCT, "heads+tokens", CONTIGUOUS, 8, "later tokens would be read first; .* chunk / cp = 2"),
    (TTTLinear, "heads+tokens", SHARED, 8, "TTTLinear does not run plan heads.tokens"),
    (TTTLinear, "wavefront", ZIGZAG, 8, "one range of positions to the next, and the zigzag"),
    (TTTLinear, "wavefront", CONTIGUOUS, 16, "32 tokens / cp = 4 .* mini-batches of 16, .*_len=64"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("cls", "kind", "layout", "chunk", "message"), REFUSED)
def test_plans_that_cannot_run_are_refused(cls, kind, layout, chunk, message):
    shape = SHAPE if kind != "heads" else ModelShape(1, 12, 6, 6, 4, 8, 8)
    layer = cls(shape, plan_of(kind, layout), chunk)
    with pytest.raises(ValueError, match=message):
        layer.check(B, S, dict.fromkeys(AXES, 1) | {"cp": 4})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("heads", "split", "message"),
    [
        (3, 2, "heads / tp = 3 are not divisible by head_split = 2, .* set model.heads=4"),
        (8, 3, "cp = 4 is not head_split = 3 times 2 or more .*: use a power of two below 4"),
        (8, 4, "cp = 4 is not head_split = 4 times 2 or more devices that share tokens"),
    ],
)
def test_splits_that_cannot_run_are_refused(heads, split, message):
    with pytest.raises(ValueError, match=message):
        StatePlan("heads+tokens", SHARED, split).check(
            B, heads, S, dict.fromkeys(AXES, 1) | {"cp": 4}, 8
        )


@pytest.mark.fast
@pytest.mark.parametrize(("cp", "split"), [(2, 2), (6, 2), (6, 3), (12, 4), (12, 6)])
def test_devices_that_are_no_power_of_two_times_two_are_not_split(cp, split):
    plan = StatePlan("heads+tokens", SequenceLayout("striped", 1), split)
    degrees = dict.fromkeys(AXES, 1) | {"cp": cp}
    with pytest.raises(ValueError, match=f"cp = {cp} .*both powers of two: use plan tokens or hea"):
        plan.check(B, 12, 4 * cp, degrees, cp)


@pytest.mark.fast
def test_groups_and_mini_batches_that_cannot_run_are_refused():
    one, shape = dict.fromkeys(AXES, 1), ModelShape(1, 8, 2, 2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"group = -1 chunks .* set 0"):
        LaCT(shape, group=-1, parent=None).check(1, 24, one)
    with pytest.raises(ValueError, match=r"24 tokens .* mini-batches of 16: set data.seq_len=32"):
        TTTLinear(shape, chunk=16, parent=None).check(1, 24, one)
    with pytest.raises(ValueError, match=r"rate = -1 makes the loss of a token larger: set 0"):
        TTTMLP(shape, rate=-1, parent=None).check(1, 16, one)


def test_an_unknown_plan_is_refused():
    with pytest.raises(ValueError, match="state plan 'ring' is unknown: tokens, tokens"):
        StatePlan("ring")
    for kind, split in (("heads+tokens", 1), ("tokens", 2)):
        with pytest.raises(ValueError, match=r"heads.tokens splits heads among 2 devices or more"):
            StatePlan(kind, SHARED, split)
    with pytest.raises(ValueError, match="heads with pieces = 2: wavefront has 1 or more"):
        StatePlan("heads", pieces=2)
    with pytest.raises(ValueError, match=r"2 sequences · 3 heads = 6 .* pieces = 4 .* pieces=3"):
        StatePlan("wavefront", pieces=4).check(B, 3, S, dict.fromkeys(AXES, 1) | {"cp": 4}, 8)


# Counts
# -------------------------------------------------------------------------------------------------

MIXED = {"dp": 2, "cp": 2, "tp": 2}


def program_of(name: str, degrees: dict[str, int], **changes: int) -> TrainStep:
    """A model of two such layers on random tokens; `changes` are fields of theirs."""
    overrides = {f"mesh.{axis}": n for axis, n in degrees.items()}
    c = tiny(**overrides, **{"model.conv": 3, "objective.name": "autoregressive"})
    cls, kind, layout, more = LAYERS[name]
    if layout.kind == "striped":  # chunks of 8
        layout = SequenceLayout("striped", 8 // degrees.get("cp", 1))
    mixing = layer(cls, plan=plan_of(kind, layout), chunk=8, **(more | changes))
    e = experiment(c)
    block = layer(Block, mixing=mixing, ffn=layer(SwiGLU))
    model = e.model.clone(pattern=(block,), layout=layout)
    return TrainStep(replace(e, model=model), make_mesh(c.mesh))


@functools.cache
def trained(name: str):
    """(variables, outcome) on one device, which keeps all of every chunk."""
    p = program_of(name, {}, **all_kept(name))
    variables = {"params": drawn(p.specs.shapes), "state": {}}
    return variables, outcome_of(p, variables, {"tokens": tokens(tiny())})


# `same` computes the same on one device.
TRAINED = {
    "gdn, affine": ("gdn, affine", MIXED),
    "lact, tokens+ns": ("lact, tokens+ns", MIXED),
    "lact, heads+tokens": ("lact, heads+tokens", {"dp": 2, "cp": 4}),
    "lact, window": ("lact, window", {"dp": 2, "cp": 4}),
    "ttt, wavefront": ("ttt, heads", {"tp": 2, "cp": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_model_trains_as_one_device_and_sends_what_the_layers_state(name):
    same, degrees = TRAINED[name]
    p, (variables, want) = program_of(name, degrees), trained(same)
    got = outcome_of(p, variables, {"tokens": tokens(tiny())})
    formula = dict(closed.traffic(p))
    found = Comparison.of(name, got, want, formula)
    assert found.output_error <= 1e-6 and found.gradient_error <= 5e-6
    assert not found.mismatches()


def traced_flops(p: TrainStep) -> int:
    """Of a device."""
    state, batch = p.abstract_arguments()
    variables = {"params": state.params, "state": state.model}
    noised = jax.eval_shape(lambda b: p.corrupt(b, jax.random.key(0)), batch)
    return jaxpr.dot_flops(jax.jit(p.grads).trace(variables, noised).jaxpr)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "cp"),
    [
        ("lact, tokens", 4),
        ("lact, heads+tokens", 4),
        ("ttt, wavefront", 4),
        ("gdn, affine", 4),
        ("gdn, affine+scan", 8),
    ],
)
def test_devices_compute_what_the_plan_makes_them_compute_alike(name, cp):
    p = program_of(name, {"cp": cp})
    assert cp * traced_flops(p) == flops.executed(p)
    # Newton-Schulz of a sum on every device, ticks of a wavefront without a piece, maps of parts.
    assert (flops.executed(p) > flops.train_step(p)) == (name != "lact, heads+tokens")


@pytest.mark.fast
@pytest.mark.parametrize(
    "name", [n for n in LAYERS if n not in ("gdn, affine+scan", "lact, window")]
)
def test_flops_equal_the_jaxpr(name):
    p = program_of(name, {})
    assert traced_flops(p) == flops.executed(p)
    groups = "group" in LAYERS[name][3]
    assert (flops.executed(p) > flops.train_step(p)) == groups
    count = sum(x.size for x in jax.tree.leaves(p.specs.shapes))
    assert count == microbatch(p.experiment, 0).parameters
