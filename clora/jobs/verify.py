"""`clora verify`: is an artefact whole, and equal to the eager model on this machine?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from clora.export.artefact import check_fit, device_of, open_files, why_unmeasured
from clora.export.manifest import Manifest, check_folder
from clora.export.verify import Parity, verify

log = logging.getLogger(__name__)


def verify_artefact(
    folder: Path,
    base: str | None = None,
    num_edits: int = 3,
    seed: int = 0,
    console: Console | None = None,
    key: Path | None = None,
) -> Parity | str:
    """Check every file's hash, open the artefact, compare it with the eager model; what was measured, or why an
    artefact that is whole cannot be opened on this machine.

    Raises `InputErrors` for a folder that is not as it was exported, or was not signed with `key`: nothing of it is
    then loaded.
    """
    console = console or Console(stderr=True)
    with console.status("checking the files") as status:
        manifest = check_folder(folder, key)
        check_fit(folder, manifest)
        if why := why_unmeasured(manifest):
            return why
        return compare(folder, manifest, base, num_edits, seed, lambda what: status.update(what))


def compare(
    folder: Path, manifest: Manifest, base: str | None, num_edits: int, seed: int, on_part: Callable[[str], None]
) -> Parity:
    """`verify` for the checked files of an artefact, on its own device. In fp32, whose bar was measured on CPUs, and
    where a GPU has no room for the eager model too, that is on the CPU."""
    cpu, own = torch.device("cpu"), device_of(folder, manifest, None)
    if manifest.precision != "float32":
        try:
            return verify(open_files(folder, manifest, base, own), base, num_edits, seed, on_part)
        except torch.OutOfMemoryError:
            log.warning("%s: the GPU has no room for the eager model; it is compared on the CPU, which is slow", folder)
    artefact = open_files(folder, manifest, base, own if manifest.engine else cpu)
    return verify(artefact, base, num_edits, seed, on_part, cpu)
