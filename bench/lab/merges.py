"""Many LoRAs merged into one by stock PEFT: `LoraModel.add_weighted_adapter` on the base with all of them loaded.

Used by `bench.lab.baselines`. Nothing of the merging is ours: files in, PEFT's adapter out, written as a LoRA file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from clora.backbones.load import load_backbone
from clora.lora.files import read_lora, write_lora
from clora.lora.module import LoraModule

COMBINATIONS = ("svd", "ties_svd", "dare_ties_svd", "magnitude_prune_svd", "cat")
WEIGHTS = (1.0, 0.5, 0.25)  # and the plain mean, 1 / N
DENSITIES = (0.2, 0.5)  # the share of entries that is kept, for the three that drop some
MERGED = "merged"


@dataclass(frozen=True)
class Merge:
    """One way to merge. `weight` is that of every LoRA; `density` None where nothing is dropped."""

    combination: str
    weight: float
    density: float | None = None

    @property
    def name(self) -> str:
        dropped = "" if self.density is None else f" density {self.density:g}"
        return f"{self.combination} weight {self.weight:.3g}{dropped}"


def weights_for(count: int) -> list[float]:
    """The weights that are tried for so many LoRAs, the greatest first."""
    return sorted({*WEIGHTS, 1 / count}, reverse=True)


def candidates(count: int) -> list[Merge]:
    """Every combination of `count` LoRAs at every weight and density."""
    return [
        Merge(combination, weight, density)
        for combination in COMBINATIONS
        for weight in weights_for(count)
        for density in ((None,) if combination in ("svd", "cat") else DENSITIES)
    ]


def edges(how: Merge, count: int) -> list[str]:
    """Where a merge lies at the end of what was tried: beyond it there may be a better one."""
    found = {"weight": (how.weight, weights_for(count)), "density": (how.density, DENSITIES)}
    return [
        f"{end} {name}"
        for name, (value, tried) in found.items()
        for end, last in (("least", min(tried)), ("greatest", max(tried)))
        if value == last
    ]


def load_with_peft(base: str, files: Mapping[str, Path]) -> PeftModel:
    """The base's transformer (fp32) with every LoRA on it as an adapter of PEFT's, by name."""
    transformer = load_backbone(base, "cpu", torch.float32, ("transformer",)).transformer
    model: Any = None
    for name, path in files.items():
        modules = read_lora(path).modules
        rank = next(iter(modules.values())).rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules))
        if model is None:
            model = get_peft_model(transformer, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        state = {}
        for module, lora in modules.items():
            state[f"base_model.model.{module}.lora_A.weight"] = lora.A.float()
            state[f"base_model.model.{module}.lora_B.weight"] = lora.B.float() * lora.scale
        unused = set_peft_model_state_dict(model, state, adapter_name=name).unexpected_keys
        assert not unused, unused
    return model


def merge(model: PeftModel, names: Sequence[str], how: Merge, rank: int, path: Path) -> None:
    """Merge the adapters and write the result, at `rank` where the combination leaves a choice, to `path`."""
    torch.manual_seed(0)  # DARE drops at random
    options: dict[str, Any] = {} if how.density is None else {"density": how.density}
    if how.combination != "cat":
        options |= {"svd_rank": rank, "svd_full_matrices": False}  # the same merge, in a tenth of the time
    model.add_weighted_adapter(list(names), [how.weight] * len(names), MERGED, how.combination, **options)
    config = model.peft_config[MERGED]
    state = get_peft_model_state_dict(model, adapter_name=MERGED)
    modules = {}
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        A, B = state[key], state[key.replace(".lora_A.", ".lora_B.")]
        modules[module] = LoraModule(A, B, float(config.lora_alpha) * len(A) / config.r)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(path, modules)
    model.delete_adapter(MERGED)
