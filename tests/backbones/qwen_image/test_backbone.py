"""The backbone gives the transformer exactly what the stock pipeline gives it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image
from torch import Tensor, nn

from clora.backbones.cond import Cond, make_cond
from clora.backbones.load import linear_shapes, load_backbone
from clora.backbones.qwen_image.backbone import QwenImageBackbone
from clora.backbones.qwen_image.text import condition_image
from clora.config import resolve_base
from clora.errors import InputError, InputErrors
from clora.lora.module import LoraModule
from tests.support.random_base import AREA, write_random_base

# The few-step schedule's, which bf16 holds badly: the stock pipeline rounds 1000 sigma, not sigma.
SIGMAS = (1.0, 0.9545, 0.6429, 0.3)
PROMPT = "paint it in the features of the input image"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def backbone(base: Path) -> QwenImageBackbone:
    return load_backbone(base, dtype=torch.float32)


@pytest.fixture(scope="session")
def zero_cond_t_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_base(tmp_path_factory.mktemp("base2511"), zero_cond_t=True)


def picture(seed: int, width: int = 80, height: int = 80) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def stock_noise_preds(
    backbone: QwenImageBackbone,
    monkeypatch: pytest.MonkeyPatch,
    images: list[Image.Image],
    latents: Tensor,
    **kwargs: Any,
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Run the stock pipeline itself; (latents, timestep / 1000, output) of each transformer call, and the
    last latents."""
    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", AREA)
    monkeypatch.setattr(stock, "CONDITION_IMAGE_SIZE", AREA)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
        calls.append((given["hidden_states"], given["timestep"], output[0]))

    handle = backbone.transformer.register_forward_hook(record, with_kwargs=True)
    pipeline = backbone.pipeline
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(image=images, prompt=PROMPT, latents=latents, height=64, width=64, true_cfg_scale=1.0,
                   sigmas=list(SIGMAS), **kwargs)  # fmt: skip
    handle.remove()
    return calls, out.images


@pytest.mark.parametrize("which", ["base", "zero_cond_t_base"])
@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocity_is_the_stock_noise_pred_bitwise(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    num_images: int,
    dtype: torch.dtype,
) -> None:
    backbone = load_backbone(request.getfixturevalue(which), dtype=dtype)
    images = [picture(0), picture(1, 50, 150)][:num_images]
    latents = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    calls, _ = stock_noise_preds(backbone, monkeypatch, images, latents, output_type="latent")
    assert len(calls) == len(SIGMAS)

    refs = [backbone.encode_references([image]) for image in images]
    cond = make_cond(backbone.encode_prompts([PROMPT], [images]), refs, (8, 8))
    sigmas = backbone.pipeline.scheduler.sigmas
    seen: list[Tensor] = []
    backbone.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["timestep"]), with_kwargs=True
    )
    for index, (hidden, timestep, output) in enumerate(calls):
        x = hidden[:, :64]
        with torch.no_grad():
            found = backbone.velocity(x, sigmas[index : index + 1], cond)
        assert torch.equal(seen[index], timestep) and seen[index].dtype == timestep.dtype
        assert torch.equal(hidden[:, 64:], torch.cat(cond.refs, 1))  # references
        assert torch.equal(found, output[:, :64])
        assert found.dtype == dtype and found.abs().max() > 1e-3


def test_decode_is_the_stock_decode_bitwise(backbone: QwenImageBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    _, final = stock_noise_preds(backbone, monkeypatch, [picture(0)], latents, output_type="latent")
    _, images = stock_noise_preds(backbone, monkeypatch, [picture(0)], latents, output_type="pil")
    decoded = backbone.decode(final, (8, 8))
    assert decoded.shape == (1, 3, 64, 64) and decoded.std() > 0.01
    assert np.array_equal(np.asarray(backbone.to_pil(decoded)[0]), np.asarray(images[0]))


def test_encode_images_normalises_the_mode(backbone: QwenImageBackbone) -> None:
    images = [picture(0, 48, 96), picture(1, 48, 96)]
    latents, grid = backbone.encode_images(images, (96, 48))
    assert grid == (12, 6) and latents.shape == (2, 72, 64)
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]) / 127.5 - 1
    vae = backbone.vae
    with torch.no_grad():
        z = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (vae.config.latents_mean, vae.config.latents_std))
    z = (z - mean) / std
    for b, row, column in ((0, 0, 0), (1, 11, 5), (1, 3, 2)):
        # A token is a 2 x 2 square of latent pixels, channels first.
        square = z[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        torch.testing.assert_close(latents[b, 6 * row + column], square.reshape(-1), rtol=1e-4, atol=1e-5)


def test_decode_inverts_the_packing_and_normalisation(backbone: QwenImageBackbone) -> None:
    latents, grid = backbone.encode_images([picture(0, 48, 96)], (96, 48))
    vae = backbone.vae
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(picture(0, 48, 96))).permute(2, 0, 1)[None, :, None] / 127.5 - 1
        direct = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[:, :, 0]
    wanted = (direct * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(backbone.decode(latents, grid), wanted, rtol=1e-4, atol=1e-4)


# Text


def test_encode_prompts_passes_the_token_types(backbone: QwenImageBackbone) -> None:
    """The processor's own output, given to the text encoder in full, is the reference."""
    image = picture(0)
    pipeline, encoder = backbone.pipeline, backbone.pipeline.text_encoder
    small = condition_image(pipeline, image, AREA)
    text = pipeline.prompt_template_encode.format("Picture 1: <|vision_start|><|image_pad|><|vision_end|>" + PROMPT)
    inputs = pipeline.processor(text=[text], images=[small], return_tensors="pt")
    assert inputs["mm_token_type_ids"].sum() == (inputs["input_ids"] == encoder.config.image_token_id).sum() == 4
    with torch.no_grad():
        wanted = encoder(**inputs, output_hidden_states=True).hidden_states[-1][0, 64:]
        positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
        forgotten = encoder(**inputs, position_ids=positions, output_hidden_states=True).hidden_states[-1][0, 64:]
    found = backbone.encode_prompts([PROMPT], [[image]])[0]
    assert torch.equal(found, wanted)
    assert (found - forgotten).abs().max() > 1e-3  # what the stock pipeline computes today


def test_encode_prompts_each_with_its_own_images(backbone: QwenImageBackbone) -> None:
    jobs = [(PROMPT, [picture(0)]), ("paint", [picture(1), picture(2)]), ("paint", [])]
    together = backbone.encode_prompts([p for p, _ in jobs], [i for _, i in jobs])
    assert len({len(text) for text in together}) == 3
    for (prompt, images), text in zip(jobs, together, strict=True):
        assert torch.equal(backbone.encode_prompts([prompt], [images])[0], text)
    other = backbone.encode_prompts(["paint"], [[picture(1), picture(3)]])[0]
    assert not torch.equal(together[1], other)


def test_encode_prompts_refuses_what_is_too_long(backbone: QwenImageBackbone) -> None:
    limit = backbone.max_prompt_tokens
    words = " paint" * limit
    fitting = words[: len(" paint") * (limit - 16)]
    assert backbone.count_prompt_tokens(words) == limit  # one token a word
    assert len(backbone.encode_prompts([fitting], [[picture(0)]])[0]) > limit - 16
    with pytest.raises(InputError, match=f"has {limit + 1} tokens, the limit is {limit}; shorten it"):
        backbone.encode_prompts([words + " paint"], [[]])
    with pytest.raises(InputError, match="prompt and images take .* tokens, the limit is 192"):
        backbone.encode_prompts([words], [[picture(0)]])


# Batches


def random_cond(backbone: QwenImageBackbone, lengths: list[int], seed: int = 0) -> Cond:
    rng = torch.Generator().manual_seed(seed)
    text = [torch.randn(length, 32, generator=rng) for length in lengths]
    refs = [
        (torch.randn(len(lengths), 12, 64, generator=rng), (3, 4)),
        (torch.randn(len(lengths), 4, 64, generator=rng), (2, 2)),
    ]
    return make_cond(text, refs, (4, 2), [f"e{i}" for i in range(len(lengths))])


@pytest.mark.parametrize("which", ["base", "zero_cond_t_base"])
def test_velocity_batch_equals_single_samples(request: pytest.FixtureRequest, which: str) -> None:
    backbone = load_backbone(request.getfixturevalue(which), dtype=torch.float32, components=["transformer"])
    adapters = backbone.add_adapters()
    adapters.add_stack("t", ["a", "b"], 2, 2, trainable=False, init="zeros")
    for seed, slot in enumerate(adapters.slot_names):
        rng = torch.Generator().manual_seed(seed)
        modules = {
            name: LoraModule(torch.randn(2, K, generator=rng) / 8, torch.randn(N, 2, generator=rng) / 8, 2.0)
            for name, (N, K) in adapters.module_shapes.items()
        }
        adapters.load_slot(slot, modules)
    cond = random_cond(backbone, [5, 9, 2])
    slots = ["a", None, "b"]
    x = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.9, 0.3, 0.5])
    with torch.no_grad():
        together = backbone.velocity(x, sigma, cond, slots)
        base_only = backbone.velocity(x, sigma, cond)
        for i in range(3):
            alone = backbone.velocity(x[i : i + 1], sigma[i : i + 1], cond.select([i]), [slots[i]])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    assert (together - base_only).abs().amax((1, 2)).gt(1e-2).tolist() == [True, False, True]


def test_cond_select_and_cat_are_inverse(backbone: QwenImageBackbone) -> None:
    from clora.backbones.cond import cat_conds

    cond = random_cond(backbone, [5, 9, 2])
    parts = [cond.select([i]) for i in range(3)]
    assert [part.text_BLD.shape[1] for part in parts] == [5, 9, 2]
    assert all(part.text_mask_BL is None for part in parts)
    again = cat_conds(parts)
    assert cond.text_mask_BL is not None and again.text_mask_BL is not None
    assert torch.equal(again.text_BLD, cond.text_BLD) and torch.equal(again.text_mask_BL, cond.text_mask_BL)
    assert all(torch.equal(a, b) for a, b in zip(again.refs, cond.refs, strict=True))
    assert again.effects == ("e0", "e1", "e2") and again.ref_grids == ((3, 4), (2, 2))
    turned = cond.select([2, 0])
    assert turned.effects == ("e2", "e0") and turned.text_BLD.shape[1] == 5
    assert turned.text_mask_BL is not None and turned.text_mask_BL.sum(1).tolist() == [2, 5]
    assert turned.to("cpu", torch.bfloat16).refs[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="bucket by size"):
        cat_conds([cond, make_cond(list(cond.text_BLD), [], (4, 2))])


def test_make_cond_without_padding_has_no_mask(backbone: QwenImageBackbone) -> None:
    assert random_cond(backbone, [4, 4]).text_mask_BL is None
    with pytest.raises(ValueError, match="do not have"):
        make_cond([torch.zeros(2, 32)], [(torch.zeros(1, 5, 64), (2, 2))], (2, 2))


def test_velocity_fp32_latents_on_a_bf16_base(base: Path) -> None:
    backbone = load_backbone(base, dtype=torch.bfloat16, components=["transformer"])
    cond = random_cond(backbone, [5])
    x = torch.randn(1, 8, 64)
    with torch.no_grad():
        found = backbone.velocity(x, torch.tensor([0.7]), cond)
        half = backbone.velocity(x.bfloat16(), torch.tensor([0.7]), cond.to("cpu", torch.bfloat16))
    assert found.dtype == torch.float32 and torch.equal(found, half.float())


def test_use_plain_attention_computes_the_same(base: Path) -> None:
    """In fp32 the two ways of attention differ by rounding alone, gradients and padded prompts included."""
    found = []
    for plain in (False, True):
        backbone = load_backbone(base, dtype=torch.float32, components=["transformer"])
        if plain:
            backbone.use_plain_attention()
        cond = random_cond(backbone, [5, 3])
        x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        velocity = backbone.velocity(x, torch.tensor([0.7, 0.2]), cond)
        (gradient,) = torch.autograd.grad(velocity.square().sum(), x)
        found.append((velocity.detach(), gradient))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_use_plain_attention_leaves_other_models_theirs(base: Path) -> None:
    """diffusers makes the attention last chosen that of every model that chose none."""
    before = _AttentionBackendRegistry.get_active_backend()
    load_backbone(base, dtype=torch.float32, components=["transformer"]).use_plain_attention()
    assert _AttentionBackendRegistry.get_active_backend() == before and before[0].value != "_native_math"


def test_set_gradient_checkpointing_same_gradients(base: Path) -> None:
    gradients = []
    for enabled in (False, True):
        backbone = load_backbone(base, dtype=torch.float32, components=["transformer"])
        adapters = backbone.add_adapters(["attn.to_q", "img_mlp.net.2"])
        adapters.add_stack("s", ["s"], 2, 2, trainable=True, generator=torch.Generator().manual_seed(0))
        backbone.set_gradient_checkpointing(enabled)
        x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(1))
        backbone.velocity(x, torch.tensor([0.7, 0.2]), random_cond(backbone, [5, 3]), ["s"]).square().sum().backward()
        gradients.append([p.grad for name, p in adapters.named_parameters("s").items() if name.endswith(".B")])
    assert all(g is not None and g.any() for g in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# Loading


def test_sizes_follow_the_pipeline(backbone: QwenImageBackbone, base: Path) -> None:
    assert backbone.pixels_per_token == 8 and backbone.output_size() == (64, 64)
    for width, height in ((80, 80), (50, 150), (300, 100)):  # shapes that the stock pipeline keeps
        wanted_width, wanted_height = stock.calculate_dimensions(AREA, width / height)
        assert backbone.reference_size(picture(0, width, height)) == (wanted_height, wanted_width)
    assert backbone.grid((64, 32)) == (8, 4)
    with pytest.raises(InputError, match="multiples of 8"):
        backbone.grid((64, 33))
    without_vae = load_backbone(base, components=[])
    assert without_vae.pixels_per_token == 8 and without_vae.max_prompt_tokens == backbone.max_prompt_tokens


def test_sizes_default_to_the_pipelines_constants(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "clora.json").unlink()
    sizes = load_backbone(folder, components=[]).sizes
    assert (sizes.vae_image_area, sizes.condition_image_area) == (
        stock.VAE_IMAGE_SIZE,
        stock.CONDITION_IMAGE_SIZE,
    )
    (folder / "clora.json").write_text('{"vae_image_are": 4096, "default_size": [64]}')
    with pytest.raises(InputErrors) as caught:
        load_backbone(folder, components=[])
    assert len(caught.value.faults) == 2 and "vae_image_are" in str(caught.value)


def test_free_encoders(base: Path) -> None:
    backbone = load_backbone(base, dtype=torch.float32)
    backbone.free_encoders()
    with pytest.raises(RuntimeError, match="text_encoder .* was freed"):
        backbone.encode_prompts(["paint"], [[]])
    latents, grid = backbone.encode_references([picture(0)])
    assert backbone.decode(latents, grid).shape[0] == 1 and backbone.count_prompt_tokens("paint") > 0
    backbone.free_encoders(vae=True)
    with pytest.raises(RuntimeError, match="vae .* was freed"):
        backbone.decode(latents, grid)


def test_load_backbone_frozen_and_only_what_is_asked(base: Path) -> None:
    backbone = load_backbone(str(base), dtype=torch.bfloat16, components=["transformer"])
    assert backbone.pipeline.vae is None and backbone.pipeline.text_encoder is None
    parameters = list(backbone.transformer.parameters())
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in parameters)
    assert not backbone.transformer.training
    with pytest.raises(RuntimeError, match="without adapters; call add_adapters first"):
        backbone.velocity(torch.zeros(1, 8, 64), torch.ones(1), random_cond(backbone, [2]), ["student"])


def test_load_backbone_refuses_other_models(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    index, config = folder / "model_index.json", folder / "transformer" / "config.json"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_backbone(folder, components=[])

    def with_change(path: Path, message: str, **changes: Any) -> None:
        text = path.read_text()
        path.write_text(json.dumps(json.loads(text) | changes))
        refused(message)
        path.write_text(text)

    with_change(index, "names QwenImagePipeline; clora needs", _class_name="QwenImagePipeline")
    with_change(config, "guidance_embeds", guidance_embeds=True)
    with_change(config, "use_layer3d_rope", use_layer3d_rope=True)
    with_change(config, "transformer of 32 channels a token, VAE of 64", in_channels=32)
    (folder / "vae" / "config.json").unlink()
    refused("cannot be loaded")
    with pytest.raises(InputError, match="no model_index.json"):
        load_backbone(tmp_path)
    with pytest.raises(InputError, match="no bundled base, folder or hub id"):
        load_backbone("no-such-thing")


def test_load_backbone_refuses_a_foreign_tokenizer(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    path = folder / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:10]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="tokens of the system prompt where the pipeline drops 64"):
        load_backbone(folder, components=[])


def test_resolve_base(base: Path) -> None:
    assert resolve_base(base) == base and resolve_base("Qwen/Qwen-Image-Edit-2509") == "Qwen/Qwen-Image-Edit-2509"


def test_linear_shapes_without_weights(base: Path, backbone: QwenImageBackbone) -> None:
    linears = backbone.transformer.named_modules()
    wanted = {name: tuple(m.weight.shape) for name, m in linears if isinstance(m, nn.Linear)}
    assert linear_shapes(base) == wanted
