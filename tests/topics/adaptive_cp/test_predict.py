"""Topic 3: simulated steps, regions, what devices need, pictures.

Legend: W blocks of a sequence.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fdp.count.counts import GATHER
from fdp.parallel.context import planner, planner_machine, planner_masks, planner_methods
from fdp.parallel.context.planner_machine import INFINIBAND, NVLINK, machine, problem
from fdp.parallel.context.planner_problem import Masks, Problem
from fdp.parallel.context.planner_uniform import uniform_any
from fdp.price import inference, network
from fdp.study.figures import save, smallest_text
from fdp.topics.adaptive_cp import figures, planned, predict, rows
from fdp.topics.adaptive_cp.densities import History
from tests.parallel.context.planner_problems import SHAPE, SLOW, W, mixed

pytestmark = pytest.mark.fast
FEW = {"fabrics": (NVLINK, INFINIBAND, planner_machine.CONGESTED), "layers": 4, "blocks": 128}


def test_draws_have_the_stated_quantile_and_a_nominal_first() -> None:
    on = planner_machine.Fitted(NVLINK, errors=predict.Draws(400, seed=1))
    drawn = on.seconds(GATHER, 7e6, 8, 1)
    error = np.quantile(np.abs(drawn / drawn[0] - 1), 0.9)
    stated = network.held_out_error("h100", small=False)[1]
    assert drawn.shape == (400,) and error == pytest.approx(stated, rel=0.3)


def test_adaptive_plans_pay_where_links_are_slow_and_layers_sparse() -> None:
    found = predict.region((2**17,), 40, densities=(0.03, 1.0), **FEW)
    assert (found.fields["value"] <= 1).all()
    assert (found.fields["low"] <= found.fields["high"]).all()
    slow, fast = (found.at(fabric=f, length=2**17)["value"] for f in (INFINIBAND, NVLINK))
    assert slow[0] < 0.9 < fast[0]
    assert slow[1] == fast[1] == pytest.approx(1.0)  # nothing to adapt to
    row = rows.region(found)
    assert row.value == 0.5 and "NVLink 0%" in row.note
    assert len(figures.region(found).axes) == 3 + 1  # panels and a colour bar
    text = predict.evidence()
    assert "90 % quantile 18%" in text and "no block-sparse kernel was timed" in text


def test_rest_of_the_step_is_shared_by_all_plans() -> None:
    model, masks = predict.GQA_8B, Masks(planner_masks.layers(2, 64, 0.1))
    found = problem(model, masks, 2**17, 8, machine(INFINIBAND))
    seen, rest = predict.predict(model, found), predict.rest_seconds(model, 2**17, 8)
    assert seen.adaptive == pytest.approx(rest + 16 * planner.plan(found).seconds)
    assert seen.uniform == pytest.approx(rest + 16 * uniform_any(found).seconds)
    assert seen.low == seen.high == pytest.approx(seen.ratio)  # without draws
    work = inference.ForwardPass(1, 2**14, 2**17, 2**14)
    step = inference.price(model, work, inference.Degrees(1, 1), "h100")
    attention = step.terms["attention compute"] + step.terms["attention memory"]
    assert rest == pytest.approx(3 * (step.seconds - attention))


def test_pictures_can_be_read(tmp_path: Path) -> None:
    found = planner_methods.methods(mixed())
    best = planner.plan(mixed())
    layers = [
        planned.PlannedLayer(str(at.plan.kind), at.price.wire, 1.0, 0.5) for at in best.layers
    ]
    history = History([0, 10], np.array([[0.1, 0.2], [0.5, 1.0]]))
    drawn = [
        figures.density("d", [history]),
        figures.plan("p", layers),
        figures.methods("b", found),
        figures.needs("n", np.ones((6, 4, 4))),
    ]
    for i, fig in enumerate(drawn):
        assert save(fig, tmp_path / f"{i}.png").stat().st_size > 5000 and smallest_text(fig) >= 9
    with pytest.raises(ValueError, match="no best uniform"):
        figures.methods("b", found[:2])


def test_need_tables_by_hand() -> None:
    causal, own = np.tri(W, dtype=bool), np.eye(W, dtype=bool)
    units, table = planner_methods.needs(
        Problem(Masks(np.stack([causal, own])), SHAPE, SLOW), (2**17, 2**18)
    )
    np.testing.assert_array_equal(units[1], np.eye(4))
    lines = {(line["layer"], line["layout"]): line for line in table}
    assert len(lines) == 2 * 3
    # Contiguous: device d needs everything of the d before it.
    contiguous = lines[0, "contiguous"]
    assert contiguous["units"] == (0 + 1 + 2 + 3) / 4 and contiguous["most of a pair"] == 1
    assert lines[0, "zigzag"]["max/mean work"] == 1 < contiguous["max/mean work"]
    assert lines[1, "zigzag"]["units"] == 0
    at = contiguous["bytes"]
    assert at[2**18] == 2 * at[2**17] == 1.5 * replace(SHAPE, seq_len=2**18).unit
