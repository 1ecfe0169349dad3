"""Several collections that share the effects of one base: which serves which, in the file `groups.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clora.errors import InputError, InputErrors, did_you_mean
from clora.io.text import parse_json, read_text
from clora.lora.catalogue import field_fault


class Group(BaseModel):
    """One of several collections: its file and configuration (paths from the groups file), and what it serves."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    config: str
    collection: str = Field(min_length=1)
    effects: list[str] = Field(min_length=1)


class Groups(BaseModel):
    """Which collection serves which effect: the file `groups.json` of `clora plan-groups`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format_version: Literal[1] = 1
    base: str
    groups: list[Group] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Groups:
        counts = Counter(name for group in self.groups for name in group.effects)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"effect in more than one group: {', '.join(twice)}")
        return self


def read_groups(path: Path) -> Groups:
    """The groups file at `path`; raises `InputError` for one that is none."""
    try:
        return Groups.model_validate(parse_json(read_text(path)))
    except ValidationError as error:
        raise InputErrors([f"{path}: {field_fault(item)}" for item in error.errors()]) from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error}); give a groups.json of `clora plan-groups`") from error


def find_collection(path: Path, effects: Sequence[str]) -> Path:
    """The collection that serves these effects, by the groups file at `path`.

    Raises `InputError` without effects, for unknown ones (with the nearest) and for those of different collections.
    """
    groups = read_groups(path)
    if not effects:
        files = ", ".join(group.collection for group in groups.groups)
        raise InputError(f"{path}: holds several collections; name an effect, or give one of {files}")
    table = {name: group.collection for group in groups.groups for name in group.effects}
    for name in effects:
        if name not in table:
            raise InputError(f"effect {name!r} is in no group of {path}; {did_you_mean(name, table)}")
    found = list(dict.fromkeys(table[name] for name in effects))
    if len(found) > 1:
        raise InputError(f"effects {', '.join(effects)} are in different collections of {path}; apply them in turn")
    return path.parent / found[0]
