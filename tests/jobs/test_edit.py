"""edit: the same image as the stock pipeline, whatever else is in the call; faults found before any
weights."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from numpy.typing import NDArray
from PIL import Image
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from clora.backbones.load import linear_shapes
from clora.backbones.qwen_image.pipeline import StillImageProcessor, pass_token_types
from clora.errors import InputError, InputErrors
from clora.inference.editor import Editor, edit_prompt, load_editor
from clora.inference.sampling import default_sampling
from clora.jobs import edit
from clora.jobs.edit import EditRequest, edit_files, result_paths, with_collection
from clora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueSchedule, read_catalogue, write_collection
from clora.lora.files import convert_lora, write_lora
from clora.lora.module import LoraModule
from tests.support.random_base import AREA

PROMPT = "paint it"
CATALOGUE = Catalogue(
    base="elsewhere",
    schedule=CatalogueSchedule(num_steps=8, shift=3.0),
    effects=[
        CatalogueEntry(name="first", trigger="<a_1>", student_prompt="paint it"),
        CatalogueEntry(name="second", trigger="idem", student_prompt="Describe it."),
        CatalogueEntry(name="plain", student_prompt="color"),
    ],
)


def picture(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def random_modules(base: Path, suffixes: tuple[str, ...], seed: int = 0) -> dict[str, LoraModule]:
    """Large updates, so that they show in pixels; of mixed ranks, alpha unequal to rank."""
    rng = torch.Generator().manual_seed(seed)
    modules = {}
    for i, (name, (N, K)) in enumerate(linear_shapes(base).items()):
        if name.endswith(suffixes):
            rank = 1 + i % 3
            A, B = torch.randn(rank, K, generator=rng), torch.randn(N, rank, generator=rng)
            modules[name] = LoraModule(A / K**0.5, B * 2, 0.5 + i % 2)
    return modules


@pytest.fixture(scope="module")
def collection(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("collection") / "collection.safetensors"
    targets = ("to_q", "to_out.0", "add_k_proj", "img_mlp.net.2", "img_mod.1", "txt_mod.1", "proj_out")
    modules = random_modules(random_base, targets)
    write_collection(path, modules, CATALOGUE, dtype=torch.float32)
    return path


@pytest.fixture(scope="module")
def editor(random_base: Path, collection: Path) -> Editor:
    return load_editor(str(random_base), collection, "cpu", torch.float32)


def stock_image(
    base: Path,
    lora: Path | None,
    monkeypatch: pytest.MonkeyPatch,
    image: Image.Image,
    prompt: str,
    seed: int,
    num_steps: int,
    stochastic: bool,
    **kwargs: Any,
) -> NDArray[np.uint8]:
    """What diffusers itself makes: its loader of pipelines, LoRAs, its scheduler, its loop."""
    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", AREA)
    monkeypatch.setattr(stock, "CONDITION_IMAGE_SIZE", AREA)
    loaded = Qwen2VLImageProcessorPil.from_pretrained(base / "processor")
    tokenizer = Qwen2Tokenizer.from_pretrained(base / "tokenizer")
    pipeline = QwenImageEditPlusPipeline.from_pretrained(
        base, processor=StillImageProcessor(image_processor=loaded, tokenizer=tokenizer)
    )
    pass_token_types(pipeline.text_encoder)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
        stochastic_sampling=stochastic, shift=3.0, use_dynamic_shifting=False
    )
    pipeline.set_progress_bar_config(disable=True)
    # The pipeline leaves the fresh noise of each step to torch's global generator; the scheduler can do
    # better.
    generator = torch.Generator().manual_seed(seed)
    pipeline.scheduler.step = functools.partial(pipeline.scheduler.step, generator=generator)
    width, height = stock.calculate_dimensions(AREA, image.width / image.height)
    made = pipeline(
        image=[image],
        prompt=prompt,
        width=width,
        height=height,
        sigmas=np.linspace(1.0, 1 / num_steps, num_steps).tolist(),
        num_inference_steps=num_steps,
        generator=generator,
        **kwargs,
    )
    return np.asarray(made.images[0])


def difference(a: Image.Image | NDArray[np.uint8], b: Image.Image | NDArray[np.uint8]) -> int:
    """Largest difference of a pixel, in 1/255."""
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


# Against the stock pipeline


def test_edit_collection_is_the_stock_pipelines_image(
    random_base: Path, collection: Path, editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in.png", tmp_path / "out.png"
    image = picture(0)
    image.save(source)
    request = EditRequest((source,), output, str(random_base), collection, ("first",), seeds=(7,), dtype="float32")
    assert edit_files(request) == [output]
    args = (image, "<a_1>paint it", 7, 8, True)
    wanted = stock_image(random_base, collection, monkeypatch, *args, true_cfg_scale=1.0)
    made = Image.open(output)
    assert difference(made, wanted) <= 2
    # Every part shows: the LoRA, the prompt, the image, the seed, the fresh noise of each step.
    without = replace(editor, has_lora=False)
    assert difference(made, without.edit([image], ["first"], seeds=[7])[0]) > 20
    assert difference(made, editor.edit([image], ["first"], seeds=[8])[0]) > 20
    assert difference(made, editor.edit([image], ["second"], seeds=[7])[0]) > 4
    assert difference(made, editor.edit([picture(3)], ["first"], seeds=[7])[0]) > 4
    euler = replace(editor, sampling=replace(editor.sampling, sampler="euler"))
    assert difference(made, euler.edit([image], ["first"], seeds=[7])[0]) > 20


def test_edit_plain_lora_is_the_stock_pipelines_image(
    random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, image = tmp_path / "lora.safetensors", picture(1, 50, 70)
    # Not all of it within the default targets.
    write_lora(
        lora,
        random_modules(random_base, ("to_k", "add_v_proj", "txt_mod.1", "to_out.0", "proj_out"), 1),
        dtype=torch.float32,
    )
    editor = load_editor(str(random_base), lora, "cpu", torch.float32)
    made = editor.edit([image], prompt=PROMPT, seeds=[3], steps=5, guidance=3.0)[0]
    guided = {"true_cfg_scale": 3.0, "negative_prompt": " "}
    assert difference(made, stock_image(random_base, lora, monkeypatch, image, PROMPT, 3, 5, False, **guided)) <= 2
    assert difference(made, editor.edit([image], prompt=PROMPT, seeds=[3], steps=5, guidance=1.0)[0]) > 4
    without = replace(editor, has_lora=False).edit([image], prompt=PROMPT, seeds=[3], steps=5, guidance=3.0)[0]
    assert difference(made, without) > 20
    base = load_editor(str(random_base), None, "cpu", torch.float32)
    assert difference(base.edit([image], prompt=PROMPT, seeds=[3], steps=5, guidance=3.0)[0], without) <= 1


def test_load_editor_kohya_layout_gives_the_same_image(
    random_base: Path, collection: Path, editor: Editor, tmp_path: Path
) -> None:
    path = tmp_path / "kohya.safetensors"
    convert_lora(collection, path, "kohya")
    other = load_editor(str(random_base), path, "cpu", torch.float32)
    assert other.catalogue == CATALOGUE  # travels in the header
    assert difference(other.edit([picture(0)], ["first"])[0], editor.edit([picture(0)], ["first"])[0]) <= 1


# Prompts and batches


def test_edit_prompt_composes_two_effects_by_the_papers_sentence(editor: Editor) -> None:
    sentence = "Please apply <a_1>paint it to the input image, and then apply idem Describe it."
    assert edit_prompt(CATALOGUE, ["first", "second"]) == sentence
    assert edit_prompt(CATALOGUE, ["plain"]) == "color"
    composed = editor.edit([picture(0)], ["first", "second"], steps=2)[0]
    assert difference(composed, editor.edit([picture(0)], prompt=sentence, steps=2)[0]) == 0
    assert difference(composed, editor.edit([picture(0)], ["second", "first"], steps=2)[0]) > 0


@pytest.mark.parametrize(
    ("effects", "prompt", "message"),
    [
        (["frist"], None, "effect 'frist' is not in the collection; did you mean 'first'?"),
        ([], None, "an edit needs either effect names or a prompt"),
        (["first"], "paint it", "an edit needs either effect names or a prompt, and not both"),
        (["first", "second", "plain"], None, "3 effects were given, two can be composed"),
        ([], " ", "prompt: is blank"),
    ],
)
def test_edit_prompt_refuses(effects: list[str], prompt: str | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        edit_prompt(CATALOGUE, effects, prompt)
    assert message in str(caught.value)


def test_edit_result_depends_on_image_prompt_and_seed_alone(editor: Editor) -> None:
    images = [picture(0), picture(1, 50, 70), picture(2)]
    together = editor.edit(images, ["first"], seeds=[0, 5], steps=2, batch_size=4)
    assert len(together) == 6
    for index, image in enumerate(images):
        height, width = editor.backbone.output_size(image)
        for place, seed in enumerate([0, 5]):
            alone = editor.edit([image], ["first"], seeds=[seed], steps=2)[0]
            made = together[2 * index + place]
            assert made.size == alone.size == (width, height)
            assert difference(made, alone) <= 1
    assert difference(together[0], together[1]) > 20


def test_edit_refuses_images_that_are_not_rgb(editor: Editor) -> None:
    with pytest.raises(InputErrors) as caught:
        editor.edit([picture(0), picture(0).convert("RGBA"), picture(0).convert("L")], ["first"])
    assert len(caught.value.faults) == 2 and "image 1 has mode RGBA; make it RGB" in caught.value.faults[0]


def test_edit_grid_shows_source_and_every_effect(editor: Editor) -> None:
    images = [picture(0), picture(2)]
    (grid,) = editor.edit(images, seeds=[4], steps=1, grid=True)
    height, width = editor.backbone.output_size(images[0])
    scale = 3  # 64 pixels to 192
    pixels = np.asarray(grid)
    # Cells are found by what they must hold; the enlargement keeps a pixel's colour at its centre.
    for row, image in enumerate(images):
        expected = [image.resize((width, height), Image.Resampling.LANCZOS)]
        expected += [editor.edit([image], [name], seeds=[4], steps=1)[0] for name in ("first", "second", "plain")]
        places = [find(pixels, np.asarray(cell.resize((width * scale, height * scale), 0))) for cell in expected[1:]]
        assert [top for top, _ in places] == [places[0][0]] * 3
        assert sorted(left for _, left in places) == [left for _, left in places]
        assert places[0][0] // (height * scale) == row and places[0][1] >= width * scale


def find(picture: NDArray[np.uint8], cell: NDArray[np.uint8]) -> tuple[int, int]:
    """Top and left of `cell` in `picture`."""
    height, width = cell.shape[:2]
    for top, left in np.argwhere((picture == cell[0, 0]).all(-1)).tolist():
        if np.array_equal(picture[top : top + height, left : left + width], cell):
            return top, left
    raise AssertionError("the picture does not hold the cell")


def test_default_sampling_is_the_catalogues_or_the_presets() -> None:
    catalogue = CATALOGUE.model_copy(update={"schedule": CatalogueSchedule(num_steps=4, shift=5.0)})
    found = default_sampling("tiny", catalogue)
    assert (found.sampler, found.num_steps, found.shift, found.guidance) == ("consistency", 4, 5.0, 1.0)
    plain = default_sampling("Qwen/Qwen-Image-Edit-2509", None)
    assert (plain.sampler, plain.num_steps, plain.guidance, plain.negative_prompt) == ("euler", 40, 4.0, " ")


# Files


def request(folder: Path, names: tuple[str, ...], output: str, **changes: Any) -> EditRequest:
    return EditRequest(tuple(folder / name for name in names), folder / output, **changes)


def test_result_paths_names(tmp_path: Path) -> None:
    (tmp_path / "out.d").mkdir()

    def names(*args: Any, **changes: Any) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in result_paths(request(tmp_path, *args, **changes))]

    assert names(("a.png",), "b.JPG") == ["b.JPG"]
    assert names(("a.png",), "out") == ["out/a.png"] and names(("a.png",), "out.d") == ["out.d/a.png"]
    assert names(("a.png", "x/a.jpg", "y/a.png"), "out") == ["out/a.png", "out/a-2.png", "out/a-3.png"]
    assert names(("a.png", "b.png"), "out", seeds=(1, 2)) == [
        "out/a-seed1.png", "out/a-seed2.png", "out/b-seed1.png", "out/b-seed2.png"
    ]  # fmt: skip
    assert names(("a.png", "b.png"), "grid.webp", grid=True) == ["grid.webp"]


@pytest.mark.parametrize(
    ("names", "output", "grid", "message"),
    [
        (("a.png",), "b.tif", False, "has no known image format; name it .png"),
        (("a.png", "b.png"), "c.png", False, "2 images do not fit into"),
        (("a.png",), "out", True, "a grid is one file; name it"),
        (("a.png",), "a.png", False, "would overwrite an input"),
        (("out/a.png",), "out", False, "would overwrite an input"),
    ],
)
def test_result_paths_refuses(tmp_path: Path, names: tuple[str, ...], output: str, grid: bool, message: str) -> None:
    with pytest.raises(InputError) as caught:
        result_paths(request(tmp_path, names, output, grid=grid))
    assert message in str(caught.value)


def test_edit_files_lists_all_faults_before_loading(
    tmp_path: Path, collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit, "load_editor", lambda *_: pytest.fail("the base was loaded"))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputErrors) as caught:
        edit_files(
            request(
                tmp_path,
                ("none.png", "text.png"),
                "c.png",
                lora=collection,
                effects=("secnod",),
                device="gpu",
            )
        )
    faults = caught.value.faults
    assert len(faults) == 5
    parts = ("none.png does not exist", "text.png is not an image", "do not fit into", "'second'", "'gpu'")
    assert [part in fault for part, fault in zip(parts, faults, strict=True)] == [True] * 5
    picture(0).save(tmp_path / "in.png")
    with pytest.raises(InputErrors, match="base: is not given, and no catalogue names one"):
        edit_files(request(tmp_path, ("in.png",), "c.png", prompt=PROMPT))


def test_load_editor_refuses_a_lora_for_another_base(random_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    modules = {
        "transformer_blocks.0.attn.to_q": LoraModule(torch.ones(1, 7), torch.ones(48, 1), 1.0),
        "transformer_blocks.9.attn.to_q": LoraModule(torch.ones(1, 48), torch.ones(48, 1), 1.0),
    }
    write_lora(path, modules)
    with pytest.raises(InputErrors) as caught:
        load_editor(str(random_base), path)
    assert "transformer_blocks.9.attn.to_q" in str(caught.value) and "[48, 7]" in str(caught.value)


def test_with_collection_serves_effects_asked_of_a_bare_base(tmp_path: Path) -> None:
    asked = EditRequest((tmp_path / "in.png",), tmp_path / "out.png", base="tiny", effects=("sepia",))
    own = with_collection(asked).lora
    assert own is not None and "sepia" in [entry.name for entry in read_catalogue(own).effects]
    assert with_collection(replace(asked, lora=tmp_path / "mine.safetensors")).lora == tmp_path / "mine.safetensors"
    assert with_collection(replace(asked, effects=(), prompt="flip it")).lora is None
    assert with_collection(replace(asked, effects=(), grid=True)).lora == own


def test_load_editor_of_a_base_that_is_nowhere_is_one_clear_error(tmp_path: Path) -> None:
    write_lora(
        tmp_path / "a.safetensors",
        {"transformer_blocks.0.attn.to_q": LoraModule(torch.ones(1, 1), torch.ones(1, 1), 1.0)},
    )
    with pytest.raises(InputError, match="base owner/nowhere: is not .all. on this machine and .*; run `hf download"):
        load_editor("owner/nowhere", tmp_path / "a.safetensors")
