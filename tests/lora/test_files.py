"""LoRA files: every layout reads to the same update, and nothing in a file goes unnoticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from clora.errors import InputError, InputErrors
from clora.io.safetensors import map_tensors, read_header, read_tensors, write_tensors
from clora.lora.convert import convert_lora
from clora.lora.files import map_lora, read_lora, write_lora
from clora.lora.keys import flat_name, name_resolver
from clora.lora.layers import BLOCK_LINEARS, TOP_LINEARS
from clora.lora.module import LoraModule, join_modules
from tests.support.lora_files import LAYOUTS, MLP, TO_Q, faults_of, module, pair, save
from tests.support.random_base import random_transformer


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_alpha", [False, True])
def test_read_lora_every_layout_same_update(tmp_path: Path, layout: str, with_alpha: bool) -> None:
    stem, names = LAYOUTS[layout]
    tensors = pair(stem, 7, names)
    if with_alpha:
        tensors[f"{stem}.alpha"] = torch.tensor(0.5)
    file = read_lora(save(tmp_path / "a.safetensors", tensors))
    assert file.layout == layout and list(file.modules) == [TO_Q]
    expected = module(7)
    scale = 0.5 / 2 if with_alpha else 1.0
    assert torch.equal(file.modules[TO_Q].A, expected.A)
    torch.testing.assert_close(
        file.modules[TO_Q].delta(),
        scale * expected.B.double() @ expected.A.double(),
        rtol=0,
        atol=1e-12,
    )
    assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()


def test_read_lora_peft_inside_another_prefix(tmp_path: Path) -> None:
    tensors = pair(f"base_model.model.transformer.{TO_Q}", names=("lora_A.default", "lora_B.default"))
    assert list(read_lora(save(tmp_path / "a.safetensors", tensors)).modules) == [TO_Q]


def test_name_resolver_every_known_name() -> None:
    names = [f"transformer_blocks.{block}.{linear}" for block in (0, 59) for linear in BLOCK_LINEARS]
    names += TOP_LINEARS
    model = random_transformer()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for known, expected in ((None, names), (linears, linears)):
        resolve = name_resolver(known)
        for stem in ("lora_unet_{flat}", "lycoris_{flat}", "lora_transformer_{flat}", "transformer.{name}", "{name}"):
            assert [resolve(stem.format(name=name, flat=flat_name(name))) for name in expected] == expected
    # Without a model the table knows every linear layer of the real class.
    assert [name_resolver(None)(f"lora_unet_{flat_name(name)}") for name in linears] == linears
    assert name_resolver(None)("lora_unet_transformer_blocks_0_attn_to_z") is None
    assert name_resolver(["a.b_c", "a_b.c"])("lora_unet_a_b_c") is None  # ambiguous


modules_strategy = st.dictionaries(
    st.tuples(st.integers(0, 3), st.sampled_from(BLOCK_LINEARS)).map(lambda p: f"transformer_blocks.{p[0]}.{p[1]}"),
    st.builds(
        module,
        st.integers(0, 10**6),
        st.integers(1, 9),
        st.sampled_from([0.25, 1.0, 3.0, 16.0]),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ),
    min_size=1,
    max_size=6,
)


@given(modules=modules_strategy, layout=st.sampled_from(["comfyui", "diffusers", "kohya"]))
def test_write_lora_round_trip(tmp_path_factory: pytest.TempPathFactory, modules: Any, layout: Any) -> None:
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    sha256 = write_lora(path, modules, {"note": "é"}, layout, dtype=None)
    file = read_lora(path)
    assert (file.layout, file.sha256, file.metadata["note"]) == (layout, sha256, "é")
    assert file.modules.keys() == modules.keys()
    for name, given_module in modules.items():
        found = file.modules[name]
        assert torch.equal(found.A, given_module.A)
        if layout == "kohya":
            assert torch.equal(found.B, given_module.B) and found.alpha == given_module.alpha
        else:
            folded = (given_module.B.double() * given_module.alpha / given_module.rank).to(given_module.B.dtype)
            assert torch.equal(found.B, folded) and found.alpha == found.rank


def test_write_lora_equal_contents_equal_bytes(tmp_path: Path) -> None:
    modules = {TO_Q: module(0), MLP: module(1)}
    metadata = {str(i): "x" * i for i in range(20)}
    write_lora(tmp_path / "a.safetensors", modules, metadata, "kohya")
    backwards = dict(reversed(modules.items())), dict(reversed(metadata.items()))
    write_lora(tmp_path / "b.safetensors", *backwards, layout="kohya")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.safetensors",
        "b.safetensors",
    ]  # no temporary left


def test_write_lora_keeps_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(path, {TO_Q: module(0)})
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clora.io.atomic.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_lora(path, {TO_Q: module(1)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_write_lora_refuses_overflow(tmp_path: Path) -> None:
    large = LoraModule(torch.full((1, 6), 1e5), torch.ones(5, 1), 1.0)
    with pytest.raises(InputErrors, match=r"lora_A.weight is not finite as torch.float16"):
        write_lora(tmp_path / "a.safetensors", {TO_Q: large}, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_write_tensors_stock_reader_agrees(tmp_path: Path, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(shape, generator=rng) * 9).to(dtype) for name, shape in
               (("b", (3, 5)), ("a", ()), ("c", (0, 2)), ("d", (7,)))}  # fmt: skip
    tensors["u"] = torch.arange(3, dtype=torch.uint8)
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors, {"k": "v"})
    ours, _ = read_tensors(path, read_header(path))
    for found in (load_file(path), ours, map_tensors(path, read_header(path))):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)


def test_read_and_map_tensors_unaligned(tmp_path: Path) -> None:
    header = {
        "u": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "f": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes())
    for found in (read_tensors(path, read_header(path))[0], map_tensors(path, read_header(path))):
        assert found["f"].tolist() == [1.5, -2.0] and found["u"].tolist() == [7]


def test_map_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    """Nothing is in memory of its own, what is written stays there, and a file changed meanwhile is refused."""
    path = save(tmp_path / "a.safetensors", pair(TO_Q))
    header, content = read_header(path), path.read_bytes()
    mapped = map_tensors(path, header)
    assert f"{path}\n" in Path("/proc/self/maps").read_text()
    for tensor in mapped.values():
        tensor.zero_()
    assert path.read_bytes() == content
    del mapped, tensor
    assert f"{path}\n" not in Path("/proc/self/maps").read_text()
    for changed in (pair(TO_Q, rank=3), pair(MLP)):
        save(path, changed)
        with pytest.raises(InputError, match="changed while it was read"):
            map_tensors(path, header)
    path.write_bytes(content[:-5])
    with pytest.raises(InputError, match="changed while it was read"):
        map_tensors(path, header)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_map_lora_equals_read_lora(tmp_path: Path, layout: str) -> None:
    stem, names = LAYOUTS[layout]
    path = save(tmp_path / "a.safetensors", pair(stem, 7, names) | {f"{stem}.alpha": torch.tensor(0.5)})
    mapped, read = map_lora(path), read_lora(path).modules
    assert mapped.keys() == read.keys() == {TO_Q}
    assert torch.equal(mapped[TO_Q].A, read[TO_Q].A) and torch.equal(mapped[TO_Q].B, read[TO_Q].B)
    assert mapped[TO_Q].alpha == read[TO_Q].alpha == 0.5
    save(path, pair(stem, 7, names) | {f"{stem}.alpha": torch.tensor(torch.inf)})
    with pytest.raises(InputErrors, match="not finite"):
        map_lora(path)


# Other tools


def peft_delta(transformer: nn.Module, name: str) -> Tensor:
    layer = transformer.get_submodule(name)
    return sum(layer.get_delta_weight(adapter).double() for adapter in layer.active_adapters)


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "kohya"])
def test_write_lora_stock_diffusers_loads_it(tmp_path: Path, layout: Any) -> None:
    transformer = random_transformer()
    linears = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    rng = torch.Generator().manual_seed(0)
    modules = {}
    for i, name in enumerate(n for n in linears if n.startswith("transformer_blocks.") or n == "proj_out"):
        rank, linear = 1 + i % 4, linears[name]
        A = torch.randn(rank, linear.in_features, generator=rng)
        modules[name] = LoraModule(A, torch.randn(linear.out_features, rank, generator=rng), 0.5 + i % 3)
    path = tmp_path / "a.safetensors"
    write_lora(path, modules, layout=layout, dtype=torch.float32)
    pipeline = QwenImageEditPlusPipeline(None, None, None, None, None, transformer)
    pipeline.load_lora_weights(str(path))
    for name, given_module in modules.items():
        delta = given_module.delta()
        error = (peft_delta(transformer, name) - delta).abs().max() / delta.abs().max()
        assert error < 1e-6, name


def test_read_lora_files_of_diffusers_with_alpha_in_the_header(tmp_path: Path) -> None:
    transformer = random_transformer()
    pattern = {"transformer_blocks.1.attn.to_k": 5}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k"], rank_pattern=pattern, alpha_pattern=pattern)
    transformer.add_adapter(config, "default")
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    QwenImageEditPlusPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(transformer, adapter_name="default"),
        transformer_lora_adapter_metadata=json.loads(json.dumps(config.to_dict(), default=list)),
    )
    file = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert file.layout == "diffusers" and len(file.modules) == 4
    assert {name: (m.rank, m.alpha) for name, m in file.modules.items()}["transformer_blocks.1.attn.to_k"] == (5, 5)
    for name, found in file.modules.items():
        torch.testing.assert_close(found.delta(), peft_delta(transformer, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_read_lora_folder_of_peft(tmp_path: Path, rslora: bool) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "img_mod.1"], use_rslora=rslora)
    model = get_peft_model(random_transformer(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    file = read_lora(tmp_path / "adapter_model.safetensors")
    assert file.layout == "peft" and len(file.modules) == 4
    for name, found in file.modules.items():
        torch.testing.assert_close(found.delta(), peft_delta(model.base_model.model, name), rtol=1e-5, atol=1e-5)


def test_read_lora_kohya_alpha_in_the_header(tmp_path: Path) -> None:
    stem, names = LAYOUTS["kohya"]
    path = save(tmp_path / "a.safetensors", pair(stem, names=names), {"ss_network_alpha": "0.5"})
    assert read_lora(path).modules[TO_Q].alpha == 0.5
    # A file written anew has its alpha in the tensors; the header's must not apply to it again.
    convert_lora(path, tmp_path / "b.safetensors", "comfyui")
    converted = read_lora(tmp_path / "b.safetensors")
    assert converted.modules[TO_Q].alpha == 2 and "ss_network_alpha" not in converted.metadata
    torch.testing.assert_close(converted.modules[TO_Q].delta(), read_lora(path).modules[TO_Q].delta(), rtol=0, atol=0)


# Faults


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_read_lora_finds_a_single_value_that_is_not_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in pair(TO_Q, rank=40).items()}
    read_lora(save(tmp_path / "a.safetensors", tensors))
    tensors[f"{TO_Q}.lora_B.weight"][3, 33] = value
    (fault,) = faults_of(save(tmp_path / "a.safetensors", tensors))
    assert "lora_B.weight holds values that are not finite" in fault


@pytest.mark.parametrize(
    ("alpha", "metadata", "message"),
    [
        (torch.tensor(0.0), {}, "alpha is 0; alpha must be positive"),
        (torch.tensor(float("inf")), {}, "not finite"),
        (torch.ones(2), {}, r"shape \[2\] where one number"),
        (None, {"ss_network_alpha": "lots"}, "ss_network_alpha is 'lots'"),
        (None, {"lora_adapter_metadata": "{"}, "adapter config is not readable"),
        (None, {"lora_adapter_metadata": '{"transformer.lora_alpha": -1}'}, "lora_alpha is -1"),
        (None, {"lora_adapter_metadata": '{"transformer.r": 9}'}, "says rank 9, the tensors 2"),
        (None, {"lora_adapter_metadata": '{"transformer.use_dora": true}'}, "use_dora"),
        (None, {"lora_adapter_metadata": '{"transformer.alpha_pattern": {"(a+)+$": 2}}'}, "no module name"),
    ],
)
def test_read_lora_alpha_faults(tmp_path: Path, alpha: Tensor | None, metadata: dict[str, str], message: str) -> None:
    tensors = pair(f"transformer.{TO_Q}")
    if alpha is not None:
        tensors[f"transformer.{TO_Q}.alpha"] = alpha
    with pytest.raises(InputErrors, match=message):
        read_lora(save(tmp_path / "a.safetensors", tensors, metadata))


def test_read_lora_refuses_pickles_by_content_and_name(tmp_path: Path) -> None:
    torch.save(pair(TO_Q), tmp_path / "zip.safetensors")
    torch.save(pair(TO_Q), tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    save(tmp_path / "named.pt", pair(TO_Q))
    for name in ("zip.safetensors", "old.safetensors", "named.pt"):
        with pytest.raises(InputError, match="run code when opened"):
            read_lora(tmp_path / name)


def test_read_lora_refuses_damaged_files(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.safetensors", pair(TO_Q)).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def with_header(change: Any) -> bytes:
        changed = json.loads(json.dumps(header))
        change(changed)
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    key = f"{TO_Q}.lora_A.weight"
    cases = {
        "empty or cut off": b"",
        "cut off inside its header": whole[:40],
        "cut off \\(": whole[:-1],
        "longer than its header": whole + b"\0",
        "not a safetensors file": b"hello, world" * 10,
        "is a GGUF file": b"GGUF" + bytes(20),
        "damaged safetensors header": whole[:8] + b"{" + b"!" * (length - 1) + whole[8 + length :],
        "unknown dtype 'F31'": with_header(lambda h: h[key].update(dtype="F31")),
        "needs 2400": with_header(lambda h: h[key].update(shape=[100, 6])),
        "not a list of counts": with_header(lambda h: h[key].update(shape=[-2, -6])),
        "lacks dtype": with_header(lambda h: h[key].pop("shape")),
        "hole or overlap": with_header(lambda h: h.update(extra=dict(h[key]))),
        "not a table of strings": with_header(lambda h: h.update(__metadata__={"a": 1})),
        "written twice": whole[:8] + whole[8 : 8 + length].replace(b"lora_B", b"lora_A") + whole[8 + length :],
    }
    path = tmp_path / "a.safetensors"
    for message, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(InputError, match=message) as caught:
            read_lora(path)
        assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        read_lora(tmp_path / "none.safetensors")
    with pytest.raises(InputErrors, match="no tensors at all"):
        read_lora(save(tmp_path / "b.safetensors", {}))


def test_read_header_tells_an_unknown_dtype_once(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entries = {str(i): {"dtype": "F4", "shape": [2], "data_offsets": [i, i + 1]} for i in range(50)}
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(50))
    with pytest.raises(InputErrors, match="tensor '0' has the unknown dtype 'F4', and 49 more like it") as caught:
        read_header(path)
    assert len(caught.value.faults) == 1


def test_read_header_huge_claim_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="cut off inside its header"):
        read_header(path)


@given(cut=st.integers(0, 300), byte=st.integers(0, 255))
def test_read_lora_any_damaged_byte_is_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, byte: int
) -> None:
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    data = bytearray(save(path, pair(TO_Q)).read_bytes())
    data[min(cut, len(data) - 1)] = byte
    path.write_bytes(data)
    try:
        read_lora(path)  # a changed value in the data is still a file
    except InputError:
        pass


def test_join_modules_adds_up_the_updates_exactly() -> None:
    generator = torch.Generator().manual_seed(0)

    def module(rank: int, alpha: float) -> LoraModule:
        A, B = torch.randn(rank, 9, generator=generator), torch.randn(7, rank, generator=generator)
        return LoraModule(A.double(), B.double(), alpha)

    first, second = {"a": module(2, 1.0), "b": module(3, 3.0)}, {"a": module(1, 5.0), "c": module(2, 7.0)}
    joined = join_modules(first, second)
    expected = {"a": first["a"].delta() + second["a"].delta(), "b": first["b"].delta(), "c": second["c"].delta()}
    assert {name: update.rank for name, update in joined.items()} == {"a": 3, "b": 3, "c": 2}
    for name, delta in expected.items():
        torch.testing.assert_close(joined[name].delta(), delta, rtol=1e-12, atol=1e-12)
