"""`use_with_diffusers.py`: a merged folder's own program, which edits an image without clora.

It does what the stock pipeline leaves to its caller: the schedule's noise levels, fresh noise from the seed, the sizes
of the base, and two mends of the stock stack that `backbones/qwen_image/pipeline` explains.
"""

from __future__ import annotations

from pathlib import Path

from clora.io.atomic import write_text

SNIPPET = "use_with_diffusers.py"

_TEXT = '''"""Edit an image with the model in this folder: diffusers and transformers, no clora, no LoRA.

    python use_with_diffusers.py IN.png OUT.png "PROMPT" [SEED]

Prompts of the effects:
{prompts}
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

FOLDER = Path(__file__).parent
NUM_STEPS, DTYPE = {num_steps}, torch.{dtype}
stock.VAE_IMAGE_SIZE, stock.CONDITION_IMAGE_SIZE = {vae_area}, {condition_area}


class StillImages(Qwen2VLProcessor):
    """The stock processor without videos, for which it needs torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def load(device):
    processor = StillImages(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(FOLDER / "processor"),
        tokenizer=Qwen2Tokenizer.from_pretrained(FOLDER / "tokenizer"),
    )
    pipeline = stock.QwenImageEditPlusPipeline.from_pretrained(FOLDER, processor=processor, dtype=DTYPE)
    pipeline.to(device)
    encoder = pipeline.text_encoder

    def mark_images(module, args, kwargs):  # transformers 5 wants to be told, and the pipeline does not tell it
        kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == encoder.config.image_token_id).int()
        return args, kwargs

    encoder.register_forward_pre_hook(mark_images, with_kwargs=True)
    return pipeline


def edit(pipeline, image, prompt, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pipeline.scheduler.step = functools.partial(type(pipeline.scheduler).step, pipeline.scheduler, generator=generator)
    width, height = stock.calculate_dimensions(stock.VAE_IMAGE_SIZE, image.width / image.height)
    return pipeline(
        image=[image.convert("RGB")],
        prompt=prompt,
        width=width,
        height=height,
        sigmas=np.linspace(1, 1 / NUM_STEPS, NUM_STEPS).tolist(),
        num_inference_steps=NUM_STEPS,
        true_cfg_scale=1.0,
        generator=generator,
    ).images[0]


if __name__ == "__main__":
    source, target, prompt, *seed = sys.argv[1:]
    model = load("cuda" if torch.cuda.is_available() else "cpu")
    edit(model, Image.open(source), prompt, int(seed[0]) if seed else 0).save(target)
'''


def write_snippet(
    folder: Path, prompts: dict[str, str], num_steps: int, dtype: str, vae_area: int, condition_area: int
) -> None:
    """Write the program beside a merged folder's model; `prompts` by effect, `dtype` as torch names it."""
    listed = "\n".join(f"    {_plain(name)}: {_plain(prompt)}" for name, prompt in prompts.items())
    text = _TEXT.format(
        prompts=listed, num_steps=num_steps, dtype=dtype, vae_area=vae_area, condition_area=condition_area
    )
    write_text(folder / SNIPPET, text)


def _plain(text: str) -> str:
    """One line that can stand in a docstring, whatever a catalogue says: it is not to become code."""
    return " ".join(text.split()).replace("\\", "/").replace('"', "'")
