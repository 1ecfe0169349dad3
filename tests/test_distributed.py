"""Several gloo processes against one: losses, weights, and checkpoints taken over by another number of processes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from bench.cycle_models import as_backbone
from clora.distributed import shard
from clora.lora_files import read_lora
from clora.teach import teach
from clora.tracker import read_log
from clora.train import train
from tests import processes
from tests.backbones.test_qwen_block import add_random_stacks, batch
from tests.random_base import random_transformer
from tests.small_job import NAMES, make_config, write_config, write_dataset

SAMPLES = 6  # a step's batch and anchors over all processes: it divides by one, two and three


@pytest.fixture(scope="module")
def job(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, taught teachers, and a configuration per output folder through `train`."""
    folder = tmp_path_factory.mktemp("job")
    write_dataset(folder / "data")
    teach(make_config(random_base, folder / "data", folder / "taught"))
    return folder


def overrides_for(world: int, job: Path) -> list[str]:
    teachers = [f"effects.{i}.lora={job / 'taught' / 'teachers' / name}.safetensors" for i, name in enumerate(NAMES)]
    return [*teachers, f"train.batch_size={SAMPLES // world}", f"train.anchor_batch_size={SAMPLES // world}"]


def train_on(world: int, job: Path, base: Path, out: str, *overrides: str, resume: bool = False) -> Path:
    """Run `clora train` on so many processes (one: this one); returns the output folder."""
    if world == 1:
        config = make_config(base, job / "data", job / out, *overrides_for(1, job), *overrides)
        return train(config, "latest" if resume else None).parent
    config_file = write_config(job / f"{out}.yaml", base, job / "data", job / out)
    command = ["train", str(config_file), *overrides_for(world, job), *overrides]
    processes.run(world, [*command, *(["--resume", "latest"] if resume else [])], job / f"{out}-output")
    return job / out


@pytest.fixture(scope="module")
def alone(job: Path, random_base: Path) -> Path:
    """What one process makes of it."""
    return train_on(1, job, random_base, "alone")


@pytest.fixture(scope="module")
def two(job: Path, random_base: Path) -> Path:
    """What two processes with half the batch each make of it."""
    return train_on(2, job, random_base, "two")


def assert_same_training(out: Path, alone: Path, first_step: int = 1) -> None:
    """Every figure of every step, and the weights."""
    ours, theirs = (read_log(folder / "train") for folder in (out, alone))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2, 3, 4, 5, 6]
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (row["step"], name)
    ours_lora, theirs_lora = (read_lora(folder / "collection.safetensors").modules for folder in (out, alone))
    for name, module in ours_lora.items():
        torch.testing.assert_close(module.delta(), theirs_lora[name].delta(), rtol=0.02, atol=2e-5)  # bfloat16 files


def test_the_job_has_both_streams(alone: Path) -> None:
    names = {name.split("/")[0] for row in read_log(alone / "train") for name in row}
    assert {"effect", "general", "ta_fm_loss", "critic_loss"} <= names


@pytest.mark.slow
def test_train_on_two_processes_equals_one(alone: Path, two: Path) -> None:
    assert_same_training(two, alone)
    files = sorted(path.name for path in (two / "train" / "checkpoint-00000006").iterdir())
    assert files == ["manifest.json", "shard-0-of-2.safetensors", "shard-1-of-2.safetensors"]
    assert json.loads((two / "run-train.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_train_with_a_sharded_base_equals_one(job: Path, random_base: Path, alone: Path) -> None:
    out = train_on(2, job, random_base, "sharded", "train.shard_base=true")
    assert_same_training(out, alone)
    said = (job / "sharded-output" / "process-0.txt").read_text()
    whole, part = map(float, re.search(r"base of ([\d.]+) MB split: ([\d.]+) MB in each of 2", said).groups())  # type: ignore[union-attr]
    assert 0.5 * whole <= part + 0.05 <= 0.6 * whole


@pytest.mark.slow
def test_train_with_an_offloaded_base_equals_one(job: Path, random_base: Path, alone: Path) -> None:
    out = train_on(2, job, random_base, "offloaded", "train.shard_base=true", "train.offload_base=true")
    assert_same_training(out, alone)
    said = (job / "offloaded-output" / "process-0.txt").read_text()
    assert re.search(r"MB in each of 2 processes,\s+in CPU memory", said)


@pytest.mark.gpu
def test_shard_offloads_to_pinned_memory_and_computes_on_the_gpu() -> None:
    """One process alone: the weights wait on the CPU between forwards, the adapters are on the GPU."""
    gpu = torch.device("cuda", 0)
    velocities = []
    for device in (torch.device("cpu"), gpu):
        transformer = random_transformer().requires_grad_(False)
        backbone = as_backbone(transformer)
        adapters = backbone.add_adapters()
        if device == gpu:
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=gpu)
            shard(transformer, list(transformer.transformer_blocks), offload=True)
            backbone.device = adapters.device = gpu
        add_random_stacks(adapters)
        with torch.no_grad():
            velocities.append(backbone.velocity(*batch([5, 5], 32, device), ["a0", None]).cpu())
        weights = [p for p in transformer.transformer_blocks.parameters() if isinstance(p, DTensor)]
        assert all(p.to_local().device.type == "cpu" and p.to_local().is_pinned() for p in weights)
        assert {p.device for p in adapters.parameters("a")} == {device}
    dist.destroy_process_group()
    assert len(weights) > 50
    torch.testing.assert_close(velocities[1], velocities[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_resume_on_another_number_of_processes(
    job: Path, random_base: Path, alone: Path, two: Path, before: int, after: int
) -> None:
    """Four steps on `before` processes, the rest on `after`."""
    out = f"from-{before}-to-{after}"
    shutil.copytree({1: alone, 2: two}[before], job / out)
    shutil.rmtree(job / out / "train" / "checkpoint-00000006")
    (job / out / "collection.safetensors").unlink()
    train_on(after, job, random_base, out, resume=True)
    assert_same_training(job / out, alone)
