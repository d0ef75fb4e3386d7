"""Blockwise attention against dense softmax: values, gradients, masks, memory; the merge of partial
results.

Legend: B sequences, N queries, M keys, H query heads, K key heads, C head_dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.kernels_pallas.blockwise import attention_backward, attention_lse, merge_lse
from fdp.kernels_pallas.masks import Mask

B, N, M, H, K, C = 2, 12, 22, 6, 2, 8
MASKS = [Mask(), Mask("causal"), Mask("causal", 5), Mask(window=4), Mask("causal", packed=True)]
PLACES = (
    jnp.arange(N) + 10,
    jnp.arange(M)[::-1] + 3,
)  # any order: positions decide; some queries see no key


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


def dense(mask: Mask, q, k, v):
    """The oracle: (out, lse) from all scores, rows without a key out 0 and lse -inf."""
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    apart = np.asarray(PLACES[0])[:, None] - np.asarray(PLACES[1])[None]
    seen = np.ones((1, 1, N, M), bool)
    if mask.kind == "causal":
        seen = seen & (apart >= 0)
    if mask.window:
        seen = seen & (abs(apart) < mask.window)
    if mask.packed:
        a, b = segments()
        seen = seen & (a[:, None, :, None] == b[:, None, None, :])
    some = seen.any(-1)
    s = jnp.where(seen, jnp.einsum("bnhc,bmhc->bhnm", q, k) / C**0.5, -1e30)
    out = jnp.einsum("bhnm,bmhc->bnhc", jax.nn.softmax(s), v)
    lse = jnp.where(some, jax.nn.logsumexp(s, -1), -jnp.inf)
    return jnp.where(jnp.moveaxis(jnp.broadcast_to(some, lse.shape), 1, 2)[..., None], out, 0), lse


def ours(mask: Mask, block: int):
    a, b = segments()
    labels = (*PLACES, a, b) if mask.packed else PLACES
    return lambda q, k, v: attention_lse(q, k, v, mask, *labels, block=block)


def loss(f, dout, dlse):
    """Uses both results; rows without a key give lse -inf and are left out."""

    def run(q, k, v):
        out, lse = f(q, k, v)
        return (out * dout).sum() + jnp.where(lse == -jnp.inf, 0.0, lse * dlse).sum()

    return run


@pytest.mark.fast
@pytest.mark.parametrize("block", [4, 11, 100])
@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients_equal_dense_attention(mask: Mask, block: int) -> None:
    """Blocks that divide the keys, leave a rest, or are one dense block; gradients through out and
    lse.
    """
    q, k, v, dout, dlse = inputs()
    got, want = jax.jit(ours(mask, block))(q, k, v), dense(mask, q, k, v)
    assert np.allclose(got[0], want[0], atol=1e-5)
    assert (np.isneginf(got[1]) == np.isneginf(want[1])).all()
    assert np.allclose(got[1], want[1], atol=1e-5)
    grads = jax.jit(jax.grad(loss(ours(mask, block), dout, dlse), (0, 1, 2)))(q, k, v)
    for a, b in zip(
        grads,
        jax.grad(loss(lambda *x: dense(mask, *x), dout, dlse), (0, 1, 2))(q, k, v),
        strict=True,
    ):
        assert np.abs(a - b).max() <= 1e-5 * max(1.0, np.abs(b).max())


@pytest.mark.fast
def test_rows_without_a_key_are_zero_and_send_no_gradient() -> None:
    q, k, v, dout, dlse = inputs()
    nobody = (jnp.zeros(N, jnp.int32), jnp.arange(M) + 1)
    f = jax.jit(lambda q, k, v: attention_lse(q, k, v, Mask("causal"), *nobody, block=8))
    out, lse = f(q, k, v)
    assert (out == 0).all() and np.isneginf(lse).all()
    for g in jax.vjp(f, q, k, v)[1]((dout, dlse)):
        assert (g == 0).all()


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
