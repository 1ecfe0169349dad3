"""Loading a configuration file into the schema of `clora.config.schema`.

Values come from three places, the later winning: the preset (`clora/config/presets/NAME.yaml`, written out in full),
the user's file, and `key=value` overrides from the command line. Relative paths start from the folder of the
user's file, also those in an effects file and in overrides. Every fault is listed under its dotted key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from clora.config.base_folder import acceleration_lora, default_preset
from clora.config.schema import PRESETS, Config
from clora.config.sections import BaseConfig
from clora.errors import InputError, InputErrors, did_you_mean, first_line, nearest
from clora.io.text import check_yaml, read_rows, read_yaml

# Keys that other trainers use, and what they are called here.
_OTHER_NAMES = {
    "lr": "learning_rate", "steps": "max_train_steps", "num_train_steps": "max_train_steps", "dim": "rank",
    "network_dim": "rank", "network_alpha": "alpha", "lora_rank": "rank", "lora_alpha": "alpha",
    "resolution": "max_area", "guidance_scale": "guidance", "true_cfg_scale": "guidance",
    "output_path": "output_dir", "num_inference_steps": "num_steps", "target_modules": "targets",
    "save_steps": "checkpointing_steps",
    "pretrained_model_name_or_path": "base", "model": "base", "lora_path": "lora", "dataset": "pairs",
}  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file at `path` over its preset, apply `key=value` overrides and check everything.

    Raises `InputErrors` with every fault under its dotted key, or `InputError` for an unreadable file.
    """
    path = Path(path)
    values = _yaml_values(read_yaml(path), str(path))
    if not isinstance(values, DictConfig):
        raise InputError(f"{path}: must hold 'key: value' lines, such as 'output_dir: runs/first'")
    return _assemble(values, path.absolute().parent, overrides, str(path))


def build_config(values: Mapping[str, Any], folder: str | Path = ".", overrides: Sequence[str] = ()) -> Config:
    """`load_config` for values made in code: the same presets and checks; `folder` anchors relative paths."""
    return _assemble(OmegaConf.create(dict(values)), Path(folder).absolute(), overrides, "configuration")


def load_preset(name: str) -> dict[str, Any]:
    """The plain values of a preset; `InputError` names the presets there are."""
    if name not in PRESETS:
        raise InputError(f"preset: there is no {str(name)!r}; {did_you_mean(str(name), PRESETS)}")
    path = Path(__file__).parent / "presets" / f"{name}.yaml"
    values = OmegaConf.to_container(OmegaConf.create(read_yaml(path)))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema; the keys of list items appear without an index (`effects.name`)."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        inner = _inner_model(field.annotation)
        if inner is not None:
            keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def _assemble(values: DictConfig, folder: Path, overrides: Sequence[str], source: str) -> Config:
    faults: list[str] = []
    try:
        values = _normalise(values, folder)
        for override in overrides:
            values = _normalise(_override(values, override, faults), folder)
        if faults:
            raise InputErrors(faults)
        preset = _preset_name(values, folder)
        merged = OmegaConf.merge(load_preset(preset), values)
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = f" at '{error.full_key}'" if error.full_key else ""
        raise InputError(f"{source}{where}: {first_line(error)}") from error
    assert isinstance(plain, dict)
    plain["preset"] = preset
    try:
        config = Config.model_validate(plain, context={"folder": folder})
    except ValidationError as error:
        raise InputErrors([f"{source}: {fault}" for fault in _explain(error)]) from error
    config._folder = folder
    return config


def _preset_name(values: DictConfig, folder: Path) -> str:
    """The preset asked for; left out, the one a base brings along in its `clora.json`, else "clora"."""
    if values.get("preset") is not None:
        return str(values.preset)
    base = values.get("base")
    model = base.get("model") if isinstance(base, DictConfig) else None
    found = BaseConfig.model_validate({"model": str(model)} if model else {}, context={"folder": folder})
    return default_preset(found.model) or "clora"


def _normalise(values: DictConfig, folder: Path) -> DictConfig:
    """Give short forms their full shape, so that later layers merge into it, and drop sections left empty."""
    for key in [str(key) for key in values]:
        # An empty section ('train:' with nothing below) asks for the preset's values.
        if OmegaConf.is_missing(values, key) or values[key] is not None or key == "general":
            continue
        del values[key]
    base = None if OmegaConf.is_missing(values, "base") else values.get("base")
    if isinstance(base, str):
        values["base"] = {"model": base}
    effects = None if OmegaConf.is_missing(values, "effects") else values.get("effects")
    if isinstance(effects, str):
        values["effects"] = _read_effects(folder / Path(effects).expanduser())
    return values


def _read_effects(path: Path) -> Any:
    if path.suffix.lower() in (".yaml", ".yml"):
        values = _yaml_values(read_yaml(path), str(path))
        # A file that can stand alone may hold the list under the key it has in the main file.
        if isinstance(values, DictConfig) and list(values) == ["effects"]:
            values = values["effects"]
        if isinstance(values, DictConfig) or values is None:
            raise InputError(f"{path}: must hold a list of effects, each starting with '- name: ...'")
        return values
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise InputError(f"effects: '{path}' is not .yaml, .jsonl or .json; give a list or such a file")
    rows, faults = read_rows(path)
    if faults:
        raise InputErrors(faults)
    return [row for _, row in rows]


def _yaml_values(text: str, source: str) -> Any:
    try:
        return OmegaConf.create(text)
    except yaml.YAMLError as error:
        reason = first_line(error)
        raise InputError(f"{source}: holds YAML that is not plain data ({reason}); remove it") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{source}: {first_line(error)}") from error


def _override(values: DictConfig, override: str, faults: list[str]) -> DictConfig:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        faults.append(f"override '{override}': must read key=value, such as train.learning_rate=1e-4")
        return values
    try:
        check_yaml(text, f"override '{key}'")
        values.merge_with_dotlist([override])
    except InputError as error:
        faults += error.faults
    except (OmegaConfBaseException, yaml.YAMLError, IndexError, TypeError, ValueError) as error:
        faults.append(f"override '{override}': cannot be applied ({first_line(error)})")
    return values


def _explain(error: ValidationError) -> list[str]:
    """One sentence per pydantic error: dotted key, what is wrong, what was given."""
    faults: list[str] = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        message = str(item["msg"]).removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            faults.append(_unknown_key(item["loc"]))
        elif item["type"] == "missing":
            faults.append(f"'{key}' is missing; add it")
        elif item["type"] == "value_error" and not key:
            faults += message.splitlines()
        elif item["type"] == "value_error":
            faults.append(f"'{key}': {message}")
        elif item["type"] == "model_type":
            faults.append(f"'{key}' must be a section of 'key: value' lines, got {_short(item['input'])}")
        elif item["type"] == "string_type":
            faults.append(f"'{key}' must be text, got {_short(item['input'])}; put it in quotes")
        else:
            faults.append(f"'{key}': {message[:1].lower()}{message[1:]}, got {_short(item['input'])}")
    return faults


def _unknown_key(loc: Sequence[int | str]) -> str:
    key = ".".join(str(part) for part in loc)
    names = [str(part) for part in loc if isinstance(part, str)]
    parent, leaf = ".".join(names[:-1]), names[-1]
    # A key that several sections have most likely means the training run's.
    every = sorted(known_keys(), key=lambda known: not known.startswith("train."))
    siblings = [known.rpartition(".")[2] for known in every if known.rpartition(".")[0] == parent]
    # The index of a list item is kept in what is proposed: effects.3.lora, not effects.lora.
    shown = key.removesuffix(leaf)
    leaves = {known.rpartition(".")[2]: known for known in reversed(every)}
    other = _OTHER_NAMES.get(leaf)
    close_here = nearest(leaf, siblings)
    if other in siblings or (close_here and leaf not in leaves):
        return f"unknown key '{key}'; did you mean '{shown}{other if other in siblings else close_here}'?"
    for candidate in (leaf, other, nearest(leaf, leaves)):
        if candidate in leaves:
            return f"unknown key '{key}'; did you mean '{leaves[candidate]}'?"
    return f"unknown key '{key}'; known {f'in {parent!r}' if parent else 'sections'}: {', '.join(siblings)}"


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for inner in map(_inner_model, get_args(annotation)) if inner is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def acceleration_of(config: Config, section: Literal["student", "targets"] = "student") -> Path | None:
    """The acceleration LoRA that joins the student, as `student.acceleration` says, or the teachers for their targets,
    as `targets.acceleration` does; none without effects. Raises `InputError` for the base's own of one without."""
    named = config.student.acceleration if section == "student" else config.targets.acceleration
    is_used = config.effects and (section == "student" or config.targets.source == "teachers")
    if named is None or not is_used:
        return None
    path = acceleration_lora(config.base.model) if named == "base" else named
    if path is None:
        raise InputError(
            f"{section}.acceleration: base {config.base.model} brings no acceleration LoRA; give a file, or null"
        )
    return path
