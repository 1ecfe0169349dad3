"""AdamW on flat parameters against torch's own, alone and on two processes; jobs: test_distributed.py."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clora.errors import NonFiniteError
from clora.training import distributed
from clora.training.bf16_master import split_bf16_master
from clora.training.flat_parameters import FlatParameters, GradientBuffer
from clora.training.optimizer import AdamW, apply_gradients, check_finite
from tests.support import processes


def test_apply_gradients_equals_torch() -> None:
    """Odd sizes, accumulated gradients, and a parameter that has none at first: torch leaves that one alone. The last
    bits may differ, since fused AdamW computes the end of an odd size in another way."""
    torch.manual_seed(0)
    ours = {
        "a": nn.Parameter(torch.randn(7, 13)),
        "late": nn.Parameter(torch.randn(33)),
        "b": nn.Parameter(torch.ones(1)),
    }
    theirs = copy.deepcopy(ours)
    options = {"betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    optimizer = AdamW(FlatParameters(ours), 0.01, betas=(0.8, 0.95), weight_decay=0.1, epsilon=1e-7, max_grad_norm=0.5)
    stock = torch.optim.AdamW(list(theirs.values()), lr=0.0, fused=True, **options)  # type: ignore[arg-type]
    for step in range(6):
        for part in range(2):
            torch.manual_seed(10 * step + part)
            for parameters in (ours, theirs):
                torch.manual_seed(10 * step + part)
                used = ["a", "b"] + ["late"] * (step >= 3)
                sum((parameters[n] * torch.randn(parameters[n].shape)).sin().sum() for n in used).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.5)
        for settings in stock.param_groups:
            settings["lr"] = 0.01 * (step + 1)
        stock.step()
        stock.zero_grad()
        assert apply_gradients(optimizer, step + 1, "here") == pytest.approx(float(norm), rel=1e-6)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
    assert optimizer.steps == {"a": 6, "late": 3, "b": 6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restore_takes_over_everything(dtype: torch.dtype) -> None:
    def make() -> AdamW:
        parameters = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(70))}
        return AdamW(FlatParameters(parameters, dtype), 0.1, ema_decay=0.9)

    first, second = make(), make()

    def update(optimizer: AdamW) -> None:
        loss = (optimizer.parameters["a"] - 1).square().sum() + (optimizer.parameters["b"].sin() - 0.5).square().sum()
        loss.backward()
        apply_gradients(optimizer, 1.0, "here")

    for _ in range(3):
        update(first)
    saved = first.snapshot()
    second.restore(lambda kind, start, stop: saved[kind][start:stop], first.steps, first.updates)
    for optimizer in (first, second):
        update(optimizer)
    assert not torch.equal(saved["param"], first.snapshot()["param"])  # a copy
    saved, again = first.snapshot(), second.snapshot()
    assert all(torch.equal(saved[kind], again[kind]) for kind in saved)
    assert set(saved) == {"param", "exp_avg", "exp_avg_sq", "ema"} and second.updates == 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_parameters_follow_their_fp32_masters(device: str) -> None:
    """Updates far below bfloat16's step add up as in fp32, and gradients are taken at the rounded values."""

    def make(dtype: torch.dtype) -> AdamW:
        torch.manual_seed(0)
        parameters = {"a": nn.Parameter(torch.randn(6, 64).to(device)), "b": nn.Parameter(torch.randn(5).to(device))}
        return AdamW(FlatParameters(parameters, dtype), 1e-5, weight_decay=0.1, ema_decay=0.5)

    exact, halved = make(torch.float32), make(torch.bfloat16)
    start = exact.parameters["a"].detach().clone()
    for step in range(20):
        torch.manual_seed(step)
        for name, parameter in halved.parameters.items():
            slope = torch.randn(parameter.shape).bfloat16().to(device)
            (parameter * slope).sum().backward()
            (exact.parameters[name] * slope.float()).sum().backward()
        norms = [apply_gradients(optimizer, 1.0, "here") for optimizer in (exact, halved)]
        assert norms[0] == norms[1]
    masters, averaged = halved.fp32_parameters(), halved.averaged()
    for name, parameter in halved.parameters.items():
        assert torch.equal(masters[name], exact.parameters[name])
        assert torch.equal(averaged[name], exact.averaged()[name])
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, split_bf16_master(masters[name])[0])
    # Most of them would not have moved in bfloat16 alone.
    moved = masters["a"] - start
    assert (moved != 0).all() and (halved.parameters["a"] == start.bfloat16()).float().mean() > 0.5


def test_bfloat16_moments_follow_fp32_ones() -> None:
    """A constant gradient after a larger one: the second moment falls by a thousandth of itself an update, and the
    first comes ever nearer to its end, by less than rounding to the nearest would let them."""

    def make(moments: torch.dtype) -> AdamW:
        return AdamW(FlatParameters({"a": nn.Parameter(torch.zeros(4096))}), 1e-3, max_grad_norm=1e9, moments=moments)

    exact, halved = make(torch.float32), make(torch.bfloat16)
    torch.manual_seed(0)
    slopes = torch.rand(4096) + 0.5
    for update in range(300):
        for optimizer in (exact, halved):
            (optimizer.parameters["a"] * slopes * (3 if update == 0 else 1)).sum().backward()
            apply_gradients(optimizer, 1.0, "here")
    want, got = exact.snapshot(), halved.snapshot()
    for kind, tolerance in (("exp_avg", 0.01), ("exp_avg_sq", 0.03), ("param", 0.01)):
        assert (got[kind] - want[kind]).norm() / want[kind].norm() < tolerance
    for kind in ("exp_avg", "exp_avg_sq"):
        assert abs(float(got[kind].mean() / want[kind].mean()) - 1) < 2e-3
        assert torch.equal(got[kind], got[kind].bfloat16().float())


def test_assign_gives_parameters_and_masters() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(2))}
    optimizer = AdamW(FlatParameters(parameters, torch.bfloat16), 0.1)
    optimizer.assign({"b": torch.tensor([1 / 3, -2 / 3])})
    assert (
        torch.equal(optimizer.fp32_parameters()["b"], torch.tensor([1 / 3, -2 / 3]))
        and not optimizer.fp32_parameters()["a"].any()
    )
    assert torch.equal(optimizer.parameters["b"], torch.tensor([1 / 3, -2 / 3]).bfloat16())


def test_check_finite_names_the_place() -> None:
    assert check_finite(torch.tensor(1.0), "here") == 1.0
    with pytest.raises(NonFiniteError, match="loss is nan at here; nothing was updated"):
        check_finite(torch.tensor(torch.nan), "here")


def sharing_pair(buffer_first: int = 70, second: int = 90) -> tuple[AdamW, AdamW]:
    torch.manual_seed(1)
    first = AdamW(FlatParameters({"a": nn.Parameter(torch.randn(buffer_first))}), 0.1, max_grad_norm=1e9)
    other = FlatParameters({"b": nn.Parameter(torch.randn(second))}, gradients=first.flat.gradients)
    return first, AdamW(other, 0.1, max_grad_norm=1e9)


@pytest.mark.parametrize("second", [30, 700])
def test_gradient_buffer_serves_those_that_take_turns(second: int) -> None:
    """Bit for bit as with a buffer each, also where the second needs a longer one."""
    shared = sharing_pair(second=second)
    apart = sharing_pair(second=second)
    apart[1].flat.gradients = GradientBuffer()
    apart[1].flat.gradients.reserve(1024, torch.device("cpu"))
    assert shared[0].flat.gradients is shared[1].flat.gradients
    for step in range(4):
        for pair in (shared, apart):
            for optimizer in pair:
                for part in range(2):
                    torch.manual_seed(2 * step + part)
                    for parameter in optimizer.parameters.values():
                        (parameter * torch.randn(parameter.shape)).sum().backward()
                apply_gradients(optimizer, 1.0, "here")
    for ours, theirs in zip(shared, apart, strict=True):
        want = theirs.snapshot()
        assert all(torch.equal(value, want[kind]) for kind, value in ours.snapshot().items())


def test_gradient_buffer_refuses_a_second_holder() -> None:
    first, second = sharing_pair()
    (first.parameters["a"] * 3).sum().backward()
    with pytest.raises(RuntimeError, match="holds another's gradients"):
        (second.parameters["b"] * 5).sum().backward()
    grad = first.flat.gradient("a")
    assert grad is not None and (grad == 3).all()  # nothing was overwritten
    assert second.flat.gradient("b") is None
    with pytest.raises(RuntimeError, match="cannot grow while it holds"):
        FlatParameters({"c": nn.Parameter(torch.zeros(5000))}, gradients=first.flat.gradients)
    apply_gradients(first, 1.0, "here")
    second.parameters["b"].grad = None
    (second.parameters["b"] * 5).sum().backward()
    grad = second.flat.gradient("b")
    assert grad is not None and (grad == 5).all()


def test_flat_parameters_refuse_other_types() -> None:
    with pytest.raises(ValueError, match="must be fp32"):
        FlatParameters({"a": nn.Parameter(torch.zeros(3, dtype=torch.float64))})
    with pytest.raises(ValueError, match="parameters cannot be torch.float16"):
        FlatParameters({"a": nn.Parameter(torch.zeros(3))}, torch.float16)
    with pytest.raises(ValueError, match="moments cannot be torch.float16"):
        AdamW(FlatParameters({"a": nn.Parameter(torch.zeros(3))}), 0.1, moments=torch.float16)


def trained_on_halves(folder: Path) -> None:
    """Six updates, of which each process has its share of the gradients; writes its part of the state."""
    dtype = torch.bfloat16
    with distributed.process_group(60.0):
        torch.manual_seed(0)
        parameters = {"a": nn.Parameter(torch.randn(5, 50)), "b": nn.Parameter(torch.randn(70))}
        flat = FlatParameters(parameters, dtype)
        optimizer = AdamW(flat, 1e-3, max_grad_norm=1e9, ema_decay=0.9, moments=dtype)
        for step in range(6):
            for parameter in parameters.values():
                torch.manual_seed(step)
                slopes = torch.randn(2, *parameter.shape).bfloat16()
                mine = slopes if distributed.world_size() == 1 else slopes[distributed.rank()][None]
                for slope in mine:
                    (parameter * slope).sum().backward()
            apply_gradients(optimizer, 1.0, "here")
        optimizer.assign({"b": optimizer.fp32_parameters()["a"].flatten()[:70]})
        whole = {f"master of {name}": value for name, value in optimizer.fp32_parameters().items()}
        whole |= {f"average of {name}": value.clone() for name, value in optimizer.averaged().items()}
        whole |= {name: value.detach() for name, value in parameters.items()}
        start, length = flat.shard.start, flat.shard_length
        part = {f"{kind} {start}": value for kind, value in optimizer.snapshot().items()}
        assert all(len(value) == length for value in part.values())
        save_file({name: value.contiguous() for name, value in whole.items()} | part, folder / f"{distributed.rank()}")


def test_two_processes_train_bfloat16_parameters_as_one(tmp_path: Path) -> None:
    """Bit for bit: sums of two bfloat16 gradients are exact in fp32, and rounding either way does not depend on who
    rounds."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "two").mkdir()
    trained_on_halves(tmp_path / "alone")
    processes.run(2, ["--help"], tmp_path / "output", trained_on_halves, (tmp_path / "two",))
    alone, first, second = (load_file(tmp_path / name) for name in ("alone/0", "two/0", "two/1"))
    for name, value in alone.items():
        if not name.endswith(" 0"):
            assert torch.equal(first[name], value) and torch.equal(second[name], value), name
            continue
        kind = name.split()[0]
        parts = [part for key, part in (*first.items(), *second.items()) if key.split()[0] == kind]
        assert len(parts) == 2 and torch.equal(torch.cat(parts), value), name
