"""plan: the 20B base's published figures, peaks as measured, mends that suffice, and no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.training import cycle_models
from bench.training.cycle_models import Size, as_backbone, make_data, make_distillation
from clora.backbones.load import SHAPES, read_footprint
from clora.backbones.qwen_image.footprint import transformer_footprint
from clora.cli import commands as cli
from clora.config import Config, build_config
from clora.distill.memory import (
    GB,
    TrainSettings,
    base_weights,
    forward_workspace,
    memory_plan,
    saved_by_forward,
    trained_parameters,
)
from clora.distill.step import full_step
from clora.jobs.plan import communication_plan, find_mends, plan_training
from clora.lora.frozen_linear import floats_at_once, quantize_linears, weight_bytes
from clora.lora.layers import QWEN_IMAGE_TARGETS
from clora.method.routing import draw_stream
from tests.support.memory import PeakBytes
from tests.support.random_base import random_transformer

ROOT = Path(__file__).parents[2]
QWEN = "Qwen/Qwen-Image-Edit-2509"  # its shapes are shipped
SMALL: dict[str, Any] = {
    "num_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "axes_dims_rope": (16, 24, 24),
}


def qwen_settings(**changes: Any) -> TrainSettings:
    """Qwen-Image-Edit-2509 at 1024 x 1024 with one reference, rank 128, four rank-128 teachers, batch size 1."""
    return replace(
        TrainSettings(
            image_tokens=4096,
            reference_tokens=4096,
            text_tokens=512,
            batch_size=1,
            anchor_batch_size=1,
            rank=128,
            targets=QWEN_IMAGE_TARGETS,
            teacher_rank=128,
            teacher_slots=4,
            targets_batch=8,
        ),
        **changes,
    )


def small_settings(**changes: Any) -> TrainSettings:
    small = TrainSettings(256, 256, 20, 1, 1, 8, QWEN_IMAGE_TARGETS, teacher_rank=8, teacher_slots=2)
    return replace(small, **changes)


# Parameters


def test_memory_plan_of_the_20b_base_has_its_published_figures() -> None:
    """One base 40.8 GB; a rank-128 LoRA 1.18 B parameters; two with fp32 masters and Adam 28 GB; a teacher 2.36."""
    footprint = read_footprint(QWEN)
    parts = memory_plan(footprint, qwen_settings()).phases["student update"]
    assert parts["base"] / GB == pytest.approx(40.8, abs=0.1)
    assert footprint.adapter_parameters(128, QWEN_IMAGE_TARGETS) / 1e9 == pytest.approx(1.18, abs=0.005)
    assert (parts["student and critic"] + parts["AdamW"]) / GB == pytest.approx(28.3, abs=0.1)
    assert parts["teacher slots"] / 4 / GB == pytest.approx(2.36, abs=0.01)
    assert parts["EMA"] == 2 * parts["teacher slots"] / 4


def test_20b_distillation_fits_one_gpu_of_141_gb_with_checkpointing_only() -> None:
    footprint = read_footprint(QWEN)
    assert memory_plan(footprint, qwen_settings()).needed < 141 * GB
    without = qwen_settings(checkpointing=False)
    assert memory_plan(footprint, without).needed > 1.3 * 141 * GB
    assert find_mends(footprint, without, 141 * GB) == (["train.gradient_checkpointing=true"], True)


def test_memory_plan_of_an_extension_counts_the_collection() -> None:
    """Frozen below the student, and once more in the critic, which starts as it: 1.18 B parameters each at rank 128."""
    footprint = read_footprint(QWEN)
    alone = memory_plan(footprint, qwen_settings(rank=32)).phases["student update"]
    parts = memory_plan(footprint, qwen_settings(rank=32, collection_rank=128)).phases["student update"]
    assert parts["collection"] == 2 * footprint.adapter_parameters(128, QWEN_IMAGE_TARGETS)
    more = (parts["student and critic"] + parts["AdamW"]) - (alone["student and critic"] + alone["AdamW"])
    assert more == 12 * footprint.adapter_parameters(128, QWEN_IMAGE_TARGETS)
    assert parts["EMA"] == alone["EMA"]
    # What makes few-step teachers is not trained there.
    fast = memory_plan(footprint, qwen_settings(rank=32, collection_rank=128, acceleration_rank=64))
    assert fast.phases["student update"]["EMA"] == alone["EMA"]
    assert fast.phases["student update"]["collection"] == 1.5 * parts["collection"]


def test_memory_plan_of_a_coarse_stage_is_that_of_its_batch() -> None:
    """A coarse stage of eight samples before a full one of one peaks there, be TA-FM in the full one or not; a run of
    coarse updates alone has a plan."""
    footprint = read_footprint(QWEN)
    no_ta_fm = (False, True, True, False)
    full = memory_plan(footprint, qwen_settings(anchor_batch_size=8, terms=no_ta_fm))
    plan = memory_plan(footprint, qwen_settings(anchor_batch_size=8, terms=no_ta_fm, coarse=True))
    assert plan.peak_phase == "coarse update" and plan.peak > full.peak
    coarse = plan.phases["coarse update"]["kept for backward"]
    assert coarse == saved_by_forward(footprint, qwen_settings(), 8)
    # A guided teacher's forward, of twice the batch, runs while that waits.
    taught = memory_plan(footprint, qwen_settings(anchor_batch_size=8, coarse=True, coarse_teacher=True))
    asked = forward_workspace(footprint, qwen_settings(), 16)
    assert taught.phases["coarse update"]["workspace"] == max(asked, plan.phases["coarse update"]["workspace"])
    assert taught.phases["coarse update"]["kept for backward"] == coarse
    alone = memory_plan(footprint, qwen_settings(terms=(False,) * 4, critic_batches=0, coarse=True))
    assert alone.peak_phase in ("coarse update", "encoding") and alone.peak > 0


def test_memory_plan_of_muon_holds_its_directions() -> None:
    """fp32, this process's part; of several processes the whole of them besides."""
    footprint = read_footprint(QWEN)
    student = trained_parameters(footprint, qwen_settings())[0]
    for num_gpus, copies in ((1, 1.0), (4, 1.25)):
        plan = memory_plan(footprint, qwen_settings(coarse=True, muon=True, num_gpus=num_gpus))
        assert plan.phases["coarse optimizer step"]["workspace"] == 4 * student * copies
    assert "coarse optimizer step" not in memory_plan(footprint, qwen_settings(coarse=True)).phases


# Peaks


NO_MEMORY = 1e-9  # no block is left whole
CASES = [
    (torch.float32, {"gradient_checkpointing": False}),
    (torch.float32, {"memory_budget_gb": NO_MEMORY}),
    (torch.float32, {"memory_budget_gb": NO_MEMORY, "batch_size": 2, "anchor_batch_size": 6}),
    (torch.float32, {"gradient_checkpointing": False, "gradient_accumulation_steps": 2}),
    (torch.float32, {"gradient_checkpointing": False, "critic_reuse": True}),
    (torch.float32, {"memory_budget_gb": NO_MEMORY, "critic_reuse": True, "gradient_accumulation_steps": 2}),
    # Few CPUs have arithmetic for bf16: small batches.
    (torch.bfloat16, {"gradient_checkpointing": False}),
    (torch.bfloat16, {"memory_budget_gb": NO_MEMORY, "anchor_batch_size": 3}),
]


@pytest.mark.parametrize(("dtype", "train"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_memory_plan_is_within_a_tenth_of_the_measured_peak(dtype: torch.dtype, train: Mapping[str, Any]) -> None:
    # Without arithmetic for bf16 a step takes a CPU a minute; where three samples are kept, fewer tokens do.
    side = 8 if dtype == torch.bfloat16 and "anchor_batch_size" in train else 16
    planned, measured = planned_and_measured(dtype, train, side=side)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "train"),
    [
        (torch.float32, {"gradient_checkpointing": False}),
        (torch.float32, {"memory_budget_gb": NO_MEMORY}),
        (torch.bfloat16, {"memory_budget_gb": NO_MEMORY}),
    ],
    ids=str,
)
def test_memory_plan_of_an_int8_base_is_within_a_tenth_of_the_measured_peak(
    dtype: torch.dtype, train: Mapping[str, Any]
) -> None:
    pytest.importorskip("torchao")
    planned, measured = planned_and_measured(dtype, train, quantized=True)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("dtype", "train"), (CASES[0], CASES[2]), ids=lambda value: str(value).removeprefix("torch."))
def test_memory_plan_of_zero_cond_t_is_within_a_tenth_of_the_measured_peak(
    dtype: torch.dtype, train: Mapping[str, Any]
) -> None:
    planned, measured = planned_and_measured(dtype, train, zero_cond_t=True)
    assert planned == pytest.approx(measured, rel=0.1)


def planned_and_measured(
    dtype: torch.dtype, train: Mapping[str, Any], quantized: bool = False, zero_cond_t: bool = False, side: int = 16
) -> tuple[int, int]:
    """Peaks of tensors over a whole step on three random layers, Adam's state included, which is there before it."""
    transformer_config = SMALL | {"zero_cond_t": zero_cond_t}
    size = Size(transformer_config, (side, side), 20, 8, dtype, rounds=1)
    values = {
        "preset": "clora",
        "base": "tiny",
        "output_dir": "unused",
        "student": {"rank": 8, "alpha": 8},
        "schedule": {"num_steps": 2},  # rollouts of more steps peak no higher
        "train": {"coarse_steps": 0, "critic_updates": 1, "teacher_slots": 2, **train},
    }
    config = build_config(values)
    data = replace(make_data(size, 1), config=config)
    with PeakBytes() as measured:
        transformer = cycle_models.random_transformer(size, "cpu")
        if quantized:
            quantize_linears(transformer.transformer_blocks, "cpu")
        distillation = make_distillation(data, as_backbone(transformer))
        # On a CPU bf16 has plain attention, which keeps what the fused kernel of a GPU does not.
        transformer.set_attention_backend("native")
        before = measured.live
        full_step(distillation, next(step for step in range(20) if distillation.batches.stream(step) == "effect"))
    # Tables of positions stay, and nothing that a second step would have besides its own.
    assert measured.live - before < 0.01 * measured.peak
    settings = small_settings(
        image_tokens=side**2,
        reference_tokens=side**2,
        batch_size=config.train.batch_size,
        anchor_batch_size=config.train.anchor_batch_size or config.train.batch_size,
        base_bytes=dtype.itemsize,
        checkpointing=config.train.gradient_checkpointing,
        quantized=quantized,
        waiting_batches=config.train.gradient_accumulation_steps * config.train.critic_reuse,
    )
    plan = memory_plan(transformer_footprint(transformer_config, {}), settings)
    assert sum(plan.phases["student update"].values()) == plan.peak
    return plan.peak, measured.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_weights_are_those_of_torchao(dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    model = random_transformer(**SMALL).to(dtype)
    footprint, settings = transformer_footprint(SMALL, {}), small_settings(base_bytes=dtype.itemsize)
    assert base_weights(footprint, settings) == weight_bytes(model)
    quantize_linears(model.transformer_blocks, "cpu")
    assert base_weights(footprint, replace(settings, quantized=True)) == weight_bytes(model)


def test_plan_of_the_20b_base_in_int8() -> None:
    """20.4 billion weights, nearly all in the blocks: half of bfloat16's 40.9 GB, and one linear's floats in use."""
    footprint = read_footprint(QWEN)
    plain, small = (memory_plan(footprint, qwen_settings(quantized=on)).phases["critic update"] for on in (False, True))
    assert small["base"] / plain["base"] == pytest.approx(0.5, abs=0.01)
    assert small["workspace"] - plain["workspace"] == 2 * floats_at_once("cuda") < 2 * 18432 * 3072
    tight = qwen_settings(num_blocks_kept=0)
    assert memory_plan(footprint, tight).needed > 90 * GB
    moments, int8 = "train.adam_moments=bfloat16", "base.quantize=int8"
    assert find_mends(footprint, tight, 95 * GB) == ([moments], True)
    assert find_mends(footprint, tight, 90 * GB) == ([int8], True)  # the moments alone would not do, and are not needed
    assert find_mends(footprint, tight, 75 * GB) == ([moments, int8], True)
    # Several GPUs split the base instead: both together there are not.
    assert find_mends(footprint, replace(tight, num_gpus=8), 75 * GB) == (["train.shard_base=true"], True)


# Several GPUs


def test_memory_plan_shards_optimizer_and_base() -> None:
    footprint = read_footprint(QWEN)
    alone, eight = (memory_plan(footprint, qwen_settings(num_gpus=n)).phases["critic update"] for n in (1, 8))
    assert eight["AdamW"] == pytest.approx(alone["AdamW"] / 8) and eight["EMA"] == pytest.approx(alone["EMA"] / 8)
    assert all(eight[part] == alone[part] for part in ("base", "kept for backward"))
    # Everybody has the bfloat16 half of the masters.
    assert eight["student and critic"] == pytest.approx(alone["student and critic"] * (1 + 1 / 8) / 2)
    parts = memory_plan(footprint, qwen_settings(num_gpus=8, shard_base=True)).phases["critic update"]
    assert parts["base"] == pytest.approx(alone["base"] / 8)
    assert parts["workspace"] - alone["workspace"] == 2 * 2 * footprint.block_parameters
    offloaded = memory_plan(footprint, qwen_settings(num_gpus=8, shard_base=True, offload_base=True))
    outside = footprint.num_parameters - 60 * footprint.block_parameters  # embeddings and the last layers
    assert (
        offloaded.phases["critic update"] == parts | {"base": 2 * outside} and outside < 0.01 * footprint.num_parameters
    )
    # One whole buffer of gradients for both, and this process's part of the sums of each.
    assert eight["gradients"] == pytest.approx(alone["gradients"] * (1 + 2 / 8))


def test_communication_plan_counts_rings() -> None:
    """By hand: P = 1.18e9 adapter parameters, B = 40.8e9 bytes of base, 8 GPUs, 8 steps."""
    footprint = read_footprint(QWEN)
    P, B = footprint.adapter_parameters(128, QWEN_IMAGE_TARGETS), 2 * footprint.num_parameters
    sent = communication_plan(footprint, qwen_settings(num_gpus=8))
    assert sent["student"] == sent["critic"]
    assert sent["student"]["reduce-scatter of gradients"] == round(7 / 8 * 4 * P)
    assert sent["student"]["all-gather of parameters"] == round(7 / 8 * 2 * P)
    assert sent["student"]["all-gathers of the base"] == 0
    sharded = communication_plan(footprint, qwen_settings(num_gpus=8, shard_base=True))
    # Forwards: 1 TA-FM, 2 DMD-TS, 4.5 + 1 DMD-BS; backwards: 3. The critic: a fifth of the longest of five rollouts
    # (7.1 of 8 steps on average, by counting all 8^5), 1, and 1.
    longest = sum(max(exits) for exits in product(range(1, 9), repeat=5)) / 8**5
    critic = longest / 5 + 2
    assert sharded["student"]["all-gathers of the base"] == round(7 / 8 * B * (1 + 2 + 5.5 + 3))
    assert sharded["critic"]["all-gathers of the base"] == pytest.approx(7 / 8 * B * critic) and 7.1 < longest < 7.2
    offloaded = communication_plan(footprint, qwen_settings(num_gpus=8, shard_base=True, offload_base=True))
    assert offloaded["critic"] == sharded["critic"] | {"base from CPU memory": round(B / 8 * critic)}
    alone = communication_plan(footprint, qwen_settings())
    assert not any(sum(parts.values()) for parts in alone.values())


# The command


def config_of(folder: Path, *overrides: str, base: str = QWEN) -> Config:
    effects = [{"name": name, "prompt": "paint it", "lora": f"{name}.safetensors"} for name in "abcdef"]
    values = {"base": base, "output_dir": str(folder), "teach": {"rank": 128}, "effects": effects}
    return build_config(values, folder, overrides)


def test_plan_training_reads_the_configuration(tmp_path: Path) -> None:
    """The default preset on one GPU of 141 GB: fits at 1024 x 1024; 80 GB asks for several and cuts the base."""
    plan = plan_training(config_of(tmp_path), 1, 141)
    wanted = qwen_settings(vae_parameters=plan.settings.vae_parameters)
    assert plan.settings.coarse and plan.settings.coarse_teacher and not plan.settings.waiting_batches
    read = ("text_encoder_parameters", "num_blocks_kept", "coarse", "coarse_teacher")
    assert plan.settings == replace(wanted, **{name: getattr(plan.settings, name) for name in read})
    assert plan.settings.text_encoder_parameters / 1e9 == pytest.approx(8.29, abs=0.01)  # as published
    assert plan.settings.vae_parameters / 1e6 == pytest.approx(127, abs=1)
    assert plan.fits and plan.verdict.startswith("fits 1 GPU of 141 GB: needs 102.9 GB")  # docs/ARCHITECTURE.md
    assert plan.verdict.endswith("26 of 60 blocks are not recomputed") and plan.memory.needed <= 141 * GB
    footprint, more = read_footprint(QWEN), replace(plan.settings, num_blocks_kept=27)
    assert memory_plan(footprint, more).needed > 141 * GB
    tight = plan_training(config_of(tmp_path, "train.memory_budget_gb=110"), 1, 141)
    assert 0 < tight.settings.num_blocks_kept < 26 and tight.memory.needed <= 110 * GB
    alone = plan_training(config_of(tmp_path), 1, 80)
    assert not alone.fits and "does not fit 1 GPU of 80 GB" in alone.verdict
    assert alone.mends == ["train.adam_moments=bfloat16", "base.quantize=int8"] and alone.mends_suffice
    mended = plan_training(config_of(tmp_path, *alone.mends), 1, 80)
    assert mended.fits and mended.verdict.startswith("fits 1 GPU of 80 GB: needs 71.7 GB")  # docs/ARCHITECTURE.md
    assert plan_training(config_of(tmp_path), 8, 80).fits  # docs/ARCHITECTURE.md
    eight = plan_training(config_of(tmp_path), 8, 64)
    assert not eight.fits and eight.mends == ["train.shard_base=true"] and eight.mends_suffice
    assert plan_training(config_of(tmp_path, *eight.mends), 8, 64).fits
    small = plan_training(config_of(tmp_path), 2, 48)
    assert small.mends == ["train.shard_base=true", "train.teacher_slots=1", "train.offload_base=true"]
    assert small.mends_suffice and plan_training(config_of(tmp_path, *small.mends), 2, 48).fits


def test_plan_training_holds_the_run_against_preset_paper(tmp_path: Path) -> None:
    """Preset `paper`, 5000 updates: (1 + 5) rollouts of 4.5 forwards, 5 critic updates of 3, 2 + 3 for DMD-BS (guided),
    and on effects 1 + 2 + 3 for DMD-TS and 3 for TA-FM."""
    general = 6 * 4.5 + 5 * 3 + 5
    plan = plan_training(config_of(tmp_path), 1, 141, seconds_per_forward=0.5)
    effects = sum(draw_stream(0, step, 0.5) == "effect" for step in range(5000))
    assert plan.paper.forwards == 5000 * general + effects * 9
    assert plan.cost.forwards < plan.paper.forwards
    assert plan.to_json()["cost_by_preset_paper"]["hours"] == round(plan.paper.forwards / 7200, 2)
    own = plan_training(config_of(tmp_path, "preset=paper"), 1, 141)
    assert own.cost == own.paper == plan.paper


def test_mends_of_the_plan_make_it_fit(tmp_path: Path) -> None:
    config = config_of(tmp_path, "train.gradient_checkpointing=false", "train.batch_size=4")
    plan = plan_training(config, 1, 141)
    assert not plan.fits and plan.mends_suffice
    mended = config_of(tmp_path, "train.gradient_checkpointing=false", "train.batch_size=4", *plan.mends)
    assert plan_training(mended, 1, 141).fits


def test_train_plan_prints_json_and_exits_by_verdict(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"base": QWEN, "output_dir": "out"}))

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["train", str(path), "--plan", *arguments])

    fitting, failing, table = call("--json"), call("--memory", "40", "--json"), call("--gpus", "8")
    assert (fitting.exit_code, failing.exit_code, table.exit_code) == (0, 1, 0)
    answer = json.loads(fitting.stdout)
    assert answer["fits"] and answer["peak"] == max(phase["total"] for phase in answer["phases"].values())
    assert not json.loads(failing.stdout)["fits"]
    assert "reduce-scatter" in table.stdout and table.stdout.splitlines()[-1].startswith("fits 8 GPUs of 141 GB")
    assert not (tmp_path / "out").exists()
    without_plan = CliRunner().invoke(cli.app, ["train", str(path), "--json"])
    assert without_plan.exit_code == 2 and "--json: belongs to --plan" in without_plan.stderr


def test_plan_training_counts_a_folder_as_its_shipped_shapes(tmp_path: Path) -> None:
    """Qwen-Image-Edit-2511 as a folder of configurations without a weight: the same plan as by its name."""
    shipped = json.loads((SHAPES / "Qwen--Qwen-Image-Edit-2511.json").read_text())
    for component in ("transformer", "vae", "text_encoder"):
        (tmp_path / component).mkdir()
        (tmp_path / component / "config.json").write_text(json.dumps(shipped[component]))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": shipped["_class_name"]}))
    named = plan_training(config_of(tmp_path, base="Qwen/Qwen-Image-Edit-2511"), 1, 141)
    assert plan_training(config_of(tmp_path, base=str(tmp_path)), 1, 141).to_json() == named.to_json()
    # Its image tokens have modulations of their own, which takes memory that 2509 does not need.
    assert named.cost.least > plan_training(config_of(tmp_path), 1, 141).cost.least


def test_train_plan_needs_no_network(tmp_path: Path) -> None:
    """Of both examples; of a base that nobody knows it says so in one line."""
    plans = [[f"examples/{name}.yaml", "--plan"] for name in ("qwen_image_edit_2509_50in1", "qwen_image_edit_2511")]
    *known, unknown = without_network(tmp_path, *plans, [plans[0][0], "base.model=owner/name", "--plan"])
    for answer in known:
        assert answer["code"] == 0 and answer["stderr"] == ""
        assert answer["stdout"].splitlines()[-1].startswith("fits 1 GPU of 141 GB")
    assert unknown["code"] == 2 and unknown["stdout"] == ""
    (line,) = unknown["stderr"].splitlines()
    assert "base owner/name: is not (all) on this machine and the hub cannot serve it ([Errno 111]" in line


RUN_EACH = """
import json, sys
from typer.testing import CliRunner
from clora.cli.commands import app

found = [CliRunner().invoke(app, ["train", *arguments]) for arguments in json.loads(sys.argv[1])]
print(json.dumps([{"code": one.exit_code, "stdout": one.stdout, "stderr": one.stderr} for one in found]))
"""


def without_network(cache: Path, *commands: list[str]) -> list[dict[str, Any]]:
    """What `clora train` answers in a process whose hub is a closed port, and whose cache is empty: the hub's library
    asks for both as it is imported."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache)}
    line = [sys.executable, "-c", RUN_EACH, json.dumps(commands)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found
