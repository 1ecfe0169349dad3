"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from clora.errors import InputError


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file's content. Raises `InputError` for one that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error


def hash_files(files: Mapping[str, Path]) -> dict[str, str]:
    """sha256 (hex) of each file; one that several names share is read once."""
    found = {path: file_digest(path).hex() for path in dict.fromkeys(files.values())}
    return {name: found[path] for name, path in files.items()}
