"""The OpenAPI document against what the server does: whatever it allows is answered as it says, and nothing breaks.

Skipped where schemathesis is not installed (pip install schemathesis).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clora.serve.service import Service
from tests.serve.conftest import listening

PROGRAM = Path(sys.executable).parent / "schemathesis"

# What it cannot know: that a well-formed picture, a name of an effect, a job's number are needed (so that data of the
# right types is refused), and that a job of an earlier call is over.
LEFT_OUT = ("positive_data_acceptance",)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="needs schemathesis")
def test_schemathesis_finds_nothing(make_service: Callable[..., Service], tmp_path: Path) -> None:
    limits = {"requests_per_minute": 1_000_000, "burst": 1_000_000, "concurrent": 1000}
    with listening(make_service(limits=limits)) as address:
        command = [PROGRAM, "run", f"{address}/openapi.json", "--max-examples", "30", "--seed", "1", "--no-color"]
        command += ["--exclude-checks", ",".join(LEFT_OUT), "--workers", "1"]
        found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
