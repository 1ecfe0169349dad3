"""Bad cases and subject alignment by a vision model behind any OpenAI-compatible endpoint, never trusted blindly.

A reply counts only where it is exactly the JSON that was asked for. What cannot be used is *missing*: nothing is
guessed. Every reply is kept on disk under a hash of all that was asked, so that a run that goes on pays for none twice.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import httpx
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from clora.errors import InputError
from clora.evaluate.judge_prompts import (
    ALIGNMENT,
    ALIGNMENT_PICTURES,
    GATE,
    GATE_PICTURES,
    AlignmentReply,
    GateReply,
    quoted,
    reply_schema,
)
from clora.io.atomic import write_text
from clora.io.chat import Completion, Endpoint, NoAnswer, Refused, complete
from clora.io.text import parse_json, read_text

Rung = Literal["json_schema", "json_object", "plain"]
RUNGS: tuple[Rung, ...] = ("json_schema", "json_object", "plain")
NOT_SPOKEN = (400, 404, 415, 422, 501)  # what servers answer to a response format that they do not know
MAX_SIDE = 1024  # pixels; larger pictures are reduced
MAX_TOKENS = 300


class LimitReached(InputError):
    """No further call is allowed: the run's limit of calls or of cost is reached."""


class Answer(BaseModel):
    """One question's outcome. `value` None: missing, and `why` says why."""

    model_config = ConfigDict(extra="forbid")

    value: bool | int | None
    why: str = ""
    reasoning: str = ""
    rung: Rung | None = None
    model: str = ""  # as the server names it: aliases move
    fingerprint: str = ""
    endpoint: str = ""
    prompt_sha256: str = ""
    raw: list[str] = []  # every reply in order, those of no use too
    unfinished: bool = False  # it is asked again once a limit allows it
    prompt_tokens: int = 0  # of all of them, as far as the server counts
    answer_tokens: int = 0


@dataclass
class Limits:
    """At most so many calls and so much cost; prices are of a million tokens, cost in the same currency.

    `calls` and `cost` count what earlier runs were answered too (`add_kept`). A call whose cost nobody knows yet counts
    as much as the dearest one before it, so that calls that are under way cannot go beyond `max_cost` together; before
    the first answer there is none, and nothing holds those that are under way then. Behind a server that does not tell
    its tokens no cost is known, and `max_cost` allows no further call.
    """

    max_calls: int | None = None
    max_cost: float | None = None
    prompt_price: float = 0.0
    answer_price: float = 0.0
    calls: int = 0
    cost: float = 0.0
    dearest: float = 0.0
    untold: int = 0  # replies whose tokens the server did not tell
    _under_way: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take_call(self) -> None:
        """Count a call that is about to be made. Raises `LimitReached` where none is left."""
        with self._lock:
            if self.max_calls is not None and self.calls >= self.max_calls:
                raise LimitReached(f"judge.max_calls: {self.max_calls} calls are made; raise it to go on")
            if self.max_cost is not None and self.untold:
                raise LimitReached("judge.max_cost: the server does not tell its tokens; give max_calls in its place")
            least = self.cost + (self._under_way + 1) * self.dearest
            if self.max_cost is not None and (self.cost >= self.max_cost or least > self.max_cost):
                spent = f"{self.cost:.2f} is spent of {self.max_cost:.2f}"
                dear = f" and {self._under_way} calls are under way, of up to {self.dearest:.2f} each"
                raise LimitReached(f"judge.max_cost: {spent}{dear if self.dearest else ''}; raise it to go on")
            self.calls += 1
            self._under_way += 1

    def end_call(self, reply: Completion | None) -> None:
        """Count what a call cost that `take_call` allowed; None: it had no answer."""
        with self._lock:
            self._under_way -= 1
            if reply is not None:
                self._add(reply.prompt_tokens, reply.answer_tokens, 1)

    def add_kept(self, folder: Path) -> None:
        """Count the replies that lie in a judge's folder, with what they cost where the server told their tokens."""
        for path in folder.glob("*.json"):
            if (answer := _read_kept(path)) is not None:
                self.calls += len(answer.raw)
                self._add(answer.prompt_tokens, answer.answer_tokens, len(answer.raw))

    def share(self, rank: int, world_size: int) -> Limits:
        """What one of several processes may spend of what is left, so that all of them stay within the whole."""
        if world_size == 1:
            return self
        share = replace(self, max_calls=None, max_cost=None, _under_way=0, _lock=threading.Lock())
        if self.max_calls is not None:
            left = max(0, self.max_calls - self.calls)
            share.max_calls = self.calls + left // world_size + (rank < left % world_size)
        if self.max_cost is not None:
            share.max_cost = self.cost + max(0.0, self.max_cost - self.cost) / world_size
        return share

    def _add(self, prompt_tokens: int, answer_tokens: int, replies: int) -> None:
        cost = (prompt_tokens * self.prompt_price + answer_tokens * self.answer_price) / 1e6
        self.cost += cost
        self.dearest = max(self.dearest, cost / max(1, replies))
        self.untold += replies if prompt_tokens + answer_tokens == 0 else 0


@dataclass
class Judge:
    """Asks `endpoint`; answers are kept in `folder`. Safe to use from several threads.

    The response format steps down from a JSON schema to any JSON object to plain text, where the server refuses one;
    each answer records its rung.
    """

    endpoint: Endpoint
    folder: Path
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    client: httpx.Client | None = None
    backoff_seconds: float = 1.0
    _rung: int = 0

    def bad_case(
        self, instruction: str, criteria: str, template: tuple[Path, Path], test: tuple[Path, Path], repeat: int = 0
    ) -> Answer:
        """Whether the test pair (source, result) is a bad case, by Fig. 11. `repeat` asks the same anew, with
        another seed."""
        text = GATE.format(instruction=quoted(instruction), criteria=quoted(criteria))
        return self._ask(text, GATE_PICTURES, (*template, *test), GateReply, "is_bad_case", repeat)

    def alignment(self, instruction: str, test: tuple[Path, Path], repeat: int = 0) -> Answer:
        """How well the subject is kept, 1 to 5, by Fig. 12."""
        text = ALIGNMENT.format(instruction=quoted(instruction))
        return self._ask(text, ALIGNMENT_PICTURES, test, AlignmentReply, "scores", repeat)

    def _ask(
        self,
        text: str,
        names: Sequence[str],
        pictures: Sequence[Path],
        kind: type[GateReply] | type[AlignmentReply],
        value: str,
        repeat: int,
    ) -> Answer:
        shown = [picture_png(path) for path in pictures]
        prompt = hashlib.sha256(text.encode()).hexdigest()
        asked = [self.endpoint.shown, self.endpoint.model, prompt, self.seed, repeat]
        asked += [hashlib.sha256(png).hexdigest() for png in shown]
        kept = self.folder / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()}.json"
        before = _read_kept(kept)
        if before is not None and not before.unfinished:
            return before
        body = self._body(text, names, shown, self.seed + repeat)
        answer = self._climb_down(body, kind, value)
        answer = answer.model_copy(update={"endpoint": self.endpoint.shown, "prompt_sha256": prompt})
        if before is not None:
            answer = _with_spent(answer, before)
        if answer.value is not None or answer.raw:  # a reply was paid for
            write_text(kept, answer.model_dump_json(indent=1) + "\n")
        return answer

    def _body(self, text: str, names: Sequence[str], shown: Sequence[bytes], seed: int) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        for name, png in zip(names, shown, strict=True):
            url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            content += [{"type": "text", "text": f"{name}:"}, {"type": "image_url", "image_url": {"url": url}}]
        return {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "seed": seed,
            "max_tokens": MAX_TOKENS,
        }

    def _climb_down(self, body: dict[str, Any], kind: type[GateReply] | type[AlignmentReply], value: str) -> Answer:
        first = self._rung
        for place in range(first, len(RUNGS)):
            rung = RUNGS[place]
            try:
                answer = self._one_rung(body | response_format(rung, value), kind, rung)
            except Refused as error:
                if error.status not in NOT_SPOKEN:
                    raise
                if rung == "plain":  # not the format, then, but this question
                    return Answer(value=None, why=str(error), rung=rung)
                continue
            if answer.value is not None:
                self._rung = max(self._rung, place)
            return answer
        raise AssertionError("plain is the last rung")

    def _one_rung(self, body: dict[str, Any], kind: type[GateReply] | type[AlignmentReply], rung: Rung) -> Answer:
        replies: list[Completion] = []  # those of earlier tries too
        tries = _Tries(self.limits)

        def read(reply: Completion) -> Answer:
            tries.end(reply)
            replies.append(reply)
            found = read_reply(reply.text, kind)
            return Answer(
                value=found.value,
                reasoning=found.brief_reasoning,
                rung=rung,
                model=reply.model,
                fingerprint=reply.fingerprint,
            )

        try:
            answer = complete(
                self.endpoint,
                body,
                read,
                client=self.client,
                backoff_seconds=self.backoff_seconds,
                before_try=tries.start,
            )
        except (NoAnswer, LimitReached) as error:
            answer = Answer(value=None, why=str(error), rung=rung, unfinished=isinstance(error, LimitReached))
        finally:
            tries.end()
        spent = Answer(
            value=None,
            raw=[one.text for one in replies],
            prompt_tokens=sum(one.prompt_tokens for one in replies),
            answer_tokens=sum(one.answer_tokens for one in replies),
        )
        return _with_spent(answer, spent)


@dataclass
class _Tries:
    """The tries of one question as its limits see them: one is under way at a time, until its answer or the next."""

    limits: Limits
    _open: bool = False

    def start(self) -> None:
        self.end()
        self.limits.take_call()
        self._open = True

    def end(self, reply: Completion | None = None) -> None:
        if self._open:
            self.limits.end_call(reply)
        self._open = False


def response_format(rung: Rung, value: str) -> dict[str, Any]:
    """The part of a request that asks for a rung's form of answer."""
    if rung == "plain":
        return {}
    if rung == "json_object":
        return {"response_format": {"type": "json_object"}}
    schema = {"name": value, "strict": True, "schema": reply_schema(value)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


_FENCED = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n\s*```\s*\Z", re.DOTALL)


def read_reply(text: str, kind: type[GateReply] | type[AlignmentReply]) -> GateReply | AlignmentReply:
    """The reply in a text that is one JSON object of just its fields, perhaps in a code fence.

    Raises ValueError for anything else: more text, other fields, a number outside 1 to 5, "yes" for true.
    """
    fenced = _FENCED.match(text)
    found = parse_json(fenced[1] if fenced else text)
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise ValueError(f"not the JSON that was asked for ({error.errors()[0]['msg']})") from None


def picture_png(path: Path) -> bytes:
    """A picture as PNG bytes, as large as it is up to `MAX_SIDE`; lossless, so that artefacts are the method's own."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()


def _with_spent(answer: Answer, before: Answer) -> Answer:
    """An answer with the replies that its question was paid for before."""
    return answer.model_copy(
        update={
            "raw": [*before.raw, *answer.raw],
            "prompt_tokens": before.prompt_tokens + answer.prompt_tokens,
            "answer_tokens": before.answer_tokens + answer.answer_tokens,
        }
    )


def _read_kept(path: Path) -> Answer | None:
    """The answer in a file; None where there is none that can be read: it is asked for again."""
    try:
        return Answer.model_validate_json(read_text(path))
    except (InputError, OSError, ValidationError):
        return None
