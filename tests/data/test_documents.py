"""Files as users bring them: every encoding, packing and format is read as it is, or refused."""

import bz2
import gzip
import json
import lzma
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from fdp.config import UserError
from fdp.data import documents
from fdp.data.decode import NotText
from fdp.data.documents import Inputs, documents_of
from fdp.data.tokenizer import build_tokenizer
from tests.data.reading import read_corpus

pytestmark = pytest.mark.fast

# Three sentences a language: what a harbour master does with his day.
SENTENCES = {
    "en": (
        "The harbour master wrote the tides into a ledger.",
        "Boats came home by it, even in fog.",
        "Nobody asked him how he knew; the sea did not ask either.",
    ),
    "fr": (
        "Le maître du port notait les marées dans un registre.",
        "À la nuit tombée, où l’on rentre",
        "grâce à lui, même les garçons s’éveillaient tôt : ça leur plaît.",
    ),
    "de": (
        "Der Hafenmeister schrieb täglich die Gezeiten auf.",
        "Für Schiffe heißt das Glück, und für",
        "die Gäste Ruhe; später öffnete er das Büro und kochte süßen Tee.",
    ),
    "es": (
        "El capitán anotó la marea en su cuaderno español.",
        "¿Quién sabía qué mañana vendría un",
        "barco pequeño? Nadie; según él, el océano también enseña. ¡Qué niños!",
    ),
    "pl": (
        "Kapitan portu zapisywał przypływy w księdze każdego dnia.",
        "Łodzie wracały wieczorem, choć",
        "mgła była gęsta; żaden rybak nie pytał, skąd wie, że świt się zbliża.",
    ),
    "cs": (
        "Přístavní mistr zapisoval příliv do sešitu každý večer.",
        "Lodě se vracely domů, i když byla",
        "mlha; žádný rybář se neptal, jak ví, že moře brzy ztichne. Ještě úsvit čekal.",
    ),
    "ru": (
        "Смотритель порта записывал приливы в книгу каждый вечер.",
        "Лодки возвращались домой, и даже",
        "в тумане никто не спрашивал, откуда он знает, что море скоро утихнет.",
    ),
    "el": (
        "Ο λιμενάρχης έγραφε τις παλίρροιες στο βιβλίο του.",
        "Τα καΐκια γύριζαν το βράδυ, και κανείς",
        "δεν ρώτησε πώς ήξερε ότι η θάλασσα θα ησύχαζε πριν από την αυγή.",
    ),
    "zh": (
        "港务长把潮汐写进账簿，每天傍晚渔船都照着它回家。",
        "没有人问过他是怎么知道的，",
        "大海也从来不问；清晨的时候，孩子们在码头上等着父亲。",
    ),
    "ja": (
        "港の長は潮の満ち引きを帳面に書いた。",
        "舟は毎晩それを頼りに帰ってきたが、霧の日も",
        "だれも理由をたずねなかった。海もまた、何も聞かなかったのである。",
    ),
    "ko": (
        "항구의 책임자는 밀물과 썰물을 장부에 적었다.",
        "배들은 저녁마다 그것을 보고 돌아왔고",
        "안개 속에서도 아무도 그가 어떻게 아는지 묻지 않았다.",
    ),
}
ENCODINGS = (
    *(("en", name) for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig")),
    *(("fr", name) for name in ("latin-1", "cp1252", "iso8859-15", "mac_roman", "cp850")),
    *(("de", name) for name in ("latin-1", "cp850")),
    *(("es", name) for name in ("latin-1", "cp1252")),
    *((language, name) for language in ("pl", "cs") for name in ("cp1250", "iso8859-2", "cp852")),
    *(("ru", name) for name in ("koi8-r", "cp1251", "cp866", "iso8859-5", "utf-16-be")),
    *(("el", name) for name in ("cp1253", "iso8859-7")),
    *(("zh", name) for name in ("gbk", "gb18030", "utf-16-le", "utf-32-be")),
    *(("ja", name) for name in ("shift_jis", "euc_jp", "iso2022_jp")),
    ("ko", "euc_kr"),
)


def prose(language: str, n_bytes: int = 50_000) -> str:
    """About `n_bytes` of UTF-8, every paragraph another one, without what an encoding lacks."""
    rng, parts, size = random.Random(0), [], 0
    while size < n_bytes:
        parts.append(f"{len(parts)}. " + " ".join(rng.choices(SENTENCES[language], k=3)))
        size += len(parts[-1].encode())
    return "\n\n".join(parts)


def read(path: Path, data: bytes) -> tuple[tuple[str, ...], str]:
    """Documents of a file with this content, and what the banner says of it."""
    path.write_bytes(data)
    corpus = read_corpus(str(path))
    return corpus.documents, " ".join(corpus.notes)


@pytest.mark.parametrize(("language", "encoding"), ENCODINGS)
def test_every_encoding_reads_as_utf8_does(tmp_path, language, encoding):
    text = prose(language)
    if encoding in ("latin-1", "mac_roman", "cp850", "cp852", "iso8859-15", "iso8859-2"):
        text = text.replace("’", "'")
    expected, plain = read(tmp_path / "a.txt", text.encode())
    found, notes = read(tmp_path / "b.txt", text.encode(encoding))
    assert found == expected and plain == ""
    assert encoding == "utf-8-sig" or notes.startswith("1 file read (as ")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("It was 20 °C, ±3 µm, ½ cup, £5, © 2020", "cp1252"),
        ("“Don’t,” he said – and that’s all…", "cp1252"),
        ("Chapter\n————————————\n" + "plain words " * 30 + "naïve café", "cp1252"),
        ("It costs 5 € and 10 €", "iso8859-15"),
        ("x" * 300_000 + "\ncafé", "cp1252"),
    ],
)
def test_few_characters_outside_ascii(tmp_path, text, encoding):
    texts = [f"{i}. {text}\n\n" for i in range(20)]
    assert (
        "".join(texts).split()
        == " ".join(read(tmp_path / "a", "".join(texts).encode(encoding))[0]).split()
    )


def test_russian_words_in_english_are_not_latin_letters(tmp_path):
    text = "This line is English with the word привет in it, and more English.\n\n"
    with pytest.raises(NotText, match="of its characters are lost"):
        read(tmp_path / "a", (text * 50).encode("cp1251"))


@pytest.mark.parametrize(
    "data",
    [
        prose("fr").replace("\n", "\r\n").encode(),
        prose("fr").replace("\n", "\r").encode(),
        gzip.compress(prose("fr").encode(), mtime=0),
        bz2.compress(prose("fr").encode("cp1252")),
        lzma.compress(prose("fr").replace("\n", "\r\n").encode("utf-16")),
        json.dumps([{"text": d} for d in prose("fr").split("\n\n")]).encode(),
    ],
    ids=["crlf", "cr", "gz", "bz2 cp1252", "xz utf-16 crlf", "json"],
)
def test_line_ends_and_packing_change_nothing(tmp_path, data):
    texts = [
        "\n\n".join(read(tmp_path / "a", content)[0]) for content in (data, prose("fr").encode())
    ]
    assert texts[0] == texts[1]


def test_encodings_give_the_same_tokens(tmp_path):
    ids = []
    for encoding in ("utf-8", "koi8-r"):
        found, _ = read(tmp_path / encoding, prose("ru").encode(encoding))
        tokenizer = build_tokenizer("bpe", 400, lambda d=found: d, "sha", tmp_path)
        ids.append(np.concatenate(tokenizer.encode_batch(found)))
    np.testing.assert_array_equal(*ids)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%PDF-1.7\n1 0 obj", r"\(a PDF\): extract its text, as `pdftotext` does"),
        (b"PK\x03\x04rest", r"\(a ZIP archive, as \.docx, \.epub and \.npz are\): unpack it"),
        (b"\x28\xb5\x2f\xfdrest", r"packed by zstd\): unpack it with `zstd -d`"),
        (bytes(257) + b"ustar\x0000", r"a tar archive"),
        (b"a\0b", r"\(it has NUL bytes\)"),
        (random.Random(0).randbytes(5000).replace(b"\0", b"\1"), r"binary: control characters"),
        (
            prose("fr").encode() + b"\xff and \xfe\xfe.",
            r"3 of [\d,]+ characters are damaged, first in line \d+\): .*iconv -c -f UTF-8",
        ),
        (
            b"caf\xe9 na\xefve",  # as in cp1250, which has other letters there
            r"20\.0% of its characters are lost; its encoding may be cp1252 or iso-8859-15 or "
            r"cp1250\): if it is cp1252, run `iconv -f cp1252 -t UTF-8`",
        ),
        (
            prose("en").encode("cp500"),
            r"of its characters are lost, and no other encoding explains",
        ),
        (
            gzip.compress(prose("en").encode(), mtime=0)[:-9],
            r"is damaged \(Compressed file ended before",
        ),
        (b"\x1f\x8bnot so", r"\(damaged: "),
        (
            prose("zh").encode("utf-16") + b"\x00\xd8\x00\xd8",
            r"seems to be utf-16-le, where .* first",
        ),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, data, message):
    with pytest.raises(ValueError, match=message) as refused:
        read(tmp_path / "a", data)
    assert "\n" not in str(refused.value)


def test_a_character_cut_in_two_at_the_end(tmp_path):
    found, notes = read(tmp_path / "a", "né\n\nö".encode()[:-1])
    assert found == ("né",) and "last character, cut in two" in notes


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.JSONL", b'{"text": "a"}\n\n{"text": "b"}\n', ("a", "b")),
        ("a.ndjson", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}', ("a", "b")),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', ("a", "b")),
        ("a.json", b' [{"text": "a"},\n {"text": "b"}]', ("a", "b")),
        ("a.json", b'{\n "id": 1,\n "text": "a"}', ("a",)),
        ("a.txt", b'{"text": "a"}\n{"text": "b"}', ("a", "b")),
        ("a.jsonl", '[{"text": "é"}, {"text": "b"}]'.encode("utf-16"), ("é", "b")),
        ("a.jsonl", '{"text": "é"}\n{"text": "b"}'.encode("utf-16"), ("é", "b")),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "b"}', mtime=0), ("a", "b")),
        ("a.txt", b"[1] A note\n\n[2] Another", ("[1] A note", "[2] Another")),
        ("a.log", b'{"level": "a"}\n{"level": "b"}', ('{"level": "a"}', '{"level": "b"}')),
    ],
)
def test_json_is_known_by_its_content(tmp_path, name, data, expected):
    assert read(tmp_path / name, data)[0] == expected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'{"data": []}', r'row 1 has no string field "text" \(found: data\)'),
        (
            "a.json",
            b'[{"text": "a"}, 2]',
            r'a\.json: row 2 has no string field "text" \(found: int\)',
        ),
        ("a.json", b"plain", r"its name says JSON and its content does not"),
        ("a.jsonl", b"{broken", r"line 1 is not JSON .*one object a line is expected"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}',
            r"a\.jsonl:2 is not UTF-8, as JSON must be",
        ),
        ("a.jsonl", b"", r"holds no text"),
    ],
)
def test_json_without_texts_is_refused(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, data)


def test_form_feeds_separate_and_override_nothing(tmp_path):
    paragraphs = [f"{i}. {'word ' * 20}".strip() for i in range(40)]
    book = "A Book of Tides\f" + "\n\n".join(paragraphs)
    assert read(tmp_path / "a", book.encode())[0] == ("A Book of Tides", *paragraphs)
    pages = "\f\n".join(paragraphs)
    assert read(tmp_path / "a", pages.encode())[0] == (
        paragraphs[0],
        *("\n" + p for p in paragraphs[1:]),
    )


@pytest.mark.parametrize("text", ["word " * 12_000, "ACGT" * 12_000, "港务长把潮汐。" * 8000])
def test_one_long_line_is_cut(tmp_path, text):
    path = tmp_path / "a"
    path.write_text(text, encoding="utf-8")
    inputs = Inputs()
    found = list(documents_of(path, inputs))
    assert "".join(found) == text and len(found) >= 30
    assert f"one line of {len(text):,} characters, cut about every" in " ".join(inputs.notes())


@pytest.fixture
def folder(tmp_path):
    """Files of every kind: four that can be read, and nine that cannot."""
    root, linked = tmp_path / "folder", tmp_path / "elsewhere"
    (root / ".git").mkdir(parents=True)
    linked.mkdir()
    (linked / "z.txt").write_text("linked")
    (linked / "back").symlink_to(root)
    (root / "a.txt").write_text("plain\n\nwhole")
    (root / "b.txt").write_bytes("wide".encode("utf-16"))
    (root / "c.txt.gz").write_bytes(gzip.compress(b"packed", mtime=0))
    (root / "copy.txt").write_text("linked")
    (root / "again").symlink_to(linked)
    (root / "loop").symlink_to(root / "loop")
    (root / "nowhere").symlink_to(root / "absent")
    os.mkfifo(root / "pipe")
    (root / "package.json").write_text('{"name": "x"}')
    (root / "paper.pdf").write_bytes(b"%PDF-1.4")
    (root / "bad\n\udcff").write_bytes(b"\0")
    (root / "empty.txt").write_text(" \n")
    return root


def test_folder_says_what_it_left_out(folder, monkeypatch):
    unreadable = folder / "secret.txt"
    unreadable.write_text("secret")
    opened = Path.open

    def refuse(path, *args, **kwargs):
        if path == unreadable:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    inputs = Inputs()
    assert list(documents_of(folder, inputs)) == [
        "plain\n\nwhole",
        "wide",
        "packed",
        "linked",
        "linked",
    ]
    reasons = dict(inputs.left_out)
    assert reasons == {
        ".git": "hidden",
        "again/back": "link to a folder that is read already",
        "bad??": "it has NUL bytes",
        "empty.txt": "holds no text",
        "loop": "Too many levels of symbolic links",
        "nowhere": "a link to nothing",
        "package.json": 'row 1 has no string field "text" (found: name)',
        "paper.pdf": "a PDF",
        "pipe": "a FIFO",
        "secret.txt": "Permission denied",
    }
    (line,) = inputs.notes()
    assert line.startswith("5 files read (1 as gz, 1 as utf-16); 10 left out: ")
    assert line.endswith(" and 2 more")
    assert (
        read_corpus(str(folder)).notes[1] == "1 of 5 documents are copies of others, and left out"
    )


def test_folder_without_text_says_why(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(ValueError, match=r"holds no text \(1 left out: a\.pdf \(a PDF\)\)"):
        read_corpus(str(tmp_path))


def test_damage_behind_a_good_beginning_is_an_error_in_a_folder_too(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"te')
    with pytest.raises(ValueError, match=r"b\.jsonl:2 is not JSON"):
        read_corpus(str(tmp_path))


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotText, match=r"a FIFO\): write its text to a file"):
        read_corpus(str(tmp_path / "pipe"))


@pytest.fixture
def small(monkeypatch):
    """Files of over 20 kB are large."""
    monkeypatch.setattr(documents, "LARGE", 20_000)
    monkeypatch.setattr(documents, "BLOCK", 1000)


@pytest.mark.parametrize(
    ("language", "encoding"),
    [("fr", "utf-8"), ("fr", "cp1252"), ("ru", "koi8-r"), ("ja", "shift_jis"), ("ja", "iso2022_jp")]
    + [("zh", name) for name in ("gb18030", "utf-8-sig", "utf-16", "utf-16-be", "utf-32")],
)
def test_large_files_are_read_in_blocks(tmp_path, small, language, encoding):
    """Every character is there once, at every boundary of a block; documents are as long as
    elsewhere."""
    text = prose(language, 150_000).replace("\n", "\r\n")
    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress(text.encode(encoding), mtime=0))
    found = read_corpus(str(path)).documents
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(2000 <= len(d) < 3000 for d in found[:3]) and not any("\r" in d for d in found)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-be"])
def test_the_mark_of_a_large_file_is_no_text(tmp_path, small, encoding):
    (tmp_path / "a.txt").write_bytes(f"\ufeff{prose('en')}".encode(encoding))
    found = read_corpus(str(tmp_path / "a.txt")).documents
    assert len(found) > 10 and "\ufeff" not in "".join(found)


def test_a_large_file_is_cut_in_a_folder_too(tmp_path, small):
    (tmp_path / "a.txt").write_text(prose("en"))
    (tmp_path / "b.txt").write_text("short")
    corpus = read_corpus(str(tmp_path))
    assert len(corpus.documents) > 20 and corpus.documents[-1] == "short"
    assert corpus.notes == ("2 files read; 1 of over 0 MiB cut into documents",)


def test_a_large_line_is_cut(tmp_path, small):
    (tmp_path / "a.txt").write_text("ACGT" * 20_000)
    found = list(documents_of(tmp_path / "a.txt", Inputs()))
    assert "".join(found) == "ACGT" * 20_000 and len(found) == 8 * 5 + 1, "blocks of 10,000"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.txt",
            prose("fr").encode() + b"\xe9 fini",
            r"begins as utf-8-sig, .* at about byte 5\d,",
        ),
        ("a.json", json.dumps([{"text": "a" * 30_000}]).encode(), r"write one object a line"),
        ("a.txt", json.dumps([{"text": "a" * 30_000}]).encode(), r"over 0 MiB in one array, or"),
        ("a.jsonl", json.dumps({"text": "é" * 9000}).encode("utf-16"), r"not JSON lines in UTF-8"),
    ],
)
def test_large_files_that_cannot_be_read_in_blocks(tmp_path, small, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_corpus(str(tmp_path / name))


def parquet_of(path: Path, **columns) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def test_parquet_is_read_by_its_column_text(tmp_path):
    texts = [f"{i}é" for i in range(10)]
    path = parquet_of(tmp_path / "a", text=[*texts, None, " "], id=list(range(12)))
    corpus = read_corpus(str(path))
    assert corpus.documents == tuple(texts) and corpus.notes == ("1 file read (as parquet)",)
    (tmp_path / "b.txt").write_text("and text")
    assert read_corpus(str(tmp_path)).documents == (*texts, "and text")


def test_parquet_that_cannot_be_read(tmp_path, monkeypatch):
    path = parquet_of(tmp_path / "a.parquet", body=["x"], id=[1])
    with pytest.raises(NotText, match=r'no column "text" \(found: body, id\)\): name the column'):
        read_corpus(str(path))
    with pytest.raises(NotText, match=r'column "text" is int64'):
        read_corpus(str(parquet_of(tmp_path / "b.parquet", text=[1])))
    packed = tmp_path / "c.parquet.gz"
    packed.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    with pytest.raises(NotText, match=r"\(Parquet\): unpack it first"):
        read_corpus(str(packed))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(NotText, match=r"not Parquet \(damaged: .*fetch it again"):
        read_corpus(str(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install -e '\.\[hf\]'"):
        read_corpus(str(path))


def test_json_lines_are_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 3 + b"broken")
    rows = documents_of(path, Inputs())
    assert [next(rows) for _ in range(3)] == ["a"] * 3
    with pytest.raises(ValueError, match=r"a\.jsonl:4"):
        next(rows)
