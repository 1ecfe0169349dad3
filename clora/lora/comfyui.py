"""A collection as a ComfyUI workflow: the graph of nodes that samples as `clora edit` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clora.lora.catalogue import Catalogue, CatalogueEntry

TABLE = 1000  # noise levels that ComfyUI's scheduler "simple" chooses from
SAMPLERS = {"consistency": "lcm", "euler": "euler"}  # lcm: predict the data, noise it afresh


def exact_steps(num_steps: int) -> bool:
    """Whether "simple" has the very noise levels of a schedule of so many steps."""
    return TABLE % num_steps == 0


def workflow(catalogue: Catalogue, effect: CatalogueEntry, lora: Path) -> dict[str, Any]:
    """ComfyUI's API format: node number -> class and inputs, where [NUMBER, OUTPUT] is another node's.

    Model files have the names of ComfyUI's own packages; the sampler, schedule and shift are the catalogue's. Without
    guidance (cfg 1) the negative prompt is not read. A base of the 2511 kind has its references at noise level 0.
    """
    schedule = catalogue.schedule
    is_2511 = "2511" in catalogue.base
    model = "qwen_image_edit_2511_bf16.safetensors" if is_2511 else "qwen_image_edit_2509_bf16.safetensors"
    positive = "10" if is_2511 else "9"
    nodes = {
        "1": node("UNETLoader", unet_name=model, weight_dtype="default"),
        "2": node("LoraLoaderModelOnly", model=["1", 0], lora_name=lora.name, strength_model=1.0),
        "3": node("ModelSamplingAuraFlow", model=["2", 0], shift=schedule.shift),
        "4": node("CLIPLoader", clip_name="qwen_2.5_vl_7b.safetensors", type="qwen_image", device="default"),
        "5": node("VAELoader", vae_name="qwen_image_vae.safetensors"),
        "6": node("LoadImage", image="in.png"),
        "7": node("FluxKontextImageScale", image=["6", 0]),
        "8": node("VAEEncode", pixels=["7", 0], vae=["5", 0]),
        "9": node("TextEncodeQwenImageEditPlus", prompt=effect.prompt, clip=["4", 0], vae=["5", 0], image1=["7", 0]),
        "11": node("ConditioningZeroOut", conditioning=[positive, 0]),
        "12": node(
            "KSampler", model=["3", 0], positive=[positive, 0], negative=["11", 0], latent_image=["8", 0], seed=0,
            steps=schedule.num_steps, cfg=1.0, sampler_name=SAMPLERS[catalogue.sampler], scheduler="simple",
            denoise=1.0,
        ),
        "13": node("VAEDecode", samples=["12", 0], vae=["5", 0]),
        "14": node("SaveImage", images=["13", 0], filename_prefix=effect.name),
    }  # fmt: skip
    if is_2511:
        method = "index_timestep_zero"
        nodes["10"] = node(
            "FluxKontextMultiReferenceLatentMethod", conditioning=["9", 0], reference_latents_method=method
        )
    nodes["9"]["_meta"]["title"] = f"effect {effect.name}; the prompts of the others: clora inspect {lora.name}"
    return nodes


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """One node of the API format."""
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
