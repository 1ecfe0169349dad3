"""Errors that a user can mend. The command line prints them without a traceback and exits with code 2."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """One fault in the user's input: says what is wrong, where (file, key or field) and the mend."""


class InputErrors(InputError):
    """Every fault found in one pass over the user's input, none hidden behind the first."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


def raise_faults(faults: Sequence[str]) -> None:
    """Raise `InputErrors` when `faults` is not empty."""
    if faults:
        raise InputErrors(faults)
