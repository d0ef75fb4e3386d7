"""Mistakes end a command in one line and a status, whatever its terminal can show."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fdp import command
from fdp.keys import UserError

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[1]


class OtherError(Exception):
    """Of one command alone."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a = 1\n  is wrong: set a=2"), "error: a = 1 is wrong: set a=2"),
        (OtherError("it failed"), "error: it failed"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"),
            "error: runs/a/metrics.jsonl: No space left on device. Fix: free space there, or name "
            "another --workdir",
        ),
        (OSError("from elsewhere"), "error: from elsewhere"),
        (
            MemoryError("Unable to allocate 5 TiB"),
            "error: out of memory (Unable to allocate 5 TiB): lower model, train.batch or "
            "data.seq_len",
        ),
    ],
)
def test_what_a_user_can_fix_is_one_line_and_status_1(error, line, capsys) -> None:
    with pytest.raises(SystemExit) as stop, command.one_line(OtherError):
        raise error
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"{line}\n"


def test_a_warning_is_one_line() -> None:
    code = (
        "import warnings\nfrom fdp import command\n"
        "command.launch(lambda argv: warnings.warn('a\\nb', stacklevel=1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "warning: a b\n")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="a bug"), command.one_line(OtherError):
        raise ValueError("a bug")


def test_ctrl_c_is_one_line_and_status_130() -> None:
    code = "from fdp import command\nwith command.one_line(): raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


def test_a_reader_that_went_away_ends_a_command_silently() -> None:
    code = (
        "from fdp import command\n"
        "with command.one_line():\n"
        "    while True: print('a line', flush=True)"
    )
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE) as p:
        os.close(write)
        os.close(read)
        assert p.stderr.read() == b""
    assert p.returncode == 141


def test_a_terminal_without_the_characters_gets_others(monkeypatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    command.use_any_encoding()
    print("pp·dp = 2 × 4 ≤ 8 … 语", flush=True)
    assert out.buffer.getvalue() == b"pp*dp = 2 x 4 <= 8 ... ?\n"


@pytest.mark.parametrize("platform", ["cuda", "banana"])
def test_a_platform_that_is_not_there_is_one_line(platform) -> None:
    code = "from fdp import command\nwith command.one_line():\n    import jax; jax.devices()"
    environment = os.environ | {"JAX_PLATFORMS": platform}
    python = [sys.executable, "-c", code]
    done = subprocess.run(python, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()  # JAX itself may say which plugins it looked for
    assert line.startswith(f"error: JAX_PLATFORMS={platform} names no platform that JAX can start")
    assert "Traceback" not in done.stderr


def test_paths_are_of_this_machine(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert command.folder("~/runs/a") == Path("/home/somebody/runs/a")
    assert command.folder("runs/a") == Path("runs/a")
    for address in ("gs://bucket/run", "s3://bucket", "file:///tmp/run"):
        with pytest.raises(
            UserError, match=rf"--workdir={address} is an address of .*: name a fol"
        ):
            command.folder(address)
    with pytest.raises(UserError, match=r"--workdir=~nobody-of-that-name/a: .*: write the whole"):
        command.folder("~nobody-of-that-name/a")


# Each command, its arguments and how its one line starts.
MISTAKES = {
    "fdp.train": (["--config=configs/topic1.py:tiny", "--workdir=gs://a/b"], "--workdir=gs://a/b"),
    "fdp.audit": (["--config=configs/topic1.py:tiny", "word"], "unexpected argument(s) word"),
    "fdp.trace": (["--config=configs/topic1.py:huge"], "unknown variant 'huge'"),
    "fdp.generate": (["--stepz=3"], "Unknown command line flag 'stepz'"),
}


@pytest.mark.parametrize("module", MISTAKES)
def test_every_command_ends_in_one_line(module) -> None:
    arguments, line = MISTAKES[module]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {line}") and done.stderr.count("\n") == 1, done.stderr


def test_no_command_goes_around_it() -> None:
    files = [p for d in ("fdp", "launch") for p in (ROOT / d).rglob("*.py")]
    around = [p.name for p in files if re.search(r"\bapp\.(run|UsageError)\(", p.read_text("utf8"))]
    assert around == ["command.py"]
