"""FLIP: a golden number of its authors' package, which usual mistakes do not give, and what any distance must hold."""

from importlib.metadata import version

import numpy as np
import pytest

pytest.importorskip("flip_evaluator")
data = pytest.importorskip("skimage.data")

from clora.evaluate.metrics.flip import flip, flip_facts  # noqa: E402

GOLDEN = 0.23135  # astronaut's upper left 256 x 256 pixels against nine tenths of them, flip-evaluator 1.7


def photo():
    return (data.astronaut()[:256, :256] / 255).astype(np.float32)


def test_flip_is_the_golden_number():
    assert flip(photo(), photo() * np.float32(0.9)) == pytest.approx(GOLDEN, abs=1e-4)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: np.ascontiguousarray(x[..., ::-1]),  # BGR
        lambda x: x / np.float32(255),  # scaled twice
        lambda x: x ** np.float32(2.2),  # linear light
        lambda x: np.ascontiguousarray(x[::2, ::2]),  # half the size
    ],
)
def test_flip_is_none_of_the_usual_mistakes(mistake):
    assert abs(flip(mistake(photo()), mistake(photo() * np.float32(0.9))) - GOLDEN) > 3e-3


def test_flip_is_zero_for_equals_and_grows_with_the_damage():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, photo().shape)
    errors = [flip(photo(), np.clip(photo() + s * noise, 0, 1).astype(np.float32)) for s in (0, 0.05, 0.15)]
    assert errors[0] == 0 < errors[1] < errors[2] <= 1
    assert flip(1 - photo(), photo()) > 0.4


def test_flip_facts_say_what_the_figure_depends_on():
    facts = flip_facts()
    assert facts.startswith(f"flip-evaluator {version('flip-evaluator')}, LDR, 67 pixels a degree")
    assert facts.endswith("in [0, 1], 0 for equal pictures, lower is nearer")


def test_flip_refuses_other_ranges_types_and_sizes():
    for bad in (photo() * 255, photo().astype(np.float64), photo()[:8], photo() - 1):
        with pytest.raises(ValueError, match="must be"):
            flip(photo(), bad)
