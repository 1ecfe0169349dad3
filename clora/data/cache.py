"""A cache of tensors (latents, text embeddings) keyed by the content they were made from.

The key is a SHA-256 over everything the values depend on: image bytes, prompt, the base's identity and the
version of the function that makes them. So there is nothing to invalidate: changed inputs are other keys.
An entry is one safetensors file, written under a temporary name and renamed, and read memory-mapped. Its
header holds a SHA-256 of the tensors, compared once per process: a damaged entry is reported, and made
again.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clora.io.digest import file_digest
from clora.io.safetensors import write_tensors

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
_DIGEST_KEY = "clora.cache.sha256"


def cache_key(images: Sequence[Path | bytes], prompt: str | None, base: str, version: str) -> str:
    """SHA-256 (hex) of image contents (a file or its bytes), prompt, base identity and function version.

    Every part is hashed with its kind and length, so that no two different inputs run together. Raises
    `InputError` for an image that cannot be read.
    """
    digest = hashlib.sha256()
    for kind, text in (("base", base), ("version", version), ("prompt", prompt)):
        _feed(digest, kind, b"" if text is None else b"=" + text.encode())
    for image in images:
        _feed(
            digest,
            "image",
            file_digest(image) if isinstance(image, Path) else hashlib.sha256(image).digest(),
        )
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, kind: str, content: bytes) -> None:
    digest.update(struct.pack("<Q", len(kind)) + kind.encode() + struct.pack("<Q", len(content)) + content)


class TensorCache:
    """Tensors by key in one folder. Processes may share it: equal keys mean equal contents."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._verified: set[str] = set()

    def path(self, key: str) -> Path:
        """Where the entry lies; its first two characters name a subfolder, as large ones are slow to list."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get_or_make(self, key: str, make: Callable[[], Mapping[str, Tensor]]) -> Tensors:
        """The tensors under `key`, memory-mapped; without a sound entry `make` is called, its result kept."""
        tensors = self.read(key)
        if tensors is None:
            self.write(key, make())
            tensors = self.read(key)
            if tensors is None:
                raise OSError(f"{self.path(key)} cannot be read back after writing; check the disk of the cache")
        return tensors

    def read(self, key: str) -> Tensors | None:
        """The tensors under `key` (CPU, memory-mapped, private), or None without a sound entry."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                stored = (file.metadata() or {}).get(_DIGEST_KEY)
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("cache entry %s is damaged (%s) and is made again", path, error)
            return None
        if key not in self._verified:
            if stored != tensors_digest(tensors):
                log.warning("cache entry %s is damaged (checksum) and is made again", path)
                return None
            self._verified.add(key)
        return tensors

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry atomically; an older one under the same key is replaced."""
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._verified.discard(key)
        write_tensors(path, plain, {_DIGEST_KEY: tensors_digest(plain)})


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of names, dtypes, shapes and bytes, whatever the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        _feed(digest, "tensor", f"{name}\n{tensor.dtype}\n{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
