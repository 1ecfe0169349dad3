"""The names of LoRA tensors in every layout clora reads, and of the modules of a Qwen-Image transformer.

A key is `PREFIX MODULE SUFFIX`. The module's canonical name is diffusers' (`transformer_blocks.0.attn.to_q`);
flat layouts write the dots of the module as underscores, which only the list of the modules can undo. Prefixes
of trainers' wrappers (`_orig_mod.`, `module.`, `pipe.dit.` ...) are taken off until a known module is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from clora.lora.layers import BLOCK_LINEARS, TOP_LINEARS

# What one tensor of a module is: "A", "B", "alpha", "diff" (the whole update), "dora" (norms), or a factor of
# LoHa ("hada_w1_a" ...) or LoKr ("lokr_w1" ...).
Part = str

# The layout that each prefix belongs to; the first that fits is taken.
_FLAT_PREFIXES = (
    ("lora_unet_", "kohya"),
    ("lycoris_", "lycoris"),
    ("lora_transformer_", "onetrainer"),
)
_DOTTED_PREFIXES = (
    ("diffusion_model.", "comfyui"),
    ("model.diffusion_model.", "comfyui"),
    ("base_model.model.", "peft"),
    ("pipe.dit.", "diffsynth"),
    ("transformer.", "diffusers"),
    ("", "bare"),
)
FLAT_LAYOUTS = tuple(layout for _, layout in _FLAT_PREFIXES)

# Wrappers of torch.compile, FSDP and checkpointing may stand anywhere in a dotted name, the others before it.
_INNER_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER_WRAPPERS = (
    "module.",
    "model.",
    "base_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.",
    "dit.",
    "unet.",
)
_FLAT_WRAPPERS = ("_orig_mod_", *(wrapper.replace(".", "_") for wrapper in _OUTER_WRAPPERS))

_SUFFIXES = re.compile(
    r"\.(?:"
    r"(?P<matrix>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|(?P<dora>dora_scale|lora_magnitude_vector)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
    r"|(?P<factor>hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)(?:\.[^.]+)?"
    r"|(?P<whole>alpha|diff)"
    r")$"
)
_MATRICES: dict[str, Part] = {
    "lora_A": "A",
    "lora_down": "A",
    "lora.down": "A",
    "lora_B": "B",
    "lora_up": "B",
    "lora.up": "B",
}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)$")
_FLAT_BLOCK = re.compile(r"transformer_blocks_(\d+)_(\w+)$")


@dataclass(frozen=True)
class LoraKey:
    """One key taken apart: the module as written with its prefixes (`stem`), which tensor of it, and the adapter
    that PEFT names in the key (None without)."""

    stem: str
    part: Part
    adapter: str | None


def parse_key(key: str) -> LoraKey | None:
    """Take a tensor's key apart; None when its ending is none that clora reads."""
    suffix = _SUFFIXES.search(key)
    if suffix is None or suffix.start() == 0:
        return None
    stem = key[: suffix.start()]
    if suffix["matrix"]:
        return LoraKey(stem, _MATRICES[suffix["matrix"]], suffix["adapter"])
    return LoraKey(stem, "dora" if suffix["dora"] else suffix["factor"] or suffix["whole"], None)


def layout_of(stem: str) -> tuple[str, str]:
    """The layout that a stem is written in, and what follows its prefix."""
    for prefix, layout in _FLAT_PREFIXES:
        if stem.startswith(prefix):
            return layout, stem.removeprefix(prefix)
    stem = _INNER_WRAPPERS.sub("", stem)
    prefix, layout = next((prefix, layout) for prefix, layout in _DOTTED_PREFIXES if stem.startswith(prefix))
    return layout, stem.removeprefix(prefix)


def unwrapped(name: str, layout: str) -> list[str]:
    """A name, and what is left of it after each wrapper that stands before it is taken off."""
    wrappers = _FLAT_WRAPPERS if layout in FLAT_LAYOUTS else _OUTER_WRAPPERS
    names = [name]
    while not names[-1].startswith("transformer_blocks"):
        wrapper = next((wrapper for wrapper in wrappers if names[-1].startswith(wrapper)), None)
        if wrapper is None:
            break
        names.append(names[-1].removeprefix(wrapper))
    return names


def flat_name(module: str) -> str:
    """The flat spelling of a module's name: `attn.to_q` -> `attn_to_q`."""
    return module.replace(".", "_")


def name_resolver(module_names: Iterable[str] | None) -> Callable[[str], str | None]:
    """A function from a key's stem to the module's canonical name, None where there is none or more than one.

    With `module_names` (a transformer's) the answer is one of them, else one of the family's modules that this
    transformer lacks; without, one of the family's, whose number of blocks is not limited.
    """
    given = set(module_names or ())
    table: dict[str, str | None] = {}
    for name in given:
        table[flat_name(name)] = None if flat_name(name) in table else name

    def resolve(stem: str) -> str | None:
        layout, rest = layout_of(stem)
        names = unwrapped(rest, layout)
        if layout in FLAT_LAYOUTS:
            found = next((table[name] for name in names if name in table), None)
            return found or next((known for name in names if (known := _family_name(name))), None)
        found = next((name for name in names if name in given), None)
        return found or next((name for name in names if in_family(name)), None)

    return resolve


_FLAT_TOP = {flat_name(name): name for name in TOP_LINEARS}
_FLAT_LINEARS = {flat_name(name): name for name in BLOCK_LINEARS}


def in_family(name: str) -> bool:
    """Whether a dotted name is that of a linear layer of a Qwen-Image transformer of some depth."""
    block = _BLOCK.match(name)
    return name in TOP_LINEARS if block is None else block[2] in BLOCK_LINEARS


def _family_name(flat: str) -> str | None:
    block = _FLAT_BLOCK.match(flat)
    if block is None:
        return _FLAT_TOP.get(flat)
    linear = _FLAT_LINEARS.get(block[2])
    return None if linear is None else f"transformer_blocks.{block[1]}.{linear}"
