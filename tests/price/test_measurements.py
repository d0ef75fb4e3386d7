"""Rows of measurement files: what they become, and what is refused, by row and column."""

import csv

import pytest

from fdp.price import measurements
from fdp.price.measurements import Malformed, measurement, read, table

pytestmark = pytest.mark.fast

ROW = {
    "model": "llama3-8b",
    "gpu": "h100",
    "seq": "8192",
    "gbs": "128",
    "gpus": "16",
    "tp": "2",
    "pp": "1",
    "cp": "2",
    "mbs": "1",
    "precision": "FP8-CS",
    "group": "mine",
    "framework": "own",
    "era": "1",
}


def test_a_row_becomes_a_job():
    job = measurement(0, ROW | {"step_time_s": "2.5", "mem_gb": "60"}).job
    assert (job.shape.name, job.chip.name, job.precision, job.batch) == (
        "llama3-8b",
        "h100",
        "fp8",
        128,
    )
    assert (job.plan.tp, job.plan.cp, job.plan.dp, job.plan.chips) == (2, 2, 4, 16)
    assert (job.stack, job.cluster) == ("mine/own/1", "mine")


def test_the_playbook_goes_by_several_names():
    job = measurement(
        0, ROW | {"group": "ultrascale_playbook", "framework": "", "model": "8B", "seq": "4096"}
    ).job
    assert (job.shape.name, job.stack, job.cluster) == (
        "ultrascale-8b",
        "playbook/nanotron/",
        "playbook",
    )


def test_step_time_comes_from_tokens_per_second_where_it_must():
    assert measurement(0, ROW | {"tokens_s_gpu": "8192"}).step_time == pytest.approx(
        128 * 8192 / (8192 * 16)
    )


def test_a_dispatch_library_tells_the_expert_degree_that_the_cell_does_not():
    moe = (
        ROW
        | {"model": "mixtral-8x7b", "ep": "1", "experts": "8"}
        | {
            "layers": "32",
            "hidden": "4096",
            "heads": "32",
            "kv_heads": "8",
            "ffn": "14336",
            "topk": "2",
        }
    )
    assert measurement(0, moe | {"notes": "TE + DeepEP"}).job.plan.ep == 8
    assert measurement(0, moe | {"notes": "TE + DeepEP", "ep": "2"}).job.plan.ep == 2
    assert measurement(0, moe).job.plan.ep == 1


def test_unknown_models_are_priced_from_their_shapes():
    shapes = {
        "model": "nobody-7b",
        "layers": "32",
        "hidden": "4096",
        "heads": "32",
        "ffn": "16384",
        "vocab": "50000",
    }
    model = measurement(0, ROW | shapes).job.shape
    assert (model.gated, model.kv_heads, model.head_dim) == (False, 32, 128)
    assert measurement(0, ROW | shapes | {"ffn": "11008"}).job.shape.gated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama3-9b"}, "unknown model 'llama3-9b': did you mean 'llama3-8b'"),
        ({"gpu": "h1000"}, "unknown chip 'h1000': did you mean 'h100'"),
        ({"arch": "hybrid"}, "hybrid with state-space layers"),
        ({"gbs": ""}, "column 'gbs' is empty"),
        ({"tp": "two"}, "column 'tp': 'two' is not a number"),
        ({"tp": "2.5"}, "column 'tp': '2.5' is not a whole number"),
        ({"dp": "8"}, r"gpus = 16 is not tp·pp·cp·dp = 2·1·2·8 = 32"),
        ({"gbs": "2"}, r"gbs = 2 is less than dp·mbs = 4·1"),
        (
            {"pp": "64", "gpus": "256"},
            r"pp·vp = 64·1 stages exceed the 32 layers, embedding and head",
        ),
        ({"gbs": "130"}, "gbs = 130 is not divisible by dp·mbs = 4"),
        ({"tp": "5", "gpus": "10"}, r"neither heads = 32 nor ffn = 14336 is divisible by tp = 5"),
        ({"cp": "3", "gpus": "6"}, "seq = 8192 is not divisible by cp = 3"),
        ({"model": "mixtral-8x7b", "ep": "3"}, "experts = 8 is not divisible by ep = 3"),
        (
            {"model": "mixtral-8x7b", "ep": "8", "etp": "4"},
            "dp·cp·tp = 16 is not divisible by ep·etp = 32",
        ),
        ({"fsdp_size": "3"}, "dp·cp = 8 is not divisible by fsdp_size = 3"),
        ({"recompute": "banana"}, "column 'recompute': 'banana' is none of none, selective, full"),
        ({"precision": "int4"}, "column 'precision': 'int4' is none of bf16, fp16"),
        (
            {"step_time_s": "nan"},
            "column 'step_time_s': 'nan' is not a positive finite measurement",
        ),
        (
            {"tokens_s_gpu": "-3"},
            "column 'tokens_s_gpu': '-3' is not a positive finite measurement",
        ),
    ],
)
def test_a_row_that_cannot_be_priced_says_why(changes, message):
    with pytest.raises(ValueError, match=message):
        measurement(0, ROW | changes)
    found = table([ROW, ROW | changes])
    assert len(found.measurements) == 1
    assert list(found.refused) == [1]


def write(path, rows, names=None):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_malformed_files_are_refused_with_their_place(tmp_path):
    with pytest.raises(Malformed, match=r"absent\.csv"):
        read(tmp_path / "absent.csv")
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(Malformed, match="column 'gpu' is missing; found none"):
        read(empty)
    with pytest.raises(Malformed, match="column 'gbs' is missing"):
        read(write(tmp_path / "short.csv", [{"gpu": "h100", "seq": "1"}]))
    long = tmp_path / "long.csv"
    long.write_text("gpu,seq,gbs\nh100,1,2\nh100,1,2,3\n")
    with pytest.raises(Malformed, match="row 3: more cells than the header"):
        read(long)
    with pytest.raises(Malformed, match="holds neither"):
        measurements.published(tmp_path)


RUN = {
    "model": "8B",
    "nodes": "8",
    "micro_batch": "2",
    "global_batch_seqs": "256",
    "dp": "32",
    "pp": "1",
    "tp": "2",
    "zero_stage": "1",
    "status": "failed",
    "tok_s_gpu": "",
    "peak_mem_gb": "",
    "batch_consistent": "1",
}


def test_published_rows_that_cannot_be_priced_are_counted_with_file_row_and_column(tmp_path):
    write(tmp_path / "measured_configs.csv", [ROW | {"step_time_s": s} for s in ("2.5", "nan")])
    write(
        tmp_path / "ultrascale_playbook_runs.csv",
        [RUN, RUN | {"nodes": "many"}, RUN | {"batch_consistent": "0"}],
    )
    found, refused = measurements.published(tmp_path)
    assert len(found) == 2
    assert refused == [
        "measured_configs.csv, row 3: column 'step_time_s': 'nan' is not a positive finite "
        "measurement",
        "ultrascale_playbook_runs.csv, row 3: column 'nodes': 'many' is not a number",
        "ultrascale_playbook_runs.csv, row 4: column 'batch_consistent': the batch contradicts the "
        "degrees",
    ]
    write(
        tmp_path / "ultrascale_playbook_runs.csv",
        [{k: v for k, v in RUN.items() if k != "zero_stage"}],
    )
    with pytest.raises(Malformed, match="column 'zero_stage' is missing"):
        measurements.published(tmp_path)


def test_the_playbook_is_read_in_our_columns():
    found = measurements.playbook([RUN, RUN | {"batch_consistent": "0"}]).measurements
    assert len(found) == 1
    assert found[0].failed
    assert found[0].job.plan.chips == 64
