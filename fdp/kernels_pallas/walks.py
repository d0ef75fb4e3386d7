"""Differentiable attention over walks of tiles, shared by the flash and the block-sparse kernels;
and the argument checks and choice of platform of all attention.

Legend as in tiles.py; callers pass q_BxNxHxC, k_BxMxKxC and v_BxMxKxC."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdp.kernels_pallas import tpu, triton
from fdp.kernels_pallas.tiles import Spec, Walk
from fdp.parallel.masks import Mask

Array = jax.Array
BACKENDS = ("xla", "tpu", "gpu")
DTYPES = (jnp.float32, jnp.bfloat16)
EVERYTHING = Mask()


def platform() -> str:
    """Where the program will run (cpu, tpu, gpu): the platform of the bound mesh, absent or not,
    else that of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def choose_backend(backend: str | None) -> str:
    """`backend`, or the default of the platform: kernels on "tpu" and "gpu", "xla" elsewhere.
    Raises ValueError for an unknown backend."""
    if backend is None:
        return {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}.get(platform(), "xla")
    if backend not in BACKENDS:
        raise ValueError(
            f"backend = {backend!r} is unknown: {', '.join(BACKENDS)} or None (by platform)"
        )
    return backend


def check_arrays(q_BxNxHxC: Array, k_BxMxKxC: Array, v_BxMxKxC: Array) -> None:
    """Raise ValueError unless shapes and dtypes fit together."""
    q, k, v = q_BxNxHxC, k_BxMxKxC, v_BxMxKxC
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(
            f"attention takes q [B, N, H, C] and k, v [B, M, K, C], not {shapes}: make B and C "
            "agree"
        )
    if not all(q.shape) or not all(k.shape):
        raise ValueError(f"attention over an empty dim: {shapes}; every size must be at least 1")
    H, K = q.shape[2], k.shape[2]
    if H % K:
        raise ValueError(
            f"H = {H} query heads are not a multiple of K = {K} key heads: H mod K = {H % K}, "
            "choose K | H"
        )
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in DTYPES:
        raise ValueError(
            f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype} must be equal, float32 or bfloat16: "
            "cast them"
        )


def check_results(q_BxNxHxC: Array, out: Array, lse: Array, dout: Array) -> None:
    """Raise ValueError unless out, lse and dout are those of the queries."""
    B, N, H, _ = q_BxNxHxC.shape
    if not (out.shape == dout.shape == q_BxNxHxC.shape and lse.shape == (B, H, N)):
        raise ValueError(
            f"the gradients of q {q_BxNxHxC.shape} take out and dout of that shape and lse "
            f"{(B, H, N)}, not out {out.shape}, dout {dout.shape}, lse {lse.shape}"
        )


def gather_tags(
    mask: Mask, name: str, shape: tuple[int, ...], position, segment
) -> tuple[Any, ...]:
    """(position, then segment for a packed mask), each int [length] or [B, length] with (B, length)
    = `shape`.

    position None means 0 … length - 1, in NumPy. Raises ValueError for other shapes, for missing
    segments and for segments that the mask does not read."""
    B, length = shape
    if mask.packed != (segment is not None):
        advice = (
            "pass the segment ids of queries and keys"
            if mask.packed
            else "use Mask(packed=True) or drop them"
        )
        raise ValueError(
            f"mask.packed = {mask.packed} but {name}_segment is {type(segment).__name__}: {advice}"
        )
    tags = (np.arange(length, dtype=np.int32) if position is None else position,) + (
        (segment,) if mask.packed else ()
    )
    for tag, what in zip(tags, ("position", "segment"), strict=False):
        if tag.shape not in ((length,), (B, length), (1, length)):
            raise ValueError(
                f"{name}_{what} has shape {tag.shape} but {name} has B = {B}, length = {length}: "
                f"pass [{length}] or [{B}, {length}]"
            )
        if not jnp.issubdtype(tag.dtype, jnp.integer):
            raise ValueError(
                f"{name}_{what} has dtype {tag.dtype}: token indices are integers, cast to int32"
            )
    return tags


def alike(tree):
    """Every leaf marked as varying over each mesh axis over which any of them varies, because a
    kernel takes one type."""
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))

    def vary(x: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(x).mat.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def _kernels(spec: Spec):
    return tpu if spec.backend == "tpu" else triton


def attend(
    spec: Spec, q, k, v, q_tags, k_tags, row_walk: Walk, key_walk: Walk
) -> tuple[Array, Array]:
    """Softmax attention of rows over the keys on their walk, differentiable in q, k and v through
    out and lse.

    q [Z, I, X, C], k and v [·, J, Y, W], tags [S, tiles, A, X or Y]; row_walk over key tiles,
    key_walk its transpose → out like q, lse f32 [Z, I, 1, X]."""
    return _attend(spec, *alike((q, k, v, q_tags, k_tags, row_walk, key_walk)))


def gradients(
    spec: Spec, q, k, v, q_tags, k_tags, row_walk: Walk, key_walk: Walk, o, lse, do
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv): the contributions of these keys, given the out and lse of each row over ALL
    keys; f32 where `spec.partial`. Shapes as in `attend`."""
    operands, rest = (q, k, v, q_tags, k_tags), (row_walk, key_walk, o, lse, do)
    operands, (row_walk, key_walk, o, lse, do) = alike((operands, rest))
    return _gradients(spec, operands, row_walk, key_walk, o, lse, do, 0.0)


def _gradients(spec, operands, row_walk, key_walk, o, lse, do, dlse):
    delta, lse = row_terms(o, lse, do, dlse)
    do = do.astype(operands[0].dtype)
    dq = _kernels(spec).query_gradient(spec, *operands, row_walk, do, lse, delta)
    dk, dv = _kernels(spec).key_gradients(spec, *operands, key_walk, do, lse, delta)
    return dq, dk, dv


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, q, k, v, q_tags, k_tags, row_walk, key_walk):
    return _kernels(spec).forward(spec, q, k, v, q_tags, k_tags, row_walk)


def _attend_forward(spec, q, k, v, q_tags, k_tags, row_walk, key_walk):
    o, lse = _attend(spec, q, k, v, q_tags, k_tags, row_walk, key_walk)
    return (o, lse), (q, k, v, q_tags, k_tags, row_walk, key_walk, o, lse)


def _attend_backward(spec, saved, cotangents):
    *operands, row_walk, key_walk, o, lse = saved
    grads = _gradients(spec, operands, row_walk, key_walk, o, lse, *cotangents)
    typed = (g.astype(x.dtype) for g, x in zip(grads, operands[:3], strict=True))
    return *typed, None, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def row_terms(o, lse, do, dlse) -> tuple[Array, Array]:
    """What the gradient kernels need of each row: (delta = Σ dO·O - dlse, lse), f32 [Z, I, 1, X].

    A row that saw no key gets lse = +inf, hence P = 0, and delta = 0 for any cotangent, so no NaN
    arises."""
    empty = lse == -jnp.inf
    delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1)[:, :, None] - dlse
    return jnp.where(empty, 0.0, delta), jnp.where(empty, jnp.inf, lse)
