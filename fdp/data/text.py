"""Text corpora: distinct documents in a file of the cache, and their split into training and
validation.

A document is the unit of the split. Exact copies of a document are dropped when a corpus is read,
so that no text is on both sides. Near copies (quotations, parallel passages) are not searched for.

Memory does not grow with the text, only with the number of documents: 16 bytes each, and up to 100
while they are read. Legend: N documents."""

import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fdp.data.shards import DamagedShards, Shards, check_room, locked, opened, progress_bar, read
from fdp.data.sources import Source, source_of
from fdp.files import write_atomic

SHARD = 16 << 20  # bytes of text that are held while they are read
PREFIX = 8  # bytes before each document that hold its length
SETTLED = 2.0  # seconds; a file that changed more recently may change again within the same tick


class Documents(Sequence[str]):
    """Documents in a file, each read when it is asked for."""

    def __init__(self, path: Path, starts_N: np.ndarray, sizes_N: np.ndarray):
        """`starts_N` and `sizes_N`: int64 [N], the bytes of each document in the file."""
        self.path = path
        self.starts = starts_N
        self.sizes = sizes_N
        self._file = opened(self, path)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: Any) -> Any:
        """A document, or those of a slice or of an array of numbers, not read yet."""
        if isinstance(i, slice | np.ndarray):
            return Documents(self.path, self.starts[i], self.sizes[i])
        return b"".join(read(self._file, int(self.starts[i]), int(self.sizes[i]))).decode()

    def sample(self, share: float) -> "Documents":
        """About this share of the documents, evenly spread: a function of their number alone."""
        if share >= 1:
            return self
        # Multiples of the golden section fill the unit interval evenly, and have no period that a
        # folder could share.
        spread_N = np.arange(len(self), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return self[np.flatnonzero(spread_N <= np.uint64(share * 2**64))]


@dataclass(frozen=True)
class Corpus:
    """Distinct documents that are not blank, in source order, with the licence and the hash that a
    report prints."""

    name: str
    n: int  # documents
    n_bytes: int  # of their UTF-8
    licence: str
    sha256: str  # of all documents, each behind its length in 8 bytes
    folder: Path  # of the cache that holds the text
    notes: tuple[str, ...] = ()  # what was read, and what was left out

    def documents(self) -> Documents:
        """The documents; raises DamagedShards where their file is not whole."""
        stem = self.folder / f"text-{self.sha256[:16]}"
        shards = Shards(stem)
        try:
            index = np.load(stem.with_suffix(".npy"), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedShards(f"{stem}.npy: {error}") from error
        found = hashlib.sha256(index.tobytes()).hexdigest()
        if shards.about.get("documents") != found or shards.damaged():
            raise DamagedShards(f"{shards.bin} is damaged")
        return Documents(shards.bin, *index)


def load_corpus(source: str, folder: Path, again: bool = False) -> Corpus:
    """Read a source into a file in `folder`, or find it there.

    A source that was read before is not read again while its State is the same: for files their
    names, sizes and times of change, for a data set of Hugging Face its name. `again` reads it
    anyway. Raises the errors of source_of, ValueError for text that is malformed or absent, OSError
    for a disk that is full."""
    found = source_of(source)
    stem = folder / f"source-{found.state.key[:16]}"
    with locked(stem):
        if not again:
            try:
                return _corpus(found, folder, json.loads(stem.with_suffix(".json").read_text()))
            except (OSError, ValueError, TypeError, KeyError):
                pass
        about = _read(found, folder)
        if found.state.changed < time.time() - SETTLED:
            write_atomic(stem.with_suffix(".json"), json.dumps(about))
        return _corpus(found, folder, about)


def split_documents(
    corpus: Corpus, val_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and of the validation documents, ascending: a function of
    (corpus.sha256, seed) alone.

    `val_fraction` is the fraction of the number of documents, rounded, with at least one on each
    side. Raises ValueError for a fraction outside (0, 1) and for a corpus of one document."""
    n_val = n_validation(corpus, val_fraction)
    prefix = f"{corpus.sha256} {seed} "
    # The first 8 bytes decide: two of 10⁶ documents share them with a probability of 3·10⁻⁸.
    keys = (hashlib.sha256(f"{prefix}{i}".encode()).digest()[:8] for i in range(corpus.n))
    keys_N = np.fromiter((int.from_bytes(key) for key in keys), np.uint64, corpus.n)
    in_val_N = np.zeros(corpus.n, bool)
    in_val_N[np.argsort(keys_N, kind="stable")[:n_val]] = True
    return np.flatnonzero(~in_val_N), np.flatnonzero(in_val_N)


def n_validation(corpus: Corpus, val_fraction: float) -> int:
    """Documents of the validation side, with the errors of split_documents."""
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"data.val_fraction={val_fraction} must lie between 0 and 1: set data.val_fraction=0.05"
        )
    if corpus.n < 2:
        read = f" ({'; '.join(corpus.notes)})" if corpus.notes else ""
        raise ValueError(
            f"corpus {corpus.name!r} has {corpus.n} document{read}, so none is left for "
            "validation: separate documents by blank lines or form feeds, or give a folder of files"
        )
    return min(max(round(val_fraction * corpus.n), 1), corpus.n - 1)


def _framed(data: bytes) -> bytes:
    """A document as it is hashed and as it lies in the file: its length, then its bytes."""
    return len(data).to_bytes(PREFIX, "little") + data


def _corpus(source: Source, folder: Path, about: dict[str, Any]) -> Corpus:
    notes = tuple(about["notes"])
    return Corpus(
        source.name, about["n"], about["bytes"], source.licence, about["sha256"], folder, notes
    )


def _read(source: Source, folder: Path) -> dict[str, Any]:
    """Write the documents of a source into the cache; what is kept of it."""
    _sweep(folder)
    check_room(folder, source.state.n_bytes, "documents", "as many bytes as their files")
    shards = Shards(folder / f"reading-{source.state.key[:16]}")
    try:
        sizes_N, digests = _write(source, shards)
        if not len(sizes_N):
            lost = f" ({source.inputs.lost()})" if source.inputs.left_out else ""
            raise ValueError(
                f"data.source={source.name!r} holds no text{lost}: give files of UTF-8 text with "
                "something in them"
            )
        kept_N = _first_ones(digests)
        starts_N = (np.cumsum(sizes_N + PREFIX) - sizes_N)[kept_N]
        sizes_N = sizes_N[kept_N]
        sha256 = _sha256_of_file(shards.bin, starts_N, sizes_N)
        _keep(shards, folder / f"text-{sha256[:16]}", starts_N, sizes_N)
    except BaseException:
        if source.position is None:  # it would be read from the start anyway
            shards.remove()
        raise
    shards.remove()
    notes = source.inputs.notes()
    copies = len(kept_N) - len(starts_N)
    if source.inputs.read and copies:
        notes += (f"{copies:,} of {len(kept_N):,} documents are copies of others, and left out",)
    n_bytes = int(sizes_N.sum())
    return {"n": len(starts_N), "bytes": n_bytes, "sha256": sha256, "notes": notes}


def _sweep(folder: Path) -> None:
    """Remove what killed processes have left of sources that cannot be gone on with."""
    for path in folder.glob("reading-*.bin"):
        # Alone until it is removed: else another process might begin to write it meanwhile. This
        # process is not alone with the one that it is about to make anew.
        with locked(folder / path.name.replace("reading", "source"), wait=False) as alone:
            left = Shards(path)
            if alone and not left.about:
                left.remove()


def _write(source: Source, shards: Shards) -> tuple[np.ndarray, bytes]:
    """Append the documents that are not blank; their sizes, and a hash of 16 bytes for each."""
    sizes, digests = array("q"), bytearray()
    held: list[bytes] = []
    n_bytes = 0
    documents = _resumed(source, shards, sizes, digests)
    with progress_bar("read", source.state.n_bytes or None, shards.n_bytes) as progress:
        for document in documents:
            if not document or document.isspace():
                continue
            # Lone surrogates (JSON allows them) have no UTF-8 form: they become "?".
            data = document.encode("utf-8", "replace")
            held.append(_framed(data))
            sizes.append(len(data))
            digests += _short_hash(data)
            n_bytes += len(held[-1])
            if n_bytes >= SHARD:
                shards.append(held)
                progress.update(n_bytes)
                held, n_bytes = [], 0
                if source.position is not None:
                    shards.finish(shards=len(shards.rows), position=source.position())
        shards.append(held)
    return np.array(sizes, np.int64), bytes(digests)


def _resumed(source: Source, shards: Shards, sizes: array, digests: bytearray) -> Iterable[str]:
    """The documents that are not in `shards` yet; those that are there go into `sizes` and
    `digests`."""
    about = shards.about
    shards.rows = shards.rows[: about.get("shards", 0)]
    if source.position is None or not shards.rows or shards.damaged():
        shards.remove()
        return source.documents()
    with open(shards.bin, "rb") as file:
        while file.tell() < shards.n_bytes:
            data = file.read(int.from_bytes(file.read(PREFIX), "little"))
            sizes.append(len(data))
            digests += _short_hash(data)
    return source.documents(about["position"])


def _short_hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def _first_ones(digests: bytes) -> np.ndarray:
    """Whether each document is the first one with its hash: bool [N]."""
    halves_Nx2 = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order_N = np.lexsort((halves_Nx2[:, 1], halves_Nx2[:, 0]))  # stable
    sorted_Nx2 = halves_Nx2[order_N]
    first_N = np.ones(len(order_N), bool)
    first_N[order_N[1:]] = (sorted_Nx2[1:] != sorted_Nx2[:-1]).any(axis=1)
    return first_N


def _sha256_of_file(path: Path, starts_N: np.ndarray, sizes_N: np.ndarray) -> str:
    """Corpus.sha256 of documents that lie in a file. What is contiguous is read at once."""
    begins_N, ends_N = starts_N - PREFIX, starts_N + sizes_N
    first = np.flatnonzero(np.append(True, begins_N[1:] != ends_N[:-1]))
    last = np.append(first[1:], len(begins_N)) - 1
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for begin, end in zip(begins_N[first].tolist(), ends_N[last].tolist(), strict=True):
            for block in read(file.fileno(), begin, end - begin):
                digest.update(block)
    return digest.hexdigest()


def _keep(shards: Shards, stem: Path, starts_N: np.ndarray, sizes_N: np.ndarray) -> None:
    """Give what was read the name of its content."""
    index = np.stack([starts_N, sizes_N])
    write_atomic(stem.with_suffix(".npy"), lambda file: np.save(file, index))
    kept = Shards(stem)
    os.replace(shards.bin, kept.bin)
    kept.rows = shards.rows
    kept.finish(documents=hashlib.sha256(index.tobytes()).hexdigest())
