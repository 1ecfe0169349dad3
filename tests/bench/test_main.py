"""The list of benches: every module of bench/ that runs is on it, or is named as one that needs a folder."""

from __future__ import annotations

import re
from pathlib import Path

import bench.__main__ as listed

ROOT = Path(listed.__file__).parent
SESSION = "gpu_session"  # of bench/gpu.sh


def runnable() -> dict[str, str]:
    """The text of every module of bench/ that can be run, by its name after `bench.`."""
    texts = {path.relative_to(ROOT): path.read_text() for path in ROOT.rglob("*.py")}
    names = {".".join(path.with_suffix("").parts): text for path, text in texts.items() if '== "__main__"' in text}
    return {name: text for name, text in sorted(names.items()) if name not in ("__main__", SESSION)}


def needs_a_folder(text: str) -> bool:
    return re.search(r'add_argument\("--run"[^\n]*required=True', text) is not None


def test_benches_are_those_that_run_as_they_are() -> None:
    found = runnable()
    assert list(listed.BENCHES) == [name for name, text in found.items() if not needs_a_folder(text)]
    assert len(found) > len(listed.BENCHES) > 20


def test_the_docstring_names_the_benches_that_need_a_folder() -> None:
    named = re.findall(r"`(lab\.\w+)`", listed.__doc__ or "")
    assert named == [name for name, text in runnable().items() if needs_a_folder(text)]
