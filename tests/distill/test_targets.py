"""Targets: the teacher sampled as `targets` says, made once, and anew only when what they are made from changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console

from clora.config import Config, Sampler
from clora.data.examples import collate
from clora.distill import targets
from clora.distill.check import check_teaching
from clora.distill.opened import Workspace
from clora.distill.run import open_bank, targets_of
from clora.distill.targets import make_targets
from clora.distill.workspace import open_workspace
from clora.inference.sampling import Sampling, few_step_sampling, sample, teacher_sampling
from clora.io.digest import hash_files
from clora.jobs.teach import teach
from clora.lora.files import write_lora
from clora.lora.module import LoraModule
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
        make_targets(workspace, no_teacher, teacher_sampling(workspace.config), HASHES, QUIET, 4)
    return count


def test_make_targets_samples_by_targets_and_not_by_the_objective(
    random_base: Path, dataset: Path, tmp_path: Path
) -> None:
    told = ["targets.guidance=3", "targets.shift=2", "targets.per_source=2", "objective.guidance_rescale=none"]
    workspace = opened(make_config(random_base, dataset, tmp_path / "run", *told))
    filled = make_targets(workspace, no_teacher, teacher_sampling(workspace.config), HASHES, QUIET, 4)
    example = filled["cold"][1]
    assert len(example.y) == 2 and not torch.equal(*example.y)
    cond, uncond = (collate([example], role, workspace.backbone.device) for role in ("teacher", "negative"))
    for draw in range(2):
        (seed,) = [
            targets.noise_seed(key)
            for key in [targets._keys(workspace, example, teacher_sampling(workspace.config), HASHES)[draw]]
        ]
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


def test_keys_of_targets_differ_by_sampler(random_base: Path, dataset: Path, tmp_path: Path) -> None:
    """With an acceleration LoRA y are made by the schedule's sampler, and another one makes other images."""
    workspace = opened(make_config(random_base, dataset, tmp_path / "run"))
    example = workspace.effects["cold"][0]
    keys = {
        targets._keys(workspace, example, few_step_sampling(3, 3.0, sampler), HASHES)[0]
        for sampler in get_args(Sampler)
    }
    assert len(keys) == 2


def test_targets_of_with_an_acceleration_lora_are_of_the_stack_in_the_schedules_steps(
    random_base: Path, dataset: Path, tmp_path: Path
) -> None:
    """Eq. 3's deployment: each effect's own teacher and the acceleration LoRA, by the few-step sampler, the teacher's
    prompt; the adapters are then what they were."""
    told = [f"targets.acceleration={tmp_path / 'fast.safetensors'}"]
    config = make_config(random_base, dataset, tmp_path / "run", *told, "teach.learning_rate=1e-1")
    teach(config)
    workspace = opened(config)
    shapes, rng = workspace.adapters.module_shapes, torch.Generator().manual_seed(0)
    fast = {
        name: LoraModule(torch.randn(2, K, generator=rng), 0.02 * torch.randn(N, 2, generator=rng), 2.0)
        for name, (N, K) in shapes.items()
    }
    write_lora(tmp_path / "fast.safetensors", fast)
    bank = open_bank(workspace)
    assert bank is not None
    before = workspace.adapters.slot_names
    example = targets_of(workspace, bank, QUIET)["cold"][1]
    assert workspace.adapters.slot_names == before

    workspace.adapters.add_lora("fast", fast)
    hashes = hash_files({"cold": config.teacher_path(config.effects[1]), "fast": tmp_path / "fast.safetensors"})
    sampling, asked = few_step_sampling(3, config.schedule.shift), {"cold": f"{hashes['cold']}+{hashes['fast']}"}
    seed = targets.noise_seed(targets._keys(workspace, example, sampling, asked)[0])
    cond = collate([example], "teacher", workspace.backbone.device)

    def by(*slots: Any) -> torch.Tensor:
        return sample(workspace.backbone, cond, list(slots), sampling, [seed])[0]

    (cold,), (warm,) = bank.slots_for(["cold"]), bank.slots_for(["warm"])
    found = {others: float((by(others) - example.y[0]).abs().max()) for others in (cold, "fast", (warm, "fast"))}
    assert (by((cold, "fast")) - example.y[0]).abs().max() < 0.01 * min(found.values())  # a batch sums in another order
    bank.close()
