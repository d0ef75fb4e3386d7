"""Bytes by (op, axes) of a compiled program, formula against count, values against one device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import psum, shard_map
from fdp.count import compare
from fdp.count.compare import Comparison, Mismatch, Outcome, against_one_device, relative_error
from fdp.mesh import AXES, factor, make_mesh

pytestmark = pytest.mark.fast

DP, TP, BOTH = ("all-reduce", ("dp",)), ("all-reduce", ("tp",)), ("all-reduce", ("dp", "tp"))


def test_mismatches_name_key_formula_and_count_in_order() -> None:
    counted = {TP: 8.0, DP: 5.0, BOTH: 1e9 + 1}
    assert compare.mismatches({DP: 4.0, BOTH: 1e9, TP: 8.0}, counted) == [
        Mismatch(DP, 4.0, 5.0),
        Mismatch(BOTH, 1e9, 1e9 + 1),
    ]
    assert compare.mismatches({}, {TP: 8.0}) == [Mismatch(TP, 0.0, 8.0)]
    assert compare.mismatches({TP: 8.0}, {}) == [Mismatch(TP, 8.0, 0.0)]
    assert compare.mismatches({TP: 1 / 3}, {TP: 1 - 2 / 3}) == []  # of floating point, not a byte
    assert compare.mismatches({TP: math.nan}, {TP: math.nan})


def test_bytes_count_entries_of_both_sides() -> None:
    both = compare.Bytes({DP: 4.0, TP: 8.0}, {TP: 8.0, BOTH: 1.0})
    assert both.entries == 3 and [m.key for m in both.mismatches()] == [DP, BOTH]


def test_relative_error_is_of_the_whole_tree() -> None:
    want = {"a": np.array([3.0, 0.0]), "b": np.array(4.0, np.float32)}
    got = {"a": np.array([3.0, 0.3]), "b": np.array(4.4, np.float32)}
    assert compare.norm(want) == 5
    assert relative_error(got, want) == pytest.approx(0.1)
    assert relative_error(want, want) == 0
    assert relative_error(2.0, 0.0) == math.inf and relative_error(0.0, 0.0) == 0


def test_no_bound_holds_of_a_nan() -> None:
    for pair in ((math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan)):
        assert not relative_error(*pair) <= 1e30
    assert not relative_error(math.nan, 0.0) <= 1e30


def test_trees_of_other_shape_or_structure_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        relative_error(np.ones(2), np.ones(1))
    with pytest.raises(ValueError, match=r"b|structure|arity"):
        relative_error({"a": 1.0}, {"a": 1.0, "b": 2.0})


def test_values_and_gradients_are_compared_apart() -> None:
    got = jnp.float32(1.5), {"w": jnp.ones(4)}
    assert against_one_device(got, (1.0, {"w": np.full(4, 2.0)})) == (0.5, 0.5)
    want = Outcome(2.0, {"w": np.full(4, 1.0)}, {})
    c = Comparison.of("tp2", Outcome(2.0, {"w": np.full(4, 1.5)}, {TP: 8.0}), want, {TP: 8.0})
    assert (c.name, c.output_error, c.gradient_error) == ("tp2", 0.0, 0.5)
    assert not c.mismatches()


@pytest.mark.parametrize("factored", [False, True])
def test_sent_names_the_axis_of_sub_axes(factored: bool) -> None:
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"cp": 4, "tp": 2})
    mesh = factor(mesh, "cp") if factored else mesh
    names = ("cp0", "cp1") if factored else "cp"

    def local(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved = jax.lax.ppermute(x, names, [(i, (i + 1) % 4) for i in range(4)])
        return psum(moved, "cp"), psum(jnp.sin(x), ("cp", "tp"))

    program = jax.jit(shard_map(local, mesh, P("cp", "tp"), (P(None, "tp"), P())))
    shard = 4 * 2 * 2  # bytes of float32 [8, 4] on one device
    assert compare.sent(program.lower(jnp.ones((8, 4))).compile(), mesh) == {
        ("collective-permute", ("cp",)): shard,
        ("all-reduce", ("cp",)): 2 * 3 / 4 * shard,
        ("all-reduce", ("cp", "tp")): 2 * 7 / 8 * shard,
    }
