"""clora-sample: the C++ program makes what Python makes, in an empty environment, and refuses damaged files."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clora.cli.sample_program import program

RNG = np.random.default_rng(0)
PROGRAM = os.environ.get("CLORA_SAMPLE") or str(program())  # `make sanitize` names a build of its own


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In an empty environment: no Python, no library path."""
    command = [PROGRAM, *map(str, arguments)]
    return subprocess.run(command, env={}, capture_output=True, text=True, timeout=120)


def refused(path: Path, package: object = "none.pt2") -> str:
    """What the program says of a file of conditions; no package is loaded."""
    output = path.with_suffix(".out")
    found = run("--package", package, "--sigmas", "1,0.5", "--conditions", path, "--output", output)
    assert found.returncode == 2 and found.stdout == "" and not path.with_suffix(".out").exists()
    assert found.stderr.count("\n") == 1 and found.stderr.startswith(f"clora-sample: {path}: ")
    return found.stderr


def some_conditions() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "refs": torch.randn(2, 3, 8, generator=rng),
        "text": torch.randn(2, 4, 5, generator=rng),
        "cos": torch.randn(13, 2, generator=rng),
        "sin": torch.randn(13, 2, generator=rng),
        "text_len": torch.tensor([4, 2]),
        "seed": torch.tensor([1, 2]),
        "grid": torch.tensor([2, 3]),
    }


def write_package(path: Path, **changed: str) -> Path:
    """A package without code, which says what it takes as `export.aoti` does: the sizes of `some_conditions`."""
    says = {"batch": "2", "tokens": "6", "text": "4", "channels": "8", "text_width": "5", "angles": "2"}
    says |= {"dtype": "float32"} | changed
    place = "model/data/aotinductor/model/x.wrapper_metadata.json"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("model/archive_format", "pt2")
        file.writestr(place, json.dumps({f"clora_{name}": value for name, value in says.items() if value}))
    return path


def assemble(header: bytes | dict[str, Any], data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "header longer than the file": (assemble(b"{}", b"", 3), "header has 3 bytes"),
    "header of 2^64 - 1 bytes": (assemble(b"{}", b"", 2**64 - 1), "more than there are or may be"),
    "header of 2^63 bytes": (assemble(b"{}", b"", 2**63), "more than there are or may be"),
    "header of two megabytes": (assemble(b"{" + b" " * (2 << 20) + b"}", b""), "more than there are or may be"),
    "no JSON": (assemble(b"not json", b""), "its JSON is damaged at byte 0"),
    "a list": (assemble(b"[]", b""), "expected {"),
    "no header": (assemble(b"", b""), "expected {"),
    "JSON cut off": (assemble(b'{"a":{"dtype":"F32","shape":[2', b""), "its JSON is damaged"),
    "JSON with a tail": (assemble(b"{} x", b""), "more after its end"),
    "a string without an end": (assemble(b'{"a', b""), "a string without an end"),
    "half a surrogate": (assemble(b'{"\\ud800":1}', b""), "half a surrogate pair"),
    "a control character": (assemble(b'{"a\n":1}', b""), "a control character"),
    "a key twice": (assemble(b'{"a":{"dtype":"F32","dtype":"F32"}}', b""), "a key twice"),
    "a tensor twice": (
        assemble(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"0"),
        "a key twice",
    ),
    "deep metadata": (assemble(b'{"__metadata__":' + b'{"a":' * 5000, b""), "JSON is damaged"),
    "metadata that is no text": (assemble({"__metadata__": {"a": 1}}, b""), "JSON is damaged"),
    "unknown dtype": (assemble({"a": entry("F31")}, b"0" * 8), "unknown dtype 'F31'"),
    "a name that would write to a terminal": (assemble({"\x1b[2J\u00e9": entry()}, b""), "tensor '?[2J??' outside"),
    "unknown field": (assemble({"a": entry(extra=1)}, b"0" * 8), "unknown field 'extra'"),
    "no shape": (assemble({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"0" * 8), "without dtype, shape"),
    "negative size": (assemble({"a": entry(shape=[-2])}, b"0" * 8), "expected a number"),
    "a fraction for a size": (assemble({"a": entry(shape=[2.0])}, b"0" * 8), "expected a whole number"),
    "a size of twenty digits": (assemble({"a": entry(shape=[10**19])}, b"0" * 8), "a number too large"),
    "sizes that overflow": (assemble({"a": entry(shape=[2**40, 2**40, 2])}, b"0" * 8), "not what its shape"),
    "sizes that overflow to right": (assemble({"a": entry(shape=[2**32, 2**30, 2])}, b""), "outside of its 0 bytes"),
    "offsets beyond the data": (assemble({"a": entry()}, b"0" * 7), "outside of its 7 bytes"),
    "offsets in reverse": (assemble({"a": entry(offsets=[8, 0])}, b"0" * 8), "outside of its 8 bytes"),
    "three offsets": (assemble({"a": entry(offsets=[0, 4, 8])}, b"0" * 8), "data_offsets that are not two"),
    "bytes for another shape": (assemble({"a": entry(shape=[3])}, b"0" * 8), "not what its shape and dtype need"),
    "overlap": (assemble({"a": entry(), "b": entry(offsets=[4, 12])}, b"0" * 12), "overlap or leave a hole"),
    "the same bytes twice": (assemble({"a": entry(), "b": entry()}, b"0" * 8), "overlap or leave a hole"),
    "a hole": (assemble({"a": entry(), "b": entry(offsets=[12, 20])}, b"0" * 20), "overlap or leave a hole"),
    "a tail": (assemble({"a": entry()}, b"0" * 9), "1 bytes that belong to no tensor"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_clora_sample_refuses_a_damaged_file_in_one_sentence(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    path = tmp_path / "in.safetensors"
    path.write_bytes(content)
    assert message in refused(path)


def test_clora_sample_survives_files_with_flipped_bytes(tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    save_file(some_conditions(), path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(5):  # csrc/tests/safetensors_fuzz.cpp gives its reader thousands
        damaged = bytearray(whole)
        for place in RNG.integers(0, header, RNG.integers(1, 4)):
            damaged[place] = RNG.integers(0, 256)
        if RNG.random() < 0.3:
            damaged = damaged[: RNG.integers(0, len(damaged))]
        path.write_bytes(damaged)
        found = run("--package", "none.pt2", "--sigmas", "1", "--conditions", path, "--output", tmp_path / "out")
        # 2: refused, 1: taken, and the package then missing; a crash has another.
        assert found.returncode in (1, 2) and found.stderr.startswith("clora-sample: "), found.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"refs": None}, "has no tensor 'refs'"),
        ({"refs": torch.zeros(2, 24)}, "'refs' is no floating point tensor of 3 dimensions"),
        ({"seed": torch.tensor([1.0, 2.0])}, "'seed' is no I64 tensor of 1 dimensions"),
        ({"seed": torch.tensor([1])}, "has 1 seeds for a batch of 2"),
        ({"text_len": torch.tensor([5, 1])}, "'text_len' is not within its 'text'"),
        ({"text": torch.zeros(1, 4, 5)}, "are not of one batch"),
        ({"cos": torch.zeros(12, 2)}, "not the positions of its tokens"),
        ({"grid": torch.tensor([0, 3])}, "'grid' is no grid of tokens"),
        ({"grid": torch.tensor([2**62, 2**62])}, "'grid' is no grid of tokens"),
        ({"noise": torch.zeros(2, 6, 4)}, "'noise' does not fit its 'refs'"),
        ({"cos": torch.zeros(13, 2, dtype=torch.uint8)}, "'cos' is of dtype U8"),
    ],
)
def test_clora_sample_names_what_does_not_fit(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    save_file({k: v for k, v in (some_conditions() | changed).items() if v is not None}, path)
    assert message in refused(path)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ({"channels": "64"}, "its 'refs' is of width 8, the package takes 64"),
        ({"text_width": "32"}, "its 'text' is of width 5, the package takes 32"),
        ({"angles": "8"}, "its 'cos' is of width 2, the package takes 8"),
        ({"batch": "1"}, "its batch of 2 is beyond the package's 1"),
        ({"tokens": "5"}, "its result of 6 tokens, the package takes 2 to 5"),
        ({"text": "3"}, "its text of 4 tokens, the package takes 2 to 3"),
        ({"dtype": "bfloat16"}, "its network is asked for in Float, the package is in BFloat16"),
    ],
)
def test_clora_sample_refuses_sizes_that_the_package_does_not_take(
    package: dict[str, str], message: str, tmp_path: Path
) -> None:
    """The compiled code would read beyond the ends of such tensors."""
    path = tmp_path / "in.safetensors"
    save_file(some_conditions(), path)
    assert message in refused(path, write_package(tmp_path / "model.pt2", **package))


def test_clora_sample_refuses_a_package_that_does_not_say_its_sizes(tmp_path: Path) -> None:
    path, package = tmp_path / "in.safetensors", write_package(tmp_path / "model.pt2", batch="")
    save_file(some_conditions(), path)
    found = run("--package", package, "--sigmas", "1", "--conditions", path, "--output", tmp_path / "out")
    assert found.returncode == 2
    assert found.stderr == f"clora-sample: {package}: does not say what sizes it takes; export again\n"


@pytest.mark.skipif("CLORA_SAMPLE" in os.environ, reason="a sanitizer's own tables take more memory than may be had")
def test_clora_sample_draws_no_noise_for_a_grid_that_does_not_fit(tmp_path: Path) -> None:
    """A file of a kilobyte asks for the noise of 16 million tokens: half a gigabyte, and as much again to order it. It
    is refused where no more than 300 MB may be taken."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (300 << 20, 300 << 20))

    path = tmp_path / "in.safetensors"
    save_file(some_conditions() | {"grid": torch.tensor([4096, 4096])}, path)
    command = [PROGRAM, "--package", "none.pt2", "--sigmas", "1", "--conditions", str(path), "--output", "out"]
    found = subprocess.run(command, env={}, capture_output=True, text=True, preexec_fn=limit)
    assert found.returncode == 2 and "not the positions of its tokens" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --artefact or --package"),
        (["--artefact", "a", "--package", "b"], "give --artefact or --package"),
        (["--package", "a"], "--package needs --sigmas"),
        (["--package", "a", "--sigmas", "1"], "--conditions is missing"),
        (["--artefact", "a", "--sampler", "euler"], "--sampler is the artefact's own; leave it out"),
        (["--artefact"], "--artefact needs one value"),
        (["--what", "a"], "unknown option '--what'"),
        (["--package", "a", "--sigmas", "1,x", "--conditions", "a", "--output", "b"], "is no list like 1,0.9,0.75"),
        (
            ["--package", "a", "--sigmas", "1", "--conditions", "a", "--output", "b", "--threads", "abc"],
            "--threads: 'abc' is no whole number from 1 to 1024",
        ),
        (["--package", "a", "--sigmas", "1", "--conditions", "a", "--output", "b", "--threads", "0"], "--threads: '0'"),
        (["--artefact", "/none", "--conditions", "a", "--output", "b"], "/none/manifest.json: is no regular file"),
    ],
)
def test_clora_sample_names_a_wrong_option(arguments: list[str], message: str) -> None:
    found = run(*arguments)
    assert found.returncode == 2 and message in found.stderr


def test_sample_program_is_installed_beside_the_extension() -> None:
    spec = find_spec("clora._C")
    assert spec is not None and spec.origin is not None
    assert program() == Path(spec.origin).parent / "bin" / "clora-sample"
    assert shutil.which(str(program())) is not None
    assert "usage: clora-sample" in run("--help").stdout


def test_clora_sample_refuses_a_package_that_is_not_the_manifests(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"x" * 1000)
    manifest = {
        "format": "aoti",
        "precision": "float32",
        "num_steps": 4,
        "shift": 3.0,
        "sampler": "consistency",
        "versions": {"numpy": "1", "torch": str(torch.__version__)},
        "platform": f"Linux x86_64 {torch.backends.cpu.get_cpu_capability()}",
        "files": {"a": {"num_bytes": 1}, "model.pt2": {"sha256": "0" * 64}},
        "parity": {"deep": [[{"a": [None, True, -1.5e-3, "\u00e9\U0001f600"]}]]},
    }

    def tried(**changed: Any) -> str:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | changed))
        found = run("--artefact", tmp_path, "--conditions", "none", "--output", "out")
        assert found.returncode == 2
        return found.stderr

    assert "model.pt2: is not what was exported (its SHA-256 differs); export again" in tried()
    assert "is of format 'onnx', not aoti" in tried(format="onnx")
    assert "was compiled for torch 1.0" in tried(versions={"torch": "1.0"})
    assert "was compiled for a CPU with ODD" in tried(platform="Linux x86_64 ODD")
    assert "its manifest has no schedule" in tried(num_steps=0)


@pytest.mark.parametrize("count", [0, 55, 56, 64, 1000, 1 << 20, (1 << 20) + 63])
def test_clora_sample_knows_a_file_by_its_hash(count: int, tmp_path: Path) -> None:
    """A right hash gets as far as the conditions; hashlib is the judge."""
    import hashlib

    content = RNG.bytes(count)
    (tmp_path / "model.pt2").write_bytes(content)
    manifest = {
        "format": "aoti",
        "precision": "float32",
        "num_steps": 4,
        "shift": 3.0,
        "sampler": "consistency",
        "versions": {"torch": str(torch.__version__)},
        "platform": f"Linux x86_64 {torch.backends.cpu.get_cpu_capability()}",
        "files": {"model.pt2": {"sha256": hashlib.sha256(content).hexdigest()}},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = run("--artefact", tmp_path, "--conditions", "none", "--output", "out")
    assert found.stderr == "clora-sample: none: is no regular file that can be read; write it again\n"
