"""Writes docs/errors.md from the tests of bad input and docs/api.md from docstrings.

python -m tools.write_docs            # from the root of a checkout
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
API = (
    "fdp.experiment:standard",
    "fdp.experiment:Experiment",
    "fdp.step:TrainStep",
    "fdp.loop:fit",
    "fdp.models.transformer:transformer",
    "fdp.models.stack:layer",
    "fdp.parallel.context.attend:attend",
    "fdp.kernels_pallas.attend:attend",
    "fdp.count.compare:outcome",
    "fdp.checkpoint:Checkpoints",
)


def signature(name: str, value: Any) -> str:
    """As it is called, without annotations."""
    parameters = inspect.signature(value).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return f"{name}{inspect.Signature(plain)}"


def api() -> str:
    """docs/api.md."""
    parts = ["# Ten functions to start from\n\nWritten by `python -m tools.write_docs`.\n"]
    for entry in API:
        module, name = entry.split(":")
        value = getattr(importlib.import_module(module), name)
        doc = inspect.getdoc(value)
        call = signature(name, value)
        parts.append(f"## `{module}.{name}`\n\n```python\n{call}\n```\n\n{doc}\n")
    return "\n".join(parts)


def message(call: Callable[[], Any]) -> str:
    """The text of the error that `call` ends in. Raises AssertionError where it ends in none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{call} was not refused")


def refusals() -> Iterator[tuple[str, str, str]]:
    """(heading, what was set, what is said), from the tables of the tests."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import test_config as of_config
    import test_keys as of_keys

    from fdp import config

    def keys(c: Any) -> Callable[[], Any]:
        return lambda: config.validate(c)

    for name, value, _, _ in of_keys.BAD:
        c = of_keys.replaced(name, value)
        if name == "mesh.dp":
            c.train.batch = value
        yield "One key", f"{name}={value!r}", message(keys(c))
    for module, name, value, _ in of_keys.OF_TOPICS:
        c = module.get_config("tiny")
        c.update_from_flattened_dict({name: value})
        yield f"Keys of {c.topic}", f"{name}={value!r}", message(keys(c))
    for heading, table in (
        ("Sizes and degrees together", of_config.INDIVISIBLE),
        ("Choices", of_config.OUTSIDE),
    ):
        for overrides, _ in table.values():
            c = of_config.tiny(overrides)
            yield heading, ", ".join(f"{k}={v!r}" for k, v in overrides.items()), message(keys(c))
    for arguments, said in of_config.REFUSED.values():
        yield "The command line", " ".join(arguments), said.removeprefix("error: ").strip()


def errors() -> str:
    """docs/errors.md."""
    parts = [
        "# What is refused, and what is said\n\nWritten by `python -m tools.write_docs` from the "
        "tests of bad input. All of it is refused before anything starts, in one line.\n"
    ]
    last = ""
    for heading, given, said in refusals():
        if heading != last:
            parts.append(f"\n## {heading}\n\n| given | said |\n|---|---|")
            last = heading
        short = [text if len(text) < 300 else text[:280] + " …" for text in (given, said)]
        parts.append(
            "| " + " | ".join(f"`{text.replace('|', chr(92) + '|')}`" for text in short) + " |"
        )
    return "\n".join(parts) + "\n"


def pages() -> dict[Path, str]:
    """All pages that are written, by path."""
    return {ROOT / "docs" / "api.md": api(), ROOT / "docs" / "errors.md": errors()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf8")
        print(path)
