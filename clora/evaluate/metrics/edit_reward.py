"""EditReward (arXiv 2509.26346) by a service: its packages cannot live beside ours.

The service is asked `POST {url}` with `{"prompt", "source", "result"}`, pictures as base64 PNG, and answers
`{"reward": [score, log_uncertainty], "model": name}`: what `EditRewardInferencer.reward` gives for one picture. The
*first* number is the score, unbounded, usually -3 to 2, higher is better; the second is the logarithm of its
uncertainty and no quality. Scores of different bases (MiMo-VL, Qwen2.5-VL) do not compare: the model is reported.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from clora.errors import InputError
from clora.io.atomic import write_text
from clora.io.posting import Again, post_json, retrying
from clora.io.text import parse_json

MOST_BYTES = 65536  # of an answer
FACTS = "lossless PNG of both pictures; the first of two numbers: unbounded, usually -3 to 2, higher is better"


@dataclass(frozen=True)
class Reward:
    """One answer. `score` None: missing, for the reason `why`; never guessed."""

    score: float | None
    log_uncertainty: float | None
    why: str = ""


@dataclass(eq=False)
class RewardService:
    """A service at `url`. `models`: the names it has answered by."""

    url: str
    timeout_seconds: float = 120.0
    max_attempts: int = 3
    client: httpx.Client = field(default_factory=httpx.Client)
    sleep: Callable[[float], None] = time.sleep
    models: set[str] = field(default_factory=set)
    folder: Path | None = None  # where answers are kept, so that none is asked for twice

    def reward(self, prompt: str, source: Image.Image, result: Image.Image) -> Reward:
        """The reward of `result` (RGB) as `source` (RGB) edited by `prompt`."""
        body = {"prompt": prompt, "source": _png(source), "result": _png(result)}
        name = hashlib.sha256(json.dumps([self.url, body]).encode()).hexdigest()
        kept = None if self.folder is None else self.folder / f"{name}.json"
        if kept is not None and kept.is_file() and (found := self._read(kept.read_bytes())).score is not None:
            return found
        found, raw = self._ask(body)
        if kept is not None and found.score is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, raw.decode())
        return found

    def _ask(self, body: dict[str, str]) -> tuple[Reward, bytes]:
        def one() -> tuple[Reward, bytes]:
            status, raw = post_json(self.client, self.url, body, self.timeout_seconds, most_bytes=MOST_BYTES)
            if status != 200:
                return Reward(None, None, f"status {status}"), raw
            found = self._read(raw)
            if found.score is None:
                raise Again(found.why)
            return found, raw

        try:
            return retrying(self.max_attempts, sleep=self.sleep)(one)
        except Again as error:
            return Reward(None, None, str(error)), b""

    def _read(self, raw: bytes) -> Reward:
        try:
            values: Any = parse_json(raw.decode("utf-8"))
        except (InputError, ValueError):
            return Reward(None, None, "the answer is no JSON")
        pair = values.get("reward") if isinstance(values, dict) else None
        numbers = pair if isinstance(pair, list) and len(pair) == 2 else []
        if not numbers or not all(type(one) in (int, float) and math.isfinite(one) for one in numbers):
            return Reward(None, None, "the answer holds no pair of finite numbers under `reward`")
        self.models.add(str(values.get("model") or "unnamed")[:100])
        return Reward(float(numbers[0]), float(numbers[1]))


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
