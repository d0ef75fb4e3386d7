"""The command that prices a file: rows in and out, what it must ignore, anchors, and every kind of
bad input.
"""

import csv
import dataclasses
import io
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from fdp.price import hybrid
from fdp.price import predict as command
from fdp.price.measurements import measurement
from fdp.price.predict import ADDED, MEASURED, main, predict, price, to_anchors

pytestmark = pytest.mark.fast

ROW = {
    "id": "x1",
    "model": "llama3-8b",
    "gpu": "h100",
    "gpus": "64",
    "seq": "8192",
    "gbs": "128",
    "mbs": "1",
    "tp": "2",
    "pp": "1",
    "cp": "1",
    "dp": "32",
    "zero_stage": "1",
    "precision": "bf16",
    "group": "mine",
    "framework": "own",
    "era": "2027",
}
SHAPES = {
    "layers": "40",
    "hidden": "5120",
    "heads": "40",
    "kv_heads": "8",
    "ffn": "17408",
    "vocab": "151936",
}
DATA = Path(__file__).parents[2].parent / "shared" / "data" / "planning" / "measured_configs.csv"


@pytest.fixture(scope="module")
def model():
    return hybrid.shipped()


def write(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def run(tmp_path, rows, anchors=None, *more):
    """Rows of the written predictions."""
    args = [write(tmp_path / "configs.csv", rows), "--out", str(tmp_path / "out.csv"), *more]
    if anchors is not None:
        args += ["--anchors", write(tmp_path / "anchors.csv", anchors)]
    assert main(args) == 0
    return list(csv.DictReader((tmp_path / "out.csv").open(encoding="utf8")))


def one(row, anchors=(), model=None):
    return predict([row], model or hybrid.shipped(), anchors)[0]


def seconds(row, **changes):
    return float(one(ROW | row | changes)["predicted_step_time_s"])


# The table


def test_rows_keep_order_and_columns(tmp_path):
    rows = [
        ROW | {"id": str(i), "note": 'a, "b"', "gpu": "h1oo" if i == 1 else "h100"}
        for i in range(3)
    ]
    out = run(tmp_path, rows)
    assert [row["id"] for row in out] == ["0", "1", "2"] and list(out[0]) == [*rows[0], *ADDED]
    assert [{k: row[k] for k in rows[0]} for row in out] == rows
    assert out[0]["predicted_step_time_s"] == out[2]["predicted_step_time_s"]


def test_numbers_are_those_of_the_cost_model(model):
    row, (p, finite) = one(ROW), price(model, [measurement(0, ROW).job])
    assert finite.all()
    t = float(row["predicted_step_time_s"])
    assert t == pytest.approx(p.time[0], rel=1e-5)
    assert float(row["predicted_tokens_s_gpu"]) == pytest.approx(128 * 8192 / 64 / t, rel=1e-5)
    assert float(row["predicted_mem_gb"]) == pytest.approx(p.memory[0] / 1e9, rel=1e-5)
    assert float(row["high_mem_gb"]) == pytest.approx(p.memory_high[0] / 1e9, rel=1e-5)
    assert p.memory_high[0] > p.memory[0]
    assert float(row["low_step_time_s"]) < t < float(row["high_step_time_s"])
    assert (
        0 <= float(row["feasible"]) <= 1
        and row["bottleneck"] in hybrid.BOTTLENECKS.values()
        and not row["reason"]
    )


@pytest.mark.parametrize("answer", ["0.001", "1e9", "nan", "-3", "fast"])
def test_measured_columns_of_the_configurations_are_never_read(answer):
    assert (
        one(ROW | dict.fromkeys(MEASURED, answer))["predicted_step_time_s"]
        == one(ROW)["predicted_step_time_s"]
    )


def test_predictions_can_be_priced_again(tmp_path):
    first = run(tmp_path, [ROW])
    assert run(tmp_path, first) == first
    header = (tmp_path / "out.csv").read_text(encoding="utf8").splitlines()[0]
    assert header.split(",") == [*ROW, *ADDED]


@pytest.mark.parametrize(
    "changes", [{"tp": "2.0", "gbs": "128.0"}, {"dp": ""}, {"cp": " 1 "}, {"gpus": ""}]
)
def test_equal_spellings_cost_the_same(changes):
    assert seconds(changes) == seconds({})


def test_slower_links_and_more_work_take_longer():
    assert seconds({}, gbs="256") > seconds({}) and seconds({}, gpu="a100") > seconds({})


def test_a_pipeline_that_does_not_divide_the_layers_is_priced():
    uneven = one(ROW | {"pp": "3", "dp": "8", "gpus": "48"})
    assert not uneven["reason"] and float(uneven["predicted_step_time_s"]) > 0


def test_a_release_not_seen_costs_what_its_family_does(model):
    family = next(iter(model.effects["scale|family"]))
    group, _, framework = family.partition("/")
    known = {"group": group, "framework": framework}
    # No effect of its own release, that of the family all the same.
    assert seconds(known, era="2031") == seconds(known, era="2032")
    without = dataclasses.replace(
        model, effects={k: v for k, v in model.effects.items() if "|family" not in k}
    )
    row = ROW | known | {"era": "2031"}
    assert one(row)["predicted_step_time_s"] != one(row, model=without)["predicted_step_time_s"]


def test_an_unknown_model_with_shapes_is_priced():
    assert not one(ROW | SHAPES | {"model": "new-14b"})["reason"]
    assert seconds(SHAPES, model="new-14b", layers="80") > seconds(SHAPES, model="new-14b")


def test_without_a_file_the_table_goes_to_stdout(tmp_path, capsys):
    assert main([write(tmp_path / "configs.csv", [ROW])]) == 0
    said = capsys.readouterr()
    assert next(csv.DictReader(io.StringIO(said.out)))["id"] == "x1"
    assert said.err.startswith("priced 1 rows, refused 0; anchors used 0, rejected 0; ")


def test_blocks_change_nothing(model, monkeypatch):
    rows = [ROW | {"id": str(i), "tp": str(2**i), "dp": str(64 // 2**i)} for i in range(4)]
    whole = predict(rows, model)
    monkeypatch.setattr(command, "BLOCK", 2)
    for a, b in zip(whole, predict(rows, model), strict=True):
        assert a["id"] == b["id"]
        assert float(a["predicted_step_time_s"]) == pytest.approx(
            float(b["predicted_step_time_s"]), rel=1e-4
        )


def test_the_documented_command(tmp_path, monkeypatch):
    out = tmp_path / "predictions.csv"
    args = [
        write(tmp_path / "configs.csv", [ROW]),
        "--anchors",
        write(tmp_path / "a.csv", [ROW | {"step_time_s": "9"}]),
    ]
    monkeypatch.setattr(sys, "argv", ["predict", *args, "--out", str(out)])
    monkeypatch.delitem(sys.modules, command.__name__)
    with pytest.raises(SystemExit) as done:
        runpy.run_module(command.__name__, run_name="__main__")
    assert done.value.code == 0 and out.is_file()


# Rows that cannot be priced


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "h1000"}, "unknown chip 'h1000': did you mean 'h100'?"),
        ({"gpu": ""}, "unknown chip"),
        ({"model": "llama3-8B-new"}, "did you mean 'llama3-8b'?"),
        ({"model": "m", "arch": "hybrid", **SHAPES}, "hybrid with state-space layers"),
        ({"gbs": "many"}, "column 'gbs': 'many' is not a number"),
        ({"gbs": ""}, "column 'gbs' is empty"),
        ({"gbs": "64.5"}, "column 'gbs'"),
        ({"seq": "nan"}, "column 'seq': 'nan' is not within"),
        ({"tp": "0"}, "column 'tp': '0' is not within 1.."),
        ({"dp": "-2"}, "column 'dp'"),
        ({"pp": "inf"}, "column 'pp'"),
        ({"zero_stage": "4"}, "column 'zero_stage'"),
        ({**SHAPES, "hidden": "1e300"}, "column 'hidden'"),
        ({**SHAPES, "heads": "0"}, "column 'heads'"),
        ({**SHAPES, "layers": ""}, "column 'layers' is empty"),
        ({"dp": "16"}, "gpus = 64 is not tp·pp·cp·dp = 2·1·1·16 = 32"),
        ({"cp": "3", "gpus": "", "dp": "4"}, "is not divisible by cp = 3"),
        ({"precision": "int4"}, "column 'precision'"),
        ({"recompute": "banana"}, "column 'recompute'"),
    ],
)
def test_reason_names_the_column_and_the_row_is_kept(changes, reason):
    row = one(ROW | changes)
    assert reason in row["reason"] and row["id"] == "x1"
    assert not any(row[name] for name in ADDED if name != "reason")


def test_a_price_that_is_not_finite_is_refused(model):
    broken = dataclasses.replace(model, time=model.time | dict.fromkeys(model.time, float("nan")))
    assert "no finite time" in one(ROW, model=broken)["reason"]


def test_all_rows_refused_still_writes_the_file(tmp_path, capsys):
    out = run(tmp_path, [ROW | {"gpu": "abacus"}] * 2)
    assert len(out) == 2 and all("unknown chip" in row["reason"] for row in out)
    said = capsys.readouterr().err
    assert "warning: no row" in said and "priced 0 rows, refused 2" in said


# Anchors


def test_an_anchor_on_a_row_sets_it_and_narrows_it(tmp_path):
    free = one(ROW)
    measured = 1.3 * float(free["predicted_step_time_s"])
    other = ROW | {"model": "mixtral-8x7b", "gpu": "gb200", "group": "theirs", "id": "x2"}
    got, far = run(tmp_path, [ROW, other], [ROW | {"step_time_s": str(measured)}])
    assert float(got["predicted_step_time_s"]) == pytest.approx(measured, rel=0.05)

    def width(row):
        return float(row["high_step_time_s"]) / float(row["low_step_time_s"])

    assert width(got) < width(free)
    assert float(far["predicted_step_time_s"]) == pytest.approx(
        float(one(other)["predicted_step_time_s"]), rel=1e-4
    )


def test_tokens_per_second_and_memory_of_an_anchor_count(tmp_path):
    free = one(ROW)
    rate, memory = (
        0.7 * float(free["predicted_tokens_s_gpu"]),
        1.2 * float(free["predicted_mem_gb"]),
    )
    (got,) = run(tmp_path, [ROW], [ROW | {"tokens_s_gpu": str(rate), "mem_gb": str(memory)}])
    assert float(got["predicted_tokens_s_gpu"]) == pytest.approx(rate, rel=0.05)
    assert float(got["predicted_mem_gb"]) == pytest.approx(memory, rel=0.05)
    assert float(got["feasible"]) <= float(free["feasible"])


def test_bad_anchors_are_rejected_counted_and_named(tmp_path, capsys):
    time = one(ROW)["predicted_step_time_s"]
    bad = [
        {"step_time_s": "nan"},
        {"step_time_s": "0"},
        {"tokens_s_gpu": "-5"},
        {"step_time_s": time, "mem_gb": "nan"},
        {"step_time_s": ""},
        {"step_time_s": time, "status": "oom"},
        {"step_time_s": time, "gpu": "abacus"},
        {"step_time_s": "quick"},
    ]
    (got,) = run(tmp_path, [ROW], [*(ROW | row for row in bad), ROW | {"step_time_s": time}])
    said = capsys.readouterr().err
    assert "anchors used 1, rejected 8" in said and said.count("warning: anchor rejected") == 8
    assert (
        "anchors.csv, row 2: column 'step_time_s': 'nan' is not a positive finite measurement"
        in said
    )
    assert "row 4: column 'tokens_s_gpu'" in said and "row 5: column 'mem_gb'" in said
    assert "row 6: columns 'step_time_s', 'tokens_s_gpu' and 'mem_gb' are empty" in said
    assert "row 7: column 'status': 'oom'" in said and "row 8: unknown chip" in said
    assert got["predicted_step_time_s"]


def test_only_bad_anchors_change_nothing(tmp_path):
    assert run(tmp_path, [ROW], [ROW | {"step_time_s": "nan"}]) == run(tmp_path, [ROW])


def test_anchors_find_a_bias_on_published_runs(model):
    if not DATA.is_file():
        pytest.skip(f"no measured configurations at {DATA.parent}: the check needs published runs")
    rows = [
        row for row in csv.DictReader(DATA.open(encoding="utf8")) if row["group"] == "vtrain_multi"
    ]
    # A cost model that has forgotten chip, cluster and software is one that has not seen them.
    forgetful = dataclasses.replace(model, effects={})
    known, rejected = to_anchors(rows[::8])
    assert len(known) == 10 and not rejected

    def error(anchors):
        out = predict(rows, forgetful, anchors)
        return np.mean(
            [
                abs(float(r["predicted_step_time_s"]) / float(r["step_time_s"]) - 1)
                for i, r in enumerate(out)
                if i % 8
            ]
        )

    assert error(known) < 0.8 * error(())


# Files and the command line


def mistake(args, capsys):
    assert main(args) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def test_missing_and_empty_files(tmp_path, capsys):
    assert "none.csv" in mistake([str(tmp_path / "none.csv")], capsys)
    (tmp_path / "empty.csv").write_text("")
    assert "empty.csv: column 'gpu' is missing" in mistake([str(tmp_path / "empty.csv")], capsys)
    (tmp_path / "header.csv").write_text("model,gpu,seq,gbs\n")
    assert "no rows" in mistake([str(tmp_path / "header.csv")], capsys)
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    assert "bytes.csv" in mistake([str(tmp_path / "bytes.csv")], capsys)
    configs = write(tmp_path / "configs.csv", [ROW])
    assert "none.csv" in mistake([configs, "--anchors", str(tmp_path / "none.csv")], capsys)


@pytest.mark.parametrize("name", ["gpu", "seq", "gbs"])
def test_a_missing_column_is_named(tmp_path, capsys, name):
    row = {k: v for k, v in ROW.items() if k != name}
    assert f"column '{name}' is missing" in mistake(
        [write(tmp_path / "configs.csv", [row])], capsys
    )


def test_more_cells_than_columns(tmp_path, capsys):
    (tmp_path / "long.csv").write_text(
        "model,gpu,seq,gbs\nllama3-8b,h100,8192,128\nllama3-8b,h100,8192,128,9\n"
    )
    assert "row 3: more cells than the header has columns" in mistake(
        [str(tmp_path / "long.csv")], capsys
    )


def test_fewer_cells_than_columns_are_empty(tmp_path):
    (tmp_path / "short.csv").write_text("model,gpu,seq,gbs,tp,note\nllama3-8b,h100,8192,128\n")
    assert main([str(tmp_path / "short.csv"), "--out", str(tmp_path / "out.csv")]) == 0
    assert not next(csv.DictReader((tmp_path / "out.csv").open()))["reason"]


def test_output_that_cannot_be_written(tmp_path, capsys):
    configs = write(tmp_path / "configs.csv", [ROW])
    for out in (tmp_path, tmp_path / "no" / "where.csv"):
        assert f"cannot write {out}" in mistake([configs, "--out", str(out)], capsys)


def test_command_line_mistakes_are_one_line(capsys):
    for args in ([], ["a.csv", "--oout", "b.csv"]):
        with pytest.raises(SystemExit) as stopped:
            main(args)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_another_model_file(tmp_path, capsys, model):
    slower = dataclasses.replace(
        model, effects=model.effects | {"scale|family": {"mine/own": float(np.log(2))}}
    )
    (tmp_path / "mine.json").write_text(hybrid.to_json(slower))
    (plain,), (scaled,) = (
        run(tmp_path, [ROW]),
        run(tmp_path, [ROW], None, "--model-file", str(tmp_path / "mine.json")),
    )
    assert float(scaled["predicted_step_time_s"]) > 1.5 * float(plain["predicted_step_time_s"])
    configs = write(tmp_path / "configs.csv", [ROW])
    capsys.readouterr()
    for text in ("{", "[]", '{"time": {}}', "3"):
        (tmp_path / "bad.json").write_text(text)
        assert "bad.json" in mistake([configs, "--model-file", str(tmp_path / "bad.json")], capsys)
    for part, name in (("time", "gemm"), ("spread", "unseen"), ("fit", "slope")):
        lacking = json.loads(hybrid.to_json(model))
        lacking[part].pop(name)
        (tmp_path / "bad.json").write_text(json.dumps(lacking))
        assert f"lacks '{part}.{name}'" in mistake(
            [configs, "--model-file", str(tmp_path / "bad.json")], capsys
        )
