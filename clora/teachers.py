"""The bank of teachers: many effect LoRAs in CPU memory, a few slots on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import torch

from clora.errors import InputError, InputErrors, raise_faults
from clora.lora import Adapters
from clora.lora_files import LoraFile, check_lora, read_lora


class TeacherBank:
    """Puts the teachers that a batch asks for into the slots of one stack.

    A file is read when its effect is first asked for and kept in CPU memory from then on; effects of one file
    share it, and one slot. All files are checked when the bank is made, by their headers: `InputErrors` lists
    every fault of every file (values that are not finite show when a file is read).
    """

    def __init__(
        self,
        adapters: Adapters,
        files: Mapping[str, LoraFile | Path | str],
        capacity: int,
        stack: str = "teachers",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Adds the stack `stack` of at most `capacity` slots, of the largest rank among the files.

        `dtype` is the type the slots are held in; the base's own is enough for teachers, which are never
        trained.
        """
        if capacity < 1 or not files:
            raise ValueError("a bank needs at least one teacher and one slot")
        self._adapters = adapters
        self._files = {effect: Path(f) if isinstance(f, str) else f for effect, f in files.items()}
        # Effect -> the first effect of the same file, which stands for all of them below.
        first: dict[Path | str, str] = {}
        self._first = {e: first.setdefault(f if isinstance(f, Path) else e, e) for e, f in self._files.items()}
        rank = self._check_all()
        self._slots = tuple(f"{stack}/{index}" for index in range(min(capacity, len(first))))
        adapters.add_stack(stack, self._slots, rank, rank, trainable=False, init="zeros", dtype=dtype)
        # Effect -> slot, the least recently used first.
        self._held: OrderedDict[str, str] = OrderedDict()

    @property
    def effects(self) -> tuple[str, ...]:
        return tuple(self._files)

    @property
    def capacity(self) -> int:
        return len(self._slots)

    def slots_for(self, effects: Sequence[str | None]) -> tuple[str | None, ...]:
        """The slot that holds each sample's teacher, None (the base) for None; loads what is missing.

        The least recently used teachers make room, never one that this call needs. Raises `InputError` for an
        unknown effect and for more different teachers than slots.
        """
        asked = [effect for effect in dict.fromkeys(effects) if effect is not None]
        for effect in asked:
            if effect not in self._files:
                raise InputError(f"effect {effect!r} has no teacher; {self._hint(effect)}")
        needed = list(dict.fromkeys(self._first[effect] for effect in asked))
        if len(needed) > self.capacity:
            raise InputError(
                f"a batch has {len(needed)} different teachers, there are {self.capacity} teacher slots;"
                " raise train.teacher_slots or lower the batch size"
            )
        for effect in needed:
            if effect in self._held:
                self._held.move_to_end(effect)
        for effect in needed:
            if effect not in self._held:
                self._load(effect)
        return tuple(None if effect is None else self._held[self._first[effect]] for effect in effects)

    def _load(self, effect: str) -> None:
        modules = self.file(effect).modules
        if len(self._held) < self.capacity:
            slot = next(slot for slot in self._slots if slot not in self._held.values())
        else:
            # What this call needs was moved to the end, so the first is free to go.
            slot = self._held.popitem(last=False)[1]
        self._adapters.load_slot(slot, modules)
        self._held[effect] = slot

    def file(self, effect: str) -> LoraFile:
        """A teacher in CPU memory, read now if it was not before."""
        first = self._first[effect]
        found = self._files[first]
        if isinstance(found, Path):
            found = read_lora(found, self._adapters.module_shapes)
            self._files[first] = found
        return found

    def _check_all(self) -> int:
        """The largest rank of all files; raises with the faults of all."""
        faults: list[str] = []
        rank = 1
        for effect in dict.fromkeys(self._first.values()):
            file = self._files[effect]
            try:
                if isinstance(file, LoraFile):
                    raise_faults(self._adapters.fit_faults(file.modules))
                    rank = max(rank, *(module.rank for module in file.modules.values()))
                else:
                    rank = max(rank, check_lora(file, self._adapters.module_shapes).max_rank)
            except InputErrors as errors:
                faults += [f"effect {effect}: {fault}" for fault in errors.faults]
            except InputError as error:
                faults.append(f"effect {effect}: {error}")
        raise_faults(faults)
        return rank

    def _hint(self, effect: str) -> str:
        near = get_close_matches(effect, self._files, 1, 0.4)
        return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self._files)}"
