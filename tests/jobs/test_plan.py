"""plan: parameters against diffusers' own, the 20B base's published figures, activations and peaks as measured."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import Qwen2_5_VLConfig
from typer.testing import CliRunner

from bench.training import cycle_models
from bench.training.cycle_models import Size, as_backbone, make_data, make_distillation
from clora.backbones.qwen_image.backbone import KEPT
from clora.backbones.qwen_image.footprint import model_shapes
from clora.cli import commands as cli
from clora.config import DEFAULT_TARGETS, Config, build_config
from clora.distill.memory import (
    GB,
    TrainSettings,
    base_weights,
    forward_workspace,
    memory_plan,
    saved_by_block,
    saved_by_forward,
)
from clora.distill.step import full_step
from clora.jobs.plan import communication_plan, find_mends, plan_training
from clora.lora.adapters import inject_adapters
from clora.lora.frozen_linear import floats_at_once, is_quantized, quantize_linears, weight_bytes
from clora.lora.recompute import checkpoint_fn
from clora.training.optimizer import Group
from tests.support.random_base import random_transformer

QWEN = {"num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584}
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
            targets=DEFAULT_TARGETS,
            teacher_rank=128,
            teacher_slots=4,
            targets_batch=8,
        ),
        **changes,
    )


def small_settings(**changes: Any) -> TrainSettings:
    small = TrainSettings(256, 256, 20, 1, 1, 8, DEFAULT_TARGETS, teacher_rank=8, teacher_slots=2)
    return replace(small, **changes)


class PeakBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside have made and that are still alive, and their most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, made)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._sizes or is_quantized(tensor):  # whose parts are seen by themselves
            return
        self._sizes[id(storage)] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, id(storage))

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


# Parameters


@pytest.mark.parametrize("config", [QWEN, SMALL, {"num_layers": 1, "in_channels": 32, "out_channels": None}])
def test_model_shapes_equal_diffusers(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**config)
    shapes = model_shapes(dict(model.config))
    linears = {
        name: (one.out_features, one.in_features) for name, one in model.named_modules() if isinstance(one, nn.Linear)
    }
    assert shapes.linears == linears
    assert shapes.num_parameters == sum(p.numel() for p in model.parameters())
    assert shapes.block_parameters == sum(p.numel() for p in model.transformer_blocks[0].parameters())


def test_memory_plan_of_the_20b_base_has_its_published_figures() -> None:
    """One base 40.8 GB; a rank-128 LoRA 1.18 B parameters; two with fp32 masters and Adam 28 GB; a teacher 2.36."""
    shapes = model_shapes(QWEN)
    parts = memory_plan(shapes, qwen_settings()).phases["student update"]
    assert parts["base"] / GB == pytest.approx(40.8, abs=0.1)
    assert shapes.adapter_parameters(128, DEFAULT_TARGETS) / 1e9 == pytest.approx(1.18, abs=0.005)
    assert (parts["student and critic"] + parts["AdamW"]) / GB == pytest.approx(28.3, abs=0.1)
    assert parts["teacher slots"] / 4 / GB == pytest.approx(2.36, abs=0.01)
    assert parts["EMA"] == 2 * parts["teacher slots"] / 4


def test_20b_distillation_fits_one_gpu_of_141_gb_with_checkpointing_only() -> None:
    shapes = model_shapes(QWEN)
    assert memory_plan(shapes, qwen_settings()).needed < 141 * GB
    without = qwen_settings(checkpointing=False)
    assert memory_plan(shapes, without).needed > 1.3 * 141 * GB
    assert find_mends(shapes, without, 141 * GB) == (["train.gradient_checkpointing=true"], True)


# Activations


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_by_block_is_what_autograd_keeps(dtype: torch.dtype, zero_cond_t: bool) -> None:
    """Distinct storages kept by a second block, parameters left out: to the byte, but for the modulation of
    `zero_cond_t`, whose second row a sample is left out."""

    def kept(num_layers: int) -> int:
        model = random_transformer(**SMALL | {"num_layers": num_layers, "zero_cond_t": zero_cond_t}).to(dtype)
        model.set_attention_backend("native")  # the last one given to any model is every other's too
        adapters = inject_adapters(model)
        adapters.add_stack("student", ["student"], 8, 8, trainable=True)
        Group(adapters.named_parameters("student"), 1.0, dtype=dtype)  # as they are trained
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), adapters.use(["student"]):
            forward(model, batch=2, dtype=dtype)
            return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    settings = small_settings(base_bytes=dtype.itemsize)
    shapes = model_shapes(SMALL | {"num_layers": 2, "zero_cond_t": zero_cond_t})
    tolerance = 1e-3 if zero_cond_t else 0
    assert kept(2) - kept(1) == pytest.approx(saved_by_block(shapes, settings, batch=2), rel=tolerance, abs=0)


def forward(model: Any, batch: int, dtype: torch.dtype) -> Tensor:
    """One forward at `small_settings`' tokens."""
    return model(
        hidden_states=torch.randn(batch, 512, 64, dtype=dtype),
        timestep=torch.rand(batch).to(dtype),
        encoder_hidden_states=torch.randn(batch, 20, 96, dtype=dtype),
        img_shapes=[[(1, 16, 16)] * 2] * batch,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forwards_are_within_a_tenth_of_what_is_measured(dtype: torch.dtype) -> None:
    shapes, settings = model_shapes(SMALL), small_settings(base_bytes=dtype.itemsize)
    with PeakBytes() as measured:
        model = random_transformer(**SMALL).to(dtype)
        model.set_attention_backend("native")
        adapters = inject_adapters(model)
        adapters.add_stack("student", ["student"], 8, 8, trainable=True)
        Group(adapters.named_parameters("student"), 1.0, dtype=dtype)  # as they are trained
        with adapters.use(["student"]):
            with torch.no_grad():
                forward(model, 2, dtype)  # makes the tables that stay
                before = measured.peak = measured.live
                forward(model, 2, dtype)
            assert forward_workspace(shapes, settings, 2) == pytest.approx(measured.peak - before, rel=0.1)
            kept = []
            for checkpointing in (False, True):
                if checkpointing:
                    model.enable_gradient_checkpointing(checkpoint_fn(adapters, KEPT))
                output = forward(model, 2, dtype)
                kept.append(measured.live - before)
                del output
    planned = [saved_by_forward(shapes, replace(settings, checkpointing=on), 2) for on in (False, True)]
    assert planned[0] == pytest.approx(kept[0], rel=0.05)
    # Small beside the peak: what surrounds the blocks may be rough.
    assert planned[1] == pytest.approx(kept[1], rel=0.25)


NO_MEMORY = 1e-9  # no block is left whole
CASES = [
    (torch.float32, {"gradient_checkpointing": False}),
    (torch.float32, {"memory_budget_gb": NO_MEMORY}),
    (torch.float32, {"memory_budget_gb": NO_MEMORY, "batch_size": 2, "anchor_batch_size": 6}),
    (torch.float32, {"gradient_checkpointing": False, "gradient_accumulation_steps": 2}),
    (torch.bfloat16, {"gradient_checkpointing": False, "batch_size": 2}),
    (torch.bfloat16, {"memory_budget_gb": NO_MEMORY, "batch_size": 2, "anchor_batch_size": 6}),
]


@pytest.mark.parametrize(("dtype", "train"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_memory_plan_is_within_a_tenth_of_the_measured_peak(dtype: torch.dtype, train: Mapping[str, Any]) -> None:
    planned, measured = planned_and_measured(dtype, train)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [{"gradient_checkpointing": False}, {"memory_budget_gb": NO_MEMORY}], ids=str)
def test_memory_plan_of_an_int8_base_is_within_a_tenth_of_the_measured_peak(
    dtype: torch.dtype, train: Mapping[str, Any]
) -> None:
    pytest.importorskip("torchao")
    planned, measured = planned_and_measured(dtype, train, quantized=True)
    assert planned == pytest.approx(measured, rel=0.1)


def planned_and_measured(dtype: torch.dtype, train: Mapping[str, Any], quantized: bool = False) -> tuple[int, int]:
    """Peaks of tensors over whole steps on three random layers, Adam's state included."""
    size = Size(SMALL, (16, 16), 20, 8, dtype, rounds=1)
    values = {
        "preset": "clora",
        "base": "tiny",
        "output_dir": "unused",
        "student": {"rank": 8, "alpha": 8},
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
        for step in [step for step in range(20) if distillation.batches.stream(step) == "effect"][:2]:
            full_step(distillation, step)
    settings = small_settings(
        batch_size=config.train.batch_size,
        anchor_batch_size=config.train.anchor_batch_size or config.train.batch_size,
        base_bytes=dtype.itemsize,
        checkpointing=config.train.gradient_checkpointing,
        quantized=quantized,
    )
    plan = memory_plan(model_shapes(SMALL), settings)
    assert sum(plan.phases["student update"].values()) == plan.peak
    return plan.peak, measured.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_weights_are_those_of_torchao(dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    model = random_transformer(**SMALL).to(dtype)
    shapes, settings = model_shapes(SMALL), small_settings(base_bytes=dtype.itemsize)
    assert base_weights(shapes, settings) == weight_bytes(model)
    quantize_linears(model.transformer_blocks, "cpu")
    assert base_weights(shapes, replace(settings, quantized=True)) == weight_bytes(model)


def test_plan_of_the_20b_base_in_int8() -> None:
    """20.4 billion weights, nearly all in the blocks: half of bfloat16's 40.9 GB, and one linear's floats in use."""
    shapes = model_shapes(QWEN)
    plain, small = (memory_plan(shapes, qwen_settings(quantized=on)).phases["critic update"] for on in (False, True))
    assert small["base"] / plain["base"] == pytest.approx(0.5, abs=0.01)
    assert small["workspace"] - plain["workspace"] == 2 * floats_at_once("cuda") < 2 * 18432 * 3072
    tight = qwen_settings(num_blocks_kept=0)
    assert memory_plan(shapes, tight).needed > 90 * GB
    moments, int8 = "train.adam_moments=bfloat16", "base.quantize=int8"
    assert find_mends(shapes, tight, 95 * GB) == ([moments], True)
    assert find_mends(shapes, tight, 90 * GB) == ([int8], True)  # the moments alone would not do, and are not needed
    assert find_mends(shapes, tight, 75 * GB) == ([moments, int8], True)
    # Several GPUs split the base instead: both together there are not.
    assert find_mends(shapes, replace(tight, num_gpus=8), 75 * GB) == (["train.shard_base=true"], True)


# Several GPUs


def test_memory_plan_shards_optimizer_and_base() -> None:
    shapes = model_shapes(QWEN)
    alone, eight = (memory_plan(shapes, qwen_settings(num_gpus=n)).phases["critic update"] for n in (1, 8))
    assert eight["AdamW"] == pytest.approx(alone["AdamW"] / 8) and eight["EMA"] == pytest.approx(alone["EMA"] / 8)
    assert all(eight[part] == alone[part] for part in ("base", "kept for backward"))
    # Everybody has the bfloat16 half of the masters.
    assert eight["student and critic"] == pytest.approx(alone["student and critic"] * (1 + 1 / 8) / 2)
    parts = memory_plan(shapes, qwen_settings(num_gpus=8, shard_base=True)).phases["critic update"]
    assert parts["base"] == pytest.approx(alone["base"] / 8)
    assert parts["workspace"] - alone["workspace"] == 2 * 2 * shapes.block_parameters
    offloaded = memory_plan(shapes, qwen_settings(num_gpus=8, shard_base=True, offload_base=True))
    outside = shapes.num_parameters - 60 * shapes.block_parameters  # embeddings and the last layers
    assert offloaded.phases["critic update"] == parts | {"base": 2 * outside} and outside < 0.01 * shapes.num_parameters
    # One whole buffer of gradients for both, and this process's part of the sums of each.
    assert eight["gradients"] == pytest.approx(alone["gradients"] * (1 + 2 / 8))


def test_communication_plan_counts_rings() -> None:
    """By hand: P = 1.18e9 adapter parameters, B = 40.8e9 bytes of base, 8 GPUs, 8 steps."""
    shapes = model_shapes(QWEN)
    P, B = shapes.adapter_parameters(128, DEFAULT_TARGETS), 2 * shapes.num_parameters
    sent = communication_plan(shapes, qwen_settings(num_gpus=8))
    assert sent["student"] == sent["critic"]
    assert sent["student"]["reduce-scatter of gradients"] == round(7 / 8 * 4 * P)
    assert sent["student"]["all-gather of parameters"] == round(7 / 8 * 2 * P)
    assert sent["student"]["all-gathers of the base"] == 0
    sharded = communication_plan(shapes, qwen_settings(num_gpus=8, shard_base=True))
    # Forwards: 1 TA-FM, 2 DMD-TS, 4.5 + 1 DMD-BS; backwards: 3. The critic: a fifth of the longest of five rollouts
    # (7.1 of 8 steps on average, by counting all 8^5), 1, and 1.
    longest = sum(max(exits) for exits in product(range(1, 9), repeat=5)) / 8**5
    critic = longest / 5 + 2
    assert sharded["student"]["all-gathers of the base"] == round(7 / 8 * B * (1 + 2 + 5.5 + 3))
    assert sharded["critic"]["all-gathers of the base"] == pytest.approx(7 / 8 * B * critic) and 7.1 < longest < 7.2
    offloaded = communication_plan(shapes, qwen_settings(num_gpus=8, shard_base=True, offload_base=True))
    assert offloaded["critic"] == sharded["critic"] | {"base from CPU memory": round(B / 8 * critic)}
    alone = communication_plan(shapes, qwen_settings())
    assert not any(sum(parts.values()) for parts in alone.values())


# The command


@pytest.fixture(scope="module")
def qwen_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen-Image-Edit-2509 without a single weight: its configurations."""
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(QWEN))
    with torch.device("meta"):
        AutoencoderKLQwenImage().save_config(folder / "vae")
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    text |= {"num_key_value_heads": 4, "vocab_size": 152064}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    Qwen2_5_VLConfig(text_config=text, vision_config=vision).save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text("{}")
    return folder


def config_of(base: Path, folder: Path, *overrides: str) -> Config:
    effects = [{"name": name, "prompt": "paint it", "lora": f"{name}.safetensors"} for name in "abcdef"]
    values = {"base": str(base), "output_dir": str(folder), "teach": {"rank": 128}, "effects": effects}
    return build_config(values, folder, overrides)


def test_plan_training_reads_the_configuration(qwen_base: Path, tmp_path: Path) -> None:
    """The default preset on one GPU of 141 GB: fits at 1024 x 1024; 80 GB asks for several and cuts the base."""
    plan = plan_training(config_of(qwen_base, tmp_path), 1, 141)
    wanted = qwen_settings(vae_parameters=plan.settings.vae_parameters)
    found = {name: getattr(plan.settings, name) for name in ("text_encoder_parameters", "num_blocks_kept")}
    assert plan.settings == replace(wanted, **found)
    assert plan.settings.text_encoder_parameters / 1e9 == pytest.approx(8.29, abs=0.01)  # as published
    assert plan.settings.vae_parameters / 1e6 == pytest.approx(127, abs=1)
    assert plan.fits and plan.verdict.startswith("fits 1 GPU of 141 GB: needs 102.9 GB")  # docs/ARCHITECTURE.md
    assert plan.verdict.endswith("26 of 60 blocks are not recomputed") and plan.memory.needed <= 141 * GB
    shapes, more = model_shapes(QWEN), replace(plan.settings, num_blocks_kept=27)
    assert memory_plan(shapes, more).needed > 141 * GB
    tight = plan_training(config_of(qwen_base, tmp_path, "train.memory_budget_gb=110"), 1, 141)
    assert 0 < tight.settings.num_blocks_kept < 26 and tight.memory.needed <= 110 * GB
    alone = plan_training(config_of(qwen_base, tmp_path), 1, 80)
    assert not alone.fits and "does not fit 1 GPU of 80 GB" in alone.verdict
    assert alone.mends == ["train.adam_moments=bfloat16", "base.quantize=int8"] and alone.mends_suffice
    mended = plan_training(config_of(qwen_base, tmp_path, *alone.mends), 1, 80)
    assert mended.fits and mended.verdict.startswith("fits 1 GPU of 80 GB: needs 71.7 GB")  # docs/ARCHITECTURE.md
    assert plan_training(config_of(qwen_base, tmp_path), 8, 80).fits  # docs/ARCHITECTURE.md
    eight = plan_training(config_of(qwen_base, tmp_path), 8, 64)
    assert not eight.fits and eight.mends == ["train.shard_base=true"] and eight.mends_suffice
    assert plan_training(config_of(qwen_base, tmp_path, *eight.mends), 8, 64).fits
    small = plan_training(config_of(qwen_base, tmp_path), 2, 48)
    assert small.mends == ["train.shard_base=true", "train.teacher_slots=1", "train.offload_base=true"]
    assert small.mends_suffice and plan_training(config_of(qwen_base, tmp_path, *small.mends), 2, 48).fits


def test_mends_of_the_plan_make_it_fit(qwen_base: Path, tmp_path: Path) -> None:
    config = config_of(qwen_base, tmp_path, "train.gradient_checkpointing=false", "train.batch_size=4")
    plan = plan_training(config, 1, 141)
    assert not plan.fits and plan.mends_suffice
    mended = config_of(qwen_base, tmp_path, "train.gradient_checkpointing=false", "train.batch_size=4", *plan.mends)
    assert plan_training(mended, 1, 141).fits


def test_train_plan_prints_json_and_exits_by_verdict(qwen_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"base": str(qwen_base), "output_dir": "out"}))

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
