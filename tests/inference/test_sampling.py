"""Sampling: the base's own pipeline to the digit where the base's own settings are asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image

from clora.backbones.base_schedule import base_sigmas
from clora.backbones.cond import make_cond
from clora.backbones.load import load_backbone
from clora.backbones.qwen_image.backbone import QwenImageBackbone
from clora.config import build_config, resolve_base
from clora.errors import InputError
from clora.inference.editor import default_sampling
from clora.inference.sampling import Sampling, few_step_sampling, follow, sample, sampling_sigmas, teacher_sampling
from clora.method.flow import few_step_sigmas
from tests.support.full_width import FULL_WIDTH
from tests.support.random_base import write_random_base

# The scheduler of Qwen-Image-Edit-2509.
REAL = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
OTHERS = [
    {"shift": 3.0},
    {"shift": 1.0, "shift_terminal": 0.1},
    {**REAL, "time_shift_type": "linear", "shift_terminal": None},
    {**REAL, "base_shift": float(np.log(3)), "max_shift": float(np.log(3)), "shift_terminal": None},  # as Lightning's
]


@pytest.mark.parametrize("config", [REAL, *OTHERS])
@pytest.mark.parametrize(("num_steps", "num_tokens"), [(40, 4096), (50, 1024), (8, 256), (2, 9000)])
def test_base_sigmas_equal_the_stock_scheduler(config: dict[str, Any], num_steps: int, num_tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    given = scheduler.config
    mu = stock.calculate_shift(
        num_tokens, given.base_image_seq_len, given.max_image_seq_len, given.base_shift, given.max_shift
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps).tolist(), mu=mu)
    found = base_sigmas(given, num_steps, num_tokens)
    assert found.dtype == torch.float32 and found[0] == 1
    torch.testing.assert_close(found, scheduler.sigmas[:-1], rtol=0, atol=1e-6)


def test_base_sigmas_of_the_real_base_are_not_those_of_few_steps() -> None:
    own = base_sigmas(FlowMatchEulerDiscreteScheduler(**REAL).config, 40, 4096)
    assert own[-1].item() == pytest.approx(0.02, abs=1e-6)
    assert (own - few_step_sigmas(40, 3.0)).abs().max() > 0.05
    assert base_sigmas(REAL, 1, 4096).tolist() == [1.0]  # where the stock scheduler divides by zero


def test_base_sigmas_refuse_another_kind_of_schedule() -> None:
    with pytest.raises(InputError, match="use_karras_sigmas is not known here; give targets.shift"):
        base_sigmas({"shift": 1.0, "use_karras_sigmas": True}, 4, 64)


# Against the stock pipeline


def base_with_scheduler(base: Path, folder: Path, config: dict[str, Any]) -> Path:
    """A copy of a base (its weights linked) with another scheduler."""
    shutil.copytree(base, folder, copy_function=lambda source, target: Path(target).symlink_to(source))
    shutil.rmtree(folder / "scheduler")
    FlowMatchEulerDiscreteScheduler(**config).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> QwenImageBackbone:
    """The tiny base, to be sampled as the real one is."""
    base = resolve_base("tiny")
    assert isinstance(base, Path)
    folder = base_with_scheduler(base, tmp_path_factory.mktemp("tiny") / "base", REAL)
    backbone = load_backbone(folder, dtype=torch.float32)
    adapters = backbone.add_adapters(["attn.to_q", "attn.to_out.0", "img_mlp.net.2"])
    adapters.add_stack("teacher", ["teacher"], 4, 4, trainable=False, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters("teacher").items():
            if name.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    return backbone


def scene(seed: int, width: int, height: int) -> Image.Image:
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def stock_latents(
    backbone: QwenImageBackbone,
    monkeypatch: pytest.MonkeyPatch,
    images: list[Image.Image],
    prompt: str,
    sampling: Sampling,
    seed: int,
    slot: str | None,
) -> torch.Tensor:
    """What the stock pipeline makes by itself: its own scheduler, sigmas, guidance and loop."""
    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", backbone.sizes.vae_image_area)
    monkeypatch.setattr(stock, "CONDITION_IMAGE_SIZE", backbone.sizes.condition_image_area)
    pipeline = backbone.pipeline
    pipeline.set_progress_bar_config(disable=True)
    height, width = backbone.output_size(images[-1])
    assert backbone.adapters is not None
    with torch.no_grad(), backbone.adapters.use([slot]):
        made = pipeline(
            image=images,
            prompt=prompt,
            negative_prompt=sampling.negative_prompt,
            true_cfg_scale=sampling.guidance,
            num_inference_steps=sampling.num_steps,
            height=height,
            width=width,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    found: torch.Tensor = made.images
    return found


def conds(backbone: QwenImageBackbone, images: list[Image.Image], prompt: str, negative: str) -> Iterator[Any]:
    refs = [backbone.encode_references([image]) for image in images]
    grid = backbone.grid(backbone.output_size(images[-1]))
    for text in (prompt, negative):
        yield make_cond(backbone.encode_prompts([text], [images]), refs, grid)


@pytest.mark.parametrize("num_images", [1, 2])
def test_sample_of_a_guided_teacher_is_the_stock_pipelines(
    tiny: QwenImageBackbone, monkeypatch: pytest.MonkeyPatch, num_images: int
) -> None:
    sampling = teacher_sampling(build_config({"preset": "clora", "base": "tiny", "output_dir": "."}))
    assert (sampling.guidance, sampling.shift, sampling.rescale) == (4.0, None, "norm")
    sampling = Sampling("euler", 10, sampling.shift, sampling.guidance, sampling.rescale, sampling.negative_prompt)
    images = [scene(0, 64, 64), scene(1, 50, 150)][:num_images]
    cond, uncond = conds(tiny, images, "add a red circle", sampling.negative_prompt)
    made = sample(tiny, cond, ["teacher"], sampling, [5], uncond, pipeline_noise=True)
    wanted = stock_latents(tiny, monkeypatch, images, "add a red circle", sampling, 5, "teacher")
    assert wanted.shape == made.shape and wanted.std() > 0.1
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-4)
    pixels = tiny.decode(made, cond.grid) - tiny.decode(wanted, cond.grid)
    assert pixels.abs().max() < 1e-4
    if num_images > 1:
        return
    # Each of the three shows: the base's noise levels, the norm, the teacher.
    for other in (
        sample(tiny, cond, ["teacher"], Sampling("euler", 10, 3.0, 4.0, "norm"), [5], uncond, pipeline_noise=True),
        sample(tiny, cond, ["teacher"], Sampling("euler", 10, None, 4.0, "none"), [5], uncond, pipeline_noise=True),
        sample(tiny, cond, [None], sampling, [5], uncond, pipeline_noise=True),
    ):
        assert (other - wanted).abs().max() > 1e-2


@pytest.mark.big(6)
@pytest.mark.slow
def test_sample_at_full_width_is_the_stock_pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of 3072, as the real model has sixty."""
    base = write_random_base(tmp_path / "base", area=32 * 32, dtype=torch.bfloat16, **FULL_WIDTH)
    FlowMatchEulerDiscreteScheduler(**REAL).save_pretrained(base / "scheduler")
    backbone = load_backbone(base, dtype=torch.float32)
    backbone.add_adapters(["attn.to_q"])
    sampling, images = Sampling("euler", 3, None, 4.0), [scene(0, 32, 32)]
    cond, uncond = conds(backbone, images, "paint it", sampling.negative_prompt)
    made = sample(backbone, cond, [None], sampling, [5], uncond, pipeline_noise=True)
    wanted = stock_latents(backbone, monkeypatch, images, "paint it", sampling, 5, None)
    # Both branches in one forward, or in two: at this width the sums of products differ in their last digits.
    difference, size = (made - wanted).abs().max(), wanted.abs().max()
    assert difference <= 1e-4 * size


# The settings


def test_sampling_sigmas_follow_the_base_unless_a_shift_is_given(tiny: QwenImageBackbone) -> None:
    own = sampling_sigmas(tiny, Sampling("euler", 8, None), 64)
    torch.testing.assert_close(own, base_sigmas(tiny.pipeline.scheduler.config, 8, 64))
    assert own[-1].item() == pytest.approx(0.02, abs=1e-6)
    assert torch.equal(sampling_sigmas(tiny, few_step_sampling(8, 3.0), 64), few_step_sigmas(8, 3.0))


def test_the_tiny_bases_own_noise_levels_are_the_few_step_schedules() -> None:
    base = resolve_base("tiny")
    scheduler = json.loads((Path(base) / "scheduler" / "scheduler_config.json").read_text())
    assert torch.equal(base_sigmas(scheduler, 40, 64), few_step_sigmas(40, 3.0))


def test_teacher_sampling_follows_targets_and_not_the_objective() -> None:
    values = {"preset": "paper", "base": "tiny", "output_dir": "."}
    plain = build_config(values)
    assert plain.objective.guidance_rescale == "none"
    assert teacher_sampling(plain) == Sampling("euler", 40, None, 4.0, "norm", " ")
    told = build_config(values, overrides=["targets.shift=3", "targets.guidance_rescale=none", "targets.num_steps=7"])
    assert teacher_sampling(told) == Sampling("euler", 7, 3.0, 4.0, "none", " ")
    assert teacher_sampling(told).num_forwards == 14
    assert default_sampling("Qwen/Qwen-Image-Edit-2509", None) == Sampling("euler", 40, None, 4.0, "norm", " ")


def test_sample_without_guidance_needs_no_negative_and_with_it_refuses(tiny: QwenImageBackbone) -> None:
    cond, uncond = conds(tiny, [scene(0, 64, 64)], "add a red circle", " ")
    for sampler in ("consistency", "euler"):
        plain = Sampling(sampler, 2, 3.0)  # type: ignore[arg-type]
        made = sample(tiny, cond, ["teacher"], plain, [1])
        assert torch.equal(made, sample(tiny, cond, ["teacher"], plain, [1], uncond))

        def velocity(x: torch.Tensor, sigma: torch.Tensor, given: Any) -> torch.Tensor:
            return tiny.velocity(x, sigma, given, ["teacher"])

        assert torch.equal(made, follow(tiny, velocity, cond, plain, [1]))
    with pytest.raises(ValueError, match="guidance 2.0 needs the condition of the negative prompt"):
        sample(tiny, cond, [None], Sampling("euler", 2, 3.0, 2.0), [1])
