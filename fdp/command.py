"""What all commands share: flags, one line for a mistake, exit status, characters of the terminal.

Exit status: 0 done; 1 after one `error:` line; 130 after Ctrl-C and 143 after SIGTERM, the state
saved; 75 after the death of another process (fdp.process); 141 where nobody reads the output on.
Imports neither jax nor flax: mistakes show themselves at once."""

import codecs
import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

from fdp import files, signals
from fdp.keys import UserError

ERROR = 1
# What stands for a character that the terminal's encoding lacks.
ASCII = {
    "·": "*", "×": "x", "≤": "<=", "≥": ">=", "≠": "!=", "±": "+-", "−": "-", "–": "-", "—": "-",
    "…": "...", "→": "->", "√": "sqrt", "Σ": "sum", "∞": "inf", "≈": "~", "²": "^2", "³": "^3",
    "µ": "u", "μ": "mu", "α": "alpha", "β": "beta", "σ": "sigma", "ρ": "rho", "τ": "tau",
    "½": "1/2", "“": '"', "”": '"', "‘": "'", "’": "'", "°": " degrees",
}  # fmt: skip


Main = Callable[[list[str]], int | None]
Parser = Callable[[list[str]], list[str]]


def launch(main: Main, parse: Parser | None = None, *more: type[Exception]) -> None:
    """Run a command: `parse` (default: absl's flags), then `main`; exits with its status. `more`:
    exceptions of `main` whose message is for the user."""
    signals.exit_at_once("\nstopped")
    use_any_encoding()
    warnings.showwarning = _warn  # type: ignore[assignment]

    def parsed(argv: list[str]) -> list[str]:
        with one_line():
            return (parse or parse_flags)(argv)

    def called(argv: list[str]) -> int | None:
        with one_line(*more):
            status = main(argv)
            signals.exit_at_once()
            return status

    app.run(called, flags_parser=parsed)


def _warn(message: Warning | str, *where: Any) -> None:
    """A warning as one line, without the place in the code that gave it."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser; raises UserError for a mistake."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(str(error)) from error


def refuse_arguments(argv: list[str]) -> None:
    """Raises UserError for words that are no flags."""
    if len(argv) > 1:
        words = " ".join(argv[1:])
        raise UserError(f"unexpected argument(s) {words}: flags are written --name=value")


@contextlib.contextmanager
def one_line(*more: type[Exception]) -> Iterator[None]:
    """Exit with a line on stderr where the user can help: UserError, `more`, the system's refusals,
    and Ctrl-C. Other exceptions are bugs and keep their traceback."""
    try:
        yield
    except BrokenPipeError:  # `… | head`: nobody reads on, and Python would complain at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(signals.exit_status(signal.SIGPIPE))
    except KeyboardInterrupt:
        signals.exit_at_once()
        print("\nstopped", file=sys.stderr)
        sys.exit(signals.exit_status(signal.SIGINT))
    except Exception as error:
        if not (text := told(error, *more)):
            raise
        print(text, file=sys.stderr)
        sys.exit(ERROR)


def told(error: Exception, *more: type[Exception]) -> str:
    """`error: …` in one line for what a user can fix; "" for a bug. `more`: other exceptions whose
    message is for the user."""
    if isinstance(error, (UserError, *more)):
        text = str(error)
    elif isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        text = os_text(error)
    elif isinstance(error, MemoryError):
        text = f"out of memory ({error}): lower model, train.batch or data.seq_len"
    elif _no_platform(error):
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = str(error) or "it knows none of that name"
        text = (
            f"JAX_PLATFORMS={asked} names no platform that JAX can start here: {why}; set "
            "JAX_PLATFORMS=cpu, or unset it for what is there"
        )
    else:
        return ""
    return f"error: {' '.join(text.split())}"


def _no_platform(error: Exception) -> bool:
    """Whether JAX raised it while it looked for platforms: a RuntimeError or a bare assertion."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1].filename if frames else ""
    return isinstance(error, RuntimeError | AssertionError) and last.endswith("xla_bridge.py")


def os_text(error: OSError) -> str:
    """What the system refused, where, and what helps."""
    where = f"{error.filename}: " if error.filename else ""
    helps = f". Fix: {fix}" if (fix := files.fix(error.errno)) else ""
    return f"{where}{error.strerror or error}{helps}"


def folder(text: str, flag: str = "--workdir") -> Path:
    """The folder that a user named; ~ is the home folder. Raises UserError for an address of
    another machine."""
    scheme, mark, _ = text.partition("://")
    if mark:
        raise UserError(
            f"{flag}={text} is an address of {scheme}, which cannot be written yet: name a folder "
            "of this machine, and copy it when the run has ended"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{flag}={text}: {error}: write the whole path") from error


def use_any_encoding() -> None:
    """Let stdout and stderr spell what their encoding lacks, such as · where LANG=C."""
    codecs.register_error("fdp.ascii", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="fdp.ascii")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(ASCII.get(character, "?") for character in missing), error.end
