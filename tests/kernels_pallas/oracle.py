"""Inputs, gradients and tolerances that the tests of all attention kernels share."""

import jax
import jax.numpy as jnp
import numpy as np

from fdp.kernels_pallas.block_sparse import BlockLists


def inputs(B=2, N=37, M=43, H=4, K=2, C=16, dtype=jnp.float32, seed=0):
    """q, k, v and the cotangents of out and lse."""
    shapes = ((B, N, H, C), (B, M, K, C), (B, M, K, C), (B, N, H, C), (B, H, N))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]


def with_gradients(f, q, k, v, do, dlse):
    """(out, lse, dq, dk, dv) of f(q, k, v) → (out, lse), in f32."""

    def both(q, k, v):
        out, lse = f(q, k, v)
        # lse = -inf has no gradient: a merge that knows it would not ask for one.
        total = (out.astype(jnp.float32) * do).sum() + jnp.where(
            lse == -jnp.inf, 0.0, lse * dlse
        ).sum()
        return total, (out, lse)

    (_, values), grads = jax.value_and_grad(both, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return [x.astype(jnp.float32) for x in (*values, *grads)]


def assert_close(got, want, forward=1e-5, backward=1e-4):
    """Forward: absolute; gradients: relative to the largest entry. -inf must meet -inf, and NaN is
    nowhere.
    """
    tolerances = {"out": forward, "lse": forward, "dq": backward, "dk": backward, "dv": backward}
    for (name, tolerance), a, b in zip(tolerances.items(), got, want, strict=True):
        assert not np.isnan(a).any(), name
        scale = 1.0 if name in ("out", "lse") else max(np.abs(b).max(), 1e-6)
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, rtol=0, err_msg=name)


def selected(lists: BlockLists, block_q: int, block_k: int, N: int, M: int) -> jax.Array:
    """The lists as a mask over tokens, bool [b, k, N, M], as `flash.reference` takes it."""
    J = lists.q_ids.shape[2]
    used = jnp.arange(lists.k_ids.shape[3]) < lists.k_counts[..., None]
    hit = (lists.k_ids[..., None] == jnp.arange(J)) & used[..., None]
    return hit.any(3).repeat(block_q, 2).repeat(block_k, 3)[:, :, :N, :M]
