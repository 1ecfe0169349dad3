"""lora_linear: the kernels against fp64, forward and backward, over shapes, layouts, dtypes, ranks and slots."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lora_linear import addmm, forward_bytes, peft
from bench.timing import check_accuracy
from clora.kernels.lora_linear import MAX_RANK, TOKENS, lora_linear, lora_linear_op, lora_linear_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS, SHAPES_OF_GROUP = 10, 7  # in each dtype
LENGTHS = [1, 2, 5, 17, 63, 65]
WIDTHS = [1, 3, 16, 31, 64, 97]
RANKS = [1, 2, 3, 7, 8, 16, 17, 48, 64, 100, 127, 128, 131, 200, 256]
NAMES = ("y", "dx", "dA", "dB")
# Roundings that a reference of few numbers may happen to be spared: in fp32 those of sums of hundreds of terms, in
# half precision those of down, d_down, h and dh.
FLOOR = {torch.float32: 8.0, torch.bfloat16: 2.0, torch.float16: 2.0}

# Of the interpreter: the sigmoid of very negative numbers, which is 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

Op = Callable[..., Tensor]
Inputs = tuple[Any, ...]  # x, weight, bias, A, B, scale, slot, epilogue


def op(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *rest: Any) -> Tensor:
    return lora_linear_op(x, weight, bias, A, B, *rest, True)[0]


def make_inputs(
    shape: tuple[int, int, int, int],
    rank: int,
    slots: Sequence[int],
    dtype: torch.dtype,
    device: str,
    *,
    num_slots: int = 3,
    bias: bool = True,
    epilogue: str = "none",
    dense: bool = True,
    master: bool = False,
) -> Inputs:
    """Numbers of a size near 1 all through. Where not dense x is a part of longer rows; masters are in fp32."""
    B, L, K, N = shape
    rng = torch.Generator().manual_seed(sum(shape) * 1000 + rank)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*size, generator=rng)).to(device, dtype)

    x = normal(B, L, K) if dense else normal(B, L + 2, K + 1)[:, 1 : L + 1, 1:]
    weight, b = normal(N, K, std=K**-0.5), normal(N) if bias else None
    A, up = normal(num_slots, rank, K, std=K**-0.5), normal(num_slots, N, rank, std=rank**-0.5)
    if master:
        A, up = A.float(), up.float()
    scale = torch.linspace(0.5, 2.0, num_slots, device=device)
    slot = torch.tensor(slots, device=device)
    return x.requires_grad_(), weight, b, A.requires_grad_(), up.requires_grad_(), scale, slot, epilogue


def random_inputs(seed: int, dtype: torch.dtype, device: str) -> Inputs:
    draw = random.Random(seed)
    B, num_slots = draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 3])
    one = draw.randrange(num_slots)
    patterns = [
        [-1] * B,
        [one] * B,
        [draw.randrange(-1, num_slots) for _ in range(B)],
        [draw.randrange(num_slots) for _ in range(B)],
    ]
    return make_inputs(
        (B, draw.choice(LENGTHS), draw.choice(WIDTHS), draw.choice(WIDTHS)),
        draw.choice(RANKS),
        draw.choice(patterns),
        dtype,
        device,
        num_slots=num_slots,
        bias=draw.random() < 0.5,
        epilogue=draw.choice(["none", "gelu_tanh"]),
        dense=draw.random() < 0.5,
        master=draw.random() < 0.3,
    )


def results(f: Op, inputs: Inputs) -> list[Tensor]:
    """y, and the gradients of x, A and B for a gradient of y that is drawn in x's dtype."""
    y = f(*inputs)
    rng = torch.Generator().manual_seed(7)
    gradient = torch.randn(y.shape, generator=rng).to(torch.bfloat16).to(y)
    return [y, *torch.autograd.grad(y, (inputs[0], *inputs[3:5]), gradient)]


def in_fp64(inputs: Inputs) -> Inputs:
    x, weight, bias, A, B, *rest = inputs
    x, A, B = (tensor.detach().double().requires_grad_() for tensor in (x, A, B))
    return x, weight.double(), None if bias is None else bias.double(), A, B, *rest


def check_against_fp64(inputs: Inputs, what: str = "") -> None:
    three = results(op, inputs), results(lora_linear_ref, inputs), results(lora_linear_ref, in_fp64(inputs))
    for name, *values in zip(NAMES, *three, strict=True):
        check_accuracy(f"{name} {what}", *values, floor=FLOOR[inputs[0].dtype])


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear_equals_fp64_reference(dtype: torch.dtype, group: int, device: str) -> None:
    for place in range(SHAPES_OF_GROUP):
        seed = (DTYPES.index(dtype) * GROUPS + group) * SHAPES_OF_GROUP + place
        check_against_fp64(random_inputs(seed, dtype, device), f"of seed {seed}")


@pytest.mark.parametrize("epilogue", ["none", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear_equals_fp64_reference_over_many_tiles(dtype: torch.dtype, epilogue: str, device: str) -> None:
    check_against_fp64(make_inputs((3, 150, 200, 270), 96, [2, -1, 0], dtype, device, epilogue=epilogue, dense=False))


def test_lora_linear_sums_gradients_over_chunks_of_tokens(device: str) -> None:
    check_against_fp64(make_inputs((2, TOKENS + 3, 5, 6), 4, [1, 1], torch.float32, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear_without_a_slot_is_the_linear(dtype: torch.dtype, device: str) -> None:
    x, weight, bias, *rest = make_inputs((4, 9, 33, 40), 17, [-1, 1, -1, 1], dtype, device)
    y, dx, _, _ = results(op, (x, weight, bias, *rest))
    linear = F.linear(x, weight, bias)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16).to(y)
    assert torch.equal(y[::2], linear[::2]) and not torch.isclose(y[1::2], linear[1::2]).all()
    assert torch.equal(dx[::2], (gradient @ weight)[::2])


@pytest.mark.parametrize("f", [op, lora_linear_ref])
def test_lora_linear_lets_nothing_of_other_slots_through(f: Op, device: str) -> None:
    x, weight, bias, A, B, scale, slot, _ = make_inputs((2, 3, 8, 9), 4, [-1, 1], torch.float32, device)
    with torch.no_grad():
        A[[0, 2]], B[[0, 2]], scale[[0, 2]] = torch.nan, torch.inf, torch.nan
        x[0, 0, 0] = torch.inf
    y, dx, dA, dB = results(f, (x, weight, bias, A, B, scale, slot, "none"))
    assert torch.equal(y[0], F.linear(x, weight, bias)[0]) and y[1].isfinite().all() and dx.isfinite().all()
    for gradient in (dA, dB):
        assert (gradient[[0, 2]] == 0).all() and gradient[1].isfinite().all() and gradient[1].any()


def test_lora_linear_padded_rank_changes_nothing(device: str) -> None:
    x, weight, bias, A, B, *rest = make_inputs((2, 5, 20, 30), 6, [0, 2], torch.float32, device)
    padded = [F.pad(A.detach(), (0, 0, 0, 34)).requires_grad_(), F.pad(B.detach(), (0, 34)).requires_grad_()]
    y, dx, dA, dB = results(op, (x, weight, bias, A, B, *rest))
    same = results(op, (x, weight, bias, *padded, *rest))
    for ours, wide in zip((y, dx, dA, dB), (*same[:2], same[2][:, :6], same[3][..., :6]), strict=True):
        torch.testing.assert_close(wide, ours)


def test_lora_linear_takes_layouts_that_are_not_dense(device: str) -> None:
    x, weight, bias, A, B, scale, slot, _ = make_inputs((3, 6, 10, 12), 5, [0, -1, 2], torch.float32, device)
    strided = x.detach().mT.contiguous().mT.requires_grad_()
    stacks = [stack.detach().mT.contiguous().mT.requires_grad_() for stack in (A, B)]
    slot, scale = slot.repeat_interleave(2)[::2], scale.repeat_interleave(2)[::2]
    check_against_fp64((strided, weight, bias, *stacks, scale, slot.int(), "none"))
    dense, spread = (f(*inputs, scale, slot, "none").sum() for f, inputs in (
        (op, (x, weight, bias, A, B)), (op, (strided, weight, bias, *stacks)),
    ))  # fmt: skip
    # The gradient of a sum is one number, expanded.
    torch.testing.assert_close(torch.autograd.grad(spread, strided)[0], torch.autograd.grad(dense, x)[0])


def test_lora_linear_reaches_past_2_31_elements(device: str) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False  # memory that nobody writes is not taken
    try:
        far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    x, *rest = make_inputs((2, 1, 24, 20), 6, [1, 2], torch.bfloat16, device)
    spread = far.as_strided((2, 1, 24), (2**31, 24, 1))
    spread.copy_(x.detach())
    check_against_fp64((spread.requires_grad_(), *rest))


@pytest.mark.parametrize("epilogue", ["none", "gelu_tanh"])
def test_lora_linear_repeats_bit_for_bit(epilogue: str, device: str) -> None:
    inputs = make_inputs((3, 70, 40, 50), 24, [1, 0, 1], torch.bfloat16, device, epilogue=epilogue)
    first, second = (results(op, inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("wanted", [(0,), (3,), (4,), (0, 4), (3, 4)], ids=str)
def test_lora_linear_gives_the_gradients_that_are_wanted(wanted: tuple[int, ...], device: str) -> None:
    inputs = make_inputs((2, 5, 12, 14), 6, [1, 0], torch.float32, device, epilogue="gelu_tanh")
    every = dict(zip((0, 3, 4), results(op, inputs)[1:], strict=True))
    some = list(inputs)
    for place in {0, 3, 4} - set(wanted):
        some[place] = inputs[place].detach()
    y = op(*some)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16).to(y)
    for place, ours in zip(wanted, torch.autograd.grad(y, [some[place] for place in wanted], gradient), strict=True):
        assert torch.equal(ours, every[place])


@pytest.mark.parametrize("f", [op, lora_linear])
def test_lora_linear_gives_no_gradient_to_what_is_frozen(f: Op, device: str) -> None:
    inputs = list(make_inputs((2, 5, 12, 14), 6, [1, 0], torch.float32, device, epilogue="gelu_tanh"))
    for place in (1, 2, 5):
        inputs[place] = inputs[place].clone().requires_grad_()
    gradients = torch.autograd.grad(f(*inputs).sum(), inputs[:6], allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, True, True, False, False, True]


def test_lora_linear_keeps_h_only_where_it_is_told(device: str) -> None:
    inputs = make_inputs((2, 5, 12, 14), 6, [1, 0], torch.bfloat16, device, epilogue="gelu_tanh")
    with torch.no_grad():
        kept, dropped = (lora_linear_op(*inputs, keep_h) for keep_h in (True, False))
        assert torch.equal(kept[0], dropped[0]) and dropped[2].numel() == 0
        assert torch.equal(kept[2], lora_linear_op(*inputs[:7], "none", True)[0])


def test_lora_linear_takes_no_samples_and_no_tokens(device: str) -> None:
    for shape, slots in (((0, 3, 8, 9), []), ((2, 0, 8, 9), [0, 1])):
        x, *rest = make_inputs(shape, 4, [0] * shape[0], torch.float32, device)
        rest[5] = torch.tensor(slots, dtype=torch.int64, device=device)
        y, dx, dA, dB = results(op, (x, *rest))
        assert y.shape == (*shape[:2], 9) and dx.shape == x.shape and not dA.any() and not dB.any()


@pytest.mark.parametrize("epilogue", ["none", "gelu_tanh"])
def test_lora_linear_ref_gradcheck(epilogue: str) -> None:
    inputs = in_fp64(make_inputs((3, 2, 4, 5), 3, [2, -1, 0], torch.float32, "cpu", epilogue=epilogue))

    def of_trained(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, *inputs[1:3], A, B, *inputs[5:])

    assert torch.autograd.gradcheck(of_trained, (inputs[0], *inputs[3:5]))


@pytest.mark.parametrize("epilogue", ["none", "gelu_tanh"])
def test_lora_linear_opcheck(epilogue: str, device: str) -> None:
    inputs = make_inputs((2, 3, 8, 9), 4, [1, -1], torch.bfloat16, device, epilogue=epilogue, master=True)
    torch.library.opcheck(lora_linear_op, (*inputs, True))


@pytest.mark.parametrize("epilogue", ["none", "gelu_tanh"])
def test_lora_linear_compiles_without_graph_breaks(epilogue: str, device: str) -> None:
    inputs = make_inputs((2, 3, 8, 8), 4, [1, -1], torch.float32, device, epilogue=epilogue)

    def twice(x: Tensor, *rest: Any) -> Tensor:
        return lora_linear(op(x, *rest), *rest)  # the public function too

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, results(compiled, inputs), results(twice, inputs)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BLK": torch.zeros(2, 8)}, r"\(B, L, K\)"),
        ({"weight_NK": torch.zeros(9, 7)}, r"\(N, K\)"),
        ({"weight_NK": torch.zeros(9, 8).half()}, "one dtype"),
        ({"bias_N": torch.zeros(8)}, r"\(9,\)"),
        ({"A_SrK": torch.zeros(3, 5, 8)}, r"\(S, 9, r\)"),
        ({"A_SrK": torch.zeros(3, 0, 8), "B_SNr": torch.zeros(3, 9, 0)}, "r at least 1"),
        ({"B_SNr": torch.zeros(3, 9, 4, dtype=torch.int32)}, "floating-point"),
        ({"scale_S": torch.zeros(2)}, r"\(3,\)"),
        ({"scale_S": torch.zeros(3).half()}, "fp32"),
        ({"slot_B": torch.zeros(3, dtype=torch.int64)}, r"one integer a sample, \(2,\)"),
        ({"slot_B": torch.zeros(2)}, "one integer a sample"),
        ({"epilogue": "gelu"}, "'gelu'; one of none, gelu_tanh"),
    ],
)
def test_lora_linear_names_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    names = ("x_BLK", "weight_NK", "bias_N", "A_SrK", "B_SNr", "scale_S", "slot_B", "epilogue")
    fitting = dict(zip(names, make_inputs((2, 3, 8, 9), 4, [1, 0], torch.float32, "cpu"), strict=True))
    with pytest.raises(ValueError, match=message):
        lora_linear(**{**fitting, **change})


@pytest.mark.parametrize(("rank", "dtype"), [(MAX_RANK + 1, torch.float32), (4, torch.float64)])
def test_lora_linear_op_names_what_its_kernels_cannot(rank: int, dtype: torch.dtype, device: str) -> None:
    with pytest.raises(ValueError, match=f"fp32, bf16 or fp16 and at most {MAX_RANK}"):
        op(*make_inputs((2, 3, 8, 9), rank, [1, 0], dtype, device))


# The ways that bench.lora_linear compares, and what it counts.


@pytest.mark.parametrize("slots", [[0, 0, 0], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("way", [peft, addmm])
def test_bench_ways_equal_the_reference(way: Callable[..., Op], slots: list[int]) -> None:
    inputs = in_fp64(make_inputs((3, 5, 8, 9), 4, slots, torch.float32, "cpu"))
    for ours, exact in zip(results(way(slots), inputs), results(lora_linear_ref, inputs), strict=True):
        torch.testing.assert_close(ours, exact)


def test_forward_bytes_of_one_adapter() -> None:
    gemm, ours, eager = (forward_bytes(8192, 3072, 3072, 128, 1)[way] for way in ("gemm", "ours", "eager"))
    tokens, weight, down, stack = (2 * 8192 * 3072, 2 * 3072**2, 2 * 8192 * 128, 2 * 3072 * 128)
    assert gemm == 2 * tokens + weight
    assert ours - gemm == 3 * tokens + 2 * down + 2 * stack == 156_762_112
    assert eager - gemm == 7 * tokens + 2 * down + 2 * stack == 358_088_704


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", ["none", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [100, 256])
def test_lora_linear_equals_fp64_reference_at_full_size(dtype: torch.dtype, rank: int, epilogue: str) -> None:
    shape = (3, 4096 + 77, 3072, 3072)
    check_against_fp64(make_inputs(shape, rank, [2, -1, 2], dtype, "cuda", epilogue=epilogue, dense=False))
