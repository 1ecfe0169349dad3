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
    context, killed = multiprocessing.get_context("fork"), 0
    export(ExportRequest(tmp_path / "first", "merged", str(base), lora, num_edits=1))  # imports what the children use
    whole = context.Process(target=export, args=(ExportRequest(tmp_path / "whole", "merged", str(base), lora),))
    started = time.perf_counter()
    whole.start()
    whole.join()
    took = time.perf_counter() - started
    check_folder(tmp_path / "whole")
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
        for left in tmp_path.glob(f".a{number}.*"):
            if (left / MANIFEST).exists():  # killed between its last file and its name
                check_folder(left)
            else:
                with pytest.raises(InputError, match="has no manifest.json, so it is no artefact"):
                    check_folder(left)
    assert killed > 0  # how many depends on the machine's load; the first moment is a twentieth of the whole
