"""A benchmark's file: its cells and folders, and every fault by name before anything is loaded."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from clora.config import resolve_base
from clora.errors import InputError, InputErrors
from clora.evaluate.benchmark import cells, missing_results, read_benchmark
from clora.lora.catalogue import read_catalogue


def picture(path: Path, value: int = 0, size: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)
    return path


@pytest.fixture
def bench(tmp_path):
    for kind, name, value in (("cats", "tom", 10), ("cats", "felix", 60), ("boats", "titanic", 200)):
        picture(tmp_path / kind / f"{name}.png", value)
    picture(tmp_path / "t0.png"), picture(tmp_path / "t1.png", 90)
    return {
        "output_dir": "out",
        "effects": [
            {"name": "sepia", "instruction": "i", "criteria": "c", "template": ["t0.png", "t1.png"]},
            {
                "name": "wet",
                "instruction": "j",
                "criteria": "d",
                "template": ["t0.png", "t1.png"],
                "categories": ["boat"],
            },
        ],
        "images": {"cat": "cats", "boat": ["boats/titanic.png"]},
        "methods": [{"name": "theirs", "images": "made"}],
        "judge": {"url": "http://j/v1", "model": "m"},
    }


def write(folder: Path, bench: dict) -> Path:
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(bench, sort_keys=False))
    return path


def test_cells_follow_categories_effects_pictures_and_seeds(tmp_path, bench):
    found = [(c.category, c.effect, c.key) for c in cells(read_benchmark(write(tmp_path, bench)))]
    assert found == [
        ("cat", "sepia", "felix"),
        ("cat", "sepia", "tom"),
        ("boat", "sepia", "titanic"),
        ("boat", "wet", "titanic"),
    ]
    seeds = [c.key for c in cells(read_benchmark(write(tmp_path, bench | {"seeds": [3, 5]}))) if c.effect == "wet"]
    assert seeds == ["titanic_3", "titanic_5"]


def test_cells_lie_where_the_layout_says(tmp_path, bench):
    bench["methods"].append({"name": "ours", "lora": "ours.safetensors"})
    (tmp_path / "ours.safetensors").write_bytes(b"")
    paths = {c.path for c in cells(read_benchmark(write(tmp_path, bench)))}
    assert tmp_path / "made/cat/sepia/tom.png" in paths
    assert tmp_path / "out/results/ours/boat/wet/titanic.png" in paths


def test_read_benchmark_takes_effects_from_a_catalogue(tmp_path, bench):
    """What the file says itself stands; the effects of a file that lists none are all of the collection's."""
    collection = Path(resolve_base("tiny")) / "collection.safetensors"
    (tmp_path / "ours.safetensors").write_bytes(collection.read_bytes())
    catalogue = {entry.name: entry.student_prompt for entry in read_catalogue(collection).effects}
    del bench["judge"], bench["effects"][0]["instruction"]
    bench["effects"][1]["name"] = "snow"
    found = read_benchmark(write(tmp_path, bench | {"catalogue": "ours.safetensors"})).effects
    assert [(one.instruction, one.student_prompt) for one in found] == [
        (catalogue["sepia"],) * 2, ("j", catalogue["snow"]),
    ]  # fmt: skip
    assert found[0].criteria == "c" and found[1].categories == ["boat"]
    del bench["effects"]
    found = read_benchmark(write(tmp_path, bench | {"catalogue": "ours.safetensors"})).effects
    assert {one.name: one.instruction for one in found} == catalogue and len(found) > 40


def test_read_benchmark_names_what_a_catalogue_lacks(tmp_path, bench):
    collection = Path(resolve_base("tiny")) / "collection.safetensors"
    del bench["effects"][1]["instruction"]
    for catalogue, says in ((str(collection), "effects.1.instruction"), ("t0.png", "t0.png"), ("no.st", "no.st")):
        with pytest.raises(InputError, match=says):
            read_benchmark(write(tmp_path, bench | {"catalogue": catalogue}))


def test_missing_results_name_absent_and_mixed_up_pictures(tmp_path, bench):
    found = list(cells(read_benchmark(write(tmp_path, bench))))
    for cell in found[1:]:
        picture(cell.path)
        picture(cell.source_copy, np.asarray(Image.open(cell.source))[0, 0, 0].item())
    (fault,) = missing_results(read_benchmark(write(tmp_path, bench)), found)
    assert str(found[0].path) in fault and "does not exist" in fault
    picture(found[0].path)
    picture(found[1].source_copy, 250 - np.asarray(Image.open(found[1].source))[0, 0, 0].item())
    (fault,) = missing_results(read_benchmark(write(tmp_path, bench)), found)
    assert str(found[1].path) in fault and "another picture" in fault


def test_missing_results_takes_a_source_of_another_size(tmp_path, bench):
    found = list(cells(read_benchmark(write(tmp_path, bench))))
    for cell in found:
        picture(cell.path, size=30)
        picture(cell.source_copy, np.asarray(Image.open(cell.source))[0, 0, 0].item(), size=30)
    assert missing_results(read_benchmark(write(tmp_path, bench)), found) == []


def test_read_benchmark_lists_every_fault(tmp_path, bench):
    bench["images"]["ghost"] = "nowhere"
    (tmp_path / "boats/titanic.png").write_bytes(b"no picture")
    bench["effects"][0] |= {"template": ["t0.png", "gone.png"]}
    bench["effects"][1] |= {"criteria": " "}
    bench["methods"] += [{"name": "a", "lora": "no.safetensors"}, {"name": "b", "loras": "no/{effect}.safetensors"}]
    with pytest.raises(InputErrors) as caught:
        read_benchmark(write(tmp_path, bench))
    said = "\n".join(caught.value.faults)
    for part in (
        "nowhere",
        "titanic.png",
        "gone.png",
        "effect wet: the judge needs",
        "no.safetensors",
        "no/sepia",
        "no/wet",
    ):
        assert part in said
    assert len(caught.value.faults) == 7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": [{"name": "../x", "images": "made"}]}, "methods.0.name"),
        ({"methods": [{"name": "a", "images": "made"}, {"name": "a", "images": "made"}]}, "called a"),
        ({"methods": [{"name": "a"}]}, "exactly one of"),
        ({"methods": [{"name": "a", "loras": "one.safetensors"}]}, "{effect}"),
        ({"methods": [{"name": "a", "images": "made", "steps": 4}]}, "leave them out"),
        ({"reference": "nobody"}, "no method's name"),
        ({"colour": 1}, "colour"),
        ({"seeds": []}, "seeds"),
        ({"judge": {"url": "u", "model": "m", "max_cost": 3}}, "judge: max_cost: nothing costs anything without"),
    ],
)
def test_read_benchmark_says_key_and_mend(tmp_path, bench, change, says):
    with pytest.raises(InputErrors) as caught:
        read_benchmark(write(tmp_path, bench | change))
    assert says in str(caught.value)


def test_read_benchmark_refuses_two_pictures_of_one_name(tmp_path, bench):
    picture(tmp_path / "cats/tom.jpg")
    with pytest.raises(InputErrors, match="two pictures are called tom"):
        read_benchmark(write(tmp_path, bench))
