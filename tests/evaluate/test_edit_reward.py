"""EditReward's service: the first number is the score, and whatever is no answer is missing."""

import base64
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from clora.evaluate.metrics.edit_reward import RewardService

SOURCE, RESULT = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (40, 200))


def service(answers, **more):
    """A service that gives these answers in turn, the last one for ever; with what it was asked."""
    asked, waits = [], []

    def handle(request):
        asked.append(json.loads(request.content))
        answer = answers[min(len(asked), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        return httpx.Response(status, content=body if isinstance(body, bytes) else json.dumps(body).encode())

    client = httpx.Client(transport=httpx.MockTransport(handle))
    return RewardService("http://r/reward", client=client, sleep=waits.append, **more), asked, waits


def test_reward_takes_the_first_number_as_the_score():
    rewards, asked, _ = service([{"reward": [-1.25, 0.5], "model": "mimo-7b"}])
    found = rewards.reward("paint it", SOURCE, RESULT)
    assert (found.score, found.log_uncertainty, found.why) == (-1.25, 0.5, "")
    assert rewards.models == {"mimo-7b"} and asked[0]["prompt"] == "paint it"


def test_reward_sends_source_and_result_by_name_and_without_loss():
    rewards, asked, _ = service([{"reward": [1, 0]}])
    rewards.reward("x", SOURCE, RESULT)
    for name, value in (("source", 40), ("result", 200)):
        assert np.asarray(Image.open(io.BytesIO(base64.b64decode(asked[0][name])))).tolist()[0][0] == [value] * 3


@pytest.mark.parametrize(
    "answer",
    [
        b"sorry", {"score": 3}, {"reward": [1.0]}, {"reward": [1.0, 0.0, 2.0]}, {"reward": ["1.0", "0.0"]},
        {"reward": [True, 0.0]}, b'{"reward": [NaN, 0]}', b'{"reward": [1e999, 0]}', [1.0, 0.0], (500, {}), (400, {}),
        b'{"reward": [1.0, 0.0]}' + b" " * 70000, b"\xff", httpx.ReadTimeout("slow"),
    ],
)  # fmt: skip
def test_reward_that_is_no_answer_is_missing_and_says_why(answer):
    rewards, asked, _ = service([answer])
    found = rewards.reward("x", SOURCE, RESULT)
    assert found.score is None and found.log_uncertainty is None and found.why
    assert len(asked) == (1 if answer == (400, {}) else 3) and rewards.models == set()


def test_reward_tries_again_and_keeps_what_it_got(tmp_path):
    rewards, asked, waits = service([(503, {}), (429, {}), {"reward": [0.5, -1]}], folder=tmp_path)
    assert rewards.reward("x", SOURCE, RESULT).score == 0.5
    assert waits == [1.0, 2.0] and len(asked) == 3
    assert rewards.reward("x", SOURCE, RESULT).score == 0.5 and len(asked) == 3  # kept
    rewards.reward("y", SOURCE, RESULT)
    rewards.reward("x", RESULT, SOURCE)  # two pictures swapped are another question
    assert len(asked) == 5
