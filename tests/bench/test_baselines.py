"""Baselines: PEFT's merges are what their definitions say, and two effects are composed as the papers do."""

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bench.lab import baselines
from bench.lab.baselines import merge_figures, run_bench
from bench.lab.merges import COMBINATIONS, Merge, candidates, edges, load_with_peft, merge, weights_for
from bench.lab.two_effects import averaged, fixed, switched
from clora.config import resolve_base
from clora.inference.sampling import few_step_sampling, sampling_sigmas
from clora.lora.files import read_lora, write_lora
from clora.lora.module import LoraModule

MODULES = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    shapes = {
        name: tensor.shape
        for name, tensor in (
            (module, (read_lora(resolve_base("tiny") / "acceleration.safetensors").modules[module]).delta())
            for module in MODULES
        )
    }
    rng = torch.Generator().manual_seed(0)
    files = {}
    for name, rank in (("a", 2), ("b", 3)):
        modules = {}
        for module, (N, K) in shapes.items():
            A, B = torch.randn(rank, K, generator=rng), torch.randn(N, rank, generator=rng)
            modules[module] = LoraModule(A, B, rank * 1.5)
        files[name] = folder / f"{name}.safetensors"
        write_lora(files[name], modules, dtype=torch.float32)
    return load_with_peft("tiny", files), files


def deltas(path):
    return {name: module.delta() for name, module in read_lora(path).modules.items()}


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_merge_of_enough_rank_is_the_weighted_sum(loaded, tmp_path, combination):
    model, files = loaded
    merge(model, list(files), Merge(combination, 0.5), 5, tmp_path / "m.safetensors")
    made, first, second = deltas(tmp_path / "m.safetensors"), deltas(files["a"]), deltas(files["b"])
    for name, delta in made.items():
        wanted = 0.5 * (first[name] + second[name])
        assert (delta - wanted).norm() < 2e-2 * wanted.norm()  # written in bfloat16


def test_merge_by_svd_of_little_rank_is_the_best_of_that_rank(loaded, tmp_path):
    model, files = loaded
    merge(model, list(files), Merge("svd", 1.0), 2, tmp_path / "m.safetensors")
    made, first, second = deltas(tmp_path / "m.safetensors"), deltas(files["a"]), deltas(files["b"])
    for name, delta in made.items():
        total = first[name] + second[name]
        least = torch.linalg.svdvals(total)[2:].norm()
        assert (delta - total).norm() == pytest.approx(float(least), rel=2e-2)


@pytest.mark.parametrize("combination", ["ties_svd", "dare_ties_svd", "magnitude_prune_svd"])
def test_merge_that_drops_entries_writes_what_the_base_can_load(loaded, tmp_path, combination):
    model, files = loaded
    merge(model, list(files), Merge(combination, 1.0, 0.5), 4, tmp_path / "m.safetensors")
    assert set(read_lora(tmp_path / "m.safetensors").modules) == set(MODULES)
    assert sorted(model.peft_config) == ["a", "b"]  # the merge itself is gone


def test_candidates_try_the_plain_mean():
    """`cat` by 1 / N is the mean of N updates, as `test_merge_of_enough_rank_is_the_weighted_sum` shows for two."""
    assert weights_for(12) == [1.0, 0.5, 0.25, 1 / 12] and weights_for(4) == [1.0, 0.5, 0.25]
    found = candidates(12)
    assert {how.weight for how in found if how.combination == "cat"} == {1.0, 0.5, 0.25, 1 / 12}
    assert len({how.name for how in found}) == len(found) == 4 * (2 + 3 * 2)


def test_merge_figures_say_where_the_best_is_at_the_end_of_what_was_tried():
    assert edges(Merge("svd", 0.25), 12) == [] and edges(Merge("svd", 1 / 12), 12) == ["least weight"]
    assert edges(Merge("ties_svd", 1.0, 0.2), 12) == ["greatest weight", "least density"]
    assert edges(Merge("svd", 0.25), 3) == ["least weight"] and edges(Merge("svd", 1 / 3), 3) == []
    found = merge_figures([Merge("svd", 1 / 12), Merge("dare_ties_svd", 0.5, 0.5)], 12)
    assert found["tried"] == {"weights": [1.0, 0.5, 0.25, 0.0833], "densities": [0.2, 0.5]}
    assert found["best"]["svd"] == {"weight": 0.0833, "density": None, "at the end": ["least weight"]}
    assert found["best"]["dare_ties_svd"]["at the end"] == ["greatest density"]
    assert set(found["best"]) <= set(COMBINATIONS)


def test_run_bench_runs_again_where_a_lora_file_is_another(tmp_path, monkeypatch):
    ran = []

    def evaluate(path, console):
        ran.append(path)
        path.with_name("report.json").write_text(f'{{"run": {len(ran)}}}')
        return {"run": len(ran)}

    monkeypatch.setattr(baselines, "evaluate_benchmark", evaluate)
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"one")
    (tmp_path / "1.png").write_bytes(b"")

    def run():
        methods = [{"name": "a", "lora": str(lora)}]
        sources = {"any": [tmp_path / "1.png"]}
        return run_bench(tmp_path / "out", ["sepia"], sources, methods, "a", Console(quiet=True))["run"]

    assert [run(), run()] == [1, 1]
    lora.write_bytes(b"two")
    assert [run(), run()] == [2, 2]


class Counted:
    """A backbone whose velocity under a slot is that slot's number, and which notes what was asked."""

    device = "cpu"

    def __init__(self):
        self.asked = []

    def velocity(self, x, sigma, cond, slots):
        self.asked.append(slots[0])
        return torch.full_like(x, float(slots[0][0]))


def test_switched_takes_turns_and_averaged_takes_the_mean():
    sampling, slots = few_step_sampling(8, 3.0), [("1", "fast"), ("3", "fast")]
    backbone, x = Counted(), torch.zeros(2, 4, 6)
    velocity = switched(backbone, slots, sampling)
    for sigma in sampling_sigmas(backbone, sampling, 4):
        velocity(x, sigma.expand(2), SimpleNamespace())
    assert [slot[0] for slot in backbone.asked] == ["1", "3"] * 4
    assert (averaged(backbone, slots)(x, torch.ones(2), SimpleNamespace()) == 2).all()
    assert (fixed(backbone, slots[1])(x, torch.ones(2), SimpleNamespace()) == 3).all()
