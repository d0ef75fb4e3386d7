"""Blockwise attention against dense softmax: values, gradients, masks, memory; the merge of partial
results.

Legend: B sequences, N queries, M keys, H query heads, K key heads, C head_dim.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.count import jaxpr
from fdp.kernels_pallas.blockwise import (
    attention_backward,
    attention_lse,
    merge_lse,
    tiles_computed,
)
from fdp.objectives.block_diffusion import BlockDiffusionRule
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG
from fdp.parallel.masks import Mask

B, N, M, H, K, C = 2, 12, 22, 6, 2, 8
RULE = Mask(rule=BlockDiffusionRule(12, 3))
MASKS = [Mask(), Mask("causal"), Mask("causal", 5), Mask(window=4), RULE]
MASKS.append(Mask("causal", packed=True))
# In any order, as positions decide; some queries see no key, under the rule all do.
PLACES = np.arange(N) + 10, np.arange(M)[::-1] + 3


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(B, N, H, C), (B, M, K, C), (B, M, K, C), (B, N, H, C), (B, H, N)]
    return [
        jax.random.normal(k, s, jnp.float32).astype(dtype)
        for k, s in zip(keys, shapes, strict=True)
    ]


def segments():
    rng = np.random.default_rng(1)
    return rng.integers(0, 3, (B, N)), rng.integers(0, 3, (B, M))


def seen_of(mask: Mask) -> np.ndarray:
    """Who sees whom, bool [B, N, M], pair by pair."""
    a, b = segments()
    seen = np.zeros((B, N, M), bool)
    for n, m in itertools.product(range(N), range(M)):
        q, k = int(PLACES[0][n]), int(PLACES[1][m])
        one = (mask.kind != "causal" or k <= q) and (not mask.window or abs(q - k) < mask.window)
        one = one and (mask.rule is None or bool(mask.rule(q, k)))
        seen[:, n, m] = one & ((a[:, n] == b[:, m]) if mask.packed else True)
    return seen


def dense(seen, q, k, v):
    """The oracle: (out, lse) from all scores, rows without a key out 0 and lse -inf."""
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    seen = jnp.broadcast_to(seen[:, None], (B, H, N, M))
    some = seen.any(-1)
    s = jnp.where(seen, jnp.einsum("bnhc,bmhc->bhnm", q, k) / C**0.5, -1e30)
    out = jnp.einsum("bhnm,bmhc->bnhc", jax.nn.softmax(s), v)
    lse = jnp.where(some, jax.nn.logsumexp(s, -1), -jnp.inf)
    return jnp.where(jnp.moveaxis(some, 1, 2)[..., None], out, 0), lse


def with_gradients(f, dout, dlse):
    """(q, k, v) → ((out, lse), gradients through both); rows without a key give lse -inf, left
    out."""

    def run(q, k, v):
        (out, lse), pull = jax.vjp(f, q, k, v)
        return (out, lse), pull((dout, jnp.where(lse == -jnp.inf, 0.0, dlse)))

    return run


@jax.jit
def wanted(seen, q, k, v, dout, dlse):
    return with_gradients(functools.partial(dense, seen), dout, dlse)(q, k, v)


@functools.partial(jax.jit, static_argnums=(0, 1))
def traced(mask: Mask, block: int, places, q, k, v, dout, dlse):
    """With positions that are data."""
    labels = (*places, *(segments() if mask.packed else ()))
    f = lambda q, k, v: attention_lse(q, k, v, mask, *labels, block=block)
    return with_gradients(f, dout, dlse)(q, k, v)


@functools.partial(jax.jit, static_argnums=(0, 1))
def known(mask: Mask, block: int, q, k, v, dout, dlse):
    """With positions that are known before tracing."""
    labels = (*PLACES, *(segments() if mask.packed else ()))
    f = lambda q, k, v: attention_lse(q, k, v, mask, *labels, block=block)
    return with_gradients(f, dout, dlse)(q, k, v)


CASES = [(mask, 4) for mask in MASKS] + [(MASKS[2], 11), (MASKS[2], 100)]


@pytest.mark.fast
@pytest.mark.parametrize(("mask", "block"), CASES)
def test_values_and_gradients_equal_dense_attention(mask: Mask, block: int) -> None:
    """Tiles that divide the keys, leave a rest, or are the whole; gradients through out and lse."""
    arrays = inputs()
    (out, lse), want = wanted(seen_of(mask), *arrays)
    runs = [traced(mask, block, PLACES, *arrays)]
    runs += [known(mask, block, *arrays)] if block == 4 and mask.orders else []
    for got, grads in runs:
        assert np.allclose(got[0], out, atol=1e-5)
        assert (np.isneginf(got[1]) == np.isneginf(lse)).all()
        assert np.allclose(got[1], lse, atol=1e-5)
        for a, b in zip(grads, want, strict=True):
            assert np.abs(a - b).max() <= 1e-5 * max(1.0, np.abs(b).max())


LENGTH, TILE = 32, 8
POSITIONS = np.asarray(layouts.permutation(ZIGZAG, LENGTH, 2))


@functools.partial(jax.jit, static_argnums=(0, 1))
def one_tile(mask: Mask, at: int | None, places, k):
    """(out, dq, dv) of one tile of queries, the one that starts at `at` if that is known before
    tracing."""
    q, v, dout = jax.random.normal(jax.random.key(0), (3, 1, LENGTH, 2, 4))
    places = places if at is None else (POSITIONS[at:][:TILE], POSITIONS)
    f = lambda q, v: attention_lse(q, k, v, mask, *places, block=TILE)[0]
    out, pull = jax.vjp(f, q[:, :TILE], v)
    return out, *pull(dout[:, :TILE])


@pytest.mark.fast
@pytest.mark.parametrize("mask", [Mask("causal"), Mask("causal", 9), Mask(window=9)])
def test_what_the_mask_hides_is_not_computed(mask: Mask) -> None:
    """Forward and backward, with positions known before tracing and without: a NaN in a hidden tile
    reaches nobody. Negative control: it reaches those who see its tile."""
    k = jax.random.normal(jax.random.key(1), (1, LENGTH, 2, 4))
    for start, ways in ((0, (None,)), (2 * TILE, (None, 2 * TILE))):
        own = POSITIONS[start:][:TILE]
        met = [tiles_computed(mask, own, tile, TILE) == 1 for tile in POSITIONS.reshape(-1, TILE)]
        assert not all(met)
        hidden = np.repeat(~np.array(met), TILE)[None, :, None, None]
        for way in ways:
            for x in one_tile(mask, way, (own, POSITIONS), jnp.where(hidden, jnp.nan, k)):
                assert np.isfinite(x).all()
        soiled = k.at[:, int(np.argmax(met)) * TILE].set(jnp.nan)
        assert np.isnan(one_tile(mask, None, (own, POSITIONS), soiled)[0]).any()


@pytest.mark.fast
def test_tiles_are_skipped_under_vmap_and_rematerialisation() -> None:
    """Each example has positions of its own, hence other tiles: as one by one."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 1, LENGTH, 2, 4))
    places = jnp.arange(LENGTH) + jnp.array([[0], [9]])

    def loss(q, k, v, place):
        f = lambda q, k, v: attention_lse(
            q, k, v, Mask("causal", 9), place, jnp.arange(LENGTH), block=TILE
        )[0]
        return (jax.checkpoint(f)(q, k, v) ** 2).sum()

    grad = jax.grad(loss, (0, 1, 2))
    together, one = jax.jit(jax.vmap(grad))(q, k, v, places), jax.jit(grad)
    for i in range(2):
        for a, b in zip(together, one(q[i], k[i], v[i], places[i]), strict=True):
            assert np.abs(b).max() > 0.1 and np.abs(a[i] - b).max() < 1e-5
    made = jax.make_jaxpr(jax.vmap(loss))(q, k, v, places)
    assert jaxpr.dot_flops(made) == 2 * 4 * LENGTH**2 * 2 * 4


def flops(mask: Mask, length: int) -> int:
    x, places = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32), np.arange(length)
    f = lambda q, k, v: attention_lse(q, k, v, mask, places, places)[0].sum()
    return jaxpr.dot_flops(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(x, x, x))


@pytest.mark.fast
def test_a_mask_saves_its_flops_and_zigzag_halves_those_of_the_busiest_device() -> None:
    assert flops(Mask("causal"), 2048) <= 0.6 * flops(Mask(), 2048)
    assert flops(Mask("causal", 256), 2048) <= 0.25 * flops(Mask(), 2048)
    x = jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32)
    f = lambda q, k, v: attention_lse(q, k, v, Mask("causal"), jnp.arange(512), jnp.arange(512))
    assert jaxpr.dot_flops(jax.make_jaxpr(f)(x, x, x)) == 4 * 512 * 512 * 2 * 8  # at most

    def busiest(layout) -> int:
        """Tiles of the device that computes most, over the hops of a ring of 8."""
        held = layouts.permutation(layout, 8192, 8).reshape(8, -1)
        return max(sum(tiles_computed(Mask("causal"), q, k) for k in held) for q in held)

    assert busiest(ZIGZAG) <= 0.6 * busiest(CONTIGUOUS)


@pytest.mark.fast
def test_rows_without_a_key_are_zero_and_send_no_gradient() -> None:
    q, k, v, dout, dlse = inputs()
    nobody = np.zeros(N, int), np.arange(M) + 1
    for block in (4, 100):  # no tile is computed; one is
        (out, lse), grads = traced(Mask("causal"), block, nobody, q, k, v, dout, dlse)
        assert (out == 0).all() and np.isneginf(lse).all()
        assert all((g == 0).all() for g in grads)


@pytest.mark.fast
@pytest.mark.parametrize("where", range(2))
def test_nan_in_keys_or_values_is_not_hidden(where: int) -> None:
    q, k, v, _, _ = inputs()
    kv = [k, v]
    kv[where] = kv[where].at[0, 3].set(jnp.nan)
    out, _ = attention_lse(q, *kv, Mask(), *PLACES, block=8)
    assert np.isnan(out[0]).any(-1).all() and np.isfinite(out[1]).all()


@pytest.mark.fast
def test_parts_of_the_keys_add_up() -> None:
    """merge_lse joins disjoint parts; attention_backward with the global out and lse sums to the
    whole gradient.
    """
    mask, (q, k, v, dout, dlse) = Mask("causal", 9), inputs()
    out, lse = attention_lse(q, k, v, mask, *PLACES)
    parts = [slice(0, 7), slice(7, 15), slice(15, None)]
    state = (jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf))
    dq, dk, dv = 0, [], []
    for part in parts:
        places = (PLACES[0], PLACES[1][part])
        state = merge_lse(*state, *attention_lse(q, k[:, part], v[:, part], mask, *places))
        d = attention_backward(
            q, k[:, part], v[:, part], out, lse, dout, mask, *places, dlse_BxHxN=dlse
        )
        dq, dk, dv = dq + d[0], [*dk, d[1]], [*dv, d[2]]
    assert np.allclose(state[0], out, atol=1e-6) and np.allclose(state[1], lse, atol=1e-6)
    want = jax.vjp(lambda *x: attention_lse(*x, mask, *PLACES), q, k, v)[1]((dout, dlse))
    for a, b in zip((dq, jnp.concatenate(dk, 1), jnp.concatenate(dv, 1)), want, strict=True):
        assert np.allclose(a, b, atol=1e-5)
    own = attention_lse(q, k[:, parts[0]], v[:, parts[0]], mask, PLACES[0], PLACES[1][parts[0]])
    wrong = attention_backward(
        q, k[:, parts[0]], v[:, parts[0]], *own, dout, mask, PLACES[0], PLACES[1][parts[0]]
    )
    assert not np.allclose(wrong[1], dk[0], atol=1e-2)  # a part's own lse is the classical mistake


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1))
def finite_gradients(o1, l1, o2, l2):
    return sum(jnp.where(jnp.isfinite(x), x, 0).sum() for x in merge_lse(o1, l1, o2, l2))


LSE = st.one_of(st.just(-np.inf), st.floats(-300, 300, width=32))


@pytest.mark.fast
@settings(deadline=None, max_examples=60)
@given(lse=st.tuples(LSE, LSE, LSE), seed=st.integers(0, 1000))
def test_merge_is_associative_commutative_and_has_an_identity(
    lse: tuple[float, ...], seed: int
) -> None:
    outs = np.random.default_rng(seed).normal(size=(3, 1, 1, 1, 4)).astype(np.float32)
    parts = [
        (jnp.asarray(o if np.isfinite(l) else 0 * o), jnp.full((1, 1, 1), l, jnp.float32))
        for o, l in zip(outs, lse, strict=True)
    ]
    a, b, c = parts
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    merge = jax.jit(merge_lse)
    jax.tree.map(close, merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c)))
    jax.tree.map(close, merge(*a, *b), merge(*b, *a))
    nothing = (jnp.zeros_like(a[0]), jnp.full_like(a[1], -jnp.inf))
    jax.tree.map(close, merge(*a, *nothing), a)
    assert all(np.isfinite(g).all() for g in finite_gradients(*a, *b))


@pytest.mark.fast
def test_bfloat16_accumulates_in_float32() -> None:
    q, k, v, dout, _ = inputs(jnp.bfloat16)
    f = jax.jit(lambda q, k, v: attention_lse(q, k, v, Mask("causal"), *PLACES, block=4))
    exact = jax.vjp(f, *(x.astype(jnp.float32) for x in (q, k, v)))
    (out, lse), pull = jax.vjp(f, q, k, v)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    some = np.isfinite(lse)
    assert np.abs(lse - exact[0][1])[some].max() < 0.02
    for a, b in zip(
        pull((dout, jnp.zeros_like(lse))),
        exact[1]((dout.astype(jnp.float32), jnp.zeros_like(lse))),
        strict=True,
    ):
        assert a.dtype == jnp.bfloat16 and np.abs(a - b).max() < 0.03 * np.abs(b).max()
    assert attention_lse(q, k, v, Mask(), *PLACES, out_type=jnp.float32)[0].dtype == jnp.float32


def temporary(f, length: int) -> int:
    x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
    g = jax.grad(lambda q, k, v: f(q, k, v).sum(), (0, 1, 2))
    return jax.jit(g).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_length_and_dense_attention_is_quadratic() -> None:
    def blockwise(q, k, v):
        places = jnp.arange(q.shape[1])
        return attention_lse(q, k, v, Mask("causal"), places, places, block=256)[0]

    short, long = (temporary(blockwise, length) for length in (1024, 4096))
    assert long < 4.5 * short
    naive = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    short, dense_long = (temporary(naive, length) for length in (1024, 4096))
    assert dense_long > 8 * short and dense_long > 5 * long


@pytest.mark.fast
def test_refusals() -> None:
    q, k, v, _, _ = inputs()
    with pytest.raises(ValueError, match=r"must both be \[B=2, M, K, C=8\]"):
        attention_lse(q, k, v[:, 1:], Mask(), *PLACES)
    with pytest.raises(ValueError, match="6 query heads are not divisible by 4"):
        attention_lse(q, jnp.zeros((B, M, 4, C)), jnp.zeros((B, M, 4, C)), Mask(), *PLACES)
    with pytest.raises(ValueError, match=r"must be \[N=12\] and \[M=22\]"):
        attention_lse(q, k, v, Mask(), PLACES[1], PLACES[1])
    with pytest.raises(ValueError, match="segment ids"):
        attention_lse(q, k, v, Mask(packed=True), *PLACES)
    with pytest.raises(ValueError, match="block = 0"):
        attention_lse(q, k, v, Mask(), *PLACES, block=0)
