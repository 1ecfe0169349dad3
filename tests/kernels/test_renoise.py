"""renoise: the kernels against fp64 and `clora.method.flow`, its own noise against integer arithmetic."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.kernels.timing import check_accuracy
from clora.kernels.renoise import BLOCK, noise_ref, philox_bits, philox_ref, renoise, renoise_op, renoise_ref
from clora.method.flow import add_noise, x0_from_velocity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 7), (2, 5, 48), (1, 11, 97), (2, BLOCK), (1, BLOCK + 1), (2, 3, 2, 5)]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x_sigma, velocity, sigma, sigma_next, eps; x_sigma and velocity want gradients."""
    rng = torch.Generator().manual_seed(sum(shape))
    x, velocity, eps = (torch.randn(shape, generator=rng).to(device, dtype) for _ in range(3))
    sigma, sigma_next = (torch.rand(shape[0], generator=rng).to(device) for _ in range(2))
    return x.requires_grad_(), velocity.requires_grad_(), sigma, sigma_next, eps


def results(op: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...], *noise: object) -> list[Tensor]:
    """x0, x_next, and the gradients of x_sigma and velocity for drawn output gradients."""
    outputs = op(*inputs, *noise)
    rng = torch.Generator().manual_seed(7)
    gradients = [torch.randn(out.shape, generator=rng).to(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs[:2], gradients)]


def check_against_fp64(inputs: tuple[Tensor, ...]) -> None:
    exact_inputs = tuple(tensor.detach().double() for tensor in inputs)
    for tensor in exact_inputs[:2]:
        tensor.requires_grad_()
    ours, same_dtype = results(renoise_op, inputs, None, 0), results(renoise_ref, inputs, None, 0)
    exact = results(renoise_ref, exact_inputs, None, 0)
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
        renoise_op(x, velocity, sigma, sigma_next, eps, None, 0),
        renoise(x, velocity, sigma, sigma_next, eps),
    ):
        assert all(map(torch.equal, outputs, expected))


def test_renoise_to_sigma_0_and_1(device: str) -> None:
    x, velocity, sigma, _, eps = make_inputs((2, 30), torch.float32, device)
    x0, x_next = renoise_op(x, velocity, sigma, torch.tensor([0.0, 1.0], device=device), eps, None, 0)
    assert torch.equal(x_next[0], x0[0]) and torch.equal(x_next[1], eps[1])


# Noise drawn in the kernel.

SEEDS = [0, 1, -1, 2**31, 2**32 + 5, -(2**63), 2**63 - 1]
PLACES = [0, 1, 1023, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3]


@triton.jit
def bits_kernel(
    seed_ptr: tl.tensor, place_ptr: tl.tensor, first_ptr: tl.tensor, second_ptr: tl.tensor, step, N: tl.constexpr
) -> None:
    lane = tl.arange(0, N)
    first, second = philox_bits(tl.load(seed_ptr), tl.load(place_ptr + lane), step)
    tl.store(first_ptr + lane, first.to(tl.int64))
    tl.store(second_ptr + lane, second.to(tl.int64))


@pytest.mark.parametrize("step", [0, 7, 2**31 - 1])
def test_philox_bits_equal_integer_arithmetic(step: int, device: str) -> None:
    places = torch.tensor(PLACES, device=device)
    for seed in torch.tensor(SEEDS, device=device).split(1):
        first, second = torch.empty_like(places), torch.empty_like(places)
        bits_kernel[(1,)](seed, places, first, second, step, N=len(PLACES))
        expected = philox_ref(seed, places, step)
        assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])


def test_philox_ref_equals_published_words() -> None:
    # The known answer of Random123 for philox4x32-10 with counter and key 0.
    zero = torch.zeros(1, dtype=torch.int64)
    assert [word.item() for word in philox_ref(zero, zero, 0)] == [0x6627E8D5, 0xE169C58D]


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 48), (1, BLOCK + 1)], ids=str)
def test_renoise_draws_the_noise_of_its_reference(shape: tuple[int, ...], device: str) -> None:
    x, velocity, sigma, sigma_next, _ = make_inputs(shape, torch.float32, device)
    seeds = torch.tensor(SEEDS[: shape[0]], device=device)
    ours = results(renoise_op, (x, velocity, sigma, sigma_next, None), seeds, 5)
    expected = results(renoise_ref, (x, velocity, sigma, sigma_next, None), seeds, 5)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-6)


def drawn(seeds: list[int], step: int, shape: tuple[int, ...], device: str) -> Tensor:
    """The kernel's noise alone: sigma_next is 1."""
    x = torch.zeros(len(seeds), *shape, device=device)
    ones = torch.ones(len(seeds), device=device)
    return renoise_op(x, x, ones, ones, None, torch.tensor(seeds, device=device), step)[1]


def test_renoise_noise_depends_on_seed_step_and_place_alone(device: str) -> None:
    noise = drawn([3, 9], 4, (5, 48), device)
    assert torch.equal(drawn([9], 4, (5, 48), device)[0], noise[1])  # not on the batch
    assert torch.equal(drawn([8, 9, 3], 4, (240,), device)[2].view(5, 48), noise[0])  # nor on its shape
    assert torch.equal(drawn([3], 4, (2 * BLOCK,), device)[0, :240].view(5, 48), noise[0])  # nor on its length
    assert not torch.isclose(drawn([3], 5, (5, 48), device)[0], noise[0]).any()
    assert not torch.isclose(noise[0], noise[1]).any()


def test_noise_ref_is_standard_normal() -> None:
    noise = noise_ref(torch.tensor([11, 12]), 3, (200_000,))
    half = noise[:, :100_000]
    assert noise.isfinite().all()
    # Each bound is five standard deviations of the estimate.
    assert noise.mean(1).abs().max() < 5 / math.sqrt(200_000)
    assert (noise.square().mean(1) - 1).abs().max() < 5 * math.sqrt(2 / 200_000)
    assert (noise.pow(4).mean(1) - 3).abs().max() < 5 * math.sqrt(96 / 200_000)
    for a, b in ((noise[0], noise[1]), (half[0], noise[0, 100_000:]), (noise[0, :-1], noise[0, 1:])):
        assert (a * b).mean().abs() < 5 / math.sqrt(len(a))


def test_renoise_repeats_bit_for_bit(device: str) -> None:
    x, velocity, sigma, sigma_next, _ = make_inputs((2, 5, 48), torch.bfloat16, device)
    inputs, seeds = (x, velocity, sigma, sigma_next, None), torch.tensor([1, 2], device=device)
    assert all(map(torch.equal, results(renoise_op, inputs, seeds, 3), results(renoise_op, inputs, seeds, 3)))


def test_renoise_ref_gradcheck() -> None:
    x, velocity, sigma, sigma_next, eps = (t.detach().double() for t in make_inputs((2, 5), torch.float32, "cpu"))
    inputs = x.requires_grad_(), velocity.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: renoise(x, v, sigma, sigma_next, eps), inputs)


@pytest.mark.parametrize("op", [renoise, renoise_op])
def test_renoise_gives_no_gradient_to_noise_and_levels(op: Callable[..., tuple[Tensor, Tensor]], device: str) -> None:
    inputs = [t.detach().requires_grad_() for t in make_inputs((2, 5), torch.float32, device)]
    out = sum(out.sum() for out in op(*inputs, None, 0))
    gradients = torch.autograd.grad(out, inputs, allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, False, True, True, True]


def test_renoise_opcheck(device: str) -> None:
    *inputs, eps = make_inputs((2, 5), torch.bfloat16, device)
    torch.library.opcheck(renoise_op, (*inputs, eps, None, 0))
    torch.library.opcheck(renoise_op, (*inputs, None, torch.tensor([1, 2], device=device), 3))


def test_renoise_compiles_without_graph_breaks(device: str) -> None:
    x, velocity, sigma, sigma_next, eps = make_inputs((2, 5), torch.float32, device)
    seeds = torch.tensor([1, 2], device=device)

    def steps(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        _, x = renoise_op(x, velocity, sigma, sigma_next, eps, None, 0)
        return renoise(x, velocity, sigma, sigma_next, seeds=seeds, step=1)  # the public function too

    compiled = torch.compile(steps, backend="aot_eager", fullgraph=True)
    inputs = (x, velocity, sigma, sigma_next)
    assert all(map(torch.equal, results(compiled, inputs), results(steps, inputs)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": None}, "either eps or seeds"),
        ({"seeds": torch.tensor([1, 2])}, "either eps or seeds"),
        ({"velocity": torch.zeros(2, 4)}, "shape of x_sigma"),
        ({"sigma": torch.zeros(1)}, "one per sample"),
        ({"eps": None, "seeds": torch.tensor([1.0, 2.0])}, "int64"),
        ({"eps": None, "seeds": torch.tensor([1, 2]), "step": -1}, "step is -1"),
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
    x0, x_next = renoise_op(x, x, 0.5 * one, one, None, torch.tensor([3], device="cuda"), 2)
    assert x0[0, -5:].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    first, second = philox_ref(torch.tensor([3]), torch.arange(tail - 5, tail), 2)
    u1, u2 = (torch.where(u < 2**31, u, 0xFFFFFFFF - u).double() * 2.0**-31 for u in (first, second))
    expected = torch.sqrt(-2 * torch.log(u1)) * torch.cos(2 * math.pi * u2)
    torch.testing.assert_close(x_next[0, -5:].double().cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_renoise_equals_fp64_reference_at_full_size(dtype: torch.dtype) -> None:
    check_against_fp64(make_inputs((4, 4096, 64), dtype, "cuda"))
