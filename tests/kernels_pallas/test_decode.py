"""Split-KV decoding against the oracle: lengths, chunks, grouped heads, rubbish past the length."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fdp.kernels_pallas.decode import decode_attention
from fdp.kernels_pallas.flash import reference, seen_by
from fdp.kernels_pallas.masks import Mask
from tests.kernels_pallas.compiled import PLATFORMS, compiled_text, kernels
from tests.kernels_pallas.oracle import inputs

fast = pytest.mark.fast
P = PartitionSpec
decode = jax.jit(decode_attention, static_argnames=("window", "chunk", "backend", "interpret"))


@jax.jit
def oracle(q, k, v, seen):
    return reference(q, k, v, seen)


@pytest.mark.parametrize("backend", ["xla", "tpu", "gpu"])
@pytest.mark.parametrize(("T", "window"), [(1, 0), (5, 0), (5, 40)])
def test_values(T, window, backend):
    """Empty, shorter than T, odd and full caches; chunks of 128 or 64 keys."""
    B, M = 4, 300
    q, k, v = inputs(B, T, M, H=6, K=2, C=24)[:3]
    length = jnp.array([0, 3, 211, M])
    positions = length[:, None] + jnp.arange(-T, 0), jnp.broadcast_to(jnp.arange(M), (B, M))
    want, want_lse = oracle(
        q, k, v, seen_by(Mask("causal", window=window), positions[:1], positions[1:])
    )
    out, lse = decode(
        q, k, v, length, window=window, chunk=64, backend=backend, interpret=backend != "xla"
    )
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    assert not out[0].any() and (lse[0] == -np.inf).all()


def test_bfloat16_and_large_values_past_the_length():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(2, 4, 128, H=2, K=1)[:3])
    length = jnp.array([50, 97])
    beyond = (jnp.arange(128) >= length[:, None])[:, :, None, None]
    run = partial(decode, q, backend="gpu", interpret=True, chunk=32, length_B=length)
    clean, soiled = run(k, v), run(jnp.where(beyond, 1e30, k), jnp.where(beyond, 1e30, v))
    np.testing.assert_array_equal(clean[0], soiled[0])
    np.testing.assert_array_equal(clean[1], soiled[1])
    assert clean[0].dtype == jnp.bfloat16 and clean[1].dtype == jnp.float32


@fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q_BxTxHxC": jnp.zeros((2, 17, 4, 16))},
            "T = 17 queries exceed the 16 of a decode step: use flash_attention",
        ),
        (
            {"length_B": jnp.zeros(3, int)},
            r"length_B is int32 \(3,\) but must be int \[B\] with B = 2",
        ),
        ({"length_B": jnp.zeros(2)}, "length_B is float32"),
        ({"chunk": 0}, "chunk = 0 must be at least 1"),
        ({"window": -1}, "window = -1"),
        ({"backend": "cuda"}, "backend = 'cuda' is unknown"),
    ],
)
def test_bad_input_says_what_to_change(change, message):
    k = jnp.zeros((2, 32, 2, 16))
    arguments = {"q_BxTxHxC": jnp.zeros((2, 1, 4, 16)), "length_B": jnp.full(2, 9)} | change
    with pytest.raises(ValueError, match=message):
        decode_attention(k_BxMxKxC=k, v_BxMxKxC=k, **arguments)


@pytest.mark.aot
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("C", [64, 128])
def test_compiles(platform, C):
    """A cache of 128K keys, five queries, eight heads over two."""
    avals = [((2, n, h, C), jnp.bfloat16, P("dp")) for n, h in ((5, 8), (2**17, 2), (2**17, 2))]
    avals.append(((2,), jnp.int32, P("dp")))
    assert kernels(compiled_text(platform, decode_attention, *avals, gradient=False)) == 1
