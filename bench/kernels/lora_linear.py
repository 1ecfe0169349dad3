"""The linear with adapter slots against torch, eager and compiled.

`python -m bench.kernels.lora_linear [--json] [--rounds N]`.

Forward, and forward and backward, at the widths of Qwen-Image-Edit with rank-128 adapters: one sample of 8192 tokens;
then three samples with three adapters and with one. The ways are "ours", by the rule; both of its ways, "fused" and
"in_place"; the reference "compiled"; "eager", which is what PEFT does; "addmm", the update fused with the addition by
a second cuBLAS product; "wide", one cuBLAS product of [x | down] and [W | scale B], where one adapter serves all and
what feeds the linear writes into a wider buffer (forward alone); and "gemm", the linear alone. A case's name says what
the forward of ours and of PEFT moves beyond the linear alone, by `forward_bytes`. Results are checked against fp64
first. Without a GPU "ours", which is then the reference, and "eager" are timed, at a small size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.timing import Case, check_accuracy, run
from clora.kernels.lora_gemm import best_way
from clora.kernels.lora_linear import lora_linear, lora_linear_op, lora_linear_ref

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


def forced(way: str) -> Op:
    """Our operator, one way; h, which only an epilogue would need, is not kept."""
    return lambda *inputs: lora_linear_op(*inputs, "none", False, way)[0]


def wide(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, slot: int
) -> Callable[[], Tensor]:
    """y in one product, all samples with the adapter of one slot; x and the weights are laid out beforehand."""
    K = x.shape[2]
    buffer = torch.cat([x, x.new_zeros(*x.shape[:2], A.shape[1])], dim=2).detach().flatten(0, 1)
    weights, down = torch.cat([weight, (scale[slot] * B[slot]).to(weight.dtype)], dim=1).detach(), A[slot].detach().t()

    def run() -> Tensor:
        torch.mm(buffer[:, :K], down, out=buffer[:, K:])
        return F.linear(buffer, weights, bias).view(*x.shape[:2], -1)

    return run


def forward_bytes(tokens: int, K: int, N: int, rank: int, adapters: int, itemsize: int = 2) -> dict[str, int]:
    """Bytes that the forward reads and writes by way, each tensor once for each kernel that touches it.

    Beyond the linear (x, W and y once), the down-projection reads x and A and writes down, and what adds the update
    reads down and B. In place it reads and writes y as well. PEFT reads and writes all of those, and writes, scales (a
    read and a write) and reads the update. Biases, scales and slots are left out.
    """
    x, y, down = tokens * K, tokens * N, tokens * rank
    linear = x + N * K + y
    update = x + 2 * down + adapters * rank * (K + N)
    beyond = {"gemm": 0, "fused": update, "in_place": update + 2 * y, "eager": update + 6 * y}
    return {way: itemsize * (linear + numbers) for way, numbers in beyond.items()}


def backward_bytes(tokens: int, K: int, N: int, rank: int, adapters: int, itemsize: int = 2) -> dict[str, int]:
    """The same of our backward's two ways: beyond dx = dy W they read dy twice, x, down and d_down twice, and write
    d_down; the stacks are read and their gradients written; in place dx is read and written again. The small first
    stage of the gradients is left out."""
    linear = tokens * (K + N) + N * K
    fused = linear + tokens * (2 * N + K + 4 * rank) + 2 * adapters * rank * (K + N)
    return {"fused": itemsize * fused, "in_place": itemsize * (fused + 2 * tokens * K)}


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
    compiled = torch.compile(lora_linear_ref, dynamic=False)
    ways: dict[str, Op] = {"ours": lora_linear, "fused": forced("fused"), "in_place": forced("in_place")}
    ways |= {"compiled": compiled, "eager": peft(slots), "addmm": addmm(slots), "gemm": gemm}
    forwards: dict[str, Callable[[], Tensor]] = {way: partial(forward, op, inputs) for way, op in ways.items()}
    if len(set(slots)) == 1:
        forwards["wide"] = partial(forward, wide(*inputs[:6], slots[0]), ())
    sizes = (samples * tokens, K, N, rank, len(set(slots)), dtype.itemsize)
    counted, way = forward_bytes(*sizes), best_way(x, weight, A, B)
    ours, eager = ((counted[name] - counted["gemm"]) / 1e6 for name in (way, "eager"))
    what = f"{K}->{N} r{rank} {samples}x{tokens} slots {','.join(map(str, slots))} {str(dtype).removeprefix('torch.')}"
    what += f", {way}, beyond gemm {ours:.1f} MB (PEFT {eager:.1f})"
    flops, small_flops = 2 * samples * tokens * K * N, 2 * samples * tokens * rank * (K + N)
    return [
        Case(
            f"{what} forward",
            partial(check, inputs, gradient),
            forwards,
            counted[way],
            flops + small_flops,
        ),
        Case(
            f"{what} forward and backward",
            partial(check, inputs, gradient),
            {way: partial(forward_and_backward, op, inputs, gradient) for way, op in ways.items()},
            counted[way] + backward_bytes(*sizes)[way],
            2 * flops + 3 * small_flops,
        ),
    ]


def all_cases(device: str, size: str) -> list[Case]:
    torch._functorch.config.donated_buffer = False  # else a compiled backward runs only once a forward
    tokens, widths, rank = (8192, WIDTHS, 128) if size == "full" else (256, ((384, 384),), 16)
    batches = [(1, K, N, [0]) for K, N in widths] + [(3, *widths[0], slots) for slots in ([0, 0, 0], [0, 1, 2])]
    return [
        case
        for samples, K, N, slots in batches
        for case in make_cases(samples, tokens, K, N, rank, slots, torch.bfloat16, device)
    ]


if __name__ == "__main__":
    run("lora_linear", __doc__, all_cases)
