"""TensorBoard events, written in the thread of the caller.

tensorboardX's own SummaryWriter writes in a thread, which dies on a full disk; from then on its
queue fills up, and the training waits for it for ever."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

BINS = 30  # of a histogram
SECONDS = 10.0  # between two flushes, each of which waits for the disk


class Events:
    """A new file of events in `folder`. Events of an earlier file from step `purge_step` on are not
    shown any more. Every method raises OSError, with the folder, where the disk takes no more."""

    def __init__(self, folder: Path, purge_step: int | None = None):
        self.folder, self._shown = folder, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            self._write(purge_step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, step: int, **content: Any) -> None:
        with self._named():
            self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of writing name no path by themselves."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder)) from error

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number."""
        self._write(step, summary=summary.scalar(name, value))

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """The distribution of finite values, at least one."""
        self._write(step, summary=summary.histogram(name, values, BINS))

    def show(self) -> None:
        """Let readers see what was written; every SECONDS is often enough."""
        if time.monotonic() - self._shown > SECONDS:
            with self._named():
                self._writer.flush()
            self._shown = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        with self._named():
            self._writer.close()
