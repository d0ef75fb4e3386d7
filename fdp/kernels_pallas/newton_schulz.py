"""Newton-Schulz: batches of matrices made orthogonal, about. Source: Jordan et al. 2024 (Muon).

- a TPU: one kernel a direction (Mosaic) holds a matrix in VMEM for all steps: the matrix is read
  and its result written, nothing else. The backward pass keeps the matrix and takes the steps
  again there;
- elsewhere, and for matrices that are too large for VMEM: XLA, which keeps what each step needs.

Compiled for a v5p: forward and backward of a matrix of 384 x 768 move 5.9 MB of HBM instead of
88, and those of a LaCT layer with 4 heads and chunks of 2048 tokens 14.8 GB instead of 22.2, with
temporaries of 3.29 GB instead of 3.87; XLA's steps taken again come to 20.4 GB and 3.37. No time
is measured. There is no kernel for a GPU: such a matrix is 1.1 MiB, the shared memory of an H100's
multiprocessor 0.2.

Legend: M rows and N columns of a matrix, few and many the smaller and the larger of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fdp.kernels_pallas.tiles import result
from fdp.kernels_pallas.walks import alike, choose_backend

Array = jax.Array

# (a, b, c) of the quintic a X + b X Xᵀ X + c (X Xᵀ)² X, step after step, as in the released code of
# LaCT: the singular values of X go to about 1.
QUINTICS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
VMEM = 48 << 20  # bytes that a kernel may take; chips from v5e on have more than twice as many


def reference(x: Array) -> Array:
    """The oracle of `orthogonal`."""
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    # The square root has no gradient at 0.
    square = jnp.sum(x * x, (-2, -1), keepdims=True)
    x = x * lax.rsqrt(square + 1e-14)
    for a, b, c in QUINTICS:
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def orthogonal(x: Array, *, backend: str | None = None, interpret: Any = False) -> Array:
    """Five Newton-Schulz steps on matrices [..., M, N]: U Vᵀ of their singular vectors, about. A
    zero matrix stays zero. Differentiable.

    backend: "tpu", "gpu" or "xla", None by platform. interpret: as `pl.pallas_call` takes it, for
    tests. Raises ValueError for an unknown backend."""
    M, N = x.shape[-2:]
    if x.dtype != jnp.float32 or not in_vmem(M, N, backend):
        return reference(x)
    return _orthogonal(interpret, x.reshape(-1, M, N)).reshape(x.shape)


def in_vmem(M: int, N: int, backend: str | None = None) -> bool:
    """Whether the kernels take float32 matrices of this size."""
    few, many = sorted((M, N))
    # The backward pass holds the matrix of a step and three operands twice, and what a step makes.
    held = 4 * (14 * few * many + 12 * few * few)
    return choose_backend(backend) == "tpu" and held <= VMEM


def kept(M: int, N: int) -> int:
    """Numbers that `orthogonal` keeps of a matrix for its backward pass."""
    few = min(M, N)
    if in_vmem(M, N):
        return M * N
    return 11 * M * N + 15 * few * few + 2


def flops(M: int, N: int, backend: str | None = None) -> tuple[int, int]:
    """FLOPs of the products of a matrix: (forward, those of the backward pass beyond twice as
    many)."""
    few, many = sorted((M, N))
    forward = len(QUINTICS) * (4 * few * few * many + 2 * few**3)
    return forward, len(QUINTICS) * 2 * few * few * many * in_vmem(M, N, backend)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _orthogonal(interpret: Any, x: Array) -> Array:
    return _call(_forward_kernel, interpret, x)


def _orthogonal_forward(interpret, x):
    return _orthogonal(interpret, x), x


def _orthogonal_backward(interpret, x, dy):
    return (_call(_backward_kernel, interpret, *alike((x, dy))),)


_orthogonal.defvjp(_orthogonal_forward, _orthogonal_backward)


def _forward_kernel(x_ref, y_ref):
    y_ref[0] = _scaled(x_ref[0])

    def step(i, _):
        x = y_ref[0]
        _, poly = _polynomial(x, i)
        y_ref[0] = _coefficient(i, 0) * x + _times(poly, x)

    lax.fori_loop(0, len(QUINTICS), step, None)


def _backward_kernel(x_ref, dy_ref, dx_ref, iterate):
    """All steps keep the singular vectors, so their Jacobians have the same eigenvectors and may be
    applied in any order: in that of the steps, no iterate is kept."""
    iterate[...], dx_ref[0] = _scaled(x_ref[0]), dy_ref[0]

    def step(i, _):
        x, g = iterate[...], dx_ref[0]
        a, b, c = (_coefficient(i, j) for j in range(3))
        gram, poly = _polynomial(x, i)
        # Squares and their gradients are symmetric, so that one product does for two.
        d_poly = _square(g, x)
        d_poly = d_poly + d_poly.T
        through = _product(d_poly, gram, 1, 0)
        dx_ref[0] = a * g + _times(poly, g) + _times(b * d_poly + c * (through + through.T), x)
        iterate[...] = a * x + _times(poly, x)

    lax.fori_loop(0, len(QUINTICS), step, None)
    (dx_ref[0],) = jax.vjp(_scaled, x_ref[0])[1](dx_ref[0])


def _scaled(x: Array) -> Array:
    square = jnp.sum(jnp.sum(x * x, 1, keepdims=True), 0, keepdims=True)
    return x * lax.rsqrt(square + 1e-14)


def _coefficient(i: Array, j: int) -> Array:
    """QUINTICS[i][j]; kernels hold no arrays of constants."""
    value = jnp.float32(QUINTICS[-1][j])
    for n, step in enumerate(QUINTICS[:-1]):
        value = jnp.where(i == n, jnp.float32(step[j]), value)
    return value


def _polynomial(x: Array, i: Array) -> tuple[Array, Array]:
    """(X Xᵀ, b X Xᵀ + c (X Xᵀ)²) of step i. Matrices are never transposed: Xᵀ X takes the place of
    X Xᵀ where it is the smaller one."""
    gram = _square(x, x)
    return gram, _coefficient(i, 1) * gram + _coefficient(i, 2) * _product(gram, gram, 1, 0)


def _square(a: Array, b: Array) -> Array:
    """A Bᵀ, Aᵀ B of tall matrices."""
    along = int(a.shape[0] <= a.shape[1])
    return _product(a, b, along, along)


def _times(square: Array, x: Array) -> Array:
    """S X, X S of a tall matrix; S is symmetric."""
    wide = x.shape[0] <= x.shape[1]
    return _product(square, x, 1, 0) if wide else _product(x, square, 1, 0)


def _product(a: Array, b: Array, i: int, j: int) -> Array:
    """a · b over dim i of a and j of b, in the precision that XLA would choose, too."""
    return lax.dot_general(a, b, (((i,), (j,)), ((), ())))


def _call(kernel: Callable, interpret: Any, *operands: Array) -> Array:
    """One program a matrix. A backward pass has two operands."""
    (_, M, N), backward = operands[0].shape, len(operands) > 1
    one = pl.BlockSpec((1, M, N), lambda z: (z, 0, 0))
    return pl.pallas_call(
        kernel,
        grid=operands[0].shape[:1],
        in_specs=[one] * len(operands),
        out_specs=one,
        out_shape=result(operands[0].shape, jnp.float32, operands[0]),
        scratch_shapes=[pltpu.VMEM((M, N), jnp.float32)] * backward,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM
        ),
        cost_estimate=_cost(*operands),
        interpret=interpret,
    )(*operands)


def _cost(*operands: Array) -> pl.CostEstimate:
    Z, M, N = operands[0].shape
    forward, again = flops(M, N, "tpu")
    work = forward if len(operands) == 1 else 2 * forward + again
    moved = 4 * Z * M * N * (len(operands) + 1)
    return pl.CostEstimate(flops=Z * work, transcendentals=Z, bytes_accessed=moved)
