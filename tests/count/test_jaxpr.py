"""Logical collectives and FLOPs of programs whose figures are known by hand. Equal, not close."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from fdp.count import hlo, jaxpr

pytestmark = pytest.mark.fast

P = PartitionSpec
AXES = ("dp", "cp", "tp")
SHAPE = {"dp": 2, "cp": 2, "tp": 2}
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(AXES, n)]
N = 8 * 16 * 2  # bytes of one device's bfloat16 block [8, 16]
X = jax.ShapeDtypeStruct((64, 16), jnp.bfloat16)


def vary(x):
    missing = tuple(a for a in AXES if a not in jax.typeof(x).mat.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def trace(f, *extra):
    """Jaxpr of f on blocks x[8, 16] that vary over all axes, on a mesh without devices."""
    mesh = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    specs = (P(AXES), *(P(),) * len(extra))
    g = jax.shard_map(
        lambda *a: jax.tree.map(vary, f(*a)), mesh=mesh, in_specs=specs, out_specs=P(AXES)
    )
    return jax.make_jaxpr(jax.jit(g))(X, *extra)


def rotate(x, axes):
    k = 2 ** len(axes)
    return lax.ppermute(x, axes, [(i, (i + 1) % k) for i in range(k)])


def gather(x, axes, to="varying"):
    return lax.all_gather(x, axes, tiled=True, to=to)


BY_HAND = {
    "psum": ("all-reduce", lax.psum, lambda k: N, lambda k: 2 * (k - 1) / k * N),
    "pmax": ("all-reduce", lax.pmax, lambda k: N, lambda k: 2 * (k - 1) / k * N),
    "pmin": ("all-reduce", lax.pmin, lambda k: N, lambda k: 2 * (k - 1) / k * N),
    "all_gather": ("all-gather", gather, lambda k: k * N, lambda k: (k - 1) * N),
    "all_gather_invariant": (
        "all-gather",
        lambda x, a: gather(x, a, "invarying"),
        lambda k: k * N,
        lambda k: (k - 1) * N,
    ),
    "psum_scatter": (
        "reduce-scatter",
        lambda x, a: lax.psum_scatter(x, a, tiled=True),
        lambda k: N,
        lambda k: (k - 1) / k * N,
    ),
    "all_to_all": (
        "all-to-all",
        lambda x, a: lax.all_to_all(x, a, 0, 0, tiled=True),
        lambda k: N,
        lambda k: (k - 1) / k * N,
    ),
    "ppermute": ("collective-permute", rotate, lambda k: N, lambda k: N),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_every_primitive_on_every_axis_and_group(name):
    op, call, payload, wire = BY_HAND[name]
    cols = jaxpr.collectives(trace(lambda x: [call(x, axes) for axes in SUBSETS]), SHAPE)
    assert [c.axes for c in cols] == SUBSETS
    for c in cols:
        k = 2 ** len(c.axes)
        assert (c.op, c.group_size, c.count, c.dtype) == (op, k, 1, "bf16")
        assert (c.payload_bytes, c.wire_bytes) == (payload(k), wire(k))


def test_permute_counts_the_axes_that_really_move():
    perm = [(0, 1), (1, 0), (2, 3), (3, 2)]
    cols = jaxpr.collectives(trace(lambda x: lax.ppermute(x, ("dp", "cp"), perm)), SHAPE)
    assert [(c.axes, c.group_size, c.payload_bytes) for c in cols] == [(("cp",), 2, N)]
    assert jaxpr.collectives(trace(lambda x: lax.ppermute(x, "cp", [(0, 0), (1, 1)])), SHAPE) == []


def test_types_that_vary_are_not_communication():
    assert (
        jaxpr.collectives(
            trace(lambda x: x * vary(jnp.ones(16, x.dtype)) + lax.axis_index("dp")), SHAPE
        )
        == []
    )


def test_axes_of_size_one_cost_nothing_and_unknown_axes_are_an_error():
    closed = trace(lambda x: lax.psum(x, ("dp", "tp")))
    assert [c.axes for c in jaxpr.collectives(closed, {"dp": 2, "cp": 2, "tp": 1})] == [("dp",)]
    assert jaxpr.collectives(closed, {"dp": 1, "cp": 2, "tp": 1}) == []
    with pytest.raises(ValueError, match=r"names axes \['tp'\]"):
        jaxpr.collectives(closed, {"dp": 2, "cp": 2})


def test_scan_lengths_multiply_through_jit_remat_and_custom_vjp():
    @jax.custom_vjp
    def twice(x):
        return rotate(x, ("cp",)) * 2

    twice.defvjp(lambda x: (twice(x), None), lambda _, g: (g,))

    def inner(c, _):
        return jax.jit(lambda y: vary(lax.psum(y, "tp")))(c), None

    def outer(c, _):
        return lax.scan(jax.checkpoint(inner), twice(c), None, length=3)[0], None

    closed = trace(
        lambda x: lax.fori_loop(
            0, 7, lambda i, c: vary(lax.psum(c, "dp")), lax.scan(outer, x, None, 5)[0]
        )
    )
    assert hlo.summary(jaxpr.collectives(closed, SHAPE)) == {
        ("collective-permute", ("cp",)): (5, 5 * N, 5.0 * N),
        ("all-reduce", ("tp",)): (15, 15 * N, 15.0 * N),
        ("all-reduce", ("dp",)): (7, 7 * N, 7.0 * N),
    }


def test_loop_bounded_by_data_is_an_error_only_if_it_communicates():
    n = jax.ShapeDtypeStruct((), jnp.int32)
    silent = trace(lambda x, n: lax.fori_loop(0, n, lambda i, c: c * 2, x), n)
    assert jaxpr.collectives(silent, SHAPE) == []
    closed = trace(lambda x, n: lax.fori_loop(0, n, lambda i, c: vary(lax.psum(c, "tp")), x), n)
    with pytest.raises(
        ValueError, match=r"while holds what is counted, but its trip count is data"
    ):
        jaxpr.collectives(closed, SHAPE)


def test_switch_counts_the_chosen_branch():
    def f(x, i):
        branches = [lambda z: z, lambda z: vary(lax.psum(z, "dp")), lambda z: z @ z.T @ z]
        with jax.named_scope("route"):
            return lax.switch(i, branches, x)

    closed = trace(f, jax.ShapeDtypeStruct((), jnp.int32))
    with pytest.raises(ValueError, match=r"branches of \S*cond differ .*pass branches="):
        jaxpr.collectives(closed, SHAPE)
    for branches in ({"route": 1}, {"cond": 1}, lambda path, n: n - 2):
        assert [(c.axes, c.count) for c in jaxpr.collectives(closed, SHAPE, branches)] == [
            (("dp",), 1)
        ]
    assert jaxpr.collectives(closed, SHAPE, {"route": 2}) == []
    assert jaxpr.dot_flops(closed, SHAPE, {"route": 2}) == 2 * (2 * 8 * 8 * 16)
    with pytest.raises(ValueError, match="differ"):
        jaxpr.dot_flops(closed, SHAPE)


def test_cpu_program_widens_bfloat16_and_the_jaxpr_does_not():
    """The trap that makes both counts necessary; in float32 they agree."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    f = jax.shard_map(lambda x: gather(x, "tp"), mesh=mesh, in_specs=P(AXES), out_specs=P(AXES))
    found = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jnp.zeros((64, 16), dtype)
        text = jax.jit(f).lower(x).compile().as_text()
        logical = jaxpr.collectives(jax.make_jaxpr(f)(x), SHAPE)
        found[x.dtype.name] = [
            hlo.bytes_per_axis(c)["tp",] for c in (logical, hlo.collectives(text, SHAPE))
        ]
    assert found == {"bfloat16": [N, 2 * N], "float32": [2 * N, 2 * N]}


def layer_gradient():
    """x[4, 8] a device, w1[8, 8], w2[8, 8]; tensor and data parallel."""

    def step(x, w1, w2):
        def loss(w1, w2):
            y = lax.psum(jnp.sin(x @ w1) @ w2, "tp")
            return lax.psum((y * y).sum(), "dp")

        return jax.value_and_grad(loss, (0, 1))(w1, w2)

    mesh = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    specs = (P("dp"), P(None, "tp"), P("tp"))
    f = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), specs[1:]))
    return jax.make_jaxpr(f)(jnp.zeros((8, 8)), jnp.zeros((8, 16)), jnp.zeros((16, 8)))


def test_gradient_program_bytes_and_flops():
    closed = layer_gradient()
    cols = jaxpr.collectives(closed, SHAPE)
    assert hlo.bytes_per_axis(cols) == {("tp",): 4 * 8 * 4, ("dp",): 4 + 2 * 8 * 8 * 4}
    assert {(c.op, c.dtype) for c in cols} == {("all-reduce", "f32")}
    # forward two matmuls, backward the gradients of w1, w2 and of the hidden layer; x needs none
    assert jaxpr.dot_flops(closed, SHAPE) == 5 * (2 * 4 * 8 * 8)


def flops(f, *shapes, **kwargs):
    return jaxpr.dot_flops(
        jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)), **kwargs
    )


def test_flops_of_matmuls_by_hand():
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert (
        flops(lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b), (2, 3, 5, 7), (2, 3, 11, 7))
        == 2 * 6 * 5 * 11 * 7
    )
    assert (
        flops(lambda a, b: jnp.einsum("abc,cad->bd", a, b), (2, 3, 5), (5, 2, 7)) == 2 * 3 * 10 * 7
    )
    assert flops(lambda a: jnp.sin(a) + a.sum(), (3, 5)) == 0


def test_flops_of_scans_gradients_and_remat():
    def f(a, w):
        return lax.scan(lambda c, _: (jnp.sin(c @ w), None), a, None, length=6)[0].sum()

    one = 2 * 4 * 8 * 8
    assert flops(f, (4, 8), (8, 8)) == 6 * one
    both = jax.value_and_grad(f, (0, 1))
    again = jax.value_and_grad(jax.checkpoint(f), (0, 1))
    assert flops(both, (4, 8), (8, 8)) == 18 * one
    assert flops(again, (4, 8), (8, 8)) == 24 * one
    # Without the value nobody reads the forward pass that will be run again.
    assert flops(jax.grad(jax.checkpoint(f), (0, 1)), (4, 8), (8, 8)) == 18 * one


def test_what_nobody_reads_is_not_counted():
    def f(a, b):
        _ = jax.nn.logsumexp(a @ b)
        return a.sum()

    assert flops(f, (4, 8), (8, 8)) == 0
    assert flops(lambda a, b: (f(a, b), a @ b), (4, 8), (8, 8)) == 2 * 4 * 8 * 8


def test_flops_of_convolution_and_ragged_matmul():
    def conv(x, k):
        return lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert flops(conv, (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * (2 * 6 * 6 * 5) * (3 * 3 * 3)
    x, w, sizes = jnp.zeros((10, 4)), jnp.zeros((3, 4, 6)), jnp.array([5, 2, 3])
    assert jaxpr.dot_flops(jax.make_jaxpr(lax.ragged_dot)(x, w, sizes)) == 2 * 10 * 4 * 6
    total = lambda x, w: lax.ragged_dot(x, w, sizes).sum()
    grad = jax.make_jaxpr(jax.value_and_grad(total, (0, 1)))(x, w)
    assert jaxpr.dot_flops(grad) == 3 * (2 * 10 * 4 * 6)


def test_flops_inside_shard_map_are_local_and_outside_need_no_mesh():
    w = jax.ShapeDtypeStruct((16, 32), jnp.bfloat16)
    assert jaxpr.dot_flops(trace(lambda x, w: x @ w, w), SHAPE) == 2 * 8 * 16 * 32
    closed = jax.make_jaxpr(lambda x, w: x @ w)(X, w)
    assert jaxpr.dot_flops(closed) == 2 * 64 * 16 * 32
    with pytest.raises(ValueError, match="dot_general at top level stands outside shard_map"):
        jaxpr.dot_flops(closed, SHAPE)


def test_flops_of_a_pallas_kernel_are_those_it_states():
    from jax.experimental import pallas as pl

    def kernel(
        n_ref, x_ref, o_ref
    ):  # as many products as the data say: nothing to count from outside
        o_ref[...] = lax.fori_loop(0, n_ref[0], lambda i, x: x @ x_ref[...], x_ref[...])

    def f(n, x):
        estimate = pl.CostEstimate(flops=12345, transcendentals=0, bytes_accessed=0)
        shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        y = pl.pallas_call(kernel, grid=(4,), out_shape=shape, cost_estimate=estimate)(n, x)
        return y @ x

    made = jax.make_jaxpr(f)(jnp.ones(1, jnp.int32), jnp.ones((8, 8)))
    assert jaxpr.dot_flops(made) == 12345 + 2 * 8**3


def test_flops_of_a_pallas_kernel_multiply_by_its_grid():
    from jax.experimental import pallas as pl

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def f(x, w):
        blocks = [pl.BlockSpec((8, 16), lambda i: (i, 0)), pl.BlockSpec((16, 32), lambda i: (0, 0))]
        shape = jax.ShapeDtypeStruct((64, 32), jnp.float32)
        out = pl.BlockSpec((8, 32), lambda i: (i, 0))
        return pl.pallas_call(kernel, grid=(8,), in_specs=blocks, out_specs=out, out_shape=shape)(
            x, w
        )

    assert flops(f, (64, 16), (16, 32)) == 2 * 64 * 16 * 32


DTYPES = [
    ("float32", "f32", 4),
    ("int8", "s8", 1),
    ("uint4", "u4", 0.5),
    ("float8_e5m2", "f8e5m2", 1),
    ("bool", "pred", 1),
]


@pytest.mark.parametrize(("dtype", "name", "size"), DTYPES)
def test_dtypes_in_hlo_spelling(dtype, name, size):
    mesh = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    f = jax.shard_map(lambda x: rotate(x, ("cp",)), mesh=mesh, in_specs=P(AXES), out_specs=P(AXES))
    (c,) = jaxpr.collectives(jax.make_jaxpr(f)(jax.ShapeDtypeStruct((64, 16), dtype)), SHAPE)
    assert (c.dtype, c.payload_bytes) == (name, 128 * size)
