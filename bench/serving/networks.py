"""What the serving benches compare: one base as every arm runs it, with the collection or with one LoRA an effect.

`open_folders` exports the artefacts where `--artefacts DIR` does not hold them yet (two minutes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond
from clora.backbones.load import linear_shapes, load_backbone
from clora.backbones.qwen_image.served import ServedNetwork, rotate
from clora.config import collection_lora
from clora.export.artefact import Artefact, open_artefact
from clora.export.manifest import Format
from clora.export.verify import load_eager, picture
from clora.inference.editor import Encoded
from clora.inference.sampling import Sampling, few_step_sampling, follow
from clora.jobs.export import ExportRequest, export
from clora.lora.files import read_lora, write_lora
from clora.lora.module import LoraModule
from clora.method.flow import few_step_sigmas

RANK = 16  # of the effects' own LoRAs
SMALL = {"attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}
CONFIGS: dict[str, dict[str, Any]] = {"small": SMALL, "full": {}}


@dataclass(frozen=True)
class Request:
    """One edit: its effect, what it is conditioned on, its seed."""

    effect: str
    cond: Cond
    seed: int


def random_network(size: str, turn: Callable[..., Tensor] | None = None) -> ServedNetwork:
    """Two layers of random weights, bf16, as they are served at eight steps."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = QwenImageTransformer2DModel(num_layers=2, **CONFIGS[size]).to(torch.bfloat16).eval()
    return ServedNetwork(model.requires_grad_(False), few_step_sigmas(8), turn or rotate).eval()


def inputs_of(size: str, tokens: tuple[int, int, int]) -> tuple[Tensor, ...]:
    config, rng = CONFIGS[size], torch.Generator().manual_seed(1)
    T, R, M = tokens
    width, head = config.get("joint_attention_dim", 3584), config.get("attention_head_dim", 128)
    angle = torch.randn(T + R + M, head // 2, generator=rng)
    x, refs, text = (torch.randn(1, n, c, generator=rng).bfloat16() for n, c in ((T, 64), (R, 64), (M, width)))
    return x, refs, text, angle.cos(), angle.sin(), torch.tensor([3]), torch.tensor([M])


@contextmanager
def open_folders(place: Path | None, base: str, formats: Sequence[Format]):  # type: ignore[no-untyped-def]
    """The artefacts of `base` by format, in `place` or in a folder that goes away again."""
    with TemporaryDirectory() as temporary:
        folder = place or Path(temporary)
        for form in formats:
            if not (folder / form).is_dir():
                export(ExportRequest(folder / form, form, base, num_edits=1))
        yield {form: open_artefact(folder / form, device="cpu") for form in formats}


def sampling_of(artefact: Artefact) -> Sampling:
    manifest = artefact.manifest
    return few_step_sampling(manifest.num_steps, manifest.shift, manifest.sampler)


def eager_loop(backbone: Backbone, velocity: Any, sampling: Sampling) -> Callable[[Request], Tensor]:
    """A request by itself through the sampling loop of `clora edit`."""

    def run(request: Request) -> Tensor:
        return follow(backbone, velocity, request.cond, sampling, [request.seed], pipeline_noise=True)

    return run


def slots_loop(base: str, sampling: Sampling) -> Callable[[Request], Tensor]:
    """The collection in unmerged slots."""
    backbone, velocity = load_eager(base, _collection(base), torch.float32, ("transformer",))
    return eager_loop(backbone, velocity, sampling)


def merged_loop(folder: Path, sampling: Sampling) -> Callable[[Request], Tensor]:
    """The merged folder in diffusers' own transformer."""
    backbone = load_backbone(folder, "cpu", torch.float32, ("transformer",))
    return eager_loop(backbone, torch.no_grad()(backbone.velocity), sampling)


@dataclass
class Swapping:
    """One LoRA an effect on diffusers' transformer, by PEFT: `hotswap` writes over the last one's weights, otherwise
    it is deleted and the next one loaded."""

    backbone: Backbone
    files: dict[str, Path]
    hotswap: bool
    run: Callable[[Request], Tensor]
    loaded: str | None = field(default=None)

    def __call__(self, request: Request) -> Tensor:
        if request.effect != self.loaded:
            self.load(request.effect)
        return self.run(request)

    def load(self, effect: str) -> None:
        """Put the effect's LoRA in the last one's place."""
        transformer: Any = self.backbone.transformer
        swap = self.hotswap and self.loaded is not None
        if self.loaded is not None and not swap:
            transformer.delete_adapters("effect")
        transformer.load_lora_adapter(self.files[effect], adapter_name="effect", hotswap=swap)
        self.loaded = effect


def swapping(base: str, files: dict[str, Path], hotswap: bool, sampling: Sampling) -> Swapping:
    backbone = load_backbone(base, "cpu", torch.float32, ("transformer",))
    return Swapping(backbone, files, hotswap, eager_loop(backbone, torch.no_grad()(backbone.velocity), sampling))


def write_effect_loras(base: str, effects: Sequence[str], folder: Path) -> dict[str, Path]:
    """A LoRA of rank 16 for each effect on the linears that the collection covers; what is in it does not change how
    long it takes."""
    covered = set(read_lora(_collection(base), linear_shapes(base)).modules)
    rng = torch.Generator().manual_seed(0)
    shapes = {name: shape for name, shape in linear_shapes(base).items() if name in covered}
    files = {}
    for effect in effects:
        modules = {
            name: LoraModule(torch.randn(RANK, K, generator=rng) / K, torch.randn(N, RANK, generator=rng) / K, RANK)
            for name, (N, K) in shapes.items()
        }
        files[effect] = folder / f"{effect}.safetensors"
        write_lora(files[effect], modules, layout="diffusers", dtype=torch.float32)
    return files


def make_requests(backbone: Backbone, artefact: Artefact, count: int, seed: int) -> list[Request]:
    """Edits of random pictures, each of an effect drawn from the collection's, encoded beforehand."""
    rng = torch.Generator().manual_seed(seed)
    images = [picture(number) for number in range(8)]
    encoded, effects = Encoded(backbone, images, []), artefact.catalogue.effects
    requests = []
    for number in range(count):
        effect = effects[int(torch.randint(len(effects), (), generator=rng))]
        with torch.no_grad():
            requests.append(Request(effect.name, encoded.cond([(number % 8, effect.prompt)]), 1000 * seed + number))
    return requests


def _collection(base: str) -> Path:
    lora = collection_lora(base)
    assert lora is not None, f"{base} brings no collection"
    return lora
