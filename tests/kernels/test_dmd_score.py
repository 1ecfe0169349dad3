"""dmd_score: the kernels against fp64 and against `clora.method.losses`, whose loss it computes in one pass."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernels.timing import check_accuracy
from clora.kernels.dmd_score import BLOCK, FINISH_BLOCK, MAX_C, dmd_score, dmd_score_op, dmd_score_ref
from clora.method.losses import guided_velocity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (3, 2, 7), (2, 5, 48), (1, 11, 97), (2, BLOCK // 64 + 1, 64)]
GUIDANCES: list[tuple[float, str]] = [(1.0, "none"), (4.0, "none"), (4.0, "norm")]  # without uncond at 1
NAMES = ["loss", "grad_abs", "normaliser", "dx0_student"]
FLOOR = {"loss": 4.0, "grad_abs": 4.0, "normaliser": 4.0, "dx0_student": 1.0}  # numbers that took several roundings


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype, guidance: float, device: str) -> list[Any]:
    """x_sigma, sigma, x0_student (wants a gradient), v_critic, v_teacher_cond, v_teacher_uncond."""
    rng = torch.Generator().manual_seed(sum(shape))
    x, student, critic, cond, uncond = (torch.randn(shape, generator=rng).to(device, dtype) for _ in range(5))
    sigma = torch.rand(shape[0], generator=rng).to(device)
    return [x, sigma, student.requires_grad_(), critic, cond, None if guidance == 1.0 else uncond]


def run_op(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The kernels, whatever the device, as the public function calls them."""
    figures, _, _ = dmd_score_op(*arguments[:8], arguments[8] if len(arguments) > 8 else 1e-3)
    return figures[0], {"grad_abs": figures[1].detach(), "normaliser": figures[2].detach()}


def results(op: Callable[..., tuple[Tensor, dict[str, Tensor]]], inputs: list[Any], *settings: Any) -> list[Tensor]:
    """Loss, figures, and the gradient of x0_student under twice the loss."""
    loss, figures = op(*inputs, *settings)
    assert list(figures) == ["grad_abs", "normaliser"]
    return [loss.detach(), *figures.values(), torch.autograd.grad(2 * loss, inputs[2])[0]]


def in_fp64(inputs: list[Any]) -> list[Any]:
    exact = [x if x is None else x.detach().double() for x in inputs]
    exact[2].requires_grad_()
    return exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dmd_score_equals_fp64_reference(
    shape: tuple[int, int, int], guidance: tuple[float, str], dtype: torch.dtype, device: str
) -> None:
    inputs = make_inputs(shape, dtype, guidance[0], device)
    three = (results(run_op, inputs, *guidance), results(dmd_score_ref, inputs, *guidance))
    exact = results(dmd_score_ref, in_fp64(inputs), *guidance)
    for name, *values in zip(NAMES, *three, exact, strict=True):
        check_accuracy(name, *values, floor=FLOOR[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dmd_score_equals_fp64_reference_on_random_shapes(dtype: torch.dtype, device: str) -> None:
    draw = random.Random(str(dtype))
    for _ in range(70 if device == "cuda" else 35):
        shape = (draw.randint(1, 3), draw.choice([1, 2, 3, 17, 40]), draw.choice([1, 2, 16, 31, 64, 97]))
        guidance, floor = draw.choice(GUIDANCES), draw.choice([1e-3, 1.0, None])
        inputs = make_inputs(shape, dtype, guidance[0], device)
        three = [results(f, inputs, *guidance, floor) for f in (run_op, dmd_score_ref)]
        three.append(results(dmd_score_ref, in_fp64(inputs), *guidance, floor))
        for name, *values in zip(NAMES, *three, strict=True):
            check_accuracy(f"{name} of {shape}", *values, floor=FLOOR[name])


@pytest.mark.parametrize("floor", [1e-3, 10.0, None])
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dmd_score_equals_its_equation(
    dtype: torch.dtype, guidance: tuple[float, str], floor: float | None, device: str
) -> None:
    inputs = make_inputs((2, 5, 48), dtype, guidance[0], device)
    x, sigma, student, critic, cond, uncond = in_fp64(inputs)
    level = sigma[:, None, None]
    real = cond if uncond is None else guided_velocity(cond, uncond, *guidance)
    distance = (student.detach() - (x - level * real)).abs().mean((1, 2))
    normaliser = torch.ones_like(distance) if floor is None else distance.clamp(min=floor)
    g = level * (real - critic) / normaliser[:, None, None]
    expected = 0.5 * g.square().mean(), g.abs().mean(), normaliser.mean(), 2 * g / g.numel()
    for op in (dmd_score, run_op):
        for got, want in zip(results(op, inputs, *guidance, floor), expected, strict=True):
            tolerance = 1e-4 if got.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * 1e-2)


def test_dmd_score_gradient_times_numel_is_g(device: str) -> None:
    inputs = make_inputs((2, 3, 8), torch.float32, 1.0, device)
    x, sigma, student, critic, cond, _ = inputs
    level = sigma[:, None, None]
    distance = (student - (x - level * cond)).abs().mean((1, 2), keepdim=True)
    loss, _ = run_op(*inputs, 1.0, "none")
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient * student.numel(), (level * (cond - critic) / distance).detach())


def test_dmd_score_sums_more_blocks_than_the_finish_takes_at_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clora.kernels.dmd_score.BLOCK", 8)
    monkeypatch.setattr("clora.kernels.dmd_score.FINISH_BLOCK", 4)
    inputs = make_inputs((2, 9, 8), torch.float32, 4.0, device)  # 9 blocks a sample, in three turns
    for got, want in zip(
        results(run_op, inputs, 4.0, "norm"), results(dmd_score_ref, inputs, 4.0, "norm"), strict=True
    ):
        torch.testing.assert_close(got, want)
    assert FINISH_BLOCK > 4


def test_dmd_score_takes_layouts_and_dtypes_that_differ(device: str) -> None:
    x, sigma, student, critic, cond, uncond = make_inputs((2, 6, 10), torch.float32, 4.0, device)
    student = student.detach().transpose(1, 2).requires_grad_()
    turned = [
        x.transpose(1, 2),
        sigma[:1].expand(2),
        student,
        *(v.bfloat16().transpose(1, 2) for v in (critic, cond, uncond)),
    ]
    for got, want in zip(
        results(run_op, turned, 4.0, "norm"), results(dmd_score_ref, turned, 4.0, "norm"), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("where", range(6), ids=["x_sigma", "sigma", "x0_student", "v_critic", "cond", "uncond"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_dmd_score_shows_what_is_not_finite(where: int, value: float, device: str) -> None:
    # The floor must not swallow a NaN, nor an infinite distance divide a wrong gradient to 0.
    inputs = make_inputs((2, 3, 8), torch.float32, 4.0, device)
    with torch.no_grad():
        inputs[where].view(-1)[0] = value
    ours, expected = (results(f, inputs, 4.0, "norm") for f in (run_op, dmd_score_ref))
    assert not expected[0].isfinite()
    for got, want in zip(ours, expected, strict=True):
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


def test_dmd_score_is_0_where_all_agree(device: str) -> None:
    x, sigma, _, critic, _, _ = make_inputs((2, 3, 8), torch.float32, 1.0, device)
    student = (x - sigma[:, None, None] * critic).requires_grad_()
    loss, grad_abs, normaliser, gradient = results(run_op, [x, sigma, student, critic, critic, None], 1.0, "none")
    assert loss == 0 and grad_abs == 0 and gradient.eq(0).all()
    assert normaliser == torch.tensor(1e-3)


@pytest.mark.parametrize("op", [dmd_score, run_op])
def test_dmd_score_gives_gradients_to_the_student_alone(op: Callable[..., Any], device: str) -> None:
    inputs = [x.detach().requires_grad_() for x in make_inputs((2, 3, 8), torch.float32, 4.0, device)]
    loss, figures = op(*inputs, 4.0, "norm")
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert [gradient is None for gradient in gradients] == [True, True, False, True, True, True]
    assert not any(figure.requires_grad for figure in figures.values())


def test_dmd_score_takes_the_widest_token_and_no_wider(device: str) -> None:
    inputs = make_inputs((1, 1, MAX_C), torch.float32, 4.0, device)
    for got, want in zip(
        results(run_op, inputs, 4.0, "norm"), results(dmd_score_ref, inputs, 4.0, "norm"), strict=True
    ):
        torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match=f"at most {MAX_C}"):
        run_op(*make_inputs((1, 1, MAX_C + 1), torch.float32, 4.0, device), 4.0, "norm")


def test_dmd_score_repeats_bit_for_bit(device: str) -> None:
    inputs = make_inputs((2, BLOCK // 64 + 1, 64), torch.bfloat16, 4.0, device)
    first, second = (results(run_op, inputs, 4.0, "norm") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_dmd_score_ref_gradcheck() -> None:
    # The surrogate's gradient holds everything else fixed; in fp64 its value is that of the detached parabola.
    inputs = in_fp64(make_inputs((2, 2, 3), torch.float32, 4.0, "cpu"))
    student = inputs[2].detach()
    loss, _ = dmd_score(*inputs, 4.0, "norm")
    (gradient,) = torch.autograd.grad(loss, inputs[2])
    fixed = gradient * student.numel()

    def parabola(moved: Tensor) -> Tensor:
        return 0.5 * (moved - student + fixed).square().mean()

    assert torch.autograd.gradcheck(parabola, student.clone().requires_grad_())
    moving = student.clone().requires_grad_()
    torch.testing.assert_close(parabola(moving), loss)
    torch.testing.assert_close(torch.autograd.grad(parabola(moving), moving)[0], gradient)


@pytest.mark.parametrize("guidance", GUIDANCES[::2], ids=str)
def test_dmd_score_opcheck(guidance: tuple[float, str], device: str) -> None:
    inputs = make_inputs((1, 2, 8), torch.bfloat16, guidance[0], device)
    torch.library.opcheck(dmd_score_op, (*inputs, *guidance, 1e-3))


def test_dmd_score_compiles_without_graph_breaks(device: str) -> None:
    inputs = make_inputs((2, 3, 8), torch.float32, 4.0, device)

    def both(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = run_op(*arguments)
        return loss + dmd_score(*arguments)[0], figures  # the public function too

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    ours, eager = (results(f, inputs, 4.0, "norm") for f in (compiled, both))
    assert all(map(torch.equal, ours, eager))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_critic": torch.zeros(2, 3, 4)}, "share one shape"),
        ({"sigma": torch.zeros(1)}, "one per sample"),
        ({"v_teacher_uncond": None}, "guidance is 4, but"),
        ({"rescale": "token"}, "'token'"),
    ],
)
def test_dmd_score_names_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    names = ["x_sigma", "sigma", "x0_student", "v_critic", "v_teacher_cond", "v_teacher_uncond"]
    fitting = dict(zip(names, make_inputs((2, 3, 8), torch.float32, 4.0, "cpu"), strict=True))
    with pytest.raises(ValueError, match=message):
        dmd_score(**{**fitting, "guidance": 4.0, "rescale": "norm", **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_dmd_score_equals_fp64_reference_at_full_size(guidance: tuple[float, str], dtype: torch.dtype) -> None:
    inputs = make_inputs((4, 4096, 64), dtype, guidance[0], "cuda")
    three = (results(run_op, inputs, *guidance), results(dmd_score_ref, inputs, *guidance))
    exact = results(dmd_score_ref, in_fp64(inputs), *guidance)
    for name, *values in zip(NAMES, *three, exact, strict=True):
        check_accuracy(name, *values, floor=FLOOR[name])
