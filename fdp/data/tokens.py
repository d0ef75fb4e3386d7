"""Tokens of documents in a file of the cache: made once, read from there by every run.

The stream is eos, document, eos, document, …, eos: every document has an eos before it (as its
start) and one behind it. A token takes 2 bytes, with more than 65,536 ids 4.

Legend: T tokens."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fdp.data.shards import DamagedShards, Shards, check_room, locked, opened, progress_bar, read
from fdp.data.text import Documents
from fdp.data.tokenizer import Tokenizer, pieces

SHARD = 16 << 20  # bytes of text of a shard: what a killed run loses at most
CALL = 1 << 20  # characters tokenised at once; the tokenizer takes about 100 bytes for each


class TokenFile:
    """The tokens of a stream, in a file. A slice is read when it is asked for."""

    def __init__(self, path: Path, n_bytes: int, dtype: str):
        """`n_bytes`: those of the tokens. Raises OSError where the file cannot be read."""
        self.dtype = np.dtype(dtype)
        self._n = n_bytes // self.dtype.itemsize
        self._file = opened(self, path)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, at: slice) -> np.ndarray:
        """Tokens of a slice without a step, in the type of the file."""
        first, last, _ = at.indices(self._n)
        width = self.dtype.itemsize
        parts = read(self._file, first * width, (last - first) * width)
        return np.frombuffer(b"".join(parts), self.dtype)


def token_file(
    documents: Callable[[], Documents], name: str, tokenizer: Tokenizer, folder: Path
) -> TokenFile:
    """The token stream of `documents`, from its file in `folder`, which is made where it is not
    there, gone on with where it is not whole, and mended where it is damaged.

    `name` identifies the documents; they are called for only where tokens are made.
    Raises OSError for a disk that is full, DamagedShards where the documents cannot be read."""
    key = hashlib.sha256(f"{name} {tokenizer.fingerprint} {SHARD}".encode()).hexdigest()
    stem = folder / f"tokens-{key[:16]}"
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    with locked(stem):
        shards = Shards(stem)
        if bad := shards.damaged():
            _mend(shards, bad, documents(), tokenizer, dtype)
        if not shards.about:
            _make(shards, documents(), tokenizer, dtype)
        return TokenFile(shards.bin, shards.n_bytes, dtype)


def _mend(
    shards: Shards, bad: list[int], documents: Documents, tokenizer: Tokenizer, dtype: str
) -> None:
    warnings.warn(
        f"making {len(bad)} of {len(shards.rows)} shards of {shards.bin} again: they are damaged",
        stacklevel=3,
    )
    ranges = _ranges(documents)
    try:
        for i in bad:
            shards.mend(i, _tokens(documents, ranges[i], tokenizer, dtype))
    except (DamagedShards, IndexError):  # an index of something else
        shards.remove()


def _make(shards: Shards, documents: Documents, tokenizer: Tokenizer, dtype: str) -> None:
    """Write the shards that are not there."""
    ranges = _ranges(documents)
    sizes = [int(documents.sizes[r.start : r.stop].sum()) for r in ranges]
    first = len(shards.rows)
    with progress_bar("tokenise", sum(sizes), sum(sizes[:first])) as progress:
        for i, documents_of_shard in enumerate(ranges[first:], first):
            if i == max(first, 1):  # the first shard tells how many tokens there are
                _check_room(shards, sum(sizes[:i]), sum(sizes[i:]))
            shards.append(_tokens(documents, documents_of_shard, tokenizer, dtype))
            progress.update(sizes[i])
    shards.finish(dtype=dtype)


def _check_room(shards: Shards, done: int, left: int) -> None:
    per_byte = shards.n_bytes / max(done, 1)
    equation = f"{left:,} bytes of text · {per_byte:.2f}"
    check_room(shards.bin.parent, int(left * per_byte), "tokens", equation)


def _ranges(documents: Documents) -> list[range]:
    """Documents of each shard: a function of their sizes alone."""
    ends = np.cumsum(documents.sizes)
    shard_of = (ends - documents.sizes) // SHARD
    first = np.flatnonzero(np.diff(shard_of, prepend=-1)).tolist()
    return [range(a, b) for a, b in zip(first, [*first[1:], len(ends)], strict=True)]


def _tokens(
    documents: Documents, numbers: range, tokenizer: Tokenizer, dtype: str
) -> Iterator[bytes]:
    """Bytes of the tokens of a shard: the first one begins with eos."""
    eos = np.array([tokenizer.eos_id], dtype)
    if numbers.start == 0:
        yield eos.tobytes()
    # One thread makes arrays, which holds the interpreter lock, while another is in the tokenizer,
    # which does not, and has threads of its own.
    with ThreadPoolExecutor(2) as pool:

        def encoded(call: list[tuple[str, bool]]) -> bytes:
            ids = tokenizer.encode_batch([text for text, _ in call])
            parts = [
                [one, eos] if ends else [one] for one, (_, ends) in zip(ids, call, strict=True)
            ]
            return np.concatenate([one for part in parts for one in part]).astype(dtype).tobytes()

        ahead = []
        for call in _calls(documents[i] for i in numbers):
            ahead.append(pool.submit(encoded, call))
            if len(ahead) > 2:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()


def _calls(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents, each with whether its document ends there, for one call each."""
    call: list[tuple[str, bool]] = []
    n_chars = 0
    for text in texts:
        cut = list(pieces(text))
        for i, piece in enumerate(cut, 1):
            call.append((piece, i == len(cut)))
            n_chars += len(piece)
            if n_chars >= CALL:
                yield call
                call, n_chars = [], 0
    if call:
        yield call
