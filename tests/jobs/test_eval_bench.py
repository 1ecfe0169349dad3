"""`clora eval BENCH.yaml` from end to end: made on the tiny base, judged by a server that looks, and resumed."""

import csv
import hashlib
import json
import random
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from clora.config import resolve_base
from clora.errors import InputErrors
from clora.evaluate.metrics.edit_reward import RewardService
from clora.inference.editor import Editor, load_editor
from clora.jobs import eval_bench
from clora.jobs.eval_bench import evaluate_benchmark, is_benchmark
from clora.tiny.world.scenes import render, sample_scene
from clora.training.device import base_dtype
from tests.evaluate.test_bench_rows import read_rows
from tests.support import processes
from tests.support.killed import KINDS, Moment
from tests.support.killed import start as start_killed

COLLECTION = Path(resolve_base("tiny")) / "collection.safetensors"
EFFECTS = ("sepia", "grayscale")


class Looking:
    """Judges by the pictures it is sent: bad where the result is as colourful as the source.

    Keeps each question it was `asked`, and by `Idempotency-Key` how many it was `paid` for: one that it has answered
    under the same key is free. `on_ask` is called with every question, before it is answered.
    """

    def __init__(self, wait: float = 0.0, swapped: bool = False) -> None:
        self.wait, self.swapped, self.asked = wait, swapped, []
        self.paid, self.answers = Counter(), {}
        self.on_ask = lambda: None
        self._lock = threading.Lock()

    def reply(self, raw: bytes, key: str) -> str:
        question = hashlib.sha256(raw).hexdigest()
        self.asked.append(question)
        self.on_ask()
        time.sleep(self.wait)
        with self._lock:
            if key not in self.answers:
                self.paid[question] += 1
                self.answers[key] = self._judge(json.loads(raw))
            return self.answers[key]

    def forget(self) -> Counter:
        """Start anew; what was paid until now."""
        bill, self.asked, self.paid, self.answers = self.paid, [], Counter(), {}
        return bill

    def _judge(self, body: dict) -> str:
        import base64
        import io

        parts = body["messages"][0]["content"]
        shown = {}
        for name, picture in zip(parts[1::2], parts[2::2], strict=True):
            png = base64.b64decode(picture["image_url"]["url"].split(",")[1])
            shown[name["text"]] = np.asarray(Image.open(io.BytesIO(png)), np.float32)
        source, result = shown["Test Source Image:"], shown["Test Result Image:"]
        if self.swapped:
            source, result = result, source
        if '"is_bad_case"' in parts[0]["text"]:
            same = result.shape == source.shape and np.abs(result - source).mean() < 4
            calm = result.std(axis=2).mean() <= source.std(axis=2).mean()
            return json.dumps({"brief_reasoning": "seen", "is_bad_case": bool(same or not calm)})
        return json.dumps({"brief_reasoning": "seen", "scores": 4})


@contextmanager
def served(judge: Looking):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            raw = self.rfile.read(length)
            if len(raw) < length:
                return  # the asker was killed while it asked
            text = judge.reply(raw, self.headers["Idempotency-Key"])
            raw = json.dumps({"model": "eyes-1", "choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            try:
                self.wfile.write(raw)
            except OSError:
                pass  # the asker was killed

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def scene(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round(render(sample_scene(seed)).image_HW3 * 255).astype(np.uint8)).save(path)
    return path


def grey(path: Path, source: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(source).convert("L").convert("RGB").save(path)


@pytest.fixture
def bench(tmp_path):
    sources = [scene(tmp_path / "photos" / f"{number}.png", 900 + number) for number in range(3)]
    grey(tmp_path / "after.png", scene(tmp_path / "before.png", 950))
    for effect in EFFECTS:
        for source in sources:
            grey(tmp_path / "made/any" / effect / source.name, source)
            folder = tmp_path / "copied/any" / effect
            folder.mkdir(parents=True, exist_ok=True)
            (folder / source.name).write_bytes(source.read_bytes())
    pair = ["before.png", "after.png"]
    effects = [{"name": e, "instruction": f"make it {e}", "criteria": "less colour", "template": pair} for e in EFFECTS]
    return {
        "output_dir": "out",
        "base": "tiny",
        "effects": effects,
        "images": {"any": "photos"},
        "methods": [{"name": "grey", "images": "made"}, {"name": "copied", "images": "copied"}],
    }


def write(folder: Path, bench: dict, url: str = "", **settings) -> Path:
    judge = {"judge": {"url": url, "model": "eyes", "repeat_share": 0.5, **settings}} if url else {}
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(bench | judge))
    return path


def test_evaluate_benchmark_makes_what_clora_edit_makes(tmp_path, bench):
    bench["methods"] = [{"name": "collection", "lora": str(COLLECTION)}]
    path = write(tmp_path, bench | {"seeds": [5]})
    assert is_benchmark(path)
    evaluate_benchmark(path)
    dtype = base_dtype("auto", torch.device("cpu"))
    editor = load_editor("tiny", COLLECTION, dtype=dtype)
    source = Image.open(tmp_path / "photos/1.png").convert("RGB")
    (expected,) = editor.edit([source], [EFFECTS[0]], seeds=[5])
    place = tmp_path / "out/results/collection/any" / EFFECTS[0] / "1.png"
    made = Image.open(place)
    # Alone and in a batch; another effect or seed is further by tens of levels.
    assert np.abs(np.asarray(made, int) - np.asarray(expected, int)).max() <= (1 if dtype == torch.float32 else 6)
    assert place.with_name("1_SRCIMG.png").is_file()


def test_evaluate_benchmark_counts_the_seconds_of_a_batch_once(tmp_path, bench, monkeypatch):
    def run(self, images, jobs, *, sampling, batch_size):
        for start in range(0, len(jobs), batch_size):
            now[0] += 8.0  # a batch of up to four
            yield from ((place, images[0]) for place in range(start, min(start + batch_size, len(jobs))))

    now = [0.0]
    monkeypatch.setattr(eval_bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Editor, "run", run)
    bench["methods"] = [{"name": "collection", "lora": str(COLLECTION)}]
    answer = evaluate_benchmark(write(tmp_path, bench))
    assert answer["methods"][0]["figures"]["seconds"]["mean"] == pytest.approx(
        2 * 8.0 / 6, abs=1e-3
    )  # six results in two batches


def test_evaluate_benchmark_judges_by_the_pictures(tmp_path, bench):
    with served(Looking()) as url:
        answer = evaluate_benchmark(write(tmp_path, bench, url))
    by_name = {one["name"]: one for one in answer["methods"]}
    assert (by_name["grey"]["bcr"], by_name["grey"]["vsa"]) == (0.0, 4.0)
    assert (by_name["copied"]["bcr"], by_name["copied"]["vsa"]) == (1.0, 0.0)
    assert by_name["copied"]["differences"]["bcr"] == {"mean": 1.0, "interval": (1.0, 1.0)}
    assert answer["controls"] == []
    rows = read_rows(tmp_path / "out/rows.csv")
    assert [row.l1_source for row in rows if row.method == "copied"] == [0.0] * 6
    assert sum(row.again_bad is not None for row in rows) > 0
    page = (tmp_path / "out/report.html").read_text()
    assert "copied" in page and "http://" not in page.replace(url, "")


def test_evaluate_benchmark_puts_encoders_into_rows_and_report(tmp_path, bench):
    from tests.evaluate.test_encoders import save

    save(tmp_path / "dino", "dino")
    answer = evaluate_benchmark(write(tmp_path, bench | {"encoders": {"dino": str(tmp_path / "dino")}}))
    by_name = {one["name"]: one for one in answer["methods"]}
    assert by_name["copied"]["figures"]["dino_source"]["mean"] == pytest.approx(1, abs=1e-5)
    grey = by_name["grey"]["figures"]
    assert grey["dino_source"]["mean"] < 1 - 1e-4 and "clip_source" not in grey
    assert "short side 256" in answer["facts"]["dino"]


def test_evaluate_benchmark_asks_a_reward_service_and_measures_flip(tmp_path, bench, monkeypatch):
    """The reward is how grey the result is, and nothing for the pictures of one effect: those are missing."""
    import base64
    import io

    import httpx

    pytest.importorskip("flip_evaluator")

    def answer(request):
        body = json.loads(request.content)
        if body["prompt"] == "make it sepia":
            return httpx.Response(400)
        result = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["result"]))), float)
        return httpx.Response(200, json={"reward": [-float(result.std(axis=2).mean()), 7.0], "model": "grey-1"})

    def serve(*args, **options):
        return RewardService(*args, client=httpx.Client(transport=httpx.MockTransport(answer)), **options)

    monkeypatch.setattr(eval_bench, "RewardService", serve)
    report = evaluate_benchmark(write(tmp_path, bench | {"flip": True, "edit_reward": {"url": "http://r/reward"}}))
    grey, copied = (one["figures"] for one in report["methods"])
    assert copied["flip_source"]["mean"] == 0 < grey["flip_source"]["mean"]
    assert grey["edit_reward"]["mean"] == 0 > copied["edit_reward"]["mean"]
    assert "grey-1, 6 missing" in report["facts"]["EditReward"] and "67 pixels" in report["facts"]["flip"]
    rows = read_rows(tmp_path / "out/rows.csv")
    assert {row.edit_reward_log_uncertainty for row in rows if row.effect == "grayscale"} == {7.0}


def test_evaluate_benchmark_tells_of_a_judge_that_sees_pictures_in_another_order(tmp_path, bench):
    bench["effects"] = bench["effects"][:1]
    with served(Looking(swapped=True)) as url:
        answer = evaluate_benchmark(write(tmp_path, bench, url, repeat_share=0.0))
    assert any("template's own result was judged bad" in fault for fault in answer["controls"])
    assert "Do not trust" in (tmp_path / "out/report.html").read_text()


def test_evaluate_benchmark_refuses_absent_results_before_a_call(tmp_path, bench):
    (tmp_path / "made/any/sepia/2.png").unlink()
    judge = Looking()
    with served(judge) as url, pytest.raises(InputErrors, match=r"made/any/sepia/2\.png does not exist"):
        evaluate_benchmark(write(tmp_path, bench, url))
    assert judge.asked == []


def test_evaluate_benchmark_counts_the_calls_of_runs_before(tmp_path, bench):
    judge = Looking()
    with served(judge) as url:
        for most, asked in ((5, 5), (5, 5), (8, 8)):
            answer = evaluate_benchmark(write(tmp_path, bench, url, max_calls=most))
            assert len(judge.asked) == asked
    assert set(judge.paid.values()) == {1}
    assert sum(one["missing"] for one in answer["methods"]) > 0
    assert "raise it to go on" in (tmp_path / "out/rows.csv").read_text()


def changed(bench: dict, **settings) -> dict:
    """The benchmark with other settings of its method, or of its own."""
    own = {name: value for name, value in settings.items() if name in ("seeds", "effects", "batch_size")}
    rest = {name: value for name, value in settings.items() if name not in own}
    return bench | own | {"methods": [bench["methods"][0] | rest]}


def made_files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.png"))}


def test_evaluate_benchmark_refuses_pictures_of_other_settings(tmp_path, bench):
    """And names what differs; with the same settings it makes none anew, and with more effects just those."""
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(COLLECTION.read_bytes())
    effects = bench["effects"]
    bench["methods"] = [{"name": "collection", "lora": str(lora), "steps": 1}]
    first = changed(bench, effects=effects[:1])
    evaluate_benchmark(write(tmp_path, first))
    made = made_files(tmp_path / "out")
    assert len(made) == 6
    refused = [
        (changed(first, steps=2), r"method collection: 3 of .* steps \(1, now 2\); give another output_dir"),
        (changed(first, seeds=[7]), r"seed \(0, now 7\)"),
        (changed(first, guidance=3.0), r"guidance \(1.0, now 3.0\), guidance rescale, negative prompt"),
        (changed(first, accelerate=str(COLLECTION.with_name("acceleration.safetensors"))), "acceleration LoRA"),
        (changed(first, lora=str(COLLECTION.with_name("acceleration.safetensors"))), "LoRA, prompt"),
    ]
    for other, what in refused:
        with pytest.raises(InputErrors, match=what):
            evaluate_benchmark(write(tmp_path, other))
    scene(tmp_path / "photos/1.png", 17)
    with pytest.raises(InputErrors, match=r"1 of the pictures in .* were made with another source;"):
        evaluate_benchmark(write(tmp_path, first))
    scene(tmp_path / "photos/1.png", 901)
    evaluate_benchmark(write(tmp_path, changed(first, effects=effects, batch_size=1)))
    found = made_files(tmp_path / "out")
    assert len(found) == 12 and {path: found[path] for path in made} == made
    raw = bytearray(lora.read_bytes())
    raw[-1] ^= 1  # in a number of its last tensor
    lora.write_bytes(raw)
    with pytest.raises(InputErrors, match="6 of .* another LoRA"):
        evaluate_benchmark(write(tmp_path, changed(bench, effects=effects)))
    assert made_files(tmp_path / "out") == found


def test_evaluate_benchmark_refuses_pictures_that_do_not_say_what_made_them(tmp_path, bench):
    """As those of versions that did not write it; given as `images`, they are taken as they are."""
    bench["methods"] = [{"name": "collection", "lora": str(COLLECTION), "steps": 1}]
    folder = tmp_path / "out/results/collection/any/sepia"
    grey(folder / "1.png", tmp_path / "photos/1.png")
    with pytest.raises(InputErrors, match=r"1 of the pictures in .*results/collection do not say what made them"):
        evaluate_benchmark(write(tmp_path, bench))
    assert [path.name for path in folder.iterdir()] == ["1.png"]
    bench["images"], bench["effects"] = {"any": ["photos/1.png"]}, bench["effects"][:1]
    bench["methods"] = [{"name": "as it is", "images": "out/results/collection"}]
    assert evaluate_benchmark(write(tmp_path, bench))["methods"][0]["outputs"] == 1


def test_evaluate_benchmark_refuses_an_effect_that_the_collection_lacks(tmp_path, bench):
    bench["effects"][0]["name"] = "sepla"
    bench["methods"] = [{"name": "collection", "lora": str(COLLECTION)}]
    with pytest.raises(InputErrors, match="'sepia'"):
        evaluate_benchmark(write(tmp_path, bench))


def ten_moments(seed: int) -> list[Moment | int]:
    """Where the runs are killed, in the order in which a run comes by: inside a write, or (a number) with that many
    questions asked and up to two of them unanswered."""
    draw = random.Random(seed)

    def inside(part: str, most: int) -> Moment:
        return Moment(part, draw.randint(1, most), draw.choice(KINDS))

    making: list[Moment | int] = [inside("/results/", 4) for _ in range(3)]
    judging = [inside("/judge/", 4) for _ in range(2)] + [draw.randint(1, 6) for _ in range(3)]
    draw.shuffle(judging)
    tables = [inside(name, 1) for name in draw.sample(["rows.csv", "report.json", "report.html"], 2)]
    return [*making, *judging, *tables]


def killed_run(path: Path, moment: Moment | int, judge: Looking) -> int | None:
    """Run the benchmark until `moment`, where it is killed; its exit code, None where it never ended."""
    own = moment if isinstance(moment, Moment) else None
    process = start_killed(evaluate_benchmark, (path,), own)
    wanted = None if own else len(judge.asked) + moment
    judge.on_ask = lambda: process.kill() if len(judge.asked) == wanted else None
    process.join(600)
    code = process.exitcode
    process.kill()
    return code


def without_seconds(answer: dict, rows: Path) -> tuple[dict, list[dict]]:
    """What a run leaves but for the time that it took."""
    answer = json.loads(json.dumps(answer))
    for method in answer["methods"]:
        method["figures"].pop("seconds", None)
    with rows.open(newline="") as file:
        return answer, [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute on an idle core
def test_clora_eval_killed_at_ten_moments_ends_with_the_same_report_and_pays_for_nothing_twice(tmp_path, bench):
    bench["methods"].append({"name": "collection", "lora": str(COLLECTION), "steps": 1})
    judge = Looking(wait=0.05)
    with served(judge) as url:
        path = write(tmp_path, bench | {"batch_size": 1}, url, concurrency=2)
        expected = evaluate_benchmark(path)
        (tmp_path / "out").rename(tmp_path / "first")
        bill = judge.forget()
        for moment in ten_moments(seed=0):
            before = set(judge.asked)
            count = len(judge.asked)
            assert killed_run(path, moment, judge) == -signal.SIGKILL, moment
            again = [question for question in judge.asked[count:] if question in before]
            assert len(again) <= 2, moment  # those that were in flight when the run before was killed
        said = processes.run(1, ["eval", str(path), "--json"], tmp_path / "said")
    found = without_seconds(json.loads(said[said.index("{") :]), tmp_path / "out/rows.csv")
    assert found == without_seconds(expected, tmp_path / "first/rows.csv")
    assert judge.paid == bill and set(bill.values()) == {1} and len(bill) > 30


@pytest.mark.slow
def test_clora_eval_on_two_processes_gives_the_rows_of_one(tmp_path, bench):
    bench["methods"].append({"name": "collection", "lora": str(COLLECTION)})
    bench["batch_size"] = 1  # in bfloat16 a picture's rounding depends on its batch, and so on the share of a process
    with served(Looking()) as url:
        evaluate_benchmark(write(tmp_path, bench | {"output_dir": "one"}, url))
        path = write(tmp_path, bench | {"output_dir": "two"}, url)
        processes.run(2, ["eval", str(path), "--json"], tmp_path / "said")
    tables = []
    for out in ("one", "two"):
        with (tmp_path / out / "rows.csv").open(newline="") as file:
            tables.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)])
    one, two = tables
    assert [{k: v.replace("two/", "one/") for k, v in row.items()} for row in two] == one


@pytest.mark.slow
def test_clora_eval_on_two_processes_stays_within_the_calls_of_one(tmp_path, bench):
    judge = Looking()
    with served(judge) as url:
        path = write(tmp_path, bench, url, max_calls=7)
        processes.run(2, ["eval", str(path)], tmp_path / "said")
    assert len(judge.asked) == 7 and set(judge.paid.values()) == {1}
