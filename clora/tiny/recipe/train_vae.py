"""Train the tiny world's autoencoder: `python -m clora.tiny.recipe.train_vae --out clora/tiny/base/vae`.

The shipped class is the stock `AutoencoderKLQwenImage` (4x downsampling, 16 channels). Its convolutions are
causal 3-D ones, of which a single frame uses the last temporal slice only; training runs on that slice as a 2-D
convolution (half the time) and `export_vae` writes it back into the stock layout with zeros elsewhere.

Shape legend: B batch, C channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn

from clora.tiny.images import mixed_images

VAE_CONFIG = {
    "base_dim": 16,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "z_dim": 16,
    "temperal_downsample": [False, False],
}


class FrameConv(nn.Module):
    """A causal 3-D convolution seen by a single frame: 2-D, its kernel stored as a matrix so that Muon takes it."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.kernel = conv.weight.shape[-2:]
        self.stride = conv.stride[-2:]
        self.padding = self.kernel[0] // 2
        self.weight = nn.Parameter(conv.weight.detach()[:, :, -1].flatten(1).clone())
        assert conv.bias is not None
        self.bias = nn.Parameter(conv.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(1, (-1, *self.kernel))
        return F.conv2d(x.squeeze(2), weight, self.bias, self.stride, self.padding).unsqueeze(2)


def to_frame_convs(module: nn.Module) -> None:
    """Replace every causal 3-D convolution below `module` by its single-frame form, in place."""
    for name, child in module.named_children():
        if isinstance(child, QwenImageCausalConv3d):
            setattr(module, name, FrameConv(child))
        else:
            to_frame_convs(child)


def export_vae(model: AutoencoderKLQwenImage, mean: list[float], std: list[float]) -> AutoencoderKLQwenImage:
    """The stock autoencoder with the weights of `model` (single-frame form) and per-channel latent statistics."""
    stock = AutoencoderKLQwenImage(**VAE_CONFIG, latents_mean=mean, latents_std=std)
    state = stock.state_dict()
    for key, value in model.state_dict().items():
        if state[key].dim() == 5:
            state[key].zero_()
            state[key][:, :, -1] = value.unflatten(1, state[key].shape[1:2] + state[key].shape[3:])
        else:
            state[key].copy_(value)
    stock.load_state_dict(state)
    return stock


def encode_moments(model: AutoencoderKLQwenImage, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and log-variance (B, 16, 1, h, w) of images in [-1, 1]."""
    moments = model.quant_conv(model.encoder(images_BCHW.unsqueeze(2)))
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def decode_frame(model: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) of latents (B, 16, 1, h, w), not clamped."""
    decoded: Tensor = model.decoder(model.post_quant_conv(latents))
    return decoded.squeeze(2)


def gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """L1 distance of horizontal and vertical finite differences: keeps edges sharp."""
    return (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean() + (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()


def random_symmetry(latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Turn and mirror latents and images alike, half of the time not at all.

    A decoder that must decode turned latents to turned images makes the latent space equivariant: an edit that moves
    things in the image then moves them in the latents, which is what a small transformer can learn.
    """
    if float(torch.rand(())) < 0.5:
        return latents, images
    turns, mirror = int(torch.randint(4, ())), bool(torch.rand(()) < 0.5)

    def move(x: Tensor) -> Tensor:
        x = torch.rot90(x, turns, (-2, -1))
        return x.flip(-1) if mirror else x

    return move(latents), move(images)


def vae_loss(model: AutoencoderKLQwenImage, images: Tensor, latent_noise: float, decoder_only: bool) -> Tensor:
    """L1 + 0.5 gradient-L1 + 2 MSE + 1e-3 KL under a random symmetry of the latents.

    With `decoder_only` the encoder is frozen and the latents get noise, as a generator's will have.
    """
    with torch.set_grad_enabled(not decoder_only):
        mean, logvar = encode_moments(model, images)
    if decoder_only:
        latents = mean + latent_noise * mean.std() * torch.randn_like(mean)
        kl = torch.zeros(())
    else:
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        latents, images = random_symmetry(latents, images)
    out = decode_frame(model, latents).float()
    reconstruction = F.l1_loss(out, images) + 0.5 * gradient_l1(out, images) + 2 * F.mse_loss(out, images)
    return reconstruction + 1e-3 * kl


def optimizers(model: nn.Module, muon_lr: float, adamw_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for vectors and for the first and last layers (facts of the recipe: docs)."""
    ends = ("encoder.conv_in", "decoder.conv_out", "proj_in", "proj_out", "img_in", "txt_in")
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.dim() == 2 and not name.startswith(ends) and min(parameter.shape) > 1
        (matrices if is_matrix else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.0)
    adamw = torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.99), weight_decay=0.0)
    return [muon, adamw]


def set_lr(optimizers: list[torch.optim.Optimizer], base: list[float], factor: float) -> None:
    for optimizer, lr in zip(optimizers, base, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor


def warm_cosine(progress: float, warm: float = 0.02) -> float:
    """Learning-rate factor at `progress` in [0, 1]: linear warm-up, then half a cosine down to 2 %."""
    if progress < warm:
        return progress / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB per sample, images in [-1, 1]."""
    mse = (a - b).square().flatten(1).mean(1) / 4
    return -10 * mse.clamp_min(1e-10).log10()


def batches(images: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled batches of uint8 images (N, H, W, 3), as float in [-1, 1] (B, 3, H, W)."""
    while True:
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            if len(index) == batch_size:
                yield images[index].permute(0, 3, 1, 2).float() / 127.5 - 1


def train(images: Tensor, steps: int, seed: int, log: Path, init: Path | None = None) -> AutoencoderKLQwenImage:
    """Train for `steps` updates (three quarters jointly, the rest the decoder alone); the curve goes to `log`."""
    torch.manual_seed(seed)
    model = AutoencoderKLQwenImage(**VAE_CONFIG)
    if init is not None:
        model = AutoencoderKLQwenImage.from_pretrained(init, torch_dtype=torch.float32)
    to_frame_convs(model)
    ema = {name: value.detach().clone() for name, value in model.named_parameters()}
    data = batches(images, 16, torch.Generator().manual_seed(seed))
    start, step = time.perf_counter(), 0
    rows: list[dict[str, float]] = []
    stages = ((0.0, 0.72, False), (0.72, 1.0, True))
    for begin, end, decoder_only in stages:
        if decoder_only:
            model.load_state_dict(ema, strict=False)
            for part in (model.encoder, model.quant_conv):
                part.requires_grad_(False)
        optimizer_list = optimizers(model, *((6e-3, 6e-4) if decoder_only else (0.02, 2e-3)))
        base_lr = [optimizer.param_groups[0]["lr"] for optimizer in optimizer_list]
        while (progress := step / steps) < end:
            set_lr(optimizer_list, base_lr, warm_cosine((progress - begin) / (end - begin)))
            batch = next(data).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=not decoder_only):  # 1.4x; the last stage is fp32
                loss = vae_loss(model, batch, latent_noise=0.1, decoder_only=decoder_only)
            loss.backward()
            for optimizer in optimizer_list:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            decay = min(0.995, step / (step + 20))
            with torch.no_grad():
                for name, value in model.named_parameters():
                    ema[name].lerp_(value, 1 - decay)
            if step % 200 == 0:
                rows.append({"step": step, "seconds": time.perf_counter() - start, "loss": float(loss.detach())})
                print(json.dumps(rows[-1]), flush=True)
    model.load_state_dict(ema, strict=False)
    log.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return model


@torch.no_grad()
def latent_statistics(model: AutoencoderKLQwenImage, images: Tensor) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of the latents of uint8 images (N, H, W, 3)."""
    latents = torch.cat([encode_moments(model, x.permute(0, 3, 1, 2).float() / 127.5 - 1)[0] for x in images.split(64)])
    return latents.mean(dim=(0, 2, 3, 4)).tolist(), latents.std(dim=(0, 2, 3, 4)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--images", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="go on from this autoencoder")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = torch.from_numpy(mixed_images(arguments.images, seed=arguments.seed))
    validation = torch.from_numpy(mixed_images(256, seed=10_000_000))
    print(f"{len(images)} images, {np.prod(images.shape) / 1e6:.0f} MB", flush=True)
    log = arguments.out.parent / f"vae_curve_{arguments.seed}.jsonl"
    model = train(images, arguments.steps, arguments.seed, log, arguments.init)
    mean, std = latent_statistics(model, images[:2000])
    stock = export_vae(model, mean, std)
    with torch.no_grad():
        x = validation.permute(0, 3, 1, 2).float() / 127.5 - 1
        values = torch.cat([psnr(stock(v.unsqueeze(2)).sample.squeeze(2).clamp(-1, 1), v) for v in x.split(32)])
    print(f"validation PSNR {values.mean():.2f} dB, worst {values.min():.2f} dB")
    stock.half().save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
