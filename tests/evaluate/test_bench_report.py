"""A benchmark's report: what its tables, heat map, pictures and facts say of known rows."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from clora.evaluate.bench_report import SIDE, WORST, write_bench_report
from clora.evaluate.bench_rows import TRUTH, UNTOUCHED, Row, summarise
from clora.evaluate.bench_run import Measures
from clora.evaluate.benchmark import read_benchmark
from clora.evaluate.judge import Judge
from clora.evaluate.metrics.edit_reward import RewardService
from clora.io.chat import Endpoint
from tests.evaluate.test_benchmark import picture

METHODS, EFFECTS, KEYS = ("ours", "theirs"), ("wet", "dry"), ("tom", "felix")


def bad(method, effect, key):
    """Ours has one bad case, theirs three; one answer of ours is missing."""
    if (method, effect, key) == ("ours", "dry", "felix"):
        return None
    return (method, effect) == ("theirs", "wet") or key == "tom" and effect == "dry"


def value(method, effect, key):
    """The colour of a result."""
    return 10 + 100 * METHODS.index(method) + 40 * EFFECTS.index(effect) + 20 * KEYS.index(key)


def row(folder, method, effect, key):
    path = picture(folder / f"out/{method}/{effect}/{key}.png", value(method, effect, key))
    verdict = bad(method, effect, key)
    said = {"vsa": 4 if method == "ours" else 5} if verdict is False else {"why": "late"} if verdict is None else {}
    place = {"path": str(path.relative_to(folder / "out")), "source": f"../photos/{key}.png"}
    names = {"method": method, "category": "any", "effect": effect, "key": key, "seed": 0}
    return Row(**names, **place, bad=verdict, l1_source=0.25, judge="eyes-1 <b>, plain", **said)


@pytest.fixture
def bench(tmp_path):
    for key in KEYS:
        picture(tmp_path / f"photos/{key}.png", 250 - 5 * KEYS.index(key))
    picture(tmp_path / "t.png")
    effects = [{"name": name, "instruction": "i", "criteria": "c", "template": ["t.png", "t.png"]} for name in EFFECTS]
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump({
        "output_dir": "out", "effects": effects, "images": {"any": "photos"},
        "methods": [{"name": name, "images": name} for name in METHODS],
        "judge": {"url": "http://user:secret@judge/v1", "model": "eyes"},
    }))  # fmt: skip
    return read_benchmark(tmp_path / "bench.yaml")


@pytest.fixture
def report(tmp_path, bench):
    keys = {"ours": KEYS, "theirs": KEYS[::-1]}
    rows = [row(tmp_path, method, effect, key) for method in METHODS for effect in EFFECTS for key in keys[method]]
    control = rows[0].model_copy(update={"vsa": None})
    controls = [control.model_copy(update={"method": name, "bad": b}) for name, b in ((UNTOUCHED, True), (TRUTH, True))]
    controls.append(control.model_copy(update={"method": UNTOUCHED, "bad": None}))
    judge = Judge(Endpoint("judge.url", "http://user:secret@judge/v1", "eyes"), tmp_path / "judge")
    answer = write_bench_report(bench, rows, summarise(rows, "ours"), controls, judge, Measures())
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads(json.dumps(answer))
    return answer, (tmp_path / "out/report.html").read_text()


class Cells(HTMLParser):
    """Rows of all tables: of each cell its text, its style and what its pictures are."""

    def __init__(self, page):
        super().__init__()
        self.rows = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append({"text": "", "style": given.get("style", ""), "bad": given.get("class") == "bad"})
        elif tag == "img" and self.rows and self.rows[-1]:
            self.rows[-1][-1].setdefault("pictures", []).append(colour(given["src"]))
        elif tag == "small":
            self.rows[-1][-1]["text"] += " | "

    def handle_endtag(self, tag):
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1]["text"] += data.strip()

    def starting(self, name):
        return [one for one in self.rows if one and one[0]["text"] == name]


def colour(uri):
    return int(np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))[0, 0, 0])


def test_write_bench_report_table_has_rates_intervals_bounds_and_differences(report):
    answer, page = report
    (ours,), (theirs,) = (Cells(page).starting(name) for name in METHODS)
    assert [cell["text"] for cell in ours[1:3]] == ["4", "1"] and [cell["text"] for cell in theirs[1:3]] == ["4", "0"]
    first, second = answer["methods"]
    low, high = first["bcr_interval"]
    assert ours[3]["text"] == f"0.333 | {low:.3f} to {high:.3f} | bounds 0.250 to 0.500"
    assert ours[4]["text"].startswith("2.67 | ") and ours[4]["text"].endswith("bounds 2.00 to 3.25")
    assert ours[5]["text"] == "" and "bounds" not in theirs[3]["text"]
    low, high = second["differences"]["bcr"]["interval"]
    assert theirs[5]["text"].startswith(f"bcr +0.667 | {low:.3f} to {high:.3f}vsa -2.667 | ")  # of three that both have


def test_write_bench_report_heat_map_has_every_effect_and_method(report):
    heat, grid = (Cells(report[1]).starting("wet")[place] for place in (0, 1))
    assert [cell["text"] for cell in heat[1:]] == ["0.00", "1.00"]
    assert [re.findall(r"/ (\d+)%", cell["style"]) for cell in heat[1:]] == [["0"], ["70"]]
    assert [cell["text"] for cell in Cells(report[1]).starting("dry")[0][1:]] == ["1.00", "0.50"]
    assert len(grid) == 4


def test_write_bench_report_grid_shows_source_and_results_and_frames_bad_ones(report):
    grid = [Cells(report[1]).starting(effect)[1] for effect in EFFECTS]
    for effect, line in zip(EFFECTS, grid, strict=True):
        assert line[1]["pictures"] == [250]
        assert [cell["pictures"] for cell in line[2:]] == [[value(method, effect, "tom")] for method in METHODS]
        assert [cell["bad"] for cell in line[2:]] == [bad(method, effect, "tom") for method in METHODS]


def test_write_bench_report_gallery_has_the_bad_cases_each_effect_first(report):
    figures = re.findall(r"<figure>(.*?)</figure>", report[1], re.DOTALL)
    shown = [re.findall(r"<figcaption>(.*?)</figcaption>", one)[0] for one in figures]
    assert shown == [
        "ours · dry · tom: bad", "theirs · wet · felix: bad", "theirs · dry · tom: bad", "theirs · wet · tom: bad",
    ]  # fmt: skip
    pictures = [[colour(uri) for uri in re.findall(r'src="(.*?)"', one)] for one in figures]
    assert pictures[0] == [250, value("ours", "dry", "tom")]
    assert pictures[1] == [245, value("theirs", "wet", "felix")]


def test_write_bench_report_gallery_is_bounded(tmp_path, bench):
    rows = [row(tmp_path, "theirs", "wet", "tom").model_copy(update={"key": str(k)}) for k in range(WORST + 5)]
    write_bench_report(bench, rows, summarise(rows, "theirs"), [], None, Measures())
    assert (tmp_path / "out/report.html").read_text().count("<figure>") == WORST


def test_write_bench_report_page_asks_for_nothing_and_escapes_what_servers_say(report):
    answer, page = report
    outside = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert "<script" not in page and "<b>" not in outside and "eyes-1 &lt;b&gt;" in outside
    assert not re.search(r'(src|href)="http', outside) and "secret" not in json.dumps(answer) + page


def test_write_bench_report_tells_of_every_control(report):
    answer, page = report
    assert answer["controls"] == ["effect wet, tom: the template's own result was judged bad"]
    assert answer["facts"]["controls"] == "1 as they must be, 1 not, 1 without an answer"
    assert page.count("Do not trust this judge") == 1


def test_write_bench_report_facts_say_what_each_figure_depends_on(tmp_path, bench):
    pytest.importorskip("flip_evaluator")
    rows = [row(tmp_path, "ours", "wet", "tom")]
    service = RewardService("http://r/reward", models={"mimo"})
    settings = bench.model_copy(update={"edit_reward": bench.judge, "exact": True})
    facts = write_bench_report(settings, rows, summarise(rows, "ours"), [], None, Measures((), True, service))["facts"]
    said = {
        "L1, SSIM": ("Lanczos", "float32", "lower is nearer", "in [-1, 1]"),
        "PSNR, detail": ("dB", "at most 60"),
        "flip": ("67 pixels a degree", "lower is nearer"),
        "EditReward": ("by mimo", "1 missing", "unbounded", "higher is better"),
    }
    for name, words in said.items():
        assert all(word in facts[name] for word in words), name


def test_write_bench_report_pictures_are_small(tmp_path, bench):
    picture(tmp_path / "photos/tom.png", size=900)
    rows = [row(tmp_path, "ours", "wet", "tom")]
    write_bench_report(bench, rows, summarise(rows, "ours"), [], None, Measures())
    uris = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", (tmp_path / "out/report.html").read_text())
    assert max(max(Image.open(io.BytesIO(base64.b64decode(uri))).size) for uri in uris) == SIDE
