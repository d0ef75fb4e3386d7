"""Permute and unpermute against one-hot matrices, their gradients, and no scatter of rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from fdp.kernels_pallas import permute as rows
from fdp.kernels_pallas.permute import permute, unpermute

pytestmark = pytest.mark.fast
P = PartitionSpec
T, K, R, D = 9, 3, 40, 5


def plan(seed=0):
    """source [R] and slots [T, K], inverse to each other, with a fifth of the choices dropped."""
    rng = np.random.default_rng(seed)
    slots = rng.permutation(R)[: T * K].reshape(T, K)
    slots = np.where(rng.random((T, K)) < 0.2, -1, slots)
    source = np.full(R, -1)
    for t, k in np.ndindex(T, K):
        if slots[t, k] >= 0:
            source[slots[t, k]] = t
    return source.astype(np.int32), slots.astype(np.int32)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype(np.float32) for s in ((T, D), (R, D), (T, K), (T, D))]


def there(x, source, slots):
    return permute(x, source, slots)


def there_oracle(x, source, slots):
    return jax.nn.one_hot(source, T) @ x


def back(y, gates, slots, source):
    return unpermute(y, gates, slots, source)


def back_oracle(y, gates, slots, source):
    return jnp.einsum("tk,tkr,rd->td", gates, jax.nn.one_hot(slots, R), y)


@partial(jax.jit, static_argnums=0)
def with_gradients(f, floats, cotangent, *indices):
    out, pull = jax.vjp(lambda *z: f(*z, *indices), *floats)
    return out, *pull(cotangent)


@pytest.mark.parametrize("direction", ["permute", "unpermute"])
def test_values_and_gradients(direction):
    (x, y, gates, dout), (source, slots) = inputs(), plan()
    if direction == "permute":
        case, f, oracle = ((x,), y, source, slots), there, there_oracle
    else:
        case, f, oracle = ((y, gates), dout, slots, source), back, back_oracle
    got, want = (with_gradients(g, *case) for g in (f, oracle))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("direction", ["permute", "unpermute"])
def test_parts_of_the_tokens_as_a_tpu_takes_them(direction, monkeypatch):
    """Nine tokens in parts of four."""
    (x, y, gates, dout), (source, slots) = inputs(), plan()
    case = ((x,), y, source, slots) if direction == "permute" else ((y, gates), dout, slots, source)
    f = there if direction == "permute" else back
    want = with_gradients(f, *case)
    monkeypatch.setattr(rows, "choose_backend", lambda _: "tpu")
    monkeypatch.setattr(rows, "PART", 4)
    got = with_gradients.__wrapped__(f, *jax.tree.map(jnp.asarray, case))  # traced anew
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_there_and_back_with_equal_gates_is_the_identity():
    source, slots = plan()
    x = inputs()[0]
    kept = (slots >= 0).sum(1, keepdims=True)
    gates = np.broadcast_to(1 / np.maximum(kept, 1), slots.shape).astype(np.float32)
    both = jax.jit(lambda x: unpermute(permute(x, source, slots), gates, slots, source))
    np.testing.assert_allclose(both(x), np.where(kept > 0, x, 0), rtol=1e-6)


def test_bfloat16_sums_in_float32_and_gates_keep_their_type():
    _, y, gates, dout = inputs()
    source, slots = plan()
    floats = y.astype(jnp.bfloat16), gates
    got = with_gradients(back, floats, dout.astype(jnp.bfloat16), slots, source)
    want = with_gradients(back_oracle, (floats[0].astype(jnp.float32), gates), dout, slots, source)
    assert [z.dtype for z in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.05)


def test_inside_a_checked_shard_map_without_a_scatter():
    """Every device its own tokens; indices shared by all."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "ep"), (AxisType.Auto,) * 2)
    source, slots = plan()
    x, _, gates, dout = inputs()
    both = P(("dp", "ep"))

    def local(x, gates, source, slots):
        return unpermute(jnp.sin(permute(x, source, slots)), gates, slots, source)

    f = jax.shard_map(local, mesh=mesh, in_specs=(both, both, P(), P()), out_specs=both)
    x, gates, dout = (np.tile(z, (4, 1)) for z in (x, gates, dout))
    got = with_gradients(f, (x, gates), dout, source, slots)

    def oracle(x, gates, source, slots):
        def one(x, gates):
            rows = jnp.sin(there_oracle(x, source, slots))
            return back_oracle(rows, gates, slots, source)

        whole = (z.reshape(4, T, -1) for z in (x, gates))
        return jax.vmap(one)(*whole).reshape(-1, D)

    want = with_gradients(oracle, (x, gates), dout, source, slots)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    program = jax.make_jaxpr(partial(with_gradients, f))((x, gates), dout, source, slots)
    assert "scatter" not in str(program)


def test_bad_shapes_are_named():
    x, y, gates, _ = inputs()
    source, slots = plan()
    with pytest.raises(ValueError, match=r"slots \(9, 3\) of 8 tokens must be"):
        permute(x[1:], source, slots)
    with pytest.raises(ValueError, match=r"y \(39, 5\), gates \(9, 3\)"):
        unpermute(y[1:], gates, slots, source)
