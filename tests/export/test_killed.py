"""A killed export leaves nothing that looks whole, whenever it is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from clora.errors import InputError
from clora.export.manifest import MANIFEST, check_folder
from clora.jobs.export import ExportRequest, export

KILLS = 10


@pytest.mark.slow
def test_export_killed_at_any_moment_is_whole_or_not_there(one_block: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = one_block
    started = time.perf_counter()
    export(ExportRequest(tmp_path / "first", "merged", str(base), lora, num_edits=1))
    took = time.perf_counter() - started
    context, killed, finished = multiprocessing.get_context("fork"), 0, 0
    for number in range(KILLS):
        output = tmp_path / f"a{number}"
        request = ExportRequest(output, "merged", str(base), lora, num_edits=1)
        child = context.Process(target=export, args=(request,))
        child.start()
        child.join(took * (number + 0.5) / KILLS)
        if child.is_alive() and child.pid is not None:
            os.kill(child.pid, signal.SIGKILL)
            killed += 1
        child.join()
        if output.exists():
            check_folder(output)
            finished += 1
        for left in tmp_path.glob(f".a{number}.*"):
            if (left / MANIFEST).exists():  # killed between its last file and its name
                check_folder(left)
            else:
                with pytest.raises(InputError, match="has no manifest.json, so it is no artefact"):
                    check_folder(left)
    assert killed >= KILLS // 2
