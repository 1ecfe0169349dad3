"""Qwen-Image-Edit-2511 (`zero_cond_t`): at its full width as diffusers with PEFT computes it, and in every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from bench.kernels.block import sharing_weights
from bench.training.cycle_models import as_backbone
from clora.backbones.base import Kernels
from clora.backbones.cond import Cond, make_cond
from clora.cli import commands as cli
from clora.lora.catalogue import read_catalogue
from clora.training.tracker import read_log
from tests.backbones.qwen_image.test_block import (
    add_random_stacks,
    peft_results,
    relative_error,
    with_gradients,
)
from tests.support.full_width import full_width_transformer
from tests.support.random_base import write_random_base
from tests.support.small_job import NAMES, write_config, write_dataset


@pytest.fixture(scope="module")
def transformer() -> Any:
    return full_width_transformer(zero_cond_t=True)


def inputs() -> tuple[Tensor, Tensor, Cond]:
    """Two samples of 6 tokens at different noise levels, each with two references and a prompt of its own length."""
    rng = torch.Generator().manual_seed(2)
    prompts = [torch.randn(length, 3584, generator=rng) for length in (5, 3)]
    references = [(torch.randn(2, 4, 64, generator=rng), (2, 2)), (torch.randn(2, 2, 64, generator=rng), (1, 2))]
    cond = make_cond(prompts, references, (2, 3))
    return torch.randn(2, 6, 64, generator=rng), torch.tensor([0.9, 0.4]), cond


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_velocity_and_gradients_at_full_width_equal_diffusers_with_peft(transformer: Any, kernels: Kernels) -> None:
    """Of every LoRA, fp32, within 1e-5; without `zero_cond_t` the same weights give another velocity."""
    backbone = as_backbone(sharing_weights(transformer))
    adapters = backbone.add_adapters()
    add_random_stacks(adapters)
    backbone.use_kernels(kernels)
    velocity, *gradients = with_gradients(backbone, inputs(), ["a0"], adapters.parameters("a"))
    got = dict(zip(adapters.named_parameters("a"), (gradient[0] for gradient in gradients), strict=True))
    want = peft_results(sharing_weights(transformer), adapters, inputs())
    assert relative_error(velocity, want.pop("velocity")) < 1e-5
    assert got.keys() == want.keys() and len(want) == 2 * 2 * 14
    assert sum(bool(gradient.any()) for gradient in want.values()) > 0.8 * len(want)
    for name, gradient in want.items():
        assert relative_error(got[name], gradient) < 1e-5 or not (gradient.any() or got[name].any()), name
    backbone.transformer.zero_cond_t = False
    for block in backbone.blocks:
        block.zero_cond_t = False
    with torch.no_grad():
        assert relative_error(backbone.velocity(*inputs(), ["a0"]), velocity) > 1e-2


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same random weights as a base of 2511's kind and of 2509's."""
    folder = tmp_path_factory.mktemp("bases")
    return write_random_base(folder / "2511", zero_cond_t=True), write_random_base(folder / "2509")


def call(*arguments: str) -> None:
    answer = CliRunner().invoke(cli.app, list(arguments))
    assert answer.exit_code == 0, answer.output


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_validate_teach_train_and_edit_take_such_a_base(
    bases: tuple[Path, Path], tmp_path: Path, kernels: Kernels
) -> None:
    config = write_config(tmp_path / "config.yaml", bases[0], write_dataset(tmp_path / "data"), tmp_path / "run")
    short = ("train.max_train_steps=2", "train.coarse_steps=1", "train.sample_steps=0", "teach.max_train_steps=1")
    for command in ("validate", "teach", "train"):
        call(command, str(config), *short, f"train.kernels={kernels}")
    collection = tmp_path / "run" / "collection.safetensors"
    assert [entry.name for entry in read_catalogue(collection).effects] == list(NAMES)
    rows = read_log(tmp_path / "run" / "train")
    assert len(rows) == 2 and all(np.isfinite(value) for row in rows for value in row.values())
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    edited = []
    for base in bases:
        out = tmp_path / f"{base.name}.png"
        arguments = ("--lora", str(collection), "--image", str(tmp_path / "in.png"), "--effect", NAMES[0])
        call("edit", "--base", str(base), *arguments, "--output", str(out))
        edited.append(np.asarray(Image.open(out)))
    assert edited[0].shape == (64, 64, 3) and (edited[0] != edited[1]).any()
