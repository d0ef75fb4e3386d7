"""Grouped products as Triton kernels: one program per tile of a result, which loops over the
contracted dim.

Dims that are no multiple of a tile are masked, in loads as in stores. Operands have a part dim, so
that the two halves of a gated network are one product. Suffixes: E groups, P parts, R rows, K
contracted and N free dim of a weight, D width, F hidden width; tiles are X rows x Y columns, Z
deep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from fdp.kernels_pallas.grouped_xla import swiglu, swiglu_gradients
from fdp.kernels_pallas.tiles import ceil_div, matmul, power_of_two, result, split_index

if TYPE_CHECKING:
    from fdp.kernels_pallas.grouped import Groups

Array = jax.Array
BAND = 8  # row tiles whose programs run side by side, so that they share weights in the L2 cache


class Sizes(NamedTuple):
    """Rows, columns and depth of a tile."""

    X: int
    Y: int
    Z: int


def tile_sizes(rows: int, columns: int, depth: int, dtype: Any) -> Sizes:
    """Powers of two that leave the stages of loads in an H100's shared memory and two sums of a
    tile in its registers. rows: of a block. Of ten tiles in bfloat16 measured on an H200, the best
    or within 4 % of it for every kernel and expert layer of `benchmarks.moe`."""
    X, Y, Z = (64, 64, 32) if dtype == jnp.float32 else (128, 128, 64)
    return Sizes(min(X, rows), min(Y, power_of_two(columns, 16)), min(Z, power_of_two(depth, 16)))


# Tiles
# -------------------------------------------------------------------------------------------------


def _inside(ref, starts: tuple, shape: tuple[int, ...]) -> Array | None:
    """Which entries of a tile of the last two dims of ref exist: bool `shape`; None = all."""
    inside = None
    for dim, (start, size) in enumerate(zip(starts, shape, strict=True)):
        length = ref.shape[len(ref.shape) - 2 + dim]
        if length % size:
            these = start + lax.broadcasted_iota(jnp.int32, shape, dim) < length
            inside = these if inside is None else inside & these
    return inside


def _view(ref, lead: tuple, starts: tuple, shape: tuple[int, ...]):
    tile = (pl.ds(start, size) for start, size in zip(starts, shape, strict=True))
    return ref.at[(*map(jnp.int32, lead), *tile)]  # the interpreter takes no Python number


def _load(ref, lead: tuple, starts: tuple, shape: tuple[int, ...]) -> Array:
    """A tile of the last two dims, zeros outside."""
    view, inside = _view(ref, lead, starts, shape), _inside(ref, starts, shape)
    return plt.load(view) if inside is None else plt.load(view, mask=inside, other=0)


def _store(ref, lead: tuple, starts: tuple, value: Array) -> None:
    inside = _inside(ref, starts, value.shape)
    view = _view(ref, lead, starts, value.shape)
    plt.store(view, value.astype(ref.dtype), mask=inside)


def _place(program: Array, rows: int, columns: int) -> tuple[Array, Array]:
    """(row tile, column tile) of a program: column by column inside a band of row tiles."""
    band, inside = split_index(program, BAND * columns)
    height = jnp.minimum(rows - band * BAND, BAND)
    return band * BAND + lax.rem(inside, height), lax.div(inside, height)


def _expert(expert_ref, i: Array, split: int, E: int, steps: int) -> tuple[Array, Array]:
    """The expert of row tile i and its number of steps, 0 where it has none; a block has `split`
    row tiles."""
    e = expert_ref[split_index(i, split)[0]]
    return jnp.minimum(e, E - 1), jnp.where(e < E, jnp.int32(steps), 0)


def cost(flops: int, operands: Sequence[Array]) -> pl.CostEstimate:
    """What a kernel costs if every row has an expert."""
    moved = sum(x.size * x.dtype.itemsize for x in operands)
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved)


# Kernels
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Triton:
    """The products of `grouped_xla.Loop` as kernels; interpret: as `pl.pallas_call` takes it."""

    interpret: Any = False

    def product(
        self, x_PxRxK: Array, w_ExPxKxN: Array, groups: "Groups", transposed: bool
    ) -> Array:
        """See `grouped_xla.Loop.product`."""
        (P, R, K), E = x_PxRxK.shape, w_ExPxKxN.shape[0]
        N = w_ExPxKxN.shape[2 if transposed else 3]
        X, Y, Z = tile_sizes(groups.block, N, K, x_PxRxK.dtype)
        grid = R // X, ceil_div(N, Y)

        def kernel(expert_ref, x_ref, w_ref, y_ref):
            i, j = _place(pl.program_id(0), *grid)
            e, steps = _expert(expert_ref, i, groups.block // X, E, ceil_div(K, Z))

            def step(t, total, p):
                x_XxZ = _load(x_ref, (p,), (i * X, t * Z), (X, Z))
                if transposed:
                    w_YxZ = _load(w_ref, (e, p), (j * Y, t * Z), (Y, Z))
                    return total + matmul(x_XxZ, w_YxZ, (1, 1))
                return total + matmul(x_XxZ, _load(w_ref, (e, p), (t * Z, j * Y), (Z, Y)), (1, 0))

            total = jnp.zeros((X, Y), jnp.float32)
            for p in range(P):
                total = lax.fori_loop(0, steps, partial(step, p=p), total)
            _store(y_ref, (), (i * X, j * Y), total)

        operands = groups.expert_of_block, x_PxRxK, w_ExPxKxN
        outs = [((R, N), x_PxRxK.dtype)]
        flops = 2 * P * R * K * N
        (y,) = self._call(kernel, (grid[0] * grid[1],), operands, outs, flops)
        return y

    def hidden(
        self, x_RxD: Array, w_in_Ex2xDxF: Array, groups: "Groups", keep: bool
    ) -> list[Array]:
        """See `grouped_xla.Loop.hidden`."""
        (R, D), (E, _, _, F) = x_RxD.shape, w_in_Ex2xDxF.shape
        X, Y, Z = tile_sizes(groups.block, F, D, x_RxD.dtype)
        grid = R // X, ceil_div(F, Y)

        def kernel(expert_ref, x_ref, w_ref, h_ref, *kept):
            i, j = _place(pl.program_id(0), *grid)
            e, steps = _expert(expert_ref, i, groups.block // X, E, ceil_div(D, Z))

            def step(t, sums):
                x_XxZ = _load(x_ref, (), (i * X, t * Z), (X, Z))
                w = (_load(w_ref, (e, p), (t * Z, j * Y), (Z, Y)) for p in (0, 1))
                return tuple(
                    s + matmul(x_XxZ, w_ZxY, (1, 0)) for s, w_ZxY in zip(sums, w, strict=True)
                )

            gate, up = lax.fori_loop(0, steps, step, (jnp.zeros((X, Y), jnp.float32),) * 2)
            _store(h_ref, (), (i * X, j * Y), swiglu(gate, up))
            for ref in kept:
                _store(ref, (0,), (i * X, j * Y), gate)
                _store(ref, (1,), (i * X, j * Y), up)

        outs = [(shape, x_RxD.dtype) for shape in ((R, F), (2, R, F))[: 1 + keep]]
        operands = groups.expert_of_block, x_RxD, w_in_Ex2xDxF
        return self._call(kernel, (grid[0] * grid[1],), operands, outs, 4 * R * D * F)

    def hidden_gradients(
        self, dy_RxD: Array, w_out_ExFxD: Array, kept_2xRxF: Array, groups: "Groups"
    ) -> tuple[Array, Array]:
        """See `grouped_xla.Loop.hidden_gradients`; takes the memory of `kept`."""
        (R, D), (E, F, _) = dy_RxD.shape, w_out_ExFxD.shape
        X, Y, Z = tile_sizes(groups.block, F, D, dy_RxD.dtype)
        grid = R // X, ceil_div(F, Y)

        def kernel(expert_ref, dy_ref, w_ref, kept_ref, grad_ref, h_ref):
            i, j = _place(pl.program_id(0), *grid)
            e, steps = _expert(expert_ref, i, groups.block // X, E, ceil_div(D, Z))

            def step(t, total):
                dy_XxZ = _load(dy_ref, (), (i * X, t * Z), (X, Z))
                return total + matmul(dy_XxZ, _load(w_ref, (e,), (j * Y, t * Z), (Y, Z)), (1, 1))

            dh = lax.fori_loop(0, steps, step, jnp.zeros((X, Y), jnp.float32))
            at = i * X, j * Y
            gate, up = (_load(kept_ref, (p,), at, (X, Y)).astype(jnp.float32) for p in (0, 1))
            h, dgate, dup = swiglu_gradients(gate, up, dh)
            _store(h_ref, (), at, h)
            _store(grad_ref, (0,), at, dgate)
            _store(grad_ref, (1,), at, dup)

        outs = [(kept_2xRxF.shape, dy_RxD.dtype), ((R, F), dy_RxD.dtype)]
        operands = groups.expert_of_block, dy_RxD, w_out_ExFxD, kept_2xRxF
        flops = 2 * R * D * F
        grads, h = self._call(kernel, (grid[0] * grid[1],), operands, outs, flops, {3: 0}, 4)
        return grads, h

    def weight_gradients(
        self, x_RxK: Array, dy_PxRxN: Array, groups: "Groups", dtype: Any
    ) -> Array:
        """See `grouped_xla.Loop.weight_gradients`: one program per tile of each weight."""
        (R, K), (P, _, N), E = x_RxK.shape, dy_PxRxN.shape, groups.sizes_E.shape[0]
        X, Y, Z = tile_sizes(power_of_two(K, 16), N, groups.block, x_RxK.dtype)
        grid = ceil_div(K, X), ceil_div(N, Y)

        def kernel(first_ref, blocks_ref, x_ref, dy_ref, dw_ref):
            i, j = _place(pl.program_id(0), *grid)
            e, p = split_index(pl.program_id(1), P)
            start = first_ref[e] * groups.block

            def step(t, total):
                x_ZxX = _load(x_ref, (), (start + t * Z, i * X), (Z, X))
                dy_ZxY = _load(dy_ref, (p,), (start + t * Z, j * Y), (Z, Y))
                return total + matmul(x_ZxX, dy_ZxY, (0, 0))

            steps = blocks_ref[e] * (groups.block // Z)
            total = lax.fori_loop(0, steps, step, jnp.zeros((X, Y), jnp.float32))
            _store(dw_ref, (e, p), (i * X, j * Y), total)

        held_E = jnp.clip(groups.blocks - groups.first_E, 0, groups.blocks_E)
        operands = groups.first_E, held_E, x_RxK, dy_PxRxN
        outs = [((E, P, K, N), dtype)]
        flops = 2 * P * R * K * N
        (dw,) = self._call(kernel, (grid[0] * grid[1], E * P), operands, outs, flops)
        return dw

    def _call(
        self,
        kernel: Callable,
        grid: tuple[int, ...],
        operands: Sequence[Array],
        outs: Sequence[tuple[tuple[int, ...], Any]],
        flops: int,
        aliases: dict[int, int] | None = None,
        stages: int = 3,
    ) -> list[Array]:
        """outs: (shape, dtype) of results. stages: of loads in flight. Operands are whole arrays:
        tiles are cut in the kernel, where the expert is known."""
        shapes = [result(shape, dtype, operands[-1]) for shape, dtype in outs]

        def whole(x) -> pl.BlockSpec:
            return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))

        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[whole(x) for x in operands],
            out_specs=[whole(x) for x in shapes],
            out_shape=shapes,
            input_output_aliases=aliases or {},
            compiler_params=plt.CompilerParams(num_warps=8, num_stages=stages),
            cost_estimate=cost(flops, operands),
            interpret=self.interpret,
        )(*operands)
