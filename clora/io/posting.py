"""JSON posted to a service: the answer is bounded, and what another try may mend is tried again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt
from tenacity.nap import sleep as tenacity_sleep

MAX_ANSWER_BYTES = 1 << 20
MAX_WAIT_SECONDS = 60.0
UNDER_WAY = (408, 409)  # the request did not come in full; the same one is still being answered


class Again(Exception):
    """A failure that another try may mend, after `wait_seconds` where the server says so. `reply`: a text that was of
    no use. `answered`: the server gave an answer, if one of no use."""

    def __init__(
        self, reason: str, wait_seconds: float | None = None, reply: str | None = None, answered: bool = True
    ) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.reply = reply
        self.answered = answered


def retrying(
    attempts: int,
    backoff_seconds: float = 1.0,
    tell: Callable[[int, BaseException | None], None] = lambda attempt, reason: None,
    sleep: Callable[[float], None] = tenacity_sleep,
) -> Retrying:
    """Calls a function again for `Again`, `attempts` times in all, and raises the last one. Between two tries it calls
    `tell` and waits `backoff_seconds` doubled each time, or what the server asks for, up to a minute."""

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait_seconds if isinstance(error, Again) else None
        doubled: float = backoff_seconds * 2.0 ** (state.attempt_number - 1)
        return min(doubled if asked is None else asked, MAX_WAIT_SECONDS)

    def before_sleep(state: RetryCallState) -> None:
        tell(state.attempt_number, state.outcome.exception() if state.outcome else None)

    return Retrying(
        stop=stop_after_attempt(attempts),
        retry=retry_if_exception_type(Again),
        wait=wait,
        before_sleep=before_sleep,
        sleep=sleep,
        reraise=True,
    )


def post_json(
    client: httpx.Client,
    url: httpx.URL | str,
    body: Any,
    timeout_seconds: float,
    *,
    headers: Mapping[str, str] | None = None,
    auth: tuple[str, str] | None = None,
    most_bytes: int = MAX_ANSWER_BYTES,
) -> tuple[int, bytes]:
    """The status and the bytes of the answer to `body`.

    Raises `Again` for status 408, 409, 429 and 5xx, a time-out, a broken connection, and an answer of more than
    `most_bytes`; and `httpx.InvalidURL`.
    """
    try:
        with client.stream("POST", url, json=body, headers=headers, timeout=timeout_seconds, auth=auth) as response:
            raw = _read_limited(response, time.monotonic() + timeout_seconds, most_bytes)
    except httpx.TransportError as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise Again(said, answered=False) from None
    if response.status_code in UNDER_WAY:
        raise Again(f"status {response.status_code}", _retry_after(response), answered=False)
    if response.status_code == 429 or response.status_code >= 500:
        raise Again(f"status {response.status_code}", _retry_after(response))
    return response.status_code, raw


def _read_limited(response: httpx.Response, deadline: float, most_bytes: int) -> bytes:
    raw = b""
    for chunk in response.iter_bytes():
        raw += chunk
        if len(raw) > most_bytes:
            raise Again(f"the answer is longer than {most_bytes} bytes")
        if time.monotonic() > deadline:  # the client's own time-out only bounds the wait for the next bytes
            raise Again("the answer took too long", answered=False)
    return raw


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if re.fullmatch(r"\d{1,6}(\.\d+)?", text) else None
