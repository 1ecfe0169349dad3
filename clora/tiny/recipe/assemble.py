"""Complete the tiny base's folder: `python -m clora.tiny.recipe.assemble --base clora/tiny/base`.

Writes `scheduler/`, `model_index.json`, `clora.json` and the general stream's data beside the trained parts, so that
the folder is a stock diffusers pipeline and brings along what clora wants of a base.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import __version__ as diffusers_version

from clora.tiny.dataset import write_general

MODEL_INDEX = {
    "_class_name": "QwenImageEditPlusPipeline",
    "_diffusers_version": diffusers_version,
    "processor": ["transformers", "Qwen2VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}
SIDECAR = {
    "vae_image_area": 64 * 64,
    "condition_image_area": 64 * 64,
    "default_size": [64, 64],
    "preset": "tiny",
    "general": "general",
    "acceleration": "acceleration.safetensors",
    "collection": "collection.safetensors",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--general", type=int, default=80, help="source images of the general stream")
    arguments = parser.parse_args()
    # The few-step schedule: shift 3, fresh noise at every step; `clora edit` computes the same.
    FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True).save_pretrained(arguments.base / "scheduler")
    (arguments.base / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    (arguments.base / "clora.json").write_text(json.dumps(SIDECAR, indent=2) + "\n")
    write_general(arguments.base / "general", arguments.general)


if __name__ == "__main__":
    main()
