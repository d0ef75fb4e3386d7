"""Token files: every route gives the same tokens, a killed run goes on, damage is mended, a second
start reads nothing."""

import errno
import gzip
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fdp import process
from fdp.config import UserError, base
from fdp.data import batches, sources, text, tokenizer, tokens
from fdp.data.batches import load_text
from fdp.data.shards import Shards, check_room, locked, size
from fdp.data.tokenizer import build_tokenizer
from fdp.experiment import load_data
from tests.data.reading import documents_sha256

pytestmark = pytest.mark.fast

WORDS = "the tide boats fog ledger harbour naïve 港 42 sea wrote asked".split()  # noqa: SIM905


def documents_of(n: int, n_words: int = 60) -> list[str]:
    rng = random.Random(0)
    return [f"{i}: " + " ".join(rng.choices(WORDS, k=n_words)) for i in range(n)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shards of two or three documents; files of this moment are trusted."""
    monkeypatch.setattr(tokens, "SHARD", 1000)
    monkeypatch.setattr(tokens, "CALL", 300)
    monkeypatch.setattr(text, "SHARD", 5000)
    monkeypatch.setattr(text, "SETTLED", -1)


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": d}) for d in documents_of(60)))
    return path


def read(source: Path, cache: Path, kind: str = "bpe") -> tuple[str, np.ndarray, np.ndarray]:
    """Hash of the corpus, and the tokens of both sides."""
    data = load_text(str(source), kind, 300, 1, 0.1, 0, cache)
    train, val = (w.take(range(len(w)))["tokens"][:, 0] for w in (data.train, data.val))
    return data.sha256, train, val


def assert_same(found, expected) -> None:
    assert found[0] == expected[0]
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_tokens_are_documents_between_ends_of_text(source, tmp_path):
    """The oracle tokenises each document by itself, in memory."""
    documents = documents_of(60)
    sha256, train, val = read(source, tmp_path / "cache")
    assert sha256 == documents_sha256(documents)
    corpus = text.load_corpus(str(source), tmp_path / "cache")
    numbers = text.split_documents(corpus, 0.1, 0)
    sides = [[documents[i] for i in side] for side in numbers]
    bpe = build_tokenizer("bpe", 300, lambda: sides[0], "x", tmp_path / "other")
    for found, side in zip((train, val), sides, strict=True):
        eos = [bpe.eos_id]
        expected = eos + [t for d in side for t in [*bpe.encode(d), *eos]]
        assert found.tolist() == expected
    files = sorted((tmp_path / "cache").glob("tokens-*.json"), key=lambda p: p.stat().st_size)
    assert len(Shards(files[-1]).rows) > 10, "of several shards"


def test_every_route_gives_the_same_tokens(source, tmp_path):
    expected, rows = read(source, tmp_path / "cache"), [{"text": d} for d in documents_of(60)]
    (tmp_path / "txt").mkdir()
    for i, row in enumerate(rows):
        (tmp_path / "txt" / f"{i:03}.txt").write_text(row["text"])
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.json").write_text(json.dumps(rows[:20]))
    lines = "\n".join(map(json.dumps, rows[20:40])).encode()
    (tmp_path / "mixed" / "b.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    for i, row in enumerate(rows[40:]):
        (tmp_path / "mixed" / f"c{i:02}").write_bytes(row["text"].encode("utf-16"))
    for route in ("txt", "mixed"):
        assert_same(read(tmp_path / route, tmp_path / f"cache of {route}"), expected)


def test_a_killed_run_goes_on_behind_the_last_whole_shard(source, tmp_path, monkeypatch):
    expected = read(source, tmp_path / "whole")
    append, done = Shards.append, []

    def killed(shards, parts):
        if shards.bin.name.startswith("tokens"):
            done.append(shards.bin)
            if len(done) == 4:
                parts = iter(
                    [next(parts), *[None]]
                )  # half a shard, then nothing that can be hashed
        append(shards, parts)

    monkeypatch.setattr(Shards, "append", killed)
    with pytest.raises(TypeError):
        read(source, tmp_path / "cache")
    assert len(Shards(done[0]).rows) == 3 and not Shards(done[0]).about
    done.clear()
    done += [Path()] * 5
    monkeypatch.setattr(text, "_read", None)  # nor is the text read again
    assert_same(read(source, tmp_path / "cache"), expected)
    names = {p.name: p.read_bytes() for p in (tmp_path / "whole").glob("tokens-*")}
    assert names == {p.name: p.read_bytes() for p in (tmp_path / "cache").glob("tokens-*")}
    whole = sum(len(Shards(p).rows) for p in (tmp_path / "whole").glob("tokens-*.json"))
    assert len(done) - 5 == whole - 3


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


@pytest.mark.parametrize("damage", [flip, shorten, Path.unlink])
def test_damaged_shards_are_made_again_and_no_others(source, tmp_path, monkeypatch, damage):
    expected = read(source, tmp_path / "cache")
    files = sorted((tmp_path / "cache").glob("tokens-*.bin"), key=lambda p: p.stat().st_size)
    before, n = files[-1].read_bytes(), len(Shards(files[-1]).rows)
    damage(files[-1])
    made, mend = [], Shards.mend
    monkeypatch.setattr(Shards, "mend", lambda s, i, parts: made.append(i) or mend(s, i, parts))
    monkeypatch.setattr(text, "_read", None)
    with pytest.warns(UserWarning, match=rf"making \d+ of {n} shards of .*tokens-.* they are dam"):
        assert_same(read(source, tmp_path / "cache"), expected)
    assert files[-1].read_bytes() == before
    assert len(made) == {flip: 1, shorten: n // 3 + 1, Path.unlink: n}[damage]


@pytest.mark.parametrize("damage", ["text-*.bin", "text-*.npy", "text-*.json"])
def test_a_damaged_text_is_read_again_where_it_is_needed(source, tmp_path, damage):
    expected = read(source, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob(damage)
    flip(path)
    assert_same(read(source, tmp_path / "cache"), expected)
    with pytest.warns(UserWarning, match=r"reading .*corpus\.jsonl again: "):
        load_text(str(source), "byte", 300, 1, 0.1, 0, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["tokens-*.json", "source-*.json"])
def test_a_lost_index_only_costs_time(source, tmp_path, damage):
    expected = read(source, tmp_path / "cache")
    for path in (tmp_path / "cache").glob(damage):
        path.write_text(path.read_text()[:-9])
    assert_same(read(source, tmp_path / "cache"), expected)


def test_shards_of_another_size_are_not_gone_on_with(source, tmp_path, monkeypatch):
    expected = read(source, tmp_path / "cache")
    for path in (tmp_path / "cache").glob("tokens-*.json"):
        shards = Shards(path)
        shards.rows = shards.rows[:2]
        shards.finish()
    monkeypatch.setattr(tokens, "SHARD", 1700)
    assert_same(read(source, tmp_path / "cache"), expected)


def test_bytes_behind_the_last_shard_are_no_tokens(source, tmp_path):
    expected = read(source, tmp_path / "cache")
    for path in (tmp_path / "cache").glob("tokens-*.bin"):
        with open(path, "ab") as file:
            file.write(b"\1\2")
    assert_same(read(source, tmp_path / "cache"), expected)


def test_a_file_system_without_locks_serves(source, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    expected = read(source, tmp_path / "cache")
    monkeypatch.setattr("fcntl.flock", refuse)
    assert_same(read(source, tmp_path / "other"), expected)


def test_a_second_start_reads_nothing(source, tmp_path, monkeypatch):
    expected = read(source, tmp_path / "cache")
    for module, name in ((text, "_read"), (batches, "split_documents"), (text, "Documents")):
        monkeypatch.setattr(module, name, None)
    assert_same(read(source, tmp_path / "cache"), expected)


def test_what_changed_is_read_again(source, tmp_path, monkeypatch):
    first = read(source, tmp_path / "cache")
    stat = source.stat()
    source.write_text(source.read_text().replace("boats", "ships"))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size and time
    assert read(source, tmp_path / "cache")[0] != first[0]
    source.write_text(source.read_text().replace("ships", "boats"))
    monkeypatch.setattr(tokens, "_make", None)
    assert_same(read(source, tmp_path / "cache"), first)


def test_a_file_of_this_moment_is_not_trusted(source, tmp_path, monkeypatch):
    """It may change again without another time of change."""
    monkeypatch.setattr(text, "SETTLED", 2)
    expected = read(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("source-*.json"))
    assert_same(read(source, tmp_path / "cache"), expected)


def test_many_ids_take_four_bytes(source, tmp_path):
    ids = build_tokenizer("byte", 0, lambda: (), "", tmp_path)
    corpus = text.load_corpus(str(source), tmp_path)
    narrow = tokens.token_file(corpus.documents, "narrow", ids, tmp_path)
    ids.vocab_size = 65_537
    wide = tokens.token_file(corpus.documents, "wide", ids, tmp_path)
    assert (narrow.dtype.itemsize, wide.dtype.itemsize) == (2, 4)
    np.testing.assert_array_equal(narrow[:], wide[:])
    assert len(narrow) == len(wide[:]) == sum(len(d.encode()) + 1 for d in documents_of(60)) + 1


def test_long_documents_are_tokenised_in_pieces(source, tmp_path, monkeypatch):
    """Byte-level BPE gives the tokens of the whole."""
    expected = read(source, tmp_path / "whole")
    monkeypatch.setattr(tokenizer, "PIECE", 64)
    assert_same(read(source, tmp_path / "pieces"), expected)
    long = "one two\n\nthree\n  four\tfive'll " * 20
    assert "".join(tokenizer.pieces(long)) == long
    assert len(list(tokenizer.pieces(long))) > 8 and max(map(len, tokenizer.pieces(long))) <= 64
    assert [len(p) for p in tokenizer.pieces("x" * 150)] == [64, 64, 22], "nowhere to cut"


def test_a_disk_that_is_too_small_is_found_before_it_is_full(source, tmp_path, monkeypatch):
    with pytest.raises(
        OSError, match=r"tokens need 9 bytes · 1e18 = 9e\+06 TB in .*, where [\d.]+ GB are free: f"
    ):
        check_room(tmp_path, 9 * 10**18, "tokens", "9 bytes · 1e18")
    usage = type("Usage", (), {"free": 25_000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"tokens need [\d,]+ bytes of text · 2\.0\d = [\d.]+ kB in "):
        read(source, tmp_path / "cache", "byte")
    usage.free = 100
    with pytest.raises(OSError, match=r"documents need as many bytes as their files = 22.3 kB in"):
        read(source, tmp_path / "other", "byte")
    assert [size(n) for n in (0, 999, 1000, 1.5e9, 2e15)] == [
        "0 bytes", "999 bytes", "1 kB", "1.5 GB", "2e+03 TB",
    ]  # fmt: skip


def test_a_disk_that_fills_up_keeps_what_was_finished(source, tmp_path, monkeypatch):
    expected, fsync, calls = read(source, tmp_path / "whole"), os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"tokens-\w+\.bin cannot be written \(No space left on device\): free some r"
    ):
        read(source, tmp_path / "cache")
    monkeypatch.setattr(os, "fsync", fsync)
    (index,) = (tmp_path / "cache").glob("tokens-*.json")
    kept = len(Shards(index).rows)
    assert kept > 1
    monkeypatch.setattr(text, "_read", None)
    assert_same(read(source, tmp_path / "cache"), expected)


def test_bpe_is_learnt_from_a_bounded_share_of_a_large_corpus(source, tmp_path, monkeypatch):
    args = (str(source), "bpe", 300, 1, 0.1, 0)
    whole = load_text(*args, tmp_path / "whole")
    monkeypatch.setattr(batches, "LEARN_BYTES", 5000)
    built, learn = [], batches.build_tokenizer

    def learnt(kind, vocab, documents, *rest):
        return learn(kind, vocab, lambda: built.append(documents()) or documents(), *rest)

    monkeypatch.setattr(batches, "build_tokenizer", learnt)
    some, again = load_text(*args, tmp_path / "cache"), load_text(*args, tmp_path / "cache")
    (share,) = some.notes
    assert share == "the tokenizer is learnt from 25.8% of the documents"
    assert again.notes == some.notes and whole.notes == () and len(built) == 1
    assert len(built[0]) in (13, 14, 15), "of 54"
    assert (some.sha256, len(some.train.take([0]))) == (whole.sha256, len(whole.train.take([0])))
    assert some.tokenizer.fingerprint == again.tokenizer.fingerprint


def test_a_sample_has_no_period(source, tmp_path):
    documents = text.load_corpus(str(source), tmp_path).documents()
    many = documents[np.arange(6000) % 60]
    sample = many.sample(0.1)
    assert len(sample) == pytest.approx(600, abs=3) and len(many.sample(1.0)) == 6000
    for period in (2, 3, 5, 60):
        at = np.searchsorted(documents.starts, sample.starts) % period
        assert max(np.bincount(at)) < 2 * len(sample) / period
    assert len(documents.sample(1e-9)) == 1


def test_every_process_must_read_the_same_text(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    c = base()
    c.data.update(source=str(source), seq_len=8)
    monkeypatch.setattr(process, "decided", lambda f: f())
    sha256 = load_data(c).sha256
    monkeypatch.setattr(process, "decided", lambda f: ["0" * 64, f()[1]])  # process 0 says
    with pytest.raises(
        UserError, match=rf"holds sha256 0{{12}} in process 0, and {sha256[:12]} in this one: give"
    ):
        load_data(c)


def test_what_a_killed_reader_left_is_swept(source, tmp_path):
    cache = tmp_path / "cache"
    expected = read(source, cache)
    for key in ("dead", "alive", "stream"):
        shards = Shards(cache / f"reading-{key}")
        shards.append([b"text"])
        if key == "stream":
            shards.finish(shards=1, position={"row": 1})
    with locked(cache / "source-alive"):
        source.touch()
        assert_same(read(source, cache), expected)
    left = {p.stem for p in cache.glob("reading-*")}
    assert left == {"reading-alive", "reading-stream"}


def test_a_corpus_of_two_processes_is_made_once(source, tmp_path):
    """The second one waits for the first."""
    cache, made = tmp_path / "cache", tokens._make
    started, calls = threading.Event(), []

    def slow(*args):
        started.set()
        time.sleep(0.1)
        calls.append(args)
        made(*args)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(tokens, "_make", slow)
        first = pool.submit(read, source, cache)
        started.wait(20)
        assert_same(read(source, cache), first.result())
    assert len(calls) == 2, "training and validation side"


def test_sources_are_read_only_when_documents_are_asked_for(source):
    found = sources.source_of(str(source))
    assert found.state.n_bytes == source.stat().st_size and not found.inputs.read
    assert list(found.documents()) == documents_of(60) and found.inputs.read["utf-8"] == 1
