"""The bank of teachers: any order of batches finds every sample's own teacher in its slot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clora.errors import InputError, InputErrors
from clora.lora import Adapters, inject_adapters
from clora.lora_files import LoraFile, LoraModule, read_lora, write_lora
from clora.teachers import TeacherBank

NAMES = ["clay", "manga", "neon", "oil"]


def adapters() -> Adapters:
    return inject_adapters(nn.ModuleDict({"first": nn.Linear(5, 6), "last": nn.Linear(6, 4)}), ["first", "last"])


def teacher(index: int) -> dict[str, LoraModule]:
    """Ranks, alphas and covered modules all differ."""
    rng = torch.Generator().manual_seed(index)
    shapes = {"first": (6, 5), "last": (4, 6)}
    chosen = [["first"], ["last"], ["first", "last"], ["first", "last"]][index]
    rank, alpha = index + 1, [0.5, 2.0, 3.0, 8.0][index]
    return {
        name: LoraModule(
            torch.randn(rank, shapes[name][1], generator=rng),
            torch.randn(shapes[name][0], rank, generator=rng),
            alpha,
        )
        for name in chosen
    }


def write_all(folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name}.safetensors" for name in NAMES}
    for index, path in enumerate(files.values()):
        write_lora(path, teacher(index), layout="kohya" if index % 2 else "comfyui", dtype=torch.float32)
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    # Flat names resolve only against the transformer's own, as the toy's are not a Qwen-Image model's.
    return write_all(tmp_path_factory.mktemp("teachers"))


def assert_holds(bank_adapters: Adapters, slot: str | None, effect: str | None) -> None:
    assert (slot is None) == (effect is None)
    if slot is None or effect is None:
        return
    modules = teacher(NAMES.index(effect))
    for name, (N, K) in bank_adapters.module_shapes.items():
        wanted = modules[name].delta() if name in modules else torch.zeros(N, K, dtype=torch.float64)
        torch.testing.assert_close(bank_adapters.delta(slot, name), wanted, rtol=1e-6, atol=1e-6)


@given(
    capacity=st.integers(1, 6),
    batches=st.lists(st.lists(st.one_of(st.none(), st.sampled_from(NAMES)), max_size=5), min_size=1, max_size=10),
)
def test_slots_for_any_order(files: dict[str, Path], capacity: int, batches: Any) -> None:
    mine = adapters()
    bank = TeacherBank(mine, files, capacity)
    assert bank.capacity == min(capacity, 4) and len(mine.slot_names) == bank.capacity
    for effects in batches:
        if len(set(effects) - {None}) > bank.capacity:
            with pytest.raises(InputError, match="raise train.teacher_slots"):
                bank.slots_for(effects)
            continue
        slots = bank.slots_for(effects)
        assert len(slots) == len(effects)
        for slot, effect in zip(slots, effects, strict=True):
            assert_holds(mine, slot, effect)


def test_slots_for_keeps_the_recent_and_reads_lazily(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def read(path: Path, names: Any) -> LoraFile:
        reads.append(path.stem)
        return read_lora(path, names)

    monkeypatch.setattr("clora.teachers.read_lora", read)
    mine = adapters()
    bank = TeacherBank(mine, files, 2)
    assert reads == []
    clay, manga = bank.slots_for(["clay", "manga"])
    assert reads == ["clay", "manga"]
    bank.slots_for(["clay"])
    (neon,) = bank.slots_for(["neon"])
    assert neon == manga  # the least recently used made room
    assert bank.slots_for(["clay"]) == (clay,)
    # Both held ones are needed or recent; oil must not push out clay, which the same batch needs.
    oil, again = bank.slots_for(["oil", "clay"])
    assert again == clay and oil == neon
    bank.slots_for(["manga"])
    assert reads == ["clay", "manga", "neon", "oil"]  # once each, then from memory


def test_effects_of_one_file_share_a_slot(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def read(path: Path, names: Any) -> LoraFile:
        reads.append(path.stem)
        return read_lora(path, names)

    monkeypatch.setattr("clora.teachers.read_lora", read)
    mine = adapters()
    bank = TeacherBank(mine, {"first": files["oil"], "clay": files["clay"], "second": files["oil"]}, 5)
    assert bank.capacity == 2 and bank.effects == ("first", "clay", "second")
    second, clay, first, base = bank.slots_for(["second", "clay", "first", None])
    assert first == second != clay and base is None and reads == ["oil", "clay"]
    assert_holds(mine, second, "oil")
    assert bank.file("second") is bank.file("first")
    # One slot is enough for a batch of both.
    assert len(set(TeacherBank(adapters(), {"a": files["oil"], "b": files["oil"]}, 1).slots_for(["a", "b"]))) == 1


def test_slots_for_unknown_effect_names_the_nearest(files: dict[str, Path]) -> None:
    bank = TeacherBank(adapters(), files, 2)
    with pytest.raises(InputError, match="effect 'mangga' has no teacher; did you mean 'manga'"):
        bank.slots_for([None, "mangga"])


def test_teacher_bank_takes_files_in_memory_and_half_precision(files: dict[str, Path]) -> None:
    mine = adapters()
    names = mine.module_shapes
    bank = TeacherBank(mine, {n: read_lora(p, names) for n, p in files.items()}, 2, dtype=torch.bfloat16)
    (slot,) = bank.slots_for(["oil"])
    assert slot is not None and mine.parameters("teachers")[0].dtype == torch.bfloat16
    wanted = teacher(3)["first"].delta()
    assert (mine.delta(slot, "first") - wanted).norm() < 5e-3 * wanted.norm()


def test_teacher_bank_lists_the_faults_of_all_files(files: dict[str, Path], tmp_path: Path) -> None:
    wide = {"first": LoraModule(torch.zeros(1, 9), torch.zeros(6, 1), 1.0)}
    write_lora(tmp_path / "wide.safetensors", wide)
    write_lora(tmp_path / "other.safetensors", {"middle": teacher(0)["first"]})
    (tmp_path / "cut.safetensors").write_bytes(files["clay"].read_bytes()[:-3])
    given_files: dict[str, Any] = {name: tmp_path / f"{name}.safetensors" for name in ("wide", "other", "cut", "gone")}
    with pytest.raises(InputErrors) as caught:
        TeacherBank(adapters(), files | given_files, 2)
    assert len(caught.value.faults) == 4
    for fault, words in zip(caught.value.faults, ("[6, 9]", "middle", "cut off", "does not exist"), strict=True):
        assert words in fault
    in_memory = LoraFile(Path("m"), wide, "bare", {}, "")
    with pytest.raises(InputErrors, match="effect wide: first is for a weight"):
        TeacherBank(adapters(), {"wide": in_memory}, 2)


def test_slots_for_bad_values_leave_the_bank_usable(files: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(files["neon"])
    tensors["diffusion_model.first.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "neon.safetensors")
    mine = adapters()
    bank = TeacherBank(mine, files | {"neon": tmp_path / "neon.safetensors"}, 1)
    bank.slots_for(["clay"])
    with pytest.raises(InputErrors, match="not finite"):
        bank.slots_for(["neon"])
    (slot,) = bank.slots_for(["clay"])
    assert_holds(mine, slot, "clay")
