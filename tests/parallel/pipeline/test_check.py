"""Bad orders: the first offending operation is named with its stage and its row."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.parallel.pipeline.check import check
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.fixed import gpipe, interleaved, one_f_one_b, zb_h1, zbv
from fdp.parallel.pipeline.orders import Op, Order, recompute, repeat
from fdp.parallel.pipeline.placement import looped
from tests.parallel.pipeline.families import orders

pytestmark = pytest.mark.fast


def edited(order, stage, change):
    """The order with the list of one stage changed in place."""
    ops = [list(x) for x in order.ops]
    change(ops[stage])
    return Order(order.placement, tuple(map(tuple, ops)), order.steps)


def swapped(order, stage, a, b):
    def change(ops):
        ops[a], ops[b] = ops[b], ops[a]

    return edited(order, stage, change)


def without(order, stage, row):
    return edited(order, stage, lambda ops: ops.pop(row))


def put(order, stage, row, op):
    return edited(order, stage, lambda ops: ops.insert(row, op))


H1, TWICE = zb_h1(2, 3), repeat(gpipe(1, 1), 2)
BAD = [
    (put(H1, 1, 4, Op("G", 0)), "stage 1, row 4: G0 of chunk 0: unknown operation"),
    (put(H1, 1, 2, Op("B", 7)), "stage 1, row 2: B7 .* does not exist: 1 chunks and 3 microba"),
    (put(H1, 1, 3, Op("B", 1, 1)), "stage 1, row 3: B1 of chunk 1 does not exist: 1 chunks"),
    (put(H1, 0, 6, Op("F", 1)), "stage 0, row 6: F1 of chunk 0 is repeated: row 1 has run F"),
    (put(H1, 0, 6, Op("BW", 1)), "stage 0, row 6: BW1 of chunk 0 is repeated: row 5 has run B"),
    (without(H1, 1, 1), "stage 1 never runs B0 of chunk 0: missing before row 3, which"),
    (without(H1, 0, 8), "stage 0 never runs W2 of chunk 0: missing before row 8, its end"),
    (without(gpipe(2, 2), 1, 0), "stage 1 never runs F0 of chunk 0: missing before row 1"),
    (swapped(H1, 1, 0, 1), "stage 1, row 0: B0 of chunk 0 is too early: it needs F0 .* of row 1"),
    (swapped(H1, 0, 2, 3), "stage 0, row 2: W0 of chunk 0 is too early: it needs B0"),
    (swapped(recompute(gpipe(1, 1)), 0, 1, 2), "row 1: BW0 of chunk 0 is too early: it needs R0"),
    (swapped(TWICE, 0, 1, 2), "row 1: U0 of chunk 0 is too early: it needs BW0"),
    (swapped(TWICE, 0, 2, 3), "row 2: F1 of chunk 0 is too early: it needs U0"),
    (without(TWICE, 0, 5), "stage 0 never runs U1 of chunk 0"),
    (Order(looped(2), zb_h1(3, 2).ops), "the order has 3 stages, its placement p=2"),
    (Order(looped(1), ((),)), "0 microbatches in 1 steps"),
]


@pytest.mark.parametrize(("order", "message"), BAD, ids=range(len(BAD)))
def test_first_offending_operation_is_named(order, message):
    with pytest.raises(ValueError, match=message):
        check(order)
    with pytest.raises(ValueError, match=message):
        evaluate(order, Costs())


def test_a_swapped_pair_deadlocks_by_name():
    """Stage 1 wants F2 first, which stage 0 runs only behind the backward of 0."""
    order = swapped(swapped(one_f_one_b(2, 3), 1, 0, 4), 1, 1, 5)
    message = (
        "deadlock: stage 1, row 0: F2 of chunk 0 waits for F2 of chunk 0 in row 3 of stage 0; "
        "stage 0, row 2: BW0 of chunk 0 waits for BW0 of chunk 0 in row 5 of stage 1: reorder"
    )
    for judge in (check, lambda x: evaluate(x, Costs())):
        with pytest.raises(ValueError, match=message):
            judge(order)


def test_a_chunk_run_too_soon_deadlocks_by_name():
    """F0 of chunk 1 before F0 of chunk 0 on the stage that feeds it."""
    order = swapped(interleaved(2, 2, 2), 0, 0, 2)
    with pytest.raises(ValueError, match="stage 0, row 0: F0 of chunk 1 waits for F0 of chunk 0"):
        check(order)


@settings(max_examples=60, deadline=None)
@given(orders())
def test_every_fixed_schedule_runs(order):
    check(order)


@settings(max_examples=100, deadline=None)
@given(st.data(), orders())
def test_check_and_evaluation_agree(data, order):
    """After one random change of a list both accept or both refuse, in the same words."""
    stage = data.draw(st.integers(0, order.placement.p - 1))
    last = len(order.ops[stage]) - 1
    a, b = data.draw(st.integers(0, last)), data.draw(st.integers(0, last))
    what = data.draw(st.sampled_from(["swap", "drop", "repeat"]))
    order = {
        "swap": lambda: swapped(order, stage, a, b),
        "drop": lambda: without(order, stage, a),
        "repeat": lambda: put(order, stage, b, order.ops[stage][a]),
    }[what]()
    refused = []
    for judge in (check, lambda x: evaluate(x, Costs(1, 1, 1))):
        try:
            judge(order)
            refused.append("")
        except ValueError as error:
            refused.append(str(error))
    assert refused[0] == refused[1]


def test_repeated_zbv_is_legal_and_dropping_an_optimizer_is_not():
    order = repeat(zbv(2, 3), 3)
    check(order)
    row = order.ops[0].index(Op("U", 1, 1))
    with pytest.raises(ValueError, match="stage 0 never runs U1 of chunk 1"):
        check(without(order, 0, row))
