"""The linear with adapter slots against torch, eager and compiled: `python -m bench.lora_linear [--json] [--rounds N]`.

Forward, and forward and backward, at the widths of Qwen-Image-Edit with rank-128 adapters: one sample of 8192 tokens;
then three samples with three adapters and with one. The ways are ours; the reference compiled; "eager", which is what
PEFT does; "addmm", the update fused with the addition by a second cuBLAS product; and "gemm", the linear alone. Each
case's name says what the forward of ours and of PEFT moves beyond the linear alone, by `forward_bytes`. On a GPU the
result is checked against fp64 first. Without a GPU the kernels cannot run: "eager" is timed alone, at a small size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from bench.timing import Case, check_accuracy, run
from clora.kernels.lora_linear import lora_linear, lora_linear_ref

# x, weight, bias, A, B, scale, slot, epilogue -> y
Op = Callable[..., Tensor]
WIDTHS = ((3072, 3072), (3072, 12288), (12288, 3072))


def peft(slots: Sequence[int]) -> Op:
    """PEFT's forward: two linears, a product with the scale, an addition; sample by sample where adapters differ."""

    def op(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, *_: object) -> Tensor:
        y = F.linear(x, weight, bias)
        if len(set(slots)) == 1:
            return y + F.linear(F.linear(x, A[slots[0]]), B[slots[0]]) * scale[slots[0]]
        for slot in sorted(set(slots)):
            rows = [row for row, its in enumerate(slots) if its == slot]
            y[rows] += F.linear(F.linear(x[rows], A[slot]), B[slot]) * scale[slot]
        return y

    return op


def addmm(slots: Sequence[int]) -> Op:
    """The update's second product added by cuBLAS to what the first wrote; batched where adapters differ."""

    def op(
        x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, slot: Tensor, *_: object
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        if len(set(slots)) == 1:
            down = (F.linear(x, A[slots[0]]) * scale[slots[0]]).flatten(0, 1)
            return torch.addmm(y.flatten(0, 1), down, B[slots[0]].t()).view(y.shape)
        down = (torch.bmm(x, A[slot].mT) * scale[slot, None, None]).to(x.dtype)
        return torch.baddbmm(y, down, B[slot].mT)

    return op


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
    return F.linear(x, weight, bias)


def forward_bytes(tokens: int, K: int, N: int, rank: int, adapters: int, itemsize: int = 2) -> dict[str, int]:
    """Bytes that the forward reads and writes by way, each tensor once for each kernel that touches it.

    Beyond the linear (x, W and y once), ours reads x, A, down, B and y and writes down and y. PEFT reads and writes
    those too, and writes, scales (a read and a write) and reads the update. Biases, scales and slots are left out.
    """
    x, y, down = tokens * K, tokens * N, tokens * rank
    linear = x + N * K + y
    update = x + 2 * down + adapters * rank * (K + N)  # the two small products, less what the second writes
    counted = {"gemm": linear, "ours": linear + update + 2 * y, "eager": linear + update + 6 * y}
    return {way: itemsize * numbers for way, numbers in counted.items()}


def backward_bytes(tokens: int, K: int, N: int, rank: int, adapters: int, itemsize: int = 2) -> int:
    """The same of our backward: beyond dx = dy W it reads dy twice, x, dx, down and d_down twice, and writes dx and
    d_down; the stacks are read and their gradients written. The small first stage of these is left out."""
    linear = tokens * (K + N) + N * K
    return itemsize * (linear + tokens * (2 * N + 3 * K + 4 * rank) + 2 * adapters * rank * (K + N))


def check(inputs: Sequence[Tensor], gradient: Tensor) -> None:
    """Raise AssertionError unless y and the gradients of x, A and B are right, by fp64."""
    x, weight, bias, A, B, scale, slot = inputs
    in_fp64 = [tensor.detach().double() for tensor in (x, weight, bias, A, B)]
    exact = forward_and_backward(lora_linear_ref, (*in_fp64, scale, slot), gradient.double())
    ours, same_dtype = (forward_and_backward(f, inputs, gradient) for f in (lora_linear, lora_linear_ref))
    for name, *three in zip(("y", "dx", "dA", "dB"), ours, same_dtype, exact, strict=True):
        check_accuracy(name, *three)


def forward(op: Op, inputs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return op(*inputs)


def forward_and_backward(op: Op, inputs: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """y, and the gradients of x, A and B; of x alone where there is nothing else."""
    trained = [inputs[place].requires_grad_() for place in ((0, 3, 4) if op is not gemm else (0,))]
    y = op(*inputs)
    return y, *torch.autograd.grad(y, trained, gradient)


def make_cases(
    samples: int, tokens: int, K: int, N: int, rank: int, slots: list[int], dtype: torch.dtype, device: str
) -> list[Case]:
    """Forward, and forward with backward, of one linear."""

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, device=device, dtype=dtype)

    x, weight, bias = normal(samples, tokens, K), normal(N, K, std=K**-0.5), normal(N)
    A, B = normal(3, rank, K, std=K**-0.5), normal(3, N, rank, std=rank**-0.5)
    scale, slot = torch.tensor([1.0, 0.5, 2.0], device=device), torch.tensor(slots, device=device)
    inputs, gradient = (x, weight, bias, A, B, scale, slot), normal(samples, tokens, N)
    ways: dict[str, Op] = {"eager": peft(slots)}
    if device == "cuda":
        compiled = torch.compile(lora_linear_ref, dynamic=False)
        ways = {"ours": lora_linear, "compiled": compiled, **ways, "addmm": addmm(slots), "gemm": gemm}
    sizes = (samples * tokens, K, N, rank, len(set(slots)), dtype.itemsize)
    counted = forward_bytes(*sizes)
    ours, eager = ((counted[way] - counted["gemm"]) / 1e6 for way in ("ours", "eager"))
    what = f"{K}->{N} r{rank} {samples}x{tokens} slots {','.join(map(str, slots))} {str(dtype).removeprefix('torch.')}"
    what += f", beyond gemm {ours:.1f} MB (PEFT {eager:.1f})"
    flops, small_flops = 2 * samples * tokens * K * N, 2 * samples * tokens * rank * (K + N)
    return [
        Case(
            f"{what} forward",
            partial(check, inputs, gradient),
            {way: partial(forward, op, inputs) for way, op in ways.items()},
            counted["ours"],
            flops + small_flops,
        ),
        Case(
            f"{what} forward and backward",
            partial(check, inputs, gradient),
            {way: partial(forward_and_backward, op, inputs, gradient) for way, op in ways.items()},
            counted["ours"] + backward_bytes(*sizes),
            2 * flops + 3 * small_flops,
        ),
    ]


def all_cases(device: str) -> list[Case]:
    torch._functorch.config.donated_buffer = False  # else a compiled backward runs only once a forward
    tokens, widths, rank = (8192, WIDTHS, 128) if device == "cuda" else (256, ((384, 384),), 16)
    batches = [(1, K, N, [0]) for K, N in widths] + [(3, *widths[0], slots) for slots in ([0, 0, 0], [0, 1, 2])]
    return [
        case
        for samples, K, N, slots in batches
        for case in make_cases(samples, tokens, K, N, rank, slots, torch.bfloat16, device)
    ]


if __name__ == "__main__":
    run("lora_linear", __doc__, all_cases)
