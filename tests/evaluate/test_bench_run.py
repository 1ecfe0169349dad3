"""Judging a benchmark's results: no server makes a verdict be invented, limits hold, and others wait for a report."""

import base64
import io
import json
import os
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from clora.evaluate import bench_run
from clora.evaluate.bench_rows import TRUTH, UNTOUCHED, summarise
from clora.evaluate.bench_run import Measures, control_cells, score
from clora.evaluate.benchmark import cells, read_benchmark
from clora.evaluate.judge import Judge, Limits
from clora.evaluate.metrics.encoders import ENCODERS
from clora.evaluate.metrics.image import ssim
from clora.io.chat import Endpoint
from clora.jobs import eval_bench
from tests.evaluate.test_benchmark import picture
from tests.support import processes

GATE = {"brief_reasoning": "seen", "is_bad_case": False}
KINDS = (
    "good",
    "bad",
    "no score",
    "late",
    "dripping",
    "busy",
    "down",
    "cut",
    "long",
    "enum",
    "sorry",
    "empty",
    "hang up",
)
MISSING_GATES = len(KINDS) - 3


def bench_of(folder, values, **judge):
    """A benchmark of one method made elsewhere, whose result of each picture has a colour of its own."""
    picture(folder / "before.png"), picture(folder / "after.png", 255)
    for value in values:
        picture(folder / f"photos/{value}.png", 128)
        picture(folder / f"made/any/wet/{value}.png", value)
    pair = ["before.png", "after.png"]
    bench = {
        "output_dir": "out",
        "effects": [{"name": "wet", "instruction": "i", "criteria": "c", "template": pair}],
        "images": {"any": "photos"},
        "methods": [{"name": "theirs", "images": "made"}],
        "judge": {"url": "http://judge/v1", "model": "eyes", "repeat_share": 0.0} | judge,
    }
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(bench))
    return path


def colour(body):
    """Of the last picture of a request, the result."""
    png = base64.b64decode(body["messages"][0]["content"][-1]["image_url"]["url"].split(",")[1])
    return int(np.asarray(Image.open(io.BytesIO(png)))[0, 0, 0])


def chat(text):
    return json.dumps({"model": "eyes-1", "choices": [{"message": {"content": text}}]}).encode()


class Faulty(BaseHTTPRequestHandler):
    """Answers as the colour of the result says, by its place in `KINDS`."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind, gate = KINDS[colour(body)], '"is_bad_case"' in body["messages"][0]["content"][0]["text"]
        good = GATE if gate else {"brief_reasoning": "kept", "scores": 4}
        whole = chat(json.dumps(good))
        if kind == "late":
            self.server.over.wait(30)  # hangs until the test is over
        elif kind == "dripping":
            self.drip(whole)
        elif kind == "hang up":
            self.close_connection = True
        elif kind in ("busy", "down"):
            self.say(b"", 429 if kind == "busy" else 503, {"Retry-After": "0"})
        else:
            wrong = {"brief_reasoning": "x", "is_bad_case": "no"}
            texts = {"bad": GATE | {"is_bad_case": True}, "enum": wrong, "sorry": "I cannot judge this.", "empty": ""}
            texts["no score"] = GATE if gate else {"brief_reasoning": "kept", "scores": 6}
            text = texts.get(kind, good)
            said = chat(text if isinstance(text, str) else json.dumps(text))
            said = whole[:-9] if kind == "cut" else chat("x" * (2 << 20)) if kind == "long" else said
            self.say(said)

    def say(self, raw, status=200, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(raw)
        except OSError:
            pass  # the asker has read enough

    def drip(self, raw):
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        for byte in raw:
            try:
                self.wfile.write(bytes([byte]))
            except OSError:
                return
            if self.server.over.wait(0.1):
                return

    def log_message(self, *args):
        pass


@contextmanager
def serving():
    with ThreadingHTTPServer(("127.0.0.1", 0), Faulty) as server:
        server.over = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.over.set()
        server.shutdown()


def test_score_of_a_server_at_its_worst_invents_nothing_and_bounds_what_is_missing(tmp_path):
    bench = read_benchmark(bench_of(tmp_path, range(len(KINDS)), concurrency=8))
    with serving() as url:
        endpoint = Endpoint("judge.url", url, "eyes", timeout_seconds=2.0, max_attempts=2)
        judge = Judge(endpoint, tmp_path / "judge", Limits(), backoff_seconds=0.0)
        rows = score(bench, list(cells(bench)), judge, Measures(), lambda: None, {})
    found = {KINDS[int(row.key)]: row for row in rows}
    assert (found["good"].bad, found["good"].vsa) == (False, 4) and found["bad"].bad is True
    assert (found["no score"].bad, found["no score"].vsa, found["no score"].score) == (False, None, None)
    without = [row for kind, row in found.items() if kind not in ("good", "bad", "no score")]
    assert len(without) == MISSING_GATES
    assert all(row.bad is None and row.vsa is None and "no usable answer in 2 attempts" in row.why for row in without)
    (one,) = summarise(rows, "theirs")
    number = len(KINDS)
    assert (one.bcr, one.vsa, one.missing) == (1 / 3, 4 / 2, MISSING_GATES + 1)
    assert one.bcr_bounds == (1 / number, (1 + MISSING_GATES) / number)
    assert one.vsa_bounds == (4 / number, (4 + 5 * (MISSING_GATES + 1)) / number)


def test_score_asks_no_more_questions_at_a_time_than_allowed(tmp_path):
    bench = read_benchmark(bench_of(tmp_path, range(12), concurrency=3))
    asked, lock, three, most = [], threading.Lock(), threading.Barrier(3), []

    def answer(request):
        with lock:
            asked.append(1)
            most.append(len(asked))
        if len(most) <= 3:
            three.wait(30)  # as many at once as are allowed
        time.sleep(0.01)
        with lock:
            asked.pop()
        return httpx.Response(200, content=chat(json.dumps(GATE | {"is_bad_case": True})))

    client = httpx.Client(transport=httpx.MockTransport(answer))
    judge = Judge(Endpoint("judge.url", "http://judge/v1", "eyes"), tmp_path / "judge", client=client)
    rows = score(bench, list(cells(bench)), judge, Measures(), lambda: None, {})
    assert all(row.bad for row in rows) and len(most) == 12 and max(most) == 3


def test_score_judges_the_share_asked_for_a_second_time_and_the_same_ones_in_every_run(tmp_path):
    path = bench_of(tmp_path, range(200), repeat_share=0.05)
    bad = httpx.Response(200, content=chat(json.dumps(GATE | {"is_bad_case": True})))
    chosen = []
    for folder in ("one", "two"):
        bench, seeds = read_benchmark(path), []

        def answer(request, seeds=seeds):
            seeds.append(json.loads(request.content)["seed"])
            return bad

        client = httpx.Client(transport=httpx.MockTransport(answer))
        judge = Judge(Endpoint("judge.url", "http://judge/v1", "eyes"), tmp_path / folder, client=client)
        rows = score(bench, list(cells(bench)), judge, Measures(), lambda: None, {})
        chosen.append([row.key for row in rows if row.again_bad is not None])
        assert seeds.count(0) == 200 and seeds.count(1) == len(chosen[-1]) == len(seeds) - 200
    assert chosen[0] == chosen[1] and 3 <= len(chosen[0]) <= 20


class Brightness:
    """An encoder that sees the mean brightness, and whose comparison is not symmetric."""

    def __init__(self, name, weight):
        self.name, self.weight, self.seen = name, weight, []

    def embed(self, images):
        found = [float(np.asarray(image).mean()) for image in images]
        self.seen += found
        return found

    def compare(self, result, source):
        return self.weight * result - source


def test_score_puts_what_encoders_say_of_result_and_source_into_their_columns(tmp_path):
    bench = read_benchmark(bench_of(tmp_path, (10, 40)))
    encoders = [Brightness(name, 1 + place) for place, name in enumerate(ENCODERS)]
    for place, row in enumerate(score(bench, list(cells(bench)), None, Measures(encoders), lambda: None, {})):
        for weight, name in enumerate(ENCODERS, start=1):
            assert getattr(row, f"{name}_source") == weight * (10, 40)[place] - 128
    assert all(sorted(encoder.seen) == [10, 40, 128, 128] for encoder in encoders)


def test_score_measures_result_against_source_at_the_results_size(tmp_path):
    bench = read_benchmark(bench_of(tmp_path, (10,)))
    (cell,) = cells(bench)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(cell.source)  # the result is of 12 x 12 pixels: the middle, at half the size
    made = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(made).save(cell.path)
    (row,) = score(bench, [cell], None, Measures(), lambda: None, {cell.path: 2.5})
    half = np.asarray(Image.fromarray(pixels).resize((24, 12), Image.Resampling.LANCZOS))
    a, b = (np.asarray(image, np.float32) / 255 for image in (made, half[:, 6:18]))
    assert row.l1_source == pytest.approx(np.abs(a - b).mean(), abs=1e-6)
    assert row.ssim_source == pytest.approx(ssim(a, b), abs=1e-5) and row.ssim_source < 0.9
    assert (row.seconds, row.bad, row.flip_source) == (2.5, None, None)


@pytest.mark.parametrize("controls", [0, 1, 2])
def test_control_cells_are_untouched_sources_and_the_templates_result(tmp_path, controls):
    bench = read_benchmark(bench_of(tmp_path, range(3), controls=controls))
    found = control_cells(bench)
    untouched = [cell for cell in found if cell.method == UNTOUCHED]
    assert [cell.path for cell in untouched] == [tmp_path / f"photos/{value}.png" for value in range(controls)]
    assert all(cell.source == cell.path for cell in untouched)
    truths = [(cell.source, cell.path) for cell in found if cell.method == TRUTH]
    assert truths == [(tmp_path / "before.png", tmp_path / "after.png")] * bool(controls)


def hurried(seconds):
    """Processes that wait for each other's collectives this long, and a report that takes longer."""
    report = eval_bench._report
    eval_bench.TIMEOUT_SECONDS = seconds

    def slowly(*arguments):
        time.sleep(1.5 * seconds)
        return report(*arguments)

    eval_bench._report = slowly


@pytest.mark.slow
def test_evaluate_benchmark_waits_for_the_report_however_long_it_takes(tmp_path):
    path = bench_of(tmp_path, range(3))
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"judge": None}))
    said = processes.run(2, ["eval", str(path), "--json"], tmp_path / "said", hurried, (4.0,))
    assert json.loads(said[said.index("{") :])["methods"][0]["outputs"] == 3


def noting(folder):
    """Processes that note what each of them measures, in a file of its own."""
    measure = bench_run._measured

    def noted(cell, *arguments):
        with (folder / f"{os.getpid()}.txt").open("a") as file:
            file.write(f"{cell.key}\n")
        return measure(cell, *arguments)

    bench_run._measured = noted


@pytest.mark.slow
def test_evaluate_benchmark_measures_each_result_in_one_process(tmp_path):
    path, notes = bench_of(tmp_path, (10, 40, 70, 90)), tmp_path / "notes"
    values = yaml.safe_load(path.read_text()) | {"judge": None}
    path.write_text(yaml.safe_dump(values))
    eval_bench.evaluate_benchmark(path)
    path.write_text(yaml.safe_dump(values | {"output_dir": "two"}))
    notes.mkdir()
    processes.run(2, ["eval", str(path), "--json"], tmp_path / "said", noting, (notes,))
    assert sorted(file.read_text().split() for file in notes.iterdir()) == [["10", "70"], ["40", "90"]]
    for name in ("rows.csv", "report.json"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_score_keeps_what_was_measured_and_asks_for_what_has_no_verdict(tmp_path):
    bench = read_benchmark(bench_of(tmp_path, (10, 40)))
    first, second = cells(bench)
    found = score(bench, [first, second], None, Measures(), lambda: None, {})
    known = found[0].model_copy(update={"l1_source": 0.125, "why": "judge.max_calls: 7 calls are made"})
    bad = httpx.Response(200, content=chat(json.dumps(GATE | {"is_bad_case": True})))
    client = httpx.Client(transport=httpx.MockTransport(lambda request: bad))
    judge = Judge(Endpoint("judge.url", "http://judge/v1", "eyes"), tmp_path / "judge", client=client)
    rows = score(bench, [first, second], judge, Measures(), lambda: None, {}, None, {first: known})
    assert [row.l1_source for row in rows] == [0.125, found[1].l1_source]
    assert all(row.bad and not row.why for row in rows)


class Rewarding(BaseHTTPRequestHandler):
    """Answers the first two questions when both are there, and counts all of them."""

    def do_POST(self):
        self.server.asked.append(self.rfile.read(int(self.headers["Content-Length"])))
        if len(self.server.asked) <= 2:
            self.server.two.wait(30)
        raw = json.dumps({"reward": [1.5, 0.0]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_evaluate_benchmark_asks_for_rewards_in_every_process_and_for_none_twice(tmp_path):
    values = yaml.safe_load(bench_of(tmp_path, range(6)).read_text())
    with ThreadingHTTPServer(("127.0.0.1", 0), Rewarding) as server:
        server.asked, server.two = [], threading.Barrier(2)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/reward"
        path = tmp_path / "bench.yaml"
        path.write_text(yaml.safe_dump(values | {"judge": None, "edit_reward": {"url": url}}))
        said = processes.run(2, ["eval", str(path), "--json"], tmp_path / "said")
        server.shutdown()
    report = json.loads(said[said.index("{") :])
    assert report["methods"][0]["figures"]["edit_reward"]["mean"] == 1.5
    assert "0 missing" in report["facts"]["EditReward"]
    assert len(server.asked) == len(set(server.asked)) == 6
