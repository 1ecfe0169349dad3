"""lora_linear: both ways against fp64, forward and backward, over shapes, layouts, dtypes, ranks and slots."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.lora_linear import addmm, backward_bytes, forward_bytes, peft, wide
from bench.kernels.timing import check_accuracy
from clora.kernels import lora_gemm
from clora.kernels.lora_gemm import BLOCK_L, BLOCK_N, MIN_TOKENS, best_way
from clora.kernels.lora_linear import lora_linear, lora_linear_op, lora_linear_ref
from clora.kernels.lora_low_rank import MAX_RANK, TOKENS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The fused way is for half precision.
WAYS = [("in_place", dtype) for dtype in DTYPES] + [("fused", dtype) for dtype in DTYPES[1:]]
GROUPS, SHAPES = 3, {"in_place": 18, "fused": 7}  # a way and dtype has so many groups of so many shapes
EVERY = {"cuda": 1, "cpu": 2}  # how many of them: each costs the interpreter a third of a second
LENGTHS = {"in_place": [1, 2, 5, 17, 33, 65], "fused": [1, 2, 31, 64, BLOCK_L, BLOCK_L + 3]}
# What TMA takes: rows of multiples of 16 bytes.
WIDTHS = {"in_place": [1, 3, 16, 31, 65, 67], "fused": [8, 16, 56, 72, 136, BLOCK_N + 8]}
RANKS = {
    "in_place": [1, 2, 3, 7, 8, 16, 17, 48, 64, 100, 127, 128, 131, 200, 256],
    "fused": [8, 16, 24, 48, 64, 72, 128, 136, 200, 256],
}
NAMES = ("y", "dx", "dA", "dB")
# Roundings that a reference of few numbers may happen to be spared: in fp32 those of sums of hundreds of terms, in
# half precision those of down, d_down, h and dh.
FLOOR = {torch.float32: 8.0, torch.bfloat16: 2.0, torch.float16: 2.0}

# Of the interpreter: the sigmoid of very negative numbers, which is 0, and products of what is not finite.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning"),
]

Op = Callable[..., Tensor]
Inputs = tuple[Any, ...]  # x, weight, bias, A, B, scale, slot, epilogue


def op(way: str | None) -> Op:
    """The operator's y, in one way, or None for the rule's."""
    return lambda *inputs: lora_linear_op(*inputs, True, way)[0]


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

    x = normal(B, L, K) if dense else normal(B, L + 2, K + 8)[:, 1 : L + 1, 8:]
    weight, b = normal(N, K, std=K**-0.5), normal(N) if bias else None
    A, up = normal(num_slots, rank, K, std=K**-0.5), normal(num_slots, N, rank, std=rank**-0.5)
    if master:
        A, up = A.float(), up.float()
    scale = torch.linspace(0.5, 2.0, num_slots, device=device)
    slot = torch.tensor(slots, device=device)
    return x.requires_grad_(), weight, b, A.requires_grad_(), up.requires_grad_(), scale, slot, epilogue


def random_inputs(seed: int, way: str, dtype: torch.dtype, device: str) -> Inputs:
    draw = random.Random(seed)
    B, num_slots = draw.choice([1, 1, 1, 2, 3]), draw.choice([1, 2, 3])
    one = draw.randrange(num_slots)
    patterns = [
        [-1] * B,
        [one] * B,
        [draw.randrange(-1, num_slots) for _ in range(B)],
        [draw.randrange(num_slots) for _ in range(B)],
    ]
    return make_inputs(
        (B, draw.choice(LENGTHS[way]), draw.choice(WIDTHS[way]), draw.choice(WIDTHS[way])),
        draw.choice(RANKS[way]),
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


def check_against_fp64(f: Op, inputs: Inputs, what: str = "") -> None:
    three = results(f, inputs), results(lora_linear_ref, inputs), results(lora_linear_ref, in_fp64(inputs))
    dtype = inputs[0].dtype
    for name, *values in zip(NAMES, *three, strict=True):
        unit = torch.finfo(dtype).eps / torch.finfo(values[0].dtype).eps  # gradients of masters are of finer numbers
        check_accuracy(f"{name} {what}", *values, floor=FLOOR[dtype] * unit)


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize(("way", "dtype"), WAYS, ids=str)
def test_lora_linear_equals_fp64_reference(way: str, dtype: torch.dtype, group: int, device: str) -> None:
    for place in range(0, SHAPES[way], EVERY[device]):
        seed = 1000 * WAYS.index((way, dtype)) + 100 * group + place
        check_against_fp64(op(way), random_inputs(seed, way, dtype, device), f"of seed {seed}")


@pytest.mark.parametrize("epilogue", ["none", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear_in_place_equals_fp64_reference_over_many_tiles(
    dtype: torch.dtype, epilogue: str, device: str
) -> None:
    inputs = make_inputs((3, 140, 70, 135), 72, [2, -1, 0], dtype, device, epilogue=epilogue, dense=False)
    check_against_fp64(op("in_place"), inputs)


def test_lora_linear_fused_gives_the_same_bits_in_any_order_of_tiles(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (5, 9, 40, BLOCK_N + 8)
    inputs = make_inputs(shape, 8, [2, -1, 0, 1, 2], torch.bfloat16, device, epilogue="gelu_tanh")
    each_tile_its_program = results(op("fused"), inputs)
    monkeypatch.setattr(lora_gemm, "MULTIPROCESSORS", 3)
    monkeypatch.setattr(lora_gemm, "GROUP", 2)  # of 5 rows of tiles, so that the last group is smaller
    assert all(map(torch.equal, results(op("fused"), inputs), each_tile_its_program))
    check_against_fp64(op("fused"), inputs)


def test_lora_linear_sums_gradients_over_chunks_of_tokens(device: str) -> None:
    check_against_fp64(op("in_place"), make_inputs((2, TOKENS + 3, 5, 6), 4, [1, 1], torch.bfloat16, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear_in_place_without_a_slot_is_the_linear(dtype: torch.dtype, device: str) -> None:
    x, weight, bias, *rest = make_inputs((4, 9, 33, 40), 17, [-1, 1, -1, 1], dtype, device)
    y, dx, _, _ = results(op("in_place"), (x, weight, bias, *rest))
    linear = F.linear(x, weight, bias)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16).to(y)
    assert torch.equal(y[::2], linear[::2]) and not torch.isclose(y[1::2], linear[1::2]).all()
    assert torch.equal(dx[::2], (gradient @ weight)[::2])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_lora_linear_fused_without_a_slot_is_the_linear_rounded_once(dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs((4, 9, 136, 40), 24, [-1, 1, -1, 1], dtype, device)
    exact = results(lora_linear_ref, in_fp64(inputs))
    half_unit = torch.finfo(dtype).eps / 2
    for ours, right in zip(results(op("fused"), inputs)[:2], exact[:2], strict=True):
        torch.testing.assert_close(ours[::2].double(), right[::2], rtol=1.001 * half_unit, atol=1e-6)
        assert ((ours - right).abs() > 1.01 * half_unit * right.abs())[1::2].any()  # for down is rounded before


@pytest.mark.parametrize("f", [op("in_place"), op("fused"), lora_linear_ref])
def test_lora_linear_lets_nothing_of_other_slots_through(f: Op, device: str) -> None:
    x, weight, bias, A, B, scale, slot, _ = make_inputs((2, 3, 8, 16), 8, [-1, 1], torch.bfloat16, device)
    with torch.no_grad():
        A[[0, 2]], B[[0, 2]], scale[[0, 2]] = torch.nan, torch.inf, torch.nan
        x[0, 0, 0] = torch.inf
    y, dx, dA, dB = results(f, (x, weight, bias, A, B, scale, slot, "none"))
    torch.testing.assert_close(y[0], F.linear(x, weight, bias)[0])
    assert y[1].isfinite().all() and dx.isfinite().all() and y[0, 1:].isfinite().all()
    for gradient in (dA, dB):
        assert (gradient[[0, 2]] == 0).all() and gradient[1].isfinite().all() and gradient[1].any()


def test_lora_linear_padded_rank_changes_nothing(device: str) -> None:
    x, weight, bias, A, B, *rest = make_inputs((2, 5, 24, 32), 8, [0, 2], torch.float32, device)
    padded = [F.pad(A.detach(), (0, 0, 0, 32)).requires_grad_(), F.pad(B.detach(), (0, 32)).requires_grad_()]
    y, dx, dA, dB = results(op("in_place"), (x, weight, bias, A, B, *rest))
    same = results(op("in_place"), (x, weight, bias, *padded, *rest))
    for ours, padded_ours in zip((y, dx, dA, dB), (*same[:2], same[2][:, :8], same[3][..., :8]), strict=True):
        torch.testing.assert_close(padded_ours, ours)


def test_lora_linear_takes_layouts_that_are_not_dense(device: str) -> None:
    x, weight, bias, A, B, scale, slot, _ = make_inputs((3, 6, 10, 12), 5, [0, -1, 2], torch.float32, device)
    strided = x.detach().mT.contiguous().mT.requires_grad_()
    stacks = [stack.detach().mT.contiguous().mT.requires_grad_() for stack in (A, B)]
    slot, scale = slot.repeat_interleave(2)[::2], scale.repeat_interleave(2)[::2]
    check_against_fp64(op("in_place"), (strided, weight, bias, *stacks, scale, slot.int(), "none"))
    dense, spread = (op("in_place")(*inputs, scale, slot, "none").sum() for inputs in (
        (x, weight, bias, A, B), (strided, weight, bias, *stacks),
    ))  # fmt: skip
    # The gradient of a sum is one number, expanded.
    torch.testing.assert_close(torch.autograd.grad(spread, strided)[0], torch.autograd.grad(dense, x)[0])


def test_lora_linear_fused_takes_layouts_that_are_not_dense(device: str) -> None:
    inputs = make_inputs((3, 6, 16, 24), 8, [0, -1, 2], torch.bfloat16, device, dense=False)
    x, weight, bias, A, B, scale, slot, _ = inputs
    part = torch.cat([weight, weight], dim=1)[:, 16:]
    stacks = [stack.detach().mT.contiguous().mT.requires_grad_() for stack in (A, B)]
    slot, scale = slot.repeat_interleave(2)[::2], scale.repeat_interleave(2)[::2]
    spread = (x, part, bias.repeat_interleave(2)[::2], *stacks, scale, slot.int(), "none")
    assert all(map(torch.equal, results(op("fused"), spread), results(op("fused"), inputs)))


@pytest.mark.parametrize("way", ["in_place", "fused"])
def test_lora_linear_reaches_past_2_31_elements(way: str, device: str) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False  # memory that nobody writes is not taken
    try:
        far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    x, *rest = make_inputs((2, 1, 24, 16), 8, [1, 2], torch.bfloat16, device)
    spread = far.as_strided((2, 1, 24), (2**31, 24, 1))
    spread.copy_(x.detach())
    check_against_fp64(op(way), (spread.requires_grad_(), *rest))


@pytest.mark.parametrize("epilogue", ["none", "gelu_tanh"])
@pytest.mark.parametrize("way", ["in_place", "fused"])
def test_lora_linear_repeats_bit_for_bit(way: str, epilogue: str, device: str) -> None:
    inputs = make_inputs((3, 70, 40, 56), 24, [1, 0, 1], torch.bfloat16, device, epilogue=epilogue)
    first, second = (results(op(way), inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("wanted", [(0,), (3,), (4,), (0, 4), (3, 4)], ids=str)
@pytest.mark.parametrize("way", ["in_place", "fused"])
def test_lora_linear_gives_the_gradients_that_are_wanted(way: str, wanted: tuple[int, ...], device: str) -> None:
    inputs = make_inputs((2, 5, 16, 24), 8, [1, 0], torch.bfloat16, device, epilogue="gelu_tanh")
    every = dict(zip((0, 3, 4), results(op(way), inputs)[1:], strict=True))
    some = list(inputs)
    for place in {0, 3, 4} - set(wanted):
        some[place] = inputs[place].detach()
    y = op(way)(*some)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16).to(y)
    for place, ours in zip(wanted, torch.autograd.grad(y, [some[place] for place in wanted], gradient), strict=True):
        assert torch.equal(ours, every[place])


@pytest.mark.parametrize("f", [op("in_place"), op("fused"), lora_linear])
def test_lora_linear_gives_no_gradient_to_what_is_frozen(f: Op, device: str) -> None:
    inputs = list(make_inputs((2, 5, 16, 24), 8, [1, 0], torch.bfloat16, device, epilogue="gelu_tanh"))
    for place in (1, 2, 5):
        inputs[place] = inputs[place].clone().requires_grad_()
    gradients = torch.autograd.grad(f(*inputs).sum(), inputs[:6], allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, True, True, False, False, True]


@pytest.mark.parametrize("way", ["in_place", "fused"])
def test_lora_linear_keeps_h_only_where_it_is_told(way: str, device: str) -> None:
    inputs = make_inputs((2, 5, 16, 24), 8, [1, 0], torch.bfloat16, device, epilogue="gelu_tanh")
    with torch.no_grad():
        kept, dropped = (lora_linear_op(*inputs, keep_h, way) for keep_h in (True, False))
        assert torch.equal(kept[0], dropped[0]) and dropped[2].numel() == 0
        assert torch.equal(kept[2], lora_linear_op(*inputs[:7], "none", True, way)[0])


def test_lora_linear_takes_no_samples_and_no_tokens(device: str) -> None:
    for shape, slots in (((0, 2048, 8, 16), []), ((2, 0, 8, 16), [0, 1])):
        x, *rest = make_inputs(shape, 8, [0] * shape[0], torch.bfloat16, device)
        rest[5] = torch.tensor(slots, dtype=torch.int64, device=device)
        y, dx, dA, dB = results(op(None), (x, *rest))
        assert y.shape == (*shape[:2], 16) and dx.shape == x.shape and not dA.any() and not dB.any()


@pytest.mark.parametrize("epilogue", ["none", "gelu_tanh"])
def test_lora_linear_ref_gradcheck(epilogue: str) -> None:
    inputs = in_fp64(make_inputs((3, 2, 4, 5), 3, [2, -1, 0], torch.float32, "cpu", epilogue=epilogue))

    def of_trained(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, *inputs[1:3], A, B, *inputs[5:])

    assert torch.autograd.gradcheck(of_trained, (inputs[0], *inputs[3:5]))


@pytest.mark.parametrize("epilogue", ["none", "gelu_tanh"])
@pytest.mark.parametrize("way", ["in_place", "fused"])
def test_lora_linear_opcheck(way: str, epilogue: str, device: str) -> None:
    inputs = make_inputs((2, 3, 8, 16), 8, [1, -1], torch.bfloat16, device, epilogue=epilogue, master=True)
    torch.library.opcheck(lora_linear_op, (*inputs, True, way))


@pytest.mark.parametrize(("way", "epilogue"), [("in_place", "none"), ("fused", "gelu_tanh")])
def test_lora_linear_compiles_without_graph_breaks(way: str, epilogue: str, device: str) -> None:
    inputs = make_inputs((2, 3, 8, 8), 8, [1, -1], torch.bfloat16, device, epilogue=epilogue)

    def twice(x: Tensor, *rest: Any) -> Tensor:
        return lora_linear(op(way)(x, *rest), *rest)  # the public function too

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
        op(None)(*make_inputs((2, 3, 8, 9), rank, [1, 0], dtype, device))


# Which way is taken.


def on_meta(samples: int, tokens: int, K: int, N: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """x, weight, A and B that hold no data."""
    shapes = (samples, tokens, K), (N, K), (3, rank, K), (3, N, rank)
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({}, "fused"),
        ({"dtype": torch.float16, "samples": 3, "tokens": MIN_TOKENS, "N": 12288, "rank": 8}, "fused"),
        ({"dtype": torch.float32}, "in_place"),
        ({"tokens": 1}, "in_place"),
        ({"tokens": MIN_TOKENS - 1}, "in_place"),
        ({"samples": 0}, "in_place"),
        ({"K": 3076}, "in_place"),
        ({"N": 3076}, "in_place"),
        ({"rank": 100}, "in_place"),
    ],
)
def test_best_way_is_fused_for_many_half_precision_tokens_that_tma_takes(changes: dict[str, Any], way: str) -> None:
    sizes = {"samples": 1, "tokens": 8192, "K": 3072, "N": 3072, "rank": 128, **changes}
    assert best_way(*on_meta(**sizes)) == way


def test_best_way_looks_at_strides() -> None:
    x, *rest = on_meta(1, 8192, 3072, 3072, 128)
    wider = torch.empty(1, 8192, 4 * 3072, dtype=torch.bfloat16, device="meta")
    assert best_way(wider[..., 3072:6144], *rest) == "fused"
    assert best_way(wider[..., ::4], *rest) == "in_place"
    assert best_way(torch.empty(1, 8192, 3076, dtype=torch.bfloat16, device="meta")[..., :3072], *rest) == "in_place"
    assert best_way(x, rest[0].mT, *rest[1:]) == "in_place"


def test_best_way_looks_at_where_tensors_start() -> None:
    x = torch.zeros(1, MIN_TOKENS, 24, dtype=torch.bfloat16)
    rest = [torch.zeros(shape, dtype=torch.bfloat16) for shape in ((8, 16), (1, 8, 16), (1, 8, 8))]
    assert best_way(x[..., 8:], *rest) == "fused" and best_way(x[..., 4:20], *rest) == "in_place"


@pytest.mark.parametrize(("tokens", "way"), [(MIN_TOKENS, "fused"), (8, "in_place")])
def test_lora_linear_takes_the_best_way(tokens: int, way: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in {"fused", "in_place"} - {way}:
        monkeypatch.setattr(lora_gemm, f"_{other}", None)
    check_against_fp64(op(None), make_inputs((1, tokens, 8, 16), 8, [1], torch.bfloat16, device))


# The ways that bench.kernels.lora_linear compares, and what it counts.


@pytest.mark.parametrize("slots", [[0, 0, 0], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("way", [peft, addmm])
def test_bench_ways_equal_the_reference(way: Callable[..., Op], slots: list[int]) -> None:
    inputs = in_fp64(make_inputs((3, 5, 8, 9), 4, slots, torch.float32, "cpu"))
    for ours, exact in zip(results(way(slots), inputs), results(lora_linear_ref, inputs), strict=True):
        torch.testing.assert_close(ours, exact)


def test_bench_wide_equals_the_reference() -> None:
    inputs = in_fp64(make_inputs((3, 5, 8, 9), 4, [2, 2, 2], torch.float32, "cpu"))
    run = wide(*inputs[:6], 2)
    for _ in range(2):  # the buffer is used again
        torch.testing.assert_close(run(), lora_linear_ref(*inputs))


def test_forward_bytes_of_one_adapter() -> None:
    counted = forward_bytes(8192, 3072, 3072, 128, 1)
    tokens, weight, down, stack = (2 * 8192 * 3072, 2 * 3072**2, 2 * 8192 * 128, 2 * 3072 * 128)
    assert counted["gemm"] == 2 * tokens + weight
    beyond = {way: count - counted["gemm"] for way, count in counted.items()}
    assert beyond["fused"] == tokens + 2 * down + 2 * stack == 56_098_816
    assert beyond["in_place"] == 3 * tokens + 2 * down + 2 * stack == 156_762_112
    assert beyond["eager"] == 7 * tokens + 2 * down + 2 * stack == 358_088_704
    assert beyond[best_way(*on_meta(1, 8192, 3072, 3072, 128))] <= 60e6


def test_backward_bytes_of_one_adapter() -> None:
    fused, in_place = (backward_bytes(8192, 3072, 12288, 128, 1)[way] for way in ("fused", "in_place"))
    x, dy, weight = 2 * 8192 * 3072, 2 * 8192 * 12288, 2 * 3072 * 12288
    down, stacks = 2 * 8192 * 128, 2 * 128 * (3072 + 12288)
    assert fused == (dy + weight + x) + (dy + down) + down + (down + x) + (down + dy) + 2 * stacks
    assert in_place == fused + 2 * x


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", ["none", "gelu_tanh"])
@pytest.mark.parametrize(("way", "dtype"), WAYS, ids=str)
@pytest.mark.parametrize("rank", [104, 256])
def test_lora_linear_equals_fp64_reference_at_full_size(way: str, dtype: torch.dtype, rank: int, epilogue: str) -> None:
    inputs = make_inputs((3, 4096 + 77, 3072, 3072), rank, [2, -1, 2], dtype, "cuda", epilogue=epilogue, dense=False)
    check_against_fp64(op(way), inputs)
