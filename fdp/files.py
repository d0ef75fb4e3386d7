"""Atomic replacement of files, locks, and what is said where the disk takes no more."""

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")  # as `write_atomic` names its files
_FIXES = {
    errno.ENOSPC: "free space there, or name another --workdir",
    errno.EDQUOT: "free some of your quota, or name another --workdir",
    errno.EFBIG: "raise the limit of a file's size, or name another --workdir",
    errno.EROFS: "name a --workdir that can be written",
    errno.EACCES: "change its permissions, or name another path",
    errno.EPERM: "change its permissions, or name another path",
    errno.ENOTDIR: "a file is in the way: move it, or name another path",
    errno.EEXIST: "a file is in the way: move it, or name another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


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


def lock(file: IO[Any], wait: bool) -> bool:
    """Lock an open file until it is closed, by the death of the process too. Whether it is locked:
    not where another process holds it and `wait` is not set.

    Raises OSError where the file system knows no locks (flock)."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def fix(code: int | None) -> str:
    """What helps where the system refuses with this code; "" where nothing is known to."""
    return _FIXES.get(code or 0, "")
