"""Matrix products of rows with the weights of their group, and the feed-forward network of experts.

Rows of one group are contiguous and start at a multiple of `block`; the rest of its last block, and
all blocks past the last group, are zero rows. So a block of rows needs the weights of one group,
and no weight is ever copied per row or per block. Source of the layout: Gale et al. 2022
(MegaBlocks), section 4.

Legend: E groups (experts), R rows of the buffer, K and N contracted and free dim of a weight, D
width, F hidden width, B rows of a block."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdp.kernels_pallas import walks
from fdp.kernels_pallas.tiles import matmul

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """How the rows of a buffer belong to experts: `blocks` blocks of `block` rows.

    sizes_E int32: rows of each expert. Their blocks must fit: Σ ⌈size / block⌉ ≤ blocks; see
    `most_blocks`."""

    sizes_E: Array
    block: int = field(metadata={"static": True})
    blocks: int = field(metadata={"static": True})

    @property
    def rows(self) -> int:
        """R: rows of the buffer."""
        return self.block * self.blocks

    @property
    def blocks_E(self) -> Array:
        """Blocks of each expert: int32 [E]."""
        return lax.div(self.sizes_E + (self.block - 1), jnp.int32(self.block))

    @property
    def first_E(self) -> Array:
        """The first block of each expert: int32 [E]."""
        return jnp.cumsum(self.blocks_E, dtype=jnp.int32) - self.blocks_E

    @property
    def starts_E(self) -> Array:
        """The row where each expert starts: int32 [E]."""
        return self.first_E * self.block

    @property
    def expert_of_block(self) -> Array:
        """The expert of each block, E for blocks past the last group: int32 [blocks]."""
        ends_E = jnp.cumsum(self.blocks_E, dtype=jnp.int32)
        places = jnp.arange(self.blocks, dtype=jnp.int32)
        return jnp.searchsorted(ends_E, places, side="right").astype(jnp.int32)

    @property
    def holds_R(self) -> Array:
        """Whether a row belongs to an expert: bool [R]; the others are padding."""
        E = self.sizes_E.shape[0]
        expert_R = jnp.repeat(self.expert_of_block, self.block)
        safe_R = jnp.minimum(expert_R, E - 1)
        rank_R = jnp.arange(self.rows, dtype=jnp.int32) - self.starts_E[safe_R]
        return (expert_R < E) & (rank_R < self.sizes_E[safe_R])


def most_blocks(rows: int, experts: int, block: int) -> int:
    """The most blocks that `rows` rows fill, however they fall on the experts.

    n = min(rows, experts) experts have at least one row, which begins a block; every further block
    takes `block` rows more: n + ⌊(rows - n) / block⌋."""
    n = min(rows, experts)
    return max(1, n + (rows - n) // block)


def make_groups(sizes_E: Array, rows: int, block: int) -> Groups:
    """Groups of at most `rows` rows in all, in the smallest buffer that always suffices."""
    return Groups(sizes_E, block, most_blocks(rows, sizes_E.shape[0], block))


def choose_block(rows: int, experts: int, backend: str | None = None) -> int:
    """Rows of a block for about `rows` rows over `experts` experts; backend as in
    `grouped_matmul`."""
    if walks.choose_backend(backend) != "xla":
        return 128
    return 32


# Products
# -------------------------------------------------------------------------------------------------


def reference_matmul(x_RxK: Array, w_ExKxN: Array, groups: Groups) -> Array:
    """The oracle of `grouped_matmul`: every row with every weight, f32 [R, N].

    Padding in the blocks of an expert counts as rows of that expert; it is zero."""
    x, w = x_RxK.astype(jnp.float32), w_ExKxN.astype(jnp.float32)
    expert_R = jnp.repeat(groups.expert_of_block, groups.block)
    mine_RxE = expert_R[:, None] == jnp.arange(len(w))
    y_RxExN = jnp.einsum("rk,ekn->ren", x, w, precision="highest")
    return jnp.where(mine_RxE[..., None], y_RxExN, 0.0).sum(1)


def reference_ffn(x_RxD: Array, w_in_Ex2xDxF: Array, w_out_ExFxD: Array, groups: Groups) -> Array:
    """The oracle of `grouped_ffn`, f32 [R, D]."""
    gate, up = (reference_matmul(x_RxD, w_in_Ex2xDxF[:, i], groups) for i in (0, 1))
    return reference_matmul(jax.nn.silu(gate) * up, w_out_ExFxD, groups)


def grouped_matmul(
    x_RxK: Array, w_ExKxN: Array, groups: Groups, *, backend: str | None = None
) -> Array:
    """x[r] · w[expert of row r] → [R, N] like x; zero rows stay zero rows.

    Differentiable in x and w; accumulates in f32. A group of no row has a zero gradient. backend:
    "tpu", "gpu" or "xla", None by platform. Raises ValueError for shapes and dtypes that do not
    fit."""
    _check(x_RxK, (w_ExKxN,), groups)
    return _matmul(*walks.alike((x_RxK, w_ExKxN, groups)))


def grouped_ffn(
    x_RxD: Array,
    w_in_Ex2xDxF: Array,
    w_out_ExFxD: Array,
    groups: Groups,
    *,
    backend: str | None = None,
) -> Array:
    """(silu(x w_in[e, 0]) * (x w_in[e, 1])) w_out[e] with e the expert of each row → [R, D] like x.

    The backward pass keeps x and both products with w_in. Arguments and errors as in
    `grouped_matmul`."""
    _check(x_RxD, (w_in_Ex2xDxF[:, 0], w_out_ExFxD), groups)
    return _ffn(*walks.alike((x_RxD, w_in_Ex2xDxF, w_out_ExFxD, groups)))


def _check(x: Array, weights: tuple[Array, ...], groups: Groups) -> None:
    """Raise ValueError unless the chain of products fits together."""
    shapes = f"x {x.shape}, weights {', '.join(str(w.shape) for w in weights)}"
    E, K = groups.sizes_E.shape[0], x.shape[1]
    for w in weights:
        if w.shape[:2] != (E, K):
            raise ValueError(
                f"weights of {E} groups that take width {K} must be [{E}, {K}, ·]: {shapes}"
            )
        K = w.shape[2]
    if x.shape[0] != groups.rows:
        raise ValueError(
            f"x has {x.shape[0]} rows but groups have blocks · block = {groups.blocks} · "
            f"{groups.block} = {groups.rows}: lay the rows out as `Groups.starts_E` says"
        )
    dtypes = {str(a.dtype) for a in (x, *weights)}
    if len(dtypes) > 1 or x.dtype not in walks.DTYPES:
        raise ValueError(
            f"dtypes {', '.join(sorted(dtypes))} must be equal, float32 or bfloat16: cast them"
        )


@jax.custom_vjp
def _matmul(x: Array, w: Array, groups: Groups) -> Array:
    return matmul_blocks(x, w, groups, transposed=False)


def _matmul_forward(x, w, groups):
    return _matmul(x, w, groups), (x, w, groups)


def _matmul_backward(saved, dy):
    x, w, groups = saved
    dx, dw = matmul_gradients(x, w, dy, groups)
    return dx, dw, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def _ffn(x: Array, w_in: Array, w_out: Array, groups: Groups) -> Array:
    return ffn_blocks(x, w_in, w_out, groups, keep=False)[0]


def _ffn_forward(x, w_in, w_out, groups):
    y, kept = ffn_blocks(x, w_in, w_out, groups, keep=True)
    return y, (x, w_in, w_out, kept, groups)


def _ffn_backward(saved, dy):
    x, w_in, w_out, kept, groups = saved
    return *ffn_gradients(x, w_in, w_out, kept, dy, groups), None


_ffn.defvjp(_ffn_forward, _ffn_backward)


# Without a kernel: one block of rows at a time
# -------------------------------------------------------------------------------------------------


def _each_block(groups: Groups, load: Callable, step: Callable, done: Callable, state: Any) -> Any:
    """Fold over experts, and inside over the blocks of each.

    load(e, state) → (weights, inner) once per expert; step(row, weights, (state, inner)) per block
    that starts at `row`; done(e, state, inner) once more per expert."""
    first_E, blocks_E = groups.first_E, groups.blocks_E

    def expert(e, state):
        weights, inner = load(e)

        def block(i, carry):
            return step(i * groups.block, weights, *carry)

        end = jnp.minimum(first_E[e] + blocks_E[e], groups.blocks)
        state, inner = lax.fori_loop(first_E[e], end, block, (state, inner))
        return done(e, state, inner)

    return lax.fori_loop(0, groups.sizes_E.shape[0], expert, state)


def _zeros(shape: tuple[int, ...], dtype, like: Array) -> Array:
    """Zeros that vary over the mesh axes over which `like` varies."""
    return walks.alike((jnp.zeros(shape, dtype), like))[0]


def _at(x: Array, row: Array, groups: Groups) -> Array:
    return lax.dynamic_slice_in_dim(x, row, groups.block)


def _put(x: Array, row: Array, value: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(x, value.astype(x.dtype), row, 0)


def _of(w: Array, e: Array) -> Array:
    return lax.dynamic_index_in_dim(w, e, keepdims=False)


def _set(w: Array, e: Array, value: Array) -> Array:
    return lax.dynamic_update_index_in_dim(w, value.astype(w.dtype), e, 0)


def _keep(e: Array, state: Any, inner: Any) -> Any:
    return state


def matmul_blocks(x: Array, w: Array, groups: Groups, *, transposed: bool) -> Array:
    """x · w of each group, or x · wᵀ."""
    contract = (1, 1 if transposed else 0)

    def step(row, w_KxN, y, inner):
        return _put(y, row, matmul(_at(x, row, groups), w_KxN, contract)), inner

    start = _zeros((groups.rows, w.shape[1 if transposed else 2]), x.dtype, x)
    return _each_block(groups, lambda e: (_of(w, e), ()), step, _keep, start)


def matmul_gradients(x: Array, w: Array, dy: Array, groups: Groups) -> tuple[Array, Array]:
    """(dx like x, dw like w)."""
    zeros_KxN = _zeros(w.shape[1:], jnp.float32, x)

    def step(row, w_KxN, dx, dw_KxN):
        x_BxK, dy_BxN = _at(x, row, groups), _at(dy, row, groups)
        return _put(dx, row, matmul(dy_BxN, w_KxN, (1, 1))), dw_KxN + matmul(x_BxK, dy_BxN, (0, 0))

    def step_both(row, weight, state, inner):
        dx, inner = step(row, weight, state[0], inner)
        return (dx, state[1]), inner

    def done(e, state, dw_KxN):
        return state[0], _set(state[1], e, dw_KxN)

    start = _zeros(x.shape, x.dtype, x), _zeros(w.shape, w.dtype, x)
    return _each_block(groups, lambda e: (_of(w, e), zeros_KxN), step_both, done, start)


def ffn_blocks(x: Array, w_in: Array, w_out: Array, groups: Groups, *, keep: bool):
    """(y like x, the products with w_in [2, R, F] if `keep`)."""
    R, F = groups.rows, w_out.shape[1]

    def step(row, weights, state, inner):
        y, kept = state
        w_in_2xDxF, w_out_FxD = weights
        x_BxD = _at(x, row, groups)
        gate, up = (matmul(x_BxD, w_in_2xDxF[i], (1, 0)) for i in (0, 1))
        if keep:
            pair = jnp.stack([gate, up]).astype(kept.dtype)
            kept = lax.dynamic_update_slice_in_dim(kept, pair, row, 1)
        h_BxF = (jax.nn.silu(gate) * up).astype(x.dtype)
        return (_put(y, row, matmul(h_BxF, w_out_FxD, (1, 0))), kept), inner

    start = _zeros(x.shape, x.dtype, x), _zeros((2, R if keep else 0, F), x.dtype, x)
    return _each_block(groups, lambda e: ((_of(w_in, e), _of(w_out, e)), ()), step, _keep, start)


def ffn_gradients(x, w_in, w_out, kept_2xRxF, dy, groups: Groups) -> tuple[Array, Array, Array]:
    """(dx, dw_in, dw_out) like x, w_in and w_out."""
    zeros = _zeros(w_in.shape[1:], jnp.float32, x), _zeros(w_out.shape[1:], jnp.float32, x)

    def step(row, weights, state, inner):
        (w_in_2xDxF, w_out_FxD), (dw_in, dw_out) = weights, inner
        x_BxD, dy_BxD = _at(x, row, groups), _at(dy, row, groups)
        pair = lax.dynamic_slice_in_dim(kept_2xRxF, row, groups.block, 1).astype(jnp.float32)
        dh_BxF = matmul(dy_BxD, w_out_FxD, (1, 1))
        grads = swiglu_gradients(pair[0], pair[1], dh_BxF)
        h_BxF, dgate, dup = (z.astype(x.dtype) for z in grads)
        dw_in += jnp.stack([matmul(x_BxD, d, (0, 0)) for d in (dgate, dup)])
        dw_out += matmul(h_BxF, dy_BxD, (0, 0))
        dx = matmul(dgate, w_in_2xDxF[0], (1, 1)) + matmul(dup, w_in_2xDxF[1], (1, 1))
        return (_put(state[0], row, dx), *state[1:]), (dw_in, dw_out)

    def done(e, state, inner):
        return state[0], *(_set(w, e, d) for w, d in zip(state[1:], inner, strict=True))

    start = tuple(_zeros(z.shape, z.dtype, x) for z in (x, w_in, w_out))
    return _each_block(groups, lambda e: ((_of(w_in, e), _of(w_out, e)), zeros), step, done, start)


def swiglu_gradients(gate: Array, up: Array, dh: Array) -> tuple[Array, Array, Array]:
    """(h, dgate, dup) of h = silu(gate) · up."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, dh * up * (sigmoid + silu * (1.0 - sigmoid)), dh * silu
