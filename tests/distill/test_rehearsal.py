"""Old effects of `clora extend`: dealt, taught and held in place by their collection alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from clora.data.examples import collate
from clora.distill.check import check_training
from clora.distill.networks import Models
from clora.distill.opened import Workspace
from clora.distill.rehearsal import FewStepTeachers, deal_names, rehearsal_examples, rehearsal_targets
from clora.distill.roles import ACCELERATION, COLLECTION, STUDENT
from clora.distill.run import open_bank
from clora.distill.workspace import open_workspace
from clora.errors import InputErrors
from clora.lora.catalogue import Catalogue, CatalogueEntry, read_catalogue
from clora.lora.files import read_lora
from clora.lora.module import join_modules
from clora.method.flow import few_step_sigmas
from clora.method.given import Anchor, DistillBatch, Query
from clora.method.noise import Draws
from clora.method.objective import noise_anchor, ta_fm_loss
from clora.method.routing import step_generator
from clora.method.samplers import few_step_sample_ref
from tests.support.extension import make_config, random_modules, write_place

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def place(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(random_base, tmp_path_factory.mktemp("extend"))


@pytest.fixture(scope="module")
def opened(random_base: Path, place: Path) -> tuple[Workspace, Catalogue]:
    """A workspace of the new effect whose collection is in its slot."""
    config = make_config(random_base, place, place / "out")
    workspace = open_workspace(check_training(config), QUIET, keep_encoders=True)
    collection = place / "collection.safetensors"
    workspace.adapters.add_lora(COLLECTION, read_lora(collection).modules)
    return workspace, read_catalogue(collection)


def test_rehearsal_examples_are_the_new_sources_under_the_old_prompts(opened: tuple[Workspace, Catalogue]) -> None:
    workspace, catalogue = opened
    found = rehearsal_examples(workspace, catalogue, QUIET)
    # Two sources each of the three there are, taken in turn: the first effect has 0 and 1, the second 2 and 0.
    names = {name: [example.sources[0].name for example in examples] for name, examples in found.items()}
    assert names == {"first": ["0.png", "1.png"], "second": ["2.png", "0.png"]}
    by_source = {example.sources: example for example in workspace.effects["warm"]}
    prompts = {"first": "<first>paint it", "second": "<second>"}
    for name, examples in found.items():
        for example in examples:
            new = by_source[example.sources]
            assert (example.effect, example.sizes, example.x0, example.y) == (name, new.sizes, None, ())
            assert torch.equal(example.refs[0], new.refs[0])
            assert example.texts.keys() == {"student", "teacher"}  # no negative one: they are not guided
            assert torch.equal(example.texts["student"], example.texts["teacher"])
            tokens = workspace.backbone.count_prompt_tokens(prompts[name])
            assert tokens and not torch.equal(example.texts["student"], new.texts["student"])
    first, second = found["first"][0], found["second"][1]
    assert first.sources == second.sources and first.texts["student"].shape != second.texts["student"].shape


def test_rehearsal_examples_names_the_effect_of_a_bad_prompt_once(opened: tuple[Workspace, Catalogue]) -> None:
    workspace, catalogue = opened
    long = CatalogueEntry(name="long", trigger="<long>", student_prompt="paint " * 4000)
    with pytest.raises(InputErrors) as caught:
        rehearsal_examples(workspace, catalogue.model_copy(update={"effects": [*catalogue.effects, long]}), QUIET)
    (fault,) = caught.value.faults
    assert fault.startswith("rehearsal of long: ")


def test_rehearsal_targets_are_the_collections_own_few_step_samples(
    opened: tuple[Workspace, Catalogue], place: Path
) -> None:
    workspace, catalogue = opened
    filled = rehearsal_targets(workspace, rehearsal_examples(workspace, catalogue, QUIET), catalogue, "0" * 64, QUIET)
    assert {name: [len(e.y) for e in examples] for name, examples in filled.items()} == {
        "first": [1, 1],
        "second": [1, 1],
    }
    first = filled["first"][0]
    (key,) = [p.stem for p in (place / "out" / "cache").rglob("*.safetensors") if _holds(p, first.y[0])]
    workspace.adapters.add_lora("by_hand", read_lora(place / "collection.safetensors").modules)

    def velocity(x: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        return workspace.backbone.velocity(x, sigma, cond, ["by_hand"])

    shape = (first.num_tokens, workspace.backbone.token_channels)
    cond = collate([first], "student", workspace.backbone.device)
    seed = step_generator(int(key[:12], 16), 0, "target", "cpu").initial_seed()
    y = few_step_sample_ref(velocity, cond, shape, few_step_sigmas(2, 3.0), [seed])
    workspace.adapters.remove_stack("by_hand")
    torch.testing.assert_close(first.y[0], y[0], rtol=1e-4, atol=1e-4)


def _holds(path: Path, latents: torch.Tensor) -> bool:
    found = load_file(path).get("latents")
    return found is not None and found.shape == latents.shape and torch.equal(found, latents)


@pytest.fixture(scope="module")
def followed(opened: tuple[Workspace, Catalogue], random_base: Path, place: Path) -> tuple[Models, Query]:
    """Models with an acceleration LoRA, and a query of two new samples and an old one between them."""
    workspace, _ = opened
    adapters = workspace.adapters
    fast = random_modules(random_base, 2, 3)
    adapters.add_lora(ACCELERATION, fast)
    adapters.add_lora(STUDENT, random_modules(random_base, 3, 2))
    taught = read_lora(place / "warm.safetensors").modules
    adapters.add_lora("new_by_hand", join_modules(taught, fast))
    adapters.add_lora("old_by_hand", read_lora(place / "collection.safetensors").modules)
    models = Models(workspace.backbone, open_bank(workspace), (COLLECTION, STUDENT), (), {"first": COLLECTION})
    warm = workspace.effects["warm"]
    cond = collate([warm[0], replace(warm[1], effect="first"), warm[2]], "teacher", workspace.backbone.device)
    rng = torch.Generator().manual_seed(0)
    return models, Query(torch.randn(3, warm[0].num_tokens, 64, generator=rng), torch.tensor([0.3, 0.9, 0.5]), cond)


@pytest.mark.parametrize("accelerated", [False, True])
@torch.no_grad()
def test_follow_is_the_collections_velocity_and_the_accelerated_teachers(
    followed: tuple[Models, Query], accelerated: bool
) -> None:
    """The collection's for an old effect; for a new one its teacher's with the acceleration LoRA, else the images'."""
    models, query = followed
    models = replace(models, accelerating=ACCELERATION if accelerated else None)
    v_image = torch.randn(query.x_sigma.shape, generator=torch.Generator().manual_seed(1))
    got = FewStepTeachers(models, 5.0).follow(query, v_image)
    slots = ["new_by_hand", "old_by_hand", "new_by_hand"]
    expected = models.backbone.velocity(*query, slots)
    if not accelerated:
        expected[[0, 2]] = v_image[[0, 2]]
        assert torch.equal(got[[0, 2]], v_image[[0, 2]])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_follow_runs_one_forward_whatever_there_is_to_follow(
    followed: tuple[Models, Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that share the base must run equally many; and no teacher is loaded for nothing."""
    models, query = followed
    sizes: list[int] = []
    velocity = type(models.backbone).velocity

    def counted(self: Any, x: torch.Tensor, *more: Any) -> torch.Tensor:
        sizes.append(len(x))
        return velocity(self, x, *more)

    monkeypatch.setattr(type(models.backbone), "velocity", counted)
    none_old = query._replace(cond=replace(query.cond, effects=("warm",) * 3))
    v_image = torch.zeros(query.x_sigma.shape)
    monkeypatch.setattr("clora.lora.bank.TeacherBank.slots_for", lambda bank, effects: [None for _ in effects])
    teachers = FewStepTeachers(models, 5.0)
    assert torch.equal(teachers.follow(none_old, v_image), v_image)
    assert not torch.equal(teachers.follow(query, v_image), v_image)
    assert sizes == [1, 1]


def test_anchor_loss_weighs_old_effects_and_is_ta_fm_without_them(
    opened: tuple[Workspace, Catalogue], followed: tuple[Models, Query]
) -> None:
    config, (models, query) = opened[0].config, followed
    y = torch.randn(query.x_sigma.shape, generator=torch.Generator().manual_seed(2))
    anchor = Anchor(y, query.cond, query.cond)
    batch = DistillBatch("effect", query.cond, query.cond, None, (y.shape[1], 64), 3, ["x"] * 3, 0, anchor=anchor)
    nets = models.networks(joined=False, joint=False)

    def draws() -> Draws:
        return Draws.alone(torch.Generator().manual_seed(3), 3)

    def loss_of(weight: float, models: Models = models) -> float:
        loss, figures = FewStepTeachers(models, weight).anchor_loss(nets, batch, config, draws())
        assert figures.keys() == {"ta_fm_loss"} and figures["ta_fm_loss"] == loss
        return float(loss)

    with torch.no_grad():
        _, point = noise_anchor(y, anchor.student_cond, config, draws(), None)
        v_old = models.backbone.velocity(*point, ["old_by_hand"])
        of_old = float((nets.student(*point) - v_old)[1].square().mean())
        plain = float(ta_fm_loss(nets, batch, config, draws())[0])
    assert of_old > 1e-4 and loss_of(301) - loss_of(1) == pytest.approx(300 * of_old / 3, rel=1e-3)
    # The weight is of old effects alone, and so is what is followed.
    assert loss_of(4, replace(models, resident={})) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(("num_new", "num_old", "share"), [(3, 50, 0.5), (1, 2, 0.5), (6, 2, 0.5), (3, 50, 0.8)])
def test_deal_names_comes_near_the_share(num_new: int, num_old: int, share: float) -> None:
    new, old = [f"new{i}" for i in range(num_new)], [f"old{i}" for i in range(num_old)]
    deal = deal_names(new, old, share)
    counts = {name: deal.count(name) for name in (*new, *old)}
    assert len({counts[name] for name in new}) == len({counts[name] for name in old}) == 1
    assert sum(counts[name] for name in old) / len(deal) == pytest.approx(share, abs=0.05)
    assert deal_names(new, old, 0) == new
