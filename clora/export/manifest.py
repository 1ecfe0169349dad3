"""The manifest of an artefact: what it is, and the hash of every file in its folder.

An artefact is a folder. Some formats are native code that loading runs, so that nothing of a folder is opened before
`check_folder` has found every file whole: listed, inside the folder, of the size and SHA-256 that `manifest.json` says,
and no file beside those. A hash proves that a folder is as it was exported, not who exported it: see `signature`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clora.errors import InputError, InputErrors, raise_faults
from clora.export.signature import SIGNATURE, check_signature, sign
from clora.io.atomic import sync_folder, write_text
from clora.io.text import parse_json, read_text

Format = Literal["merged", "aoti", "onnx", "tensorrt"]
Precision = Literal["float32", "bfloat16", "float16", "fp8", "int8"]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COLLECTION = "collection.safetensors"  # the LoRA that was merged, in every artefact: what `clora verify` compares with
UNLISTED = {MANIFEST, SIGNATURE}
MOST_FILES = 1000
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileEntry(_Record):
    """One file of the folder."""

    num_bytes: int = Field(ge=0)
    sha256: Sha256


class Limits(_Record):
    """The shapes that the artefact takes. `text_buckets`: the lengths that text is padded to, rising."""

    batch: int = Field(ge=1)
    tokens: int = Field(ge=2)
    text_buckets: tuple[Annotated[int, Field(ge=2)], ...] = Field(min_length=1)


LIMITS = Limits(batch=32, tokens=16384, text_buckets=(32, 64, 128, 256, 512, 1024, 2048))


class Quantization(_Record):
    """What of an engine is in eight bits. `kept`: the linears of blocks that stay in bf16, because they cost most when
    they alone are rounded. `cost`: ||v' - v|| / ||v|| of velocities, simulated in torch, the largest of some
    forwards; `cost_of_all`: with none kept; `worst`: of one value, relative to the largest."""

    layers: int = Field(ge=1)
    kept: tuple[str, ...]
    cost: float
    cost_of_all: float
    worst: float
    images: int = Field(ge=1)


class Profile(_Record):
    """Sizes that an engine was tuned for, each (least, usual, most)."""

    batch: tuple[int, int, int]
    tokens: tuple[int, int, int]
    ref_tokens: tuple[int, int, int]
    text: tuple[int, int, int]


class Engine(_Record):
    """How a TensorRT engine was built. `library`: tensorrt, or tensorrt_rtx for one that was built ahead of time;
    `version`: the one release that runs it; `target`: the compute capability of its GPU, as in SM89. `attention` is
    "fused" where every attention must run as one kernel; `attentions` counts them."""

    library: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    target: str = Field(pattern=r"^SM[0-9]+$")
    attention: Literal["fused", "decomposed"]
    attentions: int = Field(ge=1)
    weight_streaming: bool
    profiles: tuple[Profile, ...] = Field(min_length=1)


Component = Literal["transformer", "vae", "text_encoder"]


class Manifest(_Record):
    """`base_identity` is `clora.config.base_identity`'s, `catalogue` that of the collection as its header has it.
    `components`: whose each is, the folder's or the base's; the text encoder runs in PyTorch, wherever it is, and what
    is not named is the base's. `rounding`: see
    `lora.merge.Merge`. `parity`: what `export.verify` measured on the machine that exported."""

    format_version: Literal[1] = 1
    format: Format
    precision: Precision
    base: str = Field(min_length=1)
    base_identity: str
    catalogue: dict[str, Any]
    num_steps: int = Field(ge=1, le=1000)
    shift: float = Field(gt=0)
    sampler: Literal["consistency", "euler"]
    limits: Limits
    versions: dict[str, str]
    platform: str
    rounding: float
    engine: Engine | None = None
    quantization: Quantization | None = None
    components: dict[Component, Literal["artefact", "base"]] = {}
    parity: dict[str, Any] = {}
    files: dict[str, FileEntry] = Field(max_length=MOST_FILES)

    @property
    def encoder_precision(self) -> Literal["float32", "bfloat16"]:
        """Of the base's encoders around the network: its own, or bfloat16 beside an engine of less."""
        return "float32" if self.precision == "float32" else "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        """Of what the artefact takes and gives."""
        return torch.bfloat16 if self.precision in ("fp8", "int8") else getattr(torch, self.precision)


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Size and hash of every file below `folder` but its manifest, by relative path; the files are synced."""
    found: dict[str, FileEntry] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
            continue
        name = path.relative_to(folder).as_posix()
        if name in UNLISTED:
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[name] = FileEntry(num_bytes=path.stat().st_size, sha256=digest)
    return found


def write_manifest(folder: Path, manifest: Manifest, key: Path | None = None) -> None:
    """Write `manifest.json`, the last file of a new artefact, and before it its signature with a private key."""
    text = manifest.model_dump_json(indent=2) + "\n"
    if key is not None:
        sign(text.encode(), key, folder)
    write_text(folder / MANIFEST, text)


def read_manifest(folder: Path, key: Path | None = None) -> Manifest:
    """The manifest of an artefact, without a look at its files. With a public key it must be signed by its owner, and
    is not parsed before that is known.

    Raises `InputError` where there is none, or one of another format version; `InputErrors` for every bad field.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; give the folder that `clora export` wrote")
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{folder}: has no {MANIFEST}, so it is no artefact; give a folder that `clora export` wrote")
    text = read_text(path)
    if key is not None:
        check_signature(text.encode(), key, folder)
    try:
        raw = parse_json(text)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error}); export again") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format version {version!r}, this clora reads {FORMAT_VERSION}; export again")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        faults = [(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors()]
        raise InputErrors([f"{path}: {place}: {message}; export again" for place, message in faults]) from error


def check_folder(folder: Path, key: Path | None = None) -> Manifest:
    """The manifest of an artefact whose every file is whole; nothing but hashes is made of them. `key`: as in
    `read_manifest`.

    Raises `InputErrors` with every file that is missing, cut off, changed, unlisted, a link, or not in the folder.
    """
    manifest = read_manifest(folder, key)
    faults = [fault for name in manifest.files if (fault := _path_fault(name)) is not None]
    raise_faults([f"{folder / MANIFEST}: {fault}; export again" for fault in faults])
    faults = [fault for name, entry in manifest.files.items() if (fault := _file_fault(folder, name, entry))]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in manifest.files and name not in UNLISTED and (path.is_symlink() or not path.is_dir()):
            faults.append(f"{name} is not in {MANIFEST}; remove it")
    raise_faults([f"{folder}: {fault}" for fault in faults])
    return manifest


def _path_fault(name: str) -> str | None:
    """Why a listed name is no plain path inside the folder."""
    path = PurePosixPath(name)
    plain = name == path.as_posix() and name != "." and "\\" not in name and "\0" not in name and ":" not in name
    if not plain or path.is_absolute() or ".." in path.parts or name in UNLISTED:
        return f"names the file {name!r}, which is not inside the folder"
    return None


def _file_fault(folder: Path, name: str, entry: FileEntry) -> str | None:
    """What is wrong with one listed file."""
    place = folder
    for part in PurePosixPath(name).parts[:-1]:
        place = place / part
        if place.is_symlink():
            return f"{name} lies behind the link {place.name}; export again"
    try:
        handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return f"{name} is missing; copy the whole folder, or export again"
    except OSError as error:
        return f"{name} cannot be read or is a link ({error.strerror}); export again"
    if not stat.S_ISREG((status := os.fstat(handle)).st_mode):
        os.close(handle)
        return f"{name} is no regular file; export again"
    with os.fdopen(handle, "rb") as file:
        if status.st_size != entry.num_bytes:
            return f"{name} has {status.st_size} bytes, {MANIFEST} says {entry.num_bytes}; copy it again"
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            return f"{name} is not what was exported (its SHA-256 differs); export again"
    return None
