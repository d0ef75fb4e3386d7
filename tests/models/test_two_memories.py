"""Two memories in one layer: the sum of LaCT and of TTT-Linear that begins anew, on one device and
over cp.

Legend: B sequences, L positions, R positions of a segment.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import psum, shard_map, vary
from fdp.count import hlo, jaxpr
from fdp.count.compare import sent
from fdp.count.counts import REDUCE, Ledger, Rows, merged
from fdp.mesh import AXES, make_mesh
from fdp.models import module
from fdp.models.attention import Where
from fdp.models.lact import LaCT
from fdp.models.shape import ModelShape
from fdp.models.ttt import TTTLinear
from fdp.models.two_memories import TwoMemories
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout
from fdp.parallel.context.state import StatePlan

B, L, R, CHUNK = 2, 32, 8, 16
HEADS = StatePlan("heads")
SHAPE = ModelShape(layers=1, width=8, heads=4, kv_heads=4, head_dim=4, ffn=8, vocab=8)
FAST: dict[str, Any] = {"rate": 0.3, "rotate": False, "gate": False}
ONE = dict.fromkeys(AXES, 1)
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


X, TARGET = normal(B, L, 8), normal(B, L, 8)
SEGMENT = np.stack([np.repeat([0, 1, 2], [5, 14, 13]), np.repeat([0, 1], [16, 16])])


def two(plan: StatePlan = HEADS, chunk: int = CHUNK, reset: int = R) -> TwoMemories:
    return TwoMemories(SHAPE, plan, chunk, near=4, reset=reset, **FAST)


def where(layout: SequenceLayout = CONTIGUOUS, segment: Any = None, length: int = L) -> Where:
    at = layouts.positions(layout, length)
    return Where(at, at, segment)


@functools.cache
def weights() -> Any:
    """The same for all: drawn here, as to compile an initialisation takes longer."""
    shapes = jax.eval_shape(lambda: module.init(two(), jax.random.key(0), X, where()))
    return jax.tree.map(lambda w: 0.2 * normal(*w.shape), shapes)


@pytest.mark.fast
def test_what_is_read_is_the_sum_of_both_parts(monkeypatch):
    seen: dict[str, list[jax.Array]] = {}
    for cls in (LaCT, TTTLinear, TwoMemories):

        def mix(self: Any, *args: Any, of: Any = cls.mix, name: str = cls.__name__) -> jax.Array:
            out = of(self, *args)
            seen.setdefault(name, []).append(out)
            return out

        monkeypatch.setattr(cls, "mix", mix)
    both = weights()["params"]
    near = {"near": "fast", "near_bias": "fast_bias", "w_near": "w_state"}
    of_near = {**both, **{name: both[own] for own, name in near.items()}}
    parts = {
        TwoMemories: (two(), both, None),
        LaCT: (LaCT(SHAPE, chunk=CHUNK, **FAST), both, None),
        TTTLinear: (TTTLinear(SHAPE, chunk=4, gate=False), of_near, jnp.arange(L) // R),
    }

    @functools.partial(jax.jit, compiler_options=hlo.QUICK)
    def run(x: jax.Array) -> dict[str, list[jax.Array]]:
        for mixing, params, segment in parts.values():
            ids = None if segment is None else jnp.broadcast_to(segment, (B, L))
            own = jax.eval_shape(lambda: module.init(mixing, jax.random.key(0), X, where()))  # noqa: B023
            given = {"params": {name: params[name] for name in own["params"]}}
            module.run(mixing, given, x, where(segment=ids))
        return {name: outs[-1:] for name, outs in seen.items()}

    found = run(X)
    (got,), (far,), (near_read,) = (found[cls.__name__] for cls in parts)
    np.testing.assert_allclose(got, far + near_read, rtol=1e-5, atol=1e-5)
    assert np.abs(near_read).max() > 0.1 and np.abs(far).max() > 0.01


def outcome(mixing: TwoMemories, variables: Any, x: Any, target: Any, segment: Any) -> Any:
    """((loss, outputs), gradients of the weights and of x) of this device's share."""

    def loss(variables: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        place = where(mixing.plan.layout, segment, x.shape[1])
        y = module.run(mixing, vary(variables, "cp"), x, place)[0]
        return psum(((y - target) ** 2).sum(), "cp"), y

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, x)


@pytest.mark.fast
@pytest.mark.parametrize("segment", [None, SEGMENT], ids=["stream", "documents"])
def test_counts_equal_the_jaxpr(segment):
    run = functools.partial(outcome, two())
    traced = jax.jit(run).trace(weights(), X, TARGET, segment)
    found = two().counts(Rows(B, L, 0, segments=segment is not None), ONE)
    assert jaxpr.dot_flops(traced.jaxpr) == found.executed(ONE)
    assert found.parameters == sum(x.size for x in jax.tree.leaves(weights()))


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True], ids=["stream", "documents"])
@pytest.mark.parametrize(
    "plan", [StatePlan("tokens", SequenceLayout("striped", 8)), HEADS], ids=["tokens", "heads"]
)
def test_over_cp_it_is_one_device_and_the_near_memory_sends_nothing(plan, documents):
    mixing, degrees = two(plan), ONE | {"cp": 2}
    mixing.check(B, L, degrees)
    segment = SEGMENT if documents else None
    one = jax.jit(functools.partial(outcome, two()), compiler_options=hlo.QUICK)
    (want_loss, want), want_grads = jax.device_get(one(weights(), X, TARGET, segment))
    order, at = layouts.permutation(plan.layout, L, 2), P(None, "cp")
    mesh, run = make_mesh(degrees), functools.partial(outcome, mixing)
    f = shard_map(run, mesh, (P(), at, at, at), ((P(), at), (P(), at)))
    arrays = (X, TARGET, segment)
    given = weights(), *(None if x is None else x[:, order] for x in arrays)
    compiled = jax.jit(f).lower(*given).compile(hlo.QUICK)
    (loss, y), grads = jax.device_get(compiled(*given))
    want_grads = want_grads[0], want_grads[1][:, order]
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    np.testing.assert_allclose(y, want[:, order], rtol=1e-4, atol=1e-5)
    for got, right in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(got, right, atol=1e-5 * np.abs(right).max())
    formula = mixing.counts(Rows(B, L, 0, segments=documents), degrees)
    alone = LaCT(SHAPE, plan, CHUNK, **FAST).counts(Rows(B, L, 0, segments=documents), degrees)
    assert formula.sent == alone.sent
    summed = 4 + sum(x.nbytes for x in jax.tree.leaves(weights()))
    sums = Ledger(degrees).add(REDUCE, ("cp",), summed).sent
    assert sent(compiled, mesh) == merged(formula.sent, sums)


REFUSED = [
    (StatePlan("tokens", SequenceLayout("striped", 4)), 8, 2, r"holds 4 neighbours .*set reset=4"),
    (StatePlan("heads", ZIGZAG), 16, 2, r"holds 8 neighbours of 32 tokens on cp = 2 \(zigzag\)"),
    (HEADS, 6, 1, "6 tokens is not divisible by mini-batches of 4: set reset=8"),
    (HEADS, 12, 1, "every 12 tokens, and a device holds 32 .* set reset=32"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("plan", "reset", "cp", "message"), REFUSED)
def test_segments_that_lie_on_several_devices_are_refused(plan, reset, cp, message):
    chunk = 8 if plan.kind == "tokens" else CHUNK
    with pytest.raises(ValueError, match=message):
        two(plan, chunk, reset).check(B, L, ONE | {"cp": cp})
