"""A file is replaced as a whole or not at all."""

import os
import resource
import secrets

import pytest

from fdp.files import sweep, write_atomic

pytestmark = pytest.mark.fast


def test_text_bytes_and_writers(tmp_path):
    path = tmp_path / "x"
    for content in ("ä", "ä".encode(), lambda file: file.write("ä".encode())):
        write_atomic(path, content)
        assert path.read_text() == "ä"
        assert list(tmp_path.iterdir()) == [path]
        path.unlink()


def test_failed_atomic_write_keeps_the_old_file_and_leaves_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fdp.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_writer_keeps_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_atomic(path, "old")

    def half(file):
        file.write(b"ne")
        raise ValueError("lost the rest")

    with pytest.raises(ValueError, match="lost the rest"):
        write_atomic(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*/raw.json"):
            write_atomic(tmp_path / "raw.json", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_lies_in_the_place_of_the_temporary_file_is_neither_followed_nor_lost(
    tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(secrets, "token_hex", lambda n: "0" * 2 * n)
    victim, tmp = tmp_path / "victim", tmp_path / f".x.{os.getpid()}.00000000.tmp"
    victim.write_text("kept")
    tmp.symlink_to(victim) if kind == "link" else tmp.write_text("kept")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "x", "new")
    assert victim.read_text() == tmp.read_text() == "kept"


def test_temporary_files_of_a_killed_write_are_swept_and_nothing_else(tmp_path):
    (tmp_path / "measured").mkdir()
    left = [
        tmp_path / ".config.json.17.0123abcd.tmp",
        tmp_path / "measured" / ".a.npz.9.00000000.tmp",
    ]
    kept = [tmp_path / ".mine.tmp", tmp_path / "x.17.0123abcd.tmp", tmp_path / "measured" / "a.npz"]
    for path in left + kept:
        path.touch()
    sweep(tmp_path)
    assert [path.exists() for path in left + kept] == [False, False, True, True, True]
