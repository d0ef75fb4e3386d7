"""Index-addressed batches: what a step trains on is a pure function of (seed, step).

Legend: B batch size, L sequence length (data.seq_len), N windows, T tokens.
"""

import functools
import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fdp.data.text import documents_sha256, load_corpus, split_documents
from fdp.data.tokenizer import Tokenizer, build_tokenizer, write_cache

DOCUMENTS_PER_CALL = 1024  # documents tokenised at once: bounds the memory of a large corpus


class Windows:
    """Non-overlapping windows of one token stream; the tail that fills no window is left out."""

    def __init__(
        self,
        tokens_T: np.ndarray,
        seq_len: int,
        what: str = "corpus",
        fix: str = "use a larger corpus",
    ):
        """`what` and `fix` name the stream and its remedy in errors: ValueError when it is shorter
        than one window.
        """
        n_tokens = len(tokens_T)
        if seq_len < 1:
            raise ValueError(f"data.seq_len={seq_len} must be at least 1")
        if n_tokens < seq_len:
            fits = 2 ** max(n_tokens.bit_length() - 1, 0)
            raise ValueError(
                f"sequence length {seq_len} is longer than the {what} ({n_tokens:,} tokens): "
                f"set data.seq_len={fits} or {fix}"
            )
        n = n_tokens // seq_len
        self.what = what
        self.fix = fix
        self.n_tokens = n_tokens
        self.seq_len = seq_len
        self._windows_NxL = np.asarray(tokens_T, dtype=np.int32)[: n * seq_len].reshape(n, seq_len)

    def __len__(self) -> int:
        return len(self._windows_NxL)

    def __getitem__(self, i: int) -> np.ndarray:
        """Window `i`: int32 [L], a copy."""
        return np.array(self._windows_NxL[i])

    def take(self, indices_B: Sequence[int]) -> np.ndarray:
        """Several windows: int32 [B, L], a copy."""
        return self._windows_NxL[np.asarray(indices_B, dtype=np.int64)]


@dataclass(frozen=True)
class TextData:
    """A tokenised corpus with its split, and what a report says of it."""

    name: str
    sha256: str  # of all documents
    licence: str
    tokenizer: Tokenizer
    train: Windows
    val: Windows


def batch(windows: Windows, step: int, batch_size: int, seed: int) -> np.ndarray:
    """Training batch of `step`: int32 [B, L].

    Steps read a sequence of permutations, one an epoch, so every window occurs once an epoch; a
    batch may reach into the next one. Raises ValueError when an epoch is shorter than a batch."""
    _check_batch(windows, batch_size)
    if step < 0:
        raise ValueError(f"step {step} must be at least 0")
    order = _order(len(windows), seed)
    return windows.take([order[i] for i in range(step * batch_size, (step + 1) * batch_size)])


def eval_batches(windows: Windows, batch_size: int, max_batches: int) -> Iterator[np.ndarray]:
    """The first `max_batches` full batches, or as many as there are, in order: int32 [B, L]
    each.
    """
    _check_batch(windows, batch_size)
    if max_batches < 1:
        raise ValueError(f"eval.batches={max_batches} must be at least 1")
    n = min(max_batches, len(windows) // batch_size)
    return (windows.take(range(i * batch_size, (i + 1) * batch_size)) for i in range(n))


class Prefetcher:
    """Computes `place(batch_fn(step))` for successive steps on one background thread, at most
    `depth` ahead.

    Use as a context manager and iterator. An error of a step is raised where that step is asked
    for, and ends it. Leaving the context waits for the step in progress only."""

    def __init__(
        self,
        batch_fn: Callable[[int], Any],
        place: Callable[[Any], Any] = lambda x: x,
        start: int = 0,
        depth: int = 2,
    ):
        """`place` moves a batch to the devices, as jax.device_put does; `start` is the first
        step.
        """
        if depth < 1:
            raise ValueError(f"prefetch depth {depth} must be at least 1")
        self._compute = lambda step: place(batch_fn(step))
        self._step = start
        self._depth = depth
        self._ahead: deque[Future] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Prefetcher":
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fdp-prefetch")
        for _ in range(self._depth):
            self._submit()
        return self

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._thread is None:
            raise RuntimeError("the prefetcher is not running: use it inside its `with` block")
        try:
            ready = self._ahead.popleft().result()
        except (
            StopIteration
        ) as error:  # raised from __next__ it would end the caller's loop without a word
            self.close()
            raise RuntimeError("the batch function raised StopIteration") from error
        except BaseException:
            self.close()
            raise
        # Submitted after the wait, so that no more than `depth` placed batches occupy the devices.
        self._submit()
        return ready

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is queued and join the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = None
        self._ahead.clear()

    def _submit(self) -> None:
        assert self._thread is not None
        self._ahead.append(self._thread.submit(self._compute, self._step))
        self._step += 1


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/fdp`, by default `~/.cache/fdp`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fdp"


def load_text(
    source: str,
    tokenizer_kind: str,
    vocab: int,
    seq_len: int,
    val_fraction: float,
    seed: int,
    cache_dir: Path | str | None = None,
) -> TextData:
    """Corpus → split by document → tokenizer trained on the training side → windows of `seq_len`
    tokens.

    `seed` is that of the split. Tokenizer and tokens are cached under `cache_dir` (None:
    default_cache_dir()). Errors: those of load_corpus, split_documents, build_tokenizer and
    Windows."""
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    corpus = load_corpus(source)
    train_docs, val_docs = split_documents(corpus, val_fraction, seed)
    # The hash of the training side alone identifies corpus, fraction and seed.
    train_sha256 = documents_sha256(train_docs)
    tokenizer = build_tokenizer(tokenizer_kind, vocab, train_docs, train_sha256, folder)
    train_T = _cached_tokens(train_docs, train_sha256, tokenizer, folder)
    val_T = _cached_tokens(val_docs, documents_sha256(val_docs), tokenizer, folder)
    return TextData(
        name=corpus.name,
        sha256=corpus.sha256,
        licence=corpus.licence,
        tokenizer=tokenizer,
        train=Windows(train_T, seq_len, "training split of the corpus"),
        val=Windows(val_T, seq_len, "validation split of the corpus", "raise data.val_fraction"),
    )


@functools.lru_cache(maxsize=16)
def _order(n: int, seed: int) -> Any:
    """Endless shuffled index: order[i] is the window at position i, reshuffled every `n`
    positions.
    """
    import grain  # here, because it imports jax, whose environment the caller may still have to set

    # grain shuffles epoch e with seed + e: plain seeds 0 and 1 would read the same orders, one
    # epoch apart.
    spread = int.from_bytes(hashlib.sha256(f"order {seed}".encode()).digest()[:4], "little")
    return grain.MapDataset.range(n).shuffle(seed=spread).repeat()


def _check_batch(windows: Windows, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} must be at least 1")
    if len(windows) < batch_size:
        fits = max(windows.n_tokens // batch_size, 1)
        raise ValueError(
            f"a batch of {batch_size} sequences of {windows.seq_len} tokens is longer than the "
            f"{windows.what} "
            f"({windows.n_tokens:,} tokens, {len(windows)} sequences): set "
            f"train.batch={len(windows)}, "
            f"data.seq_len={2 ** (fits.bit_length() - 1)} or {windows.fix}"
        )


def _cached_tokens(
    documents: Sequence[str], sha256: str, tokenizer: Tokenizer, folder: Path
) -> np.ndarray:
    """Token stream of `documents`, int32 [T], mapped from its cache file after the first call."""
    key = hashlib.sha256(f"{sha256} {tokenizer.fingerprint}".encode()).hexdigest()[:16]
    path = folder / f"tokens-{key}.npy"
    if path.exists():
        try:
            tokens_T = np.load(path, mmap_mode="r", allow_pickle=False)
            if tokens_T.ndim != 1 or tokens_T.dtype != np.int32:
                raise ValueError(
                    f"expected int32 [T], found {tokens_T.dtype} {list(tokens_T.shape)}"
                )
            return tokens_T
        except (ValueError, OSError, EOFError) as error:
            warnings.warn(f"rebuilding the unreadable token cache {path}: {error}", stacklevel=2)
    tokens_T = _tokenise(documents, tokenizer)
    write_cache(path, lambda file: np.save(file, tokens_T))
    return tokens_T


def _tokenise(documents: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """eos, document, eos, document, …, eos: every document has one before it (as BOS) and one after
    it.
    """
    eos_1 = np.array([tokenizer.eos_id], dtype=np.int32)
    parts = [eos_1]
    for first in range(0, len(documents), DOCUMENTS_PER_CALL):
        for ids in tokenizer.encode_batch(documents[first : first + DOCUMENTS_PER_CALL]):
            parts += [ids, eos_1]
    return np.concatenate(parts)
