"""Results that outlive a kill: one file a measurement, with all that it depends on.

workdir/measured/<name>.npz is a zip of result.json ({"name", "key", "seconds", "value"}) and the
arrays that the value refers to, replaced as a whole.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import io
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from fdp.arm import Arm
from fdp.config import UserError, flatten
from fdp.files import write_atomic

Key = Mapping[str, str]  # what a result depends on, by name
UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, KeyError, IndexError)
UNREADABLE += (TypeError, AttributeError, ImportError, NotImplementedError)
UNREADABLE += (zipfile.BadZipFile, zlib.error)


# Values as JSON and arrays
# -------------------------------------------------------------------------------------------------


def pack(value: Any, arrays: list[np.ndarray]) -> Any:
    """JSON of a result; its arrays are appended to `arrays`.

    Raises TypeError for what `unpack` could not give back."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        if array.dtype.kind not in "biufcSU":
            raise TypeError(f"an array of {array.dtype} cannot be kept: give it as float32")
        arrays.append(array)
        return {"~scalar" if isinstance(value, np.generic) else "~array": len(arrays) - 1}
    if isinstance(value, Mapping):
        return {"~dict": [[pack(k, arrays), pack(v, arrays)] for k, v in value.items()]}
    if isinstance(value, list):
        return [pack(v, arrays) for v in value]
    names = _fields(type(value))
    if names is not None:
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"~class": kind, "fields": {n: pack(getattr(value, n), arrays) for n in names}}
    if isinstance(value, tuple):
        return {"~tuple": [pack(v, arrays) for v in value]}
    raise TypeError(f"{type(value).__name__} {value!r:.60} cannot be kept: give its numbers")


def unpack(form: Any, arrays: list[np.ndarray]) -> Any:
    """The value of `pack`. Raises one of UNREADABLE for another form."""
    if isinstance(form, list):
        return [unpack(v, arrays) for v in form]
    if not isinstance(form, dict):
        return form
    (tag, *_), (content, *_) = form, form.values()
    if tag == "~dict":
        return {unpack(k, arrays): unpack(v, arrays) for k, v in content}
    if tag == "~tuple":
        return tuple(unpack(v, arrays) for v in content)
    if tag == "~class":
        return _class(content)(**{n: unpack(v, arrays) for n, v in form["fields"].items()})
    return arrays[content][()] if tag == "~scalar" else arrays[content]


def _fields(kind: type) -> list[str] | None:
    """Names with which an instance is made; None for what is no dataclass or NamedTuple."""
    if dataclasses.is_dataclass(kind):
        return [f.name for f in dataclasses.fields(kind) if f.init]
    return list(kind._fields) if issubclass(kind, tuple) and hasattr(kind, "_fields") else None


def _class(name: str) -> Any:
    """The dataclass or NamedTuple; a file may name no other class and no module to import."""
    module, _, qualname = name.partition(":")
    if module.startswith("fdp."):
        importlib.import_module(module)
    found: Any = sys.modules[module]
    for part in qualname.split("."):
        found = getattr(found, part)
    if not isinstance(found, type) or _fields(found) is None:
        raise ValueError(f"{name} is no class of results")
    return found


# What a result depends on
# -------------------------------------------------------------------------------------------------


def describe(value: Any) -> str:
    """A text that is another one for another value: short values in full, else a hash.

    Raises TypeError for a value that cannot be told from others."""
    arrays: list[np.ndarray] = []
    text = json.dumps(pack(_comparable(value), arrays))
    if len(text) <= 60 and not arrays:
        return text
    digest = hashlib.sha256(text.encode())
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).data)
    return digest.hexdigest()[:12]


def _comparable(value: Any) -> Any:
    """What of `value`, inside containers as well, tells it from others."""
    if isinstance(value, Arm):
        return _arm(value)
    if isinstance(value, ml_collections.ConfigDict):
        return {k: _comparable(v) for k, v in flatten(value).items()}
    if isinstance(value, Mesh):
        return dict(value.shape)
    if isinstance(value, PurePath):
        return str(value)
    if inspect.isfunction(value):
        return f"{value.__module__}:{value.__qualname__} of code {code_of(value)}"
    if isinstance(value, Mapping):
        return {k: _comparable(v) for k, v in value.items()}
    names = _fields(type(value))
    if names is not None:
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"class": kind} | {n: _comparable(getattr(value, n)) for n in names}
    if isinstance(value, list | tuple):
        return type(value)(map(_comparable, value))
    return value


def _arm(arm: Arm) -> str:
    """Seed, step and parameters. Raises RuntimeError before training."""
    state = arm.trained_on_host
    total = 0
    for leaf in jax.tree.leaves(state.variables):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), total)
    return f"{arm.label} at step {int(state.step)} ({total:08x})"


def code_of(function: Callable[..., Any]) -> str:
    """Hash of the source of the function's module, of all modules of the same package that it
    refers to, directly or not, and of the JSON files in folders beside them.

    Raises ValueError for a function without a name of its own."""
    name = getattr(function, "__qualname__", "<no name>")
    if "<" in name or not inspect.isfunction(function):
        raise ValueError(
            f"{name} of {function!r:.80} cannot be told from others: measure a function that has a "
            "name in a module, and pass what it needs as values"
        )
    return _source(function.__module__)


def reached(name: str) -> set[str]:
    """The module and those of its package whose names it uses or imports, directly or not."""
    package, seen, todo = name.split(".")[0], set[str](), {name}
    while todo:
        seen |= todo
        modules = [sys.modules[n] for n in todo if n in sys.modules]
        refers = {r for module in modules for r in map(_home, vars(module).values())}
        refers |= {r for module in modules for r in _imported(module)}
        todo = {r for r in refers if r.split(".")[0] == package} - seen
    return seen


@functools.cache
def _source(name: str) -> str:
    digest, data = hashlib.sha256(), set[Path]()
    for found in sorted(reached(name)):
        file = getattr(sys.modules.get(found), "__file__", None)
        digest.update(Path(file).read_bytes() if file else found.encode())
        data.update(Path(file).parent.glob("*/*.json") if file else ())
    for path in sorted(data):  # such as the coefficients of a price
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def _imported(module: ModuleType) -> set[str]:
    """Modules from which it imports names, such as constants, that do not tell their home."""
    file = getattr(module, "__file__", None)
    if not file or not file.endswith(".py"):
        return set()
    tree = ast.parse(Path(file).read_text(encoding="utf8"))
    whole = (node for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level)
    return {node.module for node in whole if node.module in sys.modules}


def _home(value: Any) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    home = getattr(value, "__module__", "")
    return home if isinstance(home, str) else ""


# Files
# -------------------------------------------------------------------------------------------------


class Absent(Exception):
    """No usable result; the message says why, "" where none was ever kept."""


class Cache:
    """The folder workdir/measured. `context`: what all results of a run depend on."""

    def __init__(self, workdir: Path, context: Key):
        self.folder, self.context = Path(workdir) / "measured", context

    def path(self, name: str) -> Path:
        """The file of a measurement."""
        return self.folder / f"{slug(name)}.npz"

    def find(self, name: str, key: Key) -> Any:
        """The result kept under `name` with equal context and key. Raises Absent."""
        path, expected = self.path(name), {**self.context, **key}
        if not path.exists():
            raise Absent("")
        try:
            with np.load(path, allow_pickle=False) as file:
                kept = json.loads(file["result.json"])
                found, count = dict(kept["key"]), len(file.files) - 1
                arrays = [file[str(i)] for i in range(count)]
            value = unpack(kept["value"], arrays)
        except UNREADABLE as error:
            said = f"{type(error).__name__}: {error}"
            raise Absent(
                f"{path} is truncated or no result of this program ({said:.80})"
            ) from error
        for what in dict.fromkeys((*expected, *found)):
            old, new = found.get(what, "not stated"), expected.get(what, "not stated")
            if old != new:
                raise Absent(f"{path} is of another {what}: {old}, now {new}")
        return value

    def keep(self, name: str, key: Key, value: Any, seconds: float) -> Any:
        """Keep `value` and return it as `find` will. Raises TypeError for a value that cannot be
        kept, UserError where the disk takes no more."""
        arrays: list[np.ndarray] = []
        form, key = pack(value, arrays), {**self.context, **key}
        head = {"name": name, "key": key, "seconds": round(seconds, 3), "value": form}
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("result.json", json.dumps(head, indent=1))
            for i, array in enumerate(arrays):
                with file.open(f"{i}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path(name), content.getvalue())
        except OSError as error:
            raise UserError(f"keeping {self.path(name)}: {error}. Fix: free space there") from error
        return unpack(json.loads(json.dumps(form)), arrays)


def slug(name: str) -> str:
    """A file name: letters, digits and -+=.; all else becomes an underscore."""
    return re.sub(r"[^\w+=.-]+", "_", name).strip("._") or "unnamed"
