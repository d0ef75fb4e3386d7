"""A mistake made in a copy of the package, and whether a test notices it there."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in fdp/`file`; `test` fails then."""

    name: str
    file: str
    old: str
    new: str
    test: str


def copied(folder: Path) -> None:
    """What the tests need, in `folder`."""
    for name in ("fdp", "tests", "configs"):
        unread = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=unread)
    shutil.copy(ROOT / "pyproject.toml", folder)


def tested(folder: Path, *tests: str) -> subprocess.CompletedProcess:
    """Outcome of `tests` on the copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def survives(mutation: Mutation) -> str:
    """What speaks against the tests: "" when the mutation's test notices it."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        copied(folder)
        path = folder / "fdp" / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            return (
                f"{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times, not once"
            )
        path.write_text(text.replace(mutation.old, mutation.new))
        done = tested(folder, mutation.test)
    noticed = done.returncode == 1 and f"FAILED {mutation.test}" in done.stdout
    return "" if noticed else f"{mutation.test} does not notice:\n{done.stdout[-1000:]}"


def healthy(mutations: Iterable[Mutation]) -> str:
    """What speaks against the copy itself: "" when all tests named here pass without a mutation."""
    with tempfile.TemporaryDirectory() as made:
        copied(Path(made))
        done = tested(Path(made), *{m.test: None for m in mutations})
    return "" if done.returncode == 0 else done.stdout[-3000:]
