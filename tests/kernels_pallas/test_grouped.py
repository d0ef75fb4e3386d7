"""Grouped products against every row with every weight: values, gradients, empty and full groups,
and inside a checked shard_map.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from fdp.count import experts as count_experts
from fdp.count import jaxpr
from fdp.kernels_pallas import grouped, grouped_tpu, grouped_triton
from fdp.kernels_pallas.grouped import Groups, grouped_ffn, grouped_matmul, make_groups
from tests.kernels_pallas.compiled import PLATFORMS, compiled_text, kernels

fast = pytest.mark.fast
P = PartitionSpec
E, BLOCK, ROWS = 4, 16, 61
D, F = 24, 40  # no multiples of a tile
SIZES = {
    "mixed": (17, 0, 43, 1),
    "all in one": (0, 0, ROWS, 0),
    "none": (0, 0, 0, 0),
    "whole blocks": (16, 16, 0, 16),
    "one each": (1, 1, 1, 1),
}


BACKENDS = ("xla", "tpu", "gpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles a side, the last of them not full."""
    monkeypatch.setattr(
        grouped_triton, "tile_sizes", lambda *_, **k: grouped_triton.Sizes(16, 16, 16)
    )
    monkeypatch.setattr(grouped_tpu, "COLUMNS", 32)
    monkeypatch.setattr(grouped_tpu, "depth_tile", lambda *_: 16)


def problem(sizes, dtype=np.float32):
    """x with zero rows where no expert has one, w_in, w_out, the cotangent of y, and the groups."""
    groups = make_groups(np.array(sizes, np.int32), ROWS, BLOCK)
    shapes = (groups.rows, D), (E, 2, D, F), (E, F, D), (groups.rows, D)
    rng = np.random.default_rng(0)
    x, w_in, w_out, dy = (rng.normal(size=s).astype(np.float32) for s in shapes)
    x *= held(sizes, groups.rows)[:, None]
    arrays = x, w_in * np.float32(D**-0.5), w_out * np.float32(F**-0.5), dy
    return tuple(z.astype(dtype) for z in arrays), groups


def held(sizes, rows):
    """Which rows hold one of an expert: bool [rows]."""
    held, start = np.zeros(rows, bool), 0
    for size in sizes:
        held[start : start + size] = True
        start += -(-size // BLOCK) * BLOCK
    return held


def with_gradients(f, x, w_in, w_out, dy):
    y, back = jax.vjp(f, x, w_in, w_out)
    return y, *back(dy.astype(y.dtype))


@partial(jax.jit, static_argnames="backend")
def ffn(arrays, groups, backend):
    return with_gradients(
        lambda *z: grouped_ffn(*z, groups, backend=backend, interpret=True), *arrays
    )


@jax.jit
def ffn_oracle(arrays, groups):
    return with_gradients(lambda *z: grouped.reference_ffn(*z, groups), *arrays)


def two_products(multiply):
    """x → two widths and back, so that both orders of K and N are met."""

    def f(x, w_in, w_out):
        return multiply(multiply(x, w_in[:, 0]), w_out)

    return f


@partial(jax.jit, static_argnames="backend")
def products(arrays, groups, backend):
    multiply = lambda x, w: grouped_matmul(x, w, groups, backend=backend)
    return with_gradients(two_products(multiply), *arrays)


@jax.jit
def products_oracle(arrays, groups):
    multiply = lambda x, w: grouped.reference_matmul(x, w, groups)
    return with_gradients(two_products(multiply), *arrays)


def assert_close(got, want, tolerance=1e-5):
    """Relative to the largest entry; NaN is nowhere."""
    for name, a, b in zip(("y", "dx", "dw_in", "dw_out"), got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        scale = max(np.abs(b).max(), 1e-6)
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(case, backend):
    check(case, ffn, ffn_oracle, backend)


@fast
@pytest.mark.parametrize("case", SIZES)
def test_products_alone(case):
    check(case, products, products_oracle, "xla")


def check(case, f, oracle, backend):
    arrays, groups = problem(SIZES[case])
    got = f(arrays, groups, backend)
    assert_close(got, oracle(arrays, groups))
    assert not np.asarray(got[0])[~held(SIZES[case], groups.rows)].any()
    for dw in got[2:]:
        assert not np.asarray(dw)[np.array(SIZES[case]) == 0].any()


@fast
@pytest.mark.parametrize("backend", BACKENDS)
def test_counted_flops_are_those_of_all_rows(backend):
    arrays, groups = problem(SIZES["mixed"])
    made = jax.make_jaxpr(lambda *z: ffn(*z, backend))(arrays, groups)
    assert jaxpr.dot_flops(made) == 3 * 6 * groups.rows * D * F


@fast
def test_bfloat16_sums_in_float32():
    arrays, groups = problem(SIZES["mixed"], jnp.bfloat16)
    wide = ffn_oracle(tuple(x.astype(np.float32) for x in arrays), groups)
    got = ffn(arrays, groups, "xla")
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    assert_close(got, wide, 0.02)


def test_inside_a_checked_shard_map():
    """Rows over both axes; weights over one, so that their gradients are summed over the other."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "ep"), (AxisType.Auto,) * 2)
    (x, w_in, w_out, dy), groups = problem(SIZES["mixed"])
    sizes = jnp.array([SIZES["mixed"][:2], SIZES["mixed"][2:]])

    def local(x, w_in, w_out, sizes):
        mine = Groups(sizes[0], BLOCK, groups.blocks)
        return grouped_ffn(x, w_in, w_out, mine)

    specs = P(("dp", "ep")), P("ep"), P("ep"), P("ep")
    f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(("dp", "ep")))
    x, dy = np.tile(x, (4, 1)), np.tile(dy, (4, 1))
    got = jax.jit(lambda *z: with_gradients(lambda *w: f(*w, sizes), *z))(x, w_in, w_out, dy)

    def whole(x, w_in, w_out):
        parts = [
            grouped.reference_ffn(
                x[i * groups.rows : (i + 1) * groups.rows],
                *(w[2 * (i % 2) : 2 * (i % 2) + 2] for w in (w_in, w_out)),
                Groups(sizes[i % 2], BLOCK, groups.blocks),
            )
            for i in range(4)
        ]
        return jnp.concatenate(parts)

    assert_close(got, jax.jit(partial(with_gradients, whole))(x, w_in, w_out, dy))


@fast
@pytest.mark.parametrize(
    ("sizes", "block"), [((5, 0, 9, 1), 4), ((0, 0, 15, 0), 4), ((1, 1, 1, 1), 8), ((0,) * 4, 16)]
)
def test_layout(sizes, block):
    groups = make_groups(np.array(sizes, np.int32), 15, block)
    starts, experts = jax.jit(lambda g: (g.starts_E, g.expert_of_block))(groups)
    want, start = [], []
    for e, size in enumerate(sizes):
        start.append(len(want) * block)
        want += [e] * -(-size // block)
    assert starts.tolist() == start
    assert experts.tolist() == want + [4] * (groups.blocks - len(want))


@fast
def test_most_blocks_is_reached_and_never_exceeded():
    for rows, experts, block in ((15, 4, 4), (3, 8, 4), (64, 1, 16), (100, 7, 16)):
        most, seen = grouped.most_blocks(rows, experts, block), 0
        for seed in range(200):
            rng = np.random.default_rng(seed)
            sizes = rng.multinomial(rows, rng.dirichlet(np.full(experts, 0.3)))
            seen = max(seen, int((-(-sizes // block)).sum()))
        n = min(rows, experts)
        worst = [1] * (n - 1) + [rows - n + 1]
        assert seen <= most == sum(-(-s // block) for s in worst)


@fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, a, b: (x[1:], a, b), r"x has 111 rows but groups have .* 7 · 16 = 112"),
        (lambda x, a, b: (x, a[1:], b), r"weights of 4 groups that take width 24 must be"),
        (lambda x, a, b: (x, a, b[:, 1:]), r"weights of 4 groups that take width 40 must be"),
        (lambda x, a, b: (x.astype(jnp.bfloat16), a, b), "bfloat16, float32 must be equal"),
    ],
)
def test_bad_input_says_what_to_change(change, message):
    (x, w_in, w_out, _), groups = problem(SIZES["mixed"])
    with pytest.raises(ValueError, match=message):
        grouped_ffn(*change(x, w_in, w_out), groups)


@fast
def test_blocks_that_a_kernel_cannot_cut():
    (x, w_in, w_out, _), groups = problem(SIZES["mixed"])
    groups = Groups(groups.sizes_E, groups.rows, 1)
    with pytest.raises(ValueError, match="block = 112 on the GPU: choose a power of two"):
        grouped_ffn(x, w_in, w_out, groups, backend="gpu")
    with pytest.raises(ValueError, match="block = 8 on the TPU: choose a multiple of 16"):
        grouped_ffn(x, w_in, w_out, Groups(groups.sizes_E, 8, 14), backend="tpu")


@fast
def test_choose_block_follows_the_rows_of_an_expert():
    found = [grouped.choose_block(rows, 8, name) for name in BACKENDS for rows in (64, 512, 65536)]
    assert found == [16, 32, 64, 16, 32, 512, 16, 32, 128]


# With the compilers
# -------------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.parametrize("platform", [*PLATFORMS, "v5p:2x2x1"])
@pytest.mark.parametrize(
    ("dtype", "D", "F", "block", "weights"),
    [(jnp.bfloat16, 200, 2056, 64, P("dp")), (jnp.float32, 2304, 300, 128, P())],
)
def test_forward_and_backward_compile(platform, dtype, D, F, block, weights, monkeypatch):
    """Inside shard_map with checked types, with the tiles that hardware gets and dims that are no
    multiples of them; weights of every device, and shared ones."""
    monkeypatch.undo()
    experts, blocks = 6, 11

    def local(x, w_in, w_out, sizes):
        return (grouped_ffn(x, w_in, w_out, Groups(sizes, block, blocks)),)

    copies = 2 if weights else 1
    avals = [
        ((2 * blocks * block, D), dtype, P("dp")),
        ((copies * experts, 2, D, F), dtype, weights),
        ((copies * experts, F, D), dtype, weights),
        ((2 * experts,), jnp.int32, P("dp")),
    ]
    assert kernels(compiled_text(platform, local, *avals)) == 6


@pytest.mark.aot
@pytest.mark.parametrize("name", count_experts.LAYERS)
def test_an_expert_layer_keeps_no_dense_buffer(name, monkeypatch):
    monkeypatch.undo()
    layer = count_experts.LAYERS[name]
    ours, ragged = (count_experts.temporaries(layer, "h100:1", how) for how in (True, False))
    assert ours <= 0.25 * ragged and ours <= 1.5 * layer.kept
    # Blocks of 512 rows, so more padding.
    assert count_experts.temporaries(layer, "v5p:2x2x1", True) <= 2 * layer.kept
