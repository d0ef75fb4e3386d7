"""Grouped products as Mosaic kernels: the grid walks over blocks of rows, and index maps read from
scalar memory whose weights to fetch. Legend as in grouped.py.

megablox (jax.experimental.pallas.ops.tpu) is not used: it leaves rows past the last group
unwritten, and has no gated product and no sum over parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fdp.kernels_pallas.grouped_triton import cost
from fdp.kernels_pallas.grouped_xla import swiglu, swiglu_gradients
from fdp.kernels_pallas.tiles import ceil_div, matmul, result

if TYPE_CHECKING:
    from fdp.kernels_pallas.grouped import Groups

Array = jax.Array
COLUMNS = 512  # of a tile of results; with DEPTH and a block of 512 rows two stages fit 16 MiB VMEM
DEPTH = 4096  # bytes of a row of a tile along the contracted dim


def depth_tile(length: int, dtype: Any) -> int:
    """Entries of the contracted dim in a tile: all of them, a divisor, or a size whose last tile is
    masked; multiples of 128 lanes unless all."""
    most = DEPTH // jnp.dtype(dtype).itemsize
    if length <= most:
        return length
    divisors = [d for d in range(most, most // 4, -128) if length % d == 0]
    return divisors[0] if divisors else most // 2


def _mask(x: Array, dim: int, start: Array, length: int) -> Array:
    """x, zeros past the end of the contracted dim, whose last tile reads memory that is not its
    own."""
    if length % x.shape[dim] == 0:
        return x
    place = start + lax.broadcasted_iota(jnp.int32, x.shape, dim)
    return jnp.where(place < length, x, 0)


class BlockWalk:
    """Where the tiles of a grid (column tile j, block i, step t) lie; `experts`: the prefetched
    table. Blocks past the last group stay at the last tile, so that they fetch nothing."""

    def __init__(self, E: int, depth: int):
        self.E, self.depth = E, depth

    def step(self, i: Array, t: Array, experts: Any) -> Array:
        return jnp.where(experts[i] < self.E, t, self.depth - 1)

    def expert(self, i: Array, experts: Any) -> Array:
        return jnp.minimum(experts[i], self.E - 1)


@dataclass(frozen=True)
class Mosaic:
    """The products of `grouped_xla.Loop` as kernels; interpret: as `pl.pallas_call` takes it."""

    interpret: Any = False

    def product(
        self, x_PxRxK: Array, w_ExPxKxN: Array, groups: "Groups", transposed: bool
    ) -> Array:
        """See `grouped_xla.Loop.product`."""
        (P, R, K), E, X = x_PxRxK.shape, w_ExPxKxN.shape[0], groups.block
        N = w_ExPxKxN.shape[2 if transposed else 3]
        Y, Z = min(N, COLUMNS), depth_tile(K, x_PxRxK.dtype)
        T = ceil_div(K, Z)
        walk = BlockWalk(E, P * T)

        def kernel(experts, x_ref, w_ref, y_ref, total):
            def step(t):
                start = lax.rem(t, T) * Z
                x_XxZ = _mask(x_ref[0], 1, start, K)
                dim = int(transposed)
                total[...] += matmul(x_XxZ, _mask(w_ref[0, 0], dim, start, K), (1, dim))

            def done():
                y_ref[...] = total[...].astype(y_ref.dtype)

            _accumulate(experts, E, total, step, done)

        def part(i, t, experts):
            s = walk.step(i, t, experts)
            return lax.div(s, T), lax.rem(s, T)

        def x_map(j, i, t, experts):
            p, s = part(i, t, experts)
            return p, i, s

        def w_map(j, i, t, experts):
            p, s = part(i, t, experts)
            return walk.expert(i, experts), p, *((j, s) if transposed else (s, j))

        specs = [
            pl.BlockSpec((1, X, Z), x_map),
            pl.BlockSpec((1, 1, *((Y, Z) if transposed else (Z, Y))), w_map),
        ]
        outs = [((R, N), x_PxRxK.dtype, pl.BlockSpec((X, Y), _own))]
        grid = ceil_div(N, Y), groups.blocks, P * T
        tables, operands = (groups.expert_of_block,), (x_PxRxK, w_ExPxKxN)
        flops = 2 * P * R * K * N
        return self._call(kernel, grid, tables, operands, specs, outs, flops, (X, Y))[0]

    def hidden(
        self, x_RxD: Array, w_in_Ex2xDxF: Array, groups: "Groups", keep: bool
    ) -> list[Array]:
        """See `grouped_xla.Loop.hidden`."""
        (R, D), (E, _, _, F), X = x_RxD.shape, w_in_Ex2xDxF.shape, groups.block
        Y, Z = min(F, COLUMNS // 2), depth_tile(D, x_RxD.dtype)
        walk = BlockWalk(E, ceil_div(D, Z))

        def kernel(experts, x_ref, w_ref, h_ref, *rest):
            *kept, total = rest

            def step(t):
                x_XxZ = _mask(x_ref[...], 1, t * Z, D)
                for p in (0, 1):
                    total[p] += matmul(x_XxZ, _mask(w_ref[0, p], 0, t * Z, D), (1, 0))

            def done():
                h_ref[...] = swiglu(total[0], total[1]).astype(h_ref.dtype)
                for ref in kept:
                    ref[...] = total[...].astype(ref.dtype)

            _accumulate(experts, E, total, step, done)

        specs = [
            pl.BlockSpec((X, Z), lambda j, i, t, experts: (i, walk.step(i, t, experts))),
            pl.BlockSpec(
                (1, 2, Z, Y),
                lambda j, i, t, experts: (walk.expert(i, experts), 0, walk.step(i, t, experts), j),
            ),
        ]
        outs = [
            ((R, F), x_RxD.dtype, pl.BlockSpec((X, Y), _own)),
            ((2, R, F), x_RxD.dtype, pl.BlockSpec((2, X, Y), _own_pair)),
        ][: 1 + keep]
        grid = ceil_div(F, Y), groups.blocks, walk.depth
        tables, operands = (groups.expert_of_block,), (x_RxD, w_in_Ex2xDxF)
        flops = 4 * R * D * F
        return self._call(kernel, grid, tables, operands, specs, outs, flops, (2, X, Y))

    def hidden_gradients(
        self, dy_RxD: Array, w_out_ExFxD: Array, kept_2xRxF: Array, groups: "Groups"
    ) -> tuple[Array, Array]:
        """See `grouped_xla.Loop.hidden_gradients`; takes the memory of `kept`."""
        (R, D), (E, F, _), X = dy_RxD.shape, w_out_ExFxD.shape, groups.block
        Y, Z = min(F, COLUMNS // 2), depth_tile(D, dy_RxD.dtype)
        walk = BlockWalk(E, ceil_div(D, Z))

        def kernel(experts, dy_ref, w_ref, kept_ref, grad_ref, h_ref, dh):
            def step(t):
                dy_XxZ = _mask(dy_ref[...], 1, t * Z, D)
                dh[...] += matmul(dy_XxZ, _mask(w_ref[0], 1, t * Z, D), (1, 1))

            def done():
                gate, up = (kept_ref[p].astype(jnp.float32) for p in (0, 1))
                h, dgate, dup = swiglu_gradients(gate, up, dh[...])
                h_ref[...] = h.astype(h_ref.dtype)
                grad_ref[0], grad_ref[1] = (z.astype(grad_ref.dtype) for z in (dgate, dup))

            _accumulate(experts, E, dh, step, done)

        pair = pl.BlockSpec((2, X, Y), _own_pair)
        specs = [
            pl.BlockSpec((X, Z), lambda j, i, t, experts: (i, walk.step(i, t, experts))),
            pl.BlockSpec(
                (1, Y, Z),
                lambda j, i, t, experts: (walk.expert(i, experts), j, walk.step(i, t, experts)),
            ),
            pair,
        ]
        outs = [
            (kept_2xRxF.shape, dy_RxD.dtype, pair),
            ((R, F), dy_RxD.dtype, pl.BlockSpec((X, Y), _own)),
        ]
        grid = ceil_div(F, Y), groups.blocks, walk.depth
        tables, operands = (groups.expert_of_block,), (dy_RxD, w_out_ExFxD, kept_2xRxF)
        flops = 2 * R * D * F
        grads, h = self._call(kernel, grid, tables, operands, specs, outs, flops, (X, Y), {3: 0})
        return grads, h

    def weight_gradients(
        self, x_RxK: Array, dy_PxRxN: Array, groups: "Groups", dtype: Any
    ) -> Array:
        """See `grouped_xla.Loop.weight_gradients`: every expert has one step at least, in which its
        gradient is written."""
        (R, K), (P, _, N), E = x_RxK.shape, dy_PxRxN.shape, groups.sizes_E.shape[0]
        X, Y, B = min(K, COLUMNS), min(N, 2 * COLUMNS), groups.block
        tables = _steps(groups)
        S = tables[0].shape[0]

        def kernel(experts, blocks, live, x_ref, dy_ref, dw_ref, total):
            s = pl.program_id(3)
            e = experts[s]

            @pl.when((s == 0) | (experts[jnp.maximum(s - 1, 0)] != e))
            def _():
                total[...] = jnp.zeros_like(total)

            @pl.when(live[s] > 0)
            def _():
                total[...] += matmul(x_ref[...], dy_ref[0], (0, 0))

            @pl.when((s == S - 1) | (experts[jnp.minimum(s + 1, S - 1)] != e))
            def _():
                dw_ref[0, 0] = total[...].astype(dw_ref.dtype)

        specs = [
            pl.BlockSpec((B, X), lambda p, i, j, s, experts, blocks, live: (blocks[s], i)),
            pl.BlockSpec((1, B, Y), lambda p, i, j, s, experts, blocks, live: (p, blocks[s], j)),
        ]
        out = pl.BlockSpec((1, 1, X, Y), lambda p, i, j, s, experts, *_: (experts[s], p, i, j))
        grid = P, ceil_div(K, X), ceil_div(N, Y), S
        outs = [((E, P, K, N), dtype, out)]
        operands, flops = (x_RxK, dy_PxRxN), 2 * P * R * K * N
        return self._call(kernel, grid, tables, operands, specs, outs, flops, (X, Y))[0]

    def _call(
        self,
        kernel: Callable,
        grid: tuple[int, ...],
        tables: Sequence[Array],
        operands: Sequence[Array],
        specs: list[pl.BlockSpec],
        outs: Sequence[tuple[tuple[int, ...], Any, pl.BlockSpec]],
        flops: int,
        total: tuple[int, ...],
        aliases: dict[int, int] | None = None,
    ) -> list[Array]:
        """tables go to scalar memory; outs: (shape, dtype, spec) of results; total: shape of the
        f32 accumulator. aliases: operand, tables counted, → result in the same memory."""
        order: Any = ("parallel", *("arbitrary",) * (len(grid) - 1))
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(tables),
                grid=grid,
                in_specs=specs,
                out_specs=[spec for _, _, spec in outs],
                scratch_shapes=[pltpu.VMEM(total, jnp.float32)],
            ),
            out_shape=[result(shape, dtype, operands[0]) for shape, dtype, _ in outs],
            input_output_aliases=aliases or {},
            compiler_params=pltpu.CompilerParams(dimension_semantics=order),
            cost_estimate=cost(flops, operands),
            interpret=self.interpret,
        )(*tables, *operands)


def _steps(groups: "Groups") -> tuple[Array, Array, Array]:
    """The expert, the block and whether there is one, of each step over the blocks of all experts:
    int32 [blocks + E]. An expert of no row has one step without a block."""
    E = groups.sizes_E.shape[0]
    places_S = jnp.arange(groups.blocks + E, dtype=jnp.int32)
    ends_E = jnp.cumsum(jnp.maximum(groups.blocks_E, 1), dtype=jnp.int32)
    experts_S = (ends_E <= places_S[:, None]).sum(1, dtype=jnp.int32)
    experts_S = jnp.minimum(experts_S, E - 1)  # steps that are left over repeat the last one
    count_S = groups.blocks_E[experts_S]
    left_S = ends_E[experts_S] - places_S  # steps of this expert that remain, this one too
    blocks_S = groups.first_E[experts_S] + count_S - jnp.maximum(left_S, 1)
    live_S = (left_S > 0) & (count_S > 0)
    return experts_S, jnp.clip(blocks_S, 0, groups.blocks - 1), live_S.astype(jnp.int32)


def _own(j, i, t, experts):
    return i, j


def _own_pair(j, i, t, experts):
    return 0, i, j


def _accumulate(experts, E: int, total, step: Callable, done: Callable) -> None:
    """Zero `total`, then step(t) for the steps of a block that has an expert, then done()."""
    i, t = pl.program_id(1), pl.program_id(2)

    @pl.when(t == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    pl.when(experts[i] < E)(lambda: step(t))
    pl.when(t == pl.num_programs(2) - 1)(done)
