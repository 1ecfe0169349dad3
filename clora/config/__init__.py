"""A configuration file: its schema, how it is loaded, and what the folder of a base says. This module is the room's
one door."""

from clora.config.base_folder import (
    BaseSidecar,
    acceleration_lora,
    base_identity,
    collection_lora,
    default_preset,
    general_data,
    read_sidecar,
    resolve_base,
)
from clora.config.load import acceleration_of, build_config, known_keys, load_config, load_preset
from clora.config.schema import PRESETS, Config
from clora.config.sections import (
    BaseConfig,
    BucketConfig,
    EffectConfig,
    EvalConfig,
    ExtendConfig,
    GeneralConfig,
    LoraConfig,
    ObjectiveConfig,
    PromptsConfig,
    ScheduleConfig,
    Section,
    TargetsConfig,
    TeachConfig,
    TrainConfig,
)
from clora.config.types import Job, Quantize, Sampler

__all__ = [
    "PRESETS", "BaseConfig", "BaseSidecar", "BucketConfig", "Config", "EffectConfig", "EvalConfig",
    "ExtendConfig", "GeneralConfig", "Job", "LoraConfig", "ObjectiveConfig", "PromptsConfig", "Quantize",
    "Sampler", "ScheduleConfig", "Section", "TargetsConfig", "TeachConfig", "TrainConfig", "acceleration_lora",
    "acceleration_of", "base_identity", "build_config", "collection_lora", "default_preset", "general_data",
    "known_keys", "load_config", "load_preset", "read_sidecar", "resolve_base",
]  # fmt: skip
