"""Reading pair datasets: every format, which side is the target, and every fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import clora.data.images as images
from clora.config import EffectConfig, build_config
from clora.data.pairs import Pair, read_dataset, read_pairs
from clora.errors import InputError, InputErrors
from clora.jobs.prompts import example_pairs

RED, BLUE = (255, 0, 0), (0, 0, 255)


def image(path: Path, colour: tuple[int, int, int] = RED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def rows(path: Path, *values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def faults_of(path: Path, **options: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        read_pairs(path, **options)  # type: ignore[arg-type]
    error = caught.value
    return error.faults if isinstance(error, InputErrors) else [str(error)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset folder with sources s0, s1, ... and targets t0, t1, ..."""
    for index in range(3):
        image(tmp_path / f"s{index}.png")
        image(tmp_path / f"t{index}.png", BLUE)
    return tmp_path


# ---- rows ----


@pytest.mark.parametrize(
    ("source_key", "target_key", "prompt_key"),
    [
        ("control_path", "image_path", "caption"),
        ("control_path_0", "image_path", "caption"),
        ("edit_image", "image", "prompt"),
        ("source_images", "target_image", "prompt"),
        ("source_image", "base_pred_image", "instruction"),
        ("source", "target", "caption"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_read_pairs_knows_which_side_is_the_target(
    root: Path, source_key: str, target_key: str, prompt_key: str, suffix: str
) -> None:
    path = root / f"pairs.{suffix}"
    values = [{source_key: f"s{i}.png", target_key: f"t{i}.png", prompt_key: f" make, it {i} "} for i in (1, 0)]
    if suffix == "csv":
        lines = [",".join(f'"{cell}"' for cell in row.values()) for row in values]
        path.write_text("\n".join([",".join(values[0]), *lines]))
    elif suffix == "json":
        path.write_text(json.dumps(values))
    else:
        rows(path, *values)
    pairs = read_pairs(path)
    assert [pair.source.name for pair in pairs] == ["s1.png", "s0.png"]
    assert [pair.target and pair.target.name for pair in pairs] == ["t1.png", "t0.png"]
    assert [pair.prompt for pair in pairs] == ["make, it 1", "make, it 0"]
    assert all(pair.source.is_absolute() and pair.source.is_file() for pair in pairs)
    assert pairs[1].place.endswith({"jsonl": "line 2", "json": "item 2", "csv": "line 3"}[suffix])


def test_several_sources_keep_their_order(root: Path) -> None:
    numbered = {f"control_path_{i}": f"s{i % 3}.png" for i in (10, 2, 0)}
    path = rows(
        root / "a.jsonl",
        {"image_path": "t0.png", **numbered},
        {"image": "t0.png", "edit_image": ["s2.png", "s0.png"]},
        {"target_image": "t0.png", "source_images": ["s1.png"], "prompt": "p"},
    )
    names = [[source.name for source in pair.sources] for pair in read_pairs(path)]
    assert names == [["s0.png", "s2.png", "s1.png"], ["s2.png", "s0.png"], ["s1.png"]]
    path = root / "a.csv"
    path.write_text('image,edit_image\nt0.png,"[""s2.png"", ""s0.png""]"\n')
    assert [source.name for source in read_pairs(path)[0].sources] == ["s2.png", "s0.png"]


def test_a_file_name_may_start_with_a_bracket(root: Path) -> None:
    image(root / "[1] a.png")
    path = rows(root / "a.jsonl", {"image": "t0.png", "edit_image": "[1] a.png"})
    assert read_pairs(path)[0].source.name == "[1] a.png"


def test_authors_rows_are_chosen_by_effect(root: Path) -> None:
    values = [
        {"source_image": f"s{i}.png", "base_pred_image": f"t{i}.png", "instruction": "x", "lora_name": name}
        for i, name in enumerate(["clay", "felt", "clay"])
    ]
    path = rows(root / "a.jsonl", *values, {"source_image": "s1.png", "base_pred_image": "t1.png"})
    assert [pair.effect for pair in read_pairs(path)] == ["clay", "felt", "clay", None]
    assert [pair.source.name for pair in read_pairs(path, effect="clay")] == ["s0.png", "s2.png", "s1.png"]
    path = rows(root / "b.jsonl", *values)
    assert faults_of(path, effect="wool") == [f"{path}: no row is of effect 'wool'; lora_name is one of clay, felt"]


def test_general_rows_need_no_target(root: Path) -> None:
    path = rows(root / "a.jsonl", {"source_image": "s0.png", "instruction": "make the sky red"})
    assert "base_pred_image (the target" in faults_of(path)[0]
    (pair,) = read_pairs(path, require_target=False)
    assert pair == Pair((root / "s0.png",), None, "make the sky red", None, f"{path} line 1")


def test_a_half_of_a_character_in_a_caption_is_a_fault_by_its_line(root: Path) -> None:
    """JSON can spell a surrogate without its pair, as of an emoji that was cut in two; no encoder takes it."""
    path = root / "a.jsonl"
    path.write_text('{"image": "t0.png", "edit_image": "s0.png", "prompt": "make it clay \\ud83d"}\n')
    (fault,) = faults_of(path)
    assert fault.startswith(f"{path} line 1: prompt holds half of a character")


def test_every_fault_of_a_file_is_listed_with_its_line(root: Path) -> None:
    (root / "sub").mkdir()
    path = root / "a.jsonl"
    path.write_text(
        "\n".join(
            [
                '{"image": "t0.png", "edit_image": "s0.png"}',
                '{"image": "gone.png", "edit_image": "also_gone.png"}',
                '{"image": "t0.png"',
                '{"image": "t0.png", "caption": "no source"}',
                '{"image": "t0.png", "edit_image": "s0.png", "control_path": "s0.png"}',
                '{"image": 5, "edit_image": "s0.png", "prompt": ["x"]}',
                '{"image": "../out.png", "edit_image": "/etc/passwd"}',
                '{"image": "sub", "edit_image": []}',
                '{"image": "t0.png", "edit_image": ["s0.png", ""]}',
            ]
        )
    )
    faults = [fault.removeprefix(f"{path} ") for fault in faults_of(path)]
    # Lines that are no JSON come first, as they are found first.
    assert faults[0].startswith("line 3: not valid JSON")
    assert faults[1:] == [
        "line 2: edit_image 'also_gone.png' does not exist; correct the path or remove the row",
        "line 2: image 'gone.png' does not exist; correct the path or remove the row",
        *[fault for fault in faults if fault.startswith(("line 4: keys caption, image fit no", "line 5: keys"))],
        "line 6: image must be the path of an image",
        "line 6: prompt must be text",
        f"line 7: edit_image: /etc/passwd leads outside {root}; move it inside or add /etc to data_roots",
        f"line 7: image: ../out.png leads outside {root}; move it inside or add {root.parent} to data_roots",
        "line 8: edit_image names no image",
        "line 8: image 'sub' does not exist; correct the path or remove the row",
        "line 9: edit_image must be the path of an image",
    ]
    assert len(faults) == 12 and "image_path (musubi-tuner)" in faults[3]


def test_paths_into_data_roots_are_allowed(tmp_path: Path) -> None:
    source = image(tmp_path / "photos" / "s.png")
    target = image(tmp_path / "set" / "t.png")
    path = rows(tmp_path / "set" / "a.jsonl", {"image": "t.png", "edit_image": str(source)})
    assert "leads outside" in faults_of(path)[0]
    (pair,) = read_pairs(path, [tmp_path / "photos"])
    assert (pair.source, pair.target) == (source, target)


# ---- folders ----


@pytest.mark.parametrize(
    ("target", "source"), [("target", "source"), ("folder_path", "control_path"), ("Targets", "Control")]
)
def test_folders_are_matched_by_stem(tmp_path: Path, target: str, source: str) -> None:
    for stem in ("b", "a"):
        image(tmp_path / target / f"{stem}.png", BLUE)
        image(tmp_path / source / f"{stem}.jpg")
    (tmp_path / target / "a.txt").write_text(" change it\n")
    (tmp_path / target / ".hidden.png").touch()
    (tmp_path / source / "notes.md").touch()
    pairs = read_pairs(tmp_path)
    assert [(p.source.name, p.target and p.target.name, p.prompt) for p in pairs] == [
        ("a.jpg", "a.png", "change it"),
        ("b.jpg", "b.png", None),
    ]
    assert pairs[0].target is not None and pairs[0].target.parent.name == target


def test_numbered_source_folders_make_several_sources(tmp_path: Path) -> None:
    for folder in ("target", "control_1", "control_2"):
        image(tmp_path / folder / "a.png")
    (pair,) = read_pairs(tmp_path)
    assert [source.parent.name for source in pair.sources] == ["control_1", "control_2"]


def test_folder_faults_are_all_listed(tmp_path: Path) -> None:
    for name in ("target/a.png", "target/b.png", "source/b.png", "source/c.png", "source/b.jpg"):
        image(tmp_path / name)
    assert faults_of(tmp_path) == [
        f"{tmp_path / 'source'}: two images are called 'b'; rename one, with its partner",
        f"{tmp_path}: image 'a' has no partner in source/; add it or remove the others",
        f"{tmp_path}: image 'c' has no partner in target/; add it or remove the others",
    ]


def test_a_folder_without_the_two_sides_says_what_it_holds(tmp_path: Path) -> None:
    image(tmp_path / "before" / "a.png")
    image(tmp_path / "after" / "a.png")
    (fault,) = faults_of(tmp_path)
    assert "one subfolder named target and one named source" in fault
    assert fault.endswith("it holds after/, before/")
    (tmp_path / "target").mkdir()
    (tmp_path / "targets").mkdir()
    image(tmp_path / "source" / "a.png")
    assert "holds both target/ and targets/; keep one" in faults_of(tmp_path)[0]


def test_a_flat_folder_is_sources_with_instructions(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_text("do it")
    assert "must hold one subfolder named target" in faults_of(tmp_path)[0]
    pairs = read_pairs(tmp_path, require_target=False)
    assert [(p.source.name, p.target, p.prompt) for p in pairs] == [
        ("a.png", None, None),
        ("b.jpg", None, "do it"),
    ]


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    outside = image(tmp_path / "outside.png")
    root = tmp_path / "set"
    image(root / "target" / "a.png")
    (root / "source").mkdir()
    (root / "source" / "a.png").symlink_to(outside)
    assert "leads outside" in faults_of(root)[0]
    assert read_pairs(root, [tmp_path])[0].source == outside


def test_a_folder_with_metadata_is_read_through_it(root: Path) -> None:
    rows(root / "metadata.jsonl", {"image": "t0.png", "edit_image": "s0.png"})
    assert read_pairs(root)[0].source == root / "s0.png"
    (root / "metadata.csv").write_text("image,edit_image\nt1.png,s1.png\n")
    assert "metadata.jsonl, metadata.csv; keep one" in faults_of(root)[0]
    (root / "metadata.jsonl").unlink()
    assert read_pairs(root)[0].source == root / "s1.png"


@pytest.mark.parametrize("form", ["yaml", "json", "job"])
def test_a_file_that_names_folder_path_and_control_path(tmp_path: Path, form: str) -> None:
    image(tmp_path / "after" / "a.png", BLUE)
    image(tmp_path / "before" / "a.png")
    image(tmp_path / "style" / "a.webp")
    (tmp_path / "after" / "a.caption").write_text("own words")
    image(tmp_path / "after" / "b.png")
    image(tmp_path / "before" / "b.png")
    image(tmp_path / "style" / "b.png")
    dataset = {
        "folder_path": "after",
        "control_path": ["before", "style"],
        "caption_ext": "caption",
        "default_caption": "default words",
        "resolution": [512],
    }
    path = tmp_path / ("set.json" if form == "json" else "set.yaml")
    value = {"job": "extension", "config": {"process": [{"datasets": [dataset]}]}} if form == "job" else dataset
    path.write_text(json.dumps(value))  # JSON is YAML
    pairs = read_pairs(path)
    assert [[source.parent.name for source in pair.sources] for pair in pairs] == [["before", "style"]] * 2
    assert [pair.target and pair.target.parent.name for pair in pairs] == ["after"] * 2
    assert [pair.prompt for pair in pairs] == ["own words", "default words"]


def test_faults_of_a_file_that_names_folders(tmp_path: Path) -> None:
    (tmp_path / "after").mkdir()
    path = tmp_path / "set.yaml"
    path.write_text("datasets:\n- {folder_path: after}\n- {folder_path: gone, control_path: /etc}\n")
    faults = faults_of(path)
    assert f"{path} dataset 1: has no control_path" in faults[0]
    assert f"{path} dataset 2: folder_path 'gone' is not a folder" in faults[1]
    assert "/etc leads outside" in faults[2] and len(faults) == 3
    path.write_text("a: 1\n")
    assert "has no folder_path" in faults_of(path)[0]
    path.write_text("a: [\n")
    assert "not valid YAML" in faults_of(path)[0]


# ---- subfolders, numbered files, and what is left out ----


def both(root: Path, *names: str) -> Path:
    """An image of each of these names on both sides."""
    for name in names:
        image(root / "target" / name, BLUE)
        image(root / "source" / name)
    return root


def keys(pairs: list[Pair]) -> list[str]:
    return [pair.place.removeprefix("target/") for pair in pairs]


def test_images_in_subfolders_are_pairs_by_their_path(tmp_path: Path) -> None:
    both(tmp_path, "a.png", "portraits/a.png", "portraits/dogs/b.png")
    (tmp_path / "target" / "portraits" / "a.txt").write_text("in a portrait")
    found = read_dataset(tmp_path)
    assert keys(found.pairs) == ["a", "portraits/a", "portraits/dogs/b"] and not found.left_out
    assert [pair.prompt for pair in found.pairs] == [None, "in a portrait", None]
    assert found.pairs[1].source == tmp_path / "source" / "portraits" / "a.png"
    (tmp_path / "source" / "portraits" / "a.png").unlink()
    both(tmp_path, "portraits/c.png")
    assert faults_of(tmp_path) == [
        f"{tmp_path}: image 'portraits/a' has no partner in source/; add it or remove the others"
    ]


def test_a_subfolder_of_one_side_is_left_out_and_told(tmp_path: Path) -> None:
    both(tmp_path, "a.png")
    for i in range(5):
        image(tmp_path / "target" / "rejected" / f"{i}.png")
    image(tmp_path / "source" / "_controls" / "a.png")
    found = read_dataset(tmp_path)
    assert keys(found.pairs) == ["a"]
    rejected = f"{tmp_path}/target/rejected: 5 files left out: 0.png, 1.png, 2.png and 2 more"
    assert sorted(found.left_out) == [
        f"{tmp_path}/source: 1 file left out: _controls (other tools keep their caches in folders with a leading _;"
        " rename it)",
        f"{rejected} (there is no rejected/ with images in source/)",
    ]


def test_a_side_inside_the_other_is_no_subfolder_of_it(tmp_path: Path) -> None:
    image(tmp_path / "data" / "a.png", BLUE)
    image(tmp_path / "data" / "control" / "a.png")
    path = tmp_path / "set.yaml"
    path.write_text("{folder_path: data, control_path: data/control}")
    found = read_dataset(path)
    assert [pair.sources for pair in found.pairs] == [(tmp_path / "data" / "control" / "a.png",)] and not found.left_out


def test_links_that_lead_back_or_outside_are_not_walked(tmp_path: Path) -> None:
    both(tmp_path / "set", "a.png")
    (tmp_path / "set" / "source" / "again").symlink_to(tmp_path / "set" / "source")
    assert keys(read_dataset(tmp_path / "set").pairs) == ["a"]
    (tmp_path / "set" / "target" / "all").symlink_to("/")
    (fault,) = faults_of(tmp_path / "set")
    assert "/target/all leads outside" in fault


def test_numbered_control_images_are_references_in_order(tmp_path: Path) -> None:
    """musubi-tuner's layout: any number of digits, from 0 or 1; a target of that very name has its own."""
    for name in ("a", "b", "b_1", "c"):
        image(tmp_path / "target" / f"{name}.png", BLUE)
    for name in ("a_1", "a_0", "a_2", "b", "b_1", "c_0001", "c_0002"):
        image(tmp_path / "control" / f"{name}.png")
    pairs = read_pairs(tmp_path)
    assert [[source.stem for source in pair.sources] for pair in pairs] == [
        ["a_0", "a_1", "a_2"], ["b"], ["b_1"], ["c_0001", "c_0002"],
    ]  # fmt: skip
    for number in range(9, 12):  # by their numbers, not by their letters
        image(tmp_path / "control" / f"a_{number}.png")
    for number in range(3, 9):
        image(tmp_path / "control" / f"a_{number}.png")
    assert [source.stem for source in read_pairs(tmp_path)[0].sources] == [f"a_{number}" for number in range(12)]


def test_numbered_files_with_a_gap_or_beside_a_partner_are_faults(tmp_path: Path) -> None:
    both(tmp_path, "a.png", "b.png")
    image(tmp_path / "source" / "a_1.png")  # the target a_1 was lost: no second reference of a
    assert faults_of(tmp_path) == [f"{tmp_path}: image 'a_1' has no partner in target/; add it or remove the others"]
    (tmp_path / "source" / "a.png").unlink()
    image(tmp_path / "source" / "a_3.png")
    assert len(faults_of(tmp_path)) == 3


def test_files_of_unread_formats_are_told_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both(tmp_path, "a.png")
    for name in ("b.psd", "b.mp4", ".hidden.psd", "Thumbs.db", "a.safetensors"):
        (tmp_path / "target" / name).write_bytes(b"x")
    (tmp_path / "source" / "IMG_1.HEIC").write_bytes(b"x")
    (tmp_path / "source" / "a.heic").write_bytes(b"x")
    monkeypatch.setattr(images, "reads_heif", lambda: False)
    assert read_dataset(tmp_path).left_out == [
        f"{tmp_path}/target: 2 files left out: b.mp4, b.psd ({images.UNKNOWN_FORMAT})",
        f"{tmp_path}/source: 2 files left out: IMG_1.HEIC, a.heic ({images.NO_HEIF})",
    ]
    image(tmp_path / "target" / "IMG_1.png")
    (fault,) = faults_of(tmp_path)
    assert "image 'IMG_1' has no partner in source/ but IMG_1.HEIC, which is left out (HEIC needs" in fault
    (tmp_path / "target" / "IMG_1.png").unlink()
    (tmp_path / "source" / "a.png").unlink()
    (tmp_path / "target" / "a.png").unlink()
    faults = faults_of(tmp_path)
    assert "holds no pairs" in faults[0] and any("clora[heif]" in fault for fault in faults[1:])


def test_a_heic_beside_its_jpeg_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "reads_heif", lambda: True)
    both(tmp_path, "IMG_1.jpg")
    (tmp_path / "source" / "IMG_1.HEIC").write_bytes(b"x")
    found = read_dataset(tmp_path)
    assert found.pairs[0].source.name == "IMG_1.jpg"
    assert found.left_out == [f"{tmp_path}/source: 1 file left out: IMG_1.HEIC (IMG_1.jpg has its name)"]


def test_captions_that_nothing_reads_are_told(tmp_path: Path) -> None:
    both(tmp_path, "a.png", "b.png", "c.png")
    for place in ("target/a", "source/a", "source/b", "target/d"):  # a copy of a caption that is read is none
        (tmp_path / f"{place}.txt").write_text("words")
    found = read_dataset(tmp_path)
    assert [pair.prompt for pair in found.pairs] == ["words", None, None]
    why = "a caption is read beside the target image, under its name"
    assert found.left_out == [
        f"{tmp_path}/target: 1 file left out: d.txt ({why})",
        f"{tmp_path}/source: 1 file left out: b.txt ({why})",
    ]


def test_a_flat_folder_is_read_with_its_subfolders_unless_they_are_two_sides(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / "dogs" / "b.png")
    image(tmp_path / "cats" / "c.png")
    (tmp_path / "cats" / "c.txt").write_text("do it")
    found = read_dataset(tmp_path, require_target=False)
    assert [(pair.source.name, pair.prompt) for pair in found.pairs] == [
        ("a.png", None),
        ("c.png", "do it"),
        ("b.png", None),
    ]
    image(tmp_path / "dogs" / "c.png")
    found = read_dataset(tmp_path, require_target=False)
    assert [pair.source.name for pair in found.pairs] == ["a.png"]
    assert len(found.left_out) == 2 and all("call the two sides source and target" in line for line in found.left_out)


def test_read_pairs_warns_of_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    both(tmp_path, "a.png")
    (tmp_path / "source" / "b.psd").write_bytes(b"x")
    assert len(read_pairs(tmp_path)) == 1
    assert [record.message for record in caplog.records] == read_dataset(tmp_path).left_out
    assert "b.psd" in caplog.records[0].message


# ---- what is no dataset ----


def test_other_paths_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in faults_of(tmp_path / "none")[0]
    assert "does not exist" in faults_of(tmp_path / "none.jsonl")[0]
    assert "is no dataset" in faults_of(image(tmp_path / "a.png"))[0]
    assert "holds no pairs" in faults_of(rows(tmp_path / "a.jsonl"))[0]
    (tmp_path / "set" / "target").mkdir(parents=True)
    (tmp_path / "set" / "source").mkdir()
    assert "holds no pairs" in faults_of(tmp_path / "set")[0]


# ---- examples for rewriting ----


def test_example_pairs_are_drawn_by_the_seed(tmp_path: Path) -> None:
    for index in range(12):
        image(tmp_path / "set" / "source" / f"{index:02}.png", (index, 0, 0))
        image(tmp_path / "set" / "target" / f"{index:02}.png", (index, 255, 0))
    effect = {"name": "a", "prompt": "p", "pairs": "set"}

    def drawn(seed: int) -> list[tuple[int, int]]:
        config = build_config({"output_dir": "o", "seed": seed, "effects": [effect]}, tmp_path)
        pairs = example_pairs(config, config.effects[0])
        assert all(source.getpixel((0, 0))[0] == target.getpixel((0, 0))[0] for source, target in pairs)
        assert all(target.getpixel((0, 0))[1] == 255 for _, target in pairs)
        return [source.getpixel((0, 0))[0] for source, _ in pairs]

    assert drawn(1) == drawn(1)
    assert len(set(drawn(1))) == 2
    assert len({tuple(drawn(seed)) for seed in range(6)}) > 1


def test_example_pairs_of_an_effect_without_targets_are_none(tmp_path: Path) -> None:
    image(tmp_path / "flat" / "a.png")
    values = {"output_dir": "o", "effects": [{"name": "a", "prompt": "p", "pairs": "flat"}]}
    config = build_config(values, tmp_path)
    assert example_pairs(config, config.effects[0]) == []
    assert example_pairs(config, EffectConfig(name="b", prompt="p")) == []


# ---- layouts of public sets ----


def test_read_pairs_omniconsistency_paths_start_above_the_file(tmp_path: Path) -> None:
    source, target = image(tmp_path / "LEGO/src/1.png"), image(tmp_path / "LEGO/tar/1.png", BLUE)
    image(tmp_path / "LEGO/LEGO/src/1.png")  # where a path from the file itself would lead
    place = rows(tmp_path / "LEGO/train.jsonl", {"src": "LEGO/src/1.png", "tar": "LEGO/tar/1.png", "prompt": "lego"})
    (pair,) = read_pairs(place)
    assert (pair.sources, pair.target, pair.prompt) == ((source,), target, "lego")


def test_read_pairs_omniconsistency_stays_below_the_folder_above(tmp_path: Path) -> None:
    image(tmp_path / "secret.png")
    place = rows(tmp_path / "set/LEGO/train.jsonl", {"src": "../secret.png", "tar": "../secret.png"})
    assert all("leads outside" in fault or "outside" in fault for fault in faults_of(place))


def test_read_pairs_fal_pairs_start_with_end(tmp_path: Path) -> None:
    first, second = image(tmp_path / "a_start.png"), image(tmp_path / "a_start2.jpg")
    target = image(tmp_path / "a_end.png", BLUE)
    (tmp_path / "a.txt").write_text("make it blue")
    image(tmp_path / "b_start.png"), image(tmp_path / "b_end.png", BLUE)
    one, two = read_pairs(tmp_path)
    assert (one.sources, one.target, one.prompt) == ((first, second), target, "make it blue")
    assert two.prompt is None and two.target == tmp_path / "b_end.png"


def test_read_pairs_fal_names_each_side_that_lacks(tmp_path: Path) -> None:
    image(tmp_path / "a_start.png"), image(tmp_path / "b_end.png")
    image(tmp_path / "c_start.png"), image(tmp_path / "c_start3.png"), image(tmp_path / "c_end.png")
    image(tmp_path / "d_start.png"), image(tmp_path / "d_end.png"), image(tmp_path / "other.png")
    said = faults_of(tmp_path)
    assert [next(w for w in fault.split("'") if "_" in w and w[0] in "abc") for fault in said] == [
        "a_end", "b_start", "c_start2"
    ]  # fmt: skip


def test_read_dataset_fal_tells_of_what_is_no_side(tmp_path: Path) -> None:
    image(tmp_path / "d_start.png"), image(tmp_path / "d_end.png"), image(tmp_path / "other.png")
    found = read_dataset(tmp_path)
    assert len(found.pairs) == 1 and "other.png" in found.left_out[0]
