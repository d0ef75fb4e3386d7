"""Runs a study of short measurements in two folders, in the second killed at a random instant each
time but the last: python killed.py WORKDIR WORKDIR KILLS. Exit status 1, with the names, where a
finished measurement ran again. Processes are forked: Python starts and imports once.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from fdp.study.cache import Cache
from fdp.study.figures import figure
from fdp.study.measure import derive, each, measure, perform
from fdp.study.report import Report, Row

LOG = Path(sys.argv[1]).with_suffix(".started")


def noisy(i: int, scale: float) -> dict[str, np.ndarray]:
    """Slow enough to be killed in."""
    with open(LOG, "a") as file:
        file.write(f"noisy_{i}\n")
    time.sleep(0.01)
    return {"x": scale * np.random.default_rng(i).normal(size=1000)}


def total(parts: list[dict[str, np.ndarray]]) -> float:
    """Of what was measured before."""
    with open(LOG, "a") as file:
        file.write("total\n")
    return float(sum(part["x"].sum() for part in parts))


def rows(value: float) -> Row:
    """One."""
    return Row.judged("the sum is small", "sum", value, "", "<= 1e9", "counted", decides=True)


def curve(parts: list[dict[str, np.ndarray]]):
    """Of the first part."""
    fig, axes = figure()
    axes.plot(parts[0]["x"])
    return fig


def study(workdir: Path) -> None:
    """Twelve measurements, one of all of them, a picture, a report."""
    parts = measure("noisy", noisy, each(range(12)), 2.0)
    whole = measure("total", total, parts, rows=rows)
    cache = Cache(workdir, {"config": "0123"})
    found = perform([whole, derive("curve", parts, plot=curve)], cache, workdir)
    made = {"versions": {}, "devices": "none"}
    Report("t", "tiny", "0123", found.rows, found.plots, found.raw, **made).write(workdir)


def main(workdir: Path, kills: int) -> None:
    """Fork, kill, look."""
    draw, deaths = random.Random(0), 0
    workdir.mkdir()
    for attempt in range(kills + 1):
        before = {p.stem for p in (workdir / "measured").glob("*.npz")}
        LOG.write_text("")
        child = os.fork()
        if child == 0:
            study(workdir)
            os._exit(0)
        if attempt < kills:
            time.sleep(draw.uniform(0.0, 0.15))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        deaths += os.WIFSIGNALED(status)
        if again := before & set(LOG.read_text().split()):
            sys.exit(f"measured again: {', '.join(sorted(again))}")
    print(f"killed {deaths} times, exit status {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), 0)
    main(Path(sys.argv[2]), int(sys.argv[3]))
