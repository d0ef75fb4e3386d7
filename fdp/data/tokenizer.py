"""Tokenizers whose ids suit both autoregressive and masked-diffusion models.

Text ids are 0 … eos_id-1. eos_id = n_data-1 begins and ends documents; mask_id = n_data is
reserved. `encode` returns text ids only, so a corpus that contains `<|endoftext|>` or the mask as
text cannot produce their ids."""

import hashlib
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from fdp.config import closest
from fdp.files import write_atomic
from fdp.keys import UserError

KINDS = ("byte", "bpe")
EOS_TEXT = "<|endoftext|>"
MASK_TEXT = "▁"
MIN_BPE_VOCAB = 256 + 2  # every byte, eos, mask

# BPE merges within words, runs of letters, of digits, of spaces or of signs, and a merge costs the
# square of a word's length. DNA and the like are one word: pieces of this many bytes take no longer
# than prose. Words of natural languages are never so long.
WORD_BYTES = 1024

PIECE = 1 << 20  # characters of a longer document that the tokenizer takes at once
BREAK = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")  # no word of byte-level BPE lies across


class Tokenizer:
    """Map between text and ids."""

    def __init__(
        self,
        n_text: int,
        encode_batch: Callable[[Sequence[str]], list[np.ndarray]],
        decode_text: Callable[[Sequence[int]], str],
        fingerprint: str,
        notes: tuple[str, ...] = (),
    ):
        """`n_text`: number of text ids. `decode_text` reads a run of them. `fingerprint` identifies
        the map, for caches of its output. `notes` are lines for the banner."""
        self.n_data = n_text + 1
        self.eos_id = self.n_data - 1
        self.mask_id = self.n_data
        self.vocab_size = self.n_data + 1
        self.fingerprint = fingerprint
        self.notes = notes
        self.encode_batch = encode_batch
        self._decode_text = decode_text

    def encode(self, text: str) -> np.ndarray:
        """Text to int32 ids [n_tokens], without eos. decode(encode(text)) == text for all valid
        Unicode, but for pretrained tokenizers that lose text.

        Raises UnicodeEncodeError for a lone surrogate.
        """
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids to text; eos reads `<|endoftext|>`, the mask `▁`, bytes that are no UTF-8 the
        replacement character.

        Raises ValueError for an id outside [0, vocab_size).
        """
        flat = np.asarray(ids, dtype=np.int64).reshape(-1).tolist()
        wrong = [i for i in flat if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(
                f"token id {wrong[0]} is outside [0, {self.vocab_size}): mask the padded logits "
                "first"
            )
        of = {self.eos_id: EOS_TEXT, self.mask_id: MASK_TEXT}
        runs = itertools.groupby(flat, lambda i: i >= self.eos_id)
        parts = ([of[i] for i in run] if own else [self._decode_text([*run])] for own, run in runs)
        return "".join(itertools.chain.from_iterable(parts))


def decoder(token_bytes: Sequence[bytes]) -> Callable[[Sequence[int]], str]:
    """Reads ids that stand for these bytes."""
    return lambda run: b"".join(token_bytes[i] for i in run).decode("utf-8", "replace")


def check_rows(ids: int, rows: int) -> None:
    """Raises UserError where the embedding has fewer rows than there are ids."""
    if ids > rows:
        raise UserError(
            f"model.vocab = {rows} embedding rows cannot hold {ids} token ids "
            f"(mask included): set model.vocab={-(-ids // 8) * 8}"
        )


def is_path(kind: str) -> bool:
    """Whether data.tokenizer names a file: see fdp.data.pretrained."""
    return kind.endswith(".json")


def build_tokenizer(
    kind: str, vocab: int, documents: Callable[[], Sequence[str]], sha256: str, cache_dir: Path
) -> Tokenizer:
    """Byte tokenizer (257 data ids, `vocab` unused) or byte-level BPE trained on `documents`, which
    is called only where it has to be.

    `vocab` counts every id, eos and mask included; with too few documents for that many merges it
    becomes smaller. `sha256` identifies `documents`; with `vocab` and the
    library version it is the key of the cache. Raises ValueError for an unknown kind or a vocab
    below 258."""
    if kind == "byte":
        return Tokenizer(256, _encode_bytes, decoder([bytes([b]) for b in range(256)]), "byte")
    if kind != "bpe":
        raise ValueError(f"data.tokenizer={kind!r} is unknown: {closest(kind, KINDS)}")
    if vocab < MIN_BPE_VOCAB:
        raise ValueError(
            f"data.vocab={vocab} is below {MIN_BPE_VOCAB} = 256 bytes + end of text + mask: "
            f"set data.vocab={MIN_BPE_VOCAB} or more, or data.tokenizer=byte"
        )
    identity = f"{sha256} {vocab} {version('tokenizers')}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"bpe-{vocab}-{key}.json"
    if path.exists():
        try:
            return _bpe_from_json(path.read_text(encoding="utf-8"), vocab)
        except Exception as error:  # the Rust parser raises bare Exception
            warnings.warn(
                f"rebuilding the unreadable tokenizer cache {path}: {error}", stacklevel=2
            )
    text = _train_bpe(documents(), vocab)
    write_cache(path, lambda file: file.write(text.encode()))
    return _bpe_from_json(text, vocab)


def write_cache(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """`write_atomic` in a folder that is made if needed; a full or read-only disk only gives a
    warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, write)
    except OSError as error:
        warnings.warn(f"going on without the cache file {path}: {error}", stacklevel=2)


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of about PIECE characters, mostly one. Byte-level BPE gives the tokens of
    the whole, but where a piece has neither a space nor a line end inside."""
    start = 0
    while len(text) - start > PIECE:
        breaks = BREAK.finditer(text, start + PIECE // 2, start + PIECE)
        end = next((found.end() for found in breaks), start + PIECE)
        yield text[start:end]
        start = end
    yield text[start:]


def _encode_bytes(texts: Sequence[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _pieces() -> pre_tokenizers.PreTokenizer:
    """Words, those of more than WORD_BYTES in pieces. A character stands for a byte here."""
    cut = pre_tokenizers.Split(tokenizers.Regex(f".{{{WORD_BYTES}}}"), "isolated")
    return pre_tokenizers.Sequence([_byte_level(), cut])


def _has_long_word(document: str) -> bool:
    # A character is at most 4 bytes, so a run of fewer characters holds no long word.
    least = WORD_BYTES // 4
    runs = [run for run in document.split() if len(run) >= least]
    runs += re.findall(rf"\s{{{least},}}", document)
    words = (word for run in runs for word, _ in _byte_level().pre_tokenize_str(run))
    return any(len(word) > WORD_BYTES for word in words)


def _train_bpe(documents: Sequence[str], vocab: int) -> str:
    """JSON of a byte-level BPE with at most `vocab` - 2 ids: text cannot produce eos and mask."""
    long_words = any(_has_long_word(piece) for text in documents for piece in pieces(text))
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = _pieces() if long_words else _byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((piece for text in documents for piece in pieces(text)), trainer)
    return bpe.to_str()


def _bpe_from_json(text: str, vocab: int) -> Tokenizer:
    bpe = tokenizers.Tokenizer.from_str(text)
    ids = bpe.get_vocab()
    if sorted(ids.values()) != list(range(len(ids))) or not 256 <= len(ids) <= vocab - 2:
        raise ValueError(f"{len(ids)} tokens are not a vocabulary of at most {vocab - 2}")
    byte_of = _byte_of_char()
    token_bytes = [
        bytes(byte_of[char] for char in token) for token in sorted(ids, key=ids.__getitem__)
    ]
    if set(byte_of) - set(ids):
        raise ValueError("some single bytes have no token")

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = bpe.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                # a lone surrogate: UnicodeEncodeError says where, the Rust error does not
                text.encode()
            raise
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    cut = isinstance(bpe.pre_tokenizer, pre_tokenizers.Sequence)
    notes = (f"words of over {WORD_BYTES} bytes are cut for the tokenizer",) * cut
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return Tokenizer(len(ids), encode_batch, decoder(token_bytes), fingerprint, notes)


def _byte_of_char() -> dict[str, int]:
    """The byte behind each of the 256 printable characters of byte-level BPE (GPT-2's table).

    Printable Latin-1 characters stand for themselves, the other bytes in order for the characters
    from U+0100 on."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in itself]
    return {chr(b): b for b in itself} | {chr(0x100 + i): b for i, b in enumerate(others)}
