"""The byte oracle against programs whose communication is known by hand. Equal, not close."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from fdp.count import hlo
from fdp.count.hlo_text import replica_groups

pytestmark = pytest.mark.fast

P = PartitionSpec
AXES = ("dp", "cp", "tp")
SHAPE = {"dp": 2, "cp": 2, "tp": 2}
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(AXES, n)]
N = 8 * 16 * 4  # bytes of one device's float32 block [8, 16]


def mesh(order=range(8)):
    devices = np.array(jax.devices())[list(order)].reshape(2, 2, 2)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def vary(x):
    missing = tuple(a for a in AXES if a not in jax.typeof(x).mat.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def shard(f, m=None, extra=0):
    """f on blocks x[8, 16] that vary over all axes (and `extra` replicated arguments); outputs vary
    likewise.
    """
    specs = (P(AXES), *(P(),) * extra)
    return jax.shard_map(
        lambda *a: jax.tree.map(vary, f(*a)), mesh=m or mesh(), in_specs=specs, out_specs=P(AXES)
    )


def compiled_text(f, m=None, *extra):
    return (
        jax.jit(shard(f, m, len(extra)))
        .lower(jnp.zeros((64, 16), jnp.float32), *extra)
        .compile()
        .as_text()
    )


def rotate(x, axes):
    k = 2 ** len(axes)
    return lax.ppermute(x, axes, [(i, (i + 1) % k) for i in range(k)])


# op → (the call, payload bytes, wire bytes sent) for groups of k devices
BY_HAND = {
    "all-reduce": (lax.psum, lambda k: N, lambda k: 2 * (k - 1) / k * N),
    "all-gather": (
        lambda x, a: lax.all_gather(x, a, tiled=True),
        lambda k: k * N,
        lambda k: (k - 1) * N,
    ),
    "reduce-scatter": (
        lambda x, a: lax.psum_scatter(x, a, tiled=True),
        lambda k: N,
        lambda k: (k - 1) / k * N,
    ),
    "all-to-all": (
        lambda x, a: lax.all_to_all(x, a, 0, 0, tiled=True),
        lambda k: N,
        lambda k: (k - 1) / k * N,
    ),
    "collective-permute": (rotate, lambda k: N, lambda k: N),
}


@pytest.mark.parametrize("op", BY_HAND)
def test_every_op_on_every_axis_and_group(op):
    call, payload, wire = BY_HAND[op]
    text = compiled_text(lambda x: [call(x + i, axes) for i, axes in enumerate(SUBSETS)])
    found = {c.axes: c for c in hlo.collectives(text, SHAPE)}
    assert set(found) == set(SUBSETS)
    for axes in SUBSETS:
        k = 2 ** len(axes)
        c = found[axes]
        assert (c.op, c.group_size, c.count, c.dtype, c.is_async) == (op, k, 1, "f32", False)
        assert (c.payload_bytes, c.wire_bytes) == (payload(k), wire(k))


def test_device_ids_are_positions_in_the_mesh_whatever_the_device_order():
    text = compiled_text(lambda x: lax.psum(x, "cp"), mesh((3, 1, 2, 0, 7, 6, 5, 4)))
    assert [c.axes for c in hlo.collectives(text, SHAPE)] == [("cp",)]


def test_fused_all_reduce_sums_its_operands():
    text = compiled_text(lambda x: lax.psum((x, x[:3] * 2), "tp"))
    assert hlo.summary(hlo.collectives(text, SHAPE)) == {
        ("all-reduce", ("tp",)): (1, N + 3 * 16 * 4, N + 3 * 16 * 4)
    }


def test_axes_of_size_one_cost_nothing():
    shape = {"pp": 1, "dp": 2, "ep": 4}
    m = Mesh(
        np.array(jax.devices()).reshape(1, 2, 4), tuple(shape), axis_types=(AxisType.Auto,) * 3
    )

    def f(x):
        return lax.psum(x, ("pp", "dp")), lax.psum(x * 2, "pp")

    specs = (P(None, "ep"), P("dp", "ep"))
    g = jax.shard_map(f, mesh=m, in_specs=P(("pp", "dp"), "ep"), out_specs=specs)
    cols = hlo.collectives(jax.jit(g).lower(jnp.zeros((16, 64))).compile().as_text(), shape)
    assert [(c.axes, c.group_size, c.payload_bytes) for c in cols] == [(("dp",), 2, N)]


def nested(x):
    def inner(c, _):
        return vary(lax.psum(c * 0.5, "tp")), None

    def outer(c, _):
        c = lax.scan(inner, rotate(c, ("cp",)), None, length=3)[0]
        return c + vary(lax.psum(c, ("dp", "tp"))), None

    return vary(lax.psum(lax.scan(outer, x, None, length=5)[0], "dp"))


def test_trip_counts_multiply_through_nested_scans():
    assert hlo.summary(hlo.collectives(compiled_text(nested), SHAPE)) == {
        ("all-reduce", ("tp",)): (15, 15 * N, 15.0 * N),
        ("collective-permute", ("cp",)): (5, 5 * N, 5.0 * N),
        ("all-reduce", ("dp", "tp")): (5, 5 * N, 5 * 1.5 * N),
        ("all-reduce", ("dp",)): (1, N, 1.0 * N),
    }


def test_loop_bounded_by_data_is_an_error_that_the_caller_can_answer():
    def f(x, n):
        return lax.fori_loop(0, n[0], lambda i, c: vary(lax.psum(c, "tp")), x)

    text = compiled_text(f, None, jnp.zeros((1,), jnp.int32))
    with pytest.raises(ValueError, match=r"trip count of loop (\S+) .*trip_counts=") as error:
        hlo.collectives(text, SHAPE)
    name = str(error.value).split("loop ")[1].split()[0]
    assert [c.count for c in hlo.collectives(text, SHAPE, trip_counts={name: 7})] == [7]


def test_collective_in_a_loop_condition_runs_once_more_than_the_body():
    def f(x):
        def go(state):
            return (state[0] < 4) & (lax.psum(state[1].sum(), AXES) > -1e9)

        return lax.while_loop(go, lambda s: (s[0] + 1, s[1] * 0.5), (0, x))[1]

    text = compiled_text(f)
    with pytest.raises(ValueError, match="trip count"):
        hlo.collectives(text, SHAPE)
    name = next(line.split("=")[0].strip(" %") for line in text.splitlines() if " while(" in line)
    assert [
        (c.count, c.payload_bytes) for c in hlo.collectives(text, SHAPE, trip_counts={name: 4})
    ] == [(5, 4)]


def test_conditional_counts_the_chosen_branch():
    def f(x, i):
        branches = [
            lambda z: z,
            lambda z: vary(lax.psum(z, "dp")),
            lambda z: vary(lax.psum(z[:4], "tp")).repeat(2, 0),
        ]
        with jax.named_scope("route"):
            return lax.switch(i[0], branches, x)

    text = compiled_text(f, None, jnp.zeros((1,), jnp.int32))
    with pytest.raises(
        ValueError, match=r"branches of \S+ .*communicate differently: pass branches="
    ):
        hlo.collectives(text, SHAPE)
    expected = [[], [(("dp",), N)], [(("tp",), N // 2)]]
    for index, want in enumerate(expected):
        for branches in ({"cond": index}, {"route": index}, lambda name, n, i=index: i):
            cols = hlo.collectives(text, SHAPE, branches)
            assert [(c.axes, c.payload_bytes) for c in cols] == want
    with pytest.raises(ValueError, match=r"branch 3 was chosen .* 3 branches"):
        hlo.collectives(text, SHAPE, {"cond": 3})
    with pytest.raises(ValueError, match="communicate differently"):
        hlo.collectives(text, SHAPE, {"another": 1})


def test_branches_that_communicate_alike_need_no_choice():
    def f(x, i):
        return lax.switch(
            i[0], [lambda z: vary(lax.psum(z, "dp")), lambda z: vary(lax.psum(z * z, "dp"))], x
        )

    cols = hlo.collectives(compiled_text(f, None, jnp.zeros((1,), jnp.int32)), SHAPE)
    assert [(c.axes, c.count) for c in cols] == [(("dp",), 1)]


def test_gradient_of_a_tensor_and_data_parallel_layer():
    """x[4, 8] a device, w1[8, 8], w2[8, 8]: the activation over tp, the loss and both weight
    gradients over dp.
    """

    def step(x, w1, w2):
        def loss(w1, w2):
            y = lax.psum(jnp.sin(x @ w1) @ w2, "tp")
            return lax.psum((y * y).sum(), "dp")

        return jax.value_and_grad(loss, (0, 1))(w1, w2)

    specs = (P("dp"), P(None, "tp"), P("tp"))
    f = jax.shard_map(step, mesh=mesh(), in_specs=specs, out_specs=(P(), specs[1:]))
    text = (
        jax.jit(f)
        .lower(jnp.zeros((8, 8)), jnp.zeros((8, 16)), jnp.zeros((16, 8)))
        .compile()
        .as_text()
    )
    cols = hlo.collectives(text, SHAPE)
    assert hlo.bytes_per_axis(cols) == {("tp",): 4 * 8 * 4, ("dp",): 4 + 2 * 8 * 8 * 4}
    assert {c.op for c in cols} == {"all-reduce"}


# Spellings that CPU does not produce
# ---------------------------------------------------------------------------------

CP_GROUPS = [[0, 2], [1, 3], [4, 6], [5, 7]]
DP_TP_GROUPS = [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("spelling", "groups"),
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", CP_GROUPS),
        ("replica_groups={{0, 2}, {1, 3}, {4, 6}, {5, 7}}", CP_GROUPS),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", CP_GROUPS),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", DP_TP_GROUPS),
        ("replica_groups=[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['pp'=1,'dp'=2,'cp'=2,'tp'=2] {'cp'}", CP_GROUPS),
        ("replica_groups=mesh['dp'=2,'cp'=2,'tp'=2] {'dp','tp'}", DP_TP_GROUPS),
        ("replica_groups=mesh['dp'=2,'cp'=2,'tp'=2] {'tp','dp'}", [[0, 4, 1, 5], [2, 6, 3, 7]]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}", CP_GROUPS),
        (
            "replica_groups=mesh['axis_0'=8] {'axis_0':(1)2,'axis_0':(4)2}",
            [[0, 1, 4, 5], [2, 3, 6, 7]],
        ),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}",
            [[0, 2], [4, 6], [1, 3], [5, 7]],
        ),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,2,1,3,4,6,5,7) {'b'}", CP_GROUPS),
        ("replica_groups={}", [list(range(8))]),
        ("channel_id=1, replica_groups={{0}}, to_apply=%add", [list(range(8))]),
        ("source_target_pairs={{0,2},{2,0}}", [[0, 2], [2, 0]]),
    ],
)
def test_replica_group_spellings(spelling, groups):
    assert (
        replica_groups(f", channel_id=1, {spelling}, dimensions={{0}}, metadata={{}}", 8) == groups
    )


def test_axes_are_those_of_any_group():
    assert hlo.varying_axes([[0, 2], [0, 1], [3, 3]], SHAPE) == ("cp", "tp")
    assert hlo.varying_axes([[5]], SHAPE) == ()


def program(body, rest="", header=""):
    entry = f"ENTRY %main (p: f32[8,16]) -> f32[8,16] {{\n{body}\n}}\n"
    return f"HloModule jit_f{header}\n\n{rest}\n{entry}"


def only(text, **kwargs):
    (found,) = hlo.collectives(text, SHAPE, **kwargs)
    return found


A, G, H = "bf16[8,16]{1,0:T(8,128)(2,1)S(1)}", "bf16[16,16]{1,0}", "bf16[4,16]{1,0}"
U = "u32[]{:S(2)}"
PAIRS = "source_target_pairs={{0,2},{2,0}}"
SYNC = 'backend_config={"collective_backend_config":{"is_sync":true}}'


@pytest.mark.parametrize(
    ("result", "call", "attrs", "payload", "is_async"),
    [
        (f"(({A}), {A})", "all-reduce-start(%p)", "", 256, True),
        (A, "all-reduce-start(%p)", "", 256, True),
        (f"({A}, {A})", "all-reduce-start(%p, %p)", "", 512, True),
        (f"({A}, {G})", "all-gather-start(%p)", "", 512, True),
        (f"(({A}, {A}), ({G}, {G}))", "all-gather-start(%p, %p)", "", 1024, True),
        (f"({A}, {G})", "all-gather-start(%p)", SYNC, 512, False),
        (f"(({A}), {H})", "reduce-scatter-start(%p)", "dimensions={0}", 256, True),
        (f"(({A}), {A})", "all-to-all-start(%p)", "dimensions={0}", 256, True),
        (f"({A}, {A}, {U}, {U})", "collective-permute-start(%p)", PAIRS, 256, True),
        (A, f"all-reduce({A} %defined_elsewhere)", "", 256, False),
        ("s4[8,16]", "all-to-all(s4[8,16]{1,0} %packed)", "", 64, False),
        (
            A,
            "ragged-all-to-all(%p, %p, s64[2] %o, s64[2] %s, s64[2] %r, s64[2] %t)",
            "",
            256,
            False,
        ),
    ],
)
def test_start_done_pairs_and_tuple_results(result, call, attrs, payload, is_async):
    op = call.split("(")[0].removesuffix("-start")
    attrs = attrs if "pairs" in attrs else f"replica_groups={{{{0,2}},{{1,3}}}}, {attrs}"
    body = (
        f"  %p = {A} parameter(0)\n  %s = {result} {call}, {attrs}\n  ROOT %d = {A} {op}-done(%s)"
    )
    c = only(program(body))
    wire = payload if op in ("all-reduce", "collective-permute") else payload / 2
    assert (c.op, c.axes, c.group_size, c.count, c.is_async) == (op, ("cp",), 2, 1, is_async)
    assert (c.payload_bytes, c.wire_bytes) == (payload, wire)


def test_async_wrapper_counts_its_computation_once():
    wrapped = "%wrapped (q: f32[8,16]) -> f32[32,16] {\n  %q = f32[8,16] parameter(0)\n"
    wrapped += (
        "  ROOT %ag = f32[32,16] all-gather(%q), replica_groups={{0,2,4,6}}, dimensions={0}\n}\n"
    )
    body = "  %p = f32[8,16] parameter(0)\n"
    body += "  %s = ((f32[8,16]), f32[32,16], u32[]) async-start(%p), calls=%wrapped\n"
    body += "  %u = ((f32[8,16]), f32[32,16], u32[]) async-update(%s), calls=%wrapped\n"
    body += "  ROOT %d = f32[32,16] async-done(%u), calls=%wrapped"
    c = only(program(body, wrapped))
    assert (c.op, c.axes, c.payload_bytes, c.wire_bytes, c.is_async) == (
        "all-gather",
        ("dp", "cp"),
        4 * N,
        3 * N,
        True,
    )


def test_tpu_collective_spread_over_fusions_counts_once():
    """XLA:TPU repeats the collective in the start, in every matmul fusion beside it, and in the
    done.
    """
    part = (
        "%{0} (q{0}: f32[8,16]) -> f32[16,16] {{\n  %q{0} = f32[8,16] parameter(0)\n  ROOT %ag{0} "
        "= f32[16,16] "
        "all-gather(%q{0}), channel_id={1}, replica_groups={{{{0,1}}}}, "
        'frontend_attributes={{chain_id="{2}"}}\n}}\n'
    )
    rest = "".join(part.format(*a) for a in (("a", 3, 0), ("b", 3, 0), ("c", 3, 0), ("d", 4, 1)))
    body = "  %p = f32[8,16] parameter(0)\n"
    body += "  %async-collective-start = (f32[8,16], u32[]) fusion(%p), kind=kCustom, calls=%a\n"
    body += "  %fusion.5 = (f32[8,16], u32[]) fusion(%p), kind=kOutput, calls=%b\n"
    body += "  %async-collective-start.1 = (f32[8,16], u32[]) fusion(%p), kind=kCustom, calls=%d\n"
    body += "  ROOT %async-collective-done = f32[16,16] fusion(%p), kind=kCustom, calls=%c"
    cols = hlo.collectives(program(body, rest), SHAPE)
    assert [(c.computation, c.payload_bytes, c.is_async) for c in cols] == [
        ("a", 2 * N, True),
        ("d", 2 * N, True),
    ]


def test_tpu_fused_reduce_scatter_is_not_an_all_reduce():
    rest = "%all-reduce-scatter.3 (q: f32[8,16]) -> f32[4,16] {\n  %q = f32[8,16] parameter(0)\n"
    rest += "  %ar = f32[8,16] all-reduce(%q), replica_groups={{0,1}}, to_apply=%add\n"
    rest += "  ROOT %s = f32[4,16] dynamic-slice(%ar, %z)\n}\n"
    body = "  %p = f32[8,16] parameter(0)\n"
    body += "  ROOT %f = f32[4,16] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3"
    c = only(program(body, rest))
    assert (c.op, c.payload_bytes, c.wire_bytes) == ("reduce-scatter", N, N / 2)


REDUCE = """%x = f32[8,16] get-tuple-element(%c), index=1
  %ar = f32[8,16] all-reduce(%x), replica_groups={{0,1}}, to_apply=%add"""


def loop(name, compare, step, bound="%k = s32[]{:T(128)} constant(11)"):
    """A while without known_trip_count, as XLA:TPU writes it: carry (i, x, bound)."""
    carry = "(s32[], f32[8,16], s32[])"
    return f"""%{name}_cond (c: {carry}) -> pred[] {{
  %c = {carry} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%c), index=0
  {bound}
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %k), direction={compare}
}}
%{name}_body (c: {carry}) -> {carry} {{
  %c = {carry} parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=2
  {REDUCE}
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  ROOT %t = {carry} tuple(%next, %ar, %n)
}}
"""


def enter(name, start, n=11):
    return f"""  %p = f32[8,16] parameter(0)
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %n = s32[] constant({n})
  %t = (s32[], f32[8,16], s32[]) tuple(%copied, %p, /*index=2*/%n)
  %w = (s32[], f32[8,16], s32[]) while(%t), condition=%{name}_cond, body=%{name}_body
  ROOT %r = f32[8,16] get-tuple-element(%w), index=1"""


@pytest.mark.parametrize(
    ("compare", "start", "step", "trips"),
    [
        ("LT", 0, 1, 11),
        ("LE", 0, 1, 12),
        ("LT", 1, 3, 4),
        ("GT", 20, -2, 5),
        ("GE", 11, -1, 1),
        ("NE", 5, 2, 3),
    ],
)
def test_trip_count_inferred_from_condition_start_and_step(compare, start, step, trips):
    assert only(program(enter("l", start), loop("l", compare, step))).count == trips


def test_loop_that_never_runs_communicates_nothing():
    assert hlo.collectives(program(enter("l", 11), loop("l", "LT", 1)), SHAPE) == []


def test_inner_bound_may_pass_unchanged_through_the_outer_carry():
    bound = "%k = s32[] get-tuple-element(%c), index=2"
    inner = loop("in", "LT", 1, bound)
    outer = loop("out", "LT", 1).replace(
        REDUCE,
        "%x = f32[8,16] get-tuple-element(%c), index=1\n  %z = s32[] constant(0)\n"
        "  %s = (s32[], f32[8,16], s32[]) tuple(%z, %x, %n)\n"
        "  %v = (s32[], f32[8,16], s32[]) while(%s), condition=%in_cond, body=%in_body\n"
        "  %ar = f32[8,16] get-tuple-element(%v), index=1",
    )
    assert only(program(enter("out", 0, n=6), inner + outer)).count == 11 * 6
    changing = outer.replace("tuple(%next, %ar, %n)", "tuple(%next, %ar, %next)")
    with pytest.raises(ValueError, match=r"trip count of loop v .*trip_counts=\{'v': n\}"):
        hlo.collectives(program(enter("out", 0, n=6), inner + changing), SHAPE)


def test_compiler_and_caller_trip_counts_take_precedence():
    known = 'body=%l_body, backend_config={"known_trip_count":{"n":"3"}}'
    text = program(enter("l", 0).replace("body=%l_body", known), loop("l", "LT", 1))
    assert only(text).count == 3
    assert only(text, trip_counts={"w": 2}).count == 2


def test_predicated_conditional_orders_branches_as_jax_does():
    """XLA:GPU prints true first; index 0 is False."""
    branch = "%{0} (q{0}: f32[8,16]) -> f32[8,16] {{\n  %q{0} = f32[8,16] parameter(0)\n"
    branch += "  ROOT %r{0} = f32[8,16] "
    rest = branch.format("yes") + "all-reduce(%qyes), replica_groups={{0,1}}, to_apply=%add\n}\n"
    rest += branch.format("no") + "copy(%qno)\n}\n"
    body = "  %p = f32[8,16] parameter(0)\n  %b = pred[] constant(true)\n"
    body += "  ROOT %c = f32[8,16] conditional(%b, %p, %p), "
    body += "true_computation=%yes, false_computation=%no"
    assert hlo.collectives(program(body, rest), SHAPE, {"c": 0}) == []
    assert only(program(body, rest), branches={"c": 1}).axes == ("tp",)


def reduce_text(dtype="f32", operand="p", attrs="replica_groups={{0,1}}"):
    return program(
        f"  %p = {dtype}[8] parameter(0)\n  ROOT %a = {dtype}[8] all-reduce(%{operand}), {attrs}"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (program("", header=", num_partitions=4"), r"4 partitions but the mesh .* 8 devices"),
        ("HloModule m\n", "no ENTRY computation"),
        (reduce_text(attrs="replica_groups={{0,9}}"), "device 9, outside the mesh"),
        (reduce_text(dtype="q9"), "element type 'q9'"),
        (reduce_text(attrs="replica_groups=?"), "unreadable replica groups"),
        (reduce_text(operand="gone"), "operand gone of a is not defined in main"),
    ],
)
def test_what_cannot_be_read_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        hlo.collectives(text, SHAPE)


def test_summary_axes_and_table():
    cols = hlo.collectives(compiled_text(nested), SHAPE)
    assert hlo.bytes_per_axis(cols) == {
        ("tp",): 15 * N,
        ("cp",): 5 * N,
        ("dp", "tp"): 7.5 * N,
        ("dp",): N,
    }
    lines = hlo.table(cols).splitlines()
    assert lines[2].split() == ["all-reduce", "tp", "15", "0", f"{15 * N:,}", f"{15 * N:,}"]
    assert lines[3].split() == ["all-reduce", "dp·tp", "5", "0", f"{5 * N:,}", f"{7.5 * N:,.0f}"]
    assert len(lines) == 6
