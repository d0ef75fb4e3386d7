"""Checksums of the files of a folder, kept beside them, so that changed bytes are found.

checksums.json holds {"files": {path: [bytes, CRC-32]}, "own": CRC-32 of "files"}. CRC-32 finds
every error of up to 32 neighbouring bits and any other one but for a chance of 2⁻³²; it is read at
several GB/s, so that a save takes as long as before. It protects from faults, not from forgery."""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "checksums.json"
_PIECE = 2**18  # bytes that are read at a time; larger ones cost more, in fresh pages


class Damaged(ValueError):
    """Files of a folder are not what was written; the message names the first one."""


def _of_file(path: Path) -> list[int]:
    """Its size and checksum."""
    size = total = 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            size, total = size + len(piece), zlib.crc32(piece, total)
    return [size, total]


def _of_files(paths: list[Path]) -> list[list[int]]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # zlib runs outside the GIL
        return list(pool.map(_of_file, paths))


def _own(files: dict[str, list[int]]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def write(folder: Path) -> None:
    """Read every file in the folders of `folder` and write their checksums there; files of
    `folder` itself may change later. The folder is not in use yet. Raises OSError."""
    paths = sorted(p for p in folder.glob("*/**/*") if p.is_file())
    names = [p.relative_to(folder).as_posix() for p in paths]
    files = dict(zip(names, _of_files(paths), strict=True))
    (folder / NAME).write_text(json.dumps({"files": files, "own": _own(files)}, indent=1) + "\n")


def verify(folder: Path) -> bool:
    """Whether `folder` has checksums; one that an older version wrote has none.

    Raises Damaged where a file is absent or has other bytes than were written."""
    try:
        content = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return False
    try:
        kept = json.loads(content)
        files, own = kept["files"], kept["own"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{NAME} cannot be read") from error
    if own != _own(files):
        raise Damaged(f"{NAME} has other bytes than were written")
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise Damaged(f"{absent[0]} is absent ({len(absent)} of {len(files)} files)")
    found = _of_files([folder / name for name in files])
    wrong = [name for name, new in zip(files, found, strict=True) if new != files[name]]
    if wrong:
        raise Damaged(
            f"{wrong[0]} has other bytes than were written ({len(wrong)} of {len(files)} files)"
        )
    return True
