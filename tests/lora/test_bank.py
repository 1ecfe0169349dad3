"""The bank of teachers: any order of batches finds every sample's own teacher in its slot."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clora.errors import InputError, InputErrors
from clora.lora.adapters import Adapters, inject_adapters
from clora.lora.bank import TeacherBank
from clora.lora.files import map_lora, write_lora
from clora.lora.module import LoraModule

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


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read so far, by their stems."""
    found: list[str] = []

    def read(path: Path, names: Any) -> dict[str, LoraModule]:
        assert threading.current_thread() is not threading.main_thread()
        found.append(path.stem)
        return map_lora(path, names)

    monkeypatch.setattr("clora.lora.bank.map_lora", read)
    return found


def settle(bank: TeacherBank) -> None:
    """Wait until the bank's thread has done all that it was given."""
    bank._thread.submit(lambda: None).result()


@given(
    capacity=st.integers(1, 6),
    cache_bytes=st.sampled_from([0, 150, 300, float("inf")]),  # the four take 44, 80, 252 and 336 bytes
    batches=st.lists(st.lists(st.one_of(st.none(), st.sampled_from(NAMES)), max_size=5), min_size=1, max_size=10),
    data=st.data(),
)
def test_slots_for_any_order(
    files: dict[str, Path], capacity: int, cache_bytes: float, batches: Any, data: st.DataObject
) -> None:
    """With whatever was prefetched before each batch, right or wrong."""
    mine = adapters()
    bank = TeacherBank(mine, files, capacity, cache_bytes=cache_bytes)
    assert bank.capacity == min(capacity, 4) and len(mine.slot_names) == bank.capacity
    for effects in batches:
        bank.prefetch(data.draw(st.lists(st.one_of(st.none(), st.sampled_from(NAMES)), max_size=5)))
        if len(set(effects) - {None}) > bank.capacity:
            with pytest.raises(InputError, match="raise train.teacher_slots"):
                bank.slots_for(effects)
            continue
        slots = bank.slots_for(effects)
        assert len(slots) == len(effects)
        for slot, effect in zip(slots, effects, strict=True):
            assert_holds(mine, slot, effect)
    bank.close()


def test_slots_for_keeps_the_recent_and_reads_lazily(files: dict[str, Path], reads: list[str]) -> None:
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


def test_effects_of_one_file_share_a_slot(files: dict[str, Path], reads: list[str]) -> None:
    mine = adapters()
    bank = TeacherBank(mine, {"first": files["oil"], "clay": files["clay"], "second": files["oil"]}, 5)
    assert bank.capacity == 2 and bank.effects == ("first", "clay", "second")
    second, clay, first, base = bank.slots_for(["second", "clay", "first", None])
    assert first == second != clay and base is None and reads == ["oil", "clay"]
    assert_holds(mine, second, "oil")
    # One slot is enough for a batch of both.
    assert len(set(TeacherBank(adapters(), {"a": files["oil"], "b": files["oil"]}, 1).slots_for(["a", "b"]))) == 1


def test_prefetch_leaves_nothing_to_read(files: dict[str, Path], reads: list[str]) -> None:
    mine = adapters()
    bank = TeacherBank(mine, files, 2)
    bank.prefetch(["clay", None, "manga", "neon"])  # two slots; the third is read
    settle(bank)
    assert reads == ["clay", "manga", "neon"]
    clay, manga = bank.slots_for(["clay", "manga"])
    bank.prefetch(["manga", "neon"])  # takes the slot of clay, from memory
    settle(bank)
    assert_holds(mine, clay, "neon")
    assert bank.slots_for(["neon", "manga"]) == (clay, manga)
    assert reads == ["clay", "manga", "neon"]


def test_prefetch_reads_no_more_than_the_cache_keeps(files: dict[str, Path], reads: list[str]) -> None:
    """One slot, and room for oil (336 bytes) or for clay with manga (124): what comes first is read."""
    bank = TeacherBank(adapters(), files, 1, cache_bytes=350)
    bank.prefetch(["clay", "oil", "manga", "neon"])
    settle(bank)
    assert reads == ["clay", "oil"]
    bank.slots_for(["oil"])
    bank.slots_for(["clay"])
    assert reads == ["clay", "oil", "clay"]


def test_cache_bytes_bound_the_memory_of_many_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten teachers and a cache of two, asked in an order that wants each anew: never three in memory, and every slot
    right; without a bound all stay."""
    modules = teacher(3)
    files = {f"e{i}": tmp_path / f"{i}.safetensors" for i in range(10)}
    for index, path in enumerate(files.values()):
        write_lora(path, {n: LoraModule(m.A + index, m.B, m.alpha) for n, m in modules.items()}, dtype=torch.float32)
    alive: set[int] = set()
    most = reads = 0

    def kept(A: torch.Tensor, B: torch.Tensor, alpha: float) -> LoraModule:
        nonlocal most
        one = LoraModule(A, B, alpha)
        alive.add(id(one))
        weakref.finalize(one, alive.discard, id(one))
        most = max(most, len(alive))
        return one

    def read(path: Path, names: Any) -> dict[str, LoraModule]:
        nonlocal reads
        reads += 1
        return map_lora(path, names)

    monkeypatch.setattr("clora.lora.bank.LoraModule", kept)
    monkeypatch.setattr("clora.lora.bank.map_lora", read)
    size = sum(m.A.nbytes + m.B.nbytes for m in modules.values())
    for cache_bytes, most_teachers, expected_reads in ((2 * size, 2, 30), (0, 1, 30), (float("inf"), 10, 10)):
        most = reads = 0
        mine = adapters()
        bank = TeacherBank(mine, files, 1, cache_bytes=cache_bytes)
        for _ in range(3):
            for index in range(10):
                bank.prefetch([f"e{index}", f"e{(index + 1) % 10}"])
                (slot,) = bank.slots_for([f"e{index}"])
                assert slot is not None
                wanted = modules["first"].B @ (modules["first"].A + index) * modules["first"].scale
                torch.testing.assert_close(mine.delta(slot, "first").float(), wanted, rtol=1e-5, atol=1e-5)
        bank.close()
        assert most == most_teachers * len(modules)
        assert reads in (expected_reads, expected_reads + 1)  # the last prefetch may be cut off by the end
        del bank


def test_prefetch_errors_are_raised_where_the_teacher_is_needed(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, names: Any) -> dict[str, LoraModule]:
        if path.stem == "neon":
            raise MemoryError("no more")
        if path.stem == "oil":
            raise InputError(f"{path}: changed while it was read; try again")
        return map_lora(path, names)

    monkeypatch.setattr("clora.lora.bank.map_lora", read)
    mine = adapters()
    bank = TeacherBank(mine, files, 2)
    bank.prefetch(["clay", "neon", "oil"])
    settle(bank)
    (slot,) = bank.slots_for(["clay"])
    assert_holds(mine, slot, "clay")
    with pytest.raises(RuntimeError, match="effect neon: its teacher could not be loaded .no more"):
        bank.slots_for(["neon"])
    with pytest.raises(InputErrors, match="effect oil: .* changed while it was read"):
        bank.slots_for(["clay", "oil"])
    first, second = bank.slots_for(["manga", "clay"])
    assert_holds(mine, first, "manga")
    assert_holds(mine, second, "clay")


def bank_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("teachers")]


@pytest.mark.parametrize("end", [TeacherBank.close, lambda bank: None], ids=["closed", "collected"])
def test_the_thread_ends_with_the_bank(files: dict[str, Path], end: Callable[[TeacherBank], None]) -> None:
    before = bank_threads()
    bank = TeacherBank(adapters(), files, 2)
    bank.slots_for(["clay"])
    bank.prefetch(["manga", "neon", "oil"])
    (thread,) = set(bank_threads()) - set(before)
    end(bank)
    del bank
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.gpu
def test_prefetch_overwrites_a_slot_only_after_its_last_use_on_the_gpu(files: dict[str, Path]) -> None:
    """A kernel that still waits to read the old teacher gets it, and the forward after `slots_for` the new one."""
    mine = adapters()
    for linear in mine.linears.values():
        linear.to("cuda")
    bank = TeacherBank(mine, files, 2, dtype=torch.bfloat16)
    rows = torch.eye(5, device="cuda")
    linear = mine.linears["first"]
    before = {name: teacher(NAMES.index(name))["first"].delta().T for name in ("clay", "neon", "oil")}

    def update(slot: str | None) -> torch.Tensor:
        with torch.no_grad():
            plain = linear(rows)
            with mine.use([slot]):
                return linear(rows) - plain

    for slot in bank.slots_for(["clay", "neon"]):
        update(slot)  # makes the plan, which waits for the GPU
    for old, new in (("clay", "oil"), ("oil", "clay")) * 5:
        old_slot, kept = bank.slots_for([old, "neon"])
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        of_old = update(old_slot)
        bank.prefetch(["neon", new])
        assert not torch.cuda.current_stream().query()  # nothing above has waited for the GPU
        new_slot, again = bank.slots_for([new, "neon"])
        of_new, of_kept = update(new_slot), update(again)
        assert new_slot == old_slot and again == kept
        for found, name in ((of_old, old), (of_new, new), (of_kept, "neon")):
            assert (found.double().cpu() - before[name]).norm() < 0.02 * before[name].norm()
    bank.close()


def test_slots_for_unknown_effect_names_the_nearest(files: dict[str, Path]) -> None:
    bank = TeacherBank(adapters(), files, 2)
    with pytest.raises(InputError, match="effect 'mangga' has no teacher; did you mean 'manga'"):
        bank.slots_for([None, "mangga"])


def test_teacher_bank_holds_half_precision(files: dict[str, Path]) -> None:
    mine = adapters()
    bank = TeacherBank(mine, files, 2, dtype=torch.bfloat16)
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
