"""The bank of teachers: many effect LoRAs in files, some of them in CPU memory, a few in slots on the device.

A thread of the bank's own reads files and fills slots. `prefetch` gives it work ahead; `slots_for` waits for what it
needs. On a GPU the thread copies through pinned memory on a stream of its own, which waits for what was launched on the
slot before, and the forwards that follow `slots_for` wait for the copies.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from clora.errors import InputError, InputErrors, did_you_mean, raise_faults
from clora.lora.adapters import Adapters
from clora.lora.files import map_lora
from clora.lora.module import LoraModule
from clora.lora.summary import check_lora

Modules = Mapping[str, LoraModule]


class TeacherBank:
    """Puts the teachers that a batch asks for into the slots of one stack.

    A file is read when its effect is first asked for, and again when it was dropped from CPU memory since; effects of
    one file share it, and one slot. All files are checked when the bank is made, by their headers: `InputErrors` lists
    every fault of every file (values that are not finite show when a file is read). Close it, or let it be collected,
    to end its thread.
    """

    def __init__(
        self,
        adapters: Adapters,
        files: Mapping[str, Path],
        capacity: int,
        stack: str = "teachers",
        dtype: torch.dtype = torch.float32,
        cache_bytes: float = math.inf,
    ) -> None:
        """Adds the stack `stack` of at most `capacity` slots, of the largest rank among the files.

        `dtype` is the type the slots are held in; the base's own is enough for teachers, which are never trained.
        `cache_bytes` bounds the CPU memory of teachers read from files (in `dtype`), the least recently used making
        room; one that is larger is kept only while its slot is filled. On a GPU one more is in pinned memory.
        """
        if capacity < 1 or not files:
            raise ValueError("a bank needs at least one teacher and one slot")
        self._adapters = adapters
        self._files = dict(files)
        # Effect -> the first effect of the same file, which stands for all of them below.
        first: dict[Path, str] = {}
        self._first = {effect: first.setdefault(path, effect) for effect, path in self._files.items()}
        self._dtype, self._cache_bytes = dtype, cache_bytes
        self._num_bytes: dict[str, int] = {}
        rank = self._check_all()
        self._slots = tuple(f"{stack}/{index}" for index in range(min(capacity, len(first))))
        adapters.add_stack(stack, self._slots, rank, rank, trainable=False, init="zeros", dtype=dtype)
        device = adapters.parameters(stack)[0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Effect -> slot, the least recently used first; and what fills it, until someone has waited for that.
        self._held: OrderedDict[str, str] = OrderedDict()
        self._filling: dict[str, Future[torch.cuda.Event | None]] = {}
        # One thread, so that what fills a slot comes after what filled it before. The cache is its alone.
        self._thread = ThreadPoolExecutor(1, "teachers")
        self._cache: OrderedDict[str, Modules] = OrderedDict()

    @property
    def effects(self) -> tuple[str, ...]:
        return tuple(self._files)

    @property
    def capacity(self) -> int:
        return len(self._slots)

    def slots_for(self, effects: Sequence[str | None]) -> tuple[str | None, ...]:
        """The slot that holds each sample's teacher, None (the base) for None; loads what is missing.

        The least recently used teachers make room, never one that this call needs. Raises `InputError` for an
        unknown effect, for more different teachers than slots, and for a file that turns out to be bad.
        """
        needed = self._distinct(effects)
        if len(needed) > self.capacity:
            raise InputError(
                f"a batch has {len(needed)} different teachers, there are {self.capacity} teacher slots;"
                " raise train.teacher_slots or lower the batch size"
            )
        for effect in needed:
            if effect in self._held:
                self._held.move_to_end(effect)
        for effect in needed:
            self._fill(effect, needed)
        for effect in needed:
            self._wait_for(effect)
        return tuple(None if effect is None else self._held[self._first[effect]] for effect in effects)

    def prefetch(self, effects: Sequence[str | None]) -> None:
        """Fetch the teachers of the batches to come, in their order, while other work goes on.

        The first ones get slots, as many as there are: a slot that holds none of them is taken, and must not be needed
        any more. The others are read, as far as the cache has room for all of them. What goes wrong is raised by the
        `slots_for` that needs it.
        """
        wanted = self._distinct(effects)
        first, later = wanted[: self.capacity], wanted[self.capacity :]
        for effect in first:
            self._fill(effect, first)
        room = self._cache_bytes
        for effect in later:
            room -= self._num_bytes[effect]
            if effect not in self._held and room >= 0:
                self._thread.submit(self._read, effect)

    def close(self) -> None:
        """End the thread, once the file that it is at is read."""
        self._thread.shutdown(cancel_futures=True)

    def _distinct(self, effects: Sequence[str | None]) -> list[str]:
        asked = [effect for effect in dict.fromkeys(effects) if effect is not None]
        for effect in asked:
            if effect not in self._files:
                raise InputError(f"effect {effect!r} has no teacher; {did_you_mean(effect, self._files)}")
        return list(dict.fromkeys(self._first[effect] for effect in asked))

    def _fill(self, effect: str, keep: Collection[str]) -> None:
        """Give an effect a slot if it has none, one that holds nothing or the least recently used not in `keep`."""
        if effect in self._held:
            return
        slot = next((slot for slot in self._slots if slot not in self._held.values()), None)
        if slot is None:
            leaving = next(held for held in self._held if held not in keep)
            slot = self._held.pop(leaving)
            self._filling.pop(leaving, None)
        launched = None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()
        self._held[effect] = slot
        self._filling[effect] = self._thread.submit(self._load, effect, slot, launched)

    def _wait_for(self, effect: str) -> None:
        filling = self._filling.pop(effect, None)
        if filling is None:
            return
        try:
            filled = filling.result()
        except BaseException:
            del self._held[effect]
            raise
        if filled is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(filled)

    # In the thread

    def _load(self, effect: str, slot: str, launched: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Fill a slot with a teacher, after what was `launched` on it; returns when on the GPU's own time."""
        try:
            modules = self._read(effect)
            if self._stream is None or launched is None:
                self._adapters.load_slot(slot, modules)
                return None
            with torch.cuda.stream(self._stream):
                # Pinned memory is torch's to reuse once the copies are done.
                pinned = {n: LoraModule(m.A.pin_memory(), m.B.pin_memory(), m.alpha) for n, m in modules.items()}
                self._stream.wait_event(launched)
                self._adapters.load_slot(slot, pinned)
                filled: torch.cuda.Event = self._stream.record_event()
                return filled
        except InputError:
            raise
        except Exception as error:
            raise RuntimeError(f"effect {effect}: its teacher could not be loaded ({error})") from error

    def _read(self, effect: str) -> Modules:
        """A teacher in CPU memory, read now if it is not there."""
        if effect in self._cache:
            self._cache.move_to_end(effect)
            return self._cache[effect]
        size, kept = self._num_bytes[effect], sum(self._num_bytes[name] for name in self._cache)
        while self._cache and kept + size > self._cache_bytes:
            kept -= self._num_bytes[self._cache.popitem(last=False)[0]]
        try:
            mapped = map_lora(self._files[effect], self._adapters.module_shapes)
        except InputError as error:
            raise InputErrors(_named(effect, error)) from error
        modules = {
            name: LoraModule(m.A.to(self._dtype, copy=True), m.B.to(self._dtype, copy=True), m.alpha)
            for name, m in mapped.items()
        }
        if size <= self._cache_bytes:
            self._cache[effect] = modules
        return modules

    def _check_all(self) -> int:
        """The largest rank of all files; raises with the faults of all."""
        faults: list[str] = []
        rank, shapes = 1, self._adapters.module_shapes
        for effect in dict.fromkeys(self._first.values()):
            try:
                ranks = check_lora(self._files[effect], shapes).ranks
            except InputError as error:
                faults += _named(effect, error)
                continue
            rank = max(rank, *ranks.values())
            in_floats = sum(rank_ * sum(shapes[name]) for name, rank_ in ranks.items())
            self._num_bytes[effect] = in_floats * self._dtype.itemsize
        raise_faults(faults)
        return rank


def _named(effect: str, error: InputError) -> list[str]:
    """The faults of an effect's file, with its name."""
    return [f"effect {effect}: {fault}" for fault in error.faults]
