"""Reading and writing safetensors files within declared bounds.

The format (little endian): 8 bytes N, N bytes of JSON header, then the tensors' raw bytes without holes. It
cannot run code, but a damaged or hostile header can still claim anything: `read_header` believes nothing that
the file's own size does not confirm. The writer sorts everything, so that equal contents give equal bytes
(the stock writer orders the metadata at random), and a reader sees a whole file or none.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clora.errors import InputError, raise_faults
from clora.io.atomic import replacing
from clora.io.text import parse_json

MAX_HEADER_BYTES = 64 << 20
MAX_FILE_BYTES = 32 << 30
PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header: where its bytes lie, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: every entry lies inside the file and has as many bytes as its shape and dtype
    need."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    num_bytes: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises `InputError` for a file that is missing, a pickle, truncated, padded or damaged, or whose header is
    larger than 64 MiB; damaged entries are told, those of one fault together.
    """
    size = _checked_size(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
            length = int.from_bytes(start[:8], "little")
            if len(start) < 9 or start[8:9] != b"{" or length > size - 8:
                raise InputError(f"{path}: {_foreign_kind(start)}")
            if length > MAX_HEADER_BYTES:
                raise InputError(f"{path}: its header of {length} bytes is over the limit; re-save the file")
            text = start[8:9] + file.read(length - 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    try:
        raw = parse_json(text.decode())
    except ValueError as error:
        raise InputError(f"{path}: damaged safetensors header ({error}); copy or download it again") from error
    return _check_header(path, raw, 8 + length, size)


def read_tensors(path: Path, header: Header) -> tuple[dict[str, Tensor], str]:
    """Every tensor of a checked file in CPU memory, and the SHA-256 (hex) of the bytes they came from."""
    data = bytearray(header.num_bytes)
    with path.open("rb") as file:
        if file.readinto(data) != header.num_bytes or file.read(1):
            raise InputError(f"{path}: changed while it was read; try again")
    return {key: _view(data, entry) for key, entry in header.tensors.items()}, hashlib.sha256(data).hexdigest()


def map_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """Every tensor of a checked file as a view of the file, which is read where and when they are.

    Nothing written to them reaches the file. The file may be replaced while they are in use, but not cut off.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in header.tensors}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: changed while it was read ({error}); try again") from error
    if any((t.shape, t.dtype) != (header.tensors[key].shape, header.tensors[key].dtype) for key, t in tensors.items()):
        raise InputError(f"{path}: changed while it was read; try again")
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file atomically (temporary name, fsync, rename); returns its SHA-256 (hex).

    Keys and metadata are sorted, so equal contents give equal bytes. Wide types come first, which keeps every
    tensor aligned.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for key in order:
        end = offset + tensors[key].numel() * tensors[key].element_size()
        name, shape = _DTYPE_NAMES[tensors[key].dtype], list(tensors[key].shape)
        header[key] = {"dtype": name, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with replacing(path) as file:
        for chunk in (len(text).to_bytes(8, "little"), text):
            digest.update(chunk)
            file.write(chunk)
        for key in order:
            flat = tensors[key].detach().cpu().contiguous().reshape(-1)
            raw = flat.view(torch.uint8).numpy().data
            digest.update(raw)
            file.write(raw)
    return digest.hexdigest()


def _checked_size(path: Path) -> int:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise InputError(f"{path}: {what}; name a .safetensors file")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(f"{path}: {path.suffix} files may run code when opened; convert it to .safetensors")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise InputError(f"{path}: {size} bytes is over the limit of {MAX_FILE_BYTES}; this is no LoRA")
    return size


def _foreign_kind(start: bytes) -> str:
    """Why the first bytes of a file are no safetensors header."""
    if len(start) < 9:
        return "is empty or cut off; copy or download the file again"
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1] in range(2, 6)):
        return "is a pickle (torch.save), which may run code when opened; convert it to .safetensors"
    if start.startswith(b"GGUF"):
        return "is a GGUF file; give the original .safetensors"
    if start[8:9] == b"{":
        return "is cut off inside its header; copy or download the file again"
    return "is not a safetensors file; give a .safetensors LoRA"


def _check_header(path: Path, raw: Any, data_start: int, size: int) -> Header:
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: damaged header, __metadata__ is not a table of strings; re-save it")
    faults: dict[str, list[str]] = {}  # what is wrong -> the tensors of which it is
    entries: dict[str, TensorEntry] = {}
    for key, value in raw.items():
        entry = _entry(value, data_start)
        if isinstance(entry, str):
            faults.setdefault(entry, []).append(key)
        else:
            entries[key] = entry
    more = {what: f", and {len(keys) - 1} more like it" if len(keys) > 1 else "" for what, keys in faults.items()}
    raise_faults(
        [f"{path}: damaged header, tensor {keys[0]!r} {what}{more[what]}; re-save it" for what, keys in faults.items()]
    )
    end = data_start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise InputError(f"{path}: damaged header, a hole or overlap before {key!r}; re-save it")
        end = entry.end
    if end != size:
        what = "cut off" if size < end else "longer than its header says"
        raise InputError(f"{path}: {what} ({size} bytes, the header declares {end}); copy or download it again")
    return Header(entries, metadata, size)


def _entry(value: Any, data_start: int) -> TensorEntry | str:
    """One checked entry, or what is wrong with it."""
    try:
        name, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        return "lacks dtype, shape or data_offsets"
    if not isinstance(name, str) or name not in DTYPES:
        return f"has the unknown dtype {name!r}"
    counts = [*shape, start, end] if isinstance(shape, list) else [None]
    if not all(type(count) is int and 0 <= count < 2**53 for count in counts) or len(shape) > 8:
        return "has a shape or offset that is not a list of counts"
    num_bytes = math.prod(shape) * DTYPES[name].itemsize
    if end - start != num_bytes:
        return f"has {end - start} bytes where shape {shape} of {name} needs {num_bytes}"
    return TensorEntry(DTYPES[name], tuple(shape), data_start + start, data_start + end)


def _view(data: bytearray, entry: TensorEntry) -> Tensor:
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if entry.start % entry.dtype.itemsize:  # legal in the format, but a tensor must be aligned
        return torch.frombuffer(data[entry.start : entry.end], dtype=entry.dtype).view(entry.shape)
    count = math.prod(entry.shape)
    return torch.frombuffer(data, dtype=entry.dtype, count=count, offset=entry.start).view(entry.shape)
