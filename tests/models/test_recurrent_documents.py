"""Documents in layers with a state: each is read as if it were alone, on one device and over cp.

Legend: B sequences, L positions, H heads, K head dim, F fast width, N documents.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from build import experiment, tiny
from jax.sharding import PartitionSpec as P

from fdp.collectives import psum, shard_map
from fdp.count import bytes as closed
from fdp.count import hlo, jaxpr
from fdp.count.compare import Comparison, sent
from fdp.count.compare import outcome as outcome_of
from fdp.count.counts import REDUCE, Ledger, Rows, merged
from fdp.mesh import AXES, make_mesh
from fdp.models import delta, fast_linear, module
from fdp.models import fast_weights as fast
from fdp.models.attention import Where
from fdp.models.fast_linear import FastLinear
from fdp.models.fast_weights import FastWeights, Read
from fdp.models.lact import LaCT
from fdp.models.layers import SwiGLU
from fdp.models.recurrent import GatedDeltaNet
from fdp.models.shape import ModelShape
from fdp.models.stack import Block, layer
from fdp.models.ttt import TTTMLP, TTTLinear
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout
from fdp.parallel.context.state import StatePlan
from fdp.step import TrainStep

B, L, H, K, F, CHUNK = 2, 40, 2, 4, 8, 8
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def lengths(*of: int) -> np.ndarray:
    return np.repeat(np.arange(len(of), dtype=np.int32), of)


# Ends inside a chunk, at a chunk's edge, two in one chunk; a document of one token, and one that
# fills a chunk and leaves it; one that begins with a device's part.
SEGMENT = np.stack([lengths(5, 11, 2, 2, 20), lengths(8, 1, 17, 14)])
DOCUMENTS = [(b, d) for b in range(B) for d in range(SEGMENT[b].max() + 1)]
Q, KEY = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in normal(2, B, L, H, K))
VALUE, RATE = normal(B, L, H, K), 1 / (1 + np.exp(-normal(B, L, H)))


# Scans: (outputs) of (tokens, ids of documents or None). What a token writes is its last array.
# -------------------------------------------------------------------------------------------------

WEIGHTS = FastWeights(0.5 * normal(H, F, K), 0.5 * normal(H, F, K), 0.4 * normal(H, K, F))
MLP = tuple(FastLinear(0.3 * normal(H, m, n), 0.3 * normal(H, n)) for m, n in ((K, F), (F, K)))
LINEAR = (FastLinear(0.3 * normal(H, K, K), 0.3 * normal(H, K)),)
NORM = 1 + 0.1 * normal(H, K), 0.1 * normal(H, K)


def lact(tokens: tuple, segment: Any) -> jax.Array:
    *qkv, momentum, rates = tokens
    read = Read(*qkv, 0.2 * rates[..., None] * jnp.ones(3), momentum)
    return fast.swiglu_scan(read, WEIGHTS, CHUNK, group=2, segment_BxL=segment)[0]


def ttt(tokens: tuple, segment: Any, maps: Any = LINEAR) -> jax.Array:
    q, k, v, _, rates = tokens
    return fast_linear.linear_scan(q, k, v, rates, maps, NORM, CHUNK, segment)[0]


def gdn(tokens: tuple, segment: Any) -> jax.Array:
    q, k, v, decay, beta = tokens
    fresh = None if segment is None else jnp.diff(segment, axis=1, prepend=segment[:, :1]) != 0
    chunks = delta.prepare(delta.Tokens(q, k, v, -decay * (beta > 0), beta, fresh), CHUNK)
    return delta.scan(chunks, jnp.zeros((len(q), H, K, K)))[0]


SCANS: dict[str, Callable] = {"lact": lact, "ttt": ttt, "gdn": gdn}
SCANS["ttt mlp"] = functools.partial(ttt, maps=MLP)
TOKENS = (Q, KEY, VALUE, 0.5 * RATE, RATE)


@pytest.mark.fast
@pytest.mark.parametrize("name", SCANS)
def test_a_document_is_read_as_if_it_were_alone(name):
    run = jax.jit(SCANS[name], compiler_options=hlo.QUICK)
    rows = np.asarray([b for b, _ in DOCUMENTS])
    own = SEGMENT[rows] == np.asarray([d for _, d in DOCUMENTS])[:, None]
    tokens, one = tuple(x[rows] for x in TOKENS), 0 * SEGMENT[rows]
    got = np.asarray(run(tokens, SEGMENT[rows]))
    # Alone in its sequence: no other token writes.
    alone = np.asarray(run((*tokens[:4], tokens[4] * own[..., None]), one))
    stream = np.asarray(run(tokens, one))  # a control: the state goes on across documents
    for read, mine, want, wrong in zip(got, own, alone, stream, strict=True):
        np.testing.assert_allclose(read[mine], want[mine], rtol=1e-5, atol=2e-6)
        begins = mine.argmax()
        if begins >= CHUNK:  # LaCT reads the first chunk with its first weights
            assert np.abs(wrong[mine] - want[mine]).max() > 1e-3


# Layers
# -------------------------------------------------------------------------------------------------

SHAPE = ModelShape(layers=1, width=8, heads=2, kv_heads=2, head_dim=4, ffn=8, vocab=8, conv=4)
LAYERS = {
    "lact": (LaCT, {"rate": 0.3, "rotate": False, "window": CHUNK}),
    "ttt": (TTTLinear, {}),
    "ttt mlp": (TTTMLP, {"hidden": 2}),
    "gdn": (GatedDeltaNet, {}),
}


def shapes(mixing: Any) -> Any:
    at, x = jnp.arange(L), jnp.zeros((B, L, mixing.shape.width))
    return jax.eval_shape(lambda: module.init(mixing, jax.random.key(0), x, Where(at, at)))


def weights(mixing: Any) -> Any:
    """Drawn here: to compile a layer's own initialisation takes longer."""
    return jax.tree.map(lambda w: 0.4 * normal(*w.shape), shapes(mixing))


@pytest.mark.fast
@pytest.mark.parametrize("name", ["lact", "ttt", "gdn"])
def test_a_token_is_seen_in_its_own_document_only(name):
    cls, more = LAYERS[name]
    mixing, at, x = cls(SHAPE, chunk=CHUNK, **more), jnp.arange(L), normal(B, L, 8)
    packed = Where(at, at, jnp.asarray(SEGMENT))

    variables = weights(mixing)

    @functools.partial(jax.jit, compiler_options=hlo.QUICK)
    def run(x: jax.Array) -> jax.Array:
        return module.run(mixing, variables, x, packed)[0]

    want = run(x)
    for row, number in ((0, 1), (0, 2), (1, 1)):  # shorter than the convolution: the last two
        mine = np.zeros((B, L, 1), bool)
        mine[row] = (SEGMENT[row] == number)[:, None]
        first = mine & (np.cumsum(mine, 1) == 1)
        moved = run(x + first)
        np.testing.assert_array_equal(np.where(mine, 0, moved), np.where(mine, 0, want))
        assert np.abs(moved - want)[mine[..., 0]].max() > 1e-3
        # No more of what is not a number, which a product with 0 keeps.
        spoilt = run(jnp.where(first, jnp.nan, x))
        np.testing.assert_array_equal(np.where(mine, 0, spoilt), np.where(mine, 0, want))
        np.testing.assert_array_equal(np.isnan(spoilt), np.broadcast_to(first, x.shape))


@pytest.mark.fast
def test_a_cache_holds_no_documents():
    mixing, at = GatedDeltaNet(SHAPE, chunk=CHUNK), jnp.arange(L)
    variables, packed = shapes(mixing), Where(at, at, jnp.asarray(SEGMENT))
    decode = functools.partial(module.run, mixing, keep_cache=True)
    with pytest.raises(ValueError, match="a row of a cache is one sequence, and these rows hold"):
        jax.eval_shape(lambda v: decode(v, jnp.zeros((B, L, 8)), packed), variables)


# Over cp
# -------------------------------------------------------------------------------------------------

CP, SHARED = 4, SequenceLayout("striped", CHUNK // 4)
PLANS = {
    "gdn, affine": ("affine", CONTIGUOUS, {"chunk": 5}),
    "gdn, affine+scan": ("affine+scan", CONTIGUOUS, {"chunk": 5}),
    "gdn, heads": ("heads", ZIGZAG, {}),
    "lact, tokens": ("tokens", SHARED, {}),
    "lact, tokens+ns": ("tokens+ns", SHARED, {"group": 2}),
    "lact, heads": ("heads", CONTIGUOUS, {}),
    "ttt, heads": ("heads", SHARED, {}),
    "ttt, wavefront": ("wavefront", CONTIGUOUS, {"chunk": 5}),
    "ttt mlp, wavefront": ("wavefront", CONTIGUOUS, {"chunk": 5}),
}
X, TARGET = normal(B, L, 8), normal(B, L, 8)


def plan_of(kind: str, layout: SequenceLayout) -> StatePlan:
    u, pieces = (2 if kind == "heads+tokens" else 1), (4 if kind == "wavefront" else 1)
    return StatePlan(kind, layout, u, pieces)


def make(name: str) -> Any:
    kind, layout, more = PLANS[name]
    cls, own = LAYERS[name.split(",")[0]]
    # The halo of ids is the convolution's, where it has one.
    shape = replace(SHAPE, heads=4, kv_heads=4, conv=4 if cls is GatedDeltaNet else 0)
    return cls(shape, plan_of(kind, layout), **{"chunk": CHUNK, "gate": False, **own, **more})


def outcome(mixing: Any, variables: Any, x: Any, target: Any, segment: Any) -> Any:
    """((loss, outputs), gradients of the weights and of x) of this device's share."""

    def loss(variables: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = layouts.positions(mixing.plan.layout, x.shape[1])
        y = module.run(mixing, variables, x, Where(at, at, segment))[0]
        return psum(((y - target) ** 2).sum(), "cp"), y

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, x)


@functools.cache
def one_device(name: str) -> tuple:
    """(weights, outcome) of a layer."""
    mixing = make(name).clone(plan=StatePlan("heads"))
    variables = weights(mixing)
    run = jax.jit(functools.partial(outcome, mixing), compiler_options=hlo.QUICK)
    return variables, jax.device_get(run(variables, X, TARGET, SEGMENT))


def slow_but(*fast: str) -> list:
    """All of PLANS, of which the others are slow."""
    return [pytest.param(n, marks=[] if n in fast else [pytest.mark.slow]) for n in PLANS]


@pytest.mark.parametrize("name", slow_but("lact, tokens", "ttt, wavefront"))
def test_documents_over_cp_equal_one_device_and_their_ids_are_counted(name):
    mixing = make(name)
    same = name if "wavefront" in name else f"{name.split(',')[0]}, heads"
    variables, ((want_loss, want), want_grads) = one_device(same)
    degrees = dict.fromkeys(AXES, 1) | {"cp": CP}
    mixing.check(B, L, degrees)
    mesh, order = make_mesh(degrees), layouts.permutation(mixing.plan.layout, L, CP)
    at = P(None, "cp")
    run = functools.partial(outcome, mixing)
    f = shard_map(run, mesh, (P(), at, at, at), ((P(), at), (P(), at)))
    given = variables, *(x[:, order] for x in (X, TARGET, SEGMENT))
    compiled = jax.jit(f).lower(*given).compile(hlo.QUICK)
    (loss, y), grads = jax.device_get(compiled(*given))
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    np.testing.assert_allclose(y, want[:, order], rtol=1e-4, atol=1e-5)
    want_grads = want_grads[0], want_grads[1][:, order]
    for got, right in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(got, right, atol=1e-5 * np.abs(right).max())
    # The gradients of all weights and the loss are summed, too.
    formula = mixing.counts(Rows(B, L, 0, segments=True), degrees)
    summed = 4 + sum(x.nbytes for x in jax.tree.leaves(variables))
    sums = Ledger(degrees).add(REDUCE, ("cp",), summed).sent
    assert formula.once and sent(compiled, mesh) == merged(formula.sent, sums)


@pytest.mark.fast
@pytest.mark.parametrize(
    "name", ["gdn, affine", "lact, tokens+ns", "ttt, heads", "ttt mlp, wavefront"]
)
def test_flops_with_documents_equal_the_jaxpr(name):
    mixing, degrees = make(name), dict.fromkeys(AXES, 1)
    run = functools.partial(outcome, mixing)
    traced = jax.jit(run).trace(shapes(mixing), X, TARGET, SEGMENT)
    formula = mixing.counts(Rows(B, L, 0, segments=True), degrees)
    assert jaxpr.dot_flops(traced.jaxpr) == formula.executed(degrees)


@pytest.mark.fast
def test_the_backward_pass_with_documents_keeps_what_the_formula_says():
    qkv, momentum, rates = TOKENS[:3], RATE, RATE[..., None] * np.ones(3, np.float32)
    first = 4 * H * (3 * F * K + 2 * (2 * F + K))  # the first weights and the lengths of their rows
    for group, with_momentum in ((0, True), (3, False)):
        read = Read(*qkv, rates, momentum if with_momentum else None)

        def kept(read: Read, weights: FastWeights) -> object:
            run = functools.partial(fast.swiglu_scan, group=group, segment_BxL=SEGMENT)  # noqa: B023
            return jax.vjp(lambda *a: run(*a, 6)[0], read, weights)[1]

        found = jax.tree.leaves(jax.eval_shape(kept, read, WEIGHTS))
        saved, _ = fast.scan_memory(
            L, 6, K, F, momentum=with_momentum, orthogonalise=False, group=group, documents=True
        )
        ids = 4 * B * 6 * (6 + 2) if group else 0
        assert sum(x.size * x.dtype.itemsize for x in found) == 4 * B * H * saved + first + ids


def trained(name: str, degrees: dict[str, int]) -> TrainStep:
    """A model of two such layers on random tokens."""
    c = tiny(
        **{f"mesh.{axis}": n for axis, n in degrees.items()},
        **{"model.conv": 3, "objective.name": "autoregressive", "data.seq_len": L},
    )
    kind, layout, more = PLANS.get(name, ("heads+tokens", SHARED, {}))
    if layout.kind == "striped":
        layout = SequenceLayout("striped", CHUNK // degrees.get("cp", 1))
    cls, own = LAYERS[name.split(",")[0]]
    mixing = layer(cls, plan=plan_of(kind, layout), **{"chunk": CHUNK, **own, **more})
    e = experiment(c, segments=np.tile(SEGMENT, (4, 1)))
    block = layer(Block, mixing=mixing, ffn=layer(SwiGLU))
    model = e.model.clone(pattern=(block,), layout=layout)
    return TrainStep(replace(e, model=model), make_mesh(c.mesh))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PLANS, "lact, heads+tokens"])
def test_a_model_reads_documents_on_a_mixed_mesh_as_on_one_device(name):
    degrees = {"dp": 2, "cp": 4} if name == "lact, heads+tokens" else {"dp": 2, "cp": 2, "tp": 2}
    alone, p = trained(name, {}), trained(name, degrees)
    variables = jax.device_get(alone.init(0).variables)
    batch = p.experiment.data.train.take(range(8))
    want, got = (outcome_of(one, variables, batch) for one in (alone, p))
    found = Comparison.of(name, got, want, dict(closed.traffic(p)))
    assert found.output_error <= 1e-6 and found.gradient_error <= 5e-6, found
    assert not found.mismatches()


@pytest.mark.fast
def test_decay_before_a_document_overflows_no_gradient():
    """exp of what a document before has forgotten is infinite in a chunk of 64 positions."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 64, 1, 4)) for key in keys)
    fresh = jnp.zeros((1, 64), bool).at[0, 62].set(True)

    def read(decay):
        tokens = delta.Tokens(q, k, v, decay, jnp.full((1, 64, 1), 0.5), fresh)
        return delta.scan(delta.prepare(tokens, 64), jnp.zeros((1, 1, 4, 4)))[0].sum()

    gradient = jax.jit(jax.grad(read), compiler_options=hlo.QUICK)
    assert np.isfinite(gradient(jnp.full((1, 64, 1), -2.0))).all()


@pytest.mark.fast
def test_turned_keys_updates_on_all_tokens_and_documents_are_refused():
    mixing = LaCT(ModelShape(1, 8, 2, 2, 4, 8, 8), chunk=8)
    at = jnp.arange(16)
    where = Where(at, at, jnp.zeros((1, 16), jnp.int32))
    x = jnp.zeros((1, 16, 8))
    with pytest.raises(ValueError, match="would depend on where it lies: set rotate=False"):
        module.abstract(mixing, x, where)
    whole = mixing.clone(causal=False)
    with pytest.raises(ValueError, match="one update on a whole sequence, and these rows hold doc"):
        module.abstract(whole, x, where)
    variables, alone = shapes(whole), Where(at, at)
    decode = functools.partial(module.run, whole, keep_cache=True)
    with pytest.raises(ValueError, match="nothing can be kept for decoding: sample without a cach"):
        jax.eval_shape(lambda v: decode(v, x, alone), variables)
