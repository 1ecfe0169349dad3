"""SHA-256 of files, each read once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from clora.errors import InputError
from clora.io.digest import file_digest, hash_files


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    names: list[str] = []
    real = hashlib.file_digest

    def counted(file: Any, kind: str) -> Any:
        names.append(Path(file.name).name)
        return real(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def test_file_digest_reads_a_file_once_under_all_its_names(tmp_path: Path, reads: list[str]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"content")
    (tmp_path / "link.bin").symlink_to(path)
    expected = hashlib.sha256(b"content").digest()
    names = (path, tmp_path / "link.bin", tmp_path / "." / ".." / tmp_path.name / "a.bin")
    assert [file_digest(name) for name in names] == [expected] * 3
    assert hash_files({"x": path, "y": path}) == {"x": expected.hex(), "y": expected.hex()}
    assert reads == ["a.bin"]


def test_file_digest_reads_a_changed_file_again(tmp_path: Path, reads: list[str]) -> None:
    """Longer, written later at the same length, or replaced by another file with its size and time."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"1234")
    os.utime(path, ns=(10**18, 10**18))
    file_digest(path)
    path.write_bytes(b"123456")
    assert file_digest(path) == hashlib.sha256(b"123456").digest()
    path.write_bytes(b"654321")
    os.utime(path, ns=(10**18 + 1, 10**18 + 1))
    assert file_digest(path) == hashlib.sha256(b"654321").digest()
    (tmp_path / "b.bin").write_bytes(b"abcdef")
    os.utime(tmp_path / "b.bin", ns=(10**18 + 1, 10**18 + 1))
    os.replace(tmp_path / "b.bin", path)
    assert file_digest(path) == hashlib.sha256(b"abcdef").digest()
    assert len(reads) == 4


def test_file_digest_names_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.bin cannot be read .*; check the path and its permissions"):
        file_digest(tmp_path / "gone.bin")
    with pytest.raises(InputError, match="cannot be read"):
        file_digest(tmp_path)
