"""Attention over walks of tiles as Triton kernels: one program per own tile, with a loop over the
tiles of its walk. Legend as in tiles.py."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from fdp.kernels_pallas import tiles
from fdp.kernels_pallas.tiles import Spec, Walk, lead, result, split_index, walk_length, walk_tile

Array = jax.Array


def _own(x, n_heads: int, columns: int = 0) -> pl.BlockSpec:
    """Tile i of x [1 | B | Z, tiles, ·, ·] in a grid (tile, Z); `columns`: of width C at the head's
    columns.
    """
    return _spec(x, n_heads, columns, 1, lambda i: i)


def _all(x, n_heads: int, columns: int = 0) -> pl.BlockSpec:
    """Every tile of x that belongs to the head."""
    return _spec(x, n_heads, columns, x.shape[1], lambda i: 0)


def _spec(x, n_heads, columns, count, tile):
    heads = x.shape[3] // columns if columns else 1

    def index(i, z):
        row, column = split_index(z, heads) if columns else (lead(z, n_heads, x.shape[0]), 0)
        return row, tile(i), 0, column

    return pl.BlockSpec((None, count, x.shape[2], columns or x.shape[3]), index)


def _call(
    kernel, spec: Spec, walk: Walk, grid, in_specs, out_specs, out_shape, operands, flops: int
):
    moved = sum(x.size * x.dtype.itemsize for x in operands)
    warps = 4 if operands[0].shape[3] <= 64 else 8
    whole = [pl.BlockSpec(x.shape, lambda i, z, n=x.ndim: (0,) * n) for x in walk]
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[*whole, *in_specs],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=tiles.GPU_STAGES),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=flops // 512, bytes_accessed=moved
        ),
        interpret=spec.interpret,
    )(*walk, *operands)


def _walked(table, counts, stride, n_heads, step, initial):
    """Fold step(tile, state) over the walk of this program's tile."""
    i, row = pl.program_id(0), lead(pl.program_id(1), n_heads, counts.shape[0])
    length = walk_length(counts, stride, row, i)
    return lax.fori_loop(
        0, length, lambda t, x: step(walk_tile(table, stride, row, i, t), x), initial
    )


def _tags(spec: Spec, ref, tile) -> tuple[Array, ...]:
    """The tags of one tile: position and, for a packed mask, segment. Two loads: Triton does not
    slice values.
    """
    return tuple(ref[tile, a, :] for a in range(1 + spec.mask.packed))


def _column(ref, tile) -> Array:
    """Row tile `tile` of a vector: [X, 1]."""
    return ref[tile, 0, :][:, None]


def forward(spec: Spec, q, k, v, q_tags, k_tags, walk: Walk) -> tuple[Array, Array]:
    """(out [Z, I, X, C] like q, lse f32 [Z, I, 1, X]) of rows q [Z, I, X, C] over keys k, v [·, J,
    Y, W].
    """
    Z, I, X, C = q.shape
    stride = tiles.row_stride(spec, walk, k.shape[1])

    def kernel(table, counts, q_ref, k_ref, v_ref, q_tag_ref, k_tag_ref, o_ref, lse_ref):
        q_XxC, q_tag = q_ref[0], _tags(spec, q_tag_ref, 0)

        def step(j, state):
            seen = tiles.visible(spec, q_tag, _tags(spec, k_tag_ref, j), j)
            return tiles.absorb(state, tiles.scores(q_XxC, k_ref[j], spec.scale, seen), v_ref[j])

        o, lse = tiles.finish(_walked(table, counts, stride, Z, step, tiles.begin(X, C)))
        o_ref[0], lse_ref[0, 0] = o.astype(o_ref.dtype), lse.reshape(X)

    lse_shape = result((Z, I, 1, X), jnp.float32, q)
    return _call(
        kernel,
        spec,
        walk,
        (I, Z),
        [_own(q, Z), _all(k, Z, C), _all(v, Z, C), _own(q_tags, Z), _all(k_tags, Z)],
        [_own(q, Z), _own(lse_shape, Z)],
        [result(q.shape, spec.dtype(q), q), lse_shape],
        (q, k, v, q_tags, k_tags),
        4 * Z * I * stride.most * X * k.shape[2] * C,
    )


def query_gradient(spec: Spec, q, k, v, q_tags, k_tags, walk: Walk, do, lse, delta) -> Array:
    """dq like q; lse with +inf for rows that saw no key, and delta: f32 [Z, I, 1, X]."""
    Z, I, X, C = q.shape
    stride = tiles.row_stride(spec, walk, k.shape[1])

    def kernel(
        table, counts, q_ref, k_ref, v_ref, q_tag_ref, k_tag_ref, do_ref, lse_ref, delta_ref, dq_ref
    ):
        q_XxC, do_XxC, q_tag = q_ref[0], do_ref[0], _tags(spec, q_tag_ref, 0)
        rows = _column(lse_ref, 0), _column(delta_ref, 0)

        def step(j, dq_XxC):
            k_YxC, seen = k_ref[j], tiles.visible(spec, q_tag, _tags(spec, k_tag_ref, j), j)
            _, ds = tiles.score_gradients(q_XxC, k_YxC, v_ref[j], do_XxC, *rows, spec.scale, seen)
            return dq_XxC + tiles.matmul(ds.astype(k_YxC.dtype), k_YxC, (1, 0))

        dq_XxC = _walked(table, counts, stride, Z, step, jnp.zeros((X, C), jnp.float32))
        dq_ref[0] = dq_XxC.astype(dq_ref.dtype)

    return _call(
        kernel,
        spec,
        walk,
        (I, Z),
        [
            _own(q, Z),
            _all(k, Z, C),
            _all(v, Z, C),
            _own(q_tags, Z),
            _all(k_tags, Z),
            _own(do, Z),
            _own(lse, Z),
            _own(delta, Z),
        ],
        _own(q, Z),
        result(q.shape, spec.dtype(q), q),
        (q, k, v, q_tags, k_tags, do, lse, delta),
        6 * Z * I * stride.most * X * k.shape[2] * C,
    )


def key_gradients(
    spec: Spec, q, k, v, q_tags, k_tags, walk: Walk, do, lse, delta
) -> tuple[Array, Array]:
    """(dk, dv) like k and v; `walk` goes from each key tile over row tiles."""
    Z, I, _, C = q.shape
    J, Y = k.shape[1:3]
    stride = tiles.key_stride(spec, walk, I)

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
        dk_ref,
        dv_ref,
    ):
        k_YxC, v_YxC, k_tag, j = k_ref[0], v_ref[0], _tags(spec, k_tag_ref, 0), pl.program_id(0)

        def step(i, state):
            dk_YxC, dv_YxC = state
            q_XxC, do_XxC, rows = q_ref[i], do_ref[i], (_column(lse_ref, i), _column(delta_ref, i))
            seen = tiles.visible(spec, _tags(spec, q_tag_ref, i), k_tag, j)
            p, ds = tiles.score_gradients(q_XxC, k_YxC, v_YxC, do_XxC, *rows, spec.scale, seen)
            dk_YxC += tiles.matmul(ds.astype(q_XxC.dtype), q_XxC, (0, 0))
            return dk_YxC, dv_YxC + tiles.matmul(p.astype(do_XxC.dtype), do_XxC, (0, 0))

        zeros = jnp.zeros((Y, C), jnp.float32)
        dk_YxC, dv_YxC = _walked(table, counts, stride, Z, step, (zeros, zeros))
        dk_ref[0], dv_ref[0] = dk_YxC.astype(dk_ref.dtype), dv_YxC.astype(dv_ref.dtype)

    return _call(
        kernel,
        spec,
        walk,
        (J, Z),
        [
            _all(q, Z),
            _own(k, Z, C),
            _own(v, Z, C),
            _all(q_tags, Z),
            _own(k_tags, Z),
            _all(do, Z),
            _all(lse, Z),
            _all(delta, Z),
        ],
        [_own(k, Z, C), _own(v, Z, C)],
        [result(k.shape, spec.dtype(k), k), result(v.shape, spec.dtype(v), v)],
        (q, k, v, q_tags, k_tags, do, lse, delta),
        8 * Z * J * stride.most * Y * q.shape[2] * C,
    )
