"""LoRA files: read every layout in use, write the three that tools expect.

A LoRA changes a linear layer's weight W (N, K) to `W + (alpha / rank) B A` with A (rank, K) and B (N, rank).
Every tensor of a file is used or the file is refused: a key that is silently left out is an effect that is
silently weaker.

Shape legend: N outputs, K inputs, r rank of one module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clora.errors import InputError, InputErrors, nearest, raise_faults
from clora.io.safetensors import Header, map_tensors, read_header, read_tensors, write_tensors
from clora.lora.alpha import CONFIG_KEY, header_alphas
from clora.lora.keys import LoraKey, Part, flat_name, flat_resolver, other_kind, parse_key
from clora.lora.module import LoraModule

Layout = Literal["comfyui", "diffusers", "kohya"]
# The names of a transformer's linear layers, with their weights' shapes (N, K) where shapes are to be
# checked.
ModuleNames = Collection[str] | Mapping[str, tuple[int, int]]

CATALOGUE_KEY = "clora.catalogue"
# Header metadata that states alpha or rank; wrong as soon as a file is written anew, so never carried over.
ALPHA_METADATA = (CONFIG_KEY, "ss_network_alpha", "ss_network_dim", "format")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_WRITE_PREFIX = {"comfyui": "diffusion_model.", "diffusers": "transformer.", "kohya": "lora_unet_"}


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA read in full, in CPU memory and in the file's own dtypes.

    `modules` has diffusers' module names; `layout` is comfyui, diffusers, peft, bare, kohya or mixed;
    `sha256` is of the whole file.
    """

    path: Path
    modules: dict[str, LoraModule]
    layout: str
    metadata: dict[str, str]
    sha256: str


@dataclass(frozen=True)
class LoraSummary:
    """What the header alone tells: per module its rank and the keys of its tensors."""

    path: Path
    layout: str
    ranks: dict[str, int]
    keys: dict[str, dict[Part, str]]
    header: Header

    @property
    def max_rank(self) -> int:
        return max(self.ranks.values())


def check_lora(path: str | Path, module_names: ModuleNames | None = None) -> LoraSummary:
    """Check a LoRA file by its header alone, without reading a tensor.

    Against `module_names` when given (a transformer's linear layers, with shapes if it is a mapping). Raises
    `InputErrors` with every fault: unused keys, A without B, wrong shapes or dtypes, unknown modules.
    """
    summary, faults = _summarise(Path(path), module_names)
    raise_faults(faults)
    return summary


def read_lora(path: str | Path, module_names: ModuleNames | None = None) -> LoraFile:
    """Read a LoRA file of any layout.

    Keys may start `transformer.`, `diffusion_model.`, `base_model.model.` or with the module, carry
    `.default.`, and name the matrices `lora_A`/`lora_B` or `lora_down`/`lora_up`; or be flat
    (`lora_unet_transformer_blocks_0_...`). Alpha is a module's `.alpha` tensor, else the header's (diffusers'
    and PEFT's adapter config, `ss_network_alpha`), else, for PEFT's layout, that of `adapter_config.json`
    beside the file, else the rank (scale 1).

    Without `module_names` flat names are those of a Qwen-Image transformer, and dotted ones are taken as they
    are. Raises `InputErrors` with every fault of the file, values that are not finite included.
    """
    path = Path(path)
    summary, faults = _summarise(path, module_names)
    tensors, sha256 = read_tensors(path, summary.header)
    modules = _modules_of(summary, tensors, faults)
    return LoraFile(path, modules, summary.layout, summary.header.metadata, sha256)


def map_lora(path: str | Path, module_names: ModuleNames | None = None) -> dict[str, LoraModule]:
    """The modules that `read_lora` reads, with the same checks, as views of the file (`map_tensors`); no hash."""
    path = Path(path)
    summary, faults = _summarise(path, module_names)
    return _modules_of(summary, map_tensors(path, summary.header), faults)


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
    is 1. `kohya` (flat names, `lora_down/lora_up`, `.alpha`) keeps the matrices and alpha as they are.
    `dtype` None keeps each tensor's own. Raises `InputErrors` for values that are not finite in `dtype`.
    """
    path = Path(path)
    if layout not in _WRITE_PREFIX:
        raise InputError(f"unknown LoRA layout {layout!r}; choose one of {', '.join(_WRITE_PREFIX)}")
    if not modules:
        raise InputError(f"{path}: no LoRA module to write")
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        _check_module(name, module)
        B_Nr = module.B
        if layout == "kohya":
            prefix, down, up = f"lora_unet_{flat_name(name)}", "lora_down", "lora_up"
            tensors[f"{prefix}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
        else:
            prefix, down, up = _WRITE_PREFIX[layout] + name, "lora_A", "lora_B"
            B_Nr = (B_Nr.double() * module.scale).to(B_Nr.dtype if dtype is None else dtype)
        tensors[f"{prefix}.{down}.weight"] = module.A.to(dtype or module.A.dtype)
        tensors[f"{prefix}.{up}.weight"] = B_Nr.to(dtype or B_Nr.dtype)
    raise_faults(
        [
            f"{path}: {key} is not finite as {tensor.dtype}; write float32 or check the weights"
            for key, tensor in tensors.items()
            if not tensor.isfinite().all()
        ]
    )
    kept = {key: value for key, value in (metadata or {}).items() if key not in ALPHA_METADATA}
    return write_tensors(path, tensors, {"format": "pt", **kept})


def convert_lora(src: str | Path, dst: str | Path, to: Layout) -> LoraFile:
    """Rewrite a LoRA file in another layout, in the file's own dtypes; returns what was read.

    Folding alpha rounds B to its dtype, exactly so where alpha / rank is a power of two. Metadata is kept but
    for entries that state alpha or rank.
    """
    if Path(dst).suffix != ".safetensors":
        raise InputError(f"{dst}: name the output .safetensors, the only format that is written")
    file = read_lora(src)
    write_lora(dst, file.modules, file.metadata, to, dtype=None)
    return file


def inspect_lora(path: str | Path) -> dict[str, Any]:
    """What is in a LoRA file, ready for JSON.

    layout, num_tensors, num_modules, num_parameters, dtypes, ranks and alphas (value: how many modules),
    targets (module name without block number: how many), num_blocks, metadata, catalogue (None if the file
    has none), sha256, faults (empty for a good file). Raises `InputError` only when the file is no readable
    safetensors at all.
    """
    path = Path(path)
    summary, faults = _summarise(path, None)
    modules: dict[str, LoraModule] = {}
    sha256 = None
    try:
        file = read_lora(path)
        modules, sha256 = file.modules, file.sha256
    except InputErrors as error:
        faults = error.faults
    entries = summary.header.tensors
    catalogue = None
    metadata = dict(summary.header.metadata)
    if (text := metadata.pop(CATALOGUE_KEY, None)) is not None:
        try:
            catalogue = json.loads(text)
        except (ValueError, RecursionError):
            faults = [*faults, f"{path}: header metadata {CATALOGUE_KEY} is not JSON; write it again"]
    blocks = {name.split(".")[1] for name in summary.ranks if name.startswith("transformer_blocks.")}
    sizes = [math.prod(entry.shape) for key, entry in entries.items() if not key.endswith(".alpha")]
    return {
        "path": str(path),
        "layout": summary.layout,
        "num_tensors": len(entries),
        "num_modules": len(summary.ranks),
        "num_parameters": sum(sizes),
        "num_blocks": len(blocks),
        "dtypes": sorted({str(entry.dtype).removeprefix("torch.") for entry in entries.values()}),
        "ranks": _tally(str(rank) for rank in summary.ranks.values()),
        "alphas": _tally(f"{module.alpha:g}" for module in modules.values()),
        "targets": _tally(_target(name) for name in summary.ranks),
        "metadata": metadata,
        "catalogue": catalogue,
        "sha256": sha256,
        "faults": faults,
    }


def _summarise(path: Path, module_names: ModuleNames | None) -> tuple[LoraSummary, list[str]]:
    """Sort a file's keys into modules; every key ends in exactly one module or one fault."""
    header = read_header(path)
    resolve = flat_resolver(module_names)
    keys: dict[str, dict[Part, str]] = {}
    layouts: set[str] = set()
    unused: list[str] = []
    faults: list[str] = []
    for key in sorted(header.tensors):
        parsed = parse_key(key)
        module = None if parsed is None else _canonical(parsed, resolve)
        if parsed is None or module is None:
            unused.append(key)
        elif parsed.part in keys.get(module, {}):
            other = keys[module][parsed.part]
            faults.append(f"{path}: {key} and {other} are the same matrix of {module}; delete one")
        else:
            layouts.add(parsed.layout)
            keys.setdefault(module, {})[parsed.part] = key
    if unused:
        kinds = sorted({kind for key in unused if (kind := other_kind(key))})
        what = f" ({', '.join(kinds)} cannot be used)" if kinds else ""
        faults.insert(0, f"{path}: {len(unused)} tensors cannot be used{what}, remove them: {', '.join(unused)}")
    ranks: dict[str, int] = {}
    for module, parts in keys.items():
        module_faults = _module_faults(header, module, parts)
        faults += [f"{path}: {fault}" for fault in module_faults]
        if not module_faults:
            ranks[module] = header.tensors[parts["A"]].shape[0]
    if module_names is not None:
        faults += _name_faults(path, header, {name: keys[name] for name in ranks}, module_names)
    if not keys and not unused:
        faults.append(f"{path}: holds no tensors at all; export the LoRA again")
    layout = layouts.pop() if len(layouts) == 1 else "mixed" if layouts else "none"
    return LoraSummary(path, layout, ranks, {name: keys[name] for name in ranks}, header), faults


def _modules_of(summary: LoraSummary, tensors: Mapping[str, Tensor], faults: list[str]) -> dict[str, LoraModule]:
    """The modules of a file's tensors; raises with `faults` and those of the values."""
    path, faults = summary.path, [*faults]
    if summary.keys:
        alpha_of, alpha_faults = header_alphas(path, summary.header.metadata, summary.layout)
        faults += [f"{path}: {fault}" for fault in alpha_faults]
    modules: dict[str, LoraModule] = {}
    for name, keys in summary.keys.items():
        rank = summary.ranks[name]
        values = {part: tensors[key] for part, key in keys.items()}
        faults += _value_faults(path, keys, values)
        try:
            alpha = float(values["alpha"]) if "alpha" in values else alpha_of(name, rank)
        except ValueError as error:
            faults.append(f"{path}: {name}: {error}")
            continue
        modules[name] = LoraModule(values["A"], values["B"], alpha)
    raise_faults(faults)
    return modules


def _canonical(key: LoraKey, resolve: Callable[[str], str | None]) -> str | None:
    return resolve(key.module) if key.layout == "kohya" else key.module


def _module_faults(header: Header, module: str, parts: Mapping[Part, str]) -> list[str]:
    """What is wrong with the shapes and dtypes of one module's tensors."""
    present = ", ".join(parts.values())
    faults = [f"{module} has no lora_{part}, only {present}" for part in ("A", "B") if part not in parts]
    for key in parts.values():
        entry = header.tensors[key]
        if entry.dtype not in (_FLOATS + _INTEGERS if key == parts.get("alpha") else _FLOATS):
            faults.append(f"{key} is {entry.dtype}; save it as bfloat16, float16 or float32")
        elif key == parts.get("alpha"):
            if math.prod(entry.shape) != 1:
                faults.append(f"{key} has shape {list(entry.shape)} where one number is expected")
        elif len(entry.shape) != 2 or 0 in entry.shape:
            faults.append(f"{key} has shape {list(entry.shape)} where a matrix is expected")
    if not faults:
        A, B = header.tensors[parts["A"]].shape, header.tensors[parts["B"]].shape
        if A[0] != B[1]:
            faults.append(f"{module} has rank {A[0]} in lora_A {list(A)} but rank {B[1]} in lora_B {list(B)}")
    return faults


def _name_faults(
    path: Path, header: Header, keys: Mapping[str, Mapping[Part, str]], module_names: ModuleNames
) -> list[str]:
    """Modules that the transformer lacks, and those whose shape differs from the transformer's."""
    faults = []
    unknown = [name for name in keys if name not in module_names]
    if unknown:
        near = nearest(unknown[0], module_names)
        hint = f" (the nearest to the first is {near})" if near else ""
        names = ", ".join(unknown)
        faults.append(f"{path}: {len(unknown)} modules are not on this transformer{hint}, remove them: {names}")
    if isinstance(module_names, Mapping):
        for name in keys.keys() & module_names.keys():
            A, B = (header.tensors[keys[name][part]].shape for part in ("A", "B"))
            if (B[0], A[1]) != tuple(module_names[name]):
                shape, expected = [B[0], A[1]], list(module_names[name])
                faults.append(f"{path}: {name} is for a weight {shape}, the transformer's is {expected}")
    return faults


def _value_faults(path: Path, keys: Mapping[Part, str], values: Mapping[Part, Tensor]) -> list[str]:
    faults = []
    for part, value in values.items():
        # The extremes tell, NaN is both of them where there is one; a tenth of the time that looking at each takes.
        if not all(extreme.isfinite() for extreme in value.aminmax()):
            faults.append(f"{path}: {keys[part]} holds values that are not finite; export the LoRA again")
        elif part == "alpha" and not float(value) > 0:
            faults.append(f"{path}: {keys[part]} is {float(value):g}; alpha must be positive")
    return faults


def _check_module(name: str, module: LoraModule) -> None:
    A, B = module.A.shape, module.B.shape
    if len(A) != 2 or len(B) != 2 or A[0] != B[1] or not 0 < module.alpha < math.inf:
        raise ValueError(f"{name}: A {list(A)}, B {list(B)} and alpha {module.alpha} make no LoRA module")


def _target(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[2:]) if parts[0] == "transformer_blocks" else module


def _tally(values: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
