"""Simulated steps of adaptive context plans: synthetic masks, fitted networks, regions, pictures.

Legend: L layers, J lists, W blocks, D devices, N draws.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fdp.count.context import EXCHANGE, GATHER, PERMUTE
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG
from fdp.price import inference, network
from fdp.topics.adaptive_cp import baselines, figures, planner, rows, synthetic
from fdp.topics.adaptive_cp import predict as simulate
from fdp.parallel.context.planner_problem import Masks, Problem
from tests.parallel.context.planner_problems import SHAPE, SLOW, W, mixed, random_masks

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("kind", synthetic.PATTERNS)
def test_patterns(kind: str) -> None:
    mask = synthetic.pattern(kind, 64, 0.25, seed=1, cluster=8)
    assert not np.triu(mask, 1).any() and mask.diagonal().all()
    assert mask.sum() / np.tri(64).sum() == pytest.approx(0.25, abs=0.03)
    assert synthetic.pattern(kind, 8, 1.0).sum() == 36
    if kind == "window":
        assert mask.diagonal(-7).all() and not mask.diagonal(-10).any()


def test_layers_have_the_mean_and_the_spread() -> None:
    visible = np.tri(128).sum()
    density = synthetic.layers(6, 128, 0.2, spread=8).sum((1, 2)) / visible
    assert density.mean() == pytest.approx(
        0.2, abs=0.02
    ) and density.max() / density.min() == pytest.approx(8, rel=0.2)
    cut = synthetic.layers(6, 128, 0.7, spread=16).sum((1, 2)) / visible
    assert cut.mean() == pytest.approx(0.7, abs=0.02) and cut.max() == 1
    assert (synthetic.layers(3, 16, 1.0) == np.tri(16, dtype=bool)).all()
    for call in (
        lambda: synthetic.layers(2, 8, 0.5, spread=0.5),
        lambda: synthetic.layers(2, 8, 1.5),
        lambda: synthetic.pattern("diagonal", 8, 0.5),
        lambda: synthetic.pattern("window", 8, 0.0),
        lambda: synthetic.magnify(np.eye(4, dtype=bool)[None], 0),
    ):
        with pytest.raises(ValueError, match=r"spread|density|pattern|factor"):
            call()


def test_magnified_masks_need_the_same_share() -> None:
    masks = random_masks(1, 0.2)
    big = synthetic.magnify(masks, 3)
    assert (
        big.shape == (1, 1, 48, 48)
        and big.mean() == masks.mean()
        and (big[0, 0, ::3, 1::3] == masks[0, 0]).all()
    )
    small, large = (Problem(Masks(m), replace(SHAPE, seq_len=480), SLOW) for m in (masks, big))
    for layout in (CONTIGUOUS, ZIGZAG):
        assert baselines.need_only_bytes(small, layout) == pytest.approx(
            baselines.need_only_bytes(large, layout)
        )


def test_fitted_network_speaks_of_operands() -> None:
    near = simulate.Fitted(simulate.NVLINK)
    assert near.seconds(GATHER, 7e6, 8, 1)[0] == network.collective_time(
        "all_gather", 8e6, 8, 8, "h100"
    )
    assert near.seconds(PERMUTE, 7e6, 4, 2)[0] == network.collective_time(
        "point_to_point", 7e6, 4, 4, "h100"
    )
    far = simulate.Fitted(simulate.CONGESTED)
    assert far.seconds(EXCHANGE, 7e6, 8, 1)[0] == network.collective_time(
        "all_to_all", 8e6, 8, 1, "h100"
    )
    half = simulate.Fitted(
        simulate.Fabric("two nodes", 4, congested=True)
    )  # a ring over every second device
    assert half.seconds(GATHER, 3e6, 4, 2)[0] == network.collective_time(
        "all_gather", 4e6, 4, 2, "h100"
    )
    free = simulate.Fitted(simulate.INFINIBAND)
    assert (
        near.seconds(EXCHANGE, 7e6, 8, 1)[0]
        < free.seconds(EXCHANGE, 7e6, 8, 1)[0]
        < far.seconds(EXCHANGE, 7e6, 8, 1)[0]
    )
    drawn = simulate.Fitted(simulate.NVLINK, draws=400, seed=1).seconds(GATHER, 7e6, 8, 1)
    error = np.quantile(np.abs(drawn / drawn[0] - 1), 0.9)
    assert drawn.shape == (400,) and error == pytest.approx(
        simulate.network_error("h100", False, False)[1], rel=0.3
    )


def test_prediction_and_region() -> None:
    found = simulate.region(
        fabrics=(simulate.NVLINK, simulate.INFINIBAND),
        densities=(0.03, 1.0),
        lengths=(2**17,),
        layers=4,
        blocks=128,
        draws=40,
    )
    ratio, low, high = (found.field(name)[..., 0] for name in ("ratio", "low", "high"))
    assert (ratio <= 1).all() and (low <= high).all()
    assert ratio[1, 0] < 0.9 < ratio[0, 0]  # slow links and sparse layers
    assert ratio[:, 1] == pytest.approx(1.0)  # nothing to adapt to
    assert found.share(1) == found.share(1, threshold=ratio[1, 0]) == 0.5 and found.share(0) == 0
    assert found.share(1, sure=True) <= found.share(1)
    text = simulate.evidence(simulate.INFINIBAND)
    assert "90 % quantile 18%" in text and "no block-sparse kernel was timed" in text


def test_rest_of_the_step_is_shared_by_all_plans() -> None:
    model = simulate.GQA_8B
    masks = Masks(synthetic.layers(2, 64, 0.1))
    problem = simulate.problem(model, masks, 2**17, 8, simulate.machine(simulate.INFINIBAND))
    seen = simulate.predict(model, problem)
    rest = simulate.rest_seconds(model, 2**17, 8)
    assert seen.adaptive == pytest.approx(rest + 16 * planner.plan(problem).seconds)
    assert seen.uniform == pytest.approx(rest + 16 * baselines.uniform_any(problem).seconds)
    assert seen.low == seen.high == pytest.approx(seen.ratio)  # without draws
    step = inference.price(
        model, inference.Work(1, 2**14, 2**17, 2**14), inference.Degrees(1, 1), "h100"
    )
    attention = step.terms["attention compute"] + step.terms["attention memory"]
    assert rest == pytest.approx(3 * (step.seconds - attention))


def test_figures(tmp_path: Path) -> None:
    problem = mixed()
    rows = baselines.baselines(problem)
    region = simulate.region(
        fabrics=(simulate.NVLINK,), densities=(0.1,), lengths=(2**17,), layers=2, blocks=32, draws=5
    )
    paths = [
        figures.density_map(tmp_path / "d.png", np.array([[0.1, 0.2], [0.5, 1.0]]), [0, 10], "d"),
        figures.plan_picture(tmp_path / "p.png", planner.plan(problem), "p"),
        figures.bytes_chart(tmp_path / "b.png", rows, "b"),
        figures.region_map(tmp_path / "r.png", region, "r"),
    ]
    assert all(path.stat().st_size > 5000 for path in paths)
    with pytest.raises(ValueError, match="no best uniform"):
        figures.bytes_chart(tmp_path / "b.png", rows[:2], "b")


def test_need_tables_by_hand(tmp_path: Path) -> None:
    causal, own = np.tri(W, dtype=bool), np.eye(W, dtype=bool)
    units, table = rows.needs(Problem(Masks(np.stack([causal, own])), SHAPE, SLOW))
    np.testing.assert_array_equal(units[1], np.eye(4))
    lines = {(line["layer"], line["layout"]): line for line in table}
    assert len(lines) == 2 * 3
    # Contiguous: device d needs everything of the d before it.
    assert (
        lines[0, "contiguous"]["units"] == (0 + 1 + 2 + 3) / 4
        and lines[0, "contiguous"]["most of a pair"] == 1
    )
    assert lines[0, "zigzag"]["max/mean work"] == 1 < lines[0, "contiguous"]["max/mean work"]
    assert lines[1, "zigzag"]["units"] == 0
    at = lines[0, "contiguous"]["bytes"]
    assert at[2**18] == 2 * at[2**17] == 1.5 * replace(SHAPE, seq_len=2**18).unit
    assert figures.need_map(tmp_path / "needs.png", units, "needs").stat().st_size > 5000
