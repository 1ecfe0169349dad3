"""Targets: the teacher sampled as `targets` says, made once, and anew only when what they are made from changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from clora.config import Config
from clora.data.examples import collate
from clora.distill import targets
from clora.distill.check import check_teaching
from clora.distill.opened import Workspace
from clora.distill.targets import make_targets
from clora.distill.workspace import open_workspace
from clora.inference.sampling import Sampling, sample
from tests.support.small_job import make_config, write_dataset

QUIET = Console(quiet=True)
HASHES = {"warm": "0" * 64, "cold": "1" * 64}


def opened(config: Config) -> Workspace:
    """A workspace on the effects' sources alone; nothing is asked of their teachers."""
    return open_workspace(check_teaching(config, config.effects), QUIET)


def no_teacher(effects: Any) -> list[None]:
    return [None] * len(effects)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def made_anew(config: Config, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many images `make_targets` samples."""
    count = 0

    def counted(backbone: Any, cond: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal count
        count += cond.batch_size
        return sample(backbone, cond, *args, **kwargs)

    workspace = opened(config)
    with monkeypatch.context() as patched:
        patched.setattr(targets, "sample", counted)
        make_targets(workspace, no_teacher, HASHES, QUIET, 4)
    return count


def test_make_targets_samples_by_targets_and_not_by_the_objective(
    random_base: Path, dataset: Path, tmp_path: Path
) -> None:
    told = ["targets.guidance=3", "targets.shift=2", "targets.per_source=2", "objective.guidance_rescale=none"]
    workspace = opened(make_config(random_base, dataset, tmp_path / "run", *told))
    filled = make_targets(workspace, no_teacher, HASHES, QUIET, 4)
    example = filled["cold"][1]
    assert len(example.y) == 2 and not torch.equal(*example.y)
    cond, uncond = (collate([example], role, workspace.backbone.device) for role in ("teacher", "negative"))
    for draw in range(2):
        (seed,) = [targets.noise_seed(key) for key in [targets._keys(workspace, example, HASHES)[draw]]]
        args = workspace.backbone, cond, [None]
        wanted = sample(*args, Sampling("euler", 2, 2.0, 3.0, "norm", ""), [seed], uncond)[0]
        torch.testing.assert_close(example.y[draw], wanted, rtol=0, atol=1e-4)
        for other in (Sampling("euler", 2, 2.0, 3.0, "none", ""), Sampling("euler", 2, 3.0, 3.0, "norm", "")):
            assert (sample(*args, other, [seed], uncond)[0] - wanted).abs().max() > 1e-3


def test_make_targets_are_made_anew_when_their_settings_change(
    random_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def anew(*overrides: str) -> int:
        return made_anew(make_config(random_base, dataset, tmp_path / "run", *overrides), monkeypatch)

    assert anew() == 6 and anew() == 0
    assert anew("objective.guidance_rescale=norm", "schedule.shift=5") == 0
    assert anew("targets.shift=5") == 6
    assert anew("targets.guidance_rescale=none") == 6
    assert anew("targets.per_source=2") == 12 - 6 + 6  # the batch is sampled whole where one of its images lacks
