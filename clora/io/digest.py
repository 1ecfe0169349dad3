"""SHA-256 of files, each read once in a process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from clora.errors import InputError

# By real path, size, time of the last change and inode: a file written anew is read again.
_digests: dict[tuple[Path, int, int, int], bytes] = {}


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file's content, which is read once as long as nobody writes to it.

    A run asks for the same source image six times and for each teacher twice. Raises `InputError` for a file that
    cannot be read.
    """
    try:
        status = path.stat()
        key = (path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)
        if key not in _digests:
            with path.open("rb") as file:
                _digests[key] = hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error
    return _digests[key]


def hash_files(files: Mapping[str, Path]) -> dict[str, str]:
    """sha256 (hex) of each file."""
    return {name: file_digest(path).hex() for name, path in files.items()}
