"""What each kind of method loads, asks and costs."""

from pathlib import Path

import pytest
import yaml

from clora.config import resolve_base
from clora.errors import InputErrors
from clora.evaluate.bench_methods import asked, cost_of, routed
from clora.evaluate.benchmark import read_benchmark
from tests.evaluate.test_benchmark import picture
from tests.support.lora_files import TO_Q, pair, save

COLLECTION = Path(resolve_base("tiny")) / "collection.safetensors"


@pytest.fixture
def bench(tmp_path):
    picture(tmp_path / "photos/a.png")
    for name in ("sepia", "snow", "fast", "joint"):
        save(tmp_path / f"{name}.safetensors", pair(f"diffusion_model.{TO_Q}"))
    effects = [
        {"name": "sepia", "instruction": "colours", "student_prompt": "an old brown photo", "criteria": "brown tones"},
        {
            "name": "snow",
            "instruction": "weather",
            "student_prompt": "let white flakes fall",
            "criteria": "flakes fall",
        },
    ]
    methods = [
        {"name": "each", "loras": "{effect}.safetensors", "steps": 40, "guidance": 2},
        {"name": "fast", "loras": "{effect}.safetensors", "accelerate": "fast.safetensors"},
        {"name": "one", "lora": "joint.safetensors", "accelerate": "fast.safetensors", "ask": "student_prompt"},
        {"name": "routed", "loras": "{effect}.safetensors", "route": True},
        {"name": "collection", "lora": str(COLLECTION)},
        {"name": "theirs", "images": "made", "num_loras": 3, "storage_mb": 2.5, "nfe": 16},
    ]
    return {"output_dir": "out", "effects": effects, "images": {"any": "photos"}, "methods": methods}


def read(folder, bench):
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(bench))
    found = read_benchmark(path)
    return found, {method.name: method for method in found.methods}


def test_asked_is_the_lora_and_words_of_each_kind(tmp_path, bench):
    found, by_name = read(tmp_path, bench)
    assert asked(found, by_name["each"], "snow") == (tmp_path / "snow.safetensors", "weather")
    assert asked(found, by_name["one"], "snow") == (tmp_path / "joint.safetensors", "let white flakes fall")
    lora, prompt = asked(found, by_name["collection"], "snow")
    assert lora == COLLECTION and prompt.endswith("let thick white snow flakes fall in a cold pale light")


def test_asked_by_a_router_follows_the_words(tmp_path, bench):
    bench["effects"][0]["student_prompt"] = "flakes fall on an old photo"
    found, by_name = read(tmp_path, bench)
    assert [routed(found, effect) for effect in found.effects] == ["snow", "snow"]
    assert asked(found, by_name["routed"], "sepia") == (tmp_path / "snow.safetensors", "weather")
    assert cost_of(found, by_name["routed"]).routed_right == 0.5


def test_asked_for_two_effects_composes_the_collections_prompts(tmp_path, bench):
    bench["effects"] = [{"name": "both", "instruction": "i", "of": ["sepia", "snow"]}]
    bench["methods"] = bench["methods"][4:5]
    found, by_name = read(tmp_path, bench)
    prompt = asked(found, by_name["collection"], "both").prompt
    assert prompt.startswith("Please apply <sepia_") and ", and then apply <snow_" in prompt


def test_cost_of_counts_files_bytes_and_forwards(tmp_path, bench):
    found, by_name = read(tmp_path, bench)
    size = (tmp_path / "snow.safetensors").stat().st_size / 1e6
    assert cost_of(found, by_name["each"])[:3] == (2, round(2 * size, 3), 80)
    assert cost_of(found, by_name["fast"])[:3] == (3, round(3 * size, 3), 8)
    assert cost_of(found, by_name["one"])[:3] == (2, round(2 * size, 3), 8)
    assert cost_of(found, by_name["collection"])[::2] == (1, 8)
    assert cost_of(found, by_name["theirs"]) == (3, 2.5, 16, None)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"lora": "joint.safetensors", "route": True}, "picks one of"),
        ({"lora": "joint.safetensors", "nfe": 3}, "are counted"),
        ({"images": "made", "accelerate": "fast.safetensors"}, "made elsewhere have none"),
        ({"lora": "joint.safetensors", "accelerate": "gone.safetensors"}, "gone.safetensors does not exist"),
    ],
)
def test_read_benchmark_refuses_methods_that_contradict_themselves(tmp_path, bench, method, says):
    bench["methods"] = [{"name": "m", **method}]
    with pytest.raises(InputErrors, match=says):
        read(tmp_path, bench)


def test_read_benchmark_needs_the_student_prompts_that_a_method_asks(tmp_path, bench):
    del bench["effects"][1]["student_prompt"]
    with pytest.raises(InputErrors, match="effect snow: a method asks for its student_prompt"):
        read(tmp_path, bench)
