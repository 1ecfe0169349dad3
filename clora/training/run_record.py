"""What made a result: versions, revision, configuration, and hashes of everything that was read."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from clora.config import Config, Job
from clora.io.atomic import write_text
from clora.training import distributed

RUN_FORMAT_VERSION = 1
_PACKAGES = ("clora", "torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "triton")


def git_revision() -> str | None:
    """The commit that the code is at, with `-dirty` after it where files differ; None outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str | None]:
    """Python, the packages that decide numbers (None where one is not installed), CUDA and the device."""
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def write_run(config: Config, job: Job, identity: Mapping[str, str]) -> None:
    """`output_dir/run-JOB.json`: what this run is made of. The main process writes it."""
    if not distributed.is_main():
        return
    record: dict[str, Any] = {
        "format_version": RUN_FORMAT_VERSION,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_revision": git_revision(),
        "versions": versions(),
        "processes": distributed.world_size(),
        "fingerprint": config.fingerprint(job, distributed.world_size()),
        "sha256": dict(identity),
        "config": config.model_dump(mode="json"),
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(config.output_dir / f"run-{job}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
