"""A configuration file: its schema, how it is loaded, and what the folder of a base says. This module is the room's
one door."""

from clora.config.base_folder import (
    BaseSizes,
    acceleration_lora,
    collection_lora,
    default_preset,
    general_data,
    read_sizes,
    resolve_base,
)
from clora.config.load import build_config, known_keys, load_config, load_preset
from clora.config.schema import (
    DEFAULT_TARGETS,
    PRESETS,
    BaseConfig,
    BucketConfig,
    Config,
    EffectConfig,
    EvalConfig,
    ExtendConfig,
    GeneralConfig,
    Job,
    LoraConfig,
    ObjectiveConfig,
    PromptsConfig,
    Quantize,
    ScheduleConfig,
    Section,
    TargetsConfig,
    TeachConfig,
    TrainConfig,
)

__all__ = [
    "DEFAULT_TARGETS", "PRESETS", "BaseConfig", "BaseSizes", "BucketConfig", "Config", "EffectConfig", "EvalConfig",
    "ExtendConfig", "GeneralConfig", "Job", "LoraConfig", "ObjectiveConfig", "PromptsConfig", "Quantize",
    "ScheduleConfig", "Section", "TargetsConfig", "TeachConfig", "TrainConfig", "acceleration_lora", "build_config",
    "collection_lora", "default_preset", "general_data", "known_keys", "load_config", "load_preset", "read_sizes",
    "resolve_base",
]  # fmt: skip
