"""A plan of every layer of a hybrid: the cheapest path is that of trying all of them."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from fdp.count.counts import EXCHANGE, REDUCE
from fdp.parallel.context import layer_plans
from fdp.parallel.context.layer_plans import Devices, LayerOption, Transfer
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout
from fdp.parallel.context.planner_time import Machine

LAYOUTS = (CONTIGUOUS, ZIGZAG, SequenceLayout("striped", 4))


@dataclass(frozen=True)
class Wire:
    """A byte takes a second among four neighbours, and a collective two more."""

    def seconds(self, op: str, wire: float, ranks: int, inner: int) -> float:
        return 2 + wire * inner * 4 / ranks


ON = Devices(Machine(10.0, Wire()), 4)


def test_seconds_add_work_and_what_it_does_not_hide():
    shown, hidden = Transfer(EXCHANGE, 6, 3), Transfer(REDUCE, 8, 2, hidden=70)
    option = LayerOption("tokens", ZIGZAG, 200, (shown, hidden))
    assert ON.exposed(option) == 3 * (2 + 2) + 2 * (2 + 4) - 70 / 10
    assert ON.seconds(option) == 20 + ON.exposed(option)
    assert (option.wire, option.steps) == (14, 5)


def test_steps_of_a_chain_take_their_time_at_least():
    slow = Devices(ON.machine, 4, step=3)
    assert slow.seconds(LayerOption("heads", ZIGZAG, 200, chained=50, chain=4)) == 15 + 4 * 3
    assert slow.seconds(LayerOption("heads", ZIGZAG, 200, chained=150, chain=4)) == 20


def test_transfers_are_among_their_own_devices():
    among = LayerOption("usp", ZIGZAG, 0, (Transfer(EXCHANGE, 6, 2, ranks=2, inner=2),))
    assert ON.exposed(among) == 2 * (2 + 3 * 2 * 4 / 2)


def test_compute_hides_no_more_than_the_transfer():
    assert ON.exposed(LayerOption("ring", ZIGZAG, 900, (Transfer(REDUCE, 8, 2, hidden=900),))) == 0


def test_hidden_states_move_there_and_back():
    assert ON.moved(8) == 2 * 8 * 3 / 4
    assert ON.move(8) == 2 * (2 + 6)


@pytest.mark.parametrize("hidden", [0.1, 4.0, 40.0])
def test_the_best_path_is_that_of_trying_all(hidden):
    rng = np.random.default_rng(1)
    options = [
        [LayerOption(f"{i}", at, float(rng.integers(1, 200))) for at in LAYOUTS for i in range(2)]
        for _ in range(4)
    ]
    every = (layer_plans.price(path, ON, hidden) for path in itertools.product(*options))
    found = layer_plans.best(options, ON, hidden)
    assert found.seconds == pytest.approx(min(path.seconds for path in every), abs=1e-12)


def test_a_layer_changes_layout_only_where_that_pays():
    first = [LayerOption("a", CONTIGUOUS, 10)]
    there_and_back = [first, _either(300), first]
    assert layer_plans.best(there_and_back, ON, 1.0).moves == 2
    assert layer_plans.best(there_and_back, ON, 100.0).moves == 0


def test_a_plan_costs_its_layers_and_its_moves():
    flops = ((CONTIGUOUS, 10), (ZIGZAG, 20), (ZIGZAG, 30))
    found = layer_plans.price([LayerOption("a", at, n) for at, n in flops], ON, 8.0)
    assert found.moves == 1 and found.seconds == 1 + 2 + 3 + ON.move(8.0)


def test_what_does_not_fit_is_no_option():
    small = Devices(ON.machine, 4, memory=2**30)
    large = LayerOption("heads", ZIGZAG, 1, memory=2**31)
    fits = LayerOption("tokens", ZIGZAG, 9)
    assert layer_plans.best([[large, fits]], small, 1.0).layers == (fits,)
    error = r"layer 1 keeps at least 2.00 GiB of a device > 1.00 GiB: take more devices"
    with pytest.raises(ValueError, match=error):
        layer_plans.best([[fits], [large]], small, 1.0)


def _either(slow: float) -> list[LayerOption]:
    """Slow in the first layout, fast in the second."""
    return [LayerOption("a", CONTIGUOUS, slow), LayerOption("b", ZIGZAG, 10)]
