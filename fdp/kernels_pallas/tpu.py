"""Attention over walks of tiles as Mosaic kernels: the grid follows the walks, and accumulators
stay in VMEM between steps.

The tables of the walks are prefetched into scalar memory, where the index maps read which tile to
fetch next. Steps after the end of a walk name its last tile again, so they fetch and compute
nothing. Legend as in tiles.py."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fdp.kernels_pallas import tiles
from fdp.kernels_pallas.tiles import (
    Spec,
    Stride,
    Walk,
    lead,
    result,
    split_index,
    walk_length,
    walk_tile,
)

Array = jax.Array


class Maps:
    """Block specs of a grid (Z, own tile, step) that follows `walk`: of the own side and of the
    other side."""

    def __init__(self, stride: Stride, walk: Walk, n_heads: int):
        self.stride, self.n_heads, self.size = stride, n_heads, walk.counts.shape[0]

    def row(self, z):
        return lead(z, self.n_heads, self.size)

    def _met(self, z, i, t, table, counts):
        last = jnp.maximum(walk_length(counts, self.stride, self.row(z), i) - 1, 0)
        return walk_tile(table, self.stride, self.row(z), i, jnp.minimum(t, last))

    def own(self, x: Array | jax.ShapeDtypeStruct, columns: int = 0) -> pl.BlockSpec:
        """Tile i of x [1 | B | Z, tiles, ·, ·]; `columns` > 0: of width C at the head's columns
        (see `tile_keys`).
        """
        return self._spec(x, columns, lambda z, i, t, *_: i)

    def met(self, x: Array, columns: int = 0) -> pl.BlockSpec:
        """The tile of x at step t of the walk."""
        return self._spec(x, columns, self._met)

    def _spec(self, x, columns, tile):
        heads = x.shape[3] // columns if columns else 1
        width = columns or x.shape[3]

        def index(z, i, t, *tables):
            row, column = (
                split_index(z, heads) if columns else (lead(z, self.n_heads, x.shape[0]), 0)
            )
            return row, tile(z, i, t, *tables), 0, column

        return pl.BlockSpec((1, 1, x.shape[2], width), index)


def _call(
    kernel,
    spec: Spec,
    walk: Walk,
    grid,
    in_specs,
    out_specs,
    out_shape,
    scratch,
    operands,
    flops: int,
):
    bytes_moved = sum(x.size * x.dtype.itemsize for x in operands)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=flops // 512, bytes_accessed=bytes_moved
        ),
        interpret=spec.interpret,
    )(walk.table, walk.counts, *operands)


def column(ref) -> Array:
    """[1, 1, 1, X] → [X, 1]: a vector moves from lanes to sublanes."""
    return ref[0, 0].T


def tags_of(spec: Spec, ref) -> tuple[Array, ...]:
    """The tags of a tile: position and, for a packed mask, segment."""
    return tuple(ref[0, 0, a] for a in range(1 + spec.mask.packed))


def forward(spec: Spec, q, k, v, q_tags, k_tags, walk: Walk) -> tuple[Array, Array]:
    """(out [Z, I, X, C] like q, lse f32 [Z, I, 1, X]) of rows q [Z, I, X, C] over keys k, v [·, J,
    Y, W].
    """
    Z, I, X, C = q.shape
    stride = tiles.row_stride(spec, walk, k.shape[1])
    maps = Maps(stride, walk, Z)

    def kernel(
        table, counts, q_ref, k_ref, v_ref, q_tag_ref, k_tag_ref, o_ref, lse_ref, *state_refs
    ):
        z, i, t = (pl.program_id(a) for a in range(3))

        def save(state):
            for ref, x in zip(state_refs, state, strict=True):
                ref[...] = x

        pl.when(t == 0)(lambda: save(tiles.begin(X, C)))

        @pl.when(t < walk_length(counts, stride, maps.row(z), i))
        def _():
            seen = tiles.visible(
                spec,
                tags_of(spec, q_tag_ref),
                tags_of(spec, k_tag_ref),
                walk_tile(table, stride, maps.row(z), i, t),
            )
            s = tiles.scores(q_ref[0, 0], k_ref[0, 0], spec.scale, seen)
            save(tiles.absorb(tuple(ref[...] for ref in state_refs), s, v_ref[0, 0]))

        @pl.when(t == stride.most - 1)
        def _():
            o, lse = tiles.finish(tuple(ref[...] for ref in state_refs))
            o_ref[0, 0], lse_ref[0, 0] = o.astype(o_ref.dtype), lse.T

    lse_shape = result((Z, I, 1, X), jnp.float32, q)
    return _call(
        kernel,
        spec,
        walk,
        (Z, I, stride.most),
        [maps.own(q), maps.met(k, C), maps.met(v, C), maps.own(q_tags), maps.met(k_tags)],
        [maps.own(q), maps.own(lse_shape)],
        [result(q.shape, spec.dtype(q), q), lse_shape],
        [pltpu.VMEM(s, jnp.float32) for s in ((X, 1), (X, 1), (X, C))],
        (q, k, v, q_tags, k_tags),
        4 * Z * I * stride.most * X * k.shape[2] * C,
    )


def query_gradient(spec: Spec, q, k, v, q_tags, k_tags, walk: Walk, do, lse, delta) -> Array:
    """dq like q; lse with +inf for rows that saw no key, and delta: f32 [Z, I, 1, X]."""
    Z, I, X, C = q.shape
    stride = tiles.row_stride(spec, walk, k.shape[1])
    maps = Maps(stride, walk, Z)

    def kernel(
        table,
        counts,
        q_ref,
        k_ref,
        v_ref,
        q_tag_ref,
        k_tag_ref,
        do_ref,
        lse_ref,
        delta_ref,
        dq_ref,
        acc,
    ):
        z, i, t = (pl.program_id(a) for a in range(3))

        @pl.when(t == 0)
        def _():
            acc[...] = jnp.zeros((X, C), jnp.float32)

        @pl.when(t < walk_length(counts, stride, maps.row(z), i))
        def _():
            seen = tiles.visible(
                spec,
                tags_of(spec, q_tag_ref),
                tags_of(spec, k_tag_ref),
                walk_tile(table, stride, maps.row(z), i, t),
            )
            k_YxC, rows = k_ref[0, 0], (column(lse_ref), column(delta_ref))
            _, ds = tiles.score_gradients(
                q_ref[0, 0], k_YxC, v_ref[0, 0], do_ref[0, 0], *rows, spec.scale, seen
            )
            acc[...] += tiles.matmul(ds.astype(k_YxC.dtype), k_YxC, (1, 0))

        @pl.when(t == stride.most - 1)
        def _():
            dq_ref[0, 0] = acc[...].astype(dq_ref.dtype)

    return _call(
        kernel,
        spec,
        walk,
        (Z, I, stride.most),
        [
            maps.own(q),
            maps.met(k, C),
            maps.met(v, C),
            maps.own(q_tags),
            maps.met(k_tags),
            maps.own(do),
            maps.own(lse),
            maps.own(delta),
        ],
        maps.own(q),
        result(q.shape, spec.dtype(q), q),
        [pltpu.VMEM((X, C), jnp.float32)],
        (q, k, v, q_tags, k_tags, do, lse, delta),
        6 * Z * I * stride.most * X * k.shape[2] * C,
    )


def key_gradients(
    spec: Spec, q, k, v, q_tags, k_tags, walk: Walk, do, lse, delta
) -> tuple[Array, Array]:
    """(dk, dv) like k and v; `walk` goes from each key tile over row tiles."""
    Z, I, X, C = q.shape
    J, Y = k.shape[1:3]
    stride = tiles.key_stride(spec, walk, I)
    maps = Maps(stride, walk, Z)

    def kernel(
        table,
        counts,
        q_ref,
        k_ref,
        v_ref,
        q_tag_ref,
        k_tag_ref,
        do_ref,
        lse_ref,
        delta_ref,
        *results,
    ):
        dk_ref, dv_ref, dk_acc, dv_acc = results
        z, j, t = (pl.program_id(a) for a in range(3))

        @pl.when(t == 0)
        def _():
            dk_acc[...] = dv_acc[...] = jnp.zeros((Y, C), jnp.float32)

        @pl.when(t < walk_length(counts, stride, maps.row(z), j))
        def _():
            seen = tiles.visible(spec, tags_of(spec, q_tag_ref), tags_of(spec, k_tag_ref), j)
            q_XxC, do_XxC, rows = q_ref[0, 0], do_ref[0, 0], (column(lse_ref), column(delta_ref))
            p, ds = tiles.score_gradients(
                q_XxC, k_ref[0, 0], v_ref[0, 0], do_XxC, *rows, spec.scale, seen
            )
            dk_acc[...] += tiles.matmul(ds.astype(q_XxC.dtype), q_XxC, (0, 0))
            dv_acc[...] += tiles.matmul(p.astype(do_XxC.dtype), do_XxC, (0, 0))

        @pl.when(t == stride.most - 1)
        def _():
            dk_ref[0, 0], dv_ref[0, 0] = (
                dk_acc[...].astype(dk_ref.dtype),
                dv_acc[...].astype(dv_ref.dtype),
            )

    return _call(
        kernel,
        spec,
        walk,
        (Z, J, stride.most),
        [
            maps.met(q),
            maps.own(k, C),
            maps.own(v, C),
            maps.met(q_tags),
            maps.own(k_tags),
            maps.met(do),
            maps.met(lse),
            maps.met(delta),
        ],
        [maps.own(k, C), maps.own(v, C)],
        [result(k.shape, spec.dtype(k), k), result(v.shape, spec.dtype(v), v)],
        [pltpu.VMEM((Y, C), jnp.float32)] * 2,
        (q, k, v, q_tags, k_tags, do, lse, delta),
        8 * Z * J * stride.most * X * Y * C,
    )
