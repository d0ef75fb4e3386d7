"""Fitted machines to plan for, and synthetic masks."""

import numpy as np
import pytest

from fdp.count.counts import EXCHANGE, GATHER, PERMUTE
from fdp.parallel.context import planner_machine as machines
from fdp.parallel.context import planner_masks
from fdp.parallel.context.planner_machine import CONGESTED, INFINIBAND, NVLINK, Fabric, Fitted
from fdp.price import network

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("kind", planner_masks.PATTERNS)
def test_patterns(kind: str) -> None:
    mask = planner_masks.pattern(kind, 64, 0.25, seed=1, cluster=8)
    assert not np.triu(mask, 1).any() and mask.diagonal().all()
    assert mask.sum() / np.tri(64).sum() == pytest.approx(0.25, abs=0.03)
    assert planner_masks.pattern(kind, 8, 1.0).sum() == 36
    if kind == "window":
        assert mask.diagonal(-7).all() and not mask.diagonal(-10).any()


def test_layers_have_the_mean_and_the_spread() -> None:
    visible = np.tri(128).sum()
    density = planner_masks.layers(6, 128, 0.2, spread=8).sum((1, 2)) / visible
    assert density.mean() == pytest.approx(0.2, abs=0.02)
    assert density.max() / density.min() == pytest.approx(8, rel=0.2)
    cut = planner_masks.layers(6, 128, 0.7, spread=16).sum((1, 2)) / visible
    assert cut.mean() == pytest.approx(0.7, abs=0.02) and cut.max() == 1
    assert (planner_masks.layers(3, 16, 1.0) == np.tri(16, dtype=bool)).all()
    for call in (
        lambda: planner_masks.layers(2, 8, 0.5, spread=0.5),
        lambda: planner_masks.layers(2, 8, 1.5),
        lambda: planner_masks.pattern("diagonal", 8, 0.5),
        lambda: planner_masks.pattern("window", 8, 0.0),
    ):
        with pytest.raises(ValueError, match=r"spread|density|pattern"):
            call()


def test_fitted_network_speaks_of_operands() -> None:
    def priced(op: str, operand: float, ranks: int, local: int) -> float:
        return network.collective_time(op, operand, ranks, local, "h100")

    near, far, free = (Fitted(fabric) for fabric in (NVLINK, CONGESTED, INFINIBAND))
    assert near.seconds(GATHER, 7e6, 8, 1)[0] == priced("all_gather", 8e6, 8, 8)
    assert near.seconds(PERMUTE, 7e6, 4, 2)[0] == priced("point_to_point", 7e6, 4, 4)
    assert far.seconds(EXCHANGE, 7e6, 8, 1)[0] == priced("all_to_all", 8e6, 8, 1)
    half = Fitted(Fabric("two nodes", 4, congested=True))  # a ring over every second device
    assert half.seconds(GATHER, 3e6, 4, 2)[0] == priced("all_gather", 4e6, 4, 2)
    three = [network.seconds(EXCHANGE, 7e6, 8, 1)[0] for network in (near, free, far)]
    assert three == sorted(three) and len(set(three)) == 3


def test_errors_are_those_of_what_was_left_out_of_the_fit() -> None:
    asked = []

    def errors(what: object, p90: float) -> np.ndarray:
        asked.append((what, p90))
        return np.array([1.0, 2.0])

    one = Fitted(NVLINK).seconds(GATHER, 7e6, 8, 1)
    drawn = Fitted(NVLINK, errors=errors).seconds(GATHER, 7e6, 8, 1)
    np.testing.assert_array_equal(drawn, one * [1, 2])
    assert asked == [((GATHER, 8, 1, False), network.held_out_error("h100", small=False)[1])]
    fast, slow = machines.machine(NVLINK, errors=errors).flops
    assert fast == 2 * slow and asked[-1] == ("attention", machines.ATTENTION_ERROR)
