"""The command: python -m launch.local --processes=2 --devices=4 -- --config=configs/topic1.py:tiny

Starts that many processes of fdp.train on this machine, each with its share of virtual CPU devices.
Process 0 speaks on the screen; each writes a log. The exit status is that of the first process that
failed, whose last lines are shown.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from absl import flags

from fdp import command, signals
from fdp.keys import UserError

PROCESSES = flags.DEFINE_integer("processes", 2, "number of processes", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices", 4, "virtual CPU devices of each", lower_bound=1)
LOGS = flags.DEFINE_string("logs", None, "folder of the logs; default a new temporary one")

PATIENCE = 40.0  # seconds in which the others end by themselves after one has failed
LINES = 15  # of the log of a failed process


class Process(NamedTuple):
    """One process of the run, and where its output goes."""

    number: int
    running: "subprocess.Popen[bytes]"
    log: Path


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def environment(number: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """What process `number` finds in its environment."""
    told = {
        "FDP_COORDINATOR": f"localhost:{port}",
        "FDP_PROCESSES": str(processes),
        "FDP_PROCESS": str(number),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONUNBUFFERED": "1",
    }
    # Where there is an accelerator, every process would take all of it.
    return {"JAX_PLATFORMS": "cpu"} | os.environ | told


def start(words: Sequence[str], processes: int, devices: int, logs: Path) -> list[Process]:
    """All processes of the command `words`, each with a log in the folder `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    port, found = free_port(), []
    for number in range(processes):
        log = logs / f"process-{number}.log"
        with open(log, "wb") as file:
            # A group of its own: Ctrl-C reaches this command alone, which passes it on once.
            running = subprocess.Popen(
                words,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(number, processes, devices, port),
                start_new_session=True,
            )
        found.append(Process(number, running, log))
    return found


def follow(processes: Sequence[Process]) -> int:
    """Show what process 0 says until all have ended; the exit status."""
    failed: Process | None = None
    until = 0.0
    with open(processes[0].log, "rb") as shown:
        while any(p.running.poll() is None for p in processes):
            _show(shown)
            ended = [p for p in processes if p.running.poll()]
            if ended and failed is None:
                failed, until = ended[0], time.monotonic() + PATIENCE
            if failed is not None and time.monotonic() > until:
                for p in processes:
                    p.running.kill()
            time.sleep(0.1)
        _show(shown)
    failed = failed or next((p for p in processes if p.running.returncode), None)
    if failed is None:
        return 0
    code = failed.running.returncode
    if code in map(signals.exit_status, signals.STOPS):  # each has said so in its log
        return code
    lines = [line.decode(errors="replace") for line in _said(failed.log.read_bytes())][-LINES:]
    # What process 0 said was on the screen already.
    shown_now = "" if failed.number == 0 or not lines else "; its last lines:"
    print(f"\nprocess {failed.number} ended first, {_ending(code)}{shown_now}")
    print("".join(f"  {line}" for line in lines if shown_now), end="", flush=True)
    return code if code > 0 else signals.exit_status(-code)


def _ending(code: int) -> str:
    return f"with status {code}" if code > 0 else f"by {signal.Signals(-code).name}"


def _said(log: bytes) -> list[bytes]:
    """The lines of a log without Gloo's notes on connections, which are no part of a run."""
    lines = log.splitlines(keepends=True)
    return [line for line in lines if not line.startswith(b"[Gloo] Rank ")]


def _show(log: IO[bytes]) -> None:
    """What is new in `log`."""
    sys.stdout.flush()
    sys.stdout.buffer.writelines(_said(log.read()))
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    """Start, follow, and exit as the processes did."""
    given = argv[1:]
    if not any(word.lstrip("-").startswith("config=") for word in given):
        raise UserError(
            "after -- come the arguments of fdp.train, --config among them: python -m launch.local "
            "--processes=2 --devices=4 -- --config=configs/topic1.py:tiny"
        )
    logs = Path(LOGS.value or tempfile.mkdtemp(prefix="fdp-logs-"))
    train = [sys.executable, "-m", "fdp.train", *given]
    print(f"launch    {PROCESSES.value} processes × {DEVICES.value} devices: {shlex.join(train)}")
    print(f"logs      {logs}/process-*.log", flush=True)
    processes = start(train, PROCESSES.value, DEVICES.value, logs)

    def forward(number: int, frame: object) -> None:
        for p in processes:
            if p.running.poll() is None:
                p.running.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    return follow(processes)


if __name__ == "__main__":
    command.launch(main)
