"""What of a configuration decides numbers: its values without the fields marked `numerics=False`, and their hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def felt_values(section: BaseModel) -> dict[str, Any]:
    """The section's values as JSON without the fields marked `numerics=False`, those of inner sections neither."""
    values: dict[str, Any] = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        if field.json_schema_extra == {"numerics": False}:
            del values[name]
        elif isinstance(inner := getattr(section, name), BaseModel):
            values[name] = felt_values(inner)
    return values


def relative_values(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """JSON values whose absolute paths count from `folder`, so that it may move."""
    return dict(_map_strings(values, lambda text: os.path.relpath(text, folder) if os.path.isabs(text) else text))


def digest_of(values: dict[str, Any]) -> str:
    """SHA-256 (hex) of JSON values, whatever the order of their keys."""
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
