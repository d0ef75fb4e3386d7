"""Tokenizers: exact round trips, the id layout, the cache, and what bad input says."""

import errno
import os
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdp.data.tokenizer import Tokenizer, build_tokenizer

pytestmark = pytest.mark.fast

DOCUMENTS = tuple(
    f"The {a} {b} goes to the {a} house, naïve as the {b}."
    for a in ["red", "blue"]
    for b in "abcdef"
)


def never():
    raise AssertionError("what is in the cache needs no documents")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("cache")
    return {
        kind: build_tokenizer(kind, 280, lambda: DOCUMENTS, "sha", folder)
        for kind in ("byte", "bpe")
    }


def assert_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert ((ids >= 0) & (ids < tokenizer.eos_id)).all(), "neither eos nor mask comes out of text"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@given(text=st.text(max_size=200))
def test_round_trip(tokenizers, kind, text):
    assert_round_trip(tokenizers[kind], text)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize(
    "text",
    ["", " ", "\0", "▁[M]<|endoftext|>", "\r\n \t  x", "🏴‍☠️ é e\u0301 漢字", "Ġ Ċ", "The red a"],
)
def test_round_trip_of_awkward_text(tokenizers, kind, text):
    assert_round_trip(tokenizers[kind], text)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_id_layout(tokenizers, kind):
    t = tokenizers[kind]
    assert (t.eos_id, t.mask_id, t.vocab_size) == (t.n_data - 1, t.n_data, t.n_data + 1)
    assert t.vocab_size == {"byte": 258, "bpe": 280}[kind]
    ids = [*t.encode("red"), t.mask_id, *t.encode("house"), t.eos_id]
    assert t.decode(ids) == "red▁house<|endoftext|>"
    assert t.decode(np.array([ids, ids])) == t.decode(ids) * 2


def test_bpe_compresses(tokenizers):
    assert len(tokenizers["bpe"].encode(DOCUMENTS[0])) < len(DOCUMENTS[0]) / 2


def test_batch_equals_single(tokenizers):
    for t in tokenizers.values():
        for ids, text in zip(t.encode_batch(DOCUMENTS), DOCUMENTS, strict=True):
            np.testing.assert_array_equal(ids, t.encode(text))


def test_partial_utf8_decodes_to_the_replacement_character(tokenizers):
    assert tokenizers["byte"].decode(tokenizers["byte"].encode("aé")[:-1]) == "a�"


def test_bpe_is_deterministic_and_cached(tmp_path):
    first = build_tokenizer("bpe", 280, lambda: DOCUMENTS, "sha", tmp_path / "x" / "y")
    other = build_tokenizer("bpe", 280, lambda: DOCUMENTS, "sha", tmp_path / "z")
    files = list((tmp_path / "x" / "y").iterdir())
    assert [f.suffix for f in files] == [".json"], "one file, no scratch left"
    assert files[0].read_bytes() == next((tmp_path / "z").iterdir()).read_bytes()
    cached = build_tokenizer("bpe", 280, never, "sha", tmp_path / "x" / "y")
    assert first.fingerprint == other.fingerprint == cached.fingerprint
    np.testing.assert_array_equal(first.encode(DOCUMENTS[3]), cached.encode(DOCUMENTS[3]))


def test_cache_key_sees_text_and_vocab(tmp_path):
    for sha256, vocab in (("a", 280), ("b", 280), ("a", 279)):
        build_tokenizer("bpe", vocab, lambda: DOCUMENTS, sha256, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["", "{}", "truncated", "fewer"])
def test_corrupt_cache_is_rebuilt_with_a_warning(tmp_path, damage):
    good = build_tokenizer("bpe", 280, lambda: DOCUMENTS, "sha", tmp_path)
    (path,) = tmp_path.iterdir()
    text = path.read_text(encoding="utf-8")
    broken = {
        "truncated": text[: len(text) // 2],
        "fewer": text.replace('"!":0,', "").replace('"!": 0,', ""),
    }
    path.write_text(broken.get(damage, damage), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"rebuilding the unreadable tokenizer cache .*bpe-280"):
        rebuilt = build_tokenizer("bpe", 280, lambda: DOCUMENTS, "sha", tmp_path)
    assert rebuilt.fingerprint == good.fingerprint
    assert path.read_text(encoding="utf-8") == text


def test_full_disk_only_warns(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=r"going on without the cache file .*No space left"):
        t = build_tokenizer("bpe", 280, lambda: DOCUMENTS, "sha", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert_round_trip(t, "still works")


def test_small_corpus_gives_a_smaller_vocabulary(tmp_path):
    t = build_tokenizer("bpe", 5000, lambda: ["tiny text"], "sha", tmp_path)
    assert 258 < t.vocab_size < 300
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the cached file is not mistaken for a damaged one
        assert build_tokenizer("bpe", 5000, never, "sha", tmp_path).vocab_size == t.vocab_size


def test_smallest_vocabulary_is_all_bytes(tmp_path):
    t = build_tokenizer("bpe", 258, lambda: DOCUMENTS, "sha", tmp_path)
    assert t.vocab_size == 258
    assert_round_trip(t, "naïve")


def test_long_words_are_cut_and_no_others(tokenizers, tmp_path):
    rng = np.random.default_rng(0)
    dna = "".join(rng.choice(list("ACGT"), 200_000))  # uncut, this takes about 20 s
    spaces = "a" + " " * 100_000 + "b"
    long = build_tokenizer("bpe", 300, lambda: [*DOCUMENTS, dna, spaces], "sha", tmp_path)
    assert long.notes == ("words of over 1024 bytes are cut for the tokenizer",)
    assert len(long.encode(dna)) < len(dna) / 2
    for text in (dna, spaces, "港" * 1000, DOCUMENTS[0]):
        assert_round_trip(long, text)
    again = build_tokenizer("bpe", 300, lambda: [*DOCUMENTS, dna, spaces], "sha", tmp_path)
    assert again.notes == long.notes and again.fingerprint == long.fingerprint
    for kind in ("bpe", "byte"):
        assert tokenizers[kind].notes == ()
    chinese = build_tokenizer("bpe", 300, lambda: ["港" * 341], "other", tmp_path)
    assert chinese.notes == (), "1,023 bytes"


def test_errors(tokenizers, tmp_path):
    with pytest.raises(
        ValueError, match=r"data\.vocab=257 is below 258 = 256 bytes \+ end of text \+ mask"
    ):
        build_tokenizer("bpe", 257, lambda: DOCUMENTS, "sha", tmp_path)
    with pytest.raises(
        ValueError, match=r"data\.tokenizer='bytes' is unknown: did you mean 'byte'\?"
    ):
        build_tokenizer("bytes", 280, lambda: DOCUMENTS, "sha", tmp_path)
    for t in tokenizers.values():
        for bad in (-1, t.vocab_size):
            with pytest.raises(
                ValueError, match=rf"token id {bad} is outside \[0, {t.vocab_size}\)"
            ):
                t.decode([0, bad])
        with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
            t.encode("a\ud800")
