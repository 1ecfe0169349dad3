"""The tensor cache: keys feel every part, entries are exact, damage is noticed."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clora.data.cache import TensorCache, cache_key, tensors_digest
from clora.errors import InputError

KEY = "ab" + "0" * 62


def sample() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(7, 64, generator=generator).to(torch.bfloat16),
        "text": torch.randn(3, 5, generator=generator),
        "ids": torch.arange(4),
        "flag": torch.tensor(True),
        "none": torch.zeros(0, 3),
    }


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype and a[key].shape == b[key].shape for key in a
    )


def refuse() -> dict[str, Tensor]:
    raise AssertionError("made again although the entry is sound")


def test_cache_key_feels_every_part_and_no_two_run_together(tmp_path: Path) -> None:
    parts = [
        ([b"x"], "p", "base", "1"),
        ([b"y"], "p", "base", "1"),
        ([b"x", b"x"], "p", "base", "1"),
        ([], "p", "base", "1"),
        ([b"x"], "q", "base", "1"),
        ([b"x"], None, "base", "1"),
        ([b"x"], "", "base", "1"),
        ([b"x"], "p", "base1", ""),
        ([b"x"], "p", "bas", "e1"),
        ([b"x"], "p", "base", "2"),
        ([b"xp"], "", "base", "1"),
        ([b"x", b"y"], "p", "base", "1"),
        ([b"y", b"x"], "p", "base", "1"),
    ]
    keys = [cache_key(*part) for part in parts]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys) and keys[0] == cache_key([b"x"], "p", "base", "1")


def test_cache_key_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"content")
    assert cache_key([path], "p", "b", "1") == cache_key([b"content"], "p", "b", "1")
    with pytest.raises(InputError, match=r"gone\.png cannot be read"):
        cache_key([tmp_path / "gone.png"], "p", "b", "1")


def test_get_or_make_makes_once_and_gives_back_exactly(tmp_path: Path) -> None:
    calls = itertools.count()

    def make() -> dict[str, Tensor]:
        next(calls)
        return sample()

    assert same(TensorCache(tmp_path).get_or_make(KEY, make), sample())
    cache = TensorCache(tmp_path)
    assert same(cache.get_or_make(KEY, make), sample()) and same(cache.get_or_make(KEY, make), sample())
    assert next(calls) == 1


def test_what_is_read_is_mapped_and_private(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    tensors = cache.get_or_make(KEY, sample)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert KEY in maps.read_text()
    before = cache.path(KEY).read_bytes()
    tensors["latents"].zero_()
    assert cache.path(KEY).read_bytes() == before
    assert same(TensorCache(tmp_path).get_or_make(KEY, refuse), sample())


def test_tensors_that_are_views_or_need_gradients_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    parts = {"a": whole.T, "b": whole[:, 1], "c": torch.ones(2, requires_grad=True)}
    found = TensorCache(tmp_path).get_or_make(KEY, lambda: parts)
    assert all(torch.equal(found[key], parts[key]) for key in parts)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text", "header", "foreign"])
def test_a_damaged_entry_is_reported_and_made_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    TensorCache(tmp_path).write(KEY, sample())
    path = TensorCache(tmp_path).path(KEY)
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[-5] ^= 1
    elif damage == "header":
        raw[20] ^= 0x20
    elif damage == "foreign":
        import safetensors.torch

        raw = bytearray(safetensors.torch.save(sample()))
    else:
        raw = bytearray({"cut": raw[:-9], "empty": b"", "text": b"not a tensor file"}[damage])
    path.unlink()
    path.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        assert same(TensorCache(tmp_path).get_or_make(KEY, sample), sample())
    assert "is damaged" in caplog.text and KEY in caplog.text
    assert same(TensorCache(tmp_path).get_or_make(KEY, refuse), sample())


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TensorCache(tmp_path)

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        cache.write(KEY, sample())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_failing_maker_leaves_no_entry(tmp_path: Path) -> None:
    def fail() -> dict[str, Tensor]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        TensorCache(tmp_path).get_or_make(KEY, fail)
    assert TensorCache(tmp_path).read(KEY) is None


def test_tensors_digest_feels_names_dtypes_shapes_and_values() -> None:
    variants: list[dict[str, Tensor]] = [
        {"a": torch.zeros(4), "b": torch.ones(2)},
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.zeros(4), "b": torch.tensor([1.0, 1.0000001])},
        {"a": -torch.zeros(4), "b": torch.ones(2)},
        {"a": torch.zeros(4)},
    ]
    assert len({tensors_digest(variant) for variant in variants}) == len(variants)
    assert tensors_digest(dict(reversed(variants[0].items()))) == tensors_digest(variants[0])
