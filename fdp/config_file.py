"""Config files: pieces that several share, and how a command reads the one that it is given.

Imports neither jax nor flax."""

import contextlib
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from fdp import config
from fdp.keys import UserError, closest, shown


def start(topic: str, variant: str) -> ml_collections.ConfigDict:
    """The base config of `topic` with its own sections; raises UserError for an unknown variant."""
    c = config.base(**config.topic_sections(topic))
    c.topic, c.variant = topic, config.check_variant(variant)
    return c


def llama_like(
    m: ml_collections.ConfigDict, layers: int, width: int, heads: int, kv_heads: int, vocab: int
) -> None:
    """Fill the model section with the usual proportions: head_dim = width/heads, SwiGLU of
    8/3·width rounded to 128.
    """
    m.update(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        vocab=vocab,
    )
    m.ffn = -(-8 * width // 3 // 128) * 128


# Reading
# --------------------------------------------------------------------------------------------------


ASKED = "name a file, such as --config=configs/topic1.py:tiny"


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser for a command with the flag --config. Raises UserError for every mistake; a bug
    inside a config file keeps its traceback."""
    flags.FLAGS.set_default("verbosity", -1)  # warnings: libraries narrate at absl's default
    logging.getLogger("absl").setLevel(logging.ERROR)  # of ml_collections: the line below says it
    file = _named(argv)
    if file:
        _check_file(Path(file.split(":")[0]))
    try:
        with beside(file):
            rest = flags.FLAGS(argv)
        if file:
            _check_type(file, flags.FLAGS["config"].value)
        return rest
    except (flags.Error, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        _raise_own(file, error)
        if "--config must have a value" in str(error):
            if not file:
                raise UserError(f"there is no --config: {ASKED}") from error
            _check_type(file, flags.FLAGS["config"].value)  # get_config() made none
        told = error.args[0] if isinstance(error, KeyError) else error
        raise UserError(refused_override(argv) or str(told)) from error


def refused_override(argv: list[str]) -> str:
    """Why an override in `argv` is refused by the declaration of its key; "" where none is."""
    words = "\0".join(argv)  # no argument holds this character
    overrides = re.finditer(r"\0--?(?:no)?config\.([\w.]+)(?:=([^\0]*)|\0(?!-)([^\0]*))?", words)
    if not (file := _named(argv)):
        return ""
    try:
        with beside(file):
            c: Any = flags.FLAGS["config"].parser.parse(file)
    except (flags.Error, OSError, ValueError):  # the file itself is refused: the caller says why
        return ""
    try:
        for found in overrides:
            key, *texts = found.groups()
            text = next((text for text in texts if text is not None), None)
            config.check_override(key, text, getattr(c, "topic", ""))
    except UserError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def beside(file: str) -> Iterator[None]:
    """While a config file is loaded, Python finds the modules beside it, as for a script; where it
    is part of a package, the package too."""
    folders = [Path(file.split(":")[0]).resolve().parent] if file else []
    while folders and (folders[-1] / "__init__.py").is_file():
        folders.append(folders[-1].parent)
    paths = [str(folder) for folder in folders]
    sys.path[:0] = paths
    try:
        yield
    finally:
        for path in paths:
            sys.path.remove(path)


def _named(argv: list[str]) -> str:
    """The value of --config in the arguments of a command."""
    found = re.findall(r"\0--?config[=\0]([^\0]+)", "\0".join(argv))
    return found[-1] if found else ""


def _check_file(path: Path) -> None:
    """Raises UserError where no config file is at `path`."""
    if path.is_dir():
        raise UserError(f"--config={path} is a folder: {ASKED}")
    if not path.exists():
        there = [p.name for p in path.parent.glob("*.py") if p.name != "__init__.py"]
        near = f"{closest(path.name, there)}" if there else ASKED
        raise UserError(f"--config={path}: there is no such file: {near}")


def _check_type(file: str, value: Any) -> None:
    getattr(value, "topic", "")  # a file that is not there shows itself, as OSError
    if not isinstance(value, ml_collections.ConfigDict):
        raise UserError(
            f"{file}: get_config() returned {shown(value)}: return the config that "
            "fdp.config_file.start(topic, variant) makes"
        )


def _raise_own(file: str, error: BaseException | None) -> None:
    """Raise what a config file did wrong, if that is what led to `error`: absl and ml_collections
    wrap it. A bug is raised as it was."""
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__context__
    for cause in reversed(chain):
        if isinstance(cause, UserError):
            raise cause from None
    for cause in chain:
        wrapped = isinstance(cause, flags.Error) or "Error whilst parsing" in str(cause)
        if wrapped or (place := _place(file, cause)) is None:
            continue
        if not place:
            raise cause from None
        if "has no attribute 'get_config'" in str(cause):
            raise UserError(
                f"{file} has no get_config(variant): it makes the config, from "
                "fdp.config_file.start(topic, variant) on"
            ) from cause
        raise UserError(f"{place}: {type(cause).__name__}: {cause}") from cause


def _place(file: str, error: BaseException) -> str | None:
    """Where a config file did what ml_collections refuses, such as a misspelt key: file, line and
    code. "" for another error raised while its code ran, None for one that it did not raise."""
    path = Path(file.split(":")[0]).resolve()
    frames = traceback.extract_tb(error.__traceback__)
    inside = [i for i, frame in enumerate(frames) if Path(frame.filename).resolve() == path]
    if not inside:
        return file if file and "get_config" in str(error) else None
    last = frames[inside[-1]]
    below = frames[inside[-1] + 1 :]
    if below and all("ml_collections" in frame.filename for frame in below):
        return f"{path.name} line {last.lineno}, {last.line}"
    return ""
