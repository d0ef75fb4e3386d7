"""Metrics of a run: metrics.jsonl and TensorBoard events, the progress line, and throughput."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from fdp import process
from fdp.files import write_atomic
from fdp.keys import UserError

_TAGS = ("arm", "seed", "step")


class ImpossibleSpeed(RuntimeError):
    """A step took less time than its FLOPs can take on these chips."""


def _plain(value: Any) -> Any:
    """A number, or an array as nested lists, as valid JSON. JSON has no NaN and no infinity: they
    become "nan", "inf" and "-inf"."""
    if getattr(value, "ndim", 0):
        return [_plain(x) for x in value]
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The parsed lines, as an editor may have left them: with a byte order mark, blank lines, or no
    newline at the end. A last line that kill -9 has cut is dropped."""
    rows = []
    text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    *lines, last = text.split("\n")
    for number, line in enumerate([*lines, last] if _is_whole(last) else lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} line {number} is not JSON ({error}): delete that line"
            ) from error
        if not _is_row(row):
            raise UserError(
                f"{path} line {number} is no row of metrics, which names an arm, a seed and a "
                "step: delete that line"
            )
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("arm"), str)
        and isinstance(row.get("seed"), int)
        and isinstance(row.get("step"), int)
    )


def _is_whole(line: str | bytes) -> bool:
    """Whether a row is complete: its closing bracket is what is written last."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Rows of workdir/metrics.jsonl in the order of writing, non-finite numbers as floats; [] where
    there is none.

    Raises UserError naming the line when one other than a half-written last one is no row.
    """
    rows = _lines(Path(workdir) / "metrics.jsonl")
    return [{k: v if k == "arm" else _number(v) for k, v in row.items()} for row in rows]


def _number(value: Any) -> Any:
    """The reverse of `_plain`; arrays stay lists."""
    if isinstance(value, list):
        return [_number(x) for x in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


class MetricsWriter:
    """Appends the metrics of one arm and seed to workdir/metrics.jsonl and
    workdir/tensorboard/<arm>-s<seed>.

    Several writers may share a workdir within one process. Of several processes, the main one
    writes.
    """

    def __init__(self, workdir: Path, arm: str, seed: int):
        self.workdir, self.arm, self.seed = Path(workdir), arm, seed
        self.path = self.workdir / "metrics.jsonl"
        self._events: Any = None
        self._purge_step: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        if process.main():
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._end_last_line()

    def _end_last_line(self) -> None:
        """Cut a half-written last line, or end a whole one, so that the next row starts a line of
        its own."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end == len(content):
            return
        if _is_whole(content[end:]):
            with open(self.path, "ab") as file:
                file.write(b"\n")
        else:
            os.truncate(self.path, end)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one row; `metrics` are numbers and arrays, non-finite ones are kept. Raises
        ValueError on a reserved name, and on an array whose shape has changed; OSError, with the
        path, where the disk takes no more.
        """
        for name in _TAGS:
            if name in metrics:
                raise ValueError(
                    f"metric name {name!r} is reserved for the tags of a row: rename the metric"
                )
        for name, value in metrics.items():
            self._check_shape(name, tuple(getattr(value, "shape", ())))
        if not process.main():
            return
        values = {name: _plain(value) for name, value in metrics.items()}
        row = {"arm": self.arm, "seed": self.seed, "step": int(step)} | values
        try:
            with open(self.path, "ab") as file:  # opened per row: resume() may have replaced it
                file.write((json.dumps(row) + "\n").encode())
            self._show(step, metrics)
        except OSError as error:  # an error of writing names no path
            raise OSError(error.errno, error.strerror, error.filename or str(self.path)) from error

    def _show(self, step: int, metrics: Mapping[str, Any]) -> None:
        """In TensorBoard."""
        events = self._event_writer()
        for name, value in metrics.items():
            if getattr(value, "ndim", 0):
                array = np.asarray(value, np.float32)
                finite = array[np.isfinite(array)]  # all that a histogram can show
                if finite.size:
                    events.histogram(name, finite, step)
            else:
                events.scalar(name, float(value), step)
        events.show()

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        before = self._shapes.setdefault(name, shape)
        if before != shape:
            raise ValueError(
                f"metric {name!r} has shape {shape} and had {before}: a metric keeps its shape; "
                "use another name"
            )

    def _event_writer(self) -> Any:
        if self._events is None:
            from fdp.tensorboard import Events  # at the first row: it pulls in protobuf

            folder = self.workdir / "tensorboard" / f"{self.arm}-s{self.seed}"
            self._events = Events(folder, self._purge_step)
        return self._events

    def resume(self, step: int) -> None:
        """Remove the rows that this arm and seed wrote after `step`, the step of the restored
        checkpoint."""
        if not process.main() or not self.path.exists():
            return
        rows = _lines(self.path)
        kept = [
            r for r in rows if (r["arm"], r["seed"]) != (self.arm, self.seed) or r["step"] <= step
        ]
        if len(kept) < len(rows):
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        for row in kept:
            if (row["arm"], row["seed"]) == (self.arm, self.seed):
                self._shapes |= {name: np.shape(value) for name, value in row.items()}
        self._purge_step = step + 1

    def close(self) -> None:
        """Flush the TensorBoard events; metrics.jsonl is complete after every write."""
        if self._events is not None:
            events, self._events = self._events, None
            events.close()


class Progress:
    """One progress line with what the caller says, steps per second and time left; where the output
    is no terminal, a plain line every 10 %.

    The clock starts at the first update, so compilation does not count as training time."""

    def __init__(
        self,
        total: int,
        start: int,
        desc: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.start, self.desc, self.clock = total, start, desc, clock
        shown = sys.stderr if process.main() else process.nowhere()
        self.stream = shown if stream is None else stream
        self._step = start
        self._first: tuple[float, int] | None = None
        self._tenth = start * 10 // max(total, 1)
        self._bar: Any = None
        if self.stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=start,
                desc=desc,
                unit="step",
                file=self.stream,
                dynamic_ncols=True,
                leave=True,
            )

    def update(self, step: int, text: str) -> None:
        """Report that `step` steps are done, out of `total`, and what there is to say of them."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._step)
        self._step = step
        if self._first is None:
            self._first = (self.clock(), step)
        tenth = step * 10 // max(self.total, 1)
        if self._bar is None and tenth > self._tenth:
            self._tenth = tenth
            self._print(f"step {step}/{self.total}, {text}{self._speed()}")

    def _speed(self) -> str:
        assert self._first is not None
        seconds, steps = self.clock() - self._first[0], self._step - self._first[1]
        if steps <= 0 or seconds <= 0:
            return ""
        left = (self.total - self._step) * seconds / steps
        return f", {steps / seconds:.3g} step/s, {tqdm.format_interval(left)} left"

    def _print(self, text: str) -> None:
        print(f"{self.desc}: {text}", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        """Print a line of its own without breaking the progress line."""
        if self._bar is not None:
            self._bar.write(f"{self.desc}: {text}", file=self.stream)
        else:
            self._print(text)

    def close(self) -> None:
        """End the progress line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def throughput(
    tokens_per_step: int, seconds: float, flops_per_step: float | None, peak_flops: float | None
) -> dict[str, float]:
    """tokens_per_s of a step that took `seconds`, and mfu = FLOP/s over the peak of all devices
    where both are known.

    Raises ImpossibleSpeed for an MFU above 1: FLOPs, clock or peak are wrong, or work is left out.
    """
    if seconds <= 0:
        raise ValueError(f"seconds per step = {seconds} must be positive")
    speed = {"tokens_per_s": tokens_per_step / seconds}
    if flops_per_step is None or peak_flops is None:
        return speed
    mfu = flops_per_step / seconds / peak_flops
    if mfu > 1:
        raise ImpossibleSpeed(
            f"MFU = FLOPs / seconds / peak = {flops_per_step:.4g} / {seconds:.4g} / "
            f"{peak_flops:.4g} = {100 * mfu:.0f} % cannot be: the program leaves work out (run "
            "python -m fdp.audit on this config) or the chip's peak is another"
        )
    return speed | {"mfu": mfu}
