"""Grouped products in XLA, for a CPU: a loop over experts, and in it one over the blocks of each.

The weights of an expert are read once, its gradients are summed in one place, and blocks that hold
no row cost nothing. Legend as in grouped_triton.py; B rows of a block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from fdp.kernels_pallas.blockwise import AT_MOST
from fdp.kernels_pallas.tiles import matmul
from fdp.kernels_pallas.walks import alike

if TYPE_CHECKING:
    from fdp.kernels_pallas.grouped import Groups

Array = jax.Array


def swiglu(gate: Array, up: Array) -> Array:
    """h = silu(gate) · up, f32."""
    return gate * jax.nn.sigmoid(gate) * up


def swiglu_gradients(gate: Array, up: Array, dh: Array) -> tuple[Array, Array, Array]:
    """(h, dgate, dup) of `swiglu`, f32."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, dh * up * (sigmoid + silu * (1.0 - sigmoid)), dh * silu


@dataclass(frozen=True)
class Loop:
    """Products, one block after the other."""

    def product(
        self, x_PxRxK: Array, w_ExPxKxN: Array, groups: "Groups", transposed: bool
    ) -> Array:
        """Σ_p x[p] · w[e, p], or w[e, p]ᵀ of w [E, P, N, K], with e the expert of the row: [R, N]
        like x, zeros past the last group."""
        P, R, _ = x_PxRxK.shape
        N = w_ExPxKxN.shape[2 if transposed else 3]

        def step(row, weights, y):
            x = (_rows(x_PxRxK, p, row, groups) for p in range(P))
            parts = [matmul(a, w, (1, int(transposed))) for a, w in zip(x, weights, strict=True)]
            return _put(y, (row, 0), sum(parts[1:], parts[0]))

        y = _zeros((R, N), x_PxRxK.dtype, x_PxRxK)
        return _each(groups, y, lambda e: [w_ExPxKxN[e, p] for p in range(P)], step)

    def hidden(
        self, x_RxD: Array, w_in_Ex2xDxF: Array, groups: "Groups", keep: bool
    ) -> list[Array]:
        """[silu(gate) · up [R, F]] and, if `keep`, (gate, up) [2, R, F]: x w_in[e, 0] and x w_in[e,
        1]."""
        shape = x_RxD.shape[0], w_in_Ex2xDxF.shape[3]

        def step(row, weights, state):
            h, *kept = state
            gate, up = (matmul(_rows(x_RxD, None, row, groups), w, (1, 0)) for w in weights)
            kept = [_put_both(k, row, (gate, up)) for k in kept]
            return [_put(h, (row, 0), swiglu(gate, up)), *kept]

        state = [_zeros(s, x_RxD.dtype, x_RxD) for s in (shape, (2, *shape))[: 1 + keep]]
        return _each(groups, state, lambda e: [w_in_Ex2xDxF[e, p] for p in (0, 1)], step)

    def hidden_gradients(
        self, dy_RxD: Array, w_out_ExFxD: Array, kept_2xRxF: Array, groups: "Groups"
    ) -> tuple[Array, Array]:
        """((dgate, dup) [2, R, F], silu(gate) · up [R, F])."""

        def step(row, w_FxD, state):
            grads, h = state
            dh = matmul(_rows(dy_RxD, None, row, groups), w_FxD, (1, 1))
            gate, up = (_rows(kept_2xRxF, p, row, groups).astype(jnp.float32) for p in (0, 1))
            h_BxF, *both = swiglu_gradients(gate, up, dh)
            return _put_both(grads, row, both), _put(h, (row, 0), h_BxF)

        shapes = kept_2xRxF.shape, kept_2xRxF.shape[1:]
        state = tuple(_zeros(s, dy_RxD.dtype, dy_RxD) for s in shapes)
        return _each(groups, state, lambda e: w_out_ExFxD[e], step)

    def weight_gradients(
        self, x_RxK: Array, dy_PxRxN: Array, groups: "Groups", dtype: Any
    ) -> Array:
        """x[rows of e]ᵀ · dy[p, rows of e]: [E, P, K, N] of `dtype`."""
        (P, _, N), K, E = dy_PxRxN.shape, x_RxK.shape[1], groups.sizes_E.shape[0]
        zeros = [_zeros((K, N), jnp.float32, x_RxK)] * P

        def expert(e, blocks, dw):
            def block(row, sums):
                x_BxK = _rows(x_RxK, None, row, groups)
                dy = (_rows(dy_PxRxN, p, row, groups) for p in range(P))
                return [s + matmul(x_BxK, d, (0, 0)) for s, d in zip(sums, dy, strict=True)]

            for p, total in enumerate(blocks(block, zeros)):
                dw = _put(dw, (e, p, 0, 0), total[None, None])
            return dw

        return _fold(groups, expert, _zeros((E, P, K, N), dtype, x_RxK))


def _fold(groups: "Groups", expert: Callable, state: Any) -> Any:
    """Fold expert(e, blocks, state) over the experts up to the last one that has a row; blocks(f,
    inner) folds f(row, inner) over its blocks, which start at `row`.

    Counts of the program take both loops for one over all blocks, of which the inner is one step.
    """
    start_E = groups.first_E
    end_E = jnp.minimum(start_E + groups.blocks_E, groups.blocks)
    ids_E = jnp.arange(len(start_E), dtype=jnp.int32)
    last = jnp.where(groups.sizes_E > 0, ids_E + 1, 0).max()

    def body(e, state):
        def blocks(f, inner):
            with jax.named_scope(f"{AT_MOST}_1"):
                step = lambda i, inner: f(i * groups.block, inner)
                return lax.fori_loop(start_E[e], end_E[e], step, inner)

        return expert(e, blocks, state)

    with jax.named_scope(f"{AT_MOST}_{groups.blocks}"):
        return lax.fori_loop(0, last, body, state)


def _each(groups: "Groups", state: Any, load: Callable, step: Callable) -> Any:
    """Fold step(row, load(e), state) over the blocks of every expert e."""

    def expert(e, blocks, state):
        weights = load(e)
        return blocks(lambda row, state: step(row, weights, state), state)

    return _fold(groups, expert, state)


def _zeros(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """Zeros that vary over the mesh axes over which `like` varies."""
    return alike((jnp.zeros(shape, dtype), like))[0]


def _rows(x: Array, part: int | None, row: Array, groups: "Groups") -> Array:
    """The block of rows of x, or of x[part], that starts at `row`."""
    if part is None:
        return lax.dynamic_slice_in_dim(x, row, groups.block)
    return lax.dynamic_slice(x, (part, row, 0), (1, groups.block, x.shape[2]))[0]


def _put(x: Array, at: tuple, value: Array) -> Array:
    return lax.dynamic_update_slice(x, value.astype(x.dtype), at)


def _put_both(x_2xRxF: Array, row: Array, values: Any) -> Array:
    """Two updates: a stack of both values would be copied once more."""
    for p, value in enumerate(values):
        x_2xRxF = _put(x_2xRxF, (p, row, 0), value[None])
    return x_2xRxF
