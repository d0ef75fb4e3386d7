"""Sequence layouts: permutations, what devices hold, and the refusals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from fdp.collectives import shard_map
from fdp.mesh import factor, make_mesh
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout

pytestmark = pytest.mark.fast

LAYOUTS = st.one_of(
    st.just(CONTIGUOUS),
    st.just(ZIGZAG),
    st.builds(lambda b: SequenceLayout("striped", b), st.integers(1, 5)),
)


@settings(deadline=None, max_examples=50)
@given(layout=LAYOUTS, cp=st.integers(1, 9), times=st.integers(1, 4))
def test_permute_is_undone_and_devices_hold_everything_once(
    layout: SequenceLayout, cp: int, times: int
) -> None:
    length = layout.unit(cp)[0] * times
    order = layouts.permutation(layout, length, cp)
    assert sorted(order) == list(range(length))
    batch = {
        "tokens": np.arange(2 * length).reshape(2, length),
        "weights": np.random.rand(2, length, 3),
    }
    there = layouts.permute(batch, layout, cp)
    assert (there["tokens"][0] == order).all() and (there["tokens"][1] == order + length).all()
    back = layouts.permute(there, layout, cp, undo=True)
    chex.assert_trees_all_equal(back, batch)


def test_what_devices_hold() -> None:
    assert layouts.permutation(CONTIGUOUS, 8, 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert layouts.permutation(ZIGZAG, 8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert layouts.permutation(SequenceLayout("striped"), 8, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert layouts.permutation(SequenceLayout("striped", 2), 8, 2).tolist() == [
        0,
        1,
        4,
        5,
        2,
        3,
        6,
        7,
    ]


def test_neighbours_of_a_zigzag_are_a_zigzag() -> None:
    """Trailing sub-axes pool neighbours: the ring of the others is balanced for every head split
    (cp.md 1.2).
    """
    for u in (2, 4):
        pooled = layouts.permutation(ZIGZAG, 64, 8).reshape(8 // u, -1)
        smaller = layouts.permutation(ZIGZAG, 64, 8 // u).reshape(8 // u, -1)
        assert (np.sort(pooled) == np.sort(smaller)).all()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("layout", [CONTIGUOUS, ZIGZAG, SequenceLayout("striped", 2)])
def test_positions_inside_shard_map_are_the_permutation(
    layout: SequenceLayout, split: bool
) -> None:
    mesh = make_mesh({"pp": 1, "dp": 1, "ep": 1, "cp": 8, "tp": 1})
    mesh = factor(mesh, "cp") if split else mesh
    axes = P(tuple(n for n in mesh.shape if n.startswith("cp")))
    f = shard_map(lambda x: layouts.positions(layout, len(x)), mesh, axes, axes)
    got = jax.jit(f)(jnp.zeros(32))
    assert (
        got.dtype == jnp.int32
        and np.asarray(got).tolist() == layouts.permutation(layout, 32, 8).tolist()
    )
    assert layouts.positions(layout, 32).tolist() == list(range(32))  # cp unbound


def test_refusals_give_equation_values_and_fix() -> None:
    with pytest.raises(
        ValueError, match=r"60 is not divisible by 2·cp = 16 \(zig-zag\): set data.seq_len=64"
    ):
        layouts.check_length(ZIGZAG, 60, 8)
    with pytest.raises(ValueError, match=r"0 is not divisible by cp = 8"):
        layouts.check_length(CONTIGUOUS, 0, 8)
    with pytest.raises(ValueError, match="'spiral' is unknown"):
        SequenceLayout("spiral")
    with pytest.raises(ValueError, match="block = 2"):
        SequenceLayout("zigzag", 2)
    with pytest.raises(ValueError, match="block = 0"):
        SequenceLayout("striped", 0)
    with pytest.raises(ValueError, match=r"lengths \[16, 32\] differ"):
        layouts.permute([np.zeros((1, 16)), np.zeros((1, 32))], ZIGZAG, 2)
    with pytest.raises(ValueError, match="needs a sequence dim 1"):
        layouts.permute([np.zeros(16)], ZIGZAG, 2)
