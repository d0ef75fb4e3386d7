"""A workdir belongs to one run at a time and one experiment, and knows what trained its steps."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fdp.keys import UserError
from fdp.workdir import Record, SegmentLog, bind, check, locked, record_of

pytestmark = pytest.mark.fast
FACTS = {"jax_enable_x64": False, "corpus of ar": "a" * 64}
BASE = Record(
    {"mesh.dp": 8, "train.lr": 3e-3, "train.zero": 0, "train.zeroth": 1, "seeds": (0, 1)},
    "aaa",
    FACTS,
    {"jax": "0.10.2"},
)


def other(config_hash="bbb", facts=(), versions=(), **config) -> Record:
    """BASE with some keys, facts or versions changed."""
    changed = BASE.config | {name.replace("__", "."): v for name, v in config.items()}
    return Record(changed, config_hash, FACTS | dict(facts), BASE.versions | dict(versions))


def stored(workdir: Path, record: Record, label="ar-s0", step=4) -> Path:
    """What a checkpoint says of its run."""
    path = workdir / "checkpoints" / label / str(step) / "meta" / "metadata"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"run": record.to_json()}))
    return path


# Identity
# --------------------------------------------------------------------------------------------------


def test_a_workdir_belongs_to_one_config(tmp_path) -> None:
    bind(tmp_path / "run", BASE)
    path = tmp_path / "run" / "config.json"
    written = json.loads(path.read_text())
    assert (written["config_hash"], written["config"]["train.lr"]) == ("aaa", 3e-3)
    assert check(tmp_path / "run", other(mesh__dp=2, train__zero=3)) == []
    changed = other(train__lr=1e-3, train__zeroth=2)
    message = (
        r"run was made by another config: train.lr: 0.003 -> 0.001; train.zeroth: 1 -> 2. Fix: .*"
        r"--workdir=.*checkpoint.allow_config_change=True"
    )
    before = path.read_bytes()
    with pytest.raises(UserError, match=message):
        bind(tmp_path / "run", changed)
    assert path.read_bytes() == before
    assert check(tmp_path / "run", changed, True)[0] == "train.lr: 0.003 -> 0.001"
    assert path.read_bytes() == before, "only training writes"
    path.write_text("{")
    with pytest.raises(UserError, match="not a config file of fdp"):
        bind(tmp_path / "run", BASE)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"corpus of ar": "b" * 64}, f"corpus of ar: {'a' * 12} -> {'b' * 12}"),
        ({"jax_enable_x64": True}, "jax_enable_x64: False -> True"),
    ],
)
def test_another_text_and_other_settings_of_jax_are_another_run(tmp_path, facts, said) -> None:
    bind(tmp_path, BASE)
    with pytest.raises(UserError, match=f"made by another config: {said}. Fix"):
        check(tmp_path, other(facts=facts))
    assert check(tmp_path, other(facts=facts), allow_other=True) == [said]


def test_another_version_is_said_and_locks_nobody_out(tmp_path) -> None:
    bind(tmp_path, BASE)
    assert check(tmp_path, other(versions={"jax": "0.12.0"})) == ["jax: '0.10.2' -> '0.12.0'"]
    older = replace(BASE, facts={}, versions={})  # of a time before they were stored
    bind(tmp_path, older)
    assert check(tmp_path, BASE) == []


def test_a_key_of_a_newer_version_had_its_default_and_a_gone_one_does_not_matter(tmp_path) -> None:
    bind(tmp_path, replace(BASE, config=BASE.config | {"train.gone": 3}))
    assert check(tmp_path, other(train__beta2=0.98)) == []
    with pytest.raises(UserError, match=r"train.beta2: 0.98 -> 0.5"):
        check(tmp_path, other(train__beta2=0.5))


def test_checkpoints_without_their_config_file_know_their_run(tmp_path) -> None:
    stored(tmp_path, BASE)
    assert check(tmp_path, BASE) == []
    with pytest.raises(UserError, match=r"checkpoint ar-s0 in .* train.lr: 0.003 -> 0.1. Fix"):
        check(tmp_path, other(train__lr=0.1))
    bind(tmp_path, other(train__lr=0.1), allow_other=True)
    with pytest.raises(UserError, match="checkpoint ar-s0 in"):
        check(tmp_path, other(train__lr=0.1))  # a folder of another run, put here
    stored(tmp_path, BASE, "broken-s0").write_text("{")  # told when it is restored
    assert check(tmp_path, other(train__lr=0.1), allow_other=True)


def test_two_seeds_of_one_random_key_are_one(tmp_path) -> None:
    def arm(seed):
        return SimpleNamespace(name="ar", seed=seed, data=SimpleNamespace(sha256="a" * 64))

    record = record_of({"topic": ""}, [arm(0), arm(1)], {})
    assert record.facts["random key of seed 1"] == [0, 1]
    assert record.facts["corpus of ar"] == "a" * 64 and not record.facts["jax_enable_x64"]
    with pytest.raises(UserError, match=r"seeds 0 and 4294967296 have the same random key \[0, 0"):
        record_of({"topic": ""}, [arm(0), arm(2**32)], {})


# Segments
# --------------------------------------------------------------------------------------------------


def test_the_ledger_names_what_trained_which_steps(tmp_path) -> None:
    mesh, label = {"dp": 8}, "ar-s0"
    first = SegmentLog(tmp_path, BASE)
    assert not list(tmp_path.iterdir()), "a start that fails leaves nothing"
    first.begin(label, 0, mesh)
    first.begin(label, 4, mesh)  # resumed
    assert first.told([label]) == [] and len(first.segments) == 1
    changed = other(train__lr=1e-3, versions={"jax": "0.12.0"})
    stored(tmp_path, BASE)
    with pytest.raises(UserError, match=r"train.lr: 0.003 -> 0.001"):
        check(tmp_path, changed)
    second = SegmentLog(tmp_path, changed)
    second.begin(label, 4, {"dp": 2})
    assert check(tmp_path, changed) == [], "the older checkpoint is known"
    assert SegmentLog(tmp_path, changed).told([label, "x-s0"]) == [
        "ar-s0: from step 0 by config aaa; from step 4 by config bbb (train.lr: 0.003 -> 0.001; "
        "jax: '0.10.2' -> '0.12.0'; mesh: dp8 -> dp2)"
    ]
    second.begin(label, 2, {"dp": 2})  # fell back: what was trained from step 4 on is gone
    assert [s["first"] for s in second.segments] == [0, 2]
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="checkpoint ar-s0 in"):
        check(tmp_path, changed)
    second.path.write_text("[]")
    with pytest.raises(UserError, match=r"segments.json is not a file of fdp .* move it away"):
        SegmentLog(tmp_path, changed)


def test_a_finished_run_keeps_its_config_and_the_report_says_that_another_one_reports(
    tmp_path,
) -> None:
    SegmentLog(tmp_path, BASE).begin("ar-s0", 0, {"dp": 8})
    reported = other("ccc", train__batch=64)
    assert check(tmp_path, reported, allow_other=True) == ["train.batch: 32 -> 64"]
    assert SegmentLog(tmp_path, reported).told(["ar-s0"]) == [
        "ar-s0: from step 0 by config aaa; reported by config ccc (train.batch: 32 -> 64)"
    ]
    assert json.loads((tmp_path / "config.json").read_text())["config_hash"] == "aaa"


# One run at a time
# --------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path) -> None:
    said = rf"is in use by process {os.getpid()} on \S+, started 2\d+-.*: wait for it, stop it, or"
    with locked(tmp_path / "run"):
        with pytest.raises(UserError, match=said), locked(tmp_path / "run"):
            pass
        assert "started" in (tmp_path / "run" / "lock").read_text()
    with locked(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / "lock").read_text() == ""


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path) -> None:
    path = tmp_path / "lock"
    hold = (
        "import fcntl, sys, time\n"
        f"file = open({str(path)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write('process 1 on a host'); file.flush(); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match="in use by process 1 on a host"), locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with locked(tmp_path):
        assert f"process {os.getpid()}" in path.read_text()


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="lock"), locked(tmp_path):
        pass
    assert not (tmp_path / "victim").exists()
