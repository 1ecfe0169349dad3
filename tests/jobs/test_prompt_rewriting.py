"""Rewriting prompts through a real HTTP server: the request, retries, the cache, bad answers, the key."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import clora.io.posting as posting
from clora.config import PromptsConfig
from clora.errors import InputError
from clora.jobs.prompts import INSTRUCTION, answer_fault, rewrite_prompt

GOOD = "Transform the pet into a hand-modelled clay figure with soft rounded edges and studio light."
KEY = "sk-secret-0123456789"


class Endpoint:
    """A chat-completions server that gives prepared replies, the last of them for ever, and keeps requests."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, Any, dict[str, str]]] = [(200, GOOD, {})]
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.delay = 0.0
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {key.lower(): value for key, value in self.headers.items()}
                endpoint.requests.append((self.path, headers, json.loads(body)))
                if endpoint.delay:
                    time.sleep(endpoint.delay)
                status, content, extra = endpoint.replies[min(len(endpoint.requests), len(endpoint.replies)) - 1]
                raw = content if isinstance(content, bytes) else completion(content)
                self.send_response(status)
                for name, value in {"content-length": str(len(raw)), **extra}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"


def completion(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("CLORA_TEST_KEY", KEY)
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (900, 300), (60 * index, 0, 0)) for index in range(4)]


def ask(server: Endpoint, cache: Path, prompt: str = "change the style", **values: Any) -> str:
    settings = PromptsConfig(
        **{"endpoint": server.url, "model": "m", "api_key_env": "CLORA_TEST_KEY", "max_attempts": 4, **values}
    )
    with httpx.Client(trust_env=False, verify=False) as client:  # no certificates to load
        return rewrite_prompt(prompt, pictures(), settings, cache, client=client, backoff_seconds=0.001)


def test_the_request_shows_two_pairs_and_the_papers_instruction(endpoint: Endpoint, tmp_path: Path) -> None:
    assert ask(endpoint, tmp_path, "use {braces} and {}") == GOOD
    path, headers, body = endpoint.requests[0]
    assert (path, headers["authorization"], body["model"]) == ("/v1/chat/completions", f"Bearer {KEY}", "m")
    (message,) = body["messages"]
    *images, text = message["content"]
    assert text["text"] == INSTRUCTION.replace("{}", "use {braces} and {}")
    shown = []
    for part in images:
        prefix, _, data = part["image_url"]["url"].partition(",")
        assert prefix == "data:image/jpeg;base64"
        shown.append(Image.open(io.BytesIO(base64.b64decode(data))))
    assert [image.size for image in shown] == [(768, 256)] * 4
    assert [round(image.getpixel((9, 9))[0] / 60) for image in shown] == [0, 1, 2, 3]


def test_the_instruction_is_figure_15() -> None:
    words = " ".join(INSTRUCTION.split())
    for sentence in (
        "You are provided with four images, consisting of two pairs of image editing data.",
        "refine and enrich this prompt to more accurately describe the transformation applied by this effect while"
        " maintaining its generality.",
        "Instead, use generic categories (e.g., human, pet, animal) based on the provided images.",
        "Describe the perspective shift only if it is consistently applied across all pairs; otherwise, omit it.",
        'Refer to the provided rough prompt: "{}".',
        "Directly return the refined prompt without any supplementary or conversational text.",
    ):
        assert sentence in words


def test_an_answer_is_kept_and_not_asked_for_again(endpoint: Endpoint, tmp_path: Path) -> None:
    assert ask(endpoint, tmp_path) == ask(endpoint, tmp_path) == GOOD
    assert len(endpoint.requests) == 1
    ask(endpoint, tmp_path, "another prompt")
    ask(endpoint, tmp_path, model="other")
    assert len(endpoint.requests) == 3
    kept = [path.read_text() for path in tmp_path.iterdir()]
    assert len(kept) == 3 and not any(KEY in text for text in kept)


@pytest.mark.parametrize("damage", ["", "{", '{"answer": 3}', '{"answer": "Sorry, I cannot look at these images."}'])
def test_a_damaged_entry_is_asked_for_again(endpoint: Endpoint, tmp_path: Path, damage: str) -> None:
    ask(endpoint, tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_text(damage)
    assert ask(endpoint, tmp_path) == GOOD
    assert len(endpoint.requests) == 2 and json.loads(entry.read_text())["answer"] == GOOD


@pytest.mark.parametrize(
    "bad",
    [
        (429, b"slow down", {"retry-after": "0"}),
        (500, b"", {}),
        (503, b"<html>", {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        (200, b"not json", {}),
        (200, b'{"choices": []}', {}),
        (200, b'{"error": {"message": "x"}}', {}),
        (200, None, {}),
        (200, "", {}),
        (200, "Too short.", {}),
        (200, "long " * 300, {}),
        (200, f"{GOOD}\n\n{GOOD}", {}),
        (200, f"```\n{GOOD}\n```", {}),
        (200, f"**Prompt:** {GOOD}", {}),
        (200, f"# {GOOD}", {}),
        (200, f"- {GOOD}", {}),
        (200, f"<trigger>{GOOD}", {}),
        (200, "I'm sorry, but I can't help with describing these images.", {}),
        (200, "As an AI language model I do not see the images you speak of.", {}),
        (200, f"Sure! {GOOD}", {}),
        (200, f"Here is the refined prompt: {GOOD}", {}),
        (200, b"x" * (1 << 20) + b"xx", {}),
    ],
    ids=lambda bad: f"{bad[0]}-{str(bad[1])[:24]}",
)
def test_overload_and_bad_answers_are_tried_again(
    endpoint: Endpoint, tmp_path: Path, bad: tuple[int, Any, dict[str, str]]
) -> None:
    endpoint.replies = [bad, bad, (200, GOOD, {})]
    assert ask(endpoint, tmp_path) == GOOD
    assert len(endpoint.requests) == 3


def test_giving_up_says_where_why_and_what_to_do(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.replies = [(503, b"", {})]
    with pytest.raises(InputError) as caught:
        ask(endpoint, tmp_path, max_attempts=3)
    assert len(endpoint.requests) == 3
    assert str(caught.value) == (
        f"prompts.endpoint {endpoint.url}: no usable answer in 3 attempts (status 503);"
        " check it, or leave prompts.endpoint out to use templates"
    )
    assert list(tmp_path.iterdir()) == []


def test_time_outs_are_tried_again(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.delay = 0.5
    with pytest.raises(InputError, match=r"2 attempts \(ReadTimeout"):
        ask(endpoint, tmp_path, timeout_seconds=0.05, max_attempts=2)
    assert len(endpoint.requests) == 2


def test_a_server_that_is_not_there(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.server.shutdown()
    endpoint.server.server_close()
    with pytest.raises(InputError, match=r"2 attempts \(ConnectError"):
        ask(endpoint, tmp_path, max_attempts=2)


@pytest.mark.parametrize("asked", ["0.2", "3600"])
def test_the_wait_is_what_the_server_asks_for_up_to_a_minute(
    endpoint: Endpoint, tmp_path: Path, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
    endpoint.replies = [(429, b"", {"retry-after": asked}), (500, b"", {}), (500, b"", {}), (200, GOOD, {})]
    assert ask(endpoint, tmp_path) == GOOD
    assert slept == pytest.approx([min(float(asked), 60.0), 0.002, 0.004])


@pytest.mark.parametrize(("status", "mend"), [(401, "CLORA_TEST_KEY"), (403, "CLORA_TEST_KEY"), (404, "prompts.model")])
def test_refusals_are_final_and_never_show_the_key(
    endpoint: Endpoint, tmp_path: Path, status: int, mend: str, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.replies = [(status, f"no such thing for {KEY}".encode(), {})]
    with caplog.at_level(logging.DEBUG), pytest.raises(InputError) as caught:
        ask(endpoint, tmp_path)
    assert len(endpoint.requests) == 1
    assert f"status {status}" in str(caught.value) and mend in str(caught.value)
    assert KEY not in str(caught.value) and KEY not in caplog.text


def test_redirects_are_not_followed_with_the_key(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.replies = [(307, b"", {"location": f"{endpoint.url}/elsewhere"})]
    with pytest.raises(InputError, match="status 307"):
        ask(endpoint, tmp_path)
    assert len(endpoint.requests) == 1


def test_without_a_key_no_header_is_sent(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLORA_TEST_KEY")
    assert ask(endpoint, tmp_path) == GOOD
    assert "authorization" not in endpoint.requests[0][1]


def test_a_key_that_no_header_may_hold_is_named_not_shown(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLORA_TEST_KEY", "sk-ключ")
    with pytest.raises(InputError) as caught:
        ask(endpoint, tmp_path)
    assert "$CLORA_TEST_KEY" in str(caught.value) and "ключ" not in str(caught.value)
    monkeypatch.setenv("CLORA_TEST_KEY", f"{KEY}\n")  # what `export KEY=$(cat file)` may leave
    assert ask(endpoint, tmp_path) == GOOD
    assert endpoint.requests[0][1]["authorization"] == f"Bearer {KEY}"


def test_secrets_in_the_address_are_used_not_shown(
    endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.replies = [(500, b"", {}), (404, b"", {})]
    address = endpoint.url.replace("http://", "http://user:hunter2@")
    with caplog.at_level(logging.DEBUG), pytest.raises(InputError) as caught:
        ask(endpoint, tmp_path, endpoint=address)
    assert "hunter2" not in str(caught.value) + caplog.text and "127.0.0.1" in str(caught.value)
    expected = "Basic " + base64.b64encode(b"user:hunter2").decode()
    assert [headers["authorization"] for _, headers, _ in endpoint.requests] == [expected] * 2


def test_an_answer_that_drips_is_cut_off(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(posting.time, "monotonic", lambda: float(next(clock)))
    settings = PromptsConfig(endpoint=endpoint.url, max_attempts=1)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=completion(GOOD)))
    with httpx.Client(transport=transport) as client, pytest.raises(InputError, match="took too long"):
        rewrite_prompt("p", pictures(), settings, tmp_path, client=client)


@pytest.mark.parametrize("quotes", ['""', "“”", "''", "``"])
def test_quotation_marks_around_the_whole_are_dropped(endpoint: Endpoint, tmp_path: Path, quotes: str) -> None:
    endpoint.replies = [(200, f" {quotes[0]}{GOOD}{quotes[1]}\n", {})]
    assert ask(endpoint, tmp_path) == GOOD


def test_answer_fault_lets_ordinary_prompts_pass() -> None:
    settings = PromptsConfig(min_chars=5, max_chars=200)
    for prompt in (
        GOOD,
        'Write "HELLO" on the shirt (in red); keep the 3-D look - 50% darker, f/1.8.',
        "Surely transform the human into a statue",
        "1980s film look with grain",
        "I-shaped letters made of wood replace the subject.",
        "将宠物变成手指大小",
    ):
        assert answer_fault(prompt, settings) is None, prompt
    assert answer_fault("x" * 201, settings) == "the answer has 201 characters, not 5 to 200"


def test_rewrite_prompt_wants_two_pairs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="four images"):
        rewrite_prompt("p", pictures()[:2], PromptsConfig(endpoint="http://x/v1"), tmp_path)
