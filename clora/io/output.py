"""Where results go: a place is checked before the work, and a file is complete or not there at all."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from pathlib import Path

from clora.errors import InputError, WriteError

FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "it is too large here"}
WRONG_PLACE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EINVAL, errno.EEXIST,
}  # fmt: skip


def check_output(path: Path) -> None:
    """Raise `InputError` where no file can be written at `path`; nothing is made or changed.

    A folder that is not there yet is none of a fault, as long as it can be made.
    """
    if "\0" in str(path):
        raise InputError(f"output: {str(path)!r} is no path; correct it")
    if os.path.isdir(path):
        raise InputError(f"output: {path} is a folder, where a file is to be written; name a file in it")
    # Any folder on the way may be missing.
    above = next(parent for parent in Path(os.path.abspath(path)).parents if os.path.lexists(parent))
    if not os.path.isdir(above):
        raise InputError(f"output: {path} cannot be made, because {above} is no folder; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"output: {path} cannot be made, because {above} may not be written to; choose another place")
    longest = os.pathconf(above, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in path.parts):
        raise InputError(f"output: {path} cannot be made, its name is longer than {longest} bytes; shorten it")


def prepare_folder(folder: Path) -> None:
    """Make a folder for results and see that a file can be written in it.

    Raises `InputError` for a place where none can, `WriteError` for a full disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clora-") as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        raise output_error(folder, error) from error


def write_output(path: Path, content: bytes) -> None:
    """Write a whole file under another name, which then takes the place of `path`; raises as `prepare_folder` does."""
    # The name does not grow with that of the file, which may be as long as the file system allows.
    temporary = path.parent / f".clora-{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            file.write(content)
        temporary.replace(path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)  # of a write that was cut off


def output_error(path: Path, error: OSError) -> InputError | WriteError:
    """What an `OSError` met in writing `path` means to a user: a wrong place, or a disk that does not take it."""
    if error.errno in WRONG_PLACE:
        return InputError(f"output: {path} cannot be written ({error.strerror}); choose another place")
    why = FULL.get(error.errno or 0, error.strerror or str(error))
    return WriteError(f"output: {path} could not be written, {why}; make room, or write elsewhere")
