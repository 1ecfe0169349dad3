"""DreamSim against its forward written out in fp64, against what the authors' package says of the same files, and
against the published figures, where the folder `CLORA_DREAMSIM` holds the real files.

The files here have the published layout with small random weights: 128 channels in place of 768.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from clora.data.images import load_image
from clora.errors import InputError
from clora.evaluate.bench_run import Measures, score
from clora.evaluate.benchmark import cells, read_benchmark
from clora.evaluate.metrics import dreamsim
from clora.evaluate.metrics.encoders import encoder_fault, open_encoder, preprocess
from tests.evaluate.test_benchmark import picture
from tests.evaluate.test_encoders import CLIP, IMAGENET, photo

WIDTH, PROJECTED, RANK, ALPHA = 128, 32, 4, 2.0
NAMES = ("dino", "clip", "open_clip")
BACKBONES = {"dino": "checkpoints/dino_vitbase16_pretrain.pth"} | {
    name: f"{name}_vitb16_pretrain.pth.tar" for name in NAMES[1:]
}
LORAS = {"ensemble_lora": NAMES, "dino_vitb16_single_lora": NAMES[:1]}
# Distances of astronaut and cat, astronaut and coffee, cat and coffee by `dreamsim` 0.2.1 itself (peft 0.21.2, torch
# 2.13.0, its ViT-B made 128 wide), of the files that `write_files` writes.
GOLDENS = {
    "ensemble_lora": (0.0853417, 0.1126326, 0.0865428),
    "dino_vitb16_single_lora": (0.1322345, 0.0953308, 0.0729390),
}


def backbone(seed: int, clip: bool) -> dict[str, torch.Tensor]:
    """A ViT in DINO's names; of CLIP's with `pos_drop`, the norm before its blocks, and `proj`."""
    random = np.random.RandomState(seed)  # of a stream that no version changes

    def drawn(*shape: int, scale: float = 0.08, around: float = 0.0) -> torch.Tensor:
        return torch.from_numpy(around + scale * random.randn(*shape)).float()

    W = WIDTH
    state = {"cls_token": drawn(1, 1, W, scale=0.3), "pos_embed": drawn(1, 197, W, scale=0.3)}
    linears = {"patch_embed.proj": (W, 3, 16, 16)}
    for n in range(12):
        linears |= {f"blocks.{n}.attn.qkv": (3 * W, W), f"blocks.{n}.attn.proj": (W, W)}
        linears |= {f"blocks.{n}.mlp.fc1": (4 * W, W), f"blocks.{n}.mlp.fc2": (W, 4 * W)}
    for name, shape in linears.items():
        state |= {f"{name}.weight": drawn(*shape), f"{name}.bias": drawn(shape[0], scale=0.3)}
    norms = ["norm", *(f"blocks.{n}.norm{k}" for n in range(12) for k in (1, 2)), *(["pos_drop"] if clip else [])]
    for name in norms:
        state |= {f"{name}.weight": drawn(W, scale=0.3, around=1.0), f"{name}.bias": drawn(W, scale=0.3)}
    return state | ({"proj": drawn(W, PROJECTED, scale=0.2)} if clip else {})


def write_files(folder: Path, loras: tuple[str, ...] = tuple(LORAS)) -> Path:
    """What `dreamsim(cache_dir=FOLDER)` leaves, but for its size."""
    (folder / "checkpoints").mkdir(parents=True)
    for seed, (name, file) in enumerate(BACKBONES.items()):
        if name not in {one for lora in loras for one in LORAS[lora]}:
            continue
        state = backbone(seed, name != "dino")
        torch.save(state if name == "dino" else {"state_dict": state}, folder / file)
    for lora in loras:
        random, tensors = np.random.RandomState(10 if lora == "ensemble_lora" else 11), {}
        for place in range(len(LORAS[lora])):
            for n in range(12):
                key = f"base_model.model.extractor_list.{place}.model.blocks.{n}.attn.qkv.lora_"
                for part, shape in (("A", (RANK, WIDTH)), ("B", (3 * WIDTH, RANK))):
                    tensors[f"{key}{part}.weight"] = torch.from_numpy(0.3 * random.randn(*shape)).float()
        (folder / lora).mkdir()
        save_file(tensors, folder / lora / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.3, "bias": "none"}
        (folder / lora / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["qkv"]}))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("ensemble"))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("single"), ("dino_vitb16_single_lora",))


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dreamsim, "WIDTH", WIDTH)
        patch.setattr(dreamsim, "PROJECTED", PROJECTED)
        yield


@pytest.fixture(scope="module")
def ensemble(files, small):
    return open_encoder("dreamsim", str(files))


def written_out(folder: Path, lora: str, pixels: torch.Tensor, mistake: str = "") -> torch.Tensor:
    """The embedding (N, D), fp64, of pixels (N, 3, 224, 224) in 0 to 1, block by block as DINO's own code has it."""
    updates = {key: value.double() for key, value in load_file(folder / lora / "adapter_model.safetensors").items()}
    scale = {"no LoRA": 0.0, "alpha alone": ALPHA}.get(mistake, ALPHA / RANK)
    vectors = []
    for place, name in enumerate(LORAS[lora]):
        state = torch.load(folder / BACKBONES[name], weights_only=True)
        w = {key: value.double() for key, value in (state if name == "dino" else state["state_dict"]).items()}
        mean, std = IMAGENET if (name == "dino") != (mistake == "the other's mean") else CLIP
        eps = 1e-6 if name == "dino" else 1e-5

        def norm(x, key, w=w, eps=eps):
            return F.layer_norm(x, (WIDTH,), w[f"{key}.weight"], w[f"{key}.bias"], eps)

        def linear(x, key, w=w):
            return x @ w[f"{key}.weight"].T + w[f"{key}.bias"]

        x = (pixels.double() - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None]
        x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16).flatten(2).transpose(1, 2)
        x = torch.cat([w["cls_token"].expand(len(x), 1, WIDTH), x], dim=1) + w["pos_embed"]
        x = x if name == "dino" else norm(x, "pos_drop")
        for n in range(12 if mistake != "eleven blocks" else 11):
            key, h = f"blocks.{n}", norm(x, f"blocks.{n}.norm1")
            lora_key = f"base_model.model.extractor_list.{place}.model.{key}.attn.qkv.lora_"
            qkv = linear(h, f"{key}.attn.qkv")
            qkv = qkv + scale * (h @ updates[f"{lora_key}A.weight"].T) @ updates[f"{lora_key}B.weight"].T
            q, k, v = qkv.reshape(len(x), 197, 3, WIDTH // 64, 64).permute(2, 0, 3, 1, 4)
            q, k = (k, q) if mistake == "keys as queries" else (q, k)
            seen = torch.softmax(q @ k.transpose(-1, -2) / 8, dim=-1) @ v
            x = x + linear(seen.transpose(1, 2).reshape(len(x), 197, WIDTH), f"{key}.attn.proj")
            h = linear(norm(x, f"{key}.norm2"), f"{key}.mlp.fc1")
            quick = (name == "clip") != (mistake == "the other GELU")
            x = x + linear(h * torch.sigmoid(1.702 * h) if quick else F.gelu(h), f"{key}.mlp.fc2")
        x = x.mean(1, keepdim=True) if mistake == "mean of all tokens" else x
        normed = name != "dino" or mistake == "DINO behind its norm"
        x = (norm(x, "norm") if normed else x)[:, 0]
        x = x if name == "dino" else x @ w["proj"]
        vectors.append(x / x.norm(dim=-1, keepdim=True) if mistake == "each of length one" else x)
    whole = torch.cat(vectors, dim=-1)
    return whole if mistake == "not centred" else whole - whole.mean(-1, keepdim=True)


def distance(vectors: torch.Tensor) -> float:
    return 1 - float(F.cosine_similarity(vectors[0], vectors[1], dim=0))


def pair() -> list[Image.Image]:
    return [photo(), photo(500, 260).rotate(90, expand=True)]


@pytest.mark.parametrize("lora", LORAS)
def test_open_dreamsim_is_the_forward_written_out(files, single, lora):
    encoder = open_encoder("dreamsim", str(files if lora == "ensemble_lora" else single))
    figure, pixels = encoder.figure(*pair()), preprocess("dreamsim", pair())
    with torch.no_grad():
        made = encoder.network.double()(pixels.double())
    expected = written_out(files if lora == "ensemble_lora" else single, lora, pixels)
    assert made.shape == expected.shape == (2, WIDTH + 2 * PROJECTED if lora == "ensemble_lora" else WIDTH)
    assert (made - expected).abs().max() < 2e-6 * expected.abs().max()  # the sum of weight and update is fp32
    assert figure == pytest.approx(distance(expected), abs=1e-6)


MISTAKES = ("no LoRA", "alpha alone", "keys as queries", "the other's mean", "the other GELU", "DINO behind its norm",
            "eleven blocks", "mean of all tokens", "each of length one", "not centred")  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_figure_of_dreamsim_shows_the_usual_mistakes(files, ensemble, mistake):
    figure, pixels = ensemble.figure(*pair()), preprocess("dreamsim", pair())
    assert abs(figure - distance(written_out(files, "ensemble_lora", pixels, mistake))) > 4e-5


@pytest.mark.parametrize("lora", LORAS)
def test_figure_of_dreamsim_is_what_the_package_says(single, ensemble, lora):
    data = pytest.importorskip("skimage.data")
    encoder = ensemble if lora == "ensemble_lora" else open_encoder("dreamsim", str(single))
    pictures = [Image.fromarray(image) for image in (data.astronaut(), data.chelsea(), data.coffee())]
    found = [encoder.figure(pictures[a], pictures[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert found == pytest.approx(GOLDENS[lora], abs=2e-6)


@pytest.mark.skipif("CLORA_DREAMSIM" not in os.environ, reason="CLORA_DREAMSIM names no folder with the real files")
def test_figure_of_dreamsim_is_the_published_one(monkeypatch):
    """The folder holds the ensemble's files and `images/` of the package's repository; its README has the figures."""
    monkeypatch.setattr(dreamsim, "WIDTH", 768)
    monkeypatch.setattr(dreamsim, "PROJECTED", 512)
    folder = Path(os.environ["CLORA_DREAMSIM"])
    encoder = open_encoder("dreamsim", str(folder))
    assert "ensemble" in encoder.facts
    reference, *others = (load_image(folder / "images" / f"{name}_1.png") for name in ("ref", "img_a", "img_b"))
    assert [encoder.figure(reference, one) for one in others] == pytest.approx([0.4453, 0.2756], abs=5e-4)


def test_open_encoder_says_which_dreamsim_it_is(files, single, ensemble):
    both = {"ensemble of DINO, CLIP and OpenCLIP ViT-B/16": (ensemble, files)}
    both["DINO ViT-B/16 alone"] = (open_encoder("dreamsim", str(single)), single)
    for what, (encoder, folder) in both.items():
        assert encoder.facts.startswith(f"DreamSim 0.2, {what}, in {folder}, revision ") and "SHA-256" in encoder.facts


def test_score_puts_dreamsim_into_rows(tmp_path, single):
    for place, (folder, value) in enumerate((("cats", 10), ("made/cat/sepia", 10), ("made/cat/sepia", 90))):
        picture(tmp_path / folder / f"{'tom' if place < 2 else 'felix'}.png", value)
    picture(tmp_path / "cats" / "felix.png", 10)
    shutil.copytree(single, tmp_path / "weights")
    bench = {
        "output_dir": "out", "effects": [{"name": "sepia", "instruction": "i"}], "images": {"cat": "cats"},
        "methods": [{"name": "theirs", "images": "made"}], "encoders": {"dreamsim": "weights"},
    }  # fmt: skip
    (tmp_path / "bench.yaml").write_text(json.dumps(bench))
    found = read_benchmark(tmp_path / "bench.yaml")  # the folder is relative to the file
    encoder = open_encoder("dreamsim", str(single))
    felix, tom = score(found, list(cells(found)), None, Measures([encoder]), lambda: None, {})
    assert tom.dreamsim_source == pytest.approx(0, abs=1e-6)
    expected = encoder.figure(*(load_image(tmp_path / path / "felix.png") for path in ("made/cat/sepia", "cats")))
    assert felix.dreamsim_source == pytest.approx(expected, abs=1e-6) and expected > 1e-4
    assert found.encoders == {"dreamsim": str(tmp_path / "weights")}


@pytest.mark.parametrize(
    ("model", "words"),
    [(None, "on no hub; give the folder"), ("facebook/dino-vitb16", "holds neither ensemble_lora nor dino_vitb16_s")],
)
def test_encoder_fault_wants_the_folder_of_dreamsim(model, words):
    assert words in encoder_fault("dreamsim", model)
    with pytest.raises(InputError, match="^encoders.dreamsim: "):
        open_encoder("dreamsim", model)


def edit_lora(change):
    def edit(folder):
        path = folder / "dino_vitb16_single_lora" / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def edit_backbone(change):
    def edit(folder):
        path = folder / BACKBONES["dino"]
        state = torch.load(path, weights_only=True)
        torch.save(change(state) or state, path)

    return edit


def config(**fields):
    def edit(folder):
        path = folder / "dino_vitb16_single_lora" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


KEY = "base_model.model.extractor_list.0.model.blocks.3.attn.qkv.lora_A.weight"
NO_UPDATE = f"no finite update of the right shape in {KEY}"


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda folder: (folder / BACKBONES["dino"]).unlink(), "dino_vitbase16_pretrain.pth does not exist; give the"),
        (lambda folder: (folder / "dino_vitb16_single_lora/adapter_config.json").unlink(), "config.json does not"),
        (edit_lora(lambda tensors: tensors.pop(KEY)), f"lacks {KEY}"),
        (edit_lora(lambda tensors: tensors.update({"x.lora_A.weight": torch.ones(2)})), "has x.lora_A.weight, which"),
        (edit_lora(lambda tensors: tensors.update({KEY: torch.ones(RANK, 64)})), NO_UPDATE),
        (edit_lora(lambda tensors: tensors.update({KEY: torch.full((RANK, WIDTH), torch.nan)})), NO_UPDATE),
        (config(use_dora=True), "use_dora"),
        (config(r=8), "rank 8"),
        (edit_backbone(lambda state: state.pop("norm.bias") is None), "lacks norm.bias"),
        (edit_backbone(lambda state: state.update({"head.weight": torch.ones(1)})), "has head.weight, which"),
        (edit_backbone(lambda state: state.update({"pos_embed": torch.ones(1, 785, WIDTH)})), "pos_embed of (1, 785"),
        (edit_backbone(lambda state: [1, 2]), "is not what torch.save wrote"),
        (edit_backbone(lambda state: {"x": Runs()}), "is not what torch.save wrote"),
        (lambda folder: (folder / BACKBONES["dino"]).write_bytes(b"\x80\x02."), "is not what torch.save wrote"),
    ],
)  # fmt: skip
def test_open_encoder_refuses_what_is_not_exactly_dreamsim(tmp_path, monkeypatch, edit, words):
    monkeypatch.chdir(tmp_path)
    edit(write_files(tmp_path / "files", ("dino_vitb16_single_lora",)))
    with pytest.raises(InputError) as caught:
        open_encoder("dreamsim", str(tmp_path / "files"))
    assert str(caught.value).startswith("encoders.dreamsim: ") and words in str(caught.value)
    assert not (tmp_path / "ran").exists()
