"""vae_graphs: encoder and decoder as graphs are the base's own, at sizes that they were not traced with."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from torch import nn

from clora.backbones.cond import VaeGraph
from clora.backbones.load import load_backbone, served_vae
from clora.backbones.qwen_image.served_vae import ServedDecoder
from clora.export import artefact as opening
from clora.export.aoti import build_aoti, open_aoti_part
from clora.export.artefact import open_artefact
from clora.export.graph import DECODER
from clora.export.manifest import COLLECTION, Limits, check_folder, read_manifest
from clora.export.verify import FP32_VAE, picture, relative, verify
from clora.inference.edit_plan import EditRequest
from clora.jobs.edit import edit_files
from clora.jobs.export import ExportRequest, export
from clora.serve.load import open_model
from clora.serve.service import Service
from clora.serve.settings import Settings
from clora.serve.threads import ThreadEngine
from tests.serve.conftest import post
from tests.serve.test_edits import pixels

SIZES = ((64, 64), (48, 80), (16, 24))
# As few layers as a VAE may have: what is proved of a graph does not depend on them, and tracing takes as long as all.
FEW = {"base_dim": 4, "num_res_blocks": 0, "latents_mean": [0.1] * 16, "latents_std": [1.5] * 16}


def test_served_vae_is_the_pipelines_own_bit_for_bit(random_base: Path) -> None:
    backbone = load_backbone(random_base, "cpu", torch.float32, ("vae",))
    images = [picture(1).crop((0, 0, 64, 48)), picture(2).crop((0, 0, 64, 48))]
    wanted, grid = backbone.encode_references(images)
    pixels = backbone.decode(wanted, grid)
    encoder, decoder = served_vae(backbone)
    light = load_backbone(random_base, "cpu", torch.float32, ())
    with pytest.raises(RuntimeError, match="the vae of .* is not loaded"):
        light.encode_references(images)
    with torch.no_grad():
        light.use_vae_graphs(encoder, decoder)
        latents, own_grid = light.encode_references(images)
        assert own_grid == grid and torch.equal(latents, wanted)
        assert torch.equal(light.decode(wanted, grid), pixels)
    assert pixels.std() > 0.05


def check_sizes(graphs: tuple[VaeGraph, VaeGraph], networks: tuple[nn.Module, nn.Module]) -> None:
    """Encoder and decoder of a VAE that makes a latent pixel of 4 x 4, at three sizes."""
    rng = torch.Generator().manual_seed(0)
    for batch, (height, width) in zip((1, 3, 4), SIZES, strict=True):
        pixels = torch.rand(batch, 3, height, width, generator=rng) * 2 - 1
        latents = torch.randn(batch, 16, height // 4, width // 4, generator=rng)
        with torch.no_grad():
            assert relative(graphs[0](pixels), networks[0](pixels)) <= FP32_VAE
            assert relative(graphs[1](latents), networks[1](latents)) <= FP32_VAE


@pytest.mark.slow
def test_build_aoti_compiles_a_decoder(tmp_path: Path) -> None:
    """And not the encoder: compiling takes half a minute for either, and is the same function."""
    torch.manual_seed(0)
    network = ServedDecoder(AutoencoderKLQwenImage(**FEW, dim_mult=[1, 1], temperal_downsample=[False])).eval()
    rng = torch.Generator().manual_seed(0)
    limits = Limits(batch=4, tokens=64, text_buckets=(32,))
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True}):
        build_aoti(network, (torch.randn(2, 16, 4, 6, generator=rng),), limits, tmp_path, DECODER)
    decode = open_aoti_part(tmp_path, DECODER)
    latents = torch.randn(3, 16, 12, 20, generator=rng)
    channels_last = latents.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as the pixels of pictures are
    with torch.no_grad():
        for given in (latents, channels_last):
            assert relative(decode(given), network(latents)) <= FP32_VAE


@pytest.mark.slow
def test_export_with_its_vae_edits_without_the_bases(
    one_block: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    base, lora = tmp_path / "base", one_block[1]
    shutil.copytree(one_block[0], base)
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(**FEW, dim_mult=[1, 1, 1], temperal_downsample=[False, False])
    vae.save_pretrained(base / "vae")
    folder = tmp_path / "artefact"
    export(ExportRequest(folder, "onnx", str(base), lora, num_edits=1))
    manifest = read_manifest(folder)
    assert manifest.components == {"transformer": "artefact", "vae": "artefact", "text_encoder": "base"}
    assert manifest.parity["ok"] and 0 < manifest.parity["vae"] <= manifest.parity["vae_bar"] == FP32_VAE
    assert {"vae_encoder.onnx", "vae_decoder.onnx"} <= set(check_folder(folder).files)

    loaded = []

    def load(base: str, device: str, dtype: torch.dtype, components: tuple[str, ...]) -> object:
        loaded.extend(components)
        return load_backbone(base, device, dtype, components)

    monkeypatch.setattr(opening, "load_backbone", load)
    picture(4, 80).save(tmp_path / "in.png")
    request = EditRequest((tmp_path / "in.png",), tmp_path / "graph.png", effects=("a",), seeds=(1,))
    edit_files(request, artefact=folder)
    assert loaded == ["text_encoder"]
    edit_files(replace(request, output=tmp_path / "eager.png", base=str(base), lora=folder / COLLECTION))
    settings = Settings(artefact=folder, thumbnails=False)
    opened = open_model(settings)
    with closing(Service(settings, ThreadEngine({opened.offer.name: opened}, settings))) as service:
        answer = post(
            service, {"effect": "a", "seed": "1"}, [("image", ("in.png", (tmp_path / "in.png").read_bytes()))]
        )
    made, wanted = (np.asarray(Image.open(tmp_path / f"{name}.png"), np.int16) for name in ("graph", "eager"))
    for one in (made, pixels(answer)):
        assert one.shape == wanted.shape and np.abs(one - wanted).max() <= 1

    artefact = open_artefact(folder)
    assert artefact.vae is not None
    check_sizes(artefact.vae, served_vae(load_backbone(base, "cpu", torch.float32, ("vae",))))
    encode, decode = artefact.vae
    off = verify(replace(artefact, vae=(encode, lambda latents: decode(latents * 1.01))), num_edits=1)
    assert len([fault for fault in off.faults if "the VAE is" in fault]) == 1
