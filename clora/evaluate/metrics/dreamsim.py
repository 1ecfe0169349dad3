"""DreamSim (arXiv 2306.09344): how different two pictures are to people, by encoders tuned on their judgements.

As the authors' package `dreamsim` 0.2.1 (MIT) computes it, from its published files, without the package (which needs
torchvision, timm and open_clip). An embedding is the class token of DINO ViT-B/16 behind its twelfth block, *before*
the last norm (768 numbers), and in the ensemble behind it the projected class tokens of CLIP and OpenCLIP ViT-B/16 (512
each), less the mean of all these numbers. The distance is 1 - cosine, 0 for equal pictures, lower is nearer. Pictures
are squashed to 224 x 224, bicubic, RGB in 0 to 1; each encoder has its own mean and std; fp32.

A folder is what `dreamsim(cache_dir=FOLDER)` leaves:

    ensemble_lora/ or dino_vitb16_single_lora/      adapter_config.json, adapter_model.safetensors: LoRA of every qkv
    checkpoints/dino_vitbase16_pretrain.pth         DINO, as Facebook publishes it
    clip_vitb16_pretrain.pth.tar, open_clip_vitb16_pretrain.pth.tar          the ensemble alone, in DINO's names

With both LoRAs there it is the ensemble, the package's default. The backbones are pickles; nothing but tensors is taken
from them. What is not exactly this is refused, because a weight that is left out shows in no figure.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clora.errors import InputError
from clora.io.safetensors import read_header, read_tensors
from clora.lora.alpha import header_alphas
from clora.lora.module import LoraModule

WIDTH, DEPTH, PATCHES, PROJECTED = 768, 12, 14 * 14, 512  # ViT-B/16 at 224 x 224
HEAD = 64  # channels of an attention head
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Backbone(NamedTuple):
    """A ViT-B/16: its file below the folder, and how it differs from the others. `projects`: it is a CLIP."""

    file: str
    projects: bool
    activation: str
    mean_std: tuple[tuple[float, ...], tuple[float, ...]]


DINO = Backbone("checkpoints/dino_vitbase16_pretrain.pth", False, "gelu", IMAGENET)
CLIP = Backbone("clip_vitb16_pretrain.pth.tar", True, "quick_gelu", OPENAI)
OPEN_CLIP = Backbone("open_clip_vitb16_pretrain.pth.tar", True, "gelu", OPENAI)

# By the folder of their LoRA; its keys count the backbones in this order.
VARIANTS: dict[str, tuple[str, tuple[Backbone, ...]]] = {
    "ensemble_lora": ("ensemble of DINO, CLIP and OpenCLIP ViT-B/16", (DINO, CLIP, OPEN_CLIP)),
    "dino_vitb16_single_lora": ("DINO ViT-B/16 alone", (DINO,)),
}
GET = "give the folder that dreamsim(cache_dir=FOLDER) of the package dreamsim fills"

# DINO's names, and those of the hub's checkpoints, which every version of transformers reads.
_DINO_NAMES = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_CLIP_NAMES = {"norm1": "layer_norm1", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2"}


def dreamsim_fault(model: str | None) -> str:
    """Why `model` is no folder of DreamSim's files, without the encoder's name; "" where all are there."""
    if model is None:
        return f"its files are on no hub; {GET}"
    folder = Path(model)
    lora = _lora_folder(folder)
    if lora is None:
        return f"{folder} holds neither {' nor '.join(VARIANTS)}; {GET}"
    files = [f"{lora}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")]
    files += [backbone.file for backbone in VARIANTS[lora][1]]
    missing = [file for file in files if not (folder / file).is_file()]
    return f"{folder / missing[0]} does not exist; {GET}" if missing else ""


def open_dreamsim(folder: Path) -> tuple[str, str, nn.Module]:
    """What it is, which LoRA by its SHA-256, and the network: pixels (N, 3, 224, 224) in 0 to 1 to embeddings (N, D),
    centred but not normalised, D being 1792 or 768.

    Raises `InputError` for files that are not those of the package.
    """
    lora = _lora_folder(folder)
    assert lora is not None
    what, backbones = VARIANTS[lora]
    updates, sha256 = _read_updates(folder / lora, len(backbones))
    branches = []
    for place, backbone in enumerate(backbones):
        state = _read_state(folder / backbone.file, backbone.projects)
        for block in range(DEPTH):
            state[f"blocks.{block}.attn.qkv.weight"] += updates[_module(place, block)].delta().float()
        branches.append(_Branch(backbone, _clip(state, backbone) if backbone.projects else _vit(state)))
    return f"DreamSim 0.2, {what}, in {folder}", f"{sha256[:12]} (SHA-256 of its LoRA)", DreamSim(branches).eval()


class DreamSim(nn.Module):
    """Backbones side by side: pixels (N, 3, 224, 224) in 0 to 1 to centred embeddings (N, D)."""

    def __init__(self, branches: list[_Branch]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, pixels: Tensor) -> Tensor:
        vectors = torch.cat([branch(pixels) for branch in self.branches], dim=-1)
        return vectors - vectors.mean(dim=-1, keepdim=True)


class _Branch(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, network: nn.Module) -> None:
        super().__init__()
        self.projects, self.network = backbone.projects, network
        for name, values in zip(("mean", "std"), backbone.mean_std, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.network(pixel_values=(pixels - self.mean) / self.std)
        vectors: Tensor = out.image_embeds if self.projects else out.last_hidden_state[:, 0]
        return vectors


def _lora_folder(folder: Path) -> str | None:
    return next((name for name in VARIANTS if (folder / name).is_dir()), None)


def _module(place: int, block: int) -> str:
    """The linear layer as the package's model names it."""
    return f"extractor_list.{place}.model.blocks.{block}.attn.qkv"


def _read_updates(folder: Path, backbones: int) -> tuple[dict[str, LoraModule], str]:
    """The update of every block's qkv, by module, and the SHA-256 of the file."""
    path = folder / "adapter_model.safetensors"
    modules = [_module(place, block) for place in range(backbones) for block in range(DEPTH)]
    keys = {module: tuple(f"base_model.model.{module}.lora_{part}.weight" for part in "AB") for module in modules}
    wanted = {key for pair in keys.values() for key in pair}
    header = read_header(path)
    # All of them and nothing else: PEFT would leave out what it does not find, without a word.
    if wrong := sorted(wanted ^ header.tensors.keys()):
        raise InputError(f"encoders.dreamsim: {path} {_has_not(wrong, wanted)}; {GET}")
    alpha_of, faults = header_alphas(path, header.metadata, "peft")
    if faults:
        raise InputError(f"encoders.dreamsim: {faults[0]}")
    tensors, sha256 = read_tensors(path, header)
    updates = {}
    for module, (down, up) in keys.items():
        A, B = tensors[down], tensors[up]
        if A.shape[1:] != (WIDTH,) or B.shape != (3 * WIDTH, len(A)) or not (A.isfinite().all() and B.isfinite().all()):
            raise InputError(f"encoders.dreamsim: {path} has no finite update of the right shape in {down}; {GET}")
        try:
            updates[module] = LoraModule(A, B, alpha_of(module, len(A)))
        except ValueError as error:
            raise InputError(f"encoders.dreamsim: {path}: {error}; {GET}") from error
    return updates, sha256


def _has_not(wrong: list[str], wanted: set[str] | Mapping[str, Any]) -> str:
    return f"lacks {wrong[0]}" if wrong[0] in wanted else f"has {wrong[0]}, which DreamSim has not"


def _read_state(path: Path, projects: bool) -> dict[str, Tensor]:
    """A backbone's weights in DINO's names, fp32, each of the shape that ViT-B/16 has."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        state = state["state_dict"] if projects else state
        found = {name: tuple(value.shape) for name, value in state.items()}
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, AttributeError, LookupError, TypeError) as error:
        raise InputError(f"encoders.dreamsim: {path} is not what torch.save wrote of weights; {GET}") from error
    shapes = _shapes(projects)
    if wrong := sorted(shapes.keys() ^ found.keys()):
        raise InputError(f"encoders.dreamsim: {path} {_has_not(wrong, shapes)}; {GET}")
    for name, shape in shapes.items():
        if found[name] != shape:
            raise InputError(f"encoders.dreamsim: {path} has {name} of {found[name]}, not {shape}; {GET}")
    return {name: value.float() for name, value in state.items()}


def _shapes(projects: bool) -> dict[str, tuple[int, ...]]:
    """Of every weight of a ViT-B/16 in DINO's names; of CLIP's with the norm before the blocks and the projection."""
    W = WIDTH
    layers = {"norm1": (W,), "attn.qkv": (3 * W, W), "attn.proj": (W, W), "norm2": (W,)}
    layers |= {"mlp.fc1": (4 * W, W), "mlp.fc2": (W, 4 * W)}
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj": (W, 3, 16, 16), "norm": (W,)}
    shapes |= {"pos_drop": (W,)} if projects else {}
    shapes |= {f"blocks.{block}.{name}": shape for block in range(DEPTH) for name, shape in layers.items()}
    every = {f"{name}.weight": shape for name, shape in shapes.items()}
    every |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    every |= {"cls_token": (1, 1, W), "pos_embed": (1, PATCHES + 1, W)}
    return every | ({"proj": (W, PROJECTED)} if projects else {})


def _blocks(state: Mapping[str, Tensor], names: Mapping[str, str], qkv: str, prefix: str) -> dict[str, Tensor]:
    """The blocks' weights renamed, queries, keys and values apart."""
    renamed = {}
    for block in range(DEPTH):
        for kind in ("weight", "bias"):
            for name in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
                value = state[f"blocks.{block}.{name}.{kind}"]
                renamed[f"{prefix}.{block}.{names.get(name, name)}.{kind}"] = value
            parts = state[f"blocks.{block}.attn.qkv.{kind}"].chunk(3)
            for role, part in zip(("query", "key", "value"), parts, strict=True):
                renamed[f"{prefix}.{block}.{qkv.format(role=role, q=role[0])}.{kind}"] = part.contiguous()
    return renamed


def _vit(state: Mapping[str, Tensor]) -> nn.Module:
    """DINO: the class token behind its last block is `last_hidden_state[:, 0]`."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**_sizes(), layer_norm_eps=1e-6, hidden_act="gelu")
    weights = _blocks(state, _DINO_NAMES, "attention.attention.{role}", "encoder.layer") | {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    network = _filled(ViTModel, config, weights, add_pooling_layer=False)
    network.layernorm = nn.Identity()  # DreamSim takes the token before it
    return network


def _clip(state: Mapping[str, Tensor], backbone: Backbone) -> nn.Module:
    """CLIP or OpenCLIP. Its patches have no bias in transformers: the bias goes into their positions."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = _sizes() | {"projection_dim": PROJECTED}
    config = CLIPVisionConfig(**sizes, layer_norm_eps=1e-5, hidden_act=backbone.activation)
    positions = state["pos_embed"][0].clone()
    positions[1:] += state["patch_embed.proj.bias"]
    weights = {
        "embeddings.class_embedding": state["cls_token"][0, 0],
        "embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "embeddings.position_embedding.weight": positions,
        "pre_layrnorm.weight": state["pos_drop.weight"],
        "pre_layrnorm.bias": state["pos_drop.bias"],
        "post_layernorm.weight": state["norm.weight"],
        "post_layernorm.bias": state["norm.bias"],
    } | _blocks(state, _CLIP_NAMES, "self_attn.{q}_proj", "encoder.layers")
    weights = {f"vision_model.{name}": value for name, value in weights.items()}
    weights["visual_projection.weight"] = state["proj"].T.contiguous()
    return _filled(CLIPVisionModelWithProjection, config, weights)


def _sizes() -> dict[str, int]:
    heads = WIDTH // HEAD
    layers = {"num_hidden_layers": DEPTH, "num_attention_heads": heads, "intermediate_size": 4 * WIDTH}
    return {"hidden_size": WIDTH, "image_size": 224, "patch_size": 16, **layers}


def _filled(kind: Any, config: Any, weights: dict[str, Tensor], **options: Any) -> nn.Module:
    network, loading = kind.from_pretrained(
        None, config=config, state_dict=weights, torch_dtype=torch.float32, output_loading_info=True, **options
    )
    left = sorted(set(loading["missing_keys"]) | set(loading["unexpected_keys"]))
    if left:  # ours to mend: names that this version of transformers does not know
        raise RuntimeError(f"transformers did not take {left[0]} of {kind.__name__}")
    made: nn.Module = network
    return made
