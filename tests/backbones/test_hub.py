"""hub_folder: a whole download from a hub on this machine, the cache without a network, and one line without either."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from clora.backbones.hub import hub_folder
from clora.backbones.load import load_backbone, read_footprint
from clora.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/name"
CLOSED = "http://127.0.0.1:9"  # nothing listens there


class Hub(BaseHTTPRequestHandler):
    """The three answers of a hub that a download needs; it serves `folder` as NAME, and notes which files it gave."""

    folder: Path
    given: set[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        files = [p for p in self.folder.rglob("*") if p.is_file()]
        headers = {"X-Repo-Commit": COMMIT}
        if path == f"/api/models/{NAME}/revision/main":
            siblings = [{"rfilename": str(p.relative_to(self.folder))} for p in files]
            content = json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            rows = [
                {"path": str(p.relative_to(self.folder)), "size": p.stat().st_size, "oid": digest(p)} for p in files
            ]
            content = json.dumps([row | {"type": "file"} for row in rows]).encode()
        elif path.startswith(f"/{NAME}/resolve/") and (file := self.folder / path.split("/", 5)[5]).is_file():
            content, headers["ETag"] = file.read_bytes(), f'"{digest(file)}"'
            if body:
                self.given.add(str(file.relative_to(self.folder)))
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound" if NAME in path else "RepoNotFound")
            self.end_headers()
            return
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and a hub that does not answer."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    point_at(CLOSED, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this address the hub, as HF_ENDPOINT does for a new process."""
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


@pytest.fixture
def hub(network: None, random_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """A hub that serves the random base; the files that it gave."""
    given: set[str] = set()
    handler = type("RandomBase", (Hub,), {"folder": random_base, "given": given})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield given
    server.shutdown()
    server.server_close()


def test_hub_folder_downloads_what_is_asked_for_and_then_needs_no_hub(
    hub: set[str], random_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_footprint(NAME).linears == read_footprint(random_base).linears
    assert hub and not any(name.endswith(".safetensors") for name in hub)
    wanted = load_backbone(random_base, components=["vae"])
    found = load_backbone(NAME, components=["vae"])
    weights = {name for name in hub if name.endswith(".safetensors")}
    assert weights == {"vae/diffusion_pytorch_model.safetensors"} and "clora.json" not in hub
    assert found.max_prompt_tokens == wanted.max_prompt_tokens
    point_at(CLOSED, monkeypatch)
    assert load_backbone(NAME, components=["vae"]).count_prompt_tokens("paint it") == 2


def test_load_backbone_takes_a_cached_base_without_a_network(network: None, random_base: Path, tmp_path: Path) -> None:
    """A cache as `hf download` leaves it."""
    folder = tmp_path / "cache" / "models--owner--name"
    shutil.copytree(random_base, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    found = load_backbone(NAME, dtype=torch.float32, components=["transformer"])
    wanted = load_backbone(random_base, dtype=torch.float32, components=["transformer"])
    assert all(map(torch.equal, found.transformer.parameters(), wanted.transformer.parameters()))
    with pytest.raises(InputError, match=f"base {NAME}: is not .all. on this machine"):
        hub_folder(NAME, "v2")


def test_hub_folder_tells_of_no_network_at_once_in_one_line(
    network: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.perf_counter()
    with caplog.at_level(logging.INFO), pytest.raises(InputError) as caught:
        hub_folder(NAME)
    assert time.perf_counter() - started < 5 and not caplog.records
    (fault,) = caught.value.faults
    assert fault.startswith(f"base {NAME}: is not (all) on this machine and the hub cannot serve it ([Errno 111]")
    assert fault.endswith(f"run `hf download {NAME}` where there is a network, or name a folder") and "\n" not in fault
    with pytest.raises(InputError, match="the hub cannot serve it .*Errno 111"):
        hub_folder(NAME, COMMIT)
    assert time.perf_counter() - started < 5 and not caplog.records
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="is not .all. on this machine and HF_HUB_OFFLINE is set"):
        hub_folder(NAME)


def test_hub_folder_names_what_the_hub_does_not_have(hub: set[str]) -> None:
    with pytest.raises(InputError, match="base owner/other: the hub has no such model, .* check the name"):
        hub_folder("owner/other")
    with pytest.raises(InputError, match="base.revision: owner/name has no 'v2'; name a commit, branch or tag"):
        hub_folder(NAME, "v2")
