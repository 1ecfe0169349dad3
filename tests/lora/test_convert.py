"""`clora convert`: the update of every file stays what it was, and what a smaller rank loses is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clora.errors import InputError, InputErrors
from clora.lora.base_weights import find_base_weights
from clora.lora.convert import convert_lora
from clora.lora.files import read_lora, write_lora
from clora.lora.keys import flat_name
from clora.lora.kinds import dora_delta
from clora.lora.module import LoraModule
from tests.support.lora_files import LAYOUTS, TO_Q, module, pair, save

TO_K = "transformer_blocks.0.attn.to_k"


@pytest.mark.parametrize("to", ["comfyui", "diffusers", "kohya"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convert_lora_keeps_the_update(tmp_path: Path, layout: str, to: Any) -> None:
    stem, names = LAYOUTS[layout]
    tensors = pair(stem, 3, names) | {f"{stem}.alpha": torch.tensor(8.0)}
    src = save(tmp_path / "a.safetensors", {k: t.bfloat16() for k, t in tensors.items()}, {"author": "me"})
    convert_lora(src, tmp_path / "b.safetensors", to)
    before, after = read_lora(src), read_lora(tmp_path / "b.safetensors")
    assert after.layout == to and after.metadata["author"] == "me"
    assert after.modules[TO_Q].A.dtype == torch.bfloat16
    assert torch.equal(before.modules[TO_Q].delta(), after.modules[TO_Q].delta())


def deltas(path: Path) -> dict[str, Tensor]:
    """The updates of a file in ComfyUI's layout, by nothing of ours."""
    tensors = load_file(path)
    stems = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        stem.removeprefix("diffusion_model."): tensors[f"{stem}.lora_B.weight"].double()
        @ tensors[f"{stem}.lora_A.weight"].double()
        for stem in stems
    }


def lokr(name: str, factor: int = 4, size: int = 12, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """A LoKr of two whole matrices for a weight of factor x size, as ai-toolkit names it, and its update in fp64."""
    rng = torch.Generator().manual_seed(seed)
    w1, w2 = torch.randn(factor, factor, generator=rng), torch.randn(size, size, generator=rng)
    tensors = {f"diffusion_model.{name}.lokr_w1": w1, f"diffusion_model.{name}.lokr_w2": w2}
    return tensors, torch.kron(w1.double(), w2.double())


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_convert_lora_of_other_kinds_is_exact(tmp_path: Path) -> None:
    tensors, wanted = lokr(TO_Q)
    halves = {
        f"lycoris_{flat_name(TO_K)}.{part}": tensor.bfloat16()
        for part, tensor in zip(
            ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
            (torch.randn(48, 2), torch.randn(2, 48), torch.randn(48, 2), torch.randn(2, 48)),
            strict=True,
        )
    }
    src = save(tmp_path / "a.safetensors", tensors | halves)
    done = convert_lora(src, tmp_path / "b.safetensors", "comfyui")
    assert (done.layout, done.ranks, done.lost) == ("mixed", {TO_Q: 48, TO_K: 4}, {})
    found = deltas(tmp_path / "b.safetensors")
    assert relative(found[TO_Q], wanted) < 1e-7
    w1_a, w1_b, w2_a, w2_b = (tensor.double() for tensor in halves.values())
    assert relative(found[TO_K], (w1_a @ w1_b) * (w2_a @ w2_b)) < 1e-14


def test_convert_lora_to_a_rank_tells_what_is_lost(tmp_path: Path) -> None:
    """A LoKr too large to be read, beside a LoRA under the rank, which stays to the bit."""
    tensors, wanted = lokr(TO_Q, 16, 18)
    small = pair(f"diffusion_model.{TO_K}")
    small = {
        key: torch.nn.functional.pad(t, (0, 282, 0, 0) if "lora_A" in key else (0, 0, 0, 282))
        for key, t in small.items()
    }
    src, dst = save(tmp_path / "a.safetensors", tensors | small), tmp_path / "b.safetensors"
    with pytest.raises(InputErrors, match=r"is LoKr of rank 288, above the 256 that are read; .*--rank 64"):
        convert_lora(src, dst, "comfyui")
    assert not dst.exists()
    done = convert_lora(src, dst, "comfyui", rank=32)
    sigma = torch.linalg.svdvals(wanted)
    best = float(sigma[32:].norm() / sigma.norm())
    assert done.ranks == {TO_Q: 32, TO_K: 2} and done.max_rank == 32 and done.worst == TO_Q
    assert done.lost == {TO_Q: pytest.approx(best, abs=1e-7), TO_K: 0.0} and done.mean_lost == pytest.approx(best / 2)
    assert done.to_json()["lost"] == {"max": done.lost[TO_Q], "mean": done.mean_lost, "worst": TO_Q}
    assert f"lost {best:.2%} of an update at most ({TO_Q}), {best / 2:.2%} on average" == done.loss_sentence()
    assert relative(deltas(dst)[TO_Q], wanted) == pytest.approx(best, abs=1e-6)
    written = load_file(dst)
    assert all(torch.equal(written[key], tensor) for key, tensor in small.items())
    assert read_lora(dst).modules[TO_Q].rank == 32


def test_convert_lora_of_fp8_is_exact(tmp_path: Path) -> None:
    tensors = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in pair(f"transformer.{TO_Q}").items()}
    src, dst = save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    done = convert_lora(src, dst, "comfyui")
    A, B = (tensors[f"transformer.{TO_Q}.lora_{part}.weight"].double() for part in "AB")
    assert torch.equal(deltas(dst)[TO_Q], B @ A) and len(done.notes) == 1 and "float8_e4m3fn" in done.notes[0]
    assert load_file(dst)[f"diffusion_model.{TO_Q}.lora_A.weight"].dtype == torch.bfloat16


def base_folder(folder: Path, weights: dict[str, Tensor]) -> Path:
    """A transformer's weights in two shards, with what is no linear's weight beside them."""
    (folder / "transformer").mkdir(parents=True)
    for index, (name, weight) in enumerate(weights.items()):
        tensors = {f"{name}.weight": weight, f"{name}.bias": torch.zeros(len(weight)), f"norm{index}.weight": weight[0]}
        save(folder / "transformer" / f"part-{index}.safetensors", {key: t.clone() for key, t in tensors.items()})
    return folder


def test_convert_lora_of_dora_with_the_base(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(6, 6, generator=rng).bfloat16() for name in (TO_Q, TO_K)}
    base = find_base_weights(base_folder(tmp_path / "base", weights))
    assert base.shapes == {TO_Q: (6, 6), TO_K: (6, 6)}
    assert all(torch.equal(base.weight(name), weight) for name, weight in weights.items())
    norms = torch.rand(6, 1, generator=rng) + 1
    dora = pair(f"base_model.model.{TO_Q}", 1) | {f"base_model.model.{TO_Q}.dora_scale": norms}
    plain = pair(f"base_model.model.{TO_K}", 2)
    src, dst = save(tmp_path / "a.safetensors", dora | plain), tmp_path / "b.safetensors"
    for rank, given in ((None, None), (6, None), (None, base)):
        with pytest.raises(InputErrors, match=r"dora_scale is DoRA's, .* --rank 64 --base BASE") as caught:
            convert_lora(src, dst, "comfyui", rank, given)
        assert len(caught.value.faults) == 1 and not dst.exists()
    done = convert_lora(src, dst, "comfyui", 6, base)
    wanted = dora_delta(weights[TO_Q], module(1, alpha=2.0).delta(), norms)
    assert relative(deltas(dst)[TO_Q], wanted) < 1e-6 and done.lost[TO_Q] == 0.0
    assert torch.equal(deltas(dst)[TO_K], module(2, alpha=2.0).delta())
    done = convert_lora(src, dst, "comfyui", 2, base)
    assert done.lost[TO_Q] == pytest.approx(relative(deltas(dst)[TO_Q], wanted), abs=1e-6) and done.lost[TO_Q] > 0.1


def test_convert_lora_is_held_against_a_base(tmp_path: Path) -> None:
    base = find_base_weights(base_folder(tmp_path / "base", {TO_K: torch.randn(8, 8)}))
    src = save(tmp_path / "a.safetensors", pair(TO_Q) | pair(TO_K))
    with pytest.raises(InputErrors) as caught:
        convert_lora(src, tmp_path / "b.safetensors", "kohya", base=base)
    unknown, misfit = caught.value.faults
    assert f"{TO_Q} is not on this transformer" in unknown and "[6, 6], the transformer's is [8, 8]" in misfit
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no safetensors weights"):
        find_base_weights(tmp_path / "empty")


@pytest.mark.parametrize("to", ["comfyui", "diffusers", "kohya"])
def test_convert_lora_writes_nothing_of_a_foreign_file(tmp_path: Path, to: Any) -> None:
    src = save(tmp_path / "a.safetensors", pair("blocks.0.self_attn.q") | pair(TO_Q))
    with pytest.raises(InputErrors, match="is a LoRA of Wan, by its names"):
        convert_lora(src, tmp_path / "b.safetensors", to)
    wide = {TO_Q: LoraModule(torch.ones(1, 2432), torch.ones(2432, 1), 1.0)}
    write_lora(src, wide)
    with pytest.raises(InputErrors, match=r"Stable Diffusion 3\.5"):
        convert_lora(src, tmp_path / "b.safetensors", to)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
