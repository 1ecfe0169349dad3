"""The C++ test programs of csrc/tests in a plain build; `make sanitize` runs them instrumented, and for longer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def build(name: str, folder: Path, *sources: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None, "clora is built with a C++ compiler, so there is one"
    program = folder / name
    files = [CSRC / "tests" / f"{name}.cpp", *(CSRC / source for source in sources)]
    command = [compiler, "-std=c++20", "-O0", "-D_GLIBCXX_ASSERTIONS", "-pthread", "-o", program, *files]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=200)
    return program


def run(program: Path, *arguments: object) -> str:
    found = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr + found.stdout
    return found.stdout


@pytest.mark.slow
def test_step_queue_answers_every_request_once_under_eight_threads(tmp_path: Path) -> None:
    program = build("queue_stress", tmp_path, "step_queue.cpp")
    for seed in range(3):
        said = run(program, 2000, 8, seed)
        assert said.startswith("2000 requests: ")
        # All kinds of answers are among them.
        numbers = [int(part.split()[0]) for part in said.split(": ")[1].split(";")[0].split(", ")]
        assert sum(numbers) == 2000 and min(numbers) > 0


@pytest.mark.slow
def test_read_safetensors_answers_or_refuses_whatever_the_bytes(tmp_path: Path) -> None:
    program = build("safetensors_fuzz", tmp_path, "safetensors.cpp", "json.cpp")
    assert ", 0 wrong" in run(program, tmp_path, 1500)
