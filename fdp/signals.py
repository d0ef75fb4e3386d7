"""SIGTERM, Ctrl-C and the end of the terminal: a flag where a step must end first, an exception
elsewhere, and the exit status that schedulers and shells expect.

Handlers belong to the main thread. In another one, and in a notebook's kernel outside a run,
nothing is changed: whoever started the thread decides what a signal does."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# Of a scheduler, of Ctrl-C, and of a terminal that is closed.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], Any]


class Interrupted(BaseException):
    """Signal `number` arrived where everything finished is on disk."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def exit_status(number: int) -> int:
    """Of a process that signal `number` ended: 143 after SIGTERM, 130 after Ctrl-C, 129 after the
    end of its terminal."""
    return 128 + number


def say(text: str) -> None:
    """A line on stderr from inside a handler, where print may find its buffer in use."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """`handler` for SIGTERM and Ctrl-C; the handlers before it come back at the end."""
    previous = _install(handler)
    try:
        yield
    finally:
        _put_back(previous)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted at once on SIGTERM or Ctrl-C; the training loop handles its own."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with handled(stop):
        yield


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into a flag that the loop reads between steps; a second one
    does what it did before.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal arrived."""
        return self.number > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        say("\nstopping after this step, which is saved; a second signal stops at once")
        _put_back(self._previous)

    def __enter__(self) -> "StopSignal":
        self._previous = _install(self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        _put_back(self._previous)


def exit_at_once(text: str = "") -> None:
    """From here on a signal ends the process, after a line of `text`: nothing is left to be saved,
    or nothing has begun. While modules are imported an exception may be swallowed; at the end of
    the interpreter, threads that are joined may take their time."""

    def end(number: int, frame: FrameType | None) -> None:
        if text:
            say(text)
        os._exit(exit_status(number))

    _install(end)


def _install(handler: Handler) -> dict[int, Any]:
    """The handlers that were there before; {} outside the main thread, where nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    # Under nohup the end of the terminal is ignored, and stays so.
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    stops = [n for n in STOPS if n != signal.SIGHUP or not ignored]
    return {number: signal.signal(number, handler) for number in stops}


def _put_back(previous: dict[int, Any]) -> None:
    for number, handler in previous.items():  # None: of a program that embeds Python
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
