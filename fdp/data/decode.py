"""Bytes of a file to text: unpacked, decoded in the encoding that they are in, or refused.

Every character of the file is read as what it is, or the file is refused. None becomes U+FFFD."""

import bz2
import codecs
import gzip
import io
import lzma
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fdp.data.charset import Unsure, common_name, legacy_encoding

# The longer mark first: that of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
WITHOUT_MARK = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")

CONVERT = "convert it or choose another data.source"
UNPACK = "unpack it first"
# First bytes, what they say, and what to do. Text in a container is no text yet.
FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF-", "a PDF", "extract its text, as `pdftotext` does"),
    (b"{\\rtf", "RTF", CONVERT),
    (b"\xd0\xcf\x11\xe0", "an Office document", CONVERT),
    (b"PK\x03\x04", "a ZIP archive, as .docx, .epub and .npz are", UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"\x28\xb5\x2f\xfd", "packed by zstd", "unpack it with `zstd -d`"),
    (b"ARROW1", "Arrow", "write its texts as JSON lines"),
    (b"SQLite format 3", "an SQLite database", "write its texts as JSON lines"),
    (b"\x93NUMPY", "a NumPy array", CONVERT),
    (b"\x89PNG", "a PNG image", CONVERT),
    (b"\xff\xd8\xff", "a JPEG image", CONVERT),
    (b"GIF8", "a GIF image", CONVERT),
    (b"\x7fELF", "a program", CONVERT),
)
PACKED: tuple[tuple[bytes, str, Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", "gz", gzip.open),
    (b"BZh", "bz2", bz2.open),
    (b"\xfd7zXZ\x00", "xz", lzma.open),
)
BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)

LOST = "\ufffd"  # what a decoder puts where it gives up
ESCAPE = b"\x1b$"  # begins the two-byte characters of ISO-2022
TAR_AT, TAR = 257, b"ustar"
CONTROLS = bytes(b for b in range(32) if b not in b"\t\n\v\f\r\b\x1b")
BINARY = 0.005  # share of control characters from which on a file is no text
PROBE = 1 << 16


class NotText(ValueError):
    """A file that holds no text that can be read, with the reason, in a few words, and the
    remedy."""

    def __init__(self, path: Path, reason: str, fix: str = CONVERT, what: str = "UTF-8 text"):
        super().__init__(f"{path} is not {what} ({reason}): {fix}")
        self.reason = reason


def open_file(path: Path) -> tuple[io.BufferedReader, str]:
    """The contents of a file, unpacked, and how it is packed: "gz", "bz2", "xz" or "".

    Raises NotText for what is no regular file (a FIFO would be waited for without end), what cannot
    be read, and for known formats that hold no plain text."""
    try:
        if not stat.S_ISREG(mode := path.stat().st_mode):
            kind = "a FIFO" if stat.S_ISFIFO(mode) else "no regular file"
            raise NotText(path, kind, "write its text to a file")
        file: Any = path.open("rb")
        head = file.peek(PROBE)[:PROBE]
        packing = ""
        for magic, packing_name, opener in PACKED:
            if head.startswith(magic):
                file, packing = io.BufferedReader(opener(file)), packing_name
                head = file.peek(PROBE)[:PROBE]
    except FileNotFoundError as error:
        raise NotText(path, "a link to nothing", "mend the link") from error
    except BROKEN as error:
        raise NotText(path, f"damaged: {error}", "fetch it again") from error
    except OSError as error:
        raise NotText(path, str(error.strerror or error), "make it readable") from error
    _refuse_formats(path, head)
    return file, packing


def decode(path: Path, data: bytes) -> tuple[str, str]:
    """The text of `data`, with line ends as "\\n", and the encoding that it is in. A character that
    the end of the file cuts in two is left out.

    Raises NotText where the encoding is not certain, or does not explain every byte; `path` is for
    the message."""
    for mark, name in MARKS:
        if data.startswith(mark):
            return _strict(path, data[len(mark) :], name), name.removesuffix("-le")
    if b"\0" in data:
        return _without_mark(path, data)
    if ESCAPE in data[:PROBE] and data.isascii():
        return _strict(path, data, "iso2022_jp_2"), "iso-2022-jp"
    try:
        return _lines(data.decode("utf-8")), "utf-8"
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and not data[: error.start].isascii():
            return _lines(_tolerant(data, "utf-8")), "utf-8 but for its last character, cut in two"
        _refuse_damaged(path, data, error)
    if sum(data.count(bytes([b])) for b in CONTROLS) > BINARY * len(data):
        raise NotText(path, "binary: control characters")
    try:
        name = legacy_encoding(data)
    except Unsure as error:
        raise _unsure(path, data, error.likely) from error
    return _strict(path, data, name), common_name(name)


def codec_of(how: str) -> str:
    """Python's name of an encoding that `decode` has found in the beginning of a file."""
    name = how.split(" ")[0]
    others = {"utf-8": "utf-8-sig", "macintosh": "mac_roman", "iso-2022-jp": "iso2022_jp_2"}
    return others.get(name, name)


def decoded(path: Path, blocks: Iterable[bytes], codec: str) -> Iterator[str]:
    """The text of a file in blocks, with line ends as "\\n". A character that the end of the file
    cuts in two is left out. Raises ValueError where the codec does not explain every byte."""
    plain = codecs.getincrementaldecoder(codec)("strict")
    decoder = io.IncrementalNewlineDecoder(plain, translate=True)
    n = 0
    for block in blocks:
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} begins as {codec}, and cannot be decoded at about byte "
                f"{n + error.start:,} ({error.reason}): repair it, or convert it to UTF-8"
            ) from error
        # Codecs that say the order of bytes keep the byte-order mark as a character.
        yield text if n else text.removeprefix("\ufeff")
        n += len(block)
    yield decoder.decode(b"")


def _unsure(path: Path, data: bytes, likely: list[str]) -> NotText:
    text = data.decode("utf-8", "replace")
    lost = f"{text.count(LOST) / len(text):.1%} of its characters are lost"
    if not likely:
        return NotText(path, f"{lost}, and no other encoding explains it")
    return NotText(
        path,
        f"{lost}; its encoding may be {' or '.join(likely[:3])}",
        f"if it is {likely[0]}, run `iconv -f {likely[0]} -t UTF-8`",
    )


def _refuse_formats(path: Path, head: bytes) -> None:
    for magic, kind, fix in FORMATS:
        if head.startswith(magic):
            raise NotText(path, kind, fix)
    if head[TAR_AT:].startswith(TAR):
        raise NotText(path, "a tar archive", UNPACK)


def _strict(path: Path, data: bytes, name: str) -> str:
    try:
        return _lines(_tolerant(data, name))
    except UnicodeDecodeError as error:
        lost = data.decode(name, "replace").count(LOST) / max(len(data), 1)
        raise NotText(
            path,
            f"it seems to be {common_name(name)}, where {max(lost, 1e-5):.3%} of it cannot be "
            f"decoded, first at byte {error.start:,}",
            "repair it, or convert it to UTF-8",
        ) from error


def _tolerant(data: bytes, name: str) -> str:
    """Strict but for the end, where a character may be incomplete."""
    return codecs.getincrementaldecoder(name)("strict").decode(data, False)


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _without_mark(path: Path, data: bytes) -> tuple[str, str]:
    """UTF-16 and UTF-32 without a mark have NULs, in ASCII characters, and no other control
    characters."""
    for name in WITHOUT_MARK:
        try:
            text = _tolerant(data[:PROBE], name)
        except UnicodeDecodeError:
            continue
        odd = sum(not (char.isprintable() or char.isspace()) for char in text)
        if odd <= BINARY * len(text) and any(char in " \n" for char in text):
            return _strict(path, data, name), name
    raise NotText(path, "it has NUL bytes")


def _refuse_damaged(path: Path, data: bytes, error: UnicodeDecodeError) -> None:
    """Raises NotText where most of what is outside ASCII is UTF-8: no other encoding looks like
    it."""
    text = data.decode("utf-8", "replace")
    bad = text.count(LOST)
    good = sum(char >= "\x80" for char in text) - bad
    if good > bad:
        line = data.count(b"\n", 0, error.start) + 1
        raise NotText(
            path,
            f"{bad:,} of {len(text):,} characters are damaged, first in line {line:,}",
            "to drop them, run `iconv -c -f UTF-8 -t UTF-8`",
        )
