"""A file is replaced as a whole or not at all."""

import pytest

from fdp.files import write_atomic

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
