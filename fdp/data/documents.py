"""Documents of files and folders of text, and an account of what was read and what was not."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fdp.data.decode import BROKEN, NotText, decode, open_file
from fdp.data.rows import is_json_lines, text_or_rows, texts_of_lines

# Paragraphs of a file are joined up to this length, in characters: about a chapter, so that a
# window sees context. A short file gets shorter documents, about FILE_DOCUMENTS of them.
DOCUMENT_CHARS = 2000
FILE_DOCUMENTS = 40

NAMED = 3  # files that an account names


@dataclass
class Inputs:
    """What became of the files of a source; filled while they are read."""

    read: Counter[str] = field(default_factory=Counter)  # encoding and packing → files
    left_out: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    remarks: list[str] = field(default_factory=list)

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
        plain = n == 1 and not how and not self.left_out
        return (*([] if plain or not n else ["; ".join(filter(None, parts))]), *self.remarks)


def documents_of(path: Path, inputs: Inputs) -> Iterator[str]:
    """Documents of a file or a folder; what was read, and what not, is noted in `inputs`.

    A folder is read recursively in sorted order, linked folders last, one document a file; a folder
    of one file is that file. A file is cut at form feeds and at blank lines, else at line ends (see
    DOCUMENT_CHARS). JSON, by its content, gives the "text" of each row. Raises ValueError: for a
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
            if is_json_lines(name, stream):
                content = texts_of_lines(path, _lines_of(path))
            else:
                text, how = decode(path, stream.read())
                if not text.strip():
                    raise NotText(path, "holds no text", "write some into it")
                content = text_or_rows(path, name.suffix.lower(), text)
        except BROKEN as error:
            raise _damaged(path, error) from error
    if not isinstance(content, str):  # a wrong file shows at its first row
        content = itertools.chain([next(content)], content)
    inputs.read[" ".join(word for word in (how, packing) if word not in ("", "utf-8")) or how] += 1
    return content


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


def cut(text: str, inputs: Inputs) -> Iterator[str]:
    """Documents of one text: sections between form feeds, each cut at blank lines, else at line
    ends. A text of one long line is cut behind spaces and full stops, else anywhere."""
    sections = text.split("\f")
    # A form feed may leave a document short: one more to aim at.
    target = min(DOCUMENT_CHARS, len(text) // (FILE_DOCUMENTS + len(sections) - 1))
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
