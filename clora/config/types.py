"""The types of configuration values: paths, numbers within limits, names of choices."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo


def beside_the_file(path: Path, info: ValidationInfo) -> Path:
    """Make a relative path absolute from the folder of the configuration file (`~` is the home folder)."""
    folder = (info.context or {}).get("folder")
    path = path.expanduser()
    return path if folder is None else Path(os.path.normpath(Path(folder) / path))


UserPath = Annotated[Path, AfterValidator(beside_the_file)]

Acceleration = Annotated[Literal["base"] | UserPath | None, Field(union_mode="left_to_right")]

Text = Annotated[str, Field(min_length=1)]

Count = Annotated[int, Field(ge=1)]

StepCounts = Annotated[list[Count], Field(min_length=1)]

Suffixes = Annotated[list[Text], Field(min_length=1)]

Natural = Annotated[int, Field(ge=0)]

Rank = Annotated[int, Field(ge=1, le=1024)]

Positive = Annotated[float, Field(gt=0)]

NonNegative = Annotated[float, Field(ge=0)]

Share = Annotated[float, Field(ge=0, le=1)]

Decay = Annotated[float, Field(ge=0, lt=1)]

Guidance = Annotated[float, Field(ge=1)]

EffectName = Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]

Url = Annotated[str, Field(pattern=r"^https?://")]

LrScheduler = Literal["constant", "cosine", "linear"]

TargetSource = Literal["teachers", "pairs"]

SaveDtype = Literal["bfloat16", "float16", "float32"]

TsSigma = Literal["continuous", "schedule"]

TaFmSigma = Literal["uniform", "shifted", "above_dmd"]

Rescale = Literal["none", "norm"]

DmdNorm = Literal["sample", "none"]

Imitation = Literal["segment_mean", "same_step"]
CoarseTarget = Literal["images", "velocity"]
CoarseOptimizer = Literal["adamw", "muon"]

Sampler = Literal["consistency", "euler"]

Tracker = Literal["none", "tensorboard", "wandb"]

Quantize = Literal["none", "int8"]

Kernels = Literal["auto", "reference", "fused"]

Job = Literal["train", "teach", "joint", "extend"]

Preset = Literal["clora", "paper", "authors", "tiny", "segment_mean", "same_step", "imitation_dmd"]


def repeats(what: str, values: Iterable[str]) -> list[str]:
    """A fault for each value that comes up more than once, whatever its case."""
    spelled = list(values)
    counts = Counter(text.casefold() for text in spelled)
    repeated = sorted({text.casefold() for text in spelled if counts[text.casefold()] > 1})
    return [f"{what} '{text}' is used by {counts[text]} effects; rename all but one" for text in repeated]
