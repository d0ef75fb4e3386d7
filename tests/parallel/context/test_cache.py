"""The cache over cp: what devices hold after any appends and roll-backs, and how a pass is dealt to
it."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from jax.sharding import PartitionSpec as P

from fdp.collectives import shard_map
from fdp.count import context as cost
from fdp.count import hlo
from fdp.mesh import AXES, make_mesh
from fdp.parallel.context import cache, layouts
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout

pytestmark = pytest.mark.fast
LAYOUTS = st.one_of(
    st.sampled_from((CONTIGUOUS, ZIGZAG)),
    st.builds(SequenceLayout, st.just("striped"), st.integers(1, 6)),
)


class Book(RuleBasedStateMachine):
    """Two sequences in arrays of cp devices, against a list for each."""

    @initialize(cp=st.integers(1, 4), slots=st.integers(1, 5))
    def begin(self, cp, slots):
        """Empty devices, whose slots hold -1."""
        self.cp, self.slots, self.tokens = cp, slots, ([], [])
        self.held = np.full((cp, 2, slots + 1), -1)  # the last place stands for none
        self.next = 0

    @rule(rows=st.integers(1, 4), data=st.data())
    def step(self, rows, data):
        """All rows are stored; of each sequence some are accepted, and some old ones are taken
        back."""
        index = np.array([[len(t) + i for i in range(rows)] for t in self.tokens])
        new = self.next + np.arange(2 * rows).reshape(2, rows)
        self.next += 2 * rows
        for device in range(self.cp):
            at = cache.slots_of(index, self.slots, self.cp, device)
            assert at.max() <= self.slots
            np.put_along_axis(self.held[device], at, new, 1)
            self.held[device, :, -1] = -1
        for b, tokens in enumerate(self.tokens):
            tokens += list(new[b])[: self.cp * self.slots - len(tokens)]
            del tokens[data.draw(st.integers(max(0, len(tokens) - rows - 1), len(tokens))) :]

    @invariant()
    def a_query_sees_its_own_sequence(self):
        """The entries at positions before the length, in order, are the list."""
        if not hasattr(self, "held"):
            return
        place = np.stack(
            [layouts.held(cache.ROUND_ROBIN, self.slots, self.cp, r) for r in range(self.cp)]
        )
        for b, tokens in enumerate(self.tokens):
            seen = place < len(tokens)
            order = np.argsort(place[seen])
            np.testing.assert_array_equal(self.held[:, b, :-1][seen][order], tokens)


Book.TestCase.settings = settings(deadline=None, max_examples=30, stateful_step_count=12)
test_devices_hold_what_a_list_holds = Book.TestCase


@settings(deadline=None, max_examples=40)
@given(layout=LAYOUTS, cp=st.integers(2, 6), times=st.integers(1, 4))
def test_routes_bring_every_position_to_its_slot(layout, cp, times):
    length = layout.unit(cp)[0] * times // cp
    leave, place = cache.routes(layout, length, cp)
    held = layouts.permutation(layout, length * cp, cp).reshape(cp, length)
    sent = np.stack([held[d][leave[d]] for d in range(cp)])  # [from, to, P]
    arrived = sent.swapaxes(0, 1).reshape(cp, -1)
    got = np.take_along_axis(arrived, place, 1)
    np.testing.assert_array_equal(got, np.arange(length * cp).reshape(length, cp).T)
    run = {"contiguous": length, "zigzag": length // 2, "striped": layout.block}[layout.kind]
    if run % cp == 0:
        assert leave.shape[2] * cp == length


@pytest.mark.parametrize("layout", [SequenceLayout(), ZIGZAG, SequenceLayout("striped", 3)])
def test_dealing_a_pass_moves_what_the_formula_says(layout):
    """With runs that cp divides, and with others."""
    cp, (B, S, K, C) = 4, (2, 48, 2, 3)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"cp": cp})
    specs = (P(None, "cp"),) * 2
    f = jax.jit(shard_map(lambda k, v: cache.deal(k, v, layout), mesh, specs, specs))
    kv = np.random.default_rng(0).normal(size=(2, B, S, K, C)).astype(np.float32)
    program = f.lower(*kv).compile()
    got = program(*layouts.permute(kv, layout, cp, dim=2))
    np.testing.assert_array_equal(got, layouts.permute(kv, cache.ROUND_ROBIN, cp, dim=2))
    shape = cost.AttentionShape(B, S, K, K, C, cp, 4)
    (sent,) = hlo.collectives(program.as_text(), dict(mesh.shape))
    assert {sent.op: sent.wire_bytes} == cost.deal_bytes(layout, shape)
    if layout.kind == "contiguous":
        assert sent.wire_bytes == 3 / 4 * shape.unit
    assert cost.deal_bytes(cache.ROUND_ROBIN, shape) == {}


def test_what_exceeds_the_capacity_is_refused():
    cache.check_capacity(12, 4, 16)
    message = r"prompt \+ new = 12 \+ 8 = 20 > M = 16 .*make it 20 positions long, or .* at most 4"
    with pytest.raises(ValueError, match=message):
        cache.check_capacity(12, 8, 16)
