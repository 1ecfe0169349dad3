"""renoise: the kernels against fp64 and `clora.method.flow`."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.kernels.timing import check_accuracy
from clora.kernels.renoise import BLOCK, renoise, renoise_op, renoise_ref
from clora.method.flow import add_noise, x0_from_velocity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 7), (2, 5, 48), (1, 11, 97), (2, BLOCK), (1, BLOCK + 1), (2, 3, 2, 5)]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x_sigma, velocity, sigma, sigma_next, eps; x_sigma and velocity want gradients."""
    rng = torch.Generator().manual_seed(sum(shape))
    x, velocity, eps = (torch.randn(shape, generator=rng).to(device, dtype) for _ in range(3))
    sigma, sigma_next = (torch.rand(shape[0], generator=rng).to(device) for _ in range(2))
    return x.requires_grad_(), velocity.requires_grad_(), sigma, sigma_next, eps


def results(op: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """x0, x_next, and the gradients of x_sigma and velocity for drawn output gradients."""
    outputs = op(*inputs)
    rng = torch.Generator().manual_seed(7)
    gradients = [torch.randn(out.shape, generator=rng).to(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs[:2], gradients)]


def check_against_fp64(inputs: tuple[Tensor, ...]) -> None:
    exact_inputs = tuple(tensor.detach().double() for tensor in inputs)
    for tensor in exact_inputs[:2]:
        tensor.requires_grad_()
    ours, same_dtype = results(renoise_op, inputs), results(renoise_ref, inputs)
    exact = results(renoise_ref, exact_inputs)
    for label, *three in zip(("x0", "x_next", "dx", "dvelocity"), ours, same_dtype, exact, strict=True):
        check_accuracy(label, *three)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_renoise_equals_fp64_reference(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check_against_fp64(make_inputs(shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_renoise_equals_fp64_reference_on_random_shapes(dtype: torch.dtype, device: str) -> None:
    draw = random.Random(str(dtype))
    for _ in range(70):
        shape = (draw.randint(1, 3), *(draw.choice([1, 2, 7, 31]) for _ in range(draw.randint(1, 3))))
        x, velocity, *levels, eps = make_inputs(shape, dtype, device)
        if draw.random() < 0.5 and x.dim() > 2:
            x, velocity = (
                t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (x, velocity)
            )
        check_against_fp64((x, velocity, *levels, eps))


def test_renoise_takes_layouts_and_dtypes_that_differ(device: str) -> None:
    x, velocity, sigma, _, eps = make_inputs((3, 6, 10), torch.float32, device)
    mixed = x.detach().transpose(1, 2).requires_grad_(), velocity.detach().transpose(1, 2).bfloat16().requires_grad_()
    check_against_fp64((*mixed, sigma, sigma[:1].expand(3), eps.half().transpose(1, 2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_renoise_is_x0_noised_afresh(dtype: torch.dtype, device: str) -> None:
    x, velocity, sigma, sigma_next, eps = (t.detach() for t in make_inputs((2, 5, 48), dtype, device))
    x0 = x0_from_velocity(x, velocity, sigma)
    expected = x0, add_noise(x0, eps, sigma_next)
    for outputs in (
        renoise_op(x, velocity, sigma, sigma_next, eps),
        renoise(x, velocity, sigma, sigma_next, eps),
    ):
        assert all(map(torch.equal, outputs, expected))


def test_renoise_to_sigma_0_and_1(device: str) -> None:
    x, velocity, sigma, _, eps = make_inputs((2, 30), torch.float32, device)
    x0, x_next = renoise_op(x, velocity, sigma, torch.tensor([0.0, 1.0], device=device), eps)
    assert torch.equal(x_next[0], x0[0]) and torch.equal(x_next[1], eps[1])


def test_renoise_repeats_bit_for_bit(device: str) -> None:
    inputs = make_inputs((2, 5, 48), torch.bfloat16, device)
    assert all(map(torch.equal, results(renoise_op, inputs), results(renoise_op, inputs)))


def test_renoise_ref_gradcheck() -> None:
    x, velocity, sigma, sigma_next, eps = (t.detach().double() for t in make_inputs((2, 5), torch.float32, "cpu"))
    inputs = x.requires_grad_(), velocity.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: renoise(x, v, sigma, sigma_next, eps), inputs)


@pytest.mark.parametrize("op", [renoise, renoise_op])
def test_renoise_gives_no_gradient_to_noise_and_levels(op: Callable[..., tuple[Tensor, Tensor]], device: str) -> None:
    inputs = [t.detach().requires_grad_() for t in make_inputs((2, 5), torch.float32, device)]
    out = sum(out.sum() for out in op(*inputs))
    gradients = torch.autograd.grad(out, inputs, allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, False, True, True, True]


def test_renoise_opcheck(device: str) -> None:
    torch.library.opcheck(renoise_op, make_inputs((2, 5), torch.bfloat16, device))


def test_renoise_compiles_without_graph_breaks(device: str) -> None:
    x, velocity, sigma, sigma_next, eps = make_inputs((2, 5), torch.float32, device)

    def steps(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        _, x = renoise_op(x, velocity, sigma, sigma_next, eps)
        return renoise(x, velocity, sigma, sigma_next, eps)  # the public function too

    compiled = torch.compile(steps, backend="aot_eager", fullgraph=True)
    inputs = (x, velocity, sigma, sigma_next)
    assert all(map(torch.equal, results(compiled, inputs), results(steps, inputs)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"velocity": torch.zeros(2, 4)}, "shape of x_sigma"),
        ({"sigma": torch.zeros(1)}, "one per sample"),
        ({"eps": torch.zeros(5)}, "shape of x_sigma"),
        ({"sigma_next": torch.zeros(2, 1)}, "one per sample"),
    ],
)
def test_renoise_names_what_does_not_fit(change: dict[str, object], message: str) -> None:
    fitting = dict(
        zip(
            ("x_sigma", "velocity", "sigma", "sigma_next", "eps"),
            make_inputs((2, 5), torch.float32, "cpu"),
            strict=True,
        )
    )
    with pytest.raises(ValueError, match=message):
        renoise(**{**fitting, **change})


@pytest.mark.gpu
def test_renoise_reaches_past_2_31_elements() -> None:
    tail = 2**31 + 5
    x = torch.zeros(1, tail, dtype=torch.bfloat16, device="cuda")
    x[0, -5:] = torch.arange(5, device="cuda")
    one = torch.ones(1, device="cuda")
    x0, x_next = renoise_op(x, x, 0.5 * one, one, x)
    assert x0[0, -5:].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert x_next[0, -5:].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_renoise_equals_fp64_reference_at_full_size(dtype: torch.dtype) -> None:
    check_against_fp64(make_inputs((4, 4096, 64), dtype, "cuda"))
