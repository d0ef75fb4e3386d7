"""Config files: pieces that several share, and how a command reads the one that it is given.

Imports neither jax nor flax."""

import contextlib
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from fdp import config
from fdp.keys import UserError, shown


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


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser for a command with the flag --config. Raises UserError for every mistake; a bug
    inside a config file keeps its traceback."""
    flags.FLAGS.set_default("verbosity", -1)  # warnings: libraries narrate at absl's default
    file = _named(argv)
    try:
        with beside(file):
            rest = flags.FLAGS(argv)
        if flags.FLAGS["config"].value is not None:
            _check_type(file, flags.FLAGS["config"].value)
        return rest
    except UserError:
        raise
    except (flags.Error, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(cause, flags.Error | OSError) and _raised_in(file, cause):
            raise cause from None
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
            config.check_override(key, text, c.topic)
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


def _check_type(file: str, value: Any) -> None:
    _ = value.topic if not isinstance(value, dict) else ""  # a file that is not there shows itself
    if not isinstance(value, ml_collections.ConfigDict):
        raise UserError(
            f"{file}: get_config() returned {shown(value)}: return the config that "
            "fdp.config_file.start(topic, variant) makes"
        )


def _raised_in(file: str, error: BaseException) -> bool:
    """Whether the code of the config file raised it."""
    path = str(Path(file.split(":")[0]))
    return any(frame.filename == path for frame in traceback.extract_tb(error.__traceback__))
