"""A LoRA file's keys: every name that trainers write is found, every other told once, and no file is taken for ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from clora.errors import InputErrors
from clora.lora.files import read_lora
from clora.lora.keys import flat_name
from clora.lora.layers import BLOCK_LINEARS
from clora.lora.summary import check_lora, summarise, width_findings
from tests.support.lora_files import TO_Q, faults_of, module, pair, save
from tests.support.random_base import random_transformer

FLAT = flat_name(TO_Q)


@pytest.mark.parametrize(
    "stem",
    [
        f"_orig_mod.{TO_Q}",
        f"transformer._orig_mod.{TO_Q}",
        f"module.{TO_Q}",
        f"module._orig_mod.{TO_Q}",
        f"transformer.{TO_Q.replace('.attn', '._checkpoint_wrapped_module.attn')}",
        f"_fsdp_wrapped_module.{TO_Q.replace('.0.', '.0._fsdp_wrapped_module.')}",
        f"pipe.dit.{TO_Q}",
        f"dit.{TO_Q}",
        f"pipe.transformer.{TO_Q}",
        f"model.diffusion_model.{TO_Q}",
        f"model.{TO_Q}",
        f"base_model.model.transformer.{TO_Q}",
        f"base_model.model.model.{TO_Q}",
        f"lycoris_{FLAT}",
        f"lycoris_transformer_{FLAT}",
        f"lora_transformer_{FLAT}",
        f"lora_unet_{FLAT}",
        f"lora_unet__orig_mod_{FLAT}",
        f"lora_unet_diffusion_model_{FLAT}",
    ],
)
@pytest.mark.parametrize("names", [None, [TO_Q]])
def test_read_lora_takes_wrappers_off(tmp_path: Path, stem: str, names: Any) -> None:
    path = save(tmp_path / "a.safetensors", pair(stem, 7) | {f"{stem}.alpha": torch.tensor([1.0])})
    (found,) = read_lora(path, names).modules.items()
    wanted = module(7, alpha=1.0)
    assert found[0] == TO_Q and torch.equal(found[1].delta(), wanted.delta())


@pytest.mark.parametrize(
    "names",
    [
        ("lora_A.style", "lora_B.style"),
        ("lora_A.default_0", "lora_B.default_0"),
        ("lora.down", "lora.up"),
        ("lora_down.x", "lora_up.x"),
    ],
)
def test_read_lora_takes_adapter_names_off(tmp_path: Path, names: tuple[str, str]) -> None:
    path = save(tmp_path / "a.safetensors", pair(f"transformer.{TO_Q}", 7, names))
    assert torch.equal(read_lora(path).modules[TO_Q].delta(), module(7, alpha=2.0).delta())


def test_read_lora_refuses_two_adapters_in_one_sentence(tmp_path: Path) -> None:
    tensors = pair(TO_Q, 0, ("lora_A.style", "lora_B.style")) | pair(TO_Q, 1, ("lora_A.fast", "lora_B.fast"))
    (fault,) = faults_of(save(tmp_path / "a.safetensors", tensors))
    assert "holds 2 adapters (fast, style); save each in a file of its own" in fault


def test_read_lora_of_mixed_layouts_and_dtypes(tmp_path: Path) -> None:
    """One file of four layouts in four dtypes: all is read, each in its own type."""
    stems = {"diffusion_model.": torch.float32, "lycoris_": torch.float16, "": torch.bfloat16, "module.": torch.float32}
    tensors: dict[str, Tensor] = {}
    for index, (prefix, dtype) in enumerate(stems.items()):
        name = f"transformer_blocks.{index}.attn.to_q"
        stem = prefix + (flat_name(name) if prefix.endswith("_") else name)
        tensors |= {key: tensor.to(dtype) for key, tensor in pair(stem, index).items()}
    file = read_lora(save(tmp_path / "a.safetensors", tensors))
    assert file.layout == "mixed" and len(file.modules) == 4
    for index, dtype in enumerate(stems.values()):
        found = file.modules[f"transformer_blocks.{index}.attn.to_q"]
        assert found.A.dtype == dtype and torch.equal(found.delta(), module(index, 2, 2.0, dtype).delta())


def test_lone_alpha_is_noted_and_changes_nothing(tmp_path: Path) -> None:
    """Of a module that has matrices under another prefix it is that module's alpha."""
    lone = {f"transformer.transformer_blocks.{i}.attn.to_k.alpha": torch.tensor(1.0) for i in range(3)}
    path = save(tmp_path / "a.safetensors", pair(f"transformer.{TO_Q}", 7) | lone)
    file = read_lora(path)
    (note,) = file.notes
    assert list(file.modules) == [TO_Q] and "0.attn.to_k.alpha belongs to no matrix, and 2 more like it" in note
    own = {f"diffusion_model.{TO_Q}.alpha": torch.tensor(1.0)}
    other = read_lora(save(tmp_path / "b.safetensors", pair(f"transformer.{TO_Q}", 7) | own))
    assert other.notes == () and other.modules[TO_Q].alpha == 1.0
    (fault,) = faults_of(save(tmp_path / "c.safetensors", lone))
    assert "holds no LoRA, only alphas" in fault


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_read_lora_fp8_is_exact_and_noted_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every number that the type has, but NaN and infinity, which are refused."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = numbers[numbers.float().isfinite()]
    A_rK, B_Nr = finite[:240].view(2, 120).clone(), finite[-240:].view(120, 2).clone()
    tensors = {f"{TO_Q}.lora_A.weight": A_rK, f"{TO_Q}.lora_B.weight": B_Nr}
    file = read_lora(save(tmp_path / "a.safetensors", tensors))
    assert torch.equal(file.modules[TO_Q].delta(), B_Nr.double() @ A_rK.double())
    (note,) = file.notes
    assert str(dtype).removeprefix("torch.") in note and "and 1 more like it; read as bfloat16" in note
    bad = torch.full((2, 120), float("nan")).to(dtype)
    (fault,) = faults_of(save(tmp_path / "b.safetensors", tensors | {f"{TO_Q}.lora_A.weight": bad}))
    assert "lora_A.weight holds values that are not finite" in fault


# Faults: one sentence for a cause


def all_linears(blocks: int) -> list[str]:
    return [f"transformer_blocks.{block}.{linear}" for block in range(blocks) for linear in BLOCK_LINEARS]


def test_faults_of_one_cause_are_one_sentence(tmp_path: Path) -> None:
    """A whole file of 840 modules with each of seven faults: seven sentences, each with the first key and a count."""
    stems = [f"diffusion_model.{name}" for name in all_linears(60)]
    halves = {f"{stem}.lora_A.weight": torch.zeros(1, 4) for stem in stems}
    nans = {key: torch.full_like(tensor, torch.nan) for stem in stems for key, tensor in pair(stem, rank=1).items()}
    integers = {key: torch.zeros(1, 4, dtype=torch.int8) for stem in stems for key in pair(stem)}
    convolutions = {key: torch.zeros(2, 2, 3, 3) for stem in stems for key in pair(stem)}
    misfits = {
        f"{s}.{m}.weight": torch.zeros(shape) for s in stems for m, shape in (("lora_A", (2, 4)), ("lora_B", (4, 3)))
    }
    empty = {f"{s}.{m}.weight": torch.zeros(sh) for s in stems for m, sh in (("lora_A", (0, 4)), ("lora_B", (4, 0)))}
    biases = {f"{stem}.lora_B.bias": torch.zeros(4) for stem in stems}
    first = f"diffusion_model.{min(all_linears(1))}"
    for tensors, words in (
        (halves, "has no lora_B"),
        (nans, f"{first}.lora_A.weight holds values that are not finite, and 1679 more like it"),
        (integers, "is torch.int8, and 1679 more like it; save it as bfloat16"),
        (convolutions, "has shape [2, 2, 3, 3] where a matrix is expected, and 1679 more like it"),
        (misfits, "has matrices that do not fit each other (A [2, 4], B [4, 3]), and 839 more like it"),
        (empty, "has shape [0, 4] where a matrix is expected, and 1679 more like it"),
        (biases | pair(first), f"{first}.lora_B.bias is a change of a bias"),
    ):
        (fault,) = faults_of(save(tmp_path / "a.safetensors", tensors))
        assert words in fault and str(tmp_path) in fault and "\n" not in fault and len(fault) < 400
        assert "remove" not in fault and "delete" not in fault


def test_read_lora_lists_every_fault(tmp_path: Path) -> None:
    other = "transformer_blocks.0.attn.to_k"
    bad = {
        f"transformer.{TO_Q}.text_thing": torch.zeros(2),
        "lora_te1_text_model_layers_0.lora_down.weight": torch.zeros(2, 2),
        f"transformer.{other}.lora_A.weight": torch.zeros(2, 6),
        **pair("transformer.transformer_blocks.0.attn.to_v"),
        f"diffusion_model.{TO_Q}.lora_A.weight": torch.zeros(2, 6),
        "transformer.transformer_blocks.1.attn.to_q.lora_A.weight": torch.zeros(3, 6),
        "transformer.transformer_blocks.1.attn.to_q.lora_B.weight": torch.zeros(5, 2),
        "transformer.transformer_blocks.1.attn.to_v.lora_A.weight": torch.zeros(2, 6, dtype=torch.int8),
        "transformer.transformer_blocks.1.attn.to_v.lora_B.weight": torch.zeros(5, 2, 1),
        "transformer.transformer_blocks.1.attn.to_z.lora_A.weight": torch.zeros(2, 6),
        **pair("transformer.transformer_blocks.1.attn.to_k"),
        "transformer.transformer_blocks.1.attn.to_k.dora_scale": torch.zeros(1, 6),
    }
    bad["transformer.transformer_blocks.0.attn.to_v.lora_B.weight"][0, 0] = float("nan")
    faults = faults_of(save(tmp_path / "a.safetensors", pair(f"transformer.{TO_Q}") | bad))
    expected = [
        ("lora_te1_text_model_layers_0.lora_down.weight changes a text encoder", "train the transformer alone"),
        ("text_thing is no tensor of a LoRA",),
        ("attn.to_z.lora_A.weight names no module", "the nearest is transformer_blocks.1.attn.to_"),
        ("are the same matrix of", TO_Q),
        (other, "has no lora_B"),
        ("transformer_blocks.1.attn.to_q has matrices that do not fit each other (A [3, 6], B [5, 2])",),
        ("transformer_blocks.1.attn.to_v.lora_A.weight is torch.int8",),
        ("transformer_blocks.1.attn.to_v.lora_B.weight has shape [5, 2, 1]",),
        ("transformer_blocks.0.attn.to_v.lora_B.weight holds values that are not finite",),
        ("dora_scale is DoRA's", "--rank 64 --base BASE"),
    ]
    assert len(faults) == len(expected)
    for words in expected:
        assert any(all(word in fault for word in words) for fault in faults), words
    assert all(str(tmp_path / "a.safetensors") in fault for fault in faults)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_mid.weight", "a Tucker factor"),
        ("lokr_t2", "a Tucker factor"),
        ("oft_blocks", "OFT"),
        ("a1.weight", "GLoRA"),
        ("on_input", "IA3"),
        ("diff_b", "a change of a bias"),
        ("w_norm", "replaces the base's own"),
        ("lora_A.weight_scale", "quantized weights with scales of their own; save the LoRA as bfloat16"),
        ("lora_embedding_A", "an embedding"),
        ("scalar", "a trained scalar of LyCORIS"),
    ],
)
def test_read_lora_refuses_other_kinds_by_name(tmp_path: Path, key: str, words: str) -> None:
    tensors = pair(f"transformer.{TO_Q}") | {f"transformer.{TO_Q}.{key}": torch.ones(2, 2)}
    (fault,) = faults_of(save(tmp_path / "a.safetensors", tensors))
    assert words in fault and key in fault and "remove" not in fault


@pytest.mark.parametrize(
    "stem", ["text_encoder.layers.0.q", "text_encoder_2.x", "lora_te_x", "lora_te1_x", "text_encoders.qwen25_7b.x"]
)
def test_read_lora_refuses_text_encoders(tmp_path: Path, stem: str) -> None:
    (fault,) = faults_of(save(tmp_path / "a.safetensors", pair(f"transformer.{TO_Q}") | pair(stem)))
    assert f"{stem}.lora_A.weight changes a text encoder, and 1 more like it" in fault


def test_read_lora_against_a_transformer(tmp_path: Path) -> None:
    linears = random_transformer().named_modules()
    shapes = {name: tuple(m.weight.shape) for name, m in linears if isinstance(m, nn.Linear)}
    missing = [f"transformer_blocks.{block}.attn.to_q" for block in (7, 8)]
    tensors = pair(f"transformer.{TO_Q}") | {k: t for name in missing for k, t in pair(f"transformer.{name}").items()}
    path = save(tmp_path / "a.safetensors", tensors)
    faults = faults_of(path, shapes)
    assert len(faults) == 2
    assert (
        f"{missing[0]} is not on this transformer (the nearest is transformer_blocks.1.attn.to_q), and 1" in faults[0]
    )
    assert "[6, 6], the transformer's is [48, 48]" in faults[1]
    with pytest.raises(InputErrors) as caught:
        check_lora(path, shapes)  # the header alone shows them
    assert caught.value.faults == faults
    flat = save(tmp_path / "b.safetensors", pair(f"lora_unet_{flat_name(missing[0])}", names=("lora_down", "lora_up")))
    assert "7.attn.to_q is not on this transformer" in faults_of(flat, shapes)[0]


# Other models


def test_read_lora_refuses_a_whole_model_in_one_sentence(tmp_path: Path) -> None:
    weights = {name: tensor.detach() for name, tensor in random_transformer().named_parameters()}
    (fault,) = faults_of(save(tmp_path / "a.safetensors", weights))
    assert f"holds {len(weights)} tensors that are no LoRA's (first img_in.bias); give a LoRA" in fault


def linears_of(name: str, **settings: Any) -> list[str]:
    """The names of a diffusers model's linear layers."""
    with torch.device("meta"):
        model = getattr(diffusers, name)(**settings)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


FLUX = {"num_layers": 1, "num_single_layers": 1}
# What a file's message must say, the stem of its keys, and its modules: of a class of diffusers, or as trainers of the
# original code write them.
FOREIGN: list[tuple[str, str, Any]] = [
    ("FLUX.1", "transformer.{}", ("FluxTransformer2DModel", FLUX)),
    ("FLUX.1", "lora_transformer_{}", ("FluxTransformer2DModel", FLUX)),
    (
        "FLUX.1",
        "lora_unet_{}",
        ["double_blocks_0_img_attn_qkv", "single_blocks_3_linear1", "double_blocks_1_txt_mlp_0"],
    ),
    ("FLUX.2", "diffusion_model.{}", ("Flux2Transformer2DModel", FLUX)),
    ("Wan", "transformer.{}", ("WanTransformer3DModel", {"num_layers": 1})),
    ("Wan", "diffusion_model.{}", ["blocks.0.self_attn.q", "blocks.0.cross_attn.k_img", "blocks.0.ffn.0"]),
    ("Wan", "lora_unet_{}", ["blocks_0_self_attn_q", "blocks_0_ffn_2"]),
    ("HunyuanVideo", "transformer.{}", ("HunyuanVideoTransformer3DModel", {**FLUX, "num_refiner_layers": 1})),
    ("HunyuanVideo", "lora_unet_{}", ["double_blocks_0_img_attn_qkv", "double_blocks_0_img_mlp_fc1"]),
    ("HunyuanVideo", "diffusion_model.{}", ["double_blocks.0.img_attn_qkv", "single_blocks.0.linear1"]),
    ("Z-Image", "transformer.{}", ("ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1})),
    ("Z-Image", "lora_unet_{}", ["layers_0_attention_qkv", "layers_0_feed_forward_w1"]),
    ("SDXL", "unet.{}", ("UNet2DConditionModel", {})),
    ("SDXL", "lora_unet_{}", ["input_blocks_4_1_transformer_blocks_0_attn1_to_q"]),
    ("Stable Diffusion 3", "transformer.{}", ("SD3Transformer2DModel", {"num_layers": 1})),
    ("LTX-Video", "transformer.{}", ("LTXVideoTransformer3DModel", {"num_layers": 1})),
    ("AuraFlow", "lycoris_{}", ("AuraFlowTransformer2DModel", {"num_mmdit_layers": 1, "num_single_dit_layers": 1})),
    ("Chroma", "transformer.{}", ("ChromaTransformer2DModel", FLUX)),
    ("Kandinsky 5", "transformer.{}", ("Kandinsky5Transformer3DModel", {"num_text_blocks": 1, "num_visual_blocks": 1})),
    ("Mochi", "transformer.{}", ("MochiTransformer3DModel", {"num_layers": 2})),
    ("HiDream", "diffusion_model.{}", ["double_stream_blocks.0.block.attn1.to_q"]),
    ("Cosmos", "pipe.dit.{}", ["blocks.0.self_attn.q_proj", "blocks.0.cross_attn.v_proj"]),
    ("Qwen-Image 2.1", "transformer.{}", ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.img_mlp.gate_layer"]),
    ("a language model", "base_model.model.{}", ["model.layers.0.self_attn.q_proj"]),
    ("no module of a model that clora knows", "{}", ["towers.0.attention.query"]),
]


@pytest.mark.parametrize(
    ("model", "stem", "names"), FOREIGN, ids=[f"{m}-{s}-{i}" for i, (m, s, _) in enumerate(FOREIGN)]
)
def test_read_lora_refuses_other_models_in_one_sentence(tmp_path: Path, model: str, stem: str, names: Any) -> None:
    names = names if isinstance(names, list) else linears_of(names[0], **names[1])
    flat = stem.endswith("_{}")
    tensors = {
        key: tensor[:1] if "lora_A" in key else tensor[:, :1].contiguous()
        for name in names
        for key, tensor in pair(stem.format(flat_name(name) if flat else name)).items()
    }
    path = save(tmp_path / "a.safetensors", tensors | {"lora_te1_text_model_0.alpha": torch.tensor(1.0)})
    (fault,) = faults_of(path)
    assert model in fault and "\n" not in fault and len(fault) < 400
    assert any(key in fault for key in tensors) and "give one trained on Qwen-Image" in fault


def test_no_name_of_ours_looks_like_another_models(tmp_path: Path) -> None:
    names = [name for name, m in random_transformer().named_modules() if isinstance(m, nn.Linear)]
    for stem in ("transformer.{}", "lora_unet_{}"):
        flat = stem.endswith("_{}")
        tensors = {k: t for n in names for k, t in pair(stem.format(flat_name(n) if flat else n)).items()}
        assert set(read_lora(save(tmp_path / "a.safetensors", tensors)).modules) == set(names)


def test_width_findings_tell_stable_diffusion_3_and_other_proportions(tmp_path: Path) -> None:
    """The attention layers of Stable Diffusion 3 are named as ours: only their width tells."""

    def findings(**shapes: tuple[int, int]) -> tuple[list[str], list[str]]:
        tensors: dict[str, Tensor] = {}
        for end, (N, K) in shapes.items():
            stem = f"transformer.transformer_blocks.0.{end.replace('__', '.')}"
            tensors |= {f"{stem}.lora_A.weight": torch.ones(1, K), f"{stem}.lora_B.weight": torch.ones(N, 1)}
        summary, faults = summarise(save(tmp_path / "a.safetensors", tensors), None)
        assert not faults
        return width_findings(summary)

    (fault,), notes = findings(attn__to_q=(2432, 2432))
    assert "is a LoRA of Stable Diffusion 3.5, by the 2432 inputs" in fault and notes == []
    ours = {"attn__to_q": (48, 48), "img_mlp__net__0__proj": (192, 48), "txt_mlp__net__2": (48, 192)}
    assert findings(**ours, img_mod__1=(288, 48)) == ([], [])
    faults, (note,) = findings(**ours, img_mod__1=(144, 48), txt_mod__1=(144, 48))
    what = "img_mod.1 is for a weight [144, 48], where a Qwen-Image transformer 48 wide has [288, 48]"
    assert faults == [] and f"{what}, and 1 more like it" in note
