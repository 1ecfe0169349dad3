"""Who exported an artefact: an ed25519 signature of its manifest, which has the hash of every file.

Keys are PEM files as openssl makes them:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out public.pem
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from clora.errors import InputError
from clora.io.atomic import write_text

SIGNATURE = "manifest.sig"  # beside the manifest, and listed in none: it is the signature of the list
MOST_BYTES = 4096  # of a key or a signature


def sign(content: bytes, key: Path, folder: Path) -> None:
    """Write the signature of `content`, a manifest, into its folder. Raises `InputError` for no private ed25519 key."""
    signature = private_key(key).sign(content)
    write_text(folder / SIGNATURE, base64.b64encode(signature).decode() + "\n")


def check_signature(content: bytes, key: Path, folder: Path) -> None:
    """Raise `InputError` where the folder has no signature of `content` by the owner of a public key."""
    public = public_key(key)
    place = folder / SIGNATURE
    if place.is_symlink() or not place.is_file():
        raise InputError(
            f"{folder}: is not signed ({SIGNATURE} is missing); take it from where {key} is from, or sign it"
        )
    written = _small(place)
    try:
        signature = base64.b64decode(written.strip(), validate=True)
        public.verify(signature, content)
    except (ValueError, _invalid()) as error:
        raise InputError(
            f"{folder}: was not signed with the key of {key}; do not use it, or give its own key"
        ) from error


def private_key(path: Path) -> Any:
    """The ed25519 key that signs; `InputError` where the file holds none."""
    crypto, content = _library("serialization"), _small(path)
    try:
        key = crypto.load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"key {path}: is no private key in PEM without a password; make one with openssl genpkey -algorithm ed25519"
        ) from error
    return _ed25519(path, key, "sign")


def public_key(path: Path) -> Any:
    """The ed25519 key that checks; `InputError` where the file holds none."""
    crypto, content = _library("serialization"), _small(path)
    try:
        key = crypto.load_pem_public_key(content)
    except ValueError as error:
        raise InputError(
            f"key {path}: is no public key in PEM; write it with openssl pkey -in PRIVATE -pubout -out {path.name}"
        ) from error
    return _ed25519(path, key, "verify")


def _ed25519(path: Path, key: Any, what: str) -> Any:
    """A key that is of ed25519: other kinds verify with other arguments."""
    ed25519 = _library("asymmetric.ed25519")
    if not isinstance(key, ed25519.Ed25519PrivateKey if what == "sign" else ed25519.Ed25519PublicKey):
        raise InputError(f"key {path}: is of another kind; make one with openssl genpkey -algorithm ed25519")
    return key


def _small(path: Path) -> bytes:
    """A file that should be small. Raises `InputError` where it cannot be read or is not."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if content is None or len(content) > MOST_BYTES:
        raise InputError(f"{path}: is no key and no signature (it is too large); give the right file")
    return content


def _library(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"cryptography.hazmat.primitives.{module}")
    except ImportError as error:
        raise InputError("key: needs cryptography, which is not installed; run pip install 'clora[sign]'") from error


def _invalid() -> type[Exception]:
    from cryptography.exceptions import InvalidSignature

    return InvalidSignature
