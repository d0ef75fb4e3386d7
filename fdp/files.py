"""Atomic replacement of files, and what is said where the disk takes no more."""

import errno
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")  # as `write_atomic` names its files
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomic(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Replace `path` atomically: a reader sees the old file or the new one, also after kill -9.

    `content` may be a function that writes into the open file. Raises OSError as the system reports
    it."""
    # Processes of several hosts may share the folder: a process id alone is not unique.
    tmp = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    # A link that somebody has put there is not followed.
    how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(tmp, how, 0o666)
    try:
        with open(descriptor, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(descriptor)
        os.replace(tmp, path)
    except OSError as error:  # an error of writing names no path
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        tmp.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files that a killed process left in `folder` and in the folders there.
    Nobody else may be writing there."""
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for path in place.glob(".*.tmp"):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


def failure(what: str, path: object, error: OSError) -> str:
    """One line on a file that could not be written: the path, the reason and a fix."""
    code = error.errno
    reason = (
        f"{os.strerror(code)} ({errno.errorcode.get(code, code)})" if code else str(error)[:300]
    )
    return f"{what} {path} failed: {reason}. Fix: {_fix(code)}"


def _fix(code: int | None) -> str:
    if code in FULL:
        return (
            "free space there, lower checkpoint.keep, or choose another --workdir; earlier "
            "checkpoints are intact"
        )
    if code in REFUSED:
        return "make it writable or choose another --workdir"
    if code in (errno.ENOTDIR, errno.EEXIST):
        return "a file is in the way: move it or choose another --workdir"
    return "choose another --workdir"
