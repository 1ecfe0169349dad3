"""The blind study: what the page tells, that answers are counted for whom they were, and the page in a real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from clora.errors import InputError, InputErrors
from clora.evaluate.benchmark import read_benchmark
from clora.evaluate.study import QUESTIONS, Answers, Choice, Key, build_study, read_answers, tally
from clora.jobs.study import count_study, write_study

METHODS = ("collection", "teachers", "stacked")
COLOURS = {"collection": 40, "teachers": 120, "stacked": 200}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three methods on two effects and three pictures; a result's colour says whose it is."""
    for number in range(3):
        save(tmp_path / "photos" / f"{number}.png", number)
    for method, value in COLOURS.items():
        for effect in ("wet", "dry"):
            for number in range(3):
                save(tmp_path / method / "any" / effect / f"{number}.png", value)
    bench = {
        "output_dir": "out",
        "effects": [{"name": "wet", "instruction": "</script><b>wet"}, {"name": "dry", "instruction": "make it dry"}],
        "images": {"any": "photos"},
        "methods": [{"name": name, "images": name} for name in METHODS],
    }
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(bench))
    return tmp_path / "bench.yaml"


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def page_data(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def colour(uri: str) -> int:
    import base64
    import io

    return int(np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))[0, 0, 0])


def test_build_study_key_says_whose_each_candidate_is(path: Path) -> None:
    page, key = build_study(read_benchmark(path), METHODS, 6, seed=1)
    data = page_data(page)
    assert len(data["items"]) == 6
    for item, names in zip(data["items"], key.items, strict=True):
        assert [colour(uri) for uri in item["candidates"]] == [COLOURS[name] for name in names]
    assert len({tuple(names) for names in key.items}) > 1  # the order is drawn anew for each


def test_build_study_page_names_no_method_and_asks_for_nothing(path: Path) -> None:
    page, _ = build_study(read_benchmark(path), METHODS, 6, seed=0)
    outside = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert not any(name in outside for name in METHODS) and "http" not in outside
    assert {item["instruction"] for item in page_data(page)["items"]} == {"</script><b>wet", "make it dry"}


def test_build_study_draws_effects_evenly(path: Path) -> None:
    page, _ = build_study(read_benchmark(path), METHODS, 4, seed=3)
    shown = [item["instruction"] for item in page_data(page)["items"]]
    assert sorted(map(shown.count, set(shown))) == [2, 2]


@pytest.mark.parametrize(("methods", "says"), [(("collection",), "2 to 9"), (("collection", "nobody"), "nobody")])
def test_build_study_refuses_other_methods(path: Path, methods: tuple[str, ...], says: str) -> None:
    with pytest.raises(InputErrors, match=says):
        build_study(read_benchmark(path), methods, 4, seed=0)


def answers(choices: dict[int, int], question: str = "quality", study: str = "s") -> Answers:
    return Answers(study=study, answers=[Choice(item=i, question=question, choice=c) for i, c in choices.items()])


def test_tally_counts_each_choice_for_its_method() -> None:
    key = Key(study="s", methods=["a", "b"], items=[["a", "b"], ["b", "a"], ["b", "a"], ["a", "b"]])
    found = tally(key, [answers({0: 0, 1: 1, 2: 1}), answers({3: 1}), answers({0: 1}, "alignment")])
    by = {(one.method, one.question): one for one in found}
    assert by["a", "quality"].share == 3 / 4 and by["b", "quality"].share == 1 / 4
    assert by["b", "alignment"].share == 1 and by["b", "alignment"].answers == 1
    assert by["a", "quality"].interval[0] <= 0.75 <= by["a", "quality"].interval[1]
    assert ("a", "consistency") not in by


def test_read_answers_takes_the_last_and_refuses_the_impossible(tmp_path: Path) -> None:
    key = Key(study="s", methods=["a", "b"], items=[["a", "b"]])
    place = tmp_path / "answers.json"
    place.write_text(Answers(study="s", answers=[*answers({0: 0}).answers, *answers({0: 1}).answers]).model_dump_json())
    assert [one.choice for one in read_answers(place, key).answers] == [1]
    for bad in (answers({0: 2}), answers({1: 0}), answers({0: 0}, "beauty"), answers({0: 0}, study="other")):
        place.write_text(bad.model_dump_json())
        with pytest.raises(InputError, match="answers.json"):
            read_answers(place, key)
    place.write_text("[]")
    with pytest.raises(InputError, match="holds no answers"):
        read_answers(place, key)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Chooses with the keyboard: candidate (item + question) % 3, after one answer that is taken back.
KEYS = """
<script>
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
press("3"); press("Backspace"); press("9");
for (let step = 0; step < total; step += 1) {
  press(String(1 + ((Math.floor(step / questions.length) + (step % questions.length)) % 3)));
}
const out = document.createElement("pre");
out.id = "out";
out.textContent = JSON.stringify(result()) + "|" + $("end").hidden + "|" + $("task").hidden;
document.body.append(out);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_study_page_in_a_browser_writes_answers_that_are_counted(path: Path, tmp_path: Path) -> None:
    page, key_path = write_study(path, METHODS, tmp_path / "study.html", 6, 0)
    assert CHROMIUM is not None
    driven = tmp_path / "driven.html"
    driven.write_text(page.read_text().replace("</body>", KEYS + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    run = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", f"file://{driven}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (text,) = re.findall(r'<pre id="out">(.*?)</pre>', run.stdout, re.DOTALL)
    written, end_hidden, task_hidden = html.unescape(text).split("|")
    assert (end_hidden, task_hidden) == ("false", "true")
    (tmp_path / "answers.json").write_text(written)
    key = Key.model_validate_json(key_path.read_bytes())
    found = {(one.method, one.question): one.share for one in count_study(key_path, [tmp_path / "answers.json"])}
    for place, question in enumerate(QUESTIONS):
        chosen = [key.items[item][(item + place) % 3] for item in range(6)]
        assert all(found[name, question] == chosen.count(name) / 6 for name in METHODS)
