"""`clora plan-groups`: many effects split into several collections (Table 2), each small enough for one LoRA.

Similar effects are put APART. Inside one LoRA effects bleed into each other where what the student reads is alike: in
the closed-form world two effects with prompt embeddings of cosine .94 had .70 bad cases, at .5 and below none. What
would speak for putting them together, that a router tells coherent groups apart more easily, does not arise here:
effects are asked for by name, and `groups.json` knows which file serves which.

How alike two effects are is the largest of three cosines in [0, 1]: of their student prompts, of their teacher prompts
(both as character trigrams, so that no model is needed), and of their teachers' updates in a few layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from torch import Tensor

from clora.config import Config
from clora.errors import InputError
from clora.evaluate.router import text_similarity
from clora.io.atomic import write_text
from clora.lora.files import map_lora
from clora.lora.groups import Group, Groups
from clora.lora.summary import check_lora
from clora.method.prompts import effect_prompts

Matrix = NDArray[np.float64]
NUM_LAYERS = 4  # of a teacher that are compared: single linears, evenly spaced among those that all teachers have


@dataclass(frozen=True)
class GroupPlan:
    """`groups[k]` lists the indices of the effects of group k; `similarity` is between all effects, diagonal 0."""

    names: list[str]
    groups: list[list[int]]
    similarity: Matrix

    def closest(self, group: Sequence[int]) -> tuple[float, str, str]:
        """The greatest similarity inside a group, and the two effects that have it."""
        if len(group) < 2:
            return 0.0, "", ""
        inside = self.similarity[np.ix_(group, group)]
        i, j = np.unravel_index(int(inside.argmax()), inside.shape)
        return float(inside[i, j]), self.names[group[int(i)]], self.names[group[int(j)]]

    def to_json(self) -> list[dict[str, Any]]:
        rows = []
        for number, group in enumerate(self.groups, 1):
            value, first, second = self.closest(group)
            row: dict[str, Any] = {"group": number, "effects": [self.names[i] for i in group]}
            rows.append(row | {"max_similarity": round(value, 3), "closest": [first, second] if first else []})
        return rows


def plan_groups(config: Config, max_effects: int) -> GroupPlan:
    """Split the effects of `config` into as few groups of at most `max_effects` as there can be; deterministic.

    Teachers are compared where their files are there. Raises `InputError` without effects.
    """
    if not config.effects:
        raise InputError("effects: is empty; give the effects that are to be split")
    prompts = effect_prompts(config)
    similarity = np.maximum(
        text_similarity([prompt.text for prompt in prompts]),
        text_similarity([effect.prompt for effect in config.effects]),
    )
    paths = [config.teacher_path(effect) for effect in config.effects]
    similarity = np.maximum(similarity, teacher_similarity([path if path.is_file() else None for path in paths]))
    np.fill_diagonal(similarity, 0.0)
    groups = spread(similarity, math.ceil(len(prompts) / max_effects))
    return GroupPlan([prompt.name for prompt in prompts], groups, similarity)


def teacher_similarity(paths: Sequence[Path | None]) -> Matrix:
    """Cosines (n, n) of the updates B A in `NUM_LAYERS` layers that all files have, 0 where negative or no file.

    Only those layers are read. <B1 A1, B2 A2> = sum over both ranks of (B1^T B2) * (A1 A2^T), so no update is formed.
    """
    summaries = {index: check_lora(path) for index, path in enumerate(paths) if path is not None}
    cosines = np.zeros((len(paths), len(paths)))
    common = sorted(set.intersection(*(set(summary.keys) for summary in summaries.values()))) if summaries else []
    if not common:
        return cosines
    chosen = [common[round(k * (len(common) - 1) / (NUM_LAYERS - 1))] for k in range(NUM_LAYERS)]
    layers: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for index, summary in summaries.items():
        modules = map_lora(summary.path, only=chosen)
        layers[index] = [(modules[name].A.double(), modules[name].B.double()) for name in chosen]

    def product(first: int, second: int) -> float:
        pairs = zip(layers[first], layers[second], strict=True)
        return sum(float(((B1.T @ B2) * (A1 @ A2.T)).sum()) for (A1, B1), (A2, B2) in pairs)

    norms = {index: math.sqrt(max(product(index, index), 0.0)) for index in layers}
    for i in layers:
        for j in layers:
            if i < j and norms[i] * norms[j] > 0:
                cosines[i, j] = cosines[j, i] = min(1.0, max(0.0, product(i, j) / (norms[i] * norms[j])))
    return cosines


def spread(similarity: Matrix, num_groups: int) -> list[list[int]]:
    """Groups of sizes that differ by one at most, with little similarity inside: the sum of its squares over all pairs.

    Those most like others are placed first, each where it adds least; then pairs change places while that helps. The
    squares let one pair of near-twins weigh more than many that are faintly alike. Groups and members are in order.
    """
    n = len(similarity)
    cost = similarity**2
    np.fill_diagonal(cost, 0.0)
    group_of = np.full(n, -1)
    room = [n // num_groups + (k < n % num_groups) for k in range(num_groups)]
    for i in sorted(range(n), key=lambda i: (-cost[i].sum(), i)):
        added = [(cost[i, group_of == k].sum(), -room[k], k) for k in range(num_groups) if room[k]]
        best = min(added)[2]
        group_of[i] = best
        room[best] -= 1
    while True:
        # (n, groups): what an effect has in common with each group.
        shared = np.stack([cost[:, group_of == k].sum(axis=1) for k in range(num_groups)], axis=1)
        own = shared[np.arange(n), group_of]
        there = shared[:, group_of]  # [i, j]: i with the group of j
        change = there + there.T - own[:, None] - own[None, :] - 2 * cost
        change[group_of[:, None] == group_of[None, :]] = 0.0
        i, j = divmod(int(change.argmin()), n)
        if change[i, j] > -1e-9:
            break
        group_of[i], group_of[j] = group_of[j], group_of[i]
    groups = [np.flatnonzero(group_of == k).tolist() for k in range(num_groups)]
    return sorted(groups)


def write_groups(config: Config, plan: GroupPlan, folder: Path) -> Path:
    """Write `group_K.yaml` for each group, complete with its triggers, and `groups.json`; returns the latter.

    A group's collection will lie at `group_K/collection.safetensors` beside it, where `clora train` puts it.
    """
    triggers = {prompt.name: prompt.trigger for prompt in effect_prompts(config)}
    records = []
    for number, members in enumerate(plan.groups, 1):
        name = f"group_{number}"
        effects = []
        for effect in (config.effects[i] for i in members):
            taught = config.teacher_path(effect)
            lora = taught if taught.is_file() else effect.lora
            effects.append(effect.model_copy(update={"trigger": triggers[effect.name] or effect.trigger, "lora": lora}))
        group = config.model_copy(update={"effects": effects, "output_dir": folder.absolute() / name})
        values = group.model_dump(mode="json")  # with its nulls, which a preset may have values for
        values["effects"] = [effect.model_dump(mode="json", exclude_none=True) for effect in effects]
        write_text(folder / f"{name}.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        names = [effect.name for effect in effects]
        records.append(Group(config=f"{name}.yaml", collection=f"{name}/collection.safetensors", effects=names))
    path = folder / "groups.json"
    write_text(path, Groups(base=config.base.model, groups=records).model_dump_json(indent=1) + "\n")
    return path
