"""One Qwen-Image block with an unmerged adapter on every linear: `python -m bench.kernels.block [--json] [--rounds N]`.

Forward, and forward with the gradients of image, text and adapters, at full width with 8192 image and 512 text tokens
and rank-128 adapters. "eager" is diffusers' block with PEFT's layers, "ours" the block on clora's ops, "compiled" and
"ours_compiled" the same under torch.compile; all hold the same weights. Bytes are a floor: weights and adapters once,
and what enters and leaves the block. Checked first, at fewer tokens: ours in this dtype is at most twice as far from
fp32 as eager. Without a GPU a narrow block of 64 and 8 tokens runs, and ours is plain torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.kernels.timing import Case, check_accuracy, run
from bench.training.cycle_models import Size, as_backbone, random_transformer
from clora.backbones.qwen_image.block import fastest_attention
from clora.lora.adapters import Adapters
from clora.lora.layers import QWEN_IMAGE_TARGETS
from clora.lora.slots import SlotLinear

SLOT = "adapter"
FULL = Size({"num_layers": 1}, (64, 64), 512, 128, torch.bfloat16, rounds=0)
SMALL = Size(
    {"num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 4, "axes_dims_rope": (8, 12, 12)},
    (4, 8), 8, 16, torch.float32, rounds=0,
)  # fmt: skip

Inputs = dict[str, Any]
Models = dict[str, Any]  # the same transformer by way, sharing its weights


def sharing_weights(transformer: Any) -> Any:
    """A copy of the modules that holds the same parameters, and whose adapters follow the same choice of slots."""
    shared = [*transformer.parameters()]
    shared += [module.choice for module in transformer.modules() if isinstance(module, SlotLinear)]
    return copy.deepcopy(transformer, {id(one): one for one in shared})


def make_models(transformer: Any, rank: int | None) -> tuple[Models, Adapters | None]:
    """ "eager" and "ours" of a transformer; with a rank each has the same random adapter on every linear."""
    models = {way: sharing_weights(transformer) for way in ("eager", "ours")}
    backbone = as_backbone(models["ours"])
    adapters = None
    if rank is not None:
        adapters = backbone.add_adapters()
        rng = torch.Generator().manual_seed(0)
        dtype = transformer.dtype
        adapters.add_stack(SLOT, [SLOT], rank, rank, trainable=True, generator=rng, dtype=dtype)
        models["eager"].add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(QWEN_IMAGE_TARGETS)))
        with torch.no_grad():
            for name, linear in adapters.linears.items():
                linear.B[SLOT].copy_(torch.randn(linear.B[SLOT].shape, generator=rng) * 0.02)
                layer = models["eager"].get_submodule(name)
                layer.lora_A["default"].to(dtype).weight.copy_(linear.A[SLOT][0])
                layer.lora_B["default"].to(dtype).weight.copy_(linear.B[SLOT][0])
    backbone.use_kernels("fused")
    return models, adapters


def block_inputs(transformer: Any, size: Size, grid: tuple[int, int], text_tokens: int, dtype: torch.dtype) -> Inputs:
    """Random hidden states of image (result and one reference) and text, in the block's argument names."""
    device = transformer.device
    rng = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device).to(dtype)

    freqs = transformer.pos_embed([[(1, *grid)] * 2], max_txt_seq_len=text_tokens, device=device)
    return {
        "hidden_states": normal(1, 2 * grid[0] * grid[1], size.width).requires_grad_(),
        "encoder_hidden_states": normal(1, text_tokens, size.width).requires_grad_(),
        "encoder_hidden_states_mask": None,
        "temb": normal(1, size.width),
        "image_rotary_emb": freqs,
    }


def adapter_parameters(block: Any) -> list[Tensor]:
    """The trained parameters of a block, ours or PEFT's."""
    return [parameter for parameter in block.parameters() if parameter.requires_grad]


def forward(block: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        text, image = block(**inputs)
    return text, image


def forward_and_backward(block: Callable[..., Any], trained: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """Text and image, and the gradients of the sum of their squares for both inputs and the adapters."""
    text, image = block(**inputs)
    wanted = [inputs["hidden_states"], inputs["encoder_hidden_states"], *trained]
    return text, image, *torch.autograd.grad([text, image], wanted, [text.detach(), image.detach()])


def check(size: Size, device: str, dtype: torch.dtype) -> None:
    """Raise AssertionError unless ours is at most twice as far from fp32 as eager, outputs and all gradients."""
    results: dict[tuple[str, torch.dtype], list[Tensor]] = {}
    for at in (torch.float32, dtype):
        models, adapters = make_models(random_transformer(size, device).to(at), size.rank)
        for way, model in models.items():
            block = model.transformer_blocks[0]
            run_block = block if adapters is None or way == "eager" else using(adapters, block)
            inputs = block_inputs(model, size, (8, 8), 24, at)
            text, image, *gradients = forward_and_backward(run_block, adapter_parameters(block), inputs)
            sums = sorted(float(g.double().square().sum()) for g in gradients[2:])
            results[way, at] = [text, image, *gradients[:2], torch.tensor(sums, dtype=torch.float64)]
    exact = results["eager", torch.float32]
    for name, ours, eager, right in zip(
        ("text", "image", "d_image", "d_text"), results["ours", dtype], results["eager", dtype], exact, strict=False
    ):
        check_accuracy(name, ours, eager, right.double(), floor=2.0)
    # Adapters' gradients by their squares: PEFT and ours hold them in another order and shape.
    torch.testing.assert_close(results["ours", dtype][4], results["eager", dtype][4], rtol=0.2, atol=1e-6)


def count(block: Any, inputs: Inputs, backward: bool) -> tuple[int, int]:
    """Bytes (a floor) and FLOPs of a call."""
    with FlopCounterMode(display=False) as counter:
        text, image = block(**inputs)
        if backward:
            (text.sum() + image.sum()).backward()
    states = [inputs["hidden_states"], inputs["encoder_hidden_states"]]
    for tensor in (*states, *adapter_parameters(block)):
        tensor.grad = None
    passing = 2 * sum(state.nbytes for state in states)
    held = sum(parameter.nbytes for parameter in block.parameters())
    # A backward pass reads the weights again, and gradients pass like the states; the adapters' are written.
    trained = sum(parameter.nbytes for parameter in adapter_parameters(block)) if backward else 0
    return (2 if backward else 1) * (held + passing) + trained, counter.get_total_flops()


def using(adapters: Adapters, block: Callable[..., Any]) -> Callable[..., Any]:
    """The block with the adapter's slot in use."""

    def call(**inputs: Any) -> Any:
        with adapters.use([SLOT]):
            return block(**inputs)

    return call


def all_cases(device: str, size_name: str) -> list[Case]:
    torch._functorch.config.donated_buffer = False  # else a compiled backward runs only once a forward
    size = FULL if size_name == "full" else SMALL
    models, adapters = make_models(random_transformer(size, device), size.rank)
    assert adapters is not None
    if device == "cuda":
        models["eager"].set_attention_backend(str(fastest_attention() or "native"))
    inputs = block_inputs(models["ours"], size, size.grid, size.text_tokens, size.dtype)
    blocks = {way: model.transformer_blocks[0] for way, model in models.items()}
    trained = {way: adapter_parameters(block) for way, block in blocks.items()}
    ways: dict[str, Any] = {"eager": blocks["eager"], "ours": using(adapters, blocks["ours"])}
    if device == "cuda":
        ways["compiled"] = torch.compile(blocks["eager"], dynamic=False)
        ways["ours_compiled"] = using(adapters, torch.compile(blocks["ours"], dynamic=False))
        trained |= {"compiled": trained["eager"], "ours_compiled": trained["ours"]}
    text = f"{size.width} wide, {inputs['hidden_states'].shape[1]}+{size.text_tokens} tokens, rank {size.rank}"
    counted = {backward: count(blocks["eager"], inputs, backward) for backward in (False, True)}
    gate = partial(check, SMALL, device, size.dtype)
    forwards = {way: partial(forward, block, inputs) for way, block in ways.items()}
    both = {way: partial(forward_and_backward, block, trained[way], inputs) for way, block in ways.items()}
    return [
        Case(f"{text} forward", gate, forwards, *counted[False]),
        Case(f"{text} forward and backward", gate, both, *counted[True]),
    ]


if __name__ == "__main__":
    run("block", __doc__, all_cases)
