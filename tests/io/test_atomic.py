"""Files that are whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clora.io.atomic import replacing, write_bytes, write_text


def test_write_text_makes_folders_and_writes_utf8(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    write_text(path, "naïve\nsecond\n")
    assert path.read_bytes() == b"na\xc3\xafve\nsecond\n"
    write_bytes(path, b"\x00")
    assert path.read_bytes() == b"\x00"


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_write_text_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old\n")

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, fails, broken)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new\n")
    assert path.read_bytes() == b"old\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_replacing_keeps_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"half of the")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b" new")
    assert path.read_bytes() == b"half of the new"
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"lost")
        raise KeyError
    assert path.read_bytes() == b"half of the new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_replacing_syncs_the_file_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = tmp_path / "a.bin", list[tuple[str, bool]]()
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        events.append(("folder" if os.path.samestat(os.fstat(handle), os.stat(tmp_path)) else "file", path.exists()))
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        events.append(("rename", path.exists()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(path, "new")
    assert events == [("file", False), ("rename", False), ("folder", True)]


def test_new_folder_of_a_killed_process_is_not_there(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from clora.io.atomic import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "model").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "artefact"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert not path.exists()
    assert [entry.name.startswith(".artefact.") for entry in tmp_path.iterdir()] == [True]
