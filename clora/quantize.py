"""Frozen linear layers with int8 weights, by torchao: half of bfloat16's memory.

    y = s (x Q^T) + b,   Q = round(W / s)        s = max |W| / 127, one fp32 number for each output

Shape legend: K inputs, N outputs of a linear.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clora.config_schema import Quantize
from clora.errors import InputError


class QuantizedLinear(nn.Linear):
    """A frozen linear with an int8 weight (N, K). Weight and bias are the given linear's own."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


def check_quantize(quantize: Quantize) -> None:
    """Raise `InputError` where what `base.quantize` asks for is not installed."""
    if quantize == "int8" and importlib.util.find_spec("torchao") is None:
        raise InputError(
            "base.quantize: int8 needs torchao, which is not installed; run pip install 'clora[quantize]', or set none"
        )


def quantize_linears(module: nn.Module, device: torch.device | str) -> None:
    """Make every linear inside `module` a `QuantizedLinear`, and move all of it to `device`: one linear at a time, so
    that its floats are never there together."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # seconds that only this takes

    # Its settings for the compiler would also let fp32 products run in TF32, everywhere.
    quantize_(module, Int8WeightOnlyConfig(set_inductor_config=False), device=device)
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, QuantizedLinear(linear).train(linear.training))


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is torchao's, integers (`qdata`) and scales (`scale`)."""
    return hasattr(weight, "qdata")


def float_weight(weight: Tensor) -> Tensor:
    """A weight, quantized or not, in fp32."""
    # `float()` would leave torchao's quantized.
    found: Any = weight
    values: Tensor = found.dequantize(torch.float32) if is_quantized(weight) else weight.float()
    return values


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters of a module, integers and scales for quantized ones."""
    total = 0
    for weight in module.parameters():
        found: Any = weight
        parts = (found.qdata, found.scale, found.zero_point) if is_quantized(weight) else (weight,)
        total += sum(part.nbytes for part in parts)
    return total


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, typed like x; gradients flow to x alone where the weight is quantized."""
    if not is_quantized(weight):
        return F.linear(x, weight, bias)
    y: Tensor = _IntegerProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _IntegerProduct(torch.autograd.Function):
    """torchao's product. Its own gradient would keep each weight in x's dtype until the backward pass, which is what
    the integers are to save; here it is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight = ctx.weight
        scaled = grad * weight.scale.to(grad.dtype).flatten()
        return scaled @ weight.qdata.to(grad.dtype), None, None
