"""Asking a model behind any OpenAI-compatible endpoint, with images.

Overload, time-outs and answers that the caller's check refuses are tried again. The API key comes from an environment
variable and appears in no log, message or file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from PIL import Image

from clora.errors import InputError
from clora.io.posting import Again, post_json, retrying
from clora.io.text import parse_json

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

MAX_IMAGE_SIDE = 768


@dataclass(frozen=True)
class Endpoint:
    """Where to ask. `key` is the configuration key that names it, for messages; `mend` ends the last of them."""

    key: str
    url: str  # ending in /v1
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    timeout_seconds: float = 60.0
    max_attempts: int = 5
    mend: str = "check it"

    @property
    def shown(self) -> str:
        """The address without user name, password and query, which may be secrets."""
        url = httpx.URL(self.url)
        return f"{url.scheme}://{url.host}{f':{url.port}' if url.port else ''}{url.path}"


class NoAnswer(InputError):
    """The endpoint gave no usable answer in all tries; `replies` are the texts that were of no use."""

    def __init__(self, message: str, replies: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.replies = list(replies)


class Refused(InputError):
    """The endpoint refused the request itself, which no further try mends."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Completion:
    """A reply: its text, the model and snapshot that the server names, and the tokens it counts (0: it does not)."""

    text: str
    model: str = ""
    fingerprint: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0


def chat_request(model: str, images: Sequence[Image.Image], text: str) -> dict[str, Any]:
    """The body of a request that shows images, in order, and then the text."""
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_jpeg_base64(image)}"}} for image in images
    ]
    content.append({"type": "text", "text": text})
    return {"model": model, "messages": [{"role": "user", "content": content}]}


def _jpeg_base64(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode()


def ask(
    endpoint: Endpoint,
    body: dict[str, Any],
    read: Callable[[str], Answer],
    *,
    client: httpx.Client | None = None,
    backoff_seconds: float = 1.0,
) -> Answer:
    """What `read` makes of the text of the model's answer to `body`; see `complete`."""
    return complete(endpoint, body, lambda reply: read(reply.text), client=client, backoff_seconds=backoff_seconds)


def complete(
    endpoint: Endpoint,
    body: dict[str, Any],
    read: Callable[[Completion], Answer],
    *,
    client: httpx.Client | None = None,
    backoff_seconds: float = 1.0,
    before_try: Callable[[], None] = lambda: None,
) -> Answer:
    """What `read` makes of the model's answer to `body` (see `chat_request`).

    `read` raises ValueError for an answer that is of no use. Such answers, status 408, 409, 429 and 5xx, time-outs and
    broken connections are tried again, at most `max_attempts` times in all, waiting `backoff_seconds` doubled each time
    (or what the server asks for, up to a minute). What `before_try` raises ends the tries. Raises `NoAnswer` and
    `Refused`, which name the endpoint and the mend.

    A try whose answer did not come bears the `Idempotency-Key` of the one before, also in a run after one that was
    killed: a server that knows this header charges no question twice, and others ignore it.
    """
    replies: list[str] = []
    answers = 0
    question = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def tell(attempt: int, reason: BaseException | None) -> None:
        log.info("%s: attempt %d: %s", endpoint.shown, attempt, reason)

    def one(used: httpx.Client) -> Answer:
        nonlocal answers
        before_try()
        try:
            return _post(used, endpoint, body, read, f"clora-{question[:32]}-{answers}")
        except Again as error:
            answers += error.answered
            if error.reply is not None:
                replies.append(error.reply)
            raise

    tries = retrying(endpoint.max_attempts, backoff_seconds, tell)
    try:
        if client is not None:
            return tries(one, client)
        with httpx.Client() as own:
            return tries(one, own)
    except Again as error:
        what = f"no usable answer in {endpoint.max_attempts} attempts ({error})"
        raise NoAnswer(f"{endpoint.key} {endpoint.shown}: {what}; {endpoint.mend}", replies) from None


def _post(
    client: httpx.Client, endpoint: Endpoint, body: dict[str, Any], read: Callable[[Completion], Answer], once: str
) -> Answer:
    key = _api_key(endpoint)
    headers = {"Idempotency-Key": once} | ({"Authorization": f"Bearer {key}"} if key else {})
    timeout = endpoint.timeout_seconds
    try:
        url = httpx.URL(f"{endpoint.url.rstrip('/')}/chat/completions")
        # A password in the address is sent, but taken out of the address, which httpx logs.
        auth = (url.username, url.password) if url.username else None
        plain = url.copy_with(userinfo=b"")
        status, raw = post_json(client, plain, body, timeout, headers=headers, auth=auth)
    except httpx.InvalidURL as error:
        raise InputError(f"{endpoint.key} is not an address ({error}); correct it") from None
    if status != 200:
        raise Refused(_refused(status, raw, key, endpoint), status)
    try:
        reply = _completion(raw)
    except ValueError as error:
        raise Again(str(error), reply=raw[:2000].decode("utf-8", "replace")) from None
    try:
        return read(reply)
    except ValueError as error:
        raise Again(str(error), reply=reply.text) from None


def _completion(raw: bytes) -> Completion:
    try:
        answer = parse_json(raw.decode())
        message = answer["choices"][0]["message"]
        content = message["content"]
        if content is None:  # a refusal, or what a filter has emptied: it was answered, and paid for
            content = message.get("refusal") or ""
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError("the answer is not a chat completion") from None
    if not isinstance(content, str):
        raise ValueError("the answer holds no text")
    usage = answer.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return Completion(
        content,
        _short(answer.get("model")),
        _short(answer.get("system_fingerprint")),
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
    )


def _short(value: Any) -> str:
    return value[:200] if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 40 else 0


def _api_key(endpoint: Endpoint) -> str:
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key.isascii() or not all(letter.isprintable() for letter in key):
        raise InputError(f"the key in ${endpoint.api_key_env} holds characters that no header may; set it again")
    return key


def _refused(status: int, raw: bytes, key: str, endpoint: Endpoint) -> str:
    where = f"{endpoint.key} {endpoint.shown}: status {status}"
    if status in (401, 403):
        return f"{where}; put a valid key into the environment variable {endpoint.api_key_env}"
    said = " ".join(raw[:2000].decode("utf-8", "replace").split())
    if key:
        said = said.replace(key, "***")
    return f"{where} ({said[:200]}); check {endpoint.key} and {endpoint.key.rpartition('.')[0]}.model"
