"""`clora verify`: is an artefact whole, and equal to the eager model on this machine?"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from clora.export.artefact import check_fit, why_unmeasured
from clora.export.manifest import check_folder
from clora.export.verify import Parity, compare


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
