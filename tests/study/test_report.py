"""A verdict follows from its number, a broken report is named by row and key, and the table fits
the terminal.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fdp.study import figures
from fdp.study.report import (
    EVIDENCE,
    BadReport,
    Report,
    Row,
    crosses,
    devices,
    judge,
    validate,
    versions,
)

pytestmark = pytest.mark.fast


def rows():
    return [
        Row.judged(
            "TP halves the bytes | a step",
            "bytes per step",
            1_234_567,
            "B",
            "<= 0.55",
            "counted",
            baseline="Megatron all-reduce in both directions",
            baseline_values=2_469_134,
        ),
        Row.judged(
            "The loss is equal",
            "validation loss",
            [3.1, 3.2, 3.4],
            "nats/token",
            "value <= 3.25",
            "measured",
            baseline="autoregressive",
            baseline_values=[3.0, 3.1, 3.2],
        ),
        Row.untestable(
            "It is faster on TPU", "step time", "ms", "<= 0.9", "measured", "needs a TPU v5p slice"
        ),
    ]


def report(**changes):
    return Report(
        **{
            "topic": "parallel_dlm",
            "variant": "tiny",
            "config_hash": "0123456789ab",
            "rows": rows(),
        }
        | changes
    )


@pytest.mark.parametrize(
    ("number", "threshold", "verdict"),
    [
        (0.35, "<= 0.35", "holds"),
        (0.36, "<= 0.35", "fails"),
        (1e3, ">= 1e3", "holds"),
        (-1, "value >= -0.5", "fails"),
        (0.1 + 0.2, "== 0.3", "holds"),
        (12, "ratio == 13", "fails"),
    ],
)
def test_judge(number, threshold, verdict):
    assert judge(number, threshold) == verdict


@pytest.mark.parametrize("threshold", ["< 3", "about 3", "<= x", "<= 3 ms", ""])
def test_judge_refuses_other_thresholds(threshold):
    with pytest.raises(ValueError, match="write '<= x'"):
        judge(1.0, threshold)


def test_judge_refuses_nan():
    with pytest.raises(ValueError, match="nan cannot be judged"):
        judge(float("nan"), "<= 1")


def test_rows_compute_means_ratios_intervals_and_verdicts():
    counted, measured, untestable = rows()
    assert (counted.ratio, counted.ci, counted.verdict, counted.note) == (0.5, None, "holds", "")
    assert measured.value == pytest.approx(9.7 / 3)
    assert measured.ratio == pytest.approx(9.7 / 9.3)
    assert measured.ci is not None
    assert measured.ci[0] <= measured.value <= measured.ci[1]
    assert measured.verdict == "holds"
    assert "crosses the threshold" in measured.note
    assert (untestable.value, untestable.verdict) == (None, "not testable here")


def test_a_verdict_cannot_be_passed_by_hand():
    with pytest.raises(
        ValueError, match=r"row 'c', key 'verdict': 'holds', but 2.0 fails at '<= 1'"
    ):
        Row("c", "m", 2.0, "s", "", None, None, None, "<= 1", "holds", "measured", "")


def test_the_interval_that_reaches_over_the_threshold_is_named_in_the_verdict_column():
    assert crosses((0.9, 1.1), "<= 1")
    assert not crosses((0.8, 0.9), "<= 1")
    assert not crosses((0.9, 1.1), "== 1")
    measured = rows()[1]
    assert measured.said == "holds, interval crosses"
    assert "| holds, interval crosses |" in report().markdown()
    assert "holds, interval crosses" in report().terminal(200)
    assert report().to_json()["rows"][1]["verdict"] == "holds"


def test_a_report_opens_with_question_answer_and_deciding_rows():
    yes, part, unknown = rows()
    failed = Row.judged("It is fast", "time", 3, "s", "<= 2", "measured", decides=True)
    marked = [replace(yes, decides=True), part, replace(unknown, decides=True), failed]
    found = report(rows=marked, question="Does it pay?")
    assert found.answer == (
        "In part: 1 of 2 deciding claims hold; 1 not testable here; TP halves the bytes | a step: "
        "0.5 × (<= 0.55, holds); It is fast: 3 s (<= 2, fails)."
    )
    lines = [x for x in found.markdown().splitlines() if x]
    assert lines[1:3] == ["**Does it pay?**", found.answer]
    assert [x.split(" | ")[0] for x in lines[5:8]] == ["| holds", "| not testable here", "| fails"]
    shown = found.terminal(200)
    assert "question  Does it pay?" in shown
    assert "answer    In part:" in shown
    assert "The loss is equal" not in shown
    content = found.to_json()
    validate(content)
    assert (content["question"], content["answer"]) == ("Does it pay?", found.answer)


@pytest.mark.parametrize(
    ("values", "word"),
    [((1, 1), "Yes: 2 of 2 claims"), ((9, 9), "No: 0 of 2"), ((1, 9), "In part")],
)
def test_the_answer_counts_all_rows_where_none_decides(values, word):
    many = [Row.judged("c", "m", v, "", "<= 2", "counted") for v in values]
    assert report(rows=many).answer.startswith(word)
    assert report(rows=[rows()[2]]).answer == (
        "Open: no claim could be decided; 1 not testable here."
    )


def test_rows_of_a_group_stand_together():
    a, b, c = (replace(row, group=group) for row, group in zip(rows(), "xyx", strict=True))
    text = report(rows=[a, b, c]).markdown()
    order = [text.index(x) for x in ("### x", a.metric, c.metric, "### y", b.metric, "## Notes")]
    assert order == sorted(order)


def test_skipped_steps_are_said_and_beyond_one_percent_no_claim_of_training_is_decided(tmp_path):
    few = report()
    few.distrust({"ar-s0": (1, 100), "tp-s0": (0, 100)})
    assert few.rows == rows()
    assert few.training == [
        "ar-s0: 1 of 100 steps (1 %) were skipped: loss or gradient was not finite"
    ]
    many = report(rows=[*rows(), replace(rows()[0], evidence="compiled")])
    many.distrust({"ar-s0": (38, 40), "tp-s0": (0, 40)})
    verdicts = [row.verdict for row in many.rows]
    assert verdicts == [*["not testable here"] * 3, "holds"]
    said = "ar-s0: 38 of 40 steps (95 %) were skipped: loss or gradient was not finite"
    assert many.rows[1].note == (
        f"{said}, more than 1 % of a run; without that, validation loss would be 3.233 nats/token "
        "[2.854, 3.613]; the interval [2.854, 3.613] crosses the threshold"
    )
    assert many.rows[2].note == "needs a TPU v5p slice"
    assert said in many.terminal(200)
    many.write(tmp_path)
    assert f"- Training of {said}." in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["training"] == [said]


def test_written_files_validate_and_raw_numbers_lie_beside(tmp_path):
    fig = figures.curves({"tp": ([0, 1], [3, 2])}, "step", "loss", "Loss", {"AR": 2.5})
    plot = figures.save(fig, tmp_path / "plots" / "loss.png")
    raw = {"loss": {"tp": np.array([3.1, np.inf]), "ar": jnp.float32(2.0)}}
    report(plots=[plot], raw=raw).write(tmp_path)
    assert plot.read_bytes()[:4] == b"\x89PNG"
    content = json.loads((tmp_path / "report.json").read_text())
    validate(content, tmp_path)
    assert content["plots"] == ["plots/loss.png"]
    assert list(content) == [
        "topic",
        "variant",
        "config_hash",
        "versions",
        "devices",
        "rows",
        "plots",
        "question",
        "answer",
        "training",
    ]
    assert list(content["rows"][0]) == [
        "claim",
        "metric",
        "value",
        "unit",
        "baseline",
        "baseline_value",
        "ratio",
        "ci",
        "threshold",
        "verdict",
        "evidence",
        "note",
        "group",
        "decides",
    ]
    assert json.loads((tmp_path / "raw.json").read_text()) == {
        "loss": {"tp": [3.1, "inf"], "ar": 2.0}
    }
    text = (tmp_path / "report.md").read_text()
    assert "![loss](plots/loss.png)" in text
    assert "8 virtual CPU devices" in text
    assert "TP halves the bytes \\| a step" in text
    assert "1,234,567 B" in text
    for kind in EVIDENCE:
        assert f"- **{kind}**: " in text
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "plots",
        "raw.json",
        "report.json",
        "report.md",
    ]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("verdict", "proven", r"row 1 .*key 'verdict': 'proven' is none of"),
        ("verdict", "fails", r"key 'verdict': 'fails', but 3.23\d* holds"),
        ("evidence", "felt", r"key 'evidence': 'felt' is none of"),
        ("value", float("nan"), r"row 1 .*key 'value': nan is not a finite number"),
        ("ci", [2, 1], r"key 'ci': \[2, 1\] has low > high"),
        ("threshold", "small", r"key 'threshold': threshold 'small'"),
        ("extra", 1, r"key 'extra': unknown"),
    ],
)
def test_validate_names_row_and_key(key, value, message):
    content = report().to_json()
    content["rows"][1][key] = value
    with pytest.raises(ValueError, match=message):
        validate(content)


def test_a_row_that_is_nan_is_named():
    with pytest.raises(BadReport, match=r"row 'loss': nan cannot be judged by '<= 1'"):
        Row.judged("loss", "m", [1.0, float("nan")], "", "<= 1", "measured")


@pytest.mark.parametrize("cwd", [".", "plots", ".."])
def test_plots_of_a_relative_workdir_are_found(tmp_path, monkeypatch, cwd):
    root = tmp_path / "run"
    (root / "plots").mkdir(parents=True)
    (root / "plots" / "a.png").touch()
    monkeypatch.chdir(root / cwd)
    workdir = Path(os.path.relpath(root))
    for plot in (root / "plots" / "a.png", workdir / "plots" / "a.png", "plots/a.png"):
        found = report(plots=[plot])
        found.write(workdir)
        assert found.to_json()["plots"] == ["plots/a.png"], plot


def test_validate_finds_missing_keys_plots_and_rows(tmp_path):
    content = report().to_json()
    del content["rows"][2]["unit"]
    with pytest.raises(ValueError, match=r"row 2 .*key 'unit': missing"):
        validate(content)
    with pytest.raises(ValueError, match=r"key 'rows': a study must judge"):
        validate(report(rows=[]).to_json())
    with pytest.raises(ValueError, match=r"file plots/none.png is missing"):
        report(plots=["plots/none.png"], raw={"kept": 1}).write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["raw.json"]


@pytest.mark.parametrize("width", [72, 80, 100, 200])
def test_terminal_table_fits(width):
    text = report().terminal(width)
    assert max(map(len, text.splitlines())) <= width
    assert "holds" in text


def test_environment_is_named():
    assert devices() == "8 virtual CPU devices"
    assert list(versions()) == ["python", "jax", "jaxlib", "flax", "optax", "fdp"]
