"""A job in a process of its own that ends itself (SIGKILL) at a chosen moment inside a write."""

from __future__ import annotations

import gc
import os
import signal
import stat
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.processes import SERVER

KINDS = ("half written", "not yet renamed", "just renamed")


class Moment(NamedTuple):
    """Inside write number `count` (from 1) of the files with `part` in their path; `kind` is one of `KINDS`."""

    part: str
    count: int
    kind: str


def start(job: Callable[..., Any], arguments: tuple[Any, ...], moment: Moment | None) -> BaseProcess:
    """Start a process that runs `job(*arguments)` and dies at `moment`, if it comes there."""
    process: BaseProcess = SERVER.Process(target=_run, args=(job, arguments, moment))
    process.start()
    return process


def _run(job: Callable[..., Any], arguments: tuple[Any, ...], moment: Moment | None) -> None:
    gc.freeze()
    if moment is not None:
        _lay_in_wait(moment)
    job(*arguments)


def _lay_in_wait(moment: Moment) -> None:
    fsync, replace, seen = os.fsync, os.replace, []

    def is_it(path: str) -> bool:
        if moment.part in path:
            seen.append(path)
        return moment.part in path and len(seen) == moment.count

    def synced(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode) and is_it(str(Path(f"/proc/self/fd/{handle}").readlink())):
            os.truncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    def renamed(source: Any, target: Any) -> None:
        chosen = is_it(str(target))
        if chosen and moment.kind == KINDS[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if chosen:
            os.kill(os.getpid(), signal.SIGKILL)

    if moment.kind == KINDS[0]:
        os.fsync = synced
    else:
        os.replace = renamed
