"""What a signal does in a run, in the loop, in another thread and at the end of a process."""

import signal
import subprocess
import sys
import threading

import pytest

from fdp import signals
from fdp.signals import STOPS, Interrupted, StopSignal, interruptible

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def usual():
    """Python's own handlers: a job in the background starts without that of Ctrl-C."""
    before = {n: signal.getsignal(n) for n in STOPS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_before_anything_has_begun_a_signal_is_a_line_and_a_status(number, status) -> None:
    code = (
        "import signal\nfrom fdp import signals\nsignals.exit_at_once('stopped')\n"
        f"try: signal.raise_signal({int(number)})\n"
        "except BaseException: pass\n"  # as an import may do
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "stopped\n")


def test_under_nohup_the_end_of_the_terminal_changes_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
    assert not stop.requested
    with interruptible():
        signal.raise_signal(signal.SIGHUP)


def test_a_second_signal_does_what_it_did_before(capfd) -> None:
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "stopping after this step, which is saved; a second" in capfd.readouterr().err
    with interruptible(), StopSignal():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted) as stopped:
            signal.raise_signal(signal.SIGINT)
    assert stopped.value.number == signal.SIGINT


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_interrupts_and_the_handlers_come_back(number, status) -> None:
    handlers = [signal.getsignal(n) for n in STOPS]
    with pytest.raises(Interrupted) as stopped, interruptible():
        signal.raise_signal(number)
    assert signals.exit_status(stopped.value.number) == status
    assert [signal.getsignal(n) for n in STOPS] == handlers


def test_a_handler_of_a_program_that_embeds_python_is_put_back(monkeypatch) -> None:
    set_to = []
    monkeypatch.setattr(signals.signal, "signal", lambda n, handler: set_to.append(handler))
    with interruptible():
        pass
    assert set_to[-2:] == [signal.SIG_DFL] * 2


def test_another_thread_changes_no_handler() -> None:
    handlers, seen = [signal.getsignal(n) for n in STOPS], []

    def work() -> None:
        with interruptible(), StopSignal() as stop:
            seen.append((stop.requested, [signal.getsignal(n) for n in STOPS]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, handlers)]


def test_after_the_end_a_signal_ends_the_process_without_a_word() -> None:
    code = (
        "import signal; from fdp import signals; signals.exit_at_once(); "
        "signal.raise_signal(signal.SIGINT); print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
