"""A file of bytes that is written once, shard by shard: resumed behind the last whole shard,
checked by hashes, mended in place.

`NAME.bin` holds the shards one behind the other, `NAME.json` their lengths and hashes. The index is
replaced after every shard, so that after kill -9 it names whole shards only."""

import atexit
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fdp.files import lock, write_atomic

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
BLOCK = 1 << 20  # bytes read at once


class DamagedShards(Exception):
    """A file of shards is not what its index says."""


class Shards:
    """The shards of one file, as its index names them; without an index there are none yet."""

    def __init__(self, stem: Path):
        """`stem`: the path without its suffix. An index that cannot be read counts as none."""
        self.bin, self.index = stem.with_suffix(".bin"), stem.with_suffix(".json")
        self.rows: list[tuple[int, str]] = []  # bytes and hash of each shard
        self.about: dict[str, Any] = {}  # what the maker says of the whole, {} until it is whole
        try:
            found = json.loads(self.index.read_text(encoding="utf-8"))
            self.rows = [(int(size), str(digest)) for size, digest in found["shards"]]
            self.about = dict(found["about"])
        except (OSError, ValueError, TypeError, KeyError):
            self.rows, self.about = [], {}

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(size for size, _ in self.rows)

    def damaged(self) -> list[int]:
        """Numbers of the shards whose bytes are cut short or others. Reads the whole file."""
        starts = [0]
        for size, _ in self.rows:
            starts.append(starts[-1] + size)

        def is_damaged(i: int) -> bool:
            size, digest = self.rows[i]
            return self._digest(starts[i], size) != digest

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing needs no interpreter lock
            return [i for i, bad in enumerate(pool.map(is_damaged, range(len(self.rows)))) if bad]

    def append(self, parts: Iterable[bytes]) -> None:
        """Write one more shard. Raises OSError where the disk is full; no shard is lost by it."""
        try:
            self._append(parts)
        except OSError as error:
            raise OSError(
                f"{self.bin} cannot be written ({error.strerror}): free some room, or let "
                "XDG_CACHE_HOME name a folder on a larger disk; what was finished is kept"
            ) from error

    def _append(self, parts: Iterable[bytes]) -> None:
        before, size = self.n_bytes, 0
        digest = hashlib.sha256()
        with open(self.bin, "r+b" if self.bin.exists() else "x+b") as file:
            file.truncate(before)  # what a killed process has left behind the last whole shard
            file.seek(before)
            for part in parts:
                file.write(part)
                digest.update(part)
                size += len(part)
            file.flush()
            os.fsync(file.fileno())
        self.rows.append((size, digest.hexdigest()))
        self._write_index()

    def mend(self, i: int, parts: Iterable[bytes]) -> None:
        """Write shard `i` again. Raises DamagedShards where it is not what it was."""
        size, digest = self.rows[i]
        start, done, found = sum(size for size, _ in self.rows[:i]), 0, hashlib.sha256()
        with open(self.bin, "r+b" if self.bin.exists() else "x+b") as file:
            file.seek(start)
            for part in parts:
                done += len(part)
                if done > size:
                    break
                file.write(part)
                found.update(part)
            file.flush()
            os.fsync(file.fileno())
        if (done, found.hexdigest()) != (size, digest):
            raise DamagedShards(f"shard {i} of {self.bin} became another when it was made again")

    def finish(self, **about: Any) -> None:
        """Say that this is all; `about` is kept in the index."""
        self.about = about
        self._write_index()

    def remove(self) -> None:
        """Delete the file and its index."""
        self.index.unlink(missing_ok=True)
        self.bin.unlink(missing_ok=True)
        self.rows, self.about = [], {}

    def _write_index(self) -> None:
        write_atomic(self.index, json.dumps({"shards": self.rows, "about": self.about}))

    def _digest(self, start: int, size: int) -> str:
        digest = hashlib.sha256()
        try:
            with open(self.bin, "rb") as file:
                for block in read(file.fileno(), start, size):
                    digest.update(block)
        except (OSError, DamagedShards):
            return ""
        return digest.hexdigest()


def read(descriptor: int, start: int, size: int) -> Iterator[bytes]:
    """`size` bytes from `start` on, in blocks. Raises DamagedShards where the file ends before."""
    while size:
        block = os.pread(descriptor, min(size, BLOCK), start)
        if not block:
            raise DamagedShards(f"{size} bytes are missing")
        yield block
        start, size = start + len(block), size - len(block)


def opened(owner: object, path: Path) -> int:
    """Descriptor for reading at any place, from any thread; it is closed with its owner.

    What is read so stays in the system's cache of files. Pages of a memory map would count as
    memory of this process, after an epoch those of the whole file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    weakref.finalize(owner, os.close, descriptor)
    return descriptor


@contextmanager
def locked(stem: Path, wait: bool = True) -> Iterator[bool]:
    """Alone with the file of this name: another process that makes it is waited for. A killed one
    holds nothing. Without `wait`: whether this process is alone with it.

    Some file systems of clusters know no locks: there nobody is waited for, and nobody is known to
    be alone."""
    with open(stem.with_suffix(".lock"), "ab") as file:
        try:
            alone = lock(file, wait)
        except OSError as error:
            if wait and error.errno not in NO_LOCKS:
                raise
            alone = False
        yield alone


def usable(folder: Path) -> Path:
    """`folder`, made if needed, or a temporary one where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        return temporary(f"{folder} cannot be written ({error.strerror})")


@functools.cache
def temporary(why: str) -> Path:
    """A folder in place of the cache, which is gone at the end of the process; a warning, and one
    folder, for each reason."""
    fix = "let XDG_CACHE_HOME name a folder that can be written"
    warnings.warn(f"nothing is cached, for {why}: {fix}", stacklevel=3)
    made = tempfile.TemporaryDirectory(prefix="fdp-cache-", ignore_cleanup_errors=True)
    atexit.register(made.cleanup)
    return Path(made.name)


def check_room(folder: Path, needed: int, what: str, equation: str) -> None:
    """Raises OSError where `needed` bytes for `what` do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{what} need {equation} = {size(needed)} in {folder}, where {size(free)} are free: "
            "free some, or let XDG_CACHE_HOME name a folder on a larger disk"
        )


def progress_bar(what: str, total: int | None, done: int = 0) -> tqdm:
    """A line with rate and time left, in bytes. A small corpus is ready before it would show."""
    pause = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        desc=what, total=total, initial=done, unit="B", unit_scale=True, delay=2, mininterval=pause
    )


def size(n_bytes: float) -> str:
    """Bytes in words: "1.5 GB"."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(max(n_bytes, 1)) // 3), len(units) - 1)
    return f"{n_bytes / 1000**power:.3g} {units[power]}"
