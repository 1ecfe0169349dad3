"""Several gloo processes against one: losses, weights, and checkpoints taken over by another number of processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from bench.training.cycle_models import as_backbone
from clora.jobs.teach import teach
from clora.jobs.train import train
from clora.lora.files import read_lora
from clora.training.distributed import shard
from clora.training.tracker import read_log
from tests.backbones.qwen_image.test_block import add_random_stacks, batch
from tests.support import processes
from tests.support.random_base import random_transformer
from tests.support.small_job import NAMES, make_config, write_config, write_dataset

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
    assert {"effect", "general", "velocity_loss", "critic_loss"} <= names


@pytest.mark.slow
def test_train_on_two_processes_equals_one(alone: Path, two: Path) -> None:
    assert_same_training(two, alone)
    files = sorted(path.name for path in (two / "train" / "checkpoint-00000006").iterdir())
    assert files == ["manifest.json", "shard-0-of-2.safetensors", "shard-1-of-2.safetensors"]
    assert json.loads((two / "run-train.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_train_with_a_sharded_base_equals_one(job: Path, random_base: Path, alone: Path, kernels: str) -> None:
    out = train_on(2, job, random_base, f"sharded_{kernels}", "train.shard_base=true", f"train.kernels={kernels}")
    assert_same_training(out, alone)
    said = (job / f"sharded_{kernels}-output" / "process-0.txt").read_text()
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


@pytest.mark.slow
def test_teach_on_two_processes_equals_one(job: Path, random_base: Path) -> None:
    """Each effect's samples are shared out, and each slot is clipped by its norm over both processes."""
    config = write_config(job / "taught-by-two.yaml", random_base, job / "data", job / "taught-by-two")
    halves = ["teach.batch_size=1", "train.max_grad_norm=0.01"]
    processes.run(2, ["teach", str(config), *halves], job / "taught-by-two-output")
    clipped = make_config(random_base, job / "data", job / "taught-clipped", "train.max_grad_norm=0.01")
    for name, expected in teach(clipped).items():
        ours = read_lora(job / "taught-by-two" / "teachers" / f"{name}.safetensors").modules
        for module, theirs in read_lora(expected).modules.items():
            torch.testing.assert_close(ours[module].delta(), theirs.delta(), rtol=0.02, atol=2e-5)
    ours_log, theirs_log = (read_log(job / name / "teach") for name in ("taught-by-two", "taught-clipped"))
    assert len(ours_log) == 4
    for row, theirs_row in zip(ours_log, theirs_log, strict=True):
        assert row["loss"] == pytest.approx(theirs_row["loss"], rel=1e-5)
        assert row["loss/cold"] == pytest.approx(theirs_row["loss/cold"], rel=1e-5)


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable, as the addresses of two hosts; skips where that is not allowed."""
    names = [f"clora-{os.getpid()}-{host}" for host in (1, 2)]
    addresses = ["10.177.0.1", "10.177.0.2"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "clora0", "netns", names[0], "type", "veth", "peer", "name", "clora0", "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "clora0")
            for link in ("clora0", "lo"):
                ip("-n", name, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here ({error})")
    else:
        yield addresses
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start_torchrun(host: int, addresses: list[str], arguments: list[str], output: Path) -> subprocess.Popen[bytes]:
    """The same command on each host, and what real hosts learn from their names: their address, and which one the
    endpoint is."""
    command = ["ip", "netns", "exec", f"clora-{os.getpid()}-{host}", str(Path(sys.executable).with_name("torchrun"))]
    command += ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    command += ["--rdzv_endpoint", f"{addresses[0]}:29500", "--local-addr", addresses[host - 1]]
    command += ["--rdzv_conf", f"is_host={int(host == 1)}", "-m", "clora"]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "clora0", "TP_SOCKET_IFNAME": "clora0"}
    with output.open("wb") as file:
        return subprocess.Popen([*command, *arguments], env=env, stdout=file, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_train_on_two_hosts_equals_one(job: Path, random_base: Path, alone: Path) -> None:
    config = write_config(job / "hosts.yaml", random_base, job / "data", job / "hosts")
    outputs = [job / f"host-{host}.txt" for host in (1, 2)]
    with two_hosts() as addresses:
        arguments = ["train", str(config), *overrides_for(2, job)]
        running = [start_torchrun(host, addresses, arguments, outputs[host - 1]) for host in (1, 2)]
        try:
            codes = [process.wait(processes.LIMIT_S) for process in running]
        finally:
            for process in running:
                process.kill()
    assert codes == [0, 0], "\n".join(output.read_text() for output in outputs)
    assert_same_training(job / "hosts", alone)
