"""Documents of files and folders of text, and an account of what was read and what was not."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fdp.data.decode import BROKEN, UNPACK, NotText, codec_of, decode, decoded, open_file
from fdp.data.rows import (
    JSON_NAMES,
    PARQUET,
    is_array,
    is_json_lines,
    text_or_rows,
    texts_of_lines,
    texts_of_parquet,
)
from fdp.data.shards import BLOCK

# Paragraphs of a file are joined up to this length, in characters: about a chapter, so that a
# window sees context. A short file gets shorter documents, about FILE_DOCUMENTS of them.
DOCUMENT_CHARS = 2000
FILE_DOCUMENTS = 40

# A larger file is read in blocks, which are cut one by one: no file has to fit into memory.
LARGE = 32 << 20  # bytes

NAMED = 8  # files that an account names, one of every reason first


@dataclass
class Inputs:
    """What became of the files of a source; filled while they are read."""

    read: Counter[str] = field(default_factory=Counter)  # encoding and packing → files
    left_out: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    remarks: list[str] = field(default_factory=list)
    large: int = 0  # files that are cut for their size

    def leave_out(self, path: Path, root: Path, reason: str) -> None:
        """Note a file that is not used."""
        name = str(path.relative_to(root)) if path != root else path.name
        shown = "".join(char if char.isprintable() else "?" for char in name)
        self.left_out.append((shown, reason))

    def lost(self) -> str:
        """What was left out: the number, a few names and the reasons. "" where nothing was."""
        if not self.left_out:
            return ""
        # One of each reason before a second of any.
        seen: Counter[str] = Counter()
        ranked = []
        for name, reason in self.left_out:
            ranked.append((seen[reason], name, reason))
            seen[reason] += 1
        ranked.sort(key=lambda entry: entry[0])
        names = ", ".join(f"{name} ({reason})" for _, name, reason in ranked[:NAMED])
        more = len(ranked) - NAMED
        return f"{len(ranked)} left out: {names}" + (f" and {more} more" if more > 0 else "")

    def notes(self) -> tuple[str, ...]:
        """Lines for the banner: nothing for one plain file."""
        n = sum(self.read.values())
        how = ", ".join(
            (f"{count} " if n > 1 else "") + f"as {name}"
            for name, count in sorted(self.read.items())
            if name != "utf-8"
        )
        parts = [f"{n} file{'s' * (n != 1)} read{f' ({how})' if how else ''}", self.lost()]
        if self.large and n > 1:
            parts.append(f"{self.large} of over {LARGE >> 20} MiB cut into documents")
        plain = n == 1 and not how and not self.left_out
        return (*([] if plain or not n else ["; ".join(filter(None, parts))]), *self.remarks)


def documents_of(path: Path, inputs: Inputs) -> Iterator[str]:
    """Documents of a file or a folder; what was read, and what not, is noted in `inputs`.

    A folder is read recursively in sorted order, linked folders last, one document a file; a folder
    of one file is that file. A file is cut at form feeds and at blank lines, else at line ends (see
    DOCUMENT_CHARS); one of over LARGE bytes in a folder too. JSON and Parquet, by their content,
    give the "text" of each row. Raises ValueError: for a
    file that is no text, and, in a folder too, for one that is damaged behind a good beginning."""
    if not path.is_dir():
        yield from _pieces(_read(path, inputs), inputs)
        return
    held: list[str | Iterator[str]] = []  # the first one, until there is a second
    n = 0
    for file in _walk(path, inputs):
        try:
            content = _read(file, inputs)
        except NotText as error:
            inputs.leave_out(file, path, error.reason)
            continue
        n += 1
        held.append(content)
        while n > 1 and held:
            yield from _whole(held.pop(0))
    for content in held:
        yield from _pieces(content, inputs)


def files_of(path: Path) -> Iterator[Path]:
    """The files that documents_of looks at."""
    return _walk(path, Inputs()) if path.is_dir() else iter([path])


def files_below(root: Path) -> Iterator[Path]:
    """Files below `root` in sorted order; hidden ones and linked folders are left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _walk(root: Path, inputs: Inputs) -> Iterator[Path]:
    """As `files_below`, then the same of every linked folder, each folder once."""
    seen: set[tuple[int, int]] = set()
    tops = [root]

    def unreadable(error: OSError) -> None:
        inputs.leave_out(Path(error.filename), root, f"folder: {error.strerror}")

    while tops:
        top = tops.pop(0)
        if _identity(top) in seen:
            inputs.leave_out(top, root, "link to a folder that is read already")
            continue
        for folder, subfolders, names in os.walk(top, onerror=unreadable):
            seen.add(_identity(Path(folder)))
            for name in (*subfolders, *names):
                if name.startswith("."):
                    inputs.leave_out(Path(folder, name), root, "hidden")
            below = sorted(name for name in subfolders if not name.startswith("."))
            links = [name for name in below if Path(folder, name).is_symlink()]
            tops += [Path(folder, name) for name in links]
            subfolders[:] = [
                name
                for name in below
                if name not in links and _identity(Path(folder, name)) not in seen
            ]
            yield from (Path(folder, name) for name in sorted(names) if name[0] != ".")


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _read(path: Path, inputs: Inputs) -> str | Iterator[str]:
    """The text of a file, or the texts of its rows."""
    stream, packing = open_file(path)
    how = "utf-8"
    content: str | Iterator[str]
    with stream:
        try:
            name = path.with_suffix("") if packing else path
            if stream.peek(len(PARQUET)).startswith(PARQUET):
                if packing:
                    raise NotText(path, "Parquet", UNPACK)
                content, how = texts_of_parquet(path), "parquet"
            elif is_json_lines(name, stream):
                content = texts_of_lines(path, _lines_of(path))
            elif len(data := stream.read(LARGE + 1)) > LARGE:
                how = _large(path, name, data)
                content = _cut_blocks(path, codec_of(how))
                inputs.large += 1
            else:
                text, how = decode(path, data)
                if not text.strip():
                    raise NotText(path, "holds no text", "write some into it")
                content = text_or_rows(path, name.suffix.lower(), text)
        except BROKEN as error:
            raise _damaged(path, error) from error
    if not isinstance(content, str):  # a wrong file shows at its first row
        if (first := next(content, None)) is None:
            raise NotText(path, "holds no text", "write some into it")
        content = itertools.chain([first], content)
    inputs.read[" ".join(word for word in (how, packing) if word not in ("", "utf-8")) or how] += 1
    return content


def _large(path: Path, name: Path, data: bytes) -> str:
    """The encoding of a large file that begins with `data`. Raises NotText where it is JSON, which
    can be read as lines only."""
    text, how = decode(path, data[: data.rfind(b"\n") + 1] or data)  # no character cut in two
    if name.suffix.lower() in JSON_NAMES or is_array(text):
        reason = f"over {LARGE >> 20} MiB in one array, or not UTF-8"
        raise NotText(path, reason, "write one object a line", "JSON lines in UTF-8")
    return how


def _cut_blocks(path: Path, codec: str) -> Iterator[str]:
    """Documents of a large file, from one block of about LARGE bytes after another."""
    held = ""
    for block in decoded(path, _blocks_of(path), codec):
        held += block
        if len(held) < LARGE // 2:
            continue
        ends = (held.rfind(mark) + len(mark) for mark in ("\f", "\n\n", "\n", " "))
        end = next((end for end in ends if end > len(held) // 2), len(held))
        yield from cut(held[:end], Inputs(), DOCUMENT_CHARS)
        held = held[end:]
    yield from cut(held, Inputs(), DOCUMENT_CHARS)


def _blocks_of(path: Path) -> Iterator[bytes]:
    stream, _ = open_file(path)
    with stream:
        try:
            while block := stream.read(BLOCK):
                yield block
        except BROKEN as error:
            raise _damaged(path, error) from error


def _lines_of(path: Path) -> Iterator[bytes]:
    stream, _ = open_file(path)
    with stream:
        try:
            yield from stream
        except BROKEN as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"{path} is damaged ({error}): fetch it again, or move it away")


def _whole(content: str | Iterator[str]) -> Iterator[str]:
    return iter((content,)) if isinstance(content, str) else content


def _pieces(content: str | Iterator[str], inputs: Inputs) -> Iterator[str]:
    return cut(content, inputs) if isinstance(content, str) else content


def cut(text: str, inputs: Inputs, target: int = 0) -> Iterator[str]:
    """Documents of one text: sections between form feeds, each cut at blank lines, else at line
    ends. A text of one long line is cut behind spaces and full stops, else anywhere.

    `target`: characters of a document at least; 0: as many as DOCUMENT_CHARS says."""
    sections = text.split("\f")
    # A form feed may leave a document short: one more to aim at.
    target = target or min(DOCUMENT_CHARS, len(text) // (FILE_DOCUMENTS + len(sections) - 1))
    if len(text) > DOCUMENT_CHARS and len(text.strip().splitlines()) == 1:
        inputs.remarks.append(f"one line of {len(text):,} characters, cut about every {target:,}")
        stop = rf"(?s).{{{target},{2 * target}}}?[\s.。！？]|.{{1,{target}}}"
        yield from re.findall(stop, text)
        return
    for section in sections:
        paragraphs = re.split(r"\n\s*\n", section.strip())
        if len(paragraphs) > 1:
            yield from _join(paragraphs, "\n\n", target)
        else:
            yield from _join(section.splitlines(), "\n", target)


def _join(parts: Sequence[str], separator: str, target_chars: int) -> Iterator[str]:
    """Successive parts joined into documents of at least `target_chars`; the last one may be
    shorter."""
    held: list[str] = []
    n_chars = 0
    for part in parts:
        held.append(part)
        n_chars += len(part)
        if n_chars >= target_chars:
            yield separator.join(held)
            held, n_chars = [], 0
    yield separator.join(held)
