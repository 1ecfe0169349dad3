"""`clora eval`: figures that any reader of JSON takes, faults before the base is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from clora.backbones.load import linear_shapes
from clora.config import Config, build_config
from clora.errors import InputErrors
from clora.evaluate.metrics.image import PSNR_CAP
from clora.jobs import eval as job
from clora.jobs.eval import evaluate_collection
from clora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueSchedule, write_collection
from clora.lora.module import LoraModule


@pytest.fixture(scope="module")
def collection(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("collection") / "collection.safetensors"
    rng = torch.Generator().manual_seed(0)
    modules = {
        name: LoraModule(torch.randn(1, K, generator=rng), torch.randn(N, 1, generator=rng), 1.0)
        for name, (N, K) in linear_shapes(random_base).items()
        if name.endswith("to_q")
    }
    effects = [CatalogueEntry(name=name, student_prompt=f"make it {name}") for name in ("warm", "cold")]
    schedule = CatalogueSchedule(num_steps=2, shift=3.0)
    write_collection(path, modules, Catalogue(base=str(random_base), schedule=schedule, effects=effects))
    return path


def config(base: Path, folder: Path, names: tuple[str, ...] = ("warm", "cold"), **evaluation: Any) -> Config:
    effects = [{"name": name, "prompt": "change it", "pairs": str(folder / name)} for name in names]
    values = {
        "preset": "tiny",
        "base": {"model": str(base), "dtype": "float32"},
        "output_dir": str(folder / "run"),
        "effects": effects,
        "eval": {"num_samples": 3, "batch_size": 2} | evaluation,
        "train": {"buckets": {"aspect_ratios": [[1, 1], [3, 2]]}},
    }
    return build_config(values, folder)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three pairs of each of two effects, squares of one and oblongs of the other."""
    rng = np.random.default_rng(0)
    for name, size in (("warm", (64, 64)), ("cold", (48, 72))):
        for side in ("source", "target"):
            (tmp_path / name / side).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / side / f"{i}.png")
    return tmp_path


def strict(text: str) -> Any:
    """JSON as other programs read it: without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_evaluate_collection_of_exact_copies_writes_json(
    random_base: Path, collection: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perfect(backbone: Any, method: Any, examples: Any, seeds: Any, size: int) -> Any:
        for place, example in enumerate(examples):
            target = example.sources[-1].parents[1] / "target" / example.sources[-1].name
            yield place, np.asarray(Image.open(target), np.float32) / np.float32(255)

    monkeypatch.setattr(job, "sample_examples", perfect)
    answer = evaluate_collection(config(random_base, pairs), collection)
    found = strict((pairs / "run" / "eval" / "eval.json").read_text())
    assert found == answer and strict(json.dumps(answer)) == answer
    for figures in found["effects"].values():
        assert figures["hf_ratio"] == 1 and figures["detail_error"] == 0
        assert figures["psnr"] == PSNR_CAP and figures["l1"] == 0 and figures["unchanged"] == 0


def test_evaluate_collection_detail_errors_do_not_cancel(
    random_base: Path, collection: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of half and of twice the target's high frequencies: their geometric mean is right, the error 3 dB."""
    ratios = iter([0.5, 2.0] * 100)
    monkeypatch.setattr(job, "hf_ratio", lambda output, target: next(ratios))
    answer = evaluate_collection(config(random_base, pairs), collection)
    (mean,) = answer["mean"].values()
    assert mean["hf_ratio"] == pytest.approx(1) and mean["detail_error"] == pytest.approx(3.0103, abs=1e-3)


def test_evaluate_collection_does_not_depend_on_the_batch(random_base: Path, collection: Path, pairs: Path) -> None:
    one, two = (
        evaluate_collection(config(random_base, pairs, batch_size=size, seeds=[0, 3]), collection) for size in (1, 2)
    )
    assert one["effects"].keys() == {"warm", "cold"}
    for name, figures in one["effects"].items():
        assert figures == pytest.approx(two["effects"][name], abs=1e-4)
    picture: NDArray[np.uint8] = np.asarray(Image.open(one["grid"]))
    assert picture.shape[0] > 2 * 128 and picture.shape[1] > 3 * 144  # cells as large as the largest image


def test_evaluate_collection_lists_all_faults_before_loading(
    random_base: Path, collection: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "open_base", lambda *_, **__: pytest.fail("the base was loaded"))
    (pairs / "cold" / "source" / "1.png").unlink()
    asked = config(random_base, pairs, ("warm", "cold", "wram"))
    warm = asked.effects[0].model_copy(update={"pairs": None})
    with pytest.raises(InputErrors) as caught:
        evaluate_collection(asked.model_copy(update={"effects": [warm, *asked.effects[1:]]}), collection)
    faults = caught.value.faults
    assert len(faults) == 3
    assert "effect wram: is not in" in faults[0] and "did you mean 'warm'?" in faults[0]
    assert "(warm): has no pairs" in faults[1] and "1" in faults[2]
    with pytest.raises(InputErrors, match="effects: are none"):
        evaluate_collection(asked.model_copy(update={"effects": []}), collection)
