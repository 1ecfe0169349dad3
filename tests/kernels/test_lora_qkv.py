"""lora_qkv: both ways against fp64, forward and backward, over shapes, layouts, dtypes, ranks and slots."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels import lora_qkv as bench
from bench.kernels.timing import check_accuracy
from clora.kernels import lora_gemm
from clora.kernels.lora_gemm import BLOCK_L, MIN_TOKENS
from clora.kernels.lora_low_rank import MAX_RANK
from clora.kernels.lora_qkv import lora_qkv, lora_qkv_op, lora_qkv_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WAYS = [("in_place", dtype) for dtype in DTYPES] + [("fused", dtype) for dtype in DTYPES[1:]]
LENGTHS = {"in_place": [1, 5, 17], "fused": [1, 2, 3, 9, 31]}
WIDTHS = {"in_place": [1, 3, 31, 65], "fused": [8, 56, 72]}
RANKS = {"in_place": [1, 3, 16, 17, 100, 128, 256], "fused": [8, 24, 64, 72, 128, 256]}
NAMES = ("q", "k", "v", "dx", "dA_q", "dA_k", "dA_v", "dB_q", "dB_k", "dB_v")
# As for lora_linear.
FLOOR = {torch.float32: 8.0, torch.bfloat16: 2.0, torch.float16: 2.0}

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")

Op = Callable[..., Sequence[Tensor]]
Inputs = tuple[Any, ...]  # x, weights, biases, A, B, scale, slot


def op(way: str | None) -> Op:
    """The operator's q, k and v, in one way, or None for the rule's."""
    return lambda x, weights, biases, A, B, scale, slot: lora_qkv_op(
        x, list(weights), *biases, list(A), list(B), list(scale), slot, way
    )[:3]


def make_inputs(
    shape: tuple[int, int, int, int],
    rank: int,
    slots: Sequence[int],
    dtype: torch.dtype,
    device: str,
    *,
    dense: bool = True,
    master: bool = False,
) -> Inputs:
    """Numbers of a size near 1 all through; q has no bias. Where not dense x is a part of longer rows."""
    B, L, K, N = shape
    rng = torch.Generator().manual_seed(sum(shape) * 1000 + rank)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*size, generator=rng)).to(device, dtype)

    def stacks(*size: int, std: float) -> tuple[Tensor, ...]:
        return tuple(normal(3, *size, std=std).to(torch.float32 if master else dtype).requires_grad_() for _ in "qkv")

    x = normal(B, L, K) if dense else normal(B, L + 2, K + 8)[:, 1 : L + 1, 8:]
    weights = tuple(normal(N, K, std=K**-0.5) for _ in "qkv")
    biases = (None, normal(N), normal(N))
    A, up = stacks(rank, K, std=K**-0.5), stacks(N, rank, std=rank**-0.5)
    scale = tuple(torch.rand(3, generator=rng).to(device) + 0.5 for _ in "qkv")
    return x.requires_grad_(), weights, biases, A, up, scale, torch.tensor(slots, device=device)


def trained(inputs: Inputs) -> list[Tensor]:
    return [inputs[0], *inputs[3], *inputs[4]]


def results(f: Op, inputs: Inputs) -> list[Tensor]:
    """q, k and v, and the gradients of x, the As and the Bs for drawn gradients of theirs."""
    outputs = f(*inputs)
    rng = torch.Generator().manual_seed(7)
    gradients = [torch.randn(out.shape, generator=rng).to(torch.bfloat16).to(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, trained(inputs), gradients)]


def in_fp64(inputs: Inputs) -> Inputs:
    x, weights, biases, A, B, *rest = inputs
    exact_biases = tuple(None if bias is None else bias.double() for bias in biases)
    A, B = (tuple(stack.detach().double().requires_grad_() for stack in stacks) for stacks in (A, B))
    return x.detach().double().requires_grad_(), tuple(w.double() for w in weights), exact_biases, A, B, *rest


def check_against_fp64(f: Op, inputs: Inputs, what: str = "") -> None:
    three = results(f, inputs), results(lora_qkv_ref, inputs), results(lora_qkv_ref, in_fp64(inputs))
    dtype = inputs[0].dtype
    for name, *values in zip(NAMES, *three, strict=True):
        unit = torch.finfo(dtype).eps / torch.finfo(values[0].dtype).eps  # gradients of masters are of finer numbers
        check_accuracy(f"{name} {what}", *values, floor=FLOOR[dtype] * unit)


@pytest.mark.parametrize(("way", "dtype"), WAYS, ids=str)
def test_lora_qkv_equals_fp64_reference(way: str, dtype: torch.dtype, device: str) -> None:
    for seed in range(15 if device == "cuda" else 8):  # each costs the interpreter half a second
        draw = random.Random(100 * WAYS.index((way, dtype)) + seed)
        B = draw.choice([1, 1, 2, 3])
        inputs = make_inputs(
            (B, draw.choice(LENGTHS[way]) if seed else BLOCK_L + 3, draw.choice(WIDTHS[way]), draw.choice(WIDTHS[way])),
            draw.choice(RANKS[way]),
            draw.choice([[-1] * B, [1] * B, [draw.randrange(-1, 3) for _ in range(B)]]),
            dtype,
            device,
            dense=draw.random() < 0.5,
            master=draw.random() < 0.3,
        )
        check_against_fp64(op(way), inputs, f"of seed {seed}")


@pytest.mark.parametrize("way", ["in_place", "fused"])
def test_lora_qkv_sums_dx_over_three_projections(way: str, device: str) -> None:
    """Each part's gradient alone, of small whole numbers, which any order of summation gives exactly."""
    x, weights, biases, A, B, scale, slot = make_inputs((2, 3, 8, 16), 8, [1, 0], torch.float16, device)
    with torch.no_grad():
        for tensor in (x, *weights, *A, *B):
            tensor.copy_(torch.randint(-2, 3, tensor.shape))
    scale = tuple(torch.ones_like(s) for s in scale)
    outputs = op(way)(x, weights, biases, A, B, scale, slot)
    ones = [torch.ones_like(out) for out in outputs]
    (together,) = torch.autograd.grad(outputs, x, ones, retain_graph=True)
    apart = [torch.autograd.grad(out, x, one, retain_graph=True)[0] for out, one in zip(outputs, ones, strict=True)]
    assert torch.equal(together, sum(apart))
    assert all(part.any() for part in apart)


def test_lora_qkv_in_place_without_a_slot_is_the_linears(device: str) -> None:
    x, weights, biases, *rest = make_inputs((3, 9, 33, 40), 17, [-1, 1, -1], torch.bfloat16, device)
    for out, weight, bias in zip(op("in_place")(x, weights, biases, *rest), weights, biases, strict=True):
        linear = F.linear(x, weight, bias)
        assert torch.equal(out[::2], linear[::2]) and not torch.isclose(out[1], linear[1]).all()


@pytest.mark.parametrize("f", [op("in_place"), op("fused"), lora_qkv_ref])
def test_lora_qkv_lets_nothing_of_other_slots_through(f: Op, device: str) -> None:
    x, weights, biases, A, B, scale, slot = make_inputs((2, 3, 8, 16), 8, [-1, 1], torch.bfloat16, device)
    with torch.no_grad():
        for stack_A, stack_B, numbers in zip(A, B, scale, strict=True):
            stack_A[[0, 2]], stack_B[[0, 2]], numbers[[0, 2]] = torch.nan, torch.inf, torch.nan
        x[0, 0, 0] = torch.inf
    q, k, v, dx, *gradients = results(f, (x, weights, biases, A, B, scale, slot))
    for out, weight, bias in zip((q, k, v), weights, biases, strict=True):
        torch.testing.assert_close(out[0], F.linear(x, weight, bias)[0])
        assert out[1].isfinite().all() and out[0, 1:].isfinite().all()
    assert dx.isfinite().all()
    for gradient in gradients:
        assert (gradient[[0, 2]] == 0).all() and gradient[1].isfinite().all() and gradient[1].any()


@pytest.mark.parametrize("way", ["in_place", "fused"])
def test_lora_qkv_repeats_bit_for_bit(way: str, device: str) -> None:
    inputs = make_inputs((3, 70, 40, 56), 24, [1, 0, 1], torch.bfloat16, device)
    first, second = (results(op(way), inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("used", range(3), ids=["q", "k", "v"])
@pytest.mark.parametrize("way", ["in_place", "fused"])
def test_lora_qkv_result_moves_only_its_own_adapter(way: str, used: int, device: str) -> None:
    inputs = make_inputs((2, 3, 8, 16), 8, [1, 0], torch.bfloat16, device)
    dx, *stacks = torch.autograd.grad(op(way)(*inputs)[used].sum(), trained(inputs))
    assert dx.any() and [bool(stack.any()) for stack in stacks] == [place % 3 == used for place in range(6)]


@pytest.mark.parametrize("wanted", [(0,), (2,), (6,), (1, 4)], ids=str)
def test_lora_qkv_gives_the_gradients_that_are_wanted(wanted: tuple[int, ...], device: str) -> None:
    inputs = make_inputs((2, 3, 8, 16), 8, [1, 0], torch.bfloat16, device)
    f = op("in_place")
    every = results(f, inputs)[3:]
    some = [tensor if place in wanted else tensor.detach() for place, tensor in enumerate(trained(inputs))]
    outputs = f(some[0], *inputs[1:3], tuple(some[1:4]), tuple(some[4:]), *inputs[5:])
    rng = torch.Generator().manual_seed(7)
    gradients = [torch.randn(out.shape, generator=rng).to(torch.bfloat16).to(out) for out in outputs]
    ours = torch.autograd.grad(outputs, [some[place] for place in wanted], gradients)
    assert all(torch.equal(got, every[place]) for place, got in zip(wanted, ours, strict=True))


@pytest.mark.parametrize("f", [op("fused"), lora_qkv])
def test_lora_qkv_gives_no_gradient_to_what_is_frozen(f: Op, device: str) -> None:
    x, weights, (_, *biases), A, B, scale, slot = make_inputs((2, 3, 8, 16), 8, [1, 0], torch.bfloat16, device)
    frozen = [tensor.clone().requires_grad_() for tensor in (*weights, *biases, *scale)]
    outputs = f(x, frozen[:3], (None, *frozen[3:5]), A, B, frozen[5:], slot)
    gradients = torch.autograd.grad(sum(out.sum() for out in outputs), frozen, allow_unused=True)
    assert gradients == (None,) * 8


def test_lora_qkv_takes_no_samples_and_no_tokens(device: str) -> None:
    for shape, slots in (((0, 3, 8, 16), []), ((2, 0, 8, 16), [0, 1])):
        x, *rest = make_inputs(shape, 8, [0] * shape[0], torch.bfloat16, device)
        rest[5] = torch.tensor(slots, dtype=torch.int64, device=device)
        q, k, v, dx, *gradients = results(op(None), (x, *rest))
        assert q.shape == k.shape == v.shape == (*shape[:2], 16) and dx.shape == x.shape
        assert not any(gradient.any() for gradient in gradients)


def test_lora_qkv_is_fused_where_all_three_may_be(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, *rest = make_inputs((1, MIN_TOKENS, 16, 8), 8, [1], torch.bfloat16, device)
    monkeypatch.setattr(lora_gemm, "_in_place", None)
    check_against_fp64(op(None), (x, weights, *rest))
    monkeypatch.undo()
    monkeypatch.setattr(lora_gemm, "_fused", None)
    unaligned = torch.cat([weights[2], weights[2]], dim=1)[:, 4:20].copy_(weights[2])
    assert len(op(None)(x, (*weights[:2], unaligned), *rest)) == 3


def test_lora_qkv_ref_gradcheck() -> None:
    inputs = in_fp64(make_inputs((3, 2, 4, 5), 3, [2, -1, 0], torch.float32, "cpu"))

    def of_trained(x: Tensor, *stacks: Tensor) -> tuple[Tensor, ...]:
        return tuple(lora_qkv(x, *inputs[1:3], stacks[:3], stacks[3:], *inputs[5:]))

    assert torch.autograd.gradcheck(of_trained, trained(inputs))


@pytest.mark.parametrize("way", ["in_place", "fused"])
def test_lora_qkv_opcheck(way: str, device: str) -> None:
    inputs = make_inputs((2, 3, 8, 16), 8, [1, -1], torch.bfloat16, device, master=True)
    x, weights, biases, A, B, scale, slot = (list(part) if isinstance(part, tuple) else part for part in inputs)
    torch.library.opcheck(lora_qkv_op, (x, weights, *biases, A, B, scale, slot, way))


@pytest.mark.parametrize("way", ["in_place", "fused"])
def test_lora_qkv_compiles_without_graph_breaks(way: str, device: str) -> None:
    inputs = make_inputs((2, 3, 8, 8), 8, [1, -1], torch.bfloat16, device)

    def twice(x: Tensor, *rest: Any) -> Sequence[Tensor]:
        q, k, v = op(way)(x, *rest)
        return lora_qkv(q + k + v, *rest)  # the public function too

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, results(compiled, inputs), results(twice, inputs)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (torch.zeros(9, 8), torch.zeros(9, 7), torch.zeros(9, 8))}, r"k: x is .*\(N, K\)"),
        ({"biases": (None, None, torch.zeros(8))}, r"v: bias is \(8,\)"),
        ({"A": (torch.zeros(3, 5, 8),) * 3}, r"q: A is .*\(S, 9, r\)"),
        ({"scale": (torch.zeros(2),) * 3}, r"q: scale"),
        ({"slot_B": torch.zeros(3, dtype=torch.int64)}, "one integer a sample"),
        ({"weights": (torch.zeros(9, 8),) * 2}, r"hold \[2, 3, 3, 3, 3\]"),
        (
            {
                "A": (torch.zeros(3, 4, 8), torch.zeros(3, 5, 8), torch.zeros(3, 4, 8)),
                "B": (torch.zeros(3, 9, 4), torch.zeros(3, 9, 5), torch.zeros(3, 9, 4)),
            },
            r"A of q, k and v are .*one dtype and shape",
        ),
        ({"A": (torch.zeros(3, 4, 8), torch.zeros(3, 4, 8).half(), torch.zeros(3, 4, 8))}, "one dtype and shape"),
    ],
)
def test_lora_qkv_names_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    names = ("x_BLK", "weights", "biases", "A", "B", "scale", "slot_B")
    fitting = dict(zip(names, make_inputs((2, 3, 8, 9), 4, [1, 0], torch.float32, "cpu"), strict=True))
    with pytest.raises(ValueError, match=message):
        lora_qkv(**{**fitting, **change})


def test_lora_qkv_op_names_what_its_kernels_cannot(device: str) -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_RANK}"):
        op(None)(*make_inputs((2, 3, 8, 9), MAX_RANK + 1, [1, 0], torch.float32, device))


# The chain that bench.kernels.lora_qkv measures, and what it counts.


@pytest.mark.parametrize("chain", [bench.ours, bench.separate, bench.stock([1, 0])])
def test_bench_chains_equal_the_reference(chain: bench.Chain) -> None:
    inputs = bench.make_inputs((2, 3, 5, 2, 8), 4, [1, 0], torch.float32, "cpu").in_fp64()
    inputs = inputs._replace(freqs=tuple(freqs.to(torch.complex128) for freqs in inputs.freqs))
    outputs, exact = chain(inputs), bench.reference(inputs)
    for got, want in zip(outputs, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # diffusers' rotary computes in fp32
    gradients = [torch.randn_like(out) for out in exact]
    ours, expected = (torch.autograd.grad(results, inputs.trained(), gradients) for results in (outputs, exact))
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_stream_bytes_of_one_adapter() -> None:
    def on_meta(*size: int) -> tuple[Tensor, ...]:
        return (torch.empty(size, dtype=torch.bfloat16, device="meta"),) * 3

    x, width, down, stack = 2 * 8192 * 3072, 2 * 3072**2, 2 * 8192 * 128, 2 * 3072 * 128
    stream = bench.Stream(
        on_meta(1, 8192, 3072)[0], on_meta(3072, 3072), on_meta(3072), on_meta(3, 128, 3072), on_meta(3, 3072, 128), ()
    )
    forward, backward = bench.stream_bytes(stream, 1)
    assert forward == (x + 3 * (stack + down)) + 3 * (x + width + down + stack + x)
    d_down, dx, dA, dB = x + stack + down, x + width + down + stack, down + x + stack, down + x + stack
    assert backward == 3 * (d_down + dx + dA + dB) + x
    short = stream._replace(x=on_meta(1, 512, 3072)[0])
    assert bench.stream_bytes(short, 1)[1] > backward // 16  # in place, dx is read and written again


@pytest.mark.gpu
@pytest.mark.parametrize(("way", "dtype"), WAYS, ids=str)
def test_lora_qkv_equals_fp64_reference_at_full_size(way: str, dtype: torch.dtype) -> None:
    check_against_fp64(op(way), make_inputs((2, 4096 + 77, 3072, 3072), 128, [2, -1], dtype, "cuda", dense=False))
