"""A job's figures: `log.jsonl`, and TensorBoard or wandb where asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

Figures = Mapping[str, float | Tensor]


class Tracker:
    """Writes figures to `folder/log.jsonl` and to a board (`report_to`: none, tensorboard or wandb, offline).

    A line holds the means since the line before; it comes every `log_every` steps and at step `last`. `step`: the
    one a run goes on from.
    """

    def __init__(
        self, title: str, folder: Path, report_to: str = "none", log_every: int = 1, last: int = 0, step: int = 0
    ) -> None:
        self._title, self._folder, self._report_to = title, folder, report_to
        self._log_every, self._last = log_every, last
        self._sums: dict[str, list[float]] = {}
        self._board: Any = None
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        _drop_rows_after(self._path, step)
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        elif report_to == "wandb":
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
            self._sums.setdefault(name, []).append(float(value))
        if step % self._log_every and step != self._last:
            return
        means = {name: sum(values) / len(values) for name, values in self._sums.items()}
        self._sums.clear()
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "seconds": round(seconds, 3), **means}) + "\n")
        if self._report_to == "tensorboard":
            for name, value in means.items():
                self._board.add_scalar(name, value, step)
        elif self._board is not None:
            self._board.log(means, step=step)

    def image(self, name: str, image: Any, step: int) -> None:
        """A PIL image, as `samples/NAME-STEP.png` and on the board."""
        path = self._folder / "samples" / f"{name}-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        if self._report_to == "tensorboard":
            import numpy as np

            self._board.add_image(name, np.asarray(image), step, dataformats="HWC")


def read_log(folder: Path) -> list[dict[str, float]]:
    """The rows of a job's `log.jsonl`; empty when there is none."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _drop_rows_after(path: Path, step: int) -> None:
    """Steps that will be done again are logged once."""
    if path.exists():
        rows = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(row + "\n" for row in rows))
