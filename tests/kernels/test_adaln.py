"""adaln and gated_residual_adaln: kernels against fp64, forward and backward, over shapes, layouts and dtypes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.timing import check_accuracy
from clora.kernels.adaln import (
    MAX_D,
    TOKENS,
    adaln,
    adaln_op,
    adaln_ref,
    gated_residual_adaln,
    gated_residual_adaln_op,
    gated_residual_adaln_ref,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (1, 3, 7), (2, 5, 48), (3, 2, 97), (1, TOKENS + 1, 20), (1, 2, 3072)]
INDICES = ["none", "mixed", "zeros", "ones"]

Op = Callable[..., tuple[Tensor, ...]]


def plain_op(x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
    return (adaln_op(x, scale, shift, index),)


def plain_ref(x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
    return (adaln_ref(x, scale, shift, index),)


OPS: dict[str, tuple[Op, Op, str]] = {
    "plain": (plain_op, plain_ref, "x scale shift"),
    "gated": (gated_residual_adaln_op, gated_residual_adaln_ref, "x y gate scale shift"),
}


def make_inputs(
    names: str, shape: tuple[int, int, int], dtype: torch.dtype, index: str, device: str, dense: bool = True
) -> tuple[list[Tensor], Tensor | None]:
    """Tensors by name, and the index. Where not dense: x and y are parts of longer rows, parameters one chunk."""
    B, L, D = shape
    rng = torch.Generator().manual_seed(B * 1000 + L * 100 + D)
    rows = B if index == "none" else 2 * B
    tensors = []
    for name in names.split():
        if name in "xy":
            full = torch.randn(B, L if dense else L + 2, D, generator=rng).to(device, dtype)
            tensors.append((full if dense else full[:, 1 : L + 1]).requires_grad_())
        else:
            full = torch.randn(rows, D if dense else 3 * D, generator=rng).to(device, dtype)
            tensors.append((full if dense else full.chunk(3, -1)[1]).requires_grad_())
    made = {
        "mixed": torch.randint(0, 2, (B, L), generator=rng),
        "zeros": torch.zeros(B, L, dtype=torch.int32),
        "ones": torch.ones(B, L, dtype=torch.bool),
    }
    return tensors, None if index == "none" else made[index].to(device)


def results(op: Op, tensors: Sequence[Tensor], index: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The outputs, and the gradient of each input for output gradients drawn in `dtype`."""
    outputs = op(*tensors, index)
    rng = torch.Generator().manual_seed(7)
    gradients = [torch.randn(out.shape, generator=rng).to(dtype).to(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, tensors, gradients)]


def check_against_fp64(
    op: Op, ref: Op, names: str, tensors: Sequence[Tensor], index: Tensor | None, floor: float = 1.0
) -> None:
    """The floor is above 1 where the reference may happen to be spared the roundings of a short sum."""
    dtype = tensors[0].dtype
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in tensors]
    ours, same_dtype = (results(f, tensors, index, dtype) for f in (op, ref))
    exact = results(ref, exact_inputs, index, dtype)
    labels = [f"output {k}" for k in range(len(ours) - len(tensors))] + [f"d{name}" for name in names.split()]
    for label, *three in zip(labels, ours, same_dtype, exact, strict=True):
        check_accuracy(label, *three, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OPS)
def test_adaln_equals_fp64_reference_on_random_shapes(kind: str, dtype: torch.dtype, device: str) -> None:
    op, ref, names = OPS[kind]
    draw = random.Random(f"{kind} {dtype}")
    for _ in range(70 if device == "cuda" else 35):
        shape = (draw.randint(1, 2), draw.choice([1, 2, 3, 4]), draw.choice([1, 2, 3, 31, 64, 97, 200]))
        tensors, index = make_inputs(names, shape, dtype, draw.choice(INDICES), device, dense=draw.random() < 0.5)
        check_against_fp64(op, ref, names, tensors, index, floor=4.0 if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", OPS)
def test_adaln_equals_fp64_reference(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    op, ref, names = OPS[kind]
    # Index and layout vary with the shape, so that each pairing of them is met in some dtype.
    index = INDICES[(SHAPES.index(shape) + DTYPES.index(dtype)) % len(INDICES)]
    tensors, made_index = make_inputs(names, shape, dtype, index, device, dense=SHAPES.index(shape) % 2 == 0)
    check_against_fp64(op, ref, names, tensors, made_index)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("kind", OPS)
def test_adaln_equals_fp64_reference_with_any_index(kind: str, index: str, dense: bool, device: str) -> None:
    op, ref, names = OPS[kind]
    tensors, made_index = make_inputs(names, (2, 3, 33), torch.float32, index, device, dense)
    check_against_fp64(op, ref, names, tensors, made_index)


def test_adaln_takes_the_widest_row_and_no_wider(device: str) -> None:
    op, ref, names = OPS["gated"]
    tensors, _ = make_inputs(names, (1, 1, MAX_D), torch.float32, "none", device)
    check_against_fp64(op, ref, names, tensors, None)
    x = torch.zeros(1, 1, MAX_D + 1, device=device)
    with pytest.raises(ValueError, match="at most 8192"):
        adaln_op(x, x[0], x[0], None)


def test_adaln_takes_layouts_that_are_not_dense(device: str) -> None:
    x = torch.randn(2, 12, 3, device=device).transpose(1, 2)
    scale, shift = torch.randn(2, 12, 2, device=device).unbind(2)
    x.requires_grad_()
    out = adaln_op(x, scale, shift, None)
    (dx,) = torch.autograd.grad(out.sum(), x)  # whose gradient is one number, expanded
    same = adaln_ref(x, scale, shift)
    torch.testing.assert_close(out, same)
    torch.testing.assert_close(dx, torch.autograd.grad(same.sum(), x)[0], atol=1e-5, rtol=1e-5)


def test_adaln_reaches_past_2_31_elements(device: str) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False  # memory that nobody writes is not taken
    try:
        far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    x = far.as_strided((2, 1, 24), (2**31, 24, 1))
    x.copy_(torch.randn(x.shape))
    scale = torch.randn(2, 24, dtype=torch.bfloat16, device=device)
    out = adaln_op(x, scale, scale, None)
    dx = torch.ops.clora.adaln_backward(out, x, scale, None)[0]
    near = x.clone()
    assert torch.equal(out, adaln_op(near, scale, scale, None))
    assert torch.equal(dx, torch.ops.clora.adaln_backward(out, near, scale, None)[0])


def test_adaln_normalises_a_row_of_large_mean(device: str) -> None:
    # The mean of squares less the square of the mean would lose the variance here.
    # Many rows, for the error of one is a matter of luck: how the mean happens to round.
    x = (1000.0 + torch.randn(1, 24, 256, device=device)).requires_grad_()
    zero = torch.zeros(1, 256, device=device, requires_grad=True)
    check_against_fp64(plain_op, plain_ref, "x scale shift", [x, zero, zero.clone().detach().requires_grad_()], None)


def test_adaln_repeats_bit_for_bit(device: str) -> None:
    op, _, names = OPS["gated"]
    tensors, index = make_inputs(names, (1, TOKENS + 3, 24), torch.bfloat16, "mixed", device)
    first, second = (results(op, tensors, index, torch.bfloat16) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_adaln_token_does_not_depend_on_its_neighbours(device: str) -> None:
    tensors, _ = make_inputs("x y gate scale shift", (2, 3, 40), torch.bfloat16, "none", device)
    r, out = gated_residual_adaln_op(*tensors, None)
    x, y, *parameters = tensors
    alone = gated_residual_adaln_op(x[1:, 2:], y[1:, 2:], *(p[1:] for p in parameters), None)
    assert torch.equal(alone[0], r[1:, 2:]) and torch.equal(alone[1], out[1:, 2:])


@pytest.mark.parametrize("indexed", [False, True])
def test_adaln_ref_equals_the_stock_block(indexed: bool) -> None:
    stock = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage").QwenImageTransformerBlock
    (x, y), index = make_inputs("x y", (2, 5, 48), torch.bfloat16, "mixed" if indexed else "none", "cpu")
    modulation = torch.randn(4 if indexed else 2, 3 * 48, dtype=torch.bfloat16)
    shift, scale, gate = modulation.chunk(3, -1)
    normed = F.layer_norm(x, (48,), eps=1e-6)
    expected, gate_of_token = stock._modulate(None, normed, modulation, index)
    assert torch.equal(adaln(x, scale, shift, index), expected)
    r, out = gated_residual_adaln(x, y, gate, scale, shift, index)
    assert torch.equal(r, x + gate_of_token * y)
    assert torch.equal(out, stock._modulate(None, F.layer_norm(r, (48,), eps=1e-6), modulation, index)[0])


@pytest.mark.parametrize("index", ["none", "mixed"])
def test_adaln_ref_gradcheck(index: str) -> None:
    tensors, made_index = make_inputs("x y gate scale shift", (2, 2, 5), torch.float64, index, "cpu")
    assert torch.autograd.gradcheck(lambda *t: gated_residual_adaln(*t, made_index), tensors)


@pytest.mark.parametrize("kind", OPS)
def test_adaln_opcheck(kind: str, device: str) -> None:
    tensors, index = make_inputs(OPS[kind][2], (1, 2, 8), torch.bfloat16, "mixed", device)
    torch.library.opcheck(adaln_op if kind == "plain" else gated_residual_adaln_op, (*tensors, index))


def test_adaln_compiles_without_graph_breaks(device: str) -> None:
    tensors, index = make_inputs("x y gate scale shift", (1, 2, 8), torch.float32, "mixed", device)

    def block(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        r, out = gated_residual_adaln_op(x, y, gate, scale, shift, index)
        return r, adaln(out, scale, shift, index)  # the public function too

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    ours, eager = (results(f, tensors, index, torch.float32) for f in (compiled, block))
    assert all(map(torch.equal, ours, eager))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8)}, "B, L, D"),
        ({"y": torch.zeros(2, 3, 9)}, "y like x"),
        ({"scale": torch.zeros(4, 8)}, r"\(2, 8\)"),
        ({"gate": torch.zeros(2, 8, dtype=torch.float16)}, "one dtype"),
        ({"index": torch.zeros(2, 3, dtype=torch.int64)}, r"with index; \(4, 8\)"),
    ],
)
def test_gated_residual_adaln_names_what_does_not_fit(change: dict[str, Tensor], message: str) -> None:
    fitting = {name: torch.zeros(2, 3, 8) for name in ("x", "y")}
    fitting |= {name: torch.zeros(2, 8) for name in ("scale", "shift", "gate")}
    with pytest.raises(ValueError, match=message):
        gated_residual_adaln(**{**fitting, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", ["none", "mixed"])
def test_adaln_equals_fp64_reference_at_full_size(index: str, dtype: torch.dtype) -> None:
    op, ref, names = OPS["gated"]
    tensors, made_index = make_inputs(names, (2, 4096, 3072), dtype, index, "cuda", dense=False)
    check_against_fp64(op, ref, names, tensors, made_index)
