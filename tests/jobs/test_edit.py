"""edit: the same image as the stock pipeline, whatever else is in the call; faults found before any
weights."""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from numpy.typing import NDArray
from PIL import Image
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from clora.backbones.qwen_image.pipeline import StillImageProcessor, pass_token_types
from clora.data.images import load_image
from clora.errors import InputError, InputErrors, Stopped, WriteError
from clora.inference.edit_plan import EditRequest, plan_edit, result_paths, size_notes, with_collection
from clora.inference.edit_prompts import Job, edit_prompt
from clora.inference.editor import Editor, default_sampling, load_editor, swap_lora
from clora.jobs import edit
from clora.jobs.edit import edit_files
from clora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueSchedule, read_catalogue, write_collection
from clora.lora.convert import convert_lora
from clora.lora.files import write_lora
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


def picture(seed: int, width: int = 80, height: int = 80) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def random_modules(base: Path, suffixes: tuple[str, ...], seed: int = 0) -> dict[str, LoraModule]:
    """Large updates, so that they show in pixels; of mixed ranks, alpha unequal to rank."""
    rng = torch.Generator().manual_seed(seed)
    modules = {}
    with torch.device("meta"):
        model = QwenImageTransformer2DModel.from_config(
            QwenImageTransformer2DModel.load_config(base, subfolder="transformer")
        )
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for i, (name, linear) in enumerate(linears):
        if name.endswith(suffixes):
            rank, N, K = 1 + i % 3, linear.out_features, linear.in_features
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
    images: list[Image.Image],
    prompt: str,
    seed: int,
    num_steps: int,
    few_steps: bool,
    accelerate: Path | None = None,
    **kwargs: Any,
) -> NDArray[np.uint8]:
    """What diffusers itself makes: its loader of pipelines, LoRAs, its scheduler, its loop. Of few steps it is told the
    collection's schedule, else it takes the base's own."""
    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", AREA)
    monkeypatch.setattr(stock, "CONDITION_IMAGE_SIZE", AREA)
    loaded = Qwen2VLImageProcessorPil.from_pretrained(base / "processor")
    tokenizer = Qwen2Tokenizer.from_pretrained(base / "tokenizer")
    pipeline = QwenImageEditPlusPipeline.from_pretrained(
        base, processor=StillImageProcessor(image_processor=loaded, tokenizer=tokenizer)
    )
    pass_token_types(pipeline.text_encoder)
    if lora is not None:
        pipeline.load_lora_weights(str(lora), adapter_name="effect")
    if accelerate is not None:
        pipeline.load_lora_weights(str(accelerate), adapter_name="fast")
        pipeline.set_adapters(["effect", "fast"], [1.0, 1.0])
    if few_steps:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=3.0)
    pipeline.set_progress_bar_config(disable=True)
    # The pipeline leaves the fresh noise of each step to torch's global generator; the scheduler can do
    # better.
    generator = torch.Generator().manual_seed(seed)
    pipeline.scheduler.step = functools.partial(pipeline.scheduler.step, generator=generator)
    width, height = stock.calculate_dimensions(AREA, images[-1].width / images[-1].height)
    made = pipeline(
        image=images,
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
    args = ([image], "<a_1>paint it", 7, 8, True)
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
    lora, image = tmp_path / "lora.safetensors", picture(1, 50, 150)
    # Not all of it within the default targets.
    write_lora(
        lora,
        random_modules(random_base, ("to_k", "add_v_proj", "txt_mod.1", "to_out.0", "proj_out"), 1),
        dtype=torch.float32,
    )
    editor = load_editor(str(random_base), lora, "cpu", torch.float32)
    made = editor.edit([image], prompt=PROMPT, seeds=[3], steps=5, guidance=3.0)[0]
    guided = {"true_cfg_scale": 3.0, "negative_prompt": " "}
    assert difference(made, stock_image(random_base, lora, monkeypatch, [image], PROMPT, 3, 5, False, **guided)) <= 2
    assert difference(made, editor.edit([image], prompt=PROMPT, seeds=[3], steps=5, guidance=1.0)[0]) > 4
    without = replace(editor, has_lora=False).edit([image], prompt=PROMPT, seeds=[3], steps=5, guidance=3.0)[0]
    assert difference(made, without) > 20
    base = load_editor(str(random_base), None, "cpu", torch.float32)
    assert difference(base.edit([image], prompt=PROMPT, seeds=[3], steps=5, guidance=3.0)[0], without) <= 1


def test_swap_lora_with_acceleration_is_the_stock_pipelines_set_adapters(
    random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    effect, fast = tmp_path / "effect.safetensors", tmp_path / "fast.safetensors"
    write_lora(effect, random_modules(random_base, ("to_q", "img_mlp.net.2"), 1), dtype=torch.float32)
    write_lora(
        fast,
        random_modules(random_base, ("to_q", "to_v", "to_out.0", "img_mod.1", "img_mlp.net.2"), 2),
        dtype=torch.float32,
    )
    image = picture(3)
    base = str(random_base)
    editor = swap_lora(load_editor(base, None, "cpu", torch.float32), base, effect, fast)
    (made,) = editor.edit([image], prompt="paint it", seeds=[7], steps=8)
    args = (random_base, effect, monkeypatch, [image], "paint it", 7, 8, True)
    assert difference(made, stock_image(*args, fast, true_cfg_scale=1.0)) <= 2
    assert difference(made, stock_image(*args, true_cfg_scale=1.0)) > 20  # without the second LoRA


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
    images = [picture(0), picture(1, 50, 70), picture(2, 641, 479)]
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


def test_run_yields_results_as_they_are_made(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(0), picture(1, 50, 70), picture(2)]
    calls: list[int] = []
    sampled = Editor._sample

    def counted(self: Editor, jobs: Any, *args: Any) -> list[Image.Image]:
        calls.append(len(jobs))
        return sampled(self, jobs, *args)

    monkeypatch.setattr(Editor, "_sample", counted)
    jobs = [Job(index, PROMPT, seed) for index in range(3) for seed in (0, 1)]
    sampling = replace(editor.sampling, num_steps=1)
    made = editor.run(images, jobs, sampling=sampling, batch_size=3)
    first = next(made)
    assert first[0] == 0 and calls == [3]  # the first image's two, and the first of equal size after them
    assert [place for place, _ in made] == [1, 4, 2, 3, 5] and calls == [3, 2, 1]


def test_edit_keeps_the_shape_of_every_image(editor: Editor) -> None:
    for width, height in ((641, 479), (333, 777), (1000, 240), (64, 64), (900, 500)):
        (made,) = editor.edit([picture(0, width, height)], ["first"], steps=1)
        assert abs(np.log(made.width / made.height / (width / height))) < 0.05


# Several references


def test_edit_with_references_is_the_stock_pipelines_image(
    random_base: Path, collection: Path, editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is the last picture, whose shape the result has; the references are the first, as in training."""
    images = [picture(0, 96, 32), picture(1, 50, 150), picture(2)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    edit_files(
        request(
            tmp_path, ("2.png",), "out.png", base=str(random_base), lora=collection, effects=("first",), seeds=(7,),
            references=(tmp_path / "0.png", tmp_path / "1.png"), dtype="float32",
        )
    )  # fmt: skip
    made = load_image(tmp_path / "out.png")
    wanted = stock_image(random_base, collection, monkeypatch, images, "<a_1>paint it", 7, 8, True, true_cfg_scale=1.0)
    assert made.size == (64, 64) and difference(made, wanted) <= 2
    swapped = editor.edit([images[2]], ["first"], references=images[1::-1], seeds=[7])[0]
    without = editor.edit([images[2]], ["first"], seeds=[7])[0]
    assert difference(made, swapped) > 2 and difference(made, without) > 2
    # One call for several images gives each what it gets alone.
    two = editor.edit([images[2], picture(4)], ["first"], references=images[:2], seeds=[7], batch_size=2)
    assert difference(two[0], made) <= 1 and difference(two[1], two[0]) > 2


def test_editor_refuses_references_that_are_not_rgb(editor: Editor) -> None:
    with pytest.raises(InputErrors, match="reference 0 has mode L; make it RGB"):
        editor.edit([picture(0)], ["first"], references=[picture(0).convert("L")])


# Grids


def edit_grid(folder: Path, base: Path, collection: Path, names: tuple[str, ...], output: str, **changes: Any) -> Path:
    asked = request(
        folder, names, output, base=str(base), lora=collection, steps=1, grid=True, dtype="float32", **changes
    )
    (path,) = edit_files(asked)
    return path


def test_edit_files_grid_shows_source_and_every_effect(
    random_base: Path, collection: Path, editor: Editor, tmp_path: Path
) -> None:
    images = [picture(0), picture(2)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    path = edit_grid(tmp_path, random_base, collection, ("0.png", "1.png"), "grid.png", seeds=(4,))
    pixels = np.asarray(Image.open(path))
    # Cells are found by what they must hold; the enlargement keeps a pixel's colour.
    for row, image in enumerate(images):
        expected = [image.resize((64, 64), Image.Resampling.LANCZOS)]
        expected += [editor.edit([image], [name], seeds=[4], steps=1)[0] for name in ("first", "second", "plain")]
        places = [find(pixels, np.asarray(cell.resize((192, 192), 0))) for cell in expected]
        assert [top for top, _ in places] == [places[0][0]] * 4
        assert sorted(left for _, left in places) == [left for _, left in places]
        assert places[0][0] // 192 == row


def test_edit_files_grid_takes_columns_and_makes_a_page(random_base: Path, collection: Path, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    wide = edit_grid(tmp_path, random_base, collection, ("a.png",), "wide.png")
    narrow = edit_grid(tmp_path, random_base, collection, ("a.png",), "narrow.png", columns=2)
    assert Image.open(wide).width > 1.8 * Image.open(narrow).width
    page = edit_grid(tmp_path, random_base, collection, ("a.png",), "page.html", effects=("second",)).read_text()
    assert page.count("<img") == 2 and "second" in page and "collection.safetensors" in page


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
    assert (found.sampler, found.num_steps, found.shift, found.is_guided) == ("consistency", 4, 5.0, False)
    plain = default_sampling("Qwen/Qwen-Image-Edit-2509", None)
    assert (plain.sampler, plain.num_steps, plain.guidance, plain.negative_prompt) == ("euler", 40, 4.0, " ")
    assert plain.shift is None  # the base's own noise levels


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
    assert names(("a.png",), "grid.html", grid=True) == ["grid.html"]


@pytest.mark.parametrize(
    ("names", "output", "grid", "message"),
    [
        (("a.png",), "b.tif", False, "has no known image format; name it .png"),
        (("a.png",), "b.html", False, "has no known image format; name it .png"),
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


# Results are written as they are made


@pytest.fixture
def three(tmp_path: Path, random_base: Path, collection: Path) -> EditRequest:
    """Three images, one effect, two seeds."""
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    asked = request(tmp_path, ("0.png", "1.png", "2.png"), "out", base=str(random_base), lora=collection)
    return replace(asked, effects=("first",), seeds=(0, 1), steps=1, dtype="float32")


def after(results: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sampling end in `error` once so many results are there."""
    run = Editor.run

    def cut(self: Editor, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Image.Image]]:
        made = run(self, *args, **kwargs)
        for _ in range(results):
            yield next(made)
        raise error

    monkeypatch.setattr(Editor, "run", cut)


def test_edit_files_interrupted_keeps_what_is_made(three: EditRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        after(4, KeyboardInterrupt(), patched)
        with pytest.raises(Stopped, match=r"stopped: 4 of 6 images written to .*out; give the other images or seeds"):
            edit_files(three)
    made = {path.name: Image.open(path).size for path in three.output.iterdir()}
    assert made == {f"{number}-seed{seed}.png": (64, 64) for number in (0, 1) for seed in (0, 1)}
    before = {path: path.read_bytes() for path in three.output.iterdir()}
    assert len(edit_files(three)) == 6
    assert all(path.read_bytes() == content for path, content in before.items())


def test_edit_files_interrupted_grid_is_written_with_what_is_made(
    three: EditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(three, grid=True, effects=(), seeds=(0,), output=three.output.with_name("grid.html"))
    after(5, KeyboardInterrupt(), monkeypatch)
    with pytest.raises(Stopped, match=r"5 of 9 images written to .*grid.html; the same command makes them anew"):
        edit_files(asked)
    page = asked.output.read_text()
    assert page.count("<img") == 3 + 5 and page.count('class="missing"') == 4


def test_edit_files_says_when_the_disk_is_full_and_keeps_the_rest(
    three: EditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    replace_by = Path.replace

    def full(self: Path, target: Path) -> Path:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(Path(target))
        return replace_by(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(WriteError) as caught:
        edit_files(three)
    assert "1-seed0.png could not be written, the disk is full; make room, or write elsewhere" in str(caught.value)
    assert "(2 of 6 images are written)" in str(caught.value)
    assert sorted(three.output.iterdir()) == sorted(written)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("0.png/x.png", "0.png is no folder; choose another place"),
        ("0.png/below", "0.png is no folder"),
        (f"{'n' * 300}.png", "its name is longer than 255 bytes"),
        ("out", "out/1.png is a folder, where a file is to be written"),
    ],
)
def test_edit_files_checks_the_place_before_loading(
    three: EditRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, message: str
) -> None:
    monkeypatch.setattr(edit, "load_editor", lambda *_: pytest.fail("the base was loaded"))
    (tmp_path / "out" / "1.png").mkdir(parents=True)
    with pytest.raises(InputErrors, match=message):
        edit_files(replace(three, images=three.images[1:2], seeds=(0,), output=tmp_path / output))


def test_edit_files_names_images_of_an_impossible_shape_before_loading(
    three: EditRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit, "load_editor", lambda *_: pytest.fail("the base was loaded"))
    picture(0, 4000, 12).save(tmp_path / "flat.png")
    picture(0, 3, 2000).save(tmp_path / "narrow.png")
    given = (*three.images, tmp_path / "flat.png")
    with pytest.raises(InputErrors) as caught:
        edit_files(replace(three, images=given, references=(tmp_path / "narrow.png",)))
    flat, narrow = caught.value.faults
    assert "flat.png: an image of 4000x12 pixels is too flat for this base; crop it" in flat
    assert "narrow.png: an image of 3x2000 pixels is too narrow" in narrow


def test_size_notes_say_what_is_made_of_other_shapes(three: EditRequest, tmp_path: Path) -> None:
    picture(0, 641, 479).save(tmp_path / "a.png")
    picture(1, 641, 479).save(tmp_path / "b.png")
    picture(2, 640, 480).save(tmp_path / "c.png")
    named = tuple(tmp_path / name for name in ("a.png", "0.png", "b.png", "c.png"))
    assert size_notes(plan_edit(replace(three, images=named))) == [
        "a.png and 1 more: 641x479 pixels, made as 64x48, aspect ratio 0.4% off"
    ]


def test_edit_files_takes_many_images_a_few_at_a_time(
    three: EditRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    run = Editor.run

    def watched(self: Editor, images: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Image.Image]]:
        at_once.append(len(images))
        return run(self, images, *args, **kwargs)

    monkeypatch.setattr(Editor, "run", watched)
    whole = [path.read_bytes() for path in edit_files(three)]
    shutil.rmtree(three.output)
    monkeypatch.setattr(edit, "CHUNK", 2)
    assert [path.read_bytes() for path in edit_files(three)] == whole
    assert at_once == [3, 2, 1]


def test_plan_edit_refuses_columns_without_a_grid(three: EditRequest) -> None:
    with pytest.raises(InputErrors, match="columns: are of a grid; add --grid"):
        plan_edit(replace(three, columns=3))
