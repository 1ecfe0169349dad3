"""Which adapter each network is: student, critic and teachers on one base, told apart by LoRAs that all differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, make_cond
from clora.backbones.load import load_backbone
from clora.distill.networks import Models
from clora.distill.roles import ACCELERATION, COLLECTION, CRITIC, STUDENT
from clora.lora.bank import TeacherBank
from clora.lora.files import write_lora
from clora.lora.module import LoraModule, join_modules
from clora.method.given import Query

TARGETS = ("to_q", "img_mlp.net.2", "txt_mod.1")
Modules = dict[str, LoraModule]


def random_modules(backbone: Backbone, seed: int) -> Modules:
    assert backbone.adapters is not None
    rng = torch.Generator().manual_seed(seed)
    return {
        name: LoraModule(torch.randn(2, K, generator=rng) * 0.3, torch.randn(N, 2, generator=rng) * 0.3, 2)
        for name, (N, K) in backbone.adapters.module_shapes.items()
    }


@pytest.fixture(scope="module")
def world(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Models, dict[str, Modules]]:
    """A base with a LoRA in every slot; the modules by the slot's name, or the effect's for teachers."""
    backbone = load_backbone(random_base, dtype=torch.float32, components=["transformer"])
    adapters = backbone.add_adapters(TARGETS)
    names = (STUDENT, CRITIC, ACCELERATION, COLLECTION, "warm", "cold")
    modules = {name: random_modules(backbone, seed) for seed, name in enumerate(names)}
    for name in names[:4]:
        adapters.add_lora(name, modules[name])
    folder = tmp_path_factory.mktemp("teachers")
    for name in names[4:]:
        write_lora(folder / f"{name}.safetensors", modules[name], dtype=torch.float32)
    bank = TeacherBank(adapters, {name: folder / f"{name}.safetensors" for name in names[4:]}, 2)
    models = Models(backbone, bank, (COLLECTION, STUDENT), (ACCELERATION,), {"old": COLLECTION})
    return backbone, models, modules


def make_query(effects: tuple[str | None, ...], seed: int) -> Query:
    """Texts of different lengths; every sample another."""
    rng = torch.Generator().manual_seed(seed)
    count = len(effects)
    texts = [torch.randn(3 + (i + seed) % 3, 32, generator=rng) for i in range(count)]
    cond = make_cond(texts, [(torch.randn(count, 4, 64, generator=rng), (2, 2))], (2, 2), effects)
    return Query(torch.randn(count, 4, 64, generator=rng), torch.rand(count, generator=rng), cond)


def by_hand(backbone: Backbone, query: Query, modules: list[Modules | None]) -> Tensor:
    """Each sample alone, through a slot that holds these modules."""
    assert backbone.adapters is not None
    rows = []
    for i, held in enumerate(modules):
        cond: Cond = query.cond.select([i])
        if held:
            backbone.adapters.add_lora("by_hand", held)
        slot = "by_hand" if held else None
        rows.append(backbone.velocity(query.x_sigma[i : i + 1], query.sigma[i : i + 1], cond, [slot]))
        if held:
            backbone.adapters.remove_stack("by_hand")
    return torch.cat(rows)


@torch.no_grad()
def test_networks_are_their_adapters(world: tuple[Backbone, Models, dict[str, Modules]]) -> None:
    backbone, models, modules = world
    query = make_query(("warm", None, "cold", "old"), 0)
    below = join_modules(modules[COLLECTION], modules[STUDENT])
    for joined, student in ((False, below), (True, join_modules(below, modules[ACCELERATION]))):
        nets = models.networks(joined, joint=False)
        assert nets.scores is None
        torch.testing.assert_close(nets.student(*query), by_hand(backbone, query, [student] * 4), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            nets.critic(*query), by_hand(backbone, query, [modules[CRITIC]] * 4), rtol=1e-4, atol=1e-5
        )
        taught = by_hand(backbone, query, [modules["warm"], None, modules["cold"], modules[COLLECTION]])
        torch.testing.assert_close(nets.teacher(*query), taught, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_joint_scores_are_the_separate_ones(world: tuple[Backbone, Models, dict[str, Modules]]) -> None:
    """Critic and teacher, who differ in their adapters, texts and noise levels and in the number of their samples."""
    _, models, _ = world
    nets = models.networks(joined=True, joint=True)
    critic, teacher = make_query((None, None), 1), make_query(("cold", "old", "warm", None), 2)
    assert nets.scores is not None
    v_critic, v_teacher = nets.scores(critic, teacher)
    torch.testing.assert_close(v_critic, nets.critic(*critic), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(v_teacher, nets.teacher(*teacher), rtol=1e-4, atol=1e-5)
    assert float((v_critic - nets.student(*critic)).abs().max()) > 0.01


def test_teacher_slots_without_a_bank_are_the_base(
    world: tuple[Backbone, Models, dict[str, Modules]],
) -> None:
    _, models, _ = world
    assert replace(models, bank=None).teacher_slots([None, "old", None]) == [None, COLLECTION, None]
    replace(models, bank=None).prefetch(["old", None])


def test_prefetch_asks_the_bank_for_its_own_alone(
    world: tuple[Backbone, Models, dict[str, Modules]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, models, _ = world
    asked: list[list[str | None]] = []
    monkeypatch.setattr(TeacherBank, "prefetch", lambda bank, effects: asked.append(effects))
    models.prefetch(["old", "warm", None, "old", "cold"])
    assert asked == [["warm", None, "cold"]]


@torch.no_grad()
def test_few_step_teacher_has_the_acceleration_lora_but_on_a_resident_one(
    world: tuple[Backbone, Models, dict[str, Modules]],
) -> None:
    """A collection samples in few steps already: an acceleration LoRA on top would be its second."""
    backbone, models, modules = world
    query, fast = make_query(("warm", None, "old"), 3), modules[ACCELERATION]
    nets = replace(models, accelerating=ACCELERATION).networks(joined=False, joint=False)
    assert nets.few_step_teacher is not None
    wanted = by_hand(backbone, query, [join_modules(modules["warm"], fast), fast, modules[COLLECTION]])
    torch.testing.assert_close(nets.few_step_teacher(*query), wanted, rtol=1e-4, atol=1e-5)
