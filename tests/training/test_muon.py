"""Muon on flat parameters: against singular values, torch's own, AdamW after it, and two processes against one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clora.training import distributed
from clora.training.flat_parameters import FlatParameters
from clora.training.muon import muon_steps, orthogonalised
from clora.training.optimizer import AdamW, apply_gradients
from tests.support import processes
from tests.support.memory import PeakBytes


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12)])
def test_orthogonalised_keeps_singular_vectors_and_evens_their_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rank = min(shape)
    U, V = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64))[0] for n in shape)
    values = torch.logspace(0, -1.5, rank, dtype=torch.float64)
    found = orthogonalised((U * values @ V.T).float()).double()
    inside = U.T @ found @ V
    assert 0.6 < inside.diagonal().min() and inside.diagonal().max() < 1.3
    torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-4)
    torch.testing.assert_close(U @ inside @ V.T, found, rtol=0, atol=1e-4)


def test_orthogonalised_works_on_each_matrix_alone_and_leaves_zeros() -> None:
    torch.manual_seed(0)
    some = torch.randn(3, 5, 9) * torch.tensor([1e-4, 0.0, 1e3])[:, None, None]
    found = orthogonalised(some)
    assert not found[1].any()
    for one, alone in zip(found, some, strict=True):
        torch.testing.assert_close(one, orthogonalised(alone))
    torch.testing.assert_close(found[0], orthogonalised(some[0] * 1e5), rtol=1e-3, atol=1e-4)


def test_muon_steps_of_tall_matrices_are_larger() -> None:
    torch.manual_seed(0)
    tall = torch.randn(2, 18, 2)
    steps = dict(muon_steps({"tall": tall, "wide": tall.mT, "other": torch.randn(1, 4, 4)}))
    torch.testing.assert_close(steps["tall"], 3 * steps["wide"].mT)
    assert steps["other"].shape == (1, 4, 4)


def slopes(parameters: dict[str, nn.Parameter], step: int) -> dict[str, Tensor]:
    torch.manual_seed(step)
    return {name: torch.randn(value.shape) for name, value in parameters.items()}


def trained(parameters: dict[str, nn.Parameter], optimizer: AdamW, steps: range) -> None:
    for step in steps:
        for name, slope in slopes(parameters, step).items():
            if name != "late" or step >= 3:
                (parameters[name] * slope).sum().backward()
        apply_gradients(optimizer, 1.0 + step, "here")


def matrices() -> dict[str, nn.Parameter]:
    torch.manual_seed(9)
    return {"a": nn.Parameter(torch.randn(1, 6, 30)), "late": nn.Parameter(torch.randn(1, 30, 6))}


def flat_adamw(parameters: dict[str, nn.Parameter], coarse: int, muon: bool = True) -> AdamW:
    flat = FlatParameters(parameters)
    return AdamW(flat, 0.02, weight_decay=0.1, max_grad_norm=1e9, coarse_updates=coarse, muon=muon)


def test_update_equals_torchs_muon() -> None:
    """As far as bfloat16 reaches, in which torch makes matrices orthogonal; a matrix without a gradient stays."""
    ours = matrices()
    first = copy.deepcopy(ours)
    theirs = {name: nn.Parameter(value.detach()[0].clone()) for name, value in ours.items()}
    optimizer = flat_adamw(ours, 10)
    stock = torch.optim.Muon(list(theirs.values()), lr=0.0, weight_decay=0.1, momentum=0.95)
    for step in range(6):
        trained(ours, optimizer, range(step, step + 1))
        for name, slope in slopes(ours, step).items():
            theirs[name].grad = slope[0] if name != "late" or step >= 3 else None
        stock.param_groups[0]["lr"] = 0.02 * (1 + step)
        stock.step()
        if step == 2:
            assert torch.equal(ours["late"], first["late"])
    for name, value in ours.items():
        moved = theirs[name] - first[name][0]
        assert (value[0] - theirs[name]).norm() < 0.01 * moved.norm(), name


@pytest.mark.parametrize("muon", [True, False])
def test_update_is_adamws_without_moments_after_the_coarse_stage(muon: bool) -> None:
    ours = matrices()
    optimizer = flat_adamw(ours, 4, muon)
    trained(ours, optimizer, range(4))
    fresh = copy.deepcopy(ours)
    trained(ours, optimizer, range(4, 7))
    trained(fresh, flat_adamw(fresh, 0), range(4, 7))
    assert all(torch.equal(ours[name], value) for name, value in fresh.items())
    assert optimizer.steps == {"a": 3, "late": 3} and optimizer.updates == 7


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("at", [2, 4, 5])
def test_restore_goes_on_before_at_and_after_the_change_of_stage(at: int, muon: bool) -> None:
    whole, first, second = matrices(), matrices(), matrices()
    trained(whole, flat_adamw(whole, 4, muon), range(7))
    before, after = flat_adamw(first, 4, muon), flat_adamw(second, 4, muon)
    trained(first, before, range(at))
    kept = before.snapshot()
    after.restore(lambda kind, start, stop: kept[kind][start:stop], before.steps, before.updates)
    trained(second, after, range(at, 7))
    assert all(torch.equal(second[name], value) for name, value in whole.items())


def test_update_takes_the_memory_of_directions_beside_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the memory plan counts it: of every further matrix its direction, beside parameter, momentum and gradient,
    because only so many are worked on at once."""
    monkeypatch.setattr("clora.training.muon._TOGETHER", 2 * 16 * 64)  # two matrices

    def peak(count: int) -> int:
        parameters = {f"{i}": nn.Parameter(torch.randn(1, 16, 64)) for i in range(count)}
        optimizer = flat_adamw(parameters, 1)
        for parameter in parameters.values():
            parameter.square().sum().backward()
        with PeakBytes() as measured:
            optimizer.update(0.01)
        return measured.peak

    assert peak(40) - peak(20) == 20 * 4 * (16 * 64 * 4)


def trained_on_halves(folder: Path) -> None:
    """Five updates, of which the last is AdamW's; each process has its share of the gradients."""
    with distributed.process_group(60.0):
        torch.manual_seed(0)
        shapes = {"a": (1, 5, 50), "b": (2, 20, 7), "c": (1, 5, 50)}  # the cut goes through b
        parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
        flat = FlatParameters(parameters, torch.bfloat16)
        optimizer = AdamW(flat, 1e-2, max_grad_norm=1e9, moments=torch.bfloat16, coarse_updates=4, muon=True)
        for step in range(5):
            for parameter in parameters.values():
                torch.manual_seed(step)
                both = torch.randn(2, *parameter.shape).bfloat16()
                for slope in both if distributed.world_size() == 1 else both[distributed.rank()][None]:
                    (parameter * slope).sum().backward()
            apply_gradients(optimizer, 1.0, "here")
        values = {name: value.contiguous() for name, value in optimizer.fp32_parameters().items()}
        save_file(values | {"pieces": torch.tensor(len(flat.pieces))}, folder / f"{distributed.rank()}")


def test_two_processes_train_by_muon_as_one(tmp_path: Path) -> None:
    """But for the last bits: those of a product of several matrices depend on how many there are."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "two").mkdir()
    trained_on_halves(tmp_path / "alone")
    processes.run(2, ["--help"], tmp_path / "output", trained_on_halves, (tmp_path / "two",))
    alone, first, second = (load_file(tmp_path / name) for name in ("alone/0", "two/0", "two/1"))
    assert int(first["pieces"]) == int(second["pieces"]) == 2  # of three matrices: b lies in both shards
    for name in "abc":
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], alone[name], rtol=1e-5, atol=1e-6)
