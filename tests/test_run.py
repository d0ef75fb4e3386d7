"""A run that is interrupted outside training ends in one line and the command that resumes; one
that reports nonsense says what is wrong and keeps what it measured."""

import json
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from stub.config import get_config

from fdp import config as fdp_config
from fdp import run as fdp_run
from fdp.study.figures import figure
from fdp.study.measure import measure
from fdp.study.report import Report, Row

pytestmark = pytest.mark.fast
STOPS = (signal.SIGINT, signal.SIGTERM)
now: list[str] = []  # where the signal strikes
struck: list[signal.Signals] = []
status: list[int] = []  # of each start


def strike(where: str) -> None:
    if where in now:
        now.remove(where)
        signal.raise_signal(struck[0])


def first() -> float:
    """Counted."""
    now.append("first was measured")
    return 1.0


def second() -> np.ndarray:
    strike("measurement")
    return np.ones(3)


def row(value: float) -> Row:
    strike("rows")
    return Row.judged("one is one", "value", value, "", "== 1", "counted", decides=True)


def plot(values: np.ndarray):
    strike("plot")
    fig, axes = figure()
    axes.plot(values)
    return fig


def study(run: fdp_run.Run) -> Report:
    """Two measurements, a row and a picture."""
    return run.report(measure("first", first, rows=row), measure("second", second, plot=plot))


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Starts the run of a study without arms: what it prints."""

    def run(study=study) -> str:
        module = SimpleNamespace(QUESTION="Is one one?", study=study, arms=lambda config: {})
        monkeypatch.setattr(fdp_run, "study_of", lambda topic: module)
        handlers = [signal.getsignal(n) for n in STOPS]
        arguments = "--config=a.py --workdir=run"
        status.append(fdp_run.run(get_config("tiny"), str(tmp_path / "run"), arguments))
        assert [signal.getsignal(n) for n in STOPS] == handlers
        return capsys.readouterr().out

    now.clear()
    status.clear()
    return run


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("where", ["measurement", "rows", "plot", "report"])
def test_a_signal_in_study_plot_and_report_is_one_line_with_the_resume_command(
    start, tmp_path, monkeypatch, where, number
) -> None:
    struck[:], now[:] = [number], [where]
    write = Report.write
    monkeypatch.setattr(Report, "write", lambda *a: (strike("report"), write(*a)))
    said = start().splitlines()
    kept = f"stopped; what was finished is kept in {tmp_path / 'run'}. Resume with:"
    assert said[-2:] == [kept, "  python -m fdp.train --config=a.py --workdir=run"]
    assert not (tmp_path / "run" / "report.json").exists()
    assert status == [128 + number]
    assert now == ["first was measured"]
    now.clear()
    assert "answer    Yes: 1 of 1 deciding claims hold; one is one: 1 (== 1, holds)." in start()
    assert not now, "measured again"
    assert (tmp_path / "run" / "plots" / "second.png").is_file()


def test_the_end_of_a_run_is_the_opening_of_its_report(start, tmp_path) -> None:
    said = start()
    assert "question  Is one one?" in said
    assert f"report    {tmp_path / 'run' / 'report.md'} (1 rows: 1 holds)" in said
    assert f"plots     {tmp_path / 'run' / 'plots' / 'second.png'}" in said
    content = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (content["question"], content["rows"][0]["decides"]) == ("Is one one?", True)
    assert (tmp_path / "run" / "report.md").read_text().splitlines()[2] == "**Is one one?**"


def test_a_run_in_a_thread_reports_and_touches_no_signal(start, tmp_path) -> None:
    handlers, said = [signal.getsignal(n) for n in STOPS], []

    def inside(run: fdp_run.Run) -> Report:
        assert [signal.getsignal(n) for n in STOPS] == handlers
        return study(run)

    thread = threading.Thread(target=lambda: said.append(start(inside)))
    thread.start()
    thread.join()
    assert status == [0] and "question  Is one one?" in said[0]


def test_a_run_checks_its_config_and_its_folder(tmp_path) -> None:
    c = get_config("tiny")
    c.train.batch = 3
    with pytest.raises(fdp_config.UserError, match="global batch 3 is not divisible"):
        fdp_run.run(c, tmp_path)
    with pytest.raises(fdp_config.UserError, match="workdir=gs://a/b is an address of gs"):
        fdp_run.run(get_config("tiny"), "gs://a/b")


def nothing(run):
    return run.report(measure("first", first))


def not_a_number(run):
    return run.report(measure("first", first, rows=lambda value: row(value * np.nan)))


def no_picture(run):
    report = study(run)
    report.plots.append("plots/none.png")
    return report


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (nothing, "report, key 'rows': a study must judge at least one claim"),
        (not_a_number, "row 'one is one': nan cannot be judged by '== 1'"),
        (no_picture, "report, key 'plots': file plots/none.png is missing"),
    ],
)
def test_a_report_that_says_nothing_is_one_error_and_costs_no_measurement(
    start, tmp_path, study, message
) -> None:
    with pytest.raises(fdp_config.UserError, match=message) as error:
        start(study)
    assert f"What was measured is kept in {tmp_path / 'run' / 'measured'}" in str(error.value)
    assert (tmp_path / "run" / "measured" / "first.npz").is_file()


def test_an_import_that_no_arm_starts_from_is_refused(tmp_path) -> None:
    (tmp_path / "checkpoints" / "model-s0" / "0").mkdir(parents=True)
    (tmp_path / "checkpoints" / "aux-s0" / "0").mkdir(parents=True)
    arms = [SimpleNamespace(name="aux", label="aux-s0")]
    with pytest.raises(fdp_config.UserError, match=r"imported model-s0, .* --arm=aux"):
        fdp_run._check_imported(tmp_path, arms)
    fdp_run._check_imported(tmp_path, [*arms, SimpleNamespace(name="model", label="model-s0")])
