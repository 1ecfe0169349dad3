"""Is an artefact equal to the eager model? Seeded velocities, padded text and edits, side by side.

The eager model is the base with the collection as adapters, unmerged, in fp32. An fp32 artefact must be as near as two
orders of the same sums are. One in bf16 may be at most twice as far as the eager model in bf16 is; with eight bits,
twice as far as that and what they cost where they were simulated.

Shape legend: B batch, T image tokens, C latent channels per token, L text tokens, D text width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clora.backbones import COMPONENTS
from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, Grid, make_cond
from clora.backbones.load import linear_shapes, load_backbone
from clora.errors import ParityError
from clora.export.artefact import Artefact, check_base, device_of, open_files
from clora.export.manifest import COLLECTION, Manifest
from clora.inference.sampling import few_step_sampling, follow
from clora.lora.files import read_lora
from clora.method.flow import Velocity, few_step_sigmas

log = logging.getLogger(__name__)

SLOT = "student"
FP32_VELOCITY = 3e-6  # of the largest value: what another order of fp32 sums changes
FP32_VAE = 1e-5  # the same, through some thirty convolutions
FP32_PIXEL = 1  # of 255: a value at the edge between two may fall to either side
BF16_FACTOR = 2.0

# Grids of result and references, and text tokens of each sample.
SHAPES: tuple[tuple[Grid, tuple[Grid, ...], tuple[int, ...]], ...] = (
    ((4, 4), ((4, 4),), (17,)),
    ((4, 6), ((4, 6),), (9, 31)),
    ((7, 3), ((5, 3), (2, 2)), (24, 24, 24)),
    ((8, 8), ((8, 8),), (12, 30, 7, 25)),
    ((2, 5), ((3, 3),), (33, 20, 28, 5, 14, 40, 32, 3)),
)


@dataclass(frozen=True)
class Parity:
    """What was measured, and the bar for it. Errors are the largest absolute difference: of velocities and latents
    relative to the largest value, of pixels in 1/255. `padding`: how far other values in padded text move a velocity.
    `vae`: of its graphs, of latents and pixels, where the artefact has them. `effects` are those of the edits."""

    precision: str
    velocity: float
    velocity_bar: float
    shapes: int
    padding: float
    latent: float
    pixel: int
    pixel_bar: int | None
    edits: int
    effects: tuple[str, ...]
    vae: float | None = None
    vae_bar: float | None = None

    @property
    def faults(self) -> list[str]:
        """Every bar that is missed, in a sentence."""
        found = []
        if not self.velocity <= self.velocity_bar:
            found.append(f"velocity is {self.velocity:.3g} from the eager model's, the bar is {self.velocity_bar:.3g}")
        if self.vae is not None and self.vae_bar is not None and not self.vae <= self.vae_bar:
            found.append(f"the VAE is {self.vae:.3g} from the base's, the bar is {self.vae_bar:.3g}")
        if self.padding != 0:
            found.append(f"padded text moves the velocity by {self.padding:.3g}, where it must change nothing")
        if self.pixel_bar is not None and self.pixel > self.pixel_bar:
            found.append(f"a pixel is {self.pixel}/255 from the eager model's, the bar is {self.pixel_bar}/255")
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": not self.faults}


def verify(
    artefact: Artefact,
    base: str | None = None,
    num_edits: int = 3,
    seed: int = 0,
    on_part: Callable[[str], None] = lambda what: None,
    device: torch.device | None = None,
) -> Parity:
    """Compare an artefact with the eager model on `base` (None: the one that its manifest names), which is on `device`
    (None: the artefact's).

    `on_part` is told what is done next. Raises `InputError` for another base than it was exported from.
    """
    manifest, base, device = artefact.manifest, base or artefact.manifest.base, device or artefact.device
    check_base(artefact.folder, manifest, base)
    on_part("loading the eager model")
    lora, half = artefact.folder / COLLECTION, manifest.precision != "float32"
    eager, eager_velocity = load_eager(base, lora, torch.float32, device=device)
    own = load_eager(base, lora, manifest.dtype, ("transformer",), device)[1] if half else None

    prompt = artefact.catalogue.effects[0].prompt
    text = eager.encode_prompts([prompt], [[picture(seed)]])[0]
    drawn = random_cases(artefact, eager.token_channels, text.shape[1], seed)
    cases = [(x_BTC.to(device), sigma_B.to(device), cond.to(device)) for x_BTC, sigma_B, cond in drawn]
    error = own_error = 0.0
    for number, case in enumerate(cases, 1):
        on_part(f"velocity {number} of {len(cases)}")
        truth = eager_velocity(*case)
        error = max(error, relative(artefact.velocity(*case), truth))
        if own is not None:
            own_error = max(own_error, relative(own(*case), truth))
    eight_bits = 0.0 if manifest.quantization is None else manifest.quantization.worst
    padding = padding_change(artefact.velocity, cases)

    on_part("the VAE")
    around = eager if artefact.vae is None else vae_backbone(artefact, base)
    vae = None if artefact.vae is None else compare_vae(around, eager, base, seed)
    effects = [artefact.catalogue.effects[i % len(artefact.catalogue.effects)] for i in range(num_edits)]
    latent, pixel = 0.0, 0
    for number, effect in enumerate(effects):
        on_part(f"edit {number + 1} of {num_edits}")
        far, off = compare_edit(artefact, around, eager, eager_velocity, effect.prompt, seed + number)
        latent, pixel = max(latent, far), max(pixel, off)
    return Parity(
        manifest.precision,
        error,
        BF16_FACTOR * (own_error + eight_bits) if half else FP32_VELOCITY,
        len(cases),
        padding,
        latent,
        pixel,
        None if half else FP32_PIXEL,
        num_edits,
        tuple(effect.name for effect in effects),
        vae and vae[0],
        vae and vae[1],
    )


def compare(
    folder: Path, manifest: Manifest, base: str | None, num_edits: int, seed: int, on_part: Callable[[str], None]
) -> Parity:
    """`verify` for the checked files of an artefact, on its own device. In fp32, whose bar was measured on CPUs, and
    where a GPU has no room for the eager model too, that is on the CPU."""
    cpu, own = torch.device("cpu"), device_of(folder, manifest, None)
    if manifest.precision != "float32":
        try:
            return verify(open_files(folder, manifest, base, own), base, num_edits, seed, on_part)
        except torch.OutOfMemoryError:
            log.warning("%s: the GPU has no room for the eager model; it is compared on the CPU, which is slow", folder)
    artefact = open_files(folder, manifest, base, own if manifest.engine else cpu)
    return verify(artefact, base, num_edits, seed, on_part, cpu)


def check_parity(folder: Path, parity: Parity) -> None:
    """Raise `ParityError` with every bar that was missed."""
    if parity.faults:
        raise ParityError(
            f"{folder}: {'; '.join(parity.faults)}; it is not the model that was asked for, do not use it"
        )


def load_eager(
    base: str,
    lora: Path,
    dtype: torch.dtype,
    components: Sequence[str] = COMPONENTS,
    device: torch.device | str = "cpu",
) -> tuple[Backbone, Velocity]:
    """The base with a LoRA on it, unmerged: what artefacts are measured by."""
    file = read_lora(lora, linear_shapes(base))
    backbone = load_backbone(base, device, dtype, components)
    backbone.add_adapters(list(file.modules)).add_lora(SLOT, file.modules, dtype=dtype)

    @torch.no_grad()
    def velocity(x_BTC: Tensor, sigma_B: Tensor, cond: Cond) -> Tensor:
        return backbone.velocity(x_BTC, sigma_B, cond, [SLOT])

    return backbone, velocity


def random_cases(artefact: Artefact, channels: int, width: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Cond]]:
    """x (B, T, C), sigma (B,) and cond of every one of `SHAPES`; each sample at a step of its own."""
    manifest, rng = artefact.manifest, torch.Generator().manual_seed(seed)
    levels = few_step_sigmas(manifest.num_steps, manifest.shift)
    most = manifest.limits.text_buckets[-1]
    for number, (grid, ref_grids, lengths) in enumerate(SHAPES):
        B = len(lengths)
        texts = [torch.randn(min(length, most), width, generator=rng) for length in lengths]
        refs = [(torch.randn(B, h * w, channels, generator=rng), (h, w)) for h, w in ref_grids]
        x_BTC = torch.randn(B, grid[0] * grid[1], channels, generator=rng)
        step = torch.arange(number, number + B) % manifest.num_steps
        yield x_BTC, levels[step], make_cond(texts, refs, grid)


def padding_change(velocity: Velocity, cases: list[tuple[Tensor, Tensor, Cond]]) -> float:
    """How far a velocity moves, at most, where values in padded text are others."""
    worst = 0.0
    for x_BTC, sigma_B, cond in cases:
        if cond.text_lengths is not None and (mask := cond.text_mask_BL) is not None:
            junk = torch.where(mask[..., None], cond.text_BLD, 7.0 - 3.0 * cond.text_BLD)
            moved = velocity(x_BTC, sigma_B, cond) - velocity(x_BTC, sigma_B, replace(cond, text_BLD=junk))
            worst = max(worst, moved.abs().max().item())
    return worst


def compare_vae(own: Backbone, eager: Backbone, base: str, seed: int) -> tuple[float, float]:
    """How far an artefact's VAE, `own`'s, is from the base's in fp32, relative, and the bar: encoding two pictures of
    unequal sides, decoding what the base makes of them. In bf16 the bar is twice how far the base's own is."""
    half = None if own.dtype == torch.float32 else load_backbone(base, "cpu", own.dtype, ("vae",))
    images = [picture(seed + number).crop((0, 0, 64, 48)) for number in (1, 2)]
    wanted, grid = eager.encode_references(images)
    errors = []
    for backbone in (own, half) if half is not None else (own,):
        latents = relative(backbone.encode_references(images)[0], wanted)
        errors.append(max(latents, relative(backbone.decode(wanted, grid), eager.decode(wanted, grid))))
    return errors[0], FP32_VAE if half is None else BF16_FACTOR * errors[1]


def vae_backbone(artefact: Artefact, base: str) -> Backbone:
    """The base without weights, encoding and decoding with the artefact's graphs."""
    backbone = load_backbone(base, "cpu", artefact.manifest.dtype, ())
    assert artefact.vae is not None
    backbone.use_vae_graphs(*artefact.vae)
    return backbone


def compare_edit(
    artefact: Artefact, own: Backbone, eager: Backbone, eager_velocity: Velocity, prompt: str, seed: int
) -> tuple[float, int]:
    """The errors of one edit of a random picture: of its latents, relative, and of its pixels in 1/255. `own` encodes
    and decodes for the artefact."""
    manifest, image = artefact.manifest, picture(seed)
    sampling = few_step_sampling(manifest.num_steps, manifest.shift, manifest.sampler)
    grid, text = eager.grid(eager.output_size(image)), eager.encode_prompts([prompt], [[image]])
    found, pixels = [], []
    for backbone, velocity in ((eager, eager_velocity), (own, artefact.velocity)):
        cond = make_cond(text, [backbone.encode_references([image])], grid)
        x0 = follow(backbone, velocity, cond, sampling, [seed], pipeline_noise=True)
        found.append(x0)
        pixels.append(torch.round(backbone.decode(x0, grid) * 255))
    return relative(found[1], found[0]), int((pixels[0] - pixels[1]).abs().max().item())


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value wanted."""
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def picture(seed: int, side: int = 64) -> Image.Image:
    """A picture of random soft blots, (side, side) pixels."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (5, 5, 3), dtype=torch.uint8, generator=rng).numpy()
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
