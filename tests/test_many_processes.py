"""Runs of two processes with four devices each, as the launcher starts them: a topic in a temporary
folder that trains in milliseconds a step."""

import json
import re
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fdp.topics
from fdp.metrics import read_metrics
from fdp.process import GONE
from fdp.run import run
from launch import local

STEPS = 60
SAME = 1e-6  # relative: Gloo adds in another order than one process does
CONFIG = """
import fdp.topics
fdp.topics.__path__.append({folder!r})
from fdp import config

def get_config(variant="tiny"):
    c = config.base(**config.topic_sections("herding"))
    c.topic, c.variant = "herding", variant
    c.train.update(batch=16, lr=1e-2, warmup=0)
    c.eval.update(every=20, batches=2)
    c.checkpoint.every, c.log.every = 20, 1
    c.herding.measure_every = 20
    c.mesh.update(dp=4, tp=2)
    return c
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config file of the topic."""
    shutil.copytree(Path(__file__).parent / "topic16", tmp_path / "topics" / "herding")
    file = tmp_path / "herding.py"
    file.write_text(CONFIG.format(folder=str(tmp_path / "topics")))
    return file


def command(config: Path, steps: int, workdir: Path) -> list[str]:
    """Of one process."""
    flags = f"--config={config}", f"--config.train.steps={steps}", f"--workdir={workdir}"
    return [sys.executable, "-m", "fdp.train", *flags]


def rows(workdir: Path) -> dict[Any, Any]:
    """All values of metrics.jsonl but speeds, by arm, step and name."""
    found: dict[Any, Any] = {}
    for row in read_metrics(workdir):
        for name, value in row.items():
            if name not in ("arm", "seed", "step") and "_per_s" not in name:
                key = row["arm"], row["seed"], row["step"], name
                assert key not in found, "a row is written once"
                found[key] = value
    return found


def wait_for(path: Path, size: int, processes: list[local.Process]) -> None:
    """Until the file has so many lines."""
    until = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < size:
        assert time.monotonic() < until and all(p.running.poll() is None for p in processes), [
            p.log.read_text() for p in processes
        ]
        time.sleep(0.01)


def ended(processes: list[local.Process]) -> tuple[int, str]:
    """(exit status, what the first process said)."""
    return local.follow(processes), processes[0].log.read_text()


def alone(config: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """The rows of one process with eight devices: this one."""
    monkeypatch.setattr(fdp.topics, "__path__", list(fdp.topics.__path__))
    c = runpy.run_path(str(config))["get_config"]()
    c.train.steps = STEPS
    run(c, workdir, "")
    return rows(workdir)


def worst(found: dict[Any, Any], expected: dict[Any, Any]) -> float:
    """The largest relative difference of two runs; they have the same rows."""
    assert found.keys() == expected.keys()
    pairs = [(np.ravel(found[key]), np.ravel(expected[key])) for key in expected]
    return max(float(np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-3))) for a, b in pairs)


def stopped_by_sigterm(config: Path, steps: int, workdir: Path, logs: Path) -> int:
    """Two processes, of which number 1 gets SIGTERM after 25 rows; the step that was saved."""
    two = local.start(command(config, steps, workdir), 2, 4, logs)
    wait_for(workdir / "metrics.jsonl", 25, two)
    two[1].running.send_signal(signal.SIGTERM)
    started = time.monotonic()
    code, said = ended(two)
    assert code in (0, 143) and time.monotonic() - started < 30
    assert said.count("\nmesh ") == 1 and "mesh " not in two[1].log.read_text()
    return int(re.findall(r"stopped after step (\d+); state saved", said)[0])


def test_two_processes_stop_together_and_one_resumes(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "two"
    step = stopped_by_sigterm(config, STEPS, workdir, tmp_path / "logs")
    saved = sorted(int(p.name) for p in (workdir / "checkpoints" / "herd-s0").iterdir())
    assert saved == [20, step]
    expected = alone(config, tmp_path / "one", monkeypatch)
    assert worst(alone(config, workdir, monkeypatch), expected) <= SAME
    assert (workdir / "report.json").is_file()


@pytest.mark.slow
def test_two_processes_resume_bitwise(config: Path, tmp_path: Path) -> None:
    found = []
    for name in ("stopped", "whole"):
        workdir = tmp_path / name
        if name == "stopped":
            stopped_by_sigterm(config, STEPS, workdir, tmp_path / "logs")
        assert ended(local.start(command(config, STEPS, workdir), 2, 4, tmp_path / "logs"))[0] == 0
        found.append(rows(workdir))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_dead_process_ends_the_other_and_nothing_is_lost(config: Path, tmp_path: Path) -> None:
    """kill -9 of one process at ten instants of one run: before it trains, while it trains."""
    steps, workdir, whole = 320, tmp_path / "killed", tmp_path / "whole"
    took, reached = [], 0
    for i in range(10):
        two = local.start(command(config, steps, workdir), 2, 4, tmp_path / f"logs{i}")
        victim, survivor = two[i % 2], two[1 - i % 2]
        if i < 2:
            time.sleep(3.0 + i)
        else:
            reached += 25 + i
            wait_for(workdir / "metrics.jsonl", reached, two)
        victim.running.kill()
        started = time.monotonic()
        assert survivor.running.wait(60) != 0
        took.append(time.monotonic() - started)
        said = survivor.log.read_text()
        if victim.number == 1 and i > 1:  # before, they have not met
            assert f"error: process 1 ({socket.gethostname()}, pid {victim.running.pid})" in said
            assert "no sign of life for" in said and "the same command resumes" in said
            assert survivor.running.returncode == GONE
        else:
            assert "another task died" in said or i == 1, said
    assert max(took) <= 30, took
    for folder in (workdir, whole):
        assert ended(local.start(command(config, steps, folder), 2, 4, tmp_path / "logs"))[0] == 0
    assert rows(workdir) == rows(whole)
    print("seconds until the other was gone:", [round(t, 1) for t in took])


@pytest.mark.slow
def test_a_topic_reports_alike_from_two_processes(tmp_path: Path) -> None:
    """Topic 1, from the start to the report."""
    reports = []
    for name, processes in (("one", 1), ("two", 2)):
        given = ["--config=configs/topic1.py:tiny", f"--workdir={tmp_path / name}"]
        command = [sys.executable, "-m", "fdp.train", *given]
        ran = local.start(command, processes, 8 // processes, tmp_path / f"logs-{name}")
        assert ended(ran)[0] == 0
        reports.append(json.loads((tmp_path / name / "report.json").read_text())["rows"])
    trained = [rows(tmp_path / name) for name in ("one", "two")]
    print("training rows:", worst(*trained))
    for one, two in zip(*reports, strict=True):
        print(one["claim"], one["value"], two["value"])
        assert (one["claim"], one["verdict"]) == (two["claim"], two["verdict"])
    assert worst(*trained) <= SAME
