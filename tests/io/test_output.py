"""Places for results: what is wrong with one is told before the work, and no file is ever half written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from clora.errors import InputError, WriteError
from clora.io.output import check_output, prepare_folder, write_output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "is a folder, where a file is to be written"),
        ("file/x.png", r"cannot be made, because .*/file is no folder"),
        ("file/below/x.png", r"cannot be made, because .*/file is no folder"),
        ("dangling/x.png", r"cannot be made, because .*/dangling is no folder"),
        (f"{'n' * 300}.png", "its name is longer than 255 bytes"),
        (f"new/{'ä' * 150}/x.png", "its name is longer than 255 bytes"),
        ("a\0b.png", "is no path"),
    ],
)
def test_check_output_names_what_is_wrong(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"output: .*{message}"):
        check_output(tmp_path / name)


def test_check_output_changes_nothing_where_a_file_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_text("old")
    for name in ("there.png", "new.png", "new/folder/x.png", f"{'n' * 251}.png"):
        check_output(tmp_path / name)
    check_output(Path("relative.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_output_refuses_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match="closed may not be written to"):
        check_output(tmp_path / "closed" / "x.png")


def test_prepare_folder_makes_it_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file/b cannot be written"):
        prepare_folder(tmp_path / "file" / "b")


def test_write_output_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / f"{'n' * 251}.png"  # as long a name as there can be
    write_output(path, b"old")
    write_output(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, WriteError, "could not be written, the disk is full; make room, or write elsewhere"),
        (errno.EIO, WriteError, "could not be written, Input/output error"),
        (errno.EROFS, InputError, r"cannot be written \(Read-only file system\); choose another place"),
    ],
)
def test_write_output_says_what_an_error_means_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], message: str
) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(kind, match=f"output: .*out.png {message}"):
        write_output(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_write_output_into_a_folder_in_its_way_is_a_wrong_place(tmp_path: Path) -> None:
    (tmp_path / "out.png").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        write_output(tmp_path / "out.png", b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "out.png"]
