"""A job's figures: `log.jsonl`, and TensorBoard or wandb where asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from clora.io.atomic import write_text

Figures = Mapping[str, float | Tensor]
SHORT_STAGE = 50  # steps below which a curve of every tenth says nothing


class Tracker:
    """Writes figures to `folder/log.jsonl` and to a board (`report_to`: none, tensorboard or wandb, offline).

    A line holds the means since the line before; it comes every `log_every` steps, at the end of each stage and at step
    `last`, and at every step of a stage of fewer than 50. `stages`: the steps before which one begins. `step`: the one
    a run goes on from, with `sums` as they were then. With `writes` False figures are only summed: of several
    processes one writes.

    A line that the disk refuses is kept and written with the next one; `faults` says why, once.
    """

    def __init__(
        self,
        title: str,
        folder: Path,
        report_to: str = "none",
        log_every: int = 1,
        last: int = 0,
        step: int = 0,
        sums: Mapping[str, list[float]] | None = None,
        writes: bool = True,
        stages: Sequence[int] = (),
    ) -> None:
        self._title, self._folder = title, folder
        self._report_to = report_to if writes else "none"
        self._log_every, self._last, self._writes = log_every, last, writes
        edges = sorted({stage for stage in stages if stage < last} | {last}) if stages else []
        self._ends = set(edges[1:])
        self._short = [(start, end) for start, end in pairwise(edges) if end - start < SHORT_STAGE]
        self.sums = {name: list(values) for name, values in (sums or {}).items()}
        self.faults: list[str] = []
        self._waiting: list[str] = []
        self._board: Any = None
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        _drop_rows_after(self._path, step)
        if self._report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        elif self._report_to == "wandb":
            import wandb

            self._board = wandb.init(project="clora", name=title, dir=str(folder), mode="offline")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            (self._board.close if self._report_to == "tensorboard" else self._board.finish)()

    def log(self, step: int, seconds: float, figures: Figures) -> None:
        """Take one step's figures in."""
        for name, value in figures.items():
            self.sums.setdefault(name, []).append(float(value))
        if not self._is_due(step):
            return
        means = {name: sum(values) / len(values) for name, values in self.sums.items()}
        self.sums.clear()
        if not self._writes:
            return
        self._write(json.dumps({"step": step, "seconds": round(seconds, 3), **means}) + "\n")
        if self._report_to == "tensorboard":
            for name, value in means.items():
                self._board.add_scalar(name, value, step)
        elif self._board is not None:
            self._board.log(means, step=step)

    def _is_due(self, step: int) -> bool:
        if step % self._log_every == 0 or step == self._last or step in self._ends:
            return True
        return any(start < step <= end for start, end in self._short)

    def _write(self, line: str) -> None:
        self._waiting.append(line)
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as file:
                file.write("".join(self._waiting))
        except OSError as error:
            if len(self._waiting) == 1:
                self.faults.append(f"{self._path}: {error.strerror or error}; its lines are kept until they fit")
            with suppress(OSError):
                os.truncate(self._path, size)  # no torn line stays
        else:
            self._waiting.clear()

    def image(self, name: str, image: Any, step: int) -> None:
        """A PIL image, as `samples/NAME-STEP.png` and on the board."""
        path = self._folder / "samples" / f"{name}-{step:06d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            image.save(path)
        except OSError as error:  # a picture is not worth the run
            path.unlink(missing_ok=True)
            self.faults.append(f"{path}: {error.strerror or error}; this picture is left out")
        if self._report_to == "tensorboard":
            import numpy as np

            self._board.add_image(name, np.asarray(image), step, dataformats="HWC")


def read_log(folder: Path) -> list[dict[str, float]]:
    """The rows of a job's `log.jsonl`; empty when there is none."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _drop_rows_after(path: Path, step: int) -> None:
    """Steps that will be done again are logged once; so is a line that was cut off when the process died."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        rows = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if rows != lines:
            write_text(path, "".join(rows))
