"""The folder in which JAX keeps compiled programs between runs: bounded, and without entries that
cannot be read.

JAX never replaces an entry, so a broken one, such as a killed process leaves, costs a compilation
and a warning at every start. Entries are compressed, and what was broken does not decompress."""

import contextlib
from pathlib import Path

import jax
from jax._src.compilation_cache import decompress_executable  # it has no public name

LIMIT = 4 * 2**30  # bytes of all entries; the ones that were not used for longest go first
ENTRY, USED = "-cache", "-atime"  # how JAX ends the name of an entry, and of its last use
_STAMP = ".checked"  # its time is that of the last look at the entries
_MARGIN = 2.0  # seconds: the finest time that every file system keeps


def use(folder: Path) -> None:
    """Keep compiled programs in `folder` unless JAX was told another one, and mend that folder."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
            mend(folder)


def mend(folder: Path, limit: int = LIMIT) -> None:
    """Remove entries that were written since the last look and cannot be decompressed, then the
    least used ones beyond `limit` bytes. Other processes may use the folder. Raises OSError."""
    stamp = folder / _STAMP
    looked = stamp.stat().st_mtime if stamp.exists() else 0.0
    kept = []
    for path in folder.glob(f"*{ENTRY}") if folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            found = path.stat()
            if found.st_mtime >= looked - _MARGIN and not _readable(path):
                _remove(path)  # at worst another process is writing it, and compiles once more
            else:
                kept.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    total = sum(size for _, size, _ in kept)
    for _, size, path in sorted(kept):
        if total <= limit:
            break
        _remove(path)
        total -= size
    if folder.exists():
        stamp.touch()


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_name(path.name.removesuffix(ENTRY) + USED).unlink(missing_ok=True)


def _readable(path: Path) -> bool:
    """Whether the entry decompresses."""
    try:
        return bool(decompress_executable(path.read_bytes()))
    except FileNotFoundError:
        raise
    except Exception:  # of zlib or zstandard, whichever JAX has found
        return False
