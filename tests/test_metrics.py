"""Metric rows survive kill -9 and resume; the progress line is short off a terminal; utilisation is
never made up.
"""

import contextlib
import errno
import io
import json
import math
import resource
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from fdp.keys import UserError
from fdp.metrics import ImpossibleSpeed, MetricsWriter, Progress, read_metrics, throughput
from fdp.tensorboard import Events

pytestmark = pytest.mark.fast


def test_rows_are_tagged_valid_json_and_non_finite_numbers_survive(tmp_path):
    writer = MetricsWriter(tmp_path, "tp", 3)
    writer.write(10, {"loss": float("nan"), "grad_norm": float("inf"), "skipped": 2})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {
        "arm": "tp",
        "seed": 3,
        "step": 10,
        "loss": "nan",
        "grad_norm": "inf",
        "skipped": 2,
    }
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["loss"])
    assert read["grad_norm"] == math.inf
    assert len(list((tmp_path / "tensorboard" / "tp-s3").iterdir())) == 1


@contextlib.contextmanager
def largest_file(size):
    """A file size limit stands for the full disk: EFBIG for ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_names_the_file_and_costs_no_row(tmp_path):
    writer = MetricsWriter(tmp_path, "a", 0)
    writer.write(1, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    with largest_file(path.stat().st_size + 20):
        with pytest.raises(OSError, match=str(path)) as error:
            writer.write(2, {"loss": 2.0})
        assert error.value.errno == errno.EFBIG
    writer.close()
    again = MetricsWriter(tmp_path, "a", 0)  # part of the row is there
    again.write(2, {"loss": 2.0})
    again.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


def test_a_full_disk_names_the_folder_of_tensorboard_and_stops_nobody_for_ever(tmp_path):
    events = Events(tmp_path / "a-s0")
    many = [lambda i=i: events.histogram("load", np.arange(99.0), i) for i in range(99)]
    with largest_file(10_000), pytest.raises(OSError, match="a-s0") as error:
        [one() for one in many]
    assert error.value.errno == errno.EFBIG


def test_events_of_tensorboard_hold_numbers_distributions_and_where_to_purge(tmp_path):
    writer = MetricsWriter(tmp_path, "a", 0)
    (tmp_path / "metrics.jsonl").touch()
    writer.resume(4)
    writer.write(5, {"loss": 1.5, "load": np.array([1.0, np.nan, 3.0])})
    writer.close()
    (path,) = (tmp_path / "tensorboard" / "a-s0").iterdir()
    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    _, purge, loss, load = events
    assert (purge.step, purge.session_log.status) == (5, SessionLog.START)
    assert (loss.step, loss.summary.value[0].tag) == (5, "loss")
    assert loss.summary.value[0].simple_value == 1.5
    assert (load.summary.value[0].histo.min, load.summary.value[0].histo.num) == (1, 2)


def test_resume_drops_only_later_rows_of_this_arm_and_seed(tmp_path):
    for arm, seed in (("a", 0), ("a", 1), ("b", 0)):
        writer = MetricsWriter(tmp_path, arm, seed)
        for step in (10, 20, 30):
            writer.write(step, {"loss": step / 10})
        writer.close()
    writer = MetricsWriter(tmp_path, "a", 0)
    writer.resume(20)
    writer.write(30, {"loss": 7.0})
    writer.close()
    rows = read_metrics(tmp_path)
    assert [(r["step"], r["loss"]) for r in rows if (r["arm"], r["seed"]) == ("a", 0)] == [
        (10, 1),
        (20, 2),
        (30, 7),
    ]
    assert len(rows) == 9


def test_half_written_last_line_is_dropped_and_not_glued_to_the_next(tmp_path):
    first = MetricsWriter(tmp_path, "a", 0)
    first.write(1, {"loss": 1.0})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"arm": "a", "se')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    writer = MetricsWriter(tmp_path, "a", 0)
    writer.resume(1)
    writer.write(2, {"loss": 2.0})
    writer.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


def test_damage_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"arm": "a", "seed": 0, "step": 1}\nbroken\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("line", ["[1, 2]", "null", '"x"', '{"arm": "a", "seed": 0, "step": "1"}'])
def test_a_line_that_is_no_row_is_named(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"line 1 is no row of metrics, .*: delete that line"):
        read_metrics(tmp_path)


def test_reserved_names_are_refused_and_no_file_means_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []
    with pytest.raises(ValueError, match="'step' is reserved"):
        MetricsWriter(tmp_path, "a", 0).write(1, {"step": 2})


def test_progress_off_a_terminal_prints_every_tenth_with_speed_and_time_left():
    stream, clock = io.StringIO(), iter(range(0, 100_000))
    with Progress(1000, 500, "tp-s0", stream=stream, clock=lambda: next(clock)) as progress:
        progress.note("first step after 1.0 s")
        for step in range(501, 1001):
            progress.update(step, "loss 2.0000")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "tp-s0: first step after 1.0 s"
    assert [line.split()[2] for line in lines[1:]] == [
        f"{s}/1000," for s in (600, 700, 800, 900, 1000)
    ]
    assert "loss 2.0000" in lines[1]
    assert "step/s" in lines[1]
    assert "left" in lines[1]
    assert "\r" not in stream.getvalue()


def test_progress_on_a_terminal_is_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(10, 0, "arm", stream=stream) as progress:
        for step in range(1, 11):
            progress.update(step, "loss 1.2500")
    assert "10/10" in stream.getvalue()
    assert "loss 1.2500" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_throughput_reports_utilisation_only_against_a_known_peak():
    assert throughput(4096, 0.5, 1e12, None) == {"tokens_per_s": 8192.0}
    assert throughput(4096, 0.5, 1e12, 4e12) == {"tokens_per_s": 8192.0, "mfu": 0.5}
    with pytest.raises(ValueError, match="must be positive"):
        throughput(1, 0.0, 1.0, None)


def test_a_utilisation_above_one_is_an_error_with_its_equation():
    assert throughput(4096, 0.5, 2e12, 4e12)["mfu"] == 1.0
    message = (
        r"MFU = FLOPs / seconds / peak = 3.6e\+12 / 0.5 / 4e\+12 = 180 % cannot be: .*fdp.audit"
    )
    with pytest.raises(ImpossibleSpeed, match=message):
        throughput(4096, 0.5, 3.6e12, 4e12)


def test_arrays_survive_and_keep_their_shape_within_an_arm_also_after_a_resume(tmp_path):
    load = np.array([[1.0, np.nan], [np.inf, 2.0]], np.float32)
    writer = MetricsWriter(tmp_path, "a", 0)
    writer.write(1, {"load": load, "nothing": np.full(2, np.nan)})
    writer.write(2, {"load": load})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    json.loads(text.splitlines()[0], parse_constant=lambda name: pytest.fail(f"{name}: no JSON"))
    np.testing.assert_array_equal(read_metrics(tmp_path)[0]["load"], load)
    resumed = MetricsWriter(tmp_path, "a", 0)
    resumed.resume(1)
    with pytest.raises(ValueError, match=r"metric 'load' has shape \(3,\) and had \(2, 2\)"):
        resumed.write(2, {"load": np.zeros(3)})
    MetricsWriter(tmp_path, "b", 0).write(2, {"load": np.zeros(3)})  # another arm, another model
    assert [(r["arm"], r["step"]) for r in read_metrics(tmp_path)] == [("a", 1), ("b", 2)]


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_what_an_editor_changes_costs_no_row(start: str, end: str, last: bool, tmp_path) -> None:
    rows = [json.dumps({"arm": "a", "seed": 0, "step": step, "loss": 5.0}) for step in (10, 20)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((start + f"{end}{end}".join(rows) + f"{end} {end}" * last).encode())
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20]
    writer = MetricsWriter(tmp_path, "a", 0)
    writer.resume(10)
    writer.write(11, {"loss": 4.0})
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 11]
