"""Train the tiny world's transformer on generic edits: `python -m clora.tiny.recipe.train_base --base clora/tiny/base`.

Needs `vae/`, `tokenizer/`, `processor/` and `text_encoder/` under `--base` (`train_vae`, `text`). Latents and text
embeddings are made once, then the velocity objective (Eq. 2) runs from memory; `--work` holds the cache and a
checkpoint every five minutes, from which the same command goes on: after an interruption, with more `--steps`, or
with another `--open-share` of instructions that name no choices.

Shape legend: B batch, T 64 tokens, C 64 channels a token, L text tokens, D 96.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from clora.backbones.load import load_backbone
from clora.backbones.qwen_image.backbone import QwenImageBackbone
from clora.backbones.qwen_image.images import pack_latents
from clora.method.flow import add_noise, shift_sigma, velocity_target
from clora.tiny.images import Bytes, EditPairs, edit_pairs
from clora.tiny.recipe.train_vae import encode_moments, optimizers, set_lr, to_frame_convs, warm_cosine

TRANSFORMER_CONFIG = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "axes_dims_rope": (8, 12, 12),
}
GRID = [(1, 8, 8), (1, 8, 8)]  # noise tokens, reference tokens
TEXT_DROPOUT, REFERENCE_DROPOUT, BOTH_DROPOUT = 0.05, 0.025, 0.025


@torch.inference_mode()
def encode_latents(backbone: QwenImageBackbone, images: Bytes) -> Tensor:
    """Packed, normalised latents (N, T, C) in fp16 of uint8 images (N, H, W, 3), as `encode_images` gives them.

    Through the single-frame form of the autoencoder, in a third of its time.
    """
    vae = deepcopy(backbone.vae)
    to_frame_convs(vae)
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(vae.config[key]).view(shape) for key in ("latents_mean", "latents_std"))
    out = []
    for part in torch.from_numpy(images).split(64):
        pixels = (part.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        latents = (encode_moments(vae, pixels)[0] - mean) / std
        out.append(pack_latents(backbone.pipeline, latents).half())
    return torch.cat(out)


@torch.inference_mode()
def encode_texts(backbone: QwenImageBackbone, instructions: Sequence[str], images: Bytes) -> tuple[Tensor, Tensor]:
    """Embeddings (N, L, D) in fp16, padded right, and their lengths (N,): `encode_prompts`, in batches.

    The stock pipeline shows every image to every prompt; here each prompt has its own (N, H, W, 3).
    """
    pipeline = backbone.pipeline
    first = pipeline.prompt_template_encode_start_idx
    picture = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
    rows: list[Tensor] = []
    for start in track(range(0, len(instructions), 250), description="Prompts"):
        part = slice(start, start + 250)
        inputs = pipeline.processor(
            text=[pipeline.prompt_template_encode.format(picture + text) for text in instructions[part]],
            images=[Image.fromarray(image) for image in images[part]],
            padding=True,
            return_tensors="pt",
        )
        hidden = pipeline.text_encoder(**inputs, output_hidden_states=True).hidden_states[-1]
        for row, mask in zip(hidden, inputs["attention_mask"].bool(), strict=True):
            rows.append(row[mask][first:].half())
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, torch.tensor([len(row) for row in rows])


def encode_pairs(backbone: QwenImageBackbone, pairs: EditPairs) -> dict[str, Tensor]:
    """Everything frozen, encoded once: latents `source`, `target` (N, T, C), `text` (N, L, D), `length` (N,).

    `empty` is the text of an empty instruction on the same image (classifier-free guidance's other side).
    """
    text, length = encode_texts(backbone, pairs.instructions, pairs.source)
    empty, _ = encode_texts(backbone, [""] * len(pairs.instructions), pairs.source)
    source, target = encode_latents(backbone, pairs.source), encode_latents(backbone, pairs.target)
    return {"source": source, "target": target, "text": text, "length": length, "empty": empty}


def make_batch(cache: dict[str, Tensor], size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """x0, reference, text, mask of a random batch, with condition dropout."""
    index = torch.randint(len(cache["text"]), (size,), generator=generator)
    x0, reference = cache["target"][index].float(), cache["source"][index].float()
    text, length = cache["text"][index].float(), cache["length"][index]
    draw = torch.rand(size, generator=generator)
    drop_text = (draw < TEXT_DROPOUT) | ((draw >= 0.1) & (draw < 0.1 + BOTH_DROPOUT))
    drop_reference = (draw >= 0.05) & (draw < 0.05 + REFERENCE_DROPOUT) | ((draw >= 0.1) & (draw < 0.1 + BOTH_DROPOUT))
    empty = cache["empty"][index].float()
    text[drop_text] = F.pad(empty, (0, 0, 0, text.shape[1] - empty.shape[1]))[drop_text]
    length = torch.where(drop_text, empty.shape[1], length)
    reference[drop_reference] = 0
    mask = torch.arange(text.shape[1]) < length[:, None]
    return x0, reference, text, mask


def flow_loss(model: Callable[..., Any], batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    """Velocity mean squared error at sigma = shift3(uniform)."""
    x0, reference, text, mask = batch
    sigma = shift_sigma(torch.rand(len(x0), generator=generator), 3.0)
    eps = torch.randn(x0.shape, generator=generator)
    hidden = torch.cat([add_noise(x0, eps, sigma), reference], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(
            hidden_states=hidden,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            timestep=sigma,
            img_shapes=[GRID] * len(x0),
            return_dict=False,
        )[0]
    return F.mse_loss(velocity[:, : x0.shape[1]].float(), velocity_target(x0, eps))


def train(cache: dict[str, Tensor], steps: int, batch_size: int, seed: int, work: Path) -> QwenImageTransformer2DModel:
    """Train for `steps` updates, going on from `work/state.pt` when it is there; returns the EMA model."""
    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(**TRANSFORMER_CONFIG)
    torch.nn.init.zeros_(model.proj_out.weight)
    validation = {name: value[-512:] for name, value in cache.items()}
    cache = {name: value[:-512] for name, value in cache.items()}
    optimizer_list = optimizers(model, 0.012, 2e-3)
    base_lr = [optimizer.param_groups[0]["lr"] for optimizer in optimizer_list]
    ema = {name: value.detach().clone() for name, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    step, seconds = 0, 0.0
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        ema, step, seconds = state["ema"], state["step"], state["seconds"]
        generator.set_state(state["generator"])
        for optimizer, saved in zip(optimizer_list, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    # On a processor plain attention is faster than the fused kernel, backward above all.
    model.set_attention_backend("_native_math")
    compiled = torch.compile(model)
    start, saved_at = time.perf_counter() - seconds, time.perf_counter()
    running: Tensor | None = None
    while step < steps:
        set_lr(optimizer_list, base_lr, warm_cosine(step / steps))
        loss = flow_loss(compiled, make_batch(cache, batch_size, generator), generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizer_list:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        running = loss.detach() if running is None else running.lerp(loss.detach(), 0.01)
        decay = min(0.999, step / (step + 10))
        with torch.no_grad():
            for name, value in model.named_parameters():
                ema[name].lerp_(value, 1 - decay)
        if step % 100 == 0:
            row = {"step": step, "seconds": round(time.perf_counter() - start, 1), "loss": round(float(running), 5)}
            if step % 500 == 0:
                row["validation"] = round(_validate(model, ema, compiled, validation, batch_size), 5)
            with (work / "curve.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        if time.perf_counter() - saved_at > 300 or step == steps:
            saved_at = time.perf_counter()
            state = {
                "model": model.state_dict(),
                "ema": ema,
                "step": step,
                "seconds": saved_at - start,
                "generator": generator.get_state(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizer_list],
            }
            torch.save(state, work / "state.tmp")
            (work / "state.tmp").replace(work / "state.pt")
    model.load_state_dict(ema)
    return model


@torch.no_grad()
def _validate(
    model: torch.nn.Module, ema: dict[str, Tensor], compiled: Callable[..., Any], data: dict[str, Tensor], size: int
) -> float:
    """Mean loss of the EMA weights over fixed batches of held-out pairs."""
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.load_state_dict(ema)
    generator = torch.Generator().manual_seed(1)
    losses = [float(flow_loss(compiled, make_batch(data, size, generator), generator)) for _ in range(16)]
    model.load_state_dict(kept)
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_base"))
    parser.add_argument("--steps", type=int, default=11500)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=40000)
    parser.add_argument("--open-share", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    cached = arguments.work / f"cache_open_{arguments.open_share:g}.safetensors"
    if not cached.exists():
        # The backbone reads the transformer's configuration, though only its encoders are needed here.
        QwenImageTransformer2DModel(**TRANSFORMER_CONFIG).save_config(arguments.base / "transformer")
        backbone = load_backbone(str(arguments.base), torch.device("cpu"), torch.float32, ("vae", "text_encoder"))
        assert isinstance(backbone, QwenImageBackbone)
        pairs = edit_pairs(arguments.pairs, arguments.seed, open_share=arguments.open_share)
        save_file(encode_pairs(backbone, pairs), cached)
    model = train(load_file(cached), arguments.steps, arguments.batch_size, arguments.seed, arguments.work)
    model.half().save_pretrained(arguments.base / "transformer")


if __name__ == "__main__":
    main()
