"""Texts of rows: JSON as lines of objects, one array of objects, or one object, each with a "text";
and Parquet with a column "text".

Which of them a file is, its content says; its name only says that it must be JSON."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fdp.data.decode import NotText
from fdp.keys import UserError

JSON_LINES = (".jsonl", ".ndjson")
JSON_NAMES = (*JSON_LINES, ".json")
BLANKS = b"\xef\xbb\xbf \t\r\n"  # a byte-order mark and spaces
LONGEST = 32 << 20  # bytes of a first row; a longer line is no row
PARQUET, PARQUET_ROWS = b"PAR1", 256  # first bytes; rows read at once
FIX = 'give each row a string "text"'


def is_json_lines(name: Path, stream: BinaryIO) -> bool:
    """Whether the first line that is not blank is an object of JSON, and one with a text unless the
    name says JSON. Leaves the stream at its start."""
    try:
        while line := stream.readline(LONGEST):
            if line := line.strip(BLANKS):
                break
        else:
            return False
        return line.startswith(b"{") and _is_row(_parsed(line), name.suffix.lower())
    finally:
        stream.seek(0)


def texts_of_lines(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    """The "text" of each line. Raises NotText where the first row has none, ValueError with the
    number of a later line that has none, or that is not JSON in UTF-8."""
    good = 0
    for number, line in enumerate(lines, 1):
        if not (line := line.strip(BLANKS)):
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            message = (
                f"is not UTF-8, as JSON must be ({error.reason}): convert the file with `iconv`"
            )
            raise ValueError(f"{path}:{number} {message}") from error
        except ValueError as error:
            reason = f"is not JSON ({error}): one object a line is expected"
            if not good:
                raise NotText(path, f"line {number} {reason}", FIX, "JSON lines") from error
            raise ValueError(f"{path}:{number} {reason}") from error
        yield _text(path, f":{number}", row, good)
        good += 1


def text_or_rows(path: Path, suffix: str, text: str) -> str | Iterator[str]:
    """`text` itself, or the texts of its rows where it is JSON with texts.

    Raises NotText where `suffix` says JSON and it is none, or none with texts."""
    start = text.lstrip()[:1]
    value = _parsed(text) if start and start in "[{" else None
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and (suffix in JSON_NAMES or _is_row(value[0], suffix)):
        return iter([_text(path, f": row {i}", row, i - 1) for i, row in enumerate(value, 1)])
    lines = text.split("\n")
    if suffix in JSON_LINES or _is_row(_parsed(lines[0]), suffix):
        return texts_of_lines(path, (line.encode("utf-8", "surrogatepass") for line in lines))
    if suffix == ".json" and text.strip():
        raise NotText(path, "its name says JSON and its content does not", FIX, "JSON")
    return text


def is_array(text: str) -> bool:
    """Whether a text begins as an array of objects."""
    return re.match(r"\s*\[\s*\{", text) is not None


def texts_of_parquet(path: Path) -> Iterator[str]:
    """The column "text", a few rows at a time. Raises NotText for a file without one, or that is
    damaged, UserError without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} is Parquet, which needs pyarrow: pip install -e '.[hf]'"
        ) from error
    fix = 'name the column of texts "text"'
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                reason = f'no column "text" (found: {", ".join(names)[:80]})'
                raise NotText(path, reason, fix, "Parquet with texts")
            kind = file.schema_arrow.field("text").type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise NotText(path, f'column "text" is {kind}', fix, "Parquet with texts")
            for rows in file.iter_batches(PARQUET_ROWS, columns=["text"]):
                yield from (text for text in rows.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError) as error:
        told = " ".join(str(error).split())
        raise NotText(path, f"damaged: {told}", "fetch it again", "Parquet") from error


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_row(value: Any, suffix: str) -> bool:
    return isinstance(value, dict) and (suffix in JSON_NAMES or isinstance(value.get("text"), str))


def _text(path: Path, where: str, row: Any, good: int) -> str:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    reason = f'no string field "text" (found: {found[:80]})'
    if good:
        raise ValueError(f"{path}{where} has {reason}")
    raise NotText(path, f"row 1 has {reason}", FIX, "JSON with texts")
