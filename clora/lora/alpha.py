"""Alpha of LoRA files that carry it outside their tensors.

diffusers writes its adapter config as JSON under `lora_adapter_metadata`, PEFT as `adapter_config.json`
beside the file, kohya's trainers one number under `ss_network_alpha`. All three are lost on tools that look
at tensors only, and with them the strength of the effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clora.errors import InputError
from clora.io.text import parse_json, read_text
from clora.lora.peft_folder import CONFIG, PREFIX

CONFIG_KEY = "lora_adapter_metadata"
KOHYA_KEY = "ss_network_alpha"
MAX_CONFIG_BYTES = 4 << 20

AlphaOf = Callable[[str, int | None], float]


def header_alphas(
    path: Path, metadata: Mapping[str, str], layout: str, dora: bool = False
) -> tuple[AlphaOf, list[str]]:
    """A function (module name, dim) -> alpha for modules without an `.alpha` tensor, and the faults of its source.

    The update is scaled by alpha / dim, dim being the rank of its factors; for updates without any (dim None) by the
    alpha that is returned. Sources in order: the header's adapter config and `adapter_config.json` beside a file in
    PEFT's layout, which must agree where both are there, the header's `ss_network_alpha`; without any, the scale is 1.
    `dora` says that the tensors hold DoRA's norms, so that a config may ask for it. The function raises `ValueError`
    where a source contradicts the tensors or the other source.
    """
    configs: list[tuple[AlphaOf, list[str]]] = []
    try:
        if CONFIG_KEY in metadata:
            configs.append(_from_config(parse_json(metadata[CONFIG_KEY]), f"header metadata {CONFIG_KEY}", dora))
        beside = path.with_name(CONFIG)
        if layout == "peft" and beside.is_file():
            configs.append(_from_config(parse_json(read_text(beside, MAX_CONFIG_BYTES)), str(beside), dora))
    except InputError as error:
        return _rank_alpha, [str(error)]
    except ValueError as error:
        return _rank_alpha, [f"its adapter config is not readable ({error}); export the LoRA again"]
    if len(configs) == 2:
        return _agreed(*(alpha for alpha, _ in configs)), configs[0][1] + configs[1][1]
    if configs:
        return configs[0]
    text = metadata.get(KOHYA_KEY, "None")
    if text == "None":
        return _rank_alpha, []
    alpha = _positive(text)
    if alpha is None:
        return _rank_alpha, [f"header metadata {KOHYA_KEY} is {text!r}; alpha must be a positive number"]
    return lambda module, dim: 1.0 if dim is None else alpha, []


def _agreed(header: AlphaOf, beside: AlphaOf) -> AlphaOf:
    """diffusers reads the header, PEFT the file beside it: one LoRA must not have two strengths."""

    def alpha_of(module: str, dim: int | None) -> float:
        first, second = header(module, dim), beside(module, dim)
        if first != second:
            raise ValueError(f"the header's {CONFIG_KEY} says alpha {first:g}, {CONFIG} beside it {second:g}")
        return first

    return alpha_of


def _rank_alpha(module: str, dim: int | None) -> float:
    return float(dim or 1)


def _from_config(config: Any, source: str, dora: bool) -> tuple[AlphaOf, list[str]]:
    """Alpha from a PEFT config as JSON; diffusers puts the keys' prefix before every entry. That of LoHa and LoKr
    says `alpha` where a LoRA's says `lora_alpha`, and scales whole factors of LoKr too."""
    if not isinstance(config, dict):
        return _rank_alpha, [f"{source} is not a table; export the LoRA again"]
    config = {key.removeprefix(PREFIX).removeprefix("transformer."): value for key, value in config.items()}
    faults = [
        f"{source} asks for {flag}, which cannot be used; export a plain LoRA"
        for flag in ("use_dora", "lora_bias", "use_qalora", "fan_in_fan_out")
        if config.get(flag) and not (dora and flag == "use_dora")
    ]
    alphas = _pattern(config, "lora_alpha" if "lora_alpha" in config else "alpha", "alpha_pattern", source, faults)
    ranks = _pattern(config, "r", "rank_pattern", source, faults)
    rslora = bool(config.get("use_rslora"))

    def alpha_of(module: str, dim: int | None) -> float:
        declared, alpha = ranks(module), alphas(module)
        if dim is None:
            return 1.0 if alpha is None or declared is None else alpha / declared
        if declared is not None and declared != dim:
            raise ValueError(f"{source} says rank {declared:g}, the tensors {dim}")
        if alpha is None:
            return float(dim)
        # rsLoRA scales by alpha / sqrt(rank); as alpha / rank that is a larger alpha.
        return alpha * math.sqrt(dim) if rslora else alpha

    return alpha_of, faults


def _pattern(
    config: Mapping[str, Any], key: str, pattern_key: str, source: str, faults: list[str]
) -> Callable[[str], float | None]:
    """A module's number: the first pattern that names it or ends it, else the number for all.

    PEFT runs the patterns as regular expressions; here they must be plain names (a leading ^ and \\.
    allowed), which is all that diffusers and PEFT's own tools write.
    """
    default = config.get(key)
    patterns = config.get(pattern_key) or {}
    if default is not None and _positive(default) is None:
        faults.append(f"{source}: {key} is {default!r}; it must be a positive number")
        default = None
    table: list[tuple[str, bool, float]] = []
    for raw, value in patterns.items() if isinstance(patterns, dict) else [(str(patterns), None)]:
        name = raw.removeprefix("^").removesuffix("$").replace("\\.", ".").removeprefix("transformer.")
        number = _positive(value)
        if number is None or not name.replace(".", "").replace("_", "").isalnum():
            faults.append(f"{source}: {pattern_key} {raw!r}: {value!r} is no module name and positive number")
        else:
            table.append((name, raw.startswith("^"), number))

    def lookup(module: str) -> float | None:
        for name, whole, number in table:
            if module == name or (not whole and module.endswith("." + name)):
                return number
        return None if default is None else float(default)

    return lookup


def _positive(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf and not isinstance(value, bool) else None
