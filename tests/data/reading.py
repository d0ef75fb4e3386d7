"""A corpus with its documents in memory, read through a cache of its own."""

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fdp.data.text import load_corpus


@dataclass(frozen=True)
class ReadCorpus:
    """A Corpus and its documents."""

    name: str
    documents: tuple[str, ...]
    licence: str
    sha256: str
    notes: tuple[str, ...]


def documents_sha256(documents: Iterable[str]) -> str:
    """Hex digest of the documents and of their boundaries."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def read_corpus(source: str) -> ReadCorpus:
    """All of a source."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = load_corpus(source, Path(folder))
        documents = tuple(corpus.documents())
        return ReadCorpus(corpus.name, documents, corpus.licence, corpus.sha256, corpus.notes)
