"""Start, agreement, and arrays in and out of several processes."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from fdp import process
from fdp.keys import UserError
from fdp.mesh import make_mesh
from fdp.sharding import shardings
from launch import local

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


def test_one_process_decides_alone() -> None:
    assert process.count() == 1 and process.main()
    assert process.decided(lambda: {"any": object}) == {"any": object}
    assert process.agree(True) and not process.agree(False)
    assert process.stopping("run", 5, True) and not process.stopping("run", 5, False)
    with pytest.raises(KeyError):
        process.failed(KeyError("as it was"))


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


def test_each_process_is_told_who_it_is() -> None:
    told = local.environment(1, 2, 4, 999)
    assert [told[name] for name in process.VARIABLES] == ["localhost:999", "2", "1"]
    assert told["JAX_NUM_CPU_DEVICES"] == "4" and told["PATH"] == os.environ["PATH"]


def test_the_launcher_asks_for_a_config() -> None:
    command = [sys.executable, "-m", "launch.local", "--processes=2", "--", "--workdir=x"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "--config among them" in ran.stdout + ran.stderr
