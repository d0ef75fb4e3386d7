"""Index-addressed batches: the batch of a step is a pure function of (seed, step).

A batch is a dict of arrays whose dims have names (`Data.dims`): tokens with document segments or
loss weights, images with labels, pairs. `Examples` are one split of the data, addressed by index.

Legend: B batch size, L sequence length (data.seq_len), N windows, T tokens."""

import functools
import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fdp.config import PACKINGS, closest
from fdp.data.pretrained import pretrained
from fdp.data.shards import DamagedShards, temporary, usable
from fdp.data.text import Corpus, Documents, load_corpus, n_validation, split_documents
from fdp.data.tokenizer import Tokenizer, build_tokenizer, check_rows, is_path
from fdp.data.tokens import TokenFile, token_file
from fdp.keys import INT32

if TYPE_CHECKING:  # jax reads its environment when imported, which the caller may still have to set
    import jax

# A larger corpus gives about so much to the training of BPE, evenly spread: the counts of words,
# which lie in memory, grow with the text, and more of it changes rare merges only.
LEARN_BYTES = 64 << 20

DIM_NAMES = ("batch", "sequence")

Dims = tuple[str | None, ...]  # "batch": over (dp, ep); "sequence": over cp; None: replicated
Batch = dict[str, np.ndarray]


class Examples(Protocol):
    """Examples of one split, addressed by index."""

    @property
    def what(self) -> str:
        """Name of the split in errors: "training split of the corpus"."""
        ...

    @property
    def fix(self) -> str:
        """Remedy in errors when there are too few: "use a larger corpus"."""
        ...

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def take(self, indices_B: Sequence[int]) -> Batch:
        """A copy of the examples at these indices; the leading dim of every field is the batch."""
        ...


class Arrays:
    """Examples held in memory: the leading dim of every field is the number of examples."""

    def __init__(self, fields: Batch, what: str, fix: str):
        """Raises ValueError for fields of different lengths."""
        lengths = {name: len(field) for name, field in fields.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"fields of the {what} must be equally long: they have {lengths}")
        self.what = what
        self.fix = fix
        self._fields = fields
        self._n = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._n

    def take(self, indices_B: Sequence[int]) -> Batch:
        """The examples at these indices, a copy."""
        at_B = np.asarray(indices_B, dtype=np.int64)
        return {name: field[at_B] for name, field in self._fields.items()}


class Windows:
    """Non-overlapping windows of one token stream; a tail that fills no window is left out.

    Fields: "tokens", int32 [N, L]; with `eos_id` also "segments", int32 [N, L]: the number of the
    document within the window, from 0.

    An eos token belongs to the document that it ends, so segments[i] counts the eos tokens among
    tokens[:i]. Consider a model whose input i is token i - 1, and whose position i attends to
    positions of its own segment. It reads the eos before a document as its start token. It predicts
    every token of the document, and its eos, from that document alone."""

    # Not grain's packers: they are iterators with state, no function of the index; the ones that do
    # not split documents pad, and the one that does yields just these windows.

    def __init__(
        self,
        tokens_T: np.ndarray | TokenFile,
        seq_len: int,
        what: str = "corpus",
        fix: str = "use a larger corpus",
        eos_id: int | None = None,
    ):
        """`what` and `fix` name the stream and its remedy in errors. Raises ValueError for a stream
        shorter than one window."""
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
        self._eos_id = eos_id
        self._tokens_T = tokens_T
        self._n = n

    def __len__(self) -> int:
        return self._n

    def take(self, indices_B: Sequence[int]) -> Batch:
        """The windows at these indices, a copy."""
        starts_B = [int(i) * self.seq_len for i in indices_B]
        windows = [self._tokens_T[start : start + self.seq_len] for start in starts_B]
        tokens_BxL = np.stack(windows).astype(np.int32)
        if self._eos_id is None:
            return {"tokens": tokens_BxL}
        segments_BxL = np.zeros_like(tokens_BxL)
        ends_BxL = tokens_BxL[:, :-1] == self._eos_id
        np.cumsum(ends_BxL, axis=1, dtype=np.int32, out=segments_BxL[:, 1:])
        return {"tokens": tokens_BxL, "segments": segments_BxL}


@dataclass(frozen=True)
class Data:
    """What an experiment trains on: both splits, the dims of a batch, and what a report says of the
    data.

    `dims` names the dims of exactly the fields that `take` returns, "batch" first. Raises
    ValueError where it does not, for 64-bit fields, and where the splits differ in shape or type.
    """

    name: str
    sha256: str  # of all examples
    licence: str
    tokenizer: Tokenizer | None  # None for what is not text
    train: Examples
    val: Examples
    dims: Mapping[str, Dims]  # {"tokens": ("batch", "sequence")}, {"label": ("batch",)}
    notes: tuple[str, ...] = ()  # what was read, left out or cut, for the banner
    awaits: tuple[str, ...] = ()  # arms that make the examples; until then only shapes count

    def __post_init__(self) -> None:
        first, other = _first(self.train), _first(self.val)
        _check_dims(first, self.dims, self.train.what)
        for name in {**first, **other}:
            shapes = [_describe(fields.get(name)) for fields in (first, other)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{name!r} is {shapes[0]} in the {self.train.what} and {shapes[1]} in the "
                    f"{self.val.what}: give both splits the same fields"
                )

    def example(self) -> "dict[str, jax.ShapeDtypeStruct]":
        """Shapes and types of a batch of one."""
        import jax  # here, for the reason given above

        return {
            name: jax.ShapeDtypeStruct(field.shape, field.dtype)
            for name, field in _first(self.train).items()
        }

    @property
    def seq_len(self) -> int:
        """Length of "tokens"; 0 if there are none."""
        if "tokens" not in self.dims:
            return 0
        return _first(self.train)["tokens"].shape[-1]


@dataclass(frozen=True)
class Ids:
    """What a program must know of a tokenizer: it has `vocab_size` ids. The last one is the mask,
    the one before it end-of-text."""

    vocab_size: int

    @property
    def n_data(self) -> int:
        """Number of ids that data may hold."""
        return self.vocab_size - 1

    @property
    def eos_id(self) -> int:
        """End-of-text."""
        return self.vocab_size - 2


def blank(seq_len: int, vocab: int, packing: str = "stream") -> Data:
    """One sequence of zeros in place of a corpus, which suffices to build and compile a program."""
    fields = ("tokens", "segments") if packing == "documents" else ("tokens",)
    zeros = {name: np.zeros((1, seq_len), np.int32) for name in fields}
    split = Arrays(zeros, "blank sequence", "name a corpus")
    ids: Any = Ids(vocab)
    dims = dict.fromkeys(fields, ("batch", "sequence"))
    return Data("blank", "", "none", ids, split, split, dims)


def batch(examples: Examples, step: int, batch_size: int, seed: int) -> Batch:
    """Training batch of `step`; the leading dim of every field is B.

    Steps read a sequence of permutations, one per epoch, so every example occurs once per epoch; a
    batch may extend into the next epoch. The order depends only on the number of examples and the
    seed. Raises ValueError when an epoch is shorter than a batch."""
    _check_batch(examples, batch_size)
    if step < 0:
        raise ValueError(f"step {step} must be at least 0")
    order = _order(len(examples), seed)
    return examples.take([order[i] for i in range(step * batch_size, (step + 1) * batch_size)])


def eval_batches(examples: Examples, batch_size: int, max_batches: int) -> Iterator[Batch]:
    """The first `max_batches` full batches in order, or all of them if there are fewer."""
    _check_batch(examples, batch_size)
    if max_batches < 1:
        raise ValueError(f"eval.batches={max_batches} must be at least 1")
    n = min(max_batches, len(examples) // batch_size)
    return (examples.take(range(i * batch_size, (i + 1) * batch_size)) for i in range(n))


class Prefetcher:
    """Computes `place(batch_fn(step))` for successive steps on one background thread, at most
    `depth` steps ahead.

    Use it as a context manager and iterator. The error of a step is raised where that step is
    requested, and ends the iteration. Leaving the context only waits for the step in progress."""

    def __init__(
        self,
        batch_fn: Callable[[int], Any],
        place: Callable[[Any], Any] = lambda x: x,
        start: int = 0,
        depth: int = 2,
    ):
        """`place` moves a batch to the devices, as jax.device_put does. `start` is the first
        step."""
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
        """Drop queued steps and join the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = None
        self._ahead.clear()

    def _submit(self) -> None:
        assert self._thread is not None
        self._ahead.append(self._thread.submit(self._compute, self._step))
        self._step += 1


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/fdp`, by default `~/.cache/fdp`. A user without a home, as in a container,
    gets a temporary folder, which is gone at the end of the process."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fdp"
    except RuntimeError:
        return temporary("this user has no home folder")


def load_text(
    source: str,
    tokenizer_kind: str,
    vocab: int,
    seq_len: int,
    val_fraction: float,
    seed: int,
    cache_dir: Path | str | None = None,
    packing: str = "stream",
    rows: int = INT32,
) -> Data:
    """Corpus → split by document → tokenizer → tokens in a file → windows of `seq_len` tokens.

    `tokenizer_kind` is "byte", "bpe" (learnt from the training side) or the path of a
    tokenizer.json. `seed` is that of the split. Text, tokenizer and tokens are kept under
    `cache_dir` (None: default_cache_dir()). `packing` "stream" gives tokens only, so attention
    crosses documents; "documents" gives the same windows with the segments of `Windows`. `rows`:
    those of the model's embedding, which must hold every id; else UserError. Raises ValueError for
    another packing, and the errors of pretrained, load_corpus, split_documents, build_tokenizer,
    token_file and Windows."""
    if packing not in PACKINGS:
        raise ValueError(f"data.packing={packing!r} is unknown: {closest(packing, PACKINGS)}")
    folder = usable(default_cache_dir() if cache_dir is None else Path(cache_dir))
    # Whatever can be refused is, before a corpus is read and tokenised.
    given = pretrained(tokenizer_kind) if is_path(tokenizer_kind) else None
    if given is not None:
        check_rows(given.vocab_size, rows)

    def data(again: bool) -> Data:
        corpus = load_corpus(source, folder, again)
        split = _Split(corpus, val_fraction, seed)
        tokenizer = given or _learnt(split, tokenizer_kind, vocab)
        check_rows(tokenizer.vocab_size, rows)
        return _text_data(split, tokenizer, seq_len, packing)

    try:
        return data(again=False)
    except DamagedShards as error:
        warnings.warn(f"reading {source} again: {error}", stacklevel=2)
        return data(again=True)


class _Split:
    """The two sides of a corpus. Nothing is read before their documents are asked for."""

    def __init__(self, corpus: Corpus, val_fraction: float, seed: int):
        self.corpus, self._of = corpus, (val_fraction, seed)
        self.name = f"{corpus.sha256} {seed} {n_validation(corpus, val_fraction)}"

    def side(self, i: int) -> Documents:
        """Training documents (0) or validation documents (1)."""
        return self.sides[i]

    @functools.cached_property
    def sides(self) -> tuple[Documents, Documents]:
        """Both."""
        documents = self.corpus.documents()
        train_N, val_N = split_documents(self.corpus, *self._of)
        return documents[train_N], documents[val_N]


def _learnt(split: _Split, kind: str, vocab: int) -> Tokenizer:
    share = min(LEARN_BYTES / split.corpus.n_bytes, 1.0)
    tokenizer = build_tokenizer(
        kind, vocab, lambda: split.side(0).sample(share), split.name, split.corpus.folder
    )
    if share < 1 and kind == "bpe":
        tokenizer.notes += (f"the tokenizer is learnt from {share:.1%} of the documents",)
    return tokenizer


def _text_data(split: _Split, tokenizer: Tokenizer, seq_len: int, packing: str) -> Data:
    corpus, eos_id = split.corpus, tokenizer.eos_id if packing == "documents" else None
    train_T, val_T = (
        token_file(
            functools.partial(split.side, i), f"{split.name} {side}", tokenizer, corpus.folder
        )
        for i, side in enumerate(("train", "val"))
    )
    fields = ("tokens", "segments") if packing == "documents" else ("tokens",)
    more, more_val = "use a larger corpus", "raise data.val_fraction"
    return Data(
        name=corpus.name,
        sha256=corpus.sha256,
        licence=corpus.licence,
        tokenizer=tokenizer,
        train=Windows(train_T, seq_len, "training split of the corpus", more, eos_id),
        val=Windows(val_T, seq_len, "validation split of the corpus", more_val, eos_id),
        dims=dict.fromkeys(fields, ("batch", "sequence")),
        notes=(*corpus.notes, *tokenizer.notes),
    )


@functools.lru_cache(maxsize=16)
def _order(n: int, seed: int) -> Any:
    """Endless shuffled index: order[i] is the example at position i, reshuffled every `n`
    positions."""
    import grain  # here, because it imports jax

    # grain shuffles epoch e with seed + e: plain seeds 0 and 1 would read the same orders, one
    # epoch apart.
    spread = int.from_bytes(hashlib.sha256(f"order {seed}".encode()).digest()[:4], "little")
    return grain.MapDataset.range(n).shuffle(seed=spread).repeat()


def _check_batch(examples: Examples, batch_size: int) -> None:
    n = len(examples)
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} must be at least 1")
    if n >= batch_size:
        return
    if isinstance(examples, Windows):  # shorter windows are more windows
        fits = max(examples.n_tokens // batch_size, 1)
        raise ValueError(
            f"a batch of {batch_size} sequences of {examples.seq_len} tokens is longer than the "
            f"{examples.what} ({examples.n_tokens:,} tokens, {n} sequences): one of "
            f"train.batch ≤ {n}, data.seq_len ≤ {2 ** (fits.bit_length() - 1)}, or {examples.fix}"
        )
    raise ValueError(
        f"a batch of {batch_size} examples is larger than the {examples.what} ({n} examples): "
        f"set train.batch ≤ {n}, or {examples.fix}"
    )


def _first(examples: Examples) -> Batch:
    if len(examples) == 0:
        raise ValueError(f"the {examples.what} holds no examples: {examples.fix}")
    return examples.take([0])


def _describe(field: np.ndarray | None) -> str:
    return "absent" if field is None else f"{field.dtype} {['B', *field.shape[1:]]}"


def _check_dims(fields: Batch, dims: Mapping[str, Dims], what: str) -> None:
    if fields.keys() != dims.keys():
        raise ValueError(
            f"the {what} has the fields {', '.join(sorted(fields))} but dims names "
            f"{', '.join(sorted(dims))}: name the dims of exactly the fields that take() returns"
        )
    for name, named in dims.items():
        shape, dtype = fields[name].shape, fields[name].dtype
        if dtype.kind in "fiu" and dtype.itemsize > 4:
            raise ValueError(
                f"{name!r} of the {what} is {dtype}, but the devices compute in 32 bits: return it "
                f"as {dtype.name.replace('64', '32')}"
            )
        if len(named) != len(shape):
            raise ValueError(
                f"{name!r} has {len(shape)} dims, {list(shape)} for a batch of 1, but "
                f"dims[{name!r}] = {named} names {len(named)}: name each one, None where it has no "
                "name"
            )
        for dim in named:
            if dim is not None and dim not in DIM_NAMES:
                raise ValueError(
                    f"dims[{name!r}] = {named} names {dim!r}: {closest(dim, DIM_NAMES)}"
                )
        if named[:1] != ("batch",) or "batch" in named[1:] or shape[0] != 1:
            raise ValueError(
                f"dims[{name!r}] = {named} with shape {list(shape)} for a batch of 1: let the "
                'first dim, and no other, be "batch"'
            )
