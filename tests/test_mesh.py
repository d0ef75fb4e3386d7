"""Five axes, always: their order and types, factored axes, virtual devices, and what lies on which
device.
"""

import math
import re
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from build import program, tiny
from jax.sharding import AxisType, Mesh, PartitionSpec

from fdp import sharding
from fdp.collectives import all_to_all, index, psum, shard_map, shift, size, split
from fdp.count import hlo, jaxpr
from fdp.mesh import AXES, factor, is_virtual, make_mesh, use_virtual_devices
from fdp.sampling.draw import generation_mesh
from fdp.state import StateSpecs, TrainState
from fdp.step import TrainStep

pytestmark = pytest.mark.fast
P = PartitionSpec


def mesh_of(**degrees: int) -> Mesh:
    return make_mesh({a: degrees.get(a, 1) for a in AXES})


def program_of(zero: int = 0, **degrees: int) -> TrainStep:
    """A two-layer model."""
    c = {"model.heads": 8, "model.kv_heads": 8, "model.head_dim": 4, "train.zero": zero}
    return program(tiny(**c, **{f"mesh.{axis}": n for axis, n in degrees.items()}))


def test_all_five_axes_exist_outermost_first_and_are_automatic() -> None:
    mesh = mesh_of(dp=2, tp=4)
    assert AXES == ("pp", "dp", "ep", "cp", "tp")
    assert dict(mesh.shape) == {"pp": 1, "dp": 2, "ep": 1, "cp": 1, "tp": 4}
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Auto,) * 5


def test_tensor_parallel_neighbours_are_neighbouring_devices() -> None:
    ids = np.vectorize(lambda d: d.id)(mesh_of(dp=2, cp=2, tp=2).devices).reshape(2, 2, 2)
    assert ids.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_a_smaller_product_takes_the_first_devices_unless_devices_are_given() -> None:
    assert [d.id for d in mesh_of(tp=2).devices.flat] == [0, 1]
    with pytest.raises(ValueError, match=r"1·1·1·1·2 = 2 devices are needed but 4 cpu device"):
        make_mesh({a: 2 if a == "tp" else 1 for a in AXES}, jax.devices()[:4])


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_factoring_an_axis_keeps_devices_and_their_order(degree: int) -> None:
    mesh = mesh_of(cp=degree)
    split = factor(mesh, "cp")
    n = degree.bit_length() - 1
    middle = tuple(f"cp{i}" for i in range(n)) or ("cp",)
    assert split.axis_names == ("pp", "dp", "ep", *middle, "tp")
    assert split.size == mesh.size
    assert split.axis_types == (AxisType.Auto,) * len(split.axis_names)
    assert list(split.devices.flat) == list(mesh.devices.flat)


def collect(
    mesh: Mesh, spec: PartitionSpec, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum over cp, index along cp, degree of cp) as each device sees them, stacked along the first
    dim.
    """

    def local(y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        i = jnp.full((1,), index("cp"), jnp.int32)
        return psum(y * (1 + i), "cp"), i, jnp.full((1,), size("cp"), jnp.int32) + 0 * i

    out_specs = (P(None, *spec[1:]), P(spec[0]), P(spec[0]))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=out_specs))(x)


def test_a_logical_axis_means_all_of_its_factors() -> None:
    mesh = mesh_of(cp=4, tp=2)
    x = jnp.arange(4 * 6, dtype=jnp.float32).reshape(4, 6)
    whole = collect(mesh, P("cp", "tp"), x)
    factored = collect(factor(mesh, "cp"), P(("cp0", "cp1"), "tp"), x)
    chex.assert_trees_all_equal(factored, whole)
    assert whole[1].tolist() == [0, 1, 2, 3]
    assert whole[2].tolist() == [4] * 4
    np.testing.assert_array_equal(whole[0][0], (x * np.arange(1, 5)[:, None]).sum(0))


def test_shift_and_all_to_all_move_what_their_names_say() -> None:
    x = jnp.arange(16.0).reshape(4, 4)  # a row for each device
    names = []

    def moved(x):
        names.append(split("cp", 2))
        return (
            *(shift(x, "cp", by) for by in (1, -1, 4)),
            *(shift(x, "cp", by, cyclic=False) for by in (1, -2)),
            all_to_all(x, "cp", 1, 0),
        )

    mesh = factor(mesh_of(cp=4), "cp")
    specs = (*[P("cp")] * 5, P(None, "cp"))
    *shifted, exchanged = jax.jit(shard_map(moved, mesh, P("cp"), specs))(x)
    rows, zero = np.asarray(x), np.zeros((1, 4))
    wanted = [np.roll(rows, by, 0) for by in (1, -1, 0)]
    wanted += [np.concatenate([zero, rows[:-1]]), np.concatenate([rows[2:], zero, zero])]
    chex.assert_trees_all_equal(shifted, wanted)
    np.testing.assert_array_equal(exchanged, rows)
    assert names == [(("cp0",), ("cp1",))]
    # Where nothing is bound there is one device: itself, and nothing before or after it.
    alone = shift(x, "cp"), all_to_all(x, "cp", 1, 0), shift(x, "cp", cyclic=False)
    chex.assert_trees_all_equal(alone, (x, x, 0 * x))
    assert split("cp", 1) == ((), ())


def test_only_powers_of_two_can_be_factored() -> None:
    with pytest.raises(
        ValueError, match=r"^mesh\.cp=6 is not a power of two: only powers of two split into binary"
    ):
        factor(mesh_of(cp=6), "cp")


def test_virtual_devices_asked_for_too_late_say_where_to_ask() -> None:
    use_virtual_devices(8)  # as many as there are: nothing to complain about
    with pytest.raises(RuntimeError) as error:
        use_virtual_devices(16)
    assert str(error.value) == (
        "16 devices are needed but JAX has already started with 8: "
        "call fdp.mesh.use_virtual_devices(16) before anything touches a device"
    )
    assert jax.device_count() == 8


def test_several_devices_of_one_processor_are_virtual_and_a_single_one_is_not() -> None:
    assert is_virtual(jax.devices())
    assert not is_virtual(jax.devices()[:1])


def test_generation_folds_the_data_axes_into_dp_on_the_same_devices() -> None:
    mesh = mesh_of(dp=2, cp=2, tp=2)
    folded = generation_mesh(mesh)
    assert dict(folded.shape) == {"pp": 1, "dp": 4, "ep": 1, "cp": 1, "tp": 2}
    assert list(folded.devices.flat) == list(mesh.devices.flat)
    assert folded.axis_types == mesh.axis_types


MESHES = {
    "one device": {},
    "dp2": {"dp": 2},
    "dp2, ZeRO-1": {"dp": 2, "zero": 1},
    "dp8": {"dp": 8},
    "dp8, ZeRO-3": {"dp": 8, "zero": 3},
    "tp8": {"tp": 8},
    "ep2·cp4": {"ep": 2, "cp": 4},
    "dp2·cp2·tp2, ZeRO-1": {"dp": 2, "cp": 2, "tp": 2, "zero": 1},
    "dp4·tp2, ZeRO-3": {"dp": 4, "tp": 2, "zero": 3},
}


@cache
def initial(name: str) -> tuple[StateSpecs, TrainState]:
    """Specs and the fresh state on one of the meshes."""
    p = program_of(**MESHES[name])
    return p.specs, p.init(0)


@pytest.mark.parametrize("name", [n for n in MESHES if n != "one device"])
def test_parameters_are_initialised_equal_up_to_rounding_on_every_mesh(name: str) -> None:
    specs, state = initial(name)
    # The random bits are equal; on jax 0.12 the rounding of a float depends on how XLA vectorised
    # its shard.
    jax.tree.map(
        partial(np.testing.assert_array_max_ulp, maxulp=2),
        *(jax.device_get(s.params) for s in (state, initial("one device")[1])),
    )
    for leaf, wanted in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(specs.state_shardings().params), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name


def stored_bytes(tree: Any) -> int:
    """Bytes that really lie on device 0, scalars aside."""
    shards = (s for x in jax.tree.leaves(tree) if x.ndim for s in x.addressable_shards)
    return sum(s.data.nbytes for s in shards if s.device.id == 0)


@pytest.mark.parametrize("name", MESHES)
def test_the_report_names_every_parameter_with_the_bytes_that_lie_on_a_device(name: str) -> None:
    specs, state = initial(name)
    lines = sharding.report(specs.shapes, specs.stored, specs.mesh).splitlines()
    rows = {cells[0]: cells for cells in (re.split(r" {2,}", line.strip()) for line in lines[2:])}
    total = int(rows.pop("total")[1].replace(",", ""))
    leaves = jax.tree_util.tree_leaves_with_path(specs.shapes)
    assert rows.keys() == {"/".join(str(k.key) for k in path) for path, _ in leaves}
    listed = sum(int(cells[3].replace(",", "")) for cells in rows.values())
    assert listed == total == stored_bytes(state.params)


def test_a_gpu_gathers_a_layer_in_another_order_and_gets_the_same(monkeypatch) -> None:
    """Values, gradients, and bytes."""
    stored, mesh = P(None, None, "dp"), mesh_of(dp=4)
    x = np.arange(48, dtype=np.float32).reshape(3, 2, 8)

    def local(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole, pull = jax.vjp(lambda x: sharding._gathered(x, P(None, *stored), 1), x)
        return whole[None], pull(whole)[0]

    found = []
    for platform in ("xla", "gpu"):
        monkeypatch.setattr(sharding, "choose_backend", lambda _, platform=platform: platform)
        program = jax.jit(shard_map(partial(local), mesh, (stored,), (P("dp"), stored)))
        sent = jaxpr.collectives(jax.make_jaxpr(program)(x), dict(mesh.shape))
        found.append((jax.device_get(program(x)), hlo.summary(sent)))
    (values, sent), (want, want_sent) = found
    chex.assert_trees_all_equal(values, want)
    np.testing.assert_array_equal(values[0], np.broadcast_to(x, (4, *x.shape)))
    np.testing.assert_array_equal(values[1], 4 * x)
    assert sent == want_sent and len(sent) == 2


@pytest.mark.parametrize(("whole", "sharded"), [("dp2", "dp2, ZeRO-1"), ("dp8", "dp8, ZeRO-3")])
def test_zero_stores_a_dp_th_of_parameters_and_moments(whole: str, sharded: str) -> None:
    stored = stored_bytes(initial(whole)[1].params)
    _, state = initial(sharded)
    dp = MESHES[sharded]["dp"]
    assert stored_bytes(state.params) * dp == stored
    assert stored_bytes(state.opt_state) * dp == 2 * stored


def test_zero_adds_to_tensor_parallelism_and_leaves_indivisible_parameters_whole() -> None:
    layout = program_of(zero=1, dp=4, tp=2).specs
    for shape, spec, stored in zip(
        jax.tree.leaves(layout.shapes),
        jax.tree.leaves(layout.specs, is_leaf=lambda s: isinstance(s, P)),
        jax.tree.leaves(layout.stored, is_leaf=lambda s: isinstance(s, P)),
        strict=True,
    ):
        assert [e for e in stored if e not in ("dp", None)] == [e for e in spec if e is not None]
        ways = 4 * math.prod(2 for e in spec if e == "tp")
        assert sharding.bytes_per_device(shape.shape, stored, layout.mesh) * ways == shape.size * 4
    odd = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    assert sharding.stored_specs({"w": odd}, {"w": P()}, 1, 4) == {"w": P(None, None)}
