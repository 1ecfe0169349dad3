"""LoRA files: read every layout in use, write the four that tools expect.

A LoRA changes a linear layer's weight W (N, K) to `W + (alpha / rank) B A` with A (rank, K) and B (N, rank).
`summary` sorts a file's keys, `kinds` turns updates by other factors into that form.

Shape legend: N outputs, K inputs, r rank of one module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clora.errors import InputError, raise_faults
from clora.io.atomic import new_folder, write_text
from clora.io.output import output_error
from clora.io.safetensors import map_tensors, read_tensors, write_tensors
from clora.lora.alpha import CONFIG_KEY, header_alphas
from clora.lora.keys import Part, flat_name
from clora.lora.kinds import exact_module, scale_dim
from clora.lora.module import LoraModule
from clora.lora.peft_folder import CONFIG, PREFIX, WEIGHTS, adapter_config, check_folder
from clora.lora.summary import FLOAT8, Causes, LoraSummary, ModuleNames, summarise, unready_faults

Layout = Literal["comfyui", "diffusers", "kohya", "peft"]

CATALOGUE_KEY = "clora.catalogue"
# Header metadata that states alpha or rank; wrong as soon as a file is written anew, so never carried over.
ALPHA_METADATA = (CONFIG_KEY, "ss_network_alpha", "ss_network_dim", "format")
_WRITE_PREFIX = {"comfyui": "diffusion_model.", "diffusers": "transformer.", "kohya": "lora_unet_", "peft": PREFIX}


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA read in full, in CPU memory and in the file's own dtypes (fp8 as bfloat16).

    `modules` has diffusers' module names; `layout` is comfyui, diffusers, peft, bare, kohya, lycoris, onetrainer,
    diffsynth or mixed; `sha256` is of the whole file; `notes` say what was not taken as it lies in the file.
    """

    path: Path
    modules: dict[str, LoraModule]
    layout: str
    metadata: dict[str, str]
    sha256: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class RawModule:
    """A module's tensors as they lie in the file, and what its update is scaled by."""

    values: dict[Part, Tensor]
    scale: float
    alpha: float


def read_lora(path: str | Path, module_names: ModuleNames | None = None) -> LoraFile:
    """Read a LoRA file of any layout; LoHa, LoKr and whole updates as the LoRAs that are exactly them.

    Keys may start with the module, with `transformer.`, `diffusion_model.`, `base_model.model.` or the prefixes of
    trainers' wrappers, carry an adapter's name, and name the matrices `lora_A`/`lora_B` or `lora_down`/`lora_up`; or
    be flat (`lora_unet_`, `lycoris_`, `lora_transformer_`). Alpha is a module's `.alpha` tensor, else the header's
    (diffusers' and PEFT's adapter config, `ss_network_alpha`), else, for PEFT's layout, that of
    `adapter_config.json` beside the file, else the rank (scale 1). PEFT's folder may stand for the file in it.

    Without `module_names` the names are those of a Qwen-Image transformer. Raises `InputErrors` with every fault of
    the file, values that are not finite included.
    """
    summary, faults = summarise(Path(path), module_names)
    path = summary.path
    tensors, sha256 = read_tensors(path, summary.header)
    raw = read_values(summary, tensors, faults + unready_faults(summary))
    return LoraFile(path, exact_modules(summary, raw), summary.layout, summary.header.metadata, sha256, summary.notes)


def map_lora(
    path: str | Path, module_names: ModuleNames | None = None, only: Collection[str] | None = None
) -> dict[str, LoraModule]:
    """The modules that `read_lora` reads, with the same checks, as views of the file (`map_tensors`); no hash.

    With `only`, no other modules' tensors are read.
    """
    summary, faults = summarise(Path(path), module_names)
    raw = read_values(summary, map_tensors(summary.path, summary.header), faults + unready_faults(summary), only)
    return exact_modules(summary, raw)


def read_values(
    summary: LoraSummary, tensors: Mapping[str, Tensor], faults: list[str], only: Collection[str] | None = None
) -> dict[str, RawModule]:
    """The modules of a file's tensors, checked; raises with `faults` and those of the values."""
    path, faults = summary.path, [*faults]
    dora = any("dora" in keys for keys in summary.keys.values())
    if summary.keys:
        alpha_of, alpha_faults = header_alphas(path, summary.header.metadata, summary.layout, dora)
        faults += [f"{path}: {fault}" for fault in alpha_faults]
    causes = Causes(path)
    modules: dict[str, RawModule] = {}
    for name, keys in summary.keys.items():
        if only is not None and name not in only:
            continue
        values = {part: _upcast(tensors[key]) for part, key in keys.items()}
        dim = scale_dim(summary.kinds[name], {part: tuple(value.shape) for part, value in values.items()})
        alpha_tensor = values.pop("alpha", None)
        _check_values(keys, values, causes)
        try:
            if dim is None or alpha_tensor is None:
                alpha = alpha_of(name, dim)
            else:
                alpha = float(alpha_tensor)
                _check_alpha(keys["alpha"], alpha, causes)
        except ValueError as error:
            causes.add(str(error), f"{name}: {error}", "export it again")
            continue
        modules[name] = RawModule(values, alpha / (dim or 1), alpha)
    raise_faults(faults + causes.sentences())
    return modules


def exact_modules(summary: LoraSummary, raw: Mapping[str, RawModule]) -> dict[str, LoraModule]:
    """Every module as the LoRA that is exactly it."""
    return {
        name: LoraModule(module.values["A"], module.values["B"], module.alpha)
        if summary.kinds[name] == "LoRA"
        else exact_module(summary.kinds[name], module.values, module.scale)
        for name, module in raw.items()
    }


def write_lora(
    path: str | Path,
    modules: Mapping[str, LoraModule],
    metadata: Mapping[str, str] | None = None,
    layout: Layout = "comfyui",
    dtype: torch.dtype | None = torch.bfloat16,
) -> str:
    """Write a LoRA file atomically; returns its SHA-256 (hex). Equal contents give equal bytes.

    `comfyui` (`diffusion_model.MODULE.lora_A/lora_B.weight`) is what ComfyUI, ai-toolkit and diffusers all
    load; `diffusers` starts with `transformer.`. Both have alpha folded into B (in fp64), so that the scale
    is 1. `kohya` (flat names, `lora_down/lora_up`, `.alpha`) keeps the matrices and alpha as they are, and so does
    `peft`, for which `path` is a new folder, with alphas and ranks in `adapter_config.json` for PEFT and in the header
    for diffusers. `dtype` None keeps each tensor's own. Raises `InputErrors` for values that are not finite in `dtype`;
    for `peft` also `InputError` for a place where no new folder can be, and `WriteError` for a full disk.
    """
    path = Path(path)
    if layout not in _WRITE_PREFIX:
        raise InputError(f"unknown LoRA layout {layout!r}; choose one of {', '.join(_WRITE_PREFIX)}")
    if not modules:
        raise InputError(f"{path}: no LoRA module to write")
    tensors = _laid_out(modules, layout, dtype)
    raise_faults(
        [
            f"{path}: {key} is not finite as {tensor.dtype}; write float32 or check the weights"
            for key, tensor in tensors.items()
            if not tensor.isfinite().all()
        ]
    )
    kept = {key: value for key, value in (metadata or {}).items() if key not in ALPHA_METADATA}
    if layout == "peft":
        return _write_folder(path, tensors, adapter_config(modules), {"format": "pt", **kept})
    return write_tensors(path, tensors, {"format": "pt", **kept})


def _write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> str:
    """Both files of PEFT's layout, in a folder that is whole or not there; returns the SHA-256 of the tensors' file."""
    check_folder(folder)
    header = json.dumps({f"{PREFIX}{key}": value for key, value in config.items()}, sort_keys=True)
    try:
        with new_folder(folder) as fresh:
            digest = write_tensors(fresh / WEIGHTS, tensors, {**metadata, CONFIG_KEY: header})
            write_text(fresh / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise output_error(folder, error) from error
    return digest


def _laid_out(modules: Mapping[str, LoraModule], layout: Layout, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a file in this layout."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        _check_module(name, module)
        B_Nr = module.B
        if layout == "kohya":
            prefix, down, up = f"lora_unet_{flat_name(name)}", "lora_down", "lora_up"
            tensors[f"{prefix}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
        else:
            prefix, down, up = _WRITE_PREFIX[layout] + name, "lora_A", "lora_B"
        if layout in ("comfyui", "diffusers"):
            B_Nr = (B_Nr.double() * module.scale).to(B_Nr.dtype if dtype is None else dtype)
        tensors[f"{prefix}.{down}.weight"] = module.A.to(dtype or module.A.dtype)
        tensors[f"{prefix}.{up}.weight"] = B_Nr.to(dtype or B_Nr.dtype)
    return tensors


def _upcast(value: Tensor) -> Tensor:
    return value.bfloat16() if value.dtype in FLOAT8 else value


def _check_values(keys: Mapping[Part, str], values: Mapping[Part, Tensor], causes: Causes) -> None:
    for part, value in values.items():
        # The extremes tell, NaN is both of them where there is one; a tenth of the time that looking at each takes.
        if not all(extreme.isfinite() for extreme in value.aminmax()):
            causes.add("not finite", f"{keys[part]} holds values that are not finite", "export the LoRA again")


def _check_alpha(key: str, alpha: float, causes: Causes) -> None:
    if not math.isfinite(alpha):
        causes.add("not finite", f"{key} holds values that are not finite", "export the LoRA again")
    elif alpha <= 0:
        causes.add("alpha", f"{key} is {alpha:g}", "alpha must be positive: export the LoRA again")


def _check_module(name: str, module: LoraModule) -> None:
    A, B = module.A.shape, module.B.shape
    if len(A) != 2 or len(B) != 2 or A[0] != B[1] or not 0 < module.alpha < math.inf:
        raise ValueError(f"{name}: A {list(A)}, B {list(B)} and alpha {module.alpha} make no LoRA module")
