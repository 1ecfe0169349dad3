"""The command itself: a process on a free port, OpenAI's client, and an end without a lost request."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from clora.cli.commands import app
from clora.errors import InputError
from clora.inference.editor import load_editor
from clora.jobs import serve as job
from clora.serve.engine import Engine
from clora.serve.settings import Settings, load_settings
from tests.serve.conftest import picture, png


@contextmanager
def running(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str], list[str]]]:
    """`clora serve` with these arguments on a free port: its address, its process, its lines on stderr as they come."""
    command = [sys.executable, "-m", "clora", "serve", "--port", "0", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    lines: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"effects at (http://\S+)/", line):
                break
        else:
            raise AssertionError("".join(lines))
        reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
        reader.start()
        yield found[1], process, lines
        reader.join(10)
    finally:
        process.kill()
        process.wait()


def test_serve_answers_openais_client_and_ends_without_losing_a_request(
    small_base: tuple[Path, Path], tmp_path: Path
) -> None:
    base, collection = small_base
    openai = pytest.importorskip("openai")
    from click.testing import CliRunner
    from typer.main import get_command

    keys = tmp_path / "keys"
    made = CliRunner().invoke(get_command(app), ["serve", "--new-key", str(keys), "--key-name", "alice"])
    key = made.output.strip()
    given = [str(collection), "--base", str(base), "--keys", str(keys), "--grace", "30", "--dtype", "float32"]
    with running(*given) as (address, process, lines):
        client = openai.OpenAI(api_key=key, base_url=f"{address}/v1", max_retries=0)
        result = client.images.edit(
            image=("in.png", png(), "image/png"), prompt="", model="clora", n=2, extra_body={"effect": "a", "seed": 7}
        )
        wanted = load_editor(str(base), collection, "cpu", torch.float32).edit([picture()], ["a"], seeds=[7, 8])
        for one, image in zip(result.data, wanted, strict=True):
            found = np.asarray(Image.open(io.BytesIO(base64.b64decode(one.b64_json))), np.int16)
            assert np.abs(found - np.asarray(image, np.int16)).max() <= 1
        with pytest.raises(openai.NotFoundError, match="did you mean"):
            client.images.edit(image=png(), prompt="", extra_body={"effect": "aa"})
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(api_key="x", base_url=f"{address}/v1", max_retries=0).models.list()
        assert [model.id for model in client.models.list()] == ["clora"]
        answers = end_under_load(address, key, process)
        assert process.wait(timeout=60) == 0
    assert len(answers) == 8 and set(answers) <= {200, 503}
    assert answers.count(200) >= 4
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert {"listening", "request", "draining"} <= {record["message"] for record in records}
    assert key not in "".join(lines) and "iVBOR" not in "".join(lines)


def end_under_load(address: str, key: str, process: subprocess.Popen[str]) -> list[int]:
    """Eight edits at once, and SIGTERM while they are worked on: their statuses."""
    answers: list[int] = []
    arrived = threading.Semaphore(0)

    def one(number: int) -> None:
        files, data = {"image": png(number)}, {"effect": "b", "n": "4"}
        with httpx.Client(base_url=address, timeout=60, headers={"authorization": f"Bearer {key}"}) as client:
            arrived.release()
            answers.append(client.post("/v1/images/edits", data=data, files=files).status_code)

    def waiting() -> float:
        text = httpx.get(f"{address}/metrics", headers={"authorization": f"Bearer {key}"}).text
        return float(re.findall(r"^clora_edits_in_flight (\S+)", text, re.M)[0])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        arrived.acquire()
    while waiting() < 4 and not answers:
        pass
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    return answers


def test_serve_refuses_to_start_where_strangers_could_use_it(tmp_path: Path) -> None:
    from click.testing import CliRunner
    from typer.main import get_command

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(get_command(app), ["serve", *arguments])

    assert (run("--host", "0.0.0.0").exit_code, run(str(tmp_path)).exit_code, run("none").exit_code) == (2, 2, 2)
    assert run("--keys", str(tmp_path / "none")).exit_code == 2
    (tmp_path / "serve.yaml").write_text("limits: {smaples: 3}\nport: 99999\n")
    answer = run("--config", str(tmp_path / "serve.yaml"))
    assert answer.exit_code == 2
    assert "limits.smaples: is no setting; did you mean 'samples'?" in answer.output and "port" in answer.output


def test_load_settings_takes_paths_from_the_files_folder_and_options_over_it(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("keys: keys.txt\nport: 9\nbatches: {denoise: 4}\n")
    settings = load_settings(path, {"port": 10, "host": None})
    assert (settings.keys, settings.port, settings.host) == (tmp_path / "keys.txt", 10, "127.0.0.1")
    assert settings.batches.denoise == 4 and settings.batches.encode == 8


@pytest.mark.parametrize(
    ("option", "key"), [("artefact", "artefact"), ("collection", "collection"), ("groups", "groups")]
)
def test_load_settings_puts_a_model_given_in_place_of_the_files(tmp_path: Path, option: str, key: str) -> None:
    for model in ("artefact", "collection", "groups"):
        path = tmp_path / "serve.yaml"
        path.write_text(f"{model}: of-the-file\nname: kept\n")
        settings = load_settings(path, {option: Path("given")})
        found = {name: value for name in ("artefact", "collection", "groups") if (value := getattr(settings, name))}
        assert found == {key: Path("given")} and settings.name == "kept"


def test_load_settings_finds_a_base_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "tiny"):
        (tmp_path / "bases" / name).mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for base, wanted in (
        ("bases/mine", str(tmp_path / "bases/mine")),
        ("./bases/none", str(tmp_path / "bases/none")),
        ("Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2509"),
        ("tiny", "tiny"),  # the bundled one, whatever lies beside the file
    ):
        path = tmp_path / "serve.yaml"
        path.write_text(f"base: {base}\n")
        assert load_settings(path, {}).base == wanted


@pytest.mark.parametrize(
    "text", ["port: 2024-99-99", "port: !!python/name:os.system", "? [a, b]\n: 3", "port: !!timestamp x"]
)
def test_load_settings_names_the_file_of_a_value_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"serve\.yaml.*holds a value that is none") as error:
        load_settings(path, {})
    assert len(error.value.faults) == 1 and "\n" not in str(error.value)


def test_serve_knows_that_its_port_is_taken_before_it_loads_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Settings) -> Engine:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(job, "start_engine", load)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="cannot be bound"):
            job.serve(Settings(port=taken.getsockname()[1]))


class Idle:
    """An engine that does nothing, and knows whether it was closed."""

    def __init__(self) -> None:
        self.offers: dict[str, Any] = {}
        self.on_phase: Any = None
        self.is_alive, self.is_closed = True, False

    def stats(self) -> dict[str, Any]:
        return {}

    def restart(self) -> bool:
        return False

    def close(self) -> None:
        self.is_closed = True


def test_serve_closes_the_engine_when_anything_after_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Idle()

    def fail(_: object) -> None:
        raise RuntimeError("no application")

    monkeypatch.setattr(job, "start_engine", lambda _: engine)
    monkeypatch.setattr(job, "create_app", fail)
    with pytest.raises(RuntimeError, match="no application"):
        job.serve(Settings(port=0))
    assert engine.is_closed


def test_serve_refuses_an_address_that_another_took_while_it_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs may have bound an address while neither listens."""
    engine, other = Idle(), socket.socket()

    def start(_: Settings) -> Idle:
        other.listen()
        return engine

    monkeypatch.setattr(job, "start_engine", start)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with other:
        other.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="cannot be bound"):
            job.serve(Settings(port=other.getsockname()[1], thumbnails=False))
    assert engine.is_closed
