"""The fused block against diffusers' block with PEFT's adapters: outputs, gradients, and whole training steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import clora.backbones.qwen_image.block as qwen_block
from bench.kernels.block import sharing_weights
from bench.training.cycle_models import SIZES, as_backbone, make_data, make_distillation
from clora.backbones.cond import Cond, make_cond
from clora.backbones.load import load_backbone
from clora.backbones.qwen_image.backbone import KEPT, Kernels, QwenImageBackbone
from clora.backbones.qwen_image.block import FusedBlock, fuse_blocks, joint_attention
from clora.distill.step import train_step
from clora.kernels.adaln import adaln_op, gated_residual_adaln_op
from clora.kernels.lora_linear import lora_linear_op
from clora.kernels.lora_qkv import lora_qkv_op
from clora.kernels.qk_norm_rope import qk_norm_rope_op
from clora.lora.adapters import Adapters
from clora.lora.slots import Slot
from tests.support.full_width import full_width_transformer
from tests.support.random_base import random_transformer

KERNELS: tuple[Kernels, ...] = ("reference", "fused")
RANK, ALPHA = 6, 9.0
CHOICES: list[list[Slot]] = [
    [None],
    ["a0"],
    [None, "a0", "a0"],
    ["a1", "b0", None],
    ["a0", "a1", "a0"],
    [("a0", "b0")],
    [("a0", "a1"), "b0", None],
]


def backbone_of(transformer: Any, kernels: Kernels) -> tuple[QwenImageBackbone, Adapters, list[Tensor]]:
    """A backbone of this transformer with random adapters; their parameters."""
    backbone = as_backbone(transformer)
    adapters = backbone.add_adapters()
    backbone.use_kernels(kernels)
    return backbone, adapters, add_random_stacks(adapters)


def add_random_stacks(adapters: Adapters) -> list[Tensor]:
    """Stacks a (two slots) and b (one of another rank) without a zero in them; their parameters."""
    rng = torch.Generator().manual_seed(1)
    adapters.add_stack("a", ["a0", "a1"], RANK, ALPHA, trainable=True, generator=rng)
    adapters.add_stack("b", ["b0"], 4, 3.0, trainable=True, generator=rng)
    parameters = [*adapters.parameters("a"), *adapters.parameters("b")]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng) * parameter.shape[-1] ** -0.5)
    return parameters


def batch(texts: Sequence[int], width: int, device: Any = "cpu") -> tuple[Tensor, Tensor, Cond]:
    """Latents, sigma and a cond of prompts of these lengths with one reference image."""
    grid = (3, 4)
    rng = torch.Generator().manual_seed(2)
    n, tokens = len(texts), grid[0] * grid[1]
    prompts = [torch.randn(length, width, generator=rng) for length in texts]
    reference = torch.randn(n, 4, 64, generator=rng)
    cond = make_cond(prompts, [(reference, (2, 2))], grid)
    latents, sigma = torch.randn(n, tokens, 64, generator=rng), torch.rand(n, generator=rng)
    return latents.to(device), sigma.to(device), cond.to(device)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def with_gradients(backbone: QwenImageBackbone, inputs: Any, slots: Any, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The velocity, and the gradients of its mean square; zeros where there is none."""
    velocity = backbone.velocity(*inputs, slots)
    gradients: Sequence[Tensor | None] = [None] * len(parameters)
    if velocity.requires_grad:
        gradients = torch.autograd.grad(velocity.float().square().mean(), parameters, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return [velocity.detach(), *found]


@pytest.mark.parametrize("slots", CHOICES, ids=str)
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_fused_blocks_equal_the_stock_blocks_with_slots(zero_cond_t: bool, slots: list[Slot]) -> None:
    """Also with text of three lengths, which the stock blocks mask and the fused ones cut."""
    results = []
    for kernels in KERNELS:
        backbone, _, parameters = backbone_of(random_transformer(zero_cond_t=zero_cond_t), kernels)
        results.append(with_gradients(backbone, batch([5, 9, 2], 32), slots, parameters))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want) if not want.any() else relative_error(got, want) < 1e-5


def peft_results(transformer: Any, adapters: Adapters, inputs: Any) -> dict[str, Tensor]:
    """diffusers' own model with slot a0 as PEFT's adapter: the velocity, and the gradients of its mean square."""
    targets = sorted({name.split(".", 2)[2] for name in adapters.linears})
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    trained = {}
    with torch.no_grad():
        for name, linear in adapters.linears.items():
            layer = transformer.get_submodule(name)
            for part, stack in (("A", linear.A), ("B", linear.B)):
                weight = getattr(layer, f"lora_{part}")["default"].weight
                trained[f"{name}.{part}"] = weight.copy_(stack["a"][0])
    results = with_gradients(as_backbone(transformer), inputs, None, list(trained.values()))
    return dict(zip(("velocity", *trained), results, strict=True))


def load(model: str, dtype: torch.dtype) -> Any:
    """The shipped tiny base's transformer, or two random blocks of the real model's width."""
    if model == "tiny":
        return load_backbone("tiny", dtype=dtype, components=("transformer",)).transformer
    return full_width_transformer().to(dtype)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("texts", [[5, 5], [7, 3]], ids=str)
@pytest.mark.parametrize("model", ["tiny", pytest.param("full width", marks=pytest.mark.slow)])
def test_fused_blocks_equal_diffusers_with_peft(model: str, texts: list[int], device: str) -> None:
    """In fp32 within 1e-5; in bf16 at most twice as far from fp32 as diffusers with PEFT is."""
    slow = (model, device) == ("full width", "cpu")
    if slow and texts != [5, 5]:
        pytest.skip("takes a minute; the tiny base covers text of two lengths")
    ours, peft = {}, {}
    for dtype in (torch.float32,) if slow else (torch.float32, torch.bfloat16):  # few CPUs have arithmetic for bf16
        transformer = load(model, dtype).to(device)
        stock = sharing_weights(transformer)
        backbone, adapters, _ = backbone_of(transformer, "fused")
        inputs = batch(texts, transformer.config.joint_attention_dim, device)
        velocity, *gradients = with_gradients(backbone, inputs, ["a0"], adapters.parameters("a"))
        ours[dtype] = [velocity, *(gradient[0] for gradient in gradients)]
        peft[dtype] = peft_results(stock, adapters, inputs)
        assert list(peft[dtype]) == ["velocity", *adapters.named_parameters("a")]
    exact = list(peft[torch.float32].values())
    assert sum(bool(want.any()) for want in exact) > 0.8 * len(exact)
    for got, want in zip(ours[torch.float32], exact, strict=True):
        assert relative_error(got, want) < 1e-5 or not (want.any() or got.any())
    if slow:
        return
    for got, theirs, want in zip(ours[torch.bfloat16], peft[torch.bfloat16].values(), exact, strict=True):
        assert relative_error(got, want) <= 2 * relative_error(theirs, want) + 2**-8


# Each takes ten seconds: both kinds of modulation, both kinds of choice, in two of the four pairs.
@pytest.mark.parametrize(("slots", "zero_cond_t"), [(["a0", None], False), ([("a0", "b0"), "a1"], True)], ids=str)
def test_fused_blocks_run_on_the_kernels_themselves(
    monkeypatch: pytest.MonkeyPatch, slots: list[Slot], zero_cond_t: bool
) -> None:
    """The block's tensors, as they lie in memory, through the Triton kernels in the interpreter."""
    monkeypatch.setattr(qwen_block, "adaln", lambda x, scale, shift, index=None: adaln_op(x, scale, shift, index))
    monkeypatch.setattr(
        qwen_block,
        "gated_residual_adaln",
        lambda x, y, gate, scale, shift, index=None: gated_residual_adaln_op(x, y, gate, scale, shift, index),
    )
    monkeypatch.setattr(qwen_block, "lora_linear", lambda *given: lora_linear_op(*given, True, None)[0])
    monkeypatch.setattr(
        qwen_block,
        "lora_qkv",
        lambda x, weights, biases, A, B, scale, slot: lora_qkv_op(
            x, list(weights), *biases, list(A), list(B), list(scale), slot, None
        )[:3],
    )
    monkeypatch.setattr(qwen_block, "qk_norm_rope", qk_norm_rope_op)
    results = []
    for kernels in KERNELS:
        backbone, _, parameters = backbone_of(random_transformer(zero_cond_t=zero_cond_t), kernels)
        results.append(with_gradients(backbone, batch([3, 5], 32), slots, parameters))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want) if not want.any() else relative_error(got, want) < 1e-5


def test_distillation_steps_agree() -> None:
    """Student, critic and teachers on the tiny base, reference and fused blocks, both streams: the same losses."""
    figures = []
    for kernels in KERNELS:
        transformer = load("tiny", torch.float32)
        data = make_data(SIZES["tiny"], critic_updates=1)
        train = data.config.train.model_copy(update={"kernels": kernels, "coarse_steps": 1, "ema_start": 0})
        data.config = data.config.model_copy(update={"train": train})
        distillation = make_distillation(data, as_backbone(transformer))
        assert isinstance(transformer.transformer_blocks[0], FusedBlock) == (kernels == "fused")
        figures.append([train_step(distillation, step) for step in (0, 1, 5)])  # coarse, effect, general
    streams = {key.split("/")[0] for one in figures[0] for key in one if "/" in key}
    assert streams == {"effect", "general"}
    for want, got in zip(*figures, strict=True):
        assert want.keys() == got.keys()
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_fuse_blocks_keeps_every_tensor_and_name() -> None:
    transformer = random_transformer()
    before = {name: tensor.data_ptr() for name, tensor in transformer.named_parameters()}
    fuse_blocks(transformer)
    fuse_blocks(transformer)
    assert {name: tensor.data_ptr() for name, tensor in transformer.named_parameters()} == before
    assert all(isinstance(block, FusedBlock) for block in transformer.transformer_blocks)


def test_use_kernels_is_for_good_and_automatic_on_a_gpu_alone() -> None:
    backbone, _, _ = backbone_of(random_transformer(), "auto")
    assert not backbone.fused
    backbone.use_kernels("fused")
    backbone.use_kernels("auto")
    with pytest.raises(RuntimeError, match="fused already"):
        backbone.use_kernels("reference")


def test_fused_block_refuses_a_mask() -> None:
    transformer = random_transformer()
    fuse_blocks(transformer)
    with pytest.raises(ValueError, match="text_lengths"):
        transformer(
            torch.zeros(1, 4, 64), torch.zeros(1, 3, 32), torch.ones(1, 3), torch.ones(1), img_shapes=[[(1, 2, 2)]]
        )


def test_fused_blocks_run_adapters_beyond_the_kernels_rank_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of slots that are summed add up, and the kernels take 256: a rank of 260 is the stock blocks', by no op."""

    def refused(*args: Any) -> Any:
        raise AssertionError("asked of a kernel")

    results = []
    for kernels in KERNELS:
        transformer = random_transformer()
        backbone = as_backbone(transformer)
        adapters = backbone.add_adapters()
        for name, rank in (("wide", 200), ("more", 60)):
            rng = torch.Generator().manual_seed(rank)
            adapters.add_stack(name, [name], rank, rank, trainable=True, init="lora", generator=rng)
            with torch.no_grad():
                for path, parameter in adapters.named_parameters(name).items():
                    if path.endswith(".B"):
                        parameter.copy_(0.01 * torch.randn(parameter.shape, generator=rng))
        backbone.use_kernels(kernels)
        monkeypatch.setattr(qwen_block, "lora_linear", refused)
        monkeypatch.setattr(qwen_block, "lora_qkv", refused)
        with torch.no_grad():
            results.append(backbone.velocity(*batch([5, 2], 32), [("wide", "more")] * 2))
            with pytest.raises(AssertionError) if kernels == "fused" else nullcontext():
                backbone.velocity(*batch([5, 2], 32), ["wide"] * 2)
    assert relative_error(results[1], results[0]) < 1e-5


def test_fused_blocks_with_a_merged_slot() -> None:
    results = []
    for kernels in KERNELS:
        backbone, adapters, _ = backbone_of(random_transformer(), kernels)
        with torch.no_grad(), adapters.merged(("a0", "b0")):
            results.append(backbone.velocity(*batch([5, 2], 32)))
    assert relative_error(results[1], results[0]) < 1e-5


def test_joint_attention_leaves_out_padding() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 10, 2, 8, generator=rng, requires_grad=True) for _ in range(3))
    L, lengths = 6, (4, 0, 2)
    out = joint_attention(q, k, v, L, lengths)
    for sample, length in enumerate(lengths):
        real = slice(0, L + length)
        scores = torch.einsum("qhe,khe->hqk", q[sample, real], k[sample, real]) / 8**0.5
        want = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[sample, real])
        torch.testing.assert_close(out[sample, real], want)
        assert not out[sample, L + length :].any()
    for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert not gradient[1, L:].any() and gradient[0].any(-1).all()


class Count(TorchDispatchMode):
    """Calls of torch's operators that `wanted(function, args)` is true of."""

    def __init__(self, wanted: Callable[[Any, Any], bool]) -> None:
        super().__init__()
        self.wanted, self.count = wanted, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self.wanted(function, args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_gradient_checkpointing_keeps_attention(kernels: Kernels) -> None:
    """The same gradients, and attention computed once a block."""
    gradients = []
    for checkpointed in (False, True):
        backbone, _, parameters = backbone_of(random_transformer(), kernels)
        backbone.set_gradient_checkpointing(checkpointed)
        with Count(lambda function, _: function in KEPT) as counted:
            gradients.append(with_gradients(backbone, batch([5, 5], 32), ["a0", "b0"], parameters))
        assert counted.count == 2
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(("whole", "computed"), [(0, 12), (1, 10), (3, 6), (9, 6)])
def test_gradient_checkpointing_keeps_the_last_blocks_whole(whole: int, computed: int) -> None:
    backbone, _, parameters = backbone_of(random_transformer(num_layers=3), "fused")
    plain = with_gradients(backbone, batch([5], 32), ["a0"], parameters)
    backbone.set_gradient_checkpointing(True, whole)
    inner = backbone.transformer.transformer_blocks[0].img_mlp.net[0].proj.weight.T.shape
    with Count(lambda f, args: f is torch.ops.aten.addmm.default and args[2].shape == inner) as counted:
        again = with_gradients(backbone, batch([5], 32), ["a0"], parameters)
    assert all(map(torch.equal, plain, again))
    assert counted.count == computed  # products of the MLPs' first linears, of image and text


def test_fused_block_compiles_without_breaks_and_once_for_all_slots() -> None:
    backbone, _, parameters = backbone_of(random_transformer(), "fused")
    inputs = batch([5, 5, 5], 32)
    choices: list[list[Slot]] = [["a0", "a1", None], [None, "a0", "a0"], ["a1", "a0", "a0"]]
    eager = [with_gradients(backbone, inputs, slots, parameters) for slots in choices]
    counter = CompileCounter()
    torch._dynamo.reset()

    def compiler(graph: Any, example_inputs: Any) -> Any:
        return counter(graph, example_inputs)

    for block in backbone.transformer.transformer_blocks:
        block.compile(backend=compiler, fullgraph=True)
    for slots, want in zip(choices, eager, strict=True):
        got = with_gradients(backbone, inputs, slots, parameters)
        assert all(relative_error(a, b) < 1e-6 or not b.any() for a, b in zip(got, want, strict=True))
    assert counter.frame_count <= len(backbone.transformer.transformer_blocks)
