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

    def request(name: str) -> ExportRequest:
        return ExportRequest(tmp_path / name, "merged", str(base), lora, num_edits=1)

    export(request("first"))  # imports what the children use
    context, killed, took, attempts = multiprocessing.get_context("fork"), 0, 60.0, 0
    while killed < KILLS and attempts < 3 * KILLS:
        name, attempts = f"a{attempts}", attempts + 1
        child, started = context.Process(target=export, args=(request(name),)), time.perf_counter()
        child.start()
        child.join(took * (killed + 0.5) / KILLS)
        if child.is_alive() and child.pid is not None:
            os.kill(child.pid, signal.SIGKILL)
            killed += 1
        else:  # done before its moment: the moments follow what an export takes on this machine now
            took = time.perf_counter() - started
        child.join()
        if (tmp_path / name).exists():
            check_folder(tmp_path / name)
        for left in tmp_path.glob(f".{name}.*"):
            if (left / MANIFEST).exists():  # killed between its last file and its name
                check_folder(left)
            else:
                with pytest.raises(InputError, match="has no manifest.json, so it is no artefact"):
                    check_folder(left)
    assert killed == KILLS
