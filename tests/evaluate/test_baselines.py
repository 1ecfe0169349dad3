"""The methods of the comparison: how each is sampled, and images that depend on their seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clora.backbones.load import load_backbone
from clora.backbones.qwen_image.backbone import QwenImageBackbone
from clora.config import build_config
from clora.data.examples import Example, collate
from clora.evaluate.baselines import (
    ACCELERATION,
    COARSE,
    COLLECTION,
    JOINT,
    JOINT_STUDENT,
    STACKED,
    Method,
    collection_method,
    methods,
    sample_examples,
)
from clora.inference.sampling import Sampling, sample


class Bank:
    """Stands for a bank of teachers: every effect has a slot of its name."""

    def slots_for(self, effects: Sequence[str | None]) -> list[str | None]:
        return list(effects)


def test_methods_sample_teachers_as_targets_and_the_rest_in_few_steps() -> None:
    values = {"preset": "clora", "base": "tiny", "output_dir": ".", "schedule": {"num_steps": 4, "shift": 5.0}}
    effects = [{"name": name, "prompt": name} for name in ("a", "b", "c")]
    bank: Any = Bank()
    loaded = [ACCELERATION, JOINT, JOINT_STUDENT, COARSE]
    found = {m.name: m for m in methods(build_config(values | {"effects": effects}), bank, loaded)}
    assert {name: (m.nfe, m.num_loras, m.role) for name, m in found.items()} == {
        "teacher-40x2": (80, 3, "teacher"), "teacher-4": (4, 3, "teacher"), "teacher+accel": (4, 4, "teacher"),
        "joint-fm+accel": (4, 2, "teacher"), "joint-fm (student prompts)+accel": (4, 2, "student"),
        "coarse+accel": (4, 2, "student"), "collection": (4, 1, "student"),
    }  # fmt: skip
    slots = {name: found[name].slots_for(["a", None]) for name in STACKED}
    assert list(slots.values()) == [[(slot, "acceleration")] for slot in ("joint", "joint_student", "coarse")]
    few = Sampling("consistency", 4, 5.0)
    assert found["teacher-40x2"].sampling == Sampling("euler", 40, None, 4.0, "norm", " ")
    assert found["teacher-4"].sampling == Sampling("euler", 4, None, 1.0, "norm", " ")
    assert all(found[name].sampling == few for name in ("teacher+accel", "joint-fm+accel", "collection"))
    assert found["teacher+accel"].slots_for(["a", None]) == [("a", "acceleration"), "acceleration"]
    assert found["collection"].role == "student" and found["teacher-4"].role == "teacher"
    unguided = methods(build_config(values | {"targets": {"guidance": 1.0}}), bank, [])
    assert [m.name for m in unguided] == ["teacher-40", "teacher-4", "collection"]


def test_collection_method_is_the_collections_slot_in_its_own_steps() -> None:
    assert collection_method(4, 2.0, "euler").sampling == Sampling("euler", 4, 2.0)
    method = collection_method(8, 3.0, "consistency")
    assert (method.name, method.num_loras, method.nfe, method.role) == ("collection", 1, 8, "student")
    assert method.sampling == Sampling("consistency", 8, 3.0) and method.slots_for(["a", "b"]) == [COLLECTION]


@pytest.fixture(scope="module")
def backbone(random_base: Path) -> QwenImageBackbone:
    backbone = load_backbone(random_base, dtype=torch.float32)
    adapters = backbone.add_adapters(["attn.to_q"])
    for number, name in enumerate(("a", "b")):
        adapters.add_stack(name, [name], 2, 2, trainable=False, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            for key, value in adapters.named_parameters(name).items():
                value.add_(float(number + 1) if key.endswith(".B") else 0.0)
    return backbone


def make_examples(backbone: QwenImageBackbone) -> list[Example]:
    """Two effects by turns, of two sizes."""
    rng = torch.Generator().manual_seed(0)
    examples = []
    for number, (effect, grid) in enumerate((("a", (4, 2)), ("b", (2, 2)), ("a", (2, 2)), ("b", (4, 2)))):
        ref = torch.randn(grid[0] * grid[1], backbone.token_channels, generator=rng)
        texts = {role: torch.randn(3 + number, 32, generator=rng) for role in ("teacher", "negative")}
        examples.append(Example(effect, (Path("x"),), grid, (ref,), (grid,), texts, key=(effect, str(number))))
    return examples


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_sample_examples_depend_on_their_seed_and_not_on_the_batch(
    backbone: QwenImageBackbone, guidance: float
) -> None:
    examples = make_examples(backbone)
    bank: Any = Bank()
    method = Method("m", 2, Sampling("euler", 3, 3.0, guidance), "teacher", bank.slots_for)
    together = list(sample_examples(backbone, method, examples, [7, 8, 9, 10], 2))
    assert [place for place, _ in together] == [0, 3, 1, 2]
    for place, image in together:
        example, seed = examples[place], 7 + place
        assert image.shape == (example.grid[0] * 8, example.grid[1] * 8, 3) and image.dtype == np.float32
        cond = collate([example], "teacher", backbone.device)
        uncond = collate([example], "negative", backbone.device)
        x0 = sample(backbone, cond, [example.effect], method.sampling, [seed], uncond)
        alone = backbone.decode(x0, example.grid)[0].permute(1, 2, 0).numpy()
        assert np.abs(image - alone).max() < 1e-4
        (other,) = sample_examples(backbone, method, [example], [seed + 1], 1)
        assert np.abs(other[1] - alone).max() > 1e-2
