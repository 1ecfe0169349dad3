"""Errors that a user can mend. The command line prints them without a traceback and exits with code 2."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path


class InputError(ValueError):
    """A fault in the user's input: says what is wrong, where (file, key or field) and the mend."""

    @property
    def faults(self) -> list[str]:
        """Every fault, a sentence each."""
        return [str(self)]


class InputErrors(InputError):
    """Every fault found in one pass over the user's input, none hidden behind the first."""

    def __init__(self, faults: Sequence[str]) -> None:
        self._faults = list(faults)
        super().__init__("\n".join(self._faults))

    @property
    def faults(self) -> list[str]:
        return list(self._faults)


def raise_faults(faults: Sequence[str]) -> None:
    """Raise `InputErrors` when `faults` is not empty."""
    if faults:
        raise InputErrors(faults)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, None where none is."""
    return next(iter(get_close_matches(name, list(known), 1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    names = list(known)
    near = nearest(name, names)
    return f"did you mean {near!r}?" if near else f"known: {', '.join(names) or 'none'}"


def missing_files(what: str, named: Iterable[tuple[str, Path]], beside: Path) -> list[str]:
    """One sentence for each folder in which files are missing; `named` are configuration keys with their files.

    Paths below `beside`, the folder of the configuration file, are shown as the user wrote them.
    """
    by_folder: dict[Path, list[tuple[str, Path]]] = {}
    for key, path in named:
        by_folder.setdefault(path.parent, []).append((key, path))
    faults: list[str] = []
    for folder, missing in by_folder.items():
        key, path = missing[0]
        if len(missing) == 1:
            faults.append(f"{key}: {what} {shown_path(path, beside)} is missing; put it there or correct the path")
        else:
            faults.append(
                f"{len(missing)} {what}s missing under {shown_path(folder, beside)}/, first: {path.name} ({key});"
                " put them there or correct the paths"
            )
    return faults


def shown_path(path: Path, beside: Path) -> str:
    """A path as the user wrote it where it lies below `beside`, the configuration file's folder, else in full."""
    return str(path.relative_to(beside)) if path.is_relative_to(beside) else str(path)


def first_line(error: BaseException) -> str:
    """What an error says in its first line; a library's may go on with a backtrace, or say nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state is saved. `code` is the exit code to use (128 + signal)."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        self.code = 128 + signum
        super().__init__(f"stopped by {signal.Signals(signum).name}; saved {checkpoint}; go on with --resume latest")


class Stopped(Exception):
    """Ctrl-C ended a command whose results so far are on the disk: says how many, and how to get the rest."""


class WriteError(Exception):
    """A disk that does not take a result (it is full, or fails): says which one, and the mend."""


class ParityError(Exception):
    """An artefact that is not equal enough to the eager model: says what was measured, the bar, and the mend."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not finite: nothing was updated."""


class ProcessLost(RuntimeError):
    """Another process died or hangs: what was to be exchanged with it did not come."""
