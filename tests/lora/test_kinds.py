"""LoHa, LoKr, whole updates and DoRA: what is read is the file's own definition in fp64, what is cut is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from clora.lora.adapters import inject_adapters
from clora.lora.bank import TeacherBank
from clora.lora.files import map_lora, read_lora
from clora.lora.kinds import dora_delta, exact_module, exact_rank, kind_of, nearest_module, nearest_to, weight_shape
from clora.lora.summary import MAX_EXACT_RANK, check_lora
from tests.support.lora_files import TO_Q, faults_of, save
from tests.support.random_base import random_transformer

# The shapes of a module's tensors, by what makes it special: N x K, and the rank of the exact LoRA.
CASES: dict[str, tuple[dict[str, tuple[int, ...]], int]] = {
    "loha": ({"hada_w1_a": (48, 3), "hada_w1_b": (3, 40), "hada_w2_a": (48, 2), "hada_w2_b": (2, 40)}, 6),
    "loha of full rank": ({"hada_w1_a": (9, 4), "hada_w1_b": (4, 8), "hada_w2_a": (9, 4), "hada_w2_b": (4, 8)}, 8),
    "lokr of two halves": (
        {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 5), "lokr_w2_a": (12, 3), "lokr_w2_b": (3, 8)},
        6,
    ),
    "lokr, w1 whole": ({"lokr_w1": (4, 5), "lokr_w2_a": (12, 3), "lokr_w2_b": (3, 8)}, 12),
    "lokr, w2 whole": ({"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 5), "lokr_w2": (12, 8)}, 8),
    "lokr, both whole": ({"lokr_w1": (2, 9), "lokr_w2": (24, 4)}, 8),
    "lokr of full rank": ({"lokr_w1": (4, 4), "lokr_w2": (12, 12)}, 48),
    "lokr of a long w1": ({"lokr_w1": (16, 4), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 12)}, 8),
    "diff": ({"diff": (20, 48)}, 20),
    "diff of many rows": ({"diff": (48, 20)}, 20),
}


def tensors_of(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(len(shapes))
    return {part: torch.randn(shape, generator=rng).to(dtype) for part, shape in shapes.items()}


def definition(values: dict[str, Tensor], alpha: float | None) -> Tensor:
    """The update as LyCORIS defines it, in fp64 and written here anew."""
    v = {part: tensor.double() for part, tensor in values.items()}
    if "diff" in v:
        return v["diff"]
    if "hada_w1_a" in v:
        dim: int | None = v["hada_w1_b"].shape[0]
        delta = (v["hada_w1_a"] @ v["hada_w1_b"]) * (v["hada_w2_a"] @ v["hada_w2_b"])
    else:
        dim = next((v[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in v), None)
        w1 = v["lokr_w1"] if "lokr_w1" in v else v["lokr_w1_a"] @ v["lokr_w1_b"]
        w2 = v["lokr_w2"] if "lokr_w2" in v else v["lokr_w2_a"] @ v["lokr_w2_b"]
        blocks = [torch.cat([w1[i, j] * w2 for j in range(w1.shape[1])], dim=1) for i in range(w1.shape[0])]
        delta = torch.cat(blocks)
    return delta if alpha is None or dim is None else delta * alpha / dim


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("case", CASES)
def test_read_lora_is_the_fp64_definition(tmp_path: Path, case: str, alpha: float | None, dtype: torch.dtype) -> None:
    """To the last bit where halves are multiplied once; rounded once to fp32 otherwise."""
    shapes, rank = CASES[case]
    values = tensors_of(shapes, dtype)
    tensors = {f"lycoris_{TO_Q.replace('.', '_')}.{part}": tensor for part, tensor in values.items()}
    if alpha is not None:
        tensors[f"lycoris_{TO_Q.replace('.', '_')}.alpha"] = torch.tensor(alpha)
    path = save(tmp_path / "a.safetensors", tensors)
    file = read_lora(path)
    found, wanted = file.modules[TO_Q], definition(values, alpha)
    assert found.rank == rank == check_lora(path).ranks[TO_Q]
    assert found.delta().shape == wanted.shape == check_lora(path).shapes[TO_Q]
    bound = {torch.float64: 1e-14, torch.float32: 2e-7}.get(dtype, 1e-7 if rank == min(wanted.shape) else 1e-14)
    assert relative(found.delta(), wanted) < bound
    assert torch.equal(map_lora(path)[TO_Q].delta(), found.delta())


def test_alpha_of_whole_lokr_plays_no_part(tmp_path: Path) -> None:
    """ai-toolkit writes a dim of 9999999999 there, which is infinite in fp16."""
    values = tensors_of(CASES["lokr, both whole"][0])
    tensors = {f"diffusion_model.{TO_Q}.{part}": tensor for part, tensor in values.items()}
    for alpha in (torch.tensor(9999999999), torch.tensor(float("inf"), dtype=torch.float16)):
        path = save(tmp_path / "a.safetensors", tensors | {f"diffusion_model.{TO_Q}.alpha": alpha})
        assert relative(read_lora(path).modules[TO_Q].delta(), definition(values, None)) < 2e-7


@pytest.mark.parametrize("config", ["LoHa", "LoKr", "LoKr, both whole", "LoKr of two halves"])
def test_read_lora_folder_of_peft_by_other_kinds(tmp_path: Path, config: str) -> None:
    """Alpha and rank lie in adapter_config.json; PEFT's own updates are the truth."""
    targets = ["to_q", "img_mod.1"]
    configs: dict[str, Any] = {
        "LoHa": LoHaConfig(r=3, alpha=6, target_modules=targets, alpha_pattern={"to_q": 5}),
        "LoKr": LoKrConfig(r=2, alpha=3, target_modules=targets, rank_pattern={"to_q": 1}),
        "LoKr, both whole": LoKrConfig(r=64, alpha=96, target_modules=targets),
        "LoKr of two halves": LoKrConfig(r=1, alpha=3, target_modules=targets, decompose_both=True),
    }
    model = get_peft_model(random_transformer(), configs[config])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lokr_" in name or "hada_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    file = read_lora(tmp_path / "adapter_model.safetensors")
    assert file.layout == "peft" and len(file.modules) == 4
    for name, found in file.modules.items():
        wanted = model.base_model.model.get_submodule(name).get_delta_weight("default").detach().double()
        assert relative(found.delta(), wanted) < 1e-5, name


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("hada_w1_a", "hada_w1_b", "hada_w2_a"), "has no hada_w2_b"),
        (("lokr_w1",), "has no lokr_w2"),
        (("lokr_w1", "lokr_w2_a"), "has no lokr_w2_b"),
        (("lokr_w1", "lokr_w2", "diff"), "is of several kinds at once"),
        (("dora_scale",), "is the only tensor of its module"),
    ],
)
def test_read_lora_names_missing_factors(tmp_path: Path, parts: tuple[str, ...], words: str) -> None:
    tensors = {f"transformer.{TO_Q}.{part}": torch.ones(4, 4) for part in parts}
    (fault,) = faults_of(save(tmp_path / "a.safetensors", tensors))
    assert words in fault and TO_Q in fault


def test_read_lora_refuses_misfit_factors(tmp_path: Path) -> None:
    shapes = CASES["loha"][0] | {"hada_w2_b": (2, 41)}
    tensors = {f"transformer.{TO_Q}.{part}": torch.ones(shape) for part, shape in shapes.items()}
    (fault,) = faults_of(save(tmp_path / "a.safetensors", tensors))
    assert "do not fit each other" in fault and "hada_w2_b [2, 41]" in fault


def test_read_lora_of_a_high_rank_is_sent_to_convert(tmp_path: Path) -> None:
    tensors = {}
    for block in range(3):
        stem = f"transformer.transformer_blocks.{block}.attn.to_q"
        tensors |= {f"{stem}.lokr_w1": torch.ones(8, 8), f"{stem}.lokr_w2": torch.ones(64, 64)}
    path = save(tmp_path / "a.safetensors", tensors)
    (fault,) = faults_of(path)
    assert f"is LoKr of rank 512, above the {MAX_EXACT_RANK} that are read, and 2 more like it" in fault
    assert f"clora convert {path} OUT.safetensors --to comfyui --rank 64" in fault


def test_teacher_bank_takes_other_kinds(tmp_path: Path) -> None:
    """A LoHa and a LoKr as teachers beside a plain LoRA: each slot holds the fp64 definition."""
    adapters = inject_adapters(nn.ModuleDict({"first": nn.Linear(40, 48, bias=False)}), ["first"])
    files, wanted = {}, {}
    for effect in ("loha", "lokr, w1 whole"):
        values = tensors_of(CASES[effect][0])
        files[effect] = tmp_path / f"{effect[:4]}.safetensors"
        save(files[effect], {f"transformer.first.{part}": tensor for part, tensor in values.items()})
        wanted[effect] = definition(values, None)
    bank = TeacherBank(adapters, files, 2)
    for effect, slot in zip(files, bank.slots_for(list(files)), strict=True):
        assert slot is not None and relative(adapters.delta(slot, "first"), wanted[effect]) < 1e-6
    bank.close()


# Nearest LoRAs


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("case", CASES)
def test_nearest_module_is_the_best_of_its_rank(case: str, rank: int) -> None:
    """Against the full SVD of the update in fp64 (Eckart and Young), in value and in what is told to be lost."""
    shapes, _ = CASES[case]
    values = tensors_of(shapes, torch.float64)
    kind = kind_of(values)
    assert kind is not None
    wanted = definition(values, None) * 0.5
    sigma = torch.linalg.svdvals(wanted)
    best = float(sigma[rank:].norm() / sigma.norm())
    found, lost = nearest_module(kind, values, 0.5, rank)
    assert found.rank <= rank or found.rank == exact_rank(kind, shapes)
    if exact_rank(kind, shapes) <= rank:
        assert lost == 0.0 and relative(found.delta(), wanted) < 1e-6
    else:
        assert lost == pytest.approx(best, abs=1e-9) and found.alpha == rank
        assert relative(found.delta(), wanted) == pytest.approx(best, abs=1e-6)


def test_nearest_module_of_a_lora_lowers_its_rank() -> None:
    rng = torch.Generator().manual_seed(0)
    values = {"A": torch.randn(9, 30, generator=rng), "B": torch.randn(20, 9, generator=rng)}
    wanted = values["B"].double() @ values["A"].double() * 2.0
    sigma = torch.linalg.svdvals(wanted)
    found, lost = nearest_module("LoRA", values, 2.0, 4)
    assert found.rank == 4 and lost == pytest.approx(float(sigma[4:].norm() / sigma.norm()), abs=1e-9)
    assert relative(found.delta(), wanted) == pytest.approx(lost, abs=1e-6)


def test_nearest_to_a_large_update_tells_what_is_really_lost() -> None:
    """Above 1,024 columns directions are drawn: the loss is measured, near the best, and equal at a second call."""
    rng = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(1100, 60, generator=rng, dtype=torch.float64))[0] for _ in range(2))
    sigma = torch.logspace(0, -2, 60, dtype=torch.float64)
    delta = U * sigma @ V.T
    state = torch.random.get_rng_state()
    found, lost = nearest_to(delta, 16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert lost == pytest.approx(relative(found.delta(), delta), rel=1e-9)
    assert lost < 1.001 * float(sigma[16:].norm() / sigma.norm())
    assert torch.equal(nearest_to(delta, 16)[0].A, found.A)


def test_nearest_module_of_nothing_loses_nothing() -> None:
    values = {"lokr_w1": torch.zeros(4, 4), "lokr_w2": torch.zeros(8, 8)}
    found, lost = nearest_module("LoKr", values, 1.0, 2)
    assert lost == 0.0 and found.rank == 2 and not found.delta().any()
    assert exact_module("LoKr", values, 1.0).rank == 32 and weight_shape("LoKr", {"lokr_w1": (4, 4), "lokr_w2": (8, 8)})


# DoRA


def test_dora_delta_is_that_of_peft() -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "img_mod.1"], use_dora=True)
    model = get_peft_model(random_transformer(), config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.1)
    for name in ("transformer_blocks.1.attn.to_q", "transformer_blocks.0.img_mod.1"):
        layer = model.base_model.model.get_submodule(name)
        weight = layer.base_layer.weight.detach().clone()
        norms = layer.lora_magnitude_vector["default"].weight.detach()
        delta = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * 1.5
        found = dora_delta(weight, delta, norms)
        layer.merge()
        assert relative(found, layer.base_layer.weight.double() - weight.double()) < 1e-4


@pytest.mark.parametrize(("shape", "dim"), [((6, 1), 1), ((6,), 1), ((1, 6), 0)])
def test_dora_delta_of_rows_and_columns(shape: tuple[int, ...], dim: int) -> None:
    """A square weight: the shape of the norms alone tells which they are."""
    rng = torch.Generator().manual_seed(0)
    W, D = (torch.randn(6, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    norms = torch.rand(shape, generator=rng, dtype=torch.float64) + 0.5
    found = W + dora_delta(W, D, norms)
    torch.testing.assert_close(found.norm(dim=dim), norms.flatten(), rtol=1e-12, atol=0)
    cosine = torch.nn.functional.cosine_similarity(found, W + D, dim=dim)
    torch.testing.assert_close(cosine, torch.ones(6, dtype=torch.float64), rtol=1e-12, atol=0)


def test_use_dora_without_norms_is_a_fault(tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
    tensors = {
        f"transformer.{TO_Q}.lora_A.weight": torch.ones(2, 6),
        f"transformer.{TO_Q}.lora_B.weight": torch.ones(6, 2),
    }
    (fault,) = faults_of(save(tmp_path / "a.safetensors", tensors, metadata))
    assert "asks for use_dora" in fault
    norms = {f"transformer.{TO_Q}.lora_magnitude_vector": torch.ones(6)}
    (fault,) = faults_of(save(tmp_path / "b.safetensors", tensors | norms, metadata))
    assert "lora_magnitude_vector is DoRA's" in fault and "--base BASE" in fault
