"""Pictures say what they show and can be read."""

import subprocess
import sys

import numpy as np
import pytest

from fdp.metrics import MetricsWriter
from fdp.study import figures
from fdp.study.grid import Grid, heat_map
from fdp.study.uncertainty import factors, interval, sigma

pytestmark = pytest.mark.fast


def texts(fig):
    return {t.get_text() for t in figures._texts(fig)}


@pytest.mark.parametrize(("columns", "width"), [(1, 6.0), (1, 3.0), (4, 3.6)])
def test_text_is_9_pt_where_the_picture_is_800_pixels_wide(tmp_path, columns, width):
    fig, panels = figures.figure(columns, width)
    for axes in np.atleast_1d(panels):
        axes.plot([1, 2000], [0, 1], label="a curve")
        axes.text(1, 0.5, "small", fontsize=4)
        axes.set_title("large", fontsize=30)
    figures.legend(fig)
    figures.save(fig, tmp_path / "a.png")
    assert figures.smallest_text(fig) >= 8.999
    assert 30 in {t.get_fontsize() for t in figures._texts(fig)}


def test_curves_state_their_smoothing_and_label_their_levels(tmp_path):
    steps = list(range(40))
    series = {"a": (steps, steps), "b": ([0, 9], [1, 2])}
    fig = figures.curves(series, "step", "loss", "Loss", {"threshold 3": 3.0}, smooth=10)
    assert {"a (mean of 10)", "b", "threshold 3"} <= texts(fig)
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    assert lines["a (mean of 10)"].get_xydata()[0].tolist() == pytest.approx([9.0, 4.5])
    assert lines["b"].get_xydata().tolist() == [[0, 1], [9, 2]]
    assert fig.axes[0].get_legend() is None and len(fig.legends) == 1
    figures.save(fig, tmp_path / "a.png")
    box = fig.legends[0].get_window_extent()
    assert box.y1 <= fig.axes[0].get_window_extent().y0, "the legend lies over the curves"


def test_training_curves_are_means_over_seeds(tmp_path):
    for seed in (0, 1):
        writer = MetricsWriter(tmp_path, "mdlm", seed)
        writer.write(1, {"loss": 2.0 + seed})
        writer.write(2, {"loss": 1.0 + seed, "val_loss": float(seed)})
        writer.close()
    fig = figures.training_curves(tmp_path, {"mdlm": "MDLM"}, "Loss")
    lines = {line.get_label(): line.get_xydata().tolist() for line in fig.axes[0].lines}
    assert lines == {"MDLM, training": [[1, 2.5], [2, 1.5]], "MDLM, validation": [[2, 0.5]]}


def speedup(fabric, length, batch):
    """Nothing fits where the batch is 3."""
    if batch == 3:
        return None
    value = length * batch / (2 if fabric == "slow" else 1)
    return {"value": value, "low": 0.5 * value, "high": 2 * value}


AXES = {"fabric": ("slow", "fast"), "length": (1, 2), "batch": (1, 2, 3)}


def test_a_grid_shares_its_cells_out(tmp_path):
    grid = Grid.over(speedup, **AXES)
    assert grid.fields["value"].shape == (2, 2, 3)
    assert grid.share(">= 2") == 4 / 8
    assert grid.share(">= 2", fabric="fast") == 3 / 4
    assert grid.share("value >= 2", sure=True, fabric="fast") == 1 / 4
    assert grid.share("<= 2", sure=True) == 4 / 8
    assert grid.best() == {"fabric": "fast", "length": 2, "batch": 2}
    assert grid.best(largest=False) == {"fabric": "slow", "length": 1, "batch": 1}
    assert grid.at(**grid.best()) == {"value": 4, "low": 2, "high": 8}
    fig = heat_map(grid, "Gain", "speed-up", ">= 2", {"length": "{}K".format})
    found = texts(fig)
    assert {"fabric slow", "fabric fast", "1K", "none fits", "4.00\n≥2.00", "speed-up"} <= found
    assert "Gain\nboxed: >= 2; second line: low end of the 95 % interval" in found
    figures.save(fig, tmp_path / "map.png")
    assert figures.smallest_text(fig) >= 8.999


def test_a_grid_refuses_what_is_not_there():
    grid = Grid.over(speedup, **AXES)
    with pytest.raises(KeyError, match="axis 'fabrik' is none of fabric, length, batch"):
        grid.at(fabrik="slow")
    with pytest.raises(ValueError, match=r"none of the 4 cases over fabric, length, batch fits"):
        Grid.over(speedup, fabric=("slow", "fast"), length=(1, 2), batch=(3,))


def test_factors_are_lognormal_seeded_and_equal_for_equal_members():
    a = factors(("matmul", 8), sigma(0.2), 4000)
    assert np.quantile(np.abs(np.log(a)), 0.9) == pytest.approx(np.log(1.2), rel=0.05)
    np.testing.assert_array_equal(a, factors(("matmul", 8), sigma(0.2), 4000))
    assert not np.array_equal(a, factors(("matmul", 4), sigma(0.2), 4000))
    assert not np.array_equal(a, factors(("matmul", 8), sigma(0.2), 4000, seed=1))
    nominal = factors(("matmul", 8), sigma(0.2), 4000, nominal=True)
    assert nominal[0] == 1.0 and nominal.shape == (4000,)
    np.testing.assert_array_equal(nominal[1:], a[:-1])
    assert interval(np.arange(101.0), 0.9) == pytest.approx((5.0, 95.0))


def test_the_first_picture_on_a_machine_says_nothing(tmp_path):
    code = (
        "import logging; logging.basicConfig(level=0)\nfrom fdp.study.figures import figure, save"
    )
    code += f"\nfrom pathlib import Path\nfig, axes = figure()\nsave(fig, Path({str(tmp_path)!r}) / 'a.png')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"MPLCONFIGDIR": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "font" not in done.stdout + done.stderr.replace("font_manager:DEBUG", "")
