"""`clora-sample`: the C++ program beside the extension, under a name on PATH."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path


def program() -> Path:
    """The program itself, which needs no Python: copy its path to run it without."""
    spec = find_spec("clora._C")
    if spec is None or spec.origin is None:
        raise SystemExit("clora-sample: clora is not built here; install it again")
    return Path(spec.origin).parent / "bin" / "clora-sample"


def main() -> None:
    """Become the program, with the same arguments."""
    path = str(program())
    os.execv(path, [path, *sys.argv[1:]])
