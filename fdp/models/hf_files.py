"""Files of Hugging Face checkpoints: safetensors that are read in parts, and directories that
appear when they are complete."""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fdp.checkpoint import CheckpointError
from fdp.keys import UserError
from fdp.models.hf_names import Box

DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
INDEX = "model.safetensors.index.json"
SHARD = 2**31  # most bytes of a file, unless one tensor is larger


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, of a format such as "BF16"; indexing it reads that part only."""

    file: Any
    name: str
    shape: tuple[int, ...]
    kind: str

    def __getitem__(self, box: Box) -> np.ndarray:
        return self.file.get_slice(self.name)[box]


def config_in(directory: Path) -> dict[str, Any]:
    """The config.json of a checkpoint. Raises UserError where there is none."""
    path = directory / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no object, but {type(found).__name__}")
    return found


def tensors_in(directory: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files, by name; none is read. Raises UserError for files that
    are missing or damaged."""
    found: dict[str, Tensor] = {}
    for path in _listed(directory):
        try:
            file: Any = safe_open(path, "np")
            names = file.keys()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}. Copy it again") from error
        for name in names:
            part = file.get_slice(name)
            found[name] = Tensor(file, name, tuple(part.get_shape()), part.get_dtype())
    return found


def _listed(directory: Path) -> list[Path]:
    """The files of a checkpoint: those of its index, or all."""
    index = directory / INDEX
    if not index.exists():
        found = sorted(directory.glob("*.safetensors"))
        if not found:
            raise UserError(f"{directory} holds no *.safetensors: convert the checkpoint to them")
        return found
    try:
        return sorted(
            {directory / name for name in json.loads(index.read_text())["weight_map"].values()}
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} cannot be read: {error}. Copy it again") from error


def write(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    kinds: Mapping[str, str],
    shard: int = SHARD,
) -> None:
    """Write a checkpoint in files of at most `shard` bytes or of one tensor; the host holds the
    tensors of one file.

    `kinds`: formats by name; others are F32. The directory appears when it is complete. Raises
    UserError for one that is not empty, CheckpointError where writing fails."""
    dtypes = {name: np.dtype(DTYPES[kinds.get(name, "F32")]) for name in shapes}
    sizes = {name: math.prod(shapes[name]) * dtypes[name].itemsize for name in shapes}
    groups, total = _groups(sizes, shard), sum(sizes.values())
    with _appearing(directory, total) as folder:
        files: dict[str, str] = {}
        for i, group in enumerate(groups, 1):
            many = f"model-{i:05}-of-{len(groups):05}.safetensors"
            file = many if len(groups) > 1 else "model.safetensors"
            values = {name: tensors[name].astype(dtypes[name], copy=False) for name in group}
            save_file(values, folder / file, {"format": "pt"})
            files |= dict.fromkeys(group, file)
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")


def _groups(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, in groups of at most `most` bytes or of one tensor."""
    groups: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


@contextlib.contextmanager
def _appearing(directory: Path, size: int) -> Iterator[Path]:
    """A folder that becomes `directory` at the end, or disappears."""
    directory = directory.absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not empty: choose another directory")
    folder = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {free:,} bytes are free")
        yield folder
        for file in folder.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        os.replace(folder, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"exporting {size:,} bytes to {directory} failed: {_reason(error)}; nothing was left "
            "there. Fix: free space, make it writable, or choose another directory"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(error: Exception) -> str:
    """What the system says; safetensors quotes the number of its error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os error (\d+)", str(error))
    return os.strerror(int(code[1])) if code else str(error)
