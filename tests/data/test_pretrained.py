"""Tokenizers from a file: what text becomes, the two ids of ours, and what bad files say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from fdp.config import UserError, base
from fdp.data.batches import load_text
from fdp.data.pretrained import pretrained
from fdp.data.tokenizer import build_tokenizer
from fdp.experiment import load_data
from fdp.workdir import record_of

pytestmark = pytest.mark.fast

TEXT = ("the tide <s> comes in", "boats go out\t at seven, naïve 港 🏴")


@pytest.fixture
def published(tmp_path) -> str:
    """Byte-level BPE with what published files have: a start token that is put in front, special
    tokens before the others, truncation and padding."""
    build_tokenizer("bpe", 300, lambda: TEXT * 9, "sha", tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    found = tokenizers.Tokenizer.from_file(str(path))
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(["<s>", "<|endoftext|>"])
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", found.token_to_id("<s>"))]
    )
    found.enable_truncation(3)
    found.enable_padding(length=50)
    found.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_text_is_neither_cut_nor_padded_and_gives_no_special_tokens(published):
    found = pretrained(published)
    raw = tokenizers.Tokenizer.from_file(published)
    special = {raw.token_to_id(token) for token in ("<s>", "<|endoftext|>")}
    for text, ids in zip(TEXT, found.encode_batch(TEXT), strict=True):
        assert ids.dtype == np.int32 and len(ids) > 3
        assert not special & set(ids.tolist())
        assert found.decode(ids) == text
    assert found.notes == ()


def test_end_of_text_and_mask_lie_behind_the_vocabulary(published):
    found, n = pretrained(published), tokenizers.Tokenizer.from_file(published).get_vocab_size()
    assert (found.eos_id, found.n_data, found.mask_id, found.vocab_size) == (n, n + 1, n + 1, n + 2)
    ids = [*found.encode("tide"), found.mask_id, *found.encode("boats"), found.eos_id, 0]
    assert found.decode(ids) == "tide▁boats<|endoftext|>!"


def test_a_corpus_is_tokenised_by_the_file(published, tmp_path, monkeypatch):
    source = tmp_path / "text.txt"
    source.write_text("\f".join(f"{i} {TEXT[1]}" for i in range(9)))
    data = load_text(str(source), published, 0, 4, 0.2, 0, tmp_path / "more")
    tokens = data.train.take(range(len(data.train)))["tokens"]
    assert TEXT[1] in data.tokenizer.decode(tokens) and tokens[0, 0] == data.tokenizer.eos_id


def test_too_many_ids_are_refused_before_a_corpus_is_read(published, tmp_path, monkeypatch):
    monkeypatch.setattr("fdp.data.batches.load_corpus", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    c = base()
    c.data.tokenizer, c.model.vocab = published, 296
    n = pretrained(published).vocab_size
    with pytest.raises(
        UserError,
        match=rf"model\.vocab = 296 embedding rows cannot hold {n} token ids \(mask included\): "
        rf"set model\.vocab={-(-n // 8) * 8}",
    ):
        load_data(c)
    c.data.source = "blank"
    assert load_data(c).tokenizer.vocab_size == n


@pytest.mark.parametrize("other", [0, 1])
def test_hosts_with_another_text_or_tokenizer_are_refused(published, tmp_path, monkeypatch, other):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("\f".join(f"{i} {TEXT[1]}" for i in range(9)))
    c = base()
    c.data.update(source=str(tmp_path / "text.txt"), tokenizer=published, seq_len=4)

    def main(f):
        found = f()
        found[other] = "0" * 64
        return found

    monkeypatch.setattr("fdp.process.decided", main)
    name = ("source", "tokenizer")[other]
    with pytest.raises(
        UserError, match=rf"data\.{name}=.* sha256 0{{12}} in process 0, and \w{{12}} "
    ):
        load_data(c)


def test_a_workdir_belongs_to_the_tokenizer_too(published):
    """The file may be another one by the next start."""
    c = base()
    c.data.tokenizer = published
    data = SimpleNamespace(sha256="a" * 64, tokenizer=pretrained(published))
    facts = record_of(c, [SimpleNamespace(name="ar", seed=0, data=data)], {}).facts
    assert facts["tokenizer of ar"] == data.tokenizer.fingerprint


def test_words_and_lower_case_lose_text_and_say_so(tmp_path):
    found = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "tide": 1, "the": 7}, "[UNK]"))
    found.normalizer, found.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    found.save(str(tmp_path / "words.json"))
    read = pretrained(str(tmp_path / "words.json"))
    assert read.vocab_size == 7 + 1 + 2, "ids may leave gaps"
    assert read.encode("The tide turns").tolist() == [7, 1, 0]
    (note,) = read.notes
    assert note.startswith("words.json loses text: 'A tab\\tand") and "becomes '[UNK] " in note


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"data\.tokenizer='.*x\.json': no such file \(/.*\): give the path of a tokenizer"),
        (b"", r"data\.tokenizer='.*x\.json' is no tokenizer of the library tokenizers \(EOF"),
        (b"\xff\xfe", r"is no tokenizer of the library tokenizers \('utf-8' codec can't decode"),
        (b'{"topic": ""}', r"is no tokenizer of the library tokenizers \("),
        (json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}).encode(), r"no tokens"),
    ],
)
def test_a_file_that_is_no_tokenizer(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr("fdp.data.batches.load_corpus", None)
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as refused:
        load_text("bible", str(path), 0, 4, 0.2, 0, tmp_path / "cache")
    assert "\n" not in str(refused.value)
