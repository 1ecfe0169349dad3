"""Frozen linear layers with int8 weights, by torchao: half of bfloat16's memory.

    y = s (x Q^T) + b,   Q = round(W / s)        s = max |W| / 127, one fp32 number for each output

Shape legend: K inputs, N outputs of a linear.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clora.errors import InputError

# On a CPU about what its second cache holds; on a GPU few launches.
_FLOATS_AT_ONCE = {"cpu": 3 << 19, "cuda": 1 << 25}

# torch's own product with integers reads each weight once, but is made for so few rows (the modulation's).
_FEW_ROWS = 4


class QuantizedLinear(nn.Linear):
    """A frozen linear with an int8 weight (N, K). Weight and bias are the given linear's own."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


def check_torchao() -> None:
    """Raise `InputError` where torchao, which int8 weights need, is not installed."""
    if importlib.util.find_spec("torchao") is None:
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
    """The product and its gradient with a few rows of the weight in floats at a time: all of them at once would be as
    large as the weight that the integers are to save, and on a CPU slower than its caches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        x_LK, scale_N = x.reshape(-1, x.shape[-1]), weight.scale.to(x.dtype).flatten()
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(x_LK) <= _FEW_ROWS:
            y_LN = torch._weight_int8pack_mm(x_LK.contiguous(), weight.qdata, scale_N)
        else:
            y_LN = x_LK.new_empty(len(x_LK), len(weight))
            for rows, weight_NK in _parts(weight, x.dtype):
                torch.mm(x_LK, weight_NK.t(), out=y_LN[:, rows])
            y_LN *= scale_N
        if bias is not None:
            y_LN += bias
        return y_LN.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight = ctx.weight
        scaled_LN = (grad * weight.scale.to(grad.dtype).flatten()).reshape(-1, len(weight))
        dx_LK: Tensor | None = None
        for rows, weight_NK in _parts(weight, grad.dtype):
            part = scaled_LN[:, rows] @ weight_NK
            dx_LK = part if dx_LK is None else dx_LK.float().add_(part)
        assert dx_LK is not None
        return dx_LK.to(grad.dtype).view(*grad.shape[:-1], -1), None, None


def floats_at_once(device_type: str) -> int:
    """Most weights of one linear that are in floats at a time."""
    return _FLOATS_AT_ONCE["cpu" if device_type == "cpu" else "cuda"]


def _parts(weight: Any, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive rows of a weight and their integers in floats, which are overwritten by the next."""
    count, width = weight.shape
    rows = min(count, max(1, floats_at_once(weight.device.type) // width))
    buffer = torch.empty(rows, width, dtype=dtype, device=weight.device)
    for first in range(0, count, rows):
        part = weight.qdata[first : first + rows]
        yield slice(first, first + len(part)), buffer[: len(part)].copy_(part)
