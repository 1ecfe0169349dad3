"""The names of LoRA tensors in every layout clora reads, and of the modules of a Qwen-Image transformer.

A key is `PREFIX MODULE SUFFIX`. The module's canonical name is diffusers' (`transformer_blocks.0.attn.to_q`);
kohya's and musubi's flat layout writes the dots of the module as underscores, which only the list of the
modules can undo.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from clora.lora.layers import BLOCK_LINEARS, TOP_LINEARS

Part = Literal["A", "B", "alpha"]


FLAT_PREFIX = "lora_unet_"
# The layout that each prefix of a dotted key belongs to; the first that fits is taken.
PREFIX_LAYOUTS = (
    ("diffusion_model.", "comfyui"),
    ("base_model.model.", "peft"),
    ("transformer.", "diffusers"),
    ("", "bare"),
)
_SUFFIXES = re.compile(r"\.(?:(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|(alpha))$")
_PARTS: dict[str, Part] = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B"}
_FLAT_BLOCK = re.compile(r"transformer_blocks_(\d+)_(\w+)$")
# What stands behind tensors that are no plain LoRA, for the error message.
_OTHER_KINDS = (
    (("dora_scale", "lora_magnitude_vector"), "DoRA"),
    (("lokr_",), "LoKr"),
    (("hada_", "loha_"), "LoHa"),
    (("oft_", "boft_"), "OFT"),
    (("lora_te", "text_encoder"), "a text encoder's LoRA"),
    ((".diff", ".bias"), "full weights or biases"),
)


@dataclass(frozen=True)
class LoraKey:
    """One key taken apart: `layout`, the module as written (flat names still flat) and which tensor it is."""

    layout: str
    module: str
    part: Part


def parse_key(key: str) -> LoraKey | None:
    """Take a tensor's key apart; None when it is no LoRA key of a layout clora reads."""
    suffix = _SUFFIXES.search(key)
    if suffix is None:
        return None
    part: Part = "alpha" if suffix[2] else _PARTS[suffix[1]]
    stem = key[: suffix.start()]
    if stem.startswith(FLAT_PREFIX):
        return LoraKey("kohya", stem.removeprefix(FLAT_PREFIX), part)
    if stem.startswith("lora_"):  # another component's flat name, such as lora_te1_...
        return None
    prefix, layout = next((prefix, layout) for prefix, layout in PREFIX_LAYOUTS if stem.startswith(prefix))
    # PEFT wraps whatever it was given, so its prefix may stand before another one.
    module = stem.removeprefix(prefix).removeprefix("transformer.")
    return LoraKey(layout, module, part) if module else None


def other_kind(key: str) -> str | None:
    """What a key that `parse_key` refuses belongs to ("DoRA", ...), None when unknown."""
    return next((kind for marks, kind in _OTHER_KINDS if any(mark in key for mark in marks)), None)


def flat_name(module: str) -> str:
    """The flat spelling of a module's name: `attn.to_q` -> `attn_to_q`."""
    return module.replace(".", "_")


def flat_resolver(module_names: Iterable[str] | None) -> Callable[[str], str | None]:
    """A function from a flat name to the module's canonical name, None where there is none or more than one.

    With `module_names` (the transformer's) the answer is one of them; without, the known names of a
    Qwen-Image transformer of any depth serve.
    """
    if module_names is None:
        return _known_name
    table: dict[str, str | None] = {}
    for name in module_names:
        table[flat_name(name)] = None if flat_name(name) in table else name
    return table.get


_FLAT_TOP = {flat_name(name): name for name in TOP_LINEARS}
_FLAT_LINEARS = {flat_name(name): name for name in BLOCK_LINEARS}


def _known_name(flat: str) -> str | None:
    block = _FLAT_BLOCK.match(flat)
    if block is None:
        return _FLAT_TOP.get(flat)
    linear = _FLAT_LINEARS.get(block[2])
    return None if linear is None else f"transformer_blocks.{block[1]}.{linear}"
