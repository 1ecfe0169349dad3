"""API keys: a file of names and hashes. A key is shown once, when it is made, and is nowhere kept.

A line is `NAME SHA256`. A key holds 256 random bits, so that a plain hash of it cannot be searched.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from clora.errors import InputError, raise_faults
from clora.io.atomic import replacing
from clora.io.text import read_text

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LINE = re.compile(rf"({NAME.pattern}) ([0-9a-f]{{64}})")


def read_keys(path: Path) -> dict[str, str]:
    """The SHA-256 (hex) of each key by its name.

    Raises `InputErrors` for lines that are none, a name given twice and a file without keys; no error shows a line.
    """
    found: dict[str, str] = {}
    faults = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        if match is None:
            faults.append(f"{path}:{number}: is no 'NAME SHA256' line; make keys with clora serve --new-key")
        elif match[1] in found:
            faults.append(f"{path}:{number}: the name {match[1]} is there twice; remove one of them")
        else:
            found[match[1]] = match[2]
    if not found and not faults:
        faults.append(f"{path}: holds no key; make one with clora serve --new-key {path}")
    raise_faults(faults)
    return found


def new_key(path: Path, name: str) -> str:
    """Add a key to a file, which is made where it is not there (readable by its owner alone); returns the key. A file
    that is there keeps its mode, and its owner where that may be: whoever serves must be able to go on reading it.

    Raises `InputError` for a name that is taken or is none.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"key name {name!r}: give letters, digits, '.', '_' and '-', 64 at most")
    known = read_keys(path) if path.exists() else {}
    if name in known:
        raise InputError(f"{path}: has a key named {name}; choose another name with --key-name, or remove its line")
    key = f"clora-{secrets.token_urlsafe(32)}"
    before = path.stat() if path.exists() else None
    old = b"" if before is None else path.read_bytes()
    text = old + (b"" if not old or old.endswith(b"\n") else b"\n") + f"{name} {digest(key)}\n".encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        if before is not None:
            with suppress(PermissionError):  # only root may give a file to another
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
        os.fchmod(file.fileno(), 0o600 if before is None else before.st_mode & 0o777)
        file.write(text)
    return key


def digest(key: str) -> str:
    """SHA-256 (hex) of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def find_owner(keys: Mapping[str, str], key: str) -> str | None:
    """The name of a key, None for one that is unknown. Every entry is compared, each in constant time."""
    given, owner = digest(key), None
    for name, known in keys.items():
        if hmac.compare_digest(given, known):
            owner = name
    return owner
