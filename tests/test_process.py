"""Start, agreement, and arrays in and out of several processes."""

import errno
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fdp import command, process
from fdp.keys import UserError
from fdp.mesh import make_mesh
from fdp.sharding import shardings
from launch import local, slurm

P = jax.sharding.PartitionSpec


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("host:1", "2", None), "FDP_PROCESS=(not set): set all three"),
        (("host", "2", "0"), "FDP_COORDINATOR=host, "),
        (("host:1", "2", "2"), "0 ≤ process < it"),
        (("host:1", "two", "0"), "FDP_PROCESSES=two, "),
        (("host:1", "2", "-1"), "FDP_PROCESS=-1: set all three"),
    ],
)
def test_variables_that_name_no_process_are_refused(monkeypatch, values, said) -> None:
    for name, value in zip(process.VARIABLES, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        process._given()
    assert said in str(refused.value)


def test_nothing_starts_without_a_launcher(monkeypatch) -> None:
    for name in (*process.VARIABLES, "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert process._given() is None and not process._launched()
    monkeypatch.setenv("SLURM_STEP_NODELIST", "a")
    monkeypatch.setenv("SLURM_NTASKS", "1")  # a shell inside an allocation
    assert not process._launched()
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert process._launched()


def test_a_process_that_stays_alone_says_so(tmp_path) -> None:
    code = "from fdp import process; process.START = 1.0; process.start(8)"
    told = local.environment(1, 2, 4, local.free_port())  # nobody is process 0
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=told, check=False
    )
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1
    assert (
        "did not find each other within 1 s; process 1 of 2, coordinator localhost:" in ran.stderr
    )


def test_one_process_decides_alone() -> None:
    assert process.count() == 1 and process.main()
    assert process.decided(lambda: {"any": object}) == {"any": object}
    assert process.agree(True) and not process.agree(False)
    assert process.stopping("run", 5, True) and not process.stopping("run", 5, False)
    with pytest.raises(KeyError):
        process.failed(KeyError("as it was"))


def test_the_text_of_the_main_process_is_that_of_all(monkeypatch) -> None:
    """Processes that fail alike say it once, so the others must have the same text."""
    posted: dict[str, str] = {}
    monkeypatch.setattr(process, "count", lambda: 2)
    monkeypatch.setattr(
        process, "_client", lambda: SimpleNamespace(key_value_set=posted.__setitem__)
    )

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a")

    with pytest.raises(OSError, match="runs/a") as error:
        process.decided(full)
    (said,) = (json.loads(text) for text in posted.values())
    assert f"error: {said['error']}" == command.told(error.value)


def test_the_other_processes_print_any_character() -> None:
    code = "from fdp import process; process.nowhere().write(chr(8804) + chr(0xDCFF))"
    told = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], env=told, check=True)


def test_arrays_go_in_and_come_out_whole() -> None:
    mesh = make_mesh({"pp": 1, "dp": 2, "ep": 1, "cp": 1, "tp": 4})
    x = np.arange(32.0).reshape(8, 4)
    where = shardings(mesh, {"x": P("dp", "tp"), "key": P()})
    given = {"x": x, "key": jax.random.key(3)}
    placed = process.place(given, where)
    assert placed["x"].sharding == where["x"]
    np.testing.assert_array_equal(process.fetch(placed["x"]), x)
    # What several processes do, where one can do it as well.
    same = jax.tree.map(process._placed, given, where)
    assert same["x"].sharding == where["x"] and same["key"] == placed["key"]
    np.testing.assert_array_equal(same["x"], x)


def test_each_process_is_told_who_it_is(monkeypatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert local.environment(0, 2, 4, 999)["JAX_PLATFORMS"] == "tpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    assert local.environment(0, 2, 4, 999)["JAX_PLATFORMS"] == "cpu"
    told = local.environment(1, 2, 4, 999)
    assert [told[name] for name in process.VARIABLES] == ["localhost:999", "2", "1"]
    assert told["JAX_NUM_CPU_DEVICES"] == "4" and told["PATH"] == os.environ["PATH"]


def test_the_launcher_asks_for_a_config() -> None:
    command = [sys.executable, "-m", "launch.local", "--processes=2", "--", "--workdir=x"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "--config among them" in ran.stdout + ran.stderr


def slurm_script(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "launch.slurm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_batch_script_asks_for_a_signal_and_runs_again(tmp_path) -> None:
    file, workdir = "--config=configs/topic1.py:h100", f"--workdir={tmp_path / 'a b'}"
    script = slurm_script(file, "--nodes=2", workdir, "--print").stdout
    for line in ("nodes=2", "ntasks-per-node=1", "signal=TERM@300", "requeue"):
        assert f"#SBATCH --{line}\n" in script
    assert f"fdp.train {file} --config.mesh.dp=2 '{workdir}'\n" in script
    # The script with srun and scontrol that only say what they are given.
    for status, again in (("0", False), ("1", False), ("143", True), ("137", True)):
        said = tmp_path / "said"
        said.unlink(missing_ok=True)
        tools = f"srun() {{ return {status}; }}; scontrol() {{ echo $@ > '{said}'; }}\n"
        ran = subprocess.run(["bash", "-c", tools + script], env={"SLURM_JOB_ID": "7"}, check=False)
        assert ran.returncode == int(status)
        assert (said.read_text() == "requeue 7\n") if again else not said.exists()


@pytest.mark.parametrize("topology", ["", "v5p:4x4x4", "tpu7x:2x2x2"])
def test_a_batch_script_asks_for_the_gpus_of_a_node(topology) -> None:
    assert slurm.gpus_of("h100:8") == slurm.gpus_of("h100:4x8") == 8
    with pytest.raises(UserError, match="names no node with GPUs: say how many it has"):
        slurm.gpus_of(topology)


def test_a_batch_script_for_other_devices_than_the_mesh_is_refused() -> None:
    ran = slurm_script("--config=configs/topic1.py:h100", "--config.mesh.tp=4", "--nodes=2")
    said = "error: pp·dp·ep·cp·tp = 1·1·1·1·4 = 4 devices, but nodes·gpus = 2·1 = 2: change"
    assert ran.returncode == 1 and ran.stderr.startswith(said) and ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print('fine')", 0, "fine\n"),
        (
            "sys.exit(me and print('why') or 3 * me)",
            3,
            "process 1 ended first, with status 3; its ",
        ),
        ("os.kill(os.getpid(), 15 * (1 - me))", 143, "process 0 ended first, by SIGTERM\n"),
    ],
)
def test_the_launcher_ends_as_the_first_that_failed(
    code, status, said, tmp_path, capfdbinary
) -> None:
    words = [sys.executable, "-c", f"import os, sys; me = int(os.environ['FDP_PROCESS']); {code}"]
    with open(sys.stdout.fileno(), "w", closefd=False) as stdout, pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "stdout", stdout)
        assert local.follow(local.start(words, 2, 4, tmp_path)) == status
    assert said in capfdbinary.readouterr().out.decode()
