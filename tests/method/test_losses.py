"""The losses against fp64 references, closed forms and diffusers' own lines."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest
import torch

from clora.method.flow import add_noise, velocity_from_x0, x0_from_velocity
from clora.method.losses import dmd_loss, flow_matching_loss, guided_velocity, velocity_loss
from tests.support.mixture_world import base_velocity, effect_mixture, make_effect_cond, without_effects

SHAPE = (3, 5, 4)


def _draws(seed: int, count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=rng, dtype=torch.float64).to(dtype) for _ in range(count)]


def _dmd_inputs(dtype: torch.dtype = torch.float32, offset: float = 0.0) -> dict[str, torch.Tensor]:
    x0, eps, v_critic, v_cond = _draws(0, 4, dtype)
    sigma = torch.tensor([0.2, 0.6, 0.95])
    x0 = x0 + offset
    return dict(
        x0_student=x0.requires_grad_(),
        x_sigma=add_noise(x0.detach(), eps, sigma),
        sigma=sigma,
        v_critic=v_critic,
        v_teacher_cond=v_cond,
    )


def _reference_gradient(inputs: dict[str, torch.Tensor], floor: float) -> torch.Tensor:
    """fp64, from the scores themselves: (s_fake - s_real) sigma^2 / a over mean |x0 - x0_real|."""
    x, sigma = inputs["x_sigma"].double(), inputs["sigma"].double().view(-1, 1, 1)
    a = 1 - sigma
    x0_fake, x0_real = (x - sigma * inputs[key].double() for key in ("v_critic", "v_teacher_cond"))
    s_fake, s_real = ((a * x0 - x) / sigma**2 for x0 in (x0_fake, x0_real))
    distance = (inputs["x0_student"].detach().double() - x0_real).abs().mean((1, 2), keepdim=True)
    return (s_fake - s_real) * sigma**2 / a / distance.clamp(min=floor)


def test_flow_matching_loss_equals_fp64_mean_square() -> None:
    v, x0, eps = _draws(1, 3)
    loss, figures = flow_matching_loss(v, x0, eps)
    squares = (v.double() - (eps.double() - x0.double())) ** 2
    torch.testing.assert_close(loss.double(), squares.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(figures["per_sample"].double(), squares.mean((1, 2)), rtol=1e-6, atol=0)


def test_flow_matching_loss_counts_each_sample_by_its_weight() -> None:
    v, x0, eps = (x.requires_grad_() for x in _draws(1, 3))
    weight = torch.tensor([0.0, 2.5, *[1.0] * (SHAPE[0] - 2)])
    loss, figures = flow_matching_loss(v, x0, eps, weight)
    squares = (v.double() - (eps.double() - x0.double())) ** 2
    want = (weight.double() * squares.mean((1, 2))).mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(figures["per_sample"].double(), squares.mean((1, 2)), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, v)
    per_element = 2 * (v.double() - (eps.double() - x0.double())) / v.numel()
    torch.testing.assert_close(grad.double(), weight.double().view(-1, 1, 1) * per_element, rtol=1e-5, atol=1e-9)
    assert torch.equal(velocity_loss(v, eps - x0, weight)[0], loss)


def test_flow_matching_loss_of_bf16_is_computed_in_fp32() -> None:
    half = [x.bfloat16() for x in _draws(1, 3)]
    loss, _ = flow_matching_loss(*half)
    want, _ = flow_matching_loss(*(x.float() for x in half))
    assert loss.dtype == torch.float32 and loss == want


def test_guided_velocity_of_bf16_is_computed_in_fp32() -> None:
    half = [x.bfloat16() for x in _draws(1, 2)]
    for rescale in ("none", "norm"):
        want = guided_velocity(*(x.float() for x in half), 4.0, rescale)
        assert torch.equal(guided_velocity(*half, 4.0, rescale), want)


@pytest.mark.parametrize(
    ("variant", "low", "high"),
    [
        ("right", 0.0, 1.5),
        ("data and noise swapped", 15.0, 30.0),
        ("sign", 15.0, 30.0),
        ("sigma reversed", 2.0, 6.0),
        ("another effect's target", 2.0, 60.0),
        ("not yet taught", 5.0, 20.0),
    ],
)
def test_flow_matching_loss_is_small_only_for_the_exact_velocity(variant: str, low: float, high: float) -> None:
    rng = torch.Generator().manual_seed(0)
    cond = make_effect_cond(2000, rng)
    mixture = effect_mixture(cond)
    x0, sigma = mixture.sample(rng), torch.rand(2000, generator=rng)
    eps = torch.randn(x0.shape, generator=rng)
    x_sigma = add_noise(x0, eps, sigma)
    exact = mixture.velocity(x_sigma, sigma)
    match variant:
        case "right":
            loss = flow_matching_loss(exact, x0, eps)[0]
        case "data and noise swapped":
            loss = flow_matching_loss(exact, eps, x0)[0]
        case "sign":
            loss = flow_matching_loss(-exact, x0, eps)[0]
        case "sigma reversed":
            loss = flow_matching_loss(mixture.velocity(x_sigma, 1 - sigma), x0, eps)[0]
        case "another effect's target":
            loss = flow_matching_loss(exact, x0.roll(1, 0), eps)[0]
        case _:
            loss = flow_matching_loss(base_velocity(x_sigma, sigma, without_effects(cond)), x0, eps)[0]
    assert low <= loss < high


@pytest.mark.parametrize("norm", ["sample", "none"])
def test_dmd_loss_gradient_times_numel_is_the_score_difference(norm: str) -> None:
    inputs = _dmd_inputs()
    loss, figures = dmd_loss(**inputs, norm=norm, norm_floor=1e-3)
    loss.backward()
    want = _reference_gradient(inputs, 1e-3)
    if norm == "none":
        want = inputs["sigma"].double().view(-1, 1, 1) * (inputs["v_teacher_cond"] - inputs["v_critic"]).double()
    got = inputs["x0_student"].grad.double() * want.numel()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.detach().double(), 0.5 * (want**2).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(figures["grad_abs"].double(), want.abs().mean(), rtol=1e-5, atol=0)


def test_dmd_loss_gradient_survives_large_latents_where_the_plain_surrogate_rounds() -> None:
    inputs = _dmd_inputs(offset=1000.0)
    inputs["v_teacher_cond"] = inputs["v_critic"] + 1e-3  # small beside the latents
    x0 = inputs["x0_student"]
    dmd_loss(**inputs, norm="sample", norm_floor=1e-3)[0].backward()
    right = x0.grad * x0.numel()
    plain = torch.autograd.grad(0.5 * (x0 - (x0 - right).detach()).square().mean(), x0)[0] * x0.numel()
    scale = right.abs().mean()
    x, sigma = inputs["x_sigma"], inputs["sigma"]
    x0_critic, x0_real = (x0_from_velocity(x, inputs[key], sigma) for key in ("v_critic", "v_teacher_cond"))
    g = (x0_critic - x0_real) / (x0.detach() - x0_real).abs().mean((1, 2), keepdim=True)
    assert (right - g).abs().mean() < 1e-5 * scale
    assert (plain - right).abs().mean() > 1e-2 * scale


@pytest.mark.parametrize("variant", ["right", "missing detach", "sign"])
def test_dmd_loss_step_lowers_the_distance_to_the_teacher(variant: str) -> None:
    inputs = _dmd_inputs()
    x0 = inputs["x0_student"]
    # This critic knows the sample.
    inputs["v_critic"] = velocity_from_x0(inputs["x_sigma"], x0.detach(), inputs["sigma"])
    x0_real = x0_from_velocity(inputs["x_sigma"], inputs["v_teacher_cond"], inputs["sigma"])
    loss, _ = dmd_loss(**inputs, norm="sample", norm_floor=1e-3)
    if variant == "missing detach":
        grad = (x0.detach() - x0_real) / (x0.detach() - x0_real).abs().mean((1, 2), keepdim=True)
        loss = 0.5 * (x0 - (x0 - grad)).square().mean()
    if variant == "sign":
        loss = -loss
    g = torch.autograd.grad(loss, x0)[0] * x0.numel()
    cosine = torch.cosine_similarity(-g.flatten(1), (x0_real - x0.detach()).flatten(1))
    low, high = {"right": (0.999, 1.001), "missing detach": (-1e-6, 1e-6), "sign": (-1.001, -0.999)}[variant]
    assert low < cosine.min() and cosine.max() < high


def test_dmd_loss_normaliser_is_each_samples_own() -> None:
    inputs = _dmd_inputs()
    want = _reference_gradient(inputs, 1e-3)
    dmd_loss(**inputs, norm="sample", norm_floor=1e-3)[0].backward()
    together = inputs["x0_student"].grad * want.numel()
    for i in range(SHAPE[0]):
        alone = {key: value.detach()[i : i + 1].clone() for key, value in inputs.items()}
        alone["x0_student"].requires_grad_()
        dmd_loss(**alone, norm="sample", norm_floor=1e-3)[0].backward()
        got = alone["x0_student"].grad[0] * want[0].numel()
        torch.testing.assert_close(got, together[i], rtol=1e-5, atol=1e-6)


def test_dmd_loss_floor_is_finite_where_dmd2_divides_zero_by_zero() -> None:
    inputs = _dmd_inputs()
    # Velocity 0 of both: critic and teacher return the sample.
    inputs["v_teacher_cond"], inputs["v_critic"] = torch.zeros(SHAPE), torch.zeros(SHAPE)
    inputs["x0_student"] = inputs["x_sigma"].clone().requires_grad_()
    loss, figures = dmd_loss(**inputs, norm="sample", norm_floor=1e-3)
    loss.backward()
    difference = torch.zeros(SHAPE)
    assert (difference / difference.abs().mean((1, 2), keepdim=True)).isnan().all()
    assert inputs["x0_student"].grad.abs().max() == 0 and loss == 0
    torch.testing.assert_close(figures["normaliser"], torch.tensor(1e-3))
    # A hair's breadth away the gradient is still bounded by difference / floor.
    inputs["v_critic"] = torch.full(SHAPE, 1e-6)
    _, figures = dmd_loss(**inputs, norm="sample", norm_floor=1e-3)
    assert 0 < figures["grad_abs"] <= 1e-6 / 1e-3


def test_dmd_loss_sends_no_gradient_to_critic_teacher_or_noised_sample() -> None:
    inputs = _dmd_inputs()
    for key in ("v_critic", "v_teacher_cond", "x_sigma"):
        inputs[key] = inputs[key].clone().requires_grad_()
    dmd_loss(**inputs, norm="sample", norm_floor=1e-3)[0].backward()
    assert inputs["x0_student"].grad.abs().sum() > 0
    assert all(inputs[key].grad is None for key in ("v_critic", "v_teacher_cond", "x_sigma"))


def test_dmd_loss_of_bf16_networks_has_fp32_gradient() -> None:
    inputs = _dmd_inputs()
    for key in ("v_critic", "v_teacher_cond", "x_sigma"):
        inputs[key] = inputs[key].bfloat16()
    loss, _ = dmd_loss(**inputs, norm="sample", norm_floor=1e-3)
    loss.backward()
    want = _reference_gradient(inputs, 1e-3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(inputs["x0_student"].grad.double() * want.numel(), want, rtol=1e-5, atol=1e-5)


def _diffusers_true_cfg(v_cond: torch.Tensor, v_uncond: torch.Tensor, guidance: float) -> torch.Tensor:
    """Runs the assignments of the pipeline's own `if do_true_cfg:` block."""
    pipelines = pytest.importorskip("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus")
    source = textwrap.dedent(inspect.getsource(pipelines.QwenImageEditPlusPipeline.__call__))
    names = {"noise_pred": v_cond, "neg_noise_pred": v_uncond, "true_cfg_scale": guidance, "torch": torch}
    blocks = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.If)]
    block = next(b for b in blocks if ast.unparse(b.test) == "do_true_cfg" and "comb_pred" in ast.unparse(b))
    lines = [ast.unparse(s) for s in block.body if isinstance(s, ast.Assign)]
    lines = [line for line in lines if not line.startswith("neg_noise_pred")]  # cuts off the references' tokens
    assert len(lines) == 4, lines
    exec("\n".join(lines), names)
    return names["noise_pred"]


def test_guided_velocity_norm_equals_diffusers() -> None:
    v_cond, v_uncond = _draws(2, 2)
    got = guided_velocity(v_cond, v_uncond, 4.0, "norm")
    torch.testing.assert_close(got, _diffusers_true_cfg(v_cond, v_uncond, 4.0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.norm(dim=-1), v_cond.norm(dim=-1), rtol=1e-6, atol=0)
    # The norm is a token's own: one norm for the whole sample would be another function.
    plain = guided_velocity(v_cond, v_uncond, 4.0, "none")
    whole = plain * (v_cond.norm(dim=(1, 2)) / plain.norm(dim=(1, 2))).view(-1, 1, 1)
    assert (got - whole).abs().max() > 0.1


def test_guided_velocity_norm_of_zero_velocity_is_finite() -> None:
    """Also where cond is large and guidance cancels it: no inf times 0."""
    zero, large = torch.zeros(SHAPE), torch.full(SHAPE, 100.0)
    assert guided_velocity(zero, zero, 4.0, "norm").abs().max() == 0
    assert guided_velocity(large, 2 * large, 2.0, "norm").abs().max() == 0


@pytest.mark.parametrize("rescale", ["none", "norm"])
def test_guided_velocity_at_one_is_cond(rescale: str) -> None:
    v_cond, v_uncond = _draws(2, 2)
    torch.testing.assert_close(guided_velocity(v_cond, v_uncond, 1.0, rescale), v_cond, rtol=1e-5, atol=1e-6)


def test_guided_velocity_five_is_the_authors_four_on_x0() -> None:
    v_cond, v_uncond, x_sigma = _draws(2, 3, torch.float64)
    sigma = torch.tensor([0.2, 0.6, 0.95])
    x0_cond, x0_uncond = (x0_from_velocity(x_sigma, v, sigma) for v in (v_cond, v_uncond))
    authors = x0_cond + (x0_cond - x0_uncond) * 4.0
    got = x0_from_velocity(x_sigma, guided_velocity(v_cond, v_uncond, 5.0, "none"), sigma)
    torch.testing.assert_close(got, authors, rtol=1e-12, atol=1e-12)
