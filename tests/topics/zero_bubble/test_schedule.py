"""The command that searches, checks and draws schedules."""

import re

import matplotlib.image
import pytest
from absl import flags

from fdp.command import one_line
from fdp.parallel.pipeline.check import check
from fdp.parallel.pipeline.csv_format import read_csv, write_csv
from fdp.parallel.pipeline.fixed import zbv
from fdp.topics.zero_bubble import schedule


@pytest.fixture
def command(capsys):
    """(exit code, stdout, stderr) of the command line."""

    def run(*args):
        values = flags.FlagValues()
        schedule.declare(values)
        rest = values(["schedule", *args])[1:]
        try:
            with one_line(ValueError):
                schedule.run(values, rest)
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def test_search_prints_draws_and_exports(command, tmp_path):
    costs, out = tmp_path / "costs.csv", tmp_path / "found.csv"
    costs.write_text("1\n.25\n1,.25\n")
    code, text, _ = command(
        "--p=2", "--m=4", "--times=1,1.5,.5", f"--costs={costs}", "--memory=2", "--send=.1",
        f"--export={out}",
    )  # fmt: skip
    assert code == 0
    order = read_csv(out, p=2)
    check(order)
    assert order.microbatches == 4
    for part in ("asynchronous", "neighbour", "lock-step", "idle ", "held ", "bound ", "proof "):
        assert part in text
    assert re.search(r"1f1b .* (slower|equal)", text)
    assert re.search(r"gpipe .* holds 4 bytes, 2 over the cap", text)
    assert matplotlib.image.imread(out.with_suffix(".png")).std() > 0.05


def test_check_prices_a_file(command, tmp_path):
    path = tmp_path / "theirs.csv"
    write_csv(zbv(2, 4), path)
    code, text, _ = command(f"--check={path}", "--times=1,1,1")
    assert code == 0
    assert "runs: p=2, wave with 2 chunks a device, 4 microbatches, 48 operations" in text
    path.write_text(path.read_text().replace("0F0,0F1", "0F1,0F0", 1).replace("3I0", "3I1", 1))
    code, _, error = command(f"--check={path}", "--times=1,1,1")
    assert code == 1 and re.match(r"error: stage \d, row \d+: .* is repeated", error)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--times=1,2",), "--times=1,2 has 2 numbers: give three, F,B,W"),
        (("--times=1,2,x",), "is not a list of numbers"),
        (("--times=1,nan,1", "--m=2"), "--times: number 2 is nan: give 0, or one from 1e-12"),
        (("--times=1,-1,1", "--m=2"), "--times: number 2 is -1.0: give 0"),
        (("--times=1,1e-320,1", "--m=2"), "--times: number 2 is 1e-320: give 0"),
        (("--times=0,0,0", "--m=2"), "all operations of --times=0,0,0 take no time"),
        (("--send=inf",), "--send: number 1 is inf"),
        (("--costs=nowhere.csv",), "nowhere.csv: No such file or directory"),
        (("--check=",), "error: .: Is a directory"),
        (("--check=nowhere.csv", "--memory=2"), "--memory belongs to a search"),
        (("--check=nowhere.csv", "--export=x.csv"), "--export belongs to a search"),
        (("--export=nowhere/x.csv",), "--export=nowhere/x.csv is no file that can be written"),
        (("--export=.",), "--export=. is no file that can be written"),
        (("--export=x.png",), "or the picture's"),
        (("--memory=nan",), "--memory=nan must be above 0"),
        (("--m=0",), "--p=8 and --m=0 must be at least 1"),
        (("--p=200", "--m=200"), "p·m = 40000 at most 16384"),
        (("--memory=.5", "--p=2", "--m=2"), "stage 0 may hold 0.5 bytes, but any schedule holds"),
        (("--p=0",), "p=0"),
        (("word",), "unexpected argument(s) word"),
    ],
)
def test_mistakes_are_one_line(command, args, message):
    code, text, error = command(*args)
    assert code == 1 and not text
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_costs_of_a_file_are_named(command, tmp_path):
    path = tmp_path / "costs.txt"
    for text, said in (
        ("1,-3", f"--costs={path}: number 2 is -3.0"),
        ("1,nan", f"--costs={path}: number 2 is nan"),
        ("1,a", "'1,a' is not a list of numbers"),
        ("", "'' is not a list of numbers"),
        ("1", f"--costs={path} has 1 numbers, one a microbatch, and m=2"),
    ):
        path.write_text(text)
        code, _, error = command("--p=2", "--m=2", f"--costs={path}")
        assert code == 1 and said in error
    path.write_bytes(b"\xff\xfe1")
    assert "is no text" in command("--p=2", "--m=2", f"--costs={path}")[2]


def test_a_checked_file_has_its_own_microbatches(command, tmp_path):
    path = tmp_path / "theirs.csv"
    write_csv(zbv(2, 4), path)
    assert "has 4 microbatches, not --m=5" in command(f"--check={path}", "--m=5")[2]


def test_fewer_microbatches_than_devices_is_a_warning(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text, _ = command("--p=3", "--m=1")
    assert code == 0
    assert re.match(r"warning: m=1 < p=3: the pipeline never fills, \d+\.\d% of it idles", text)
    assert (tmp_path / "schedule.png").exists()
