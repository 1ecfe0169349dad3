"""qk_norm_rope: kernels against fp64, forward and backward, and the reference against the stock diffusers attention."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bench.kernels.timing import check_accuracy
from clora.kernels.qk_norm_rope import (
    BLOCK,
    MAX_D,
    qk_norm_rope,
    qk_norm_rope_op,
    qk_norm_rope_ref,
    rotary_tables,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (B, L_txt, L_img, H, D)
SHAPES = [
    (1, 1, 1, 1, 2),
    (1, 0, 3, 2, 32),  # no text
    (2, 3, 0, 1, 6),  # no image
    (2, 1, 2, 3, 48),
    (3, 2, 1, 5, 14),
    (1, 1, 2, 24, 128),
    (1, 1, 1, BLOCK // 256 + 1, MAX_D),
]
PROJECTIONS = ("q_img", "k_img", "v_img", "q_txt", "k_txt", "v_txt")
NAMES = ("q", "k", "v", *(f"d{name}" for name in PROJECTIONS))
# A norm's gradient is a difference, which in a row of a few elements may be far less than its terms and their rounding.
FLOOR = {"dq_img": 4.0, "dk_img": 4.0, "dq_txt": 4.0, "dk_txt": 4.0}

Op = Callable[..., tuple[Tensor, Tensor, Tensor]]
Shape = tuple[int, int, int, int, int]


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, dense: bool = True) -> list[Tensor]:
    """The op's arguments; the projections want gradients. Where not dense they are parts of one wider, longer row."""
    B, L_txt, L_img, H, D = shape
    rng = torch.Generator().manual_seed(B * 1000 + L_txt * 100 + L_img * 10 + H + D)
    projections = []
    for L in (L_img, L_txt):
        wide = torch.randn(B, L if dense else L + 2, 3 * H * D, generator=rng).to(device, dtype)
        for part in wide.chunk(3, -1):
            projections.append((part.contiguous() if dense else part[:, 1 : L + 1]).requires_grad_())
    norms = [(1.0 + 0.3 * torch.randn(D, generator=rng)).to(device, dtype) for _ in range(4)]
    angles = 10.0 * torch.randn(L_txt + L_img, D // 2, generator=rng)
    return [*projections, *norms, angles.cos().to(device), angles.sin().to(device)]


def in_fp64(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same values, so that the reference is exact; the tables are fp32 by definition."""
    exact = [x.detach().double() for x in inputs[:10]]
    return [*(x.requires_grad_() for x in exact[:6]), *exact[6:], *inputs[10:]]


def results(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """q, k, v, and the gradients of the projections for drawn output gradients, the same in each dtype."""
    outputs = op(*inputs)
    rng = torch.Generator().manual_seed(7)
    gradients = [torch.randn(out.shape, generator=rng).bfloat16().to(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs[:6], gradients)]


def check_against_fp64(inputs: Sequence[Tensor]) -> None:
    ours, same_dtype = results(qk_norm_rope_op, inputs), results(qk_norm_rope_ref, inputs)
    exact = results(qk_norm_rope_ref, in_fp64(inputs))
    for name, *three in zip(NAMES, ours, same_dtype, exact, strict=True):
        check_accuracy(name, *three, floor=FLOOR.get(name, 1.0))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qk_norm_rope_equals_fp64_reference(shape: Shape, dtype: torch.dtype, dense: bool, device: str) -> None:
    check_against_fp64(make_inputs(shape, dtype, device, dense))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_rope_equals_fp64_reference_on_random_shapes(dtype: torch.dtype, device: str) -> None:
    rng = random.Random(str(dtype))
    for _ in range(55 if device == "cuda" else 25):
        shape = (rng.choice([1, 1, 2]), rng.randint(0, 2), rng.randint(0, 2), rng.randint(1, 7), 2 * rng.randint(1, 70))
        check_against_fp64(make_inputs(shape, dtype, device, dense=rng.random() < 0.5))


def test_qk_norm_rope_copies_v_bit_for_bit(device: str) -> None:
    inputs = make_inputs((2, 2, 3, 3, 10), torch.bfloat16, device, dense=False)
    v = qk_norm_rope_op(*inputs)[2]
    assert torch.equal(v.flatten(2), torch.cat([inputs[2], inputs[5]], dim=1))
    gradient = torch.randn_like(v)
    dv_img, dv_txt = torch.autograd.grad(v, [inputs[2], inputs[5]], gradient)
    assert torch.equal(torch.cat([dv_img, dv_txt], dim=1), gradient.flatten(2))


def test_qk_norm_rope_takes_layouts_and_dtypes_that_differ(device: str) -> None:
    inputs = make_inputs((2, 3, 4, 2, 6), torch.float32, device)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs[:6]]
    turned[0] = inputs[0].detach()[:1].expand(2, -1, -1).requires_grad_()
    norms = [norm.to(dtype) for norm, dtype in zip(inputs[6:10], (*DTYPES, torch.float32), strict=True)]
    norms[1] = norms[1].float().repeat_interleave(2)[::2]
    cos, sin = (table.t().contiguous().t() for table in inputs[10:])
    check_against_fp64([*turned, *(norm.float() for norm in norms), cos, sin])
    outputs = qk_norm_rope_op(*turned, *norms, cos, sin)
    exact = qk_norm_rope_ref(*turned, *(norm.float() for norm in norms), cos, sin)
    for got, want in zip(outputs, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(outputs[0].sum(), turned[0])  # whose gradient is one number, expanded
    torch.testing.assert_close(gradient, torch.autograd.grad(exact[0].sum(), turned[0])[0], rtol=1e-5, atol=1e-5)


def test_qk_norm_rope_rounds_once(device: str) -> None:
    inputs = make_inputs((1, 2, 3, 2, 48), torch.bfloat16, device)
    exact = qk_norm_rope_ref(*in_fp64(inputs))
    for got, want in zip(qk_norm_rope_op(*inputs), exact, strict=True):
        torch.testing.assert_close(got.double(), want.detach(), rtol=2**-8 * 1.001, atol=1e-6)


def test_qk_norm_rope_reaches_past_2_31_elements(device: str) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False  # memory that nobody writes is not taken
    try:
        far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    near = [x.detach() for x in make_inputs((2, 1, 1, 2, 12), torch.bfloat16, device)]
    x = far.as_strided((2, 1, 24), (2**31, 24, 1))
    x.copy_(near[0])
    outputs = qk_norm_rope_op(x, x, x, *near[3:])
    same = qk_norm_rope_op(near[0], near[0], near[0], *near[3:])
    assert all(map(torch.equal, outputs, same))
    backward = torch.ops.clora.qk_norm_rope_backward
    gradients = backward(*outputs[:2], x, x, *near[3:5], *near[6:])
    assert all(map(torch.equal, gradients, backward(*outputs[:2], near[0], near[0], *near[3:5], *near[6:])))


def test_qk_norm_rope_keeps_zero_and_large_rows_finite(device: str) -> None:
    inputs = make_inputs((1, 1, 2, 2, 8), torch.float16, device)
    with torch.no_grad():
        inputs[0].zero_()
        inputs[1].fill_(60000.0)  # its square is no fp16 number
    check_against_fp64(inputs)


def test_qk_norm_rope_repeats_bit_for_bit(device: str) -> None:
    inputs = make_inputs((2, 2, 3, 3, 40), torch.bfloat16, device)
    first, second = (results(qk_norm_rope_op, inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_qk_norm_rope_token_does_not_depend_on_its_neighbours(device: str) -> None:
    inputs = make_inputs((2, 2, 3, 3, 40), torch.bfloat16, device)
    together = qk_norm_rope_op(*inputs)
    projections = [*(x[1:, 2:] for x in inputs[:3]), *(x[1:, :0] for x in inputs[3:6])]
    alone = qk_norm_rope_op(*projections, *inputs[6:10], *(table[2:3] for table in inputs[10:]))
    assert all(torch.equal(one, joint[1:, 2:3]) for one, joint in zip(alone, together, strict=True))


@pytest.mark.parametrize("op", [qk_norm_rope, qk_norm_rope_op])
def test_qk_norm_rope_gives_gradients_to_the_projections_alone(op: Op, device: str) -> None:
    inputs = [x.detach().requires_grad_() for x in make_inputs((1, 1, 2, 2, 8), torch.float32, device)]
    q, k, v = op(*inputs)
    gradients = torch.autograd.grad((q * k * v).sum(), inputs, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [True] * 6 + [False] * 6


@pytest.mark.parametrize("used", range(3), ids=["q", "k", "v"])
def test_qk_norm_rope_result_moves_only_its_own_projections(used: int, device: str) -> None:
    inputs = make_inputs((1, 1, 2, 2, 8), torch.float32, device)
    gradients = torch.autograd.grad(qk_norm_rope_op(*inputs)[used].square().sum(), inputs[:6], allow_unused=True)
    moved = [gradient is not None and bool(gradient.abs().sum() > 1e-3) for gradient in gradients]
    # A normed head keeps its length but for the weights, which are not one here.
    assert moved == [place % 3 == used for place in range(6)]


# The stock attention.


def stock_joint(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The arguments of `qk_norm_rope` within diffusers' own attention of a tiny model, and q, k, v it attends with."""
    stock = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage")
    model = stock.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=8,
        axes_dims_rope=(8, 12, 12),
    )
    attention = model.transformer_blocks[0].attn.to(dtype)
    norms = [attention.norm_q, attention.norm_k, attention.norm_added_q, attention.norm_added_k]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    img, txt = (torch.randn(2, tokens, 96, dtype=dtype) for tokens in (2 * 3 * 4, 5))
    # Two pictures of 3 by 4 tokens, as for an edit.
    freqs_img, freqs_txt = model.pos_embed([[(1, 3, 4), (1, 3, 4)]], max_txt_seq_len=5, device=img.device)
    linears = [attention.to_q, attention.to_k, attention.to_v]
    linears += [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj]
    projections: list[Tensor] = []
    for linear in linears:
        linear.register_forward_hook(lambda _module, _inputs, output: projections.append(output))
    joint: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        joint.extend(torch.cat([x[:, 5:], x[:, :5]], dim=1) for x in (q, k, v))  # they have the text first
        return q

    monkeypatch.setattr(stock, "dispatch_attention_fn", attend)
    attention(hidden_states=img, encoder_hidden_states=txt, image_rotary_emb=(freqs_img, freqs_txt))
    return [*projections, *(norm.weight for norm in norms), *rotary_tables(freqs_img, freqs_txt)], joint


def test_qk_norm_rope_ref_equals_the_stock_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, joint = stock_joint(monkeypatch, torch.float32)
    ours = qk_norm_rope(*inputs)
    for got, want in zip(ours, joint, strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    gradients = [torch.randn_like(out) for out in joint]
    ours, expected = (torch.autograd.grad(out, inputs[:6], gradients, retain_graph=True) for out in (ours, joint))
    for got, want in zip(ours, expected, strict=True):
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_qk_norm_rope_ref_rounds_where_the_stock_attention_does(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, joint = stock_joint(monkeypatch, torch.bfloat16)
    for got, want in zip(qk_norm_rope(*inputs), joint, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0.0)
        # A complex product may be fused otherwise than a real one, which turns a rounding once in thousands of times.
        assert (got != want).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_rope_ref_takes_fp32_weights_as_the_stock_norm_does(dtype: torch.dtype) -> None:
    stock = pytest.importorskip("diffusers.models.normalization").RMSNorm(16, eps=1e-6)
    inputs = make_inputs((1, 2, 3, 2, 16), dtype, "cpu")
    norms = [x.float() for x in inputs[6:10]]
    upright = [torch.ones(5, 8), torch.zeros(5, 8)]
    q, k, _ = qk_norm_rope(*inputs[:6], *norms, *upright)
    for got, projection, norm in ((q, inputs[0], norms[0]), (k, inputs[1], norms[1])):
        stock.weight.data = norm
        assert torch.equal(got[:, :3], stock(projection.unflatten(-1, (2, 16))).to(dtype))


def test_rotary_tables_are_in_joint_order() -> None:
    freqs_img, freqs_txt = (torch.polar(torch.ones(n, 4), torch.randn(n, 4)) for n in (3, 2))
    cos, sin = rotary_tables(freqs_img, freqs_txt)
    assert torch.equal(torch.complex(cos, sin), torch.cat([freqs_img, freqs_txt]))
    assert cos.is_contiguous() and sin.is_contiguous()
    with pytest.raises(ValueError, match="complex"):
        rotary_tables(cos, freqs_txt)


# What torch asks of an operator.


def test_qk_norm_rope_ref_gradcheck() -> None:
    inputs = in_fp64(make_inputs((2, 1, 2, 1, 4), torch.float64, "cpu"))
    assert torch.autograd.gradcheck(lambda *projections: qk_norm_rope(*projections, *inputs[6:]), inputs[:6])


@pytest.mark.parametrize("shape", [(1, 1, 2, 2, 8), (2, 0, 2, 1, 6)], ids=str)
def test_qk_norm_rope_opcheck(shape: Shape, device: str) -> None:
    torch.library.opcheck(qk_norm_rope_op, tuple(make_inputs(shape, torch.bfloat16, device, dense=False)))


def test_qk_norm_rope_compiles_without_graph_breaks(device: str) -> None:
    inputs = make_inputs((1, 2, 2, 2, 8), torch.float32, device, dense=False)

    def both(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qk_norm_rope_op(*arguments)
        same_q, same_k, same_v = qk_norm_rope(*arguments)  # the public function too
        return q + same_q, k + same_k, v + same_v

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    ours, eager = (results(f, inputs) for f in (compiled, both))
    assert all(map(torch.equal, ours, eager))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_k": torch.ones(6)}, r"norm weights are \(8,\), \(6,\)"),
        ({name: torch.ones(7) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}, "D even"),
        ({"q_img": torch.zeros(1, 3, 12)}, "with D = 8"),
        ({"k_img": torch.zeros(1, 4, 16)}, r"q_img, k_img and v_img are \(1, 3, 16\), \(1, 4, 16\)"),
        ({"v_txt": torch.zeros(1, 2, 16).half()}, "torch.float16 and torch.float32"),
        ({name: torch.zeros(2, 2, 16) for name in ("q_txt", "k_txt", "v_txt")}, r"\(1, L_txt, 16\)"),
        ({"q_txt": torch.zeros(2, 16)}, "q_txt, k_txt and v_txt"),
        ({"cos": torch.zeros(3, 4)}, r"fp32 \(5, 4\), the image's rows first"),
        ({"sin": torch.zeros(5, 4).double()}, "sin torch.float64"),
    ],
)
def test_qk_norm_rope_names_what_does_not_fit(change: dict[str, Tensor], message: str) -> None:
    names = (*PROJECTIONS, "norm_q", "norm_k", "norm_added_q", "norm_added_k", "cos", "sin")
    fitting = dict(zip(names, make_inputs((1, 2, 3, 2, 8), torch.float32, "cpu"), strict=True))
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**{**fitting, **change})


def test_qk_norm_rope_kernel_takes_no_wider_head(device: str) -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_D}"):
        qk_norm_rope_op(*make_inputs((1, 1, 1, 1, MAX_D + 2), torch.float32, device))
    with pytest.raises(ValueError, match="float64"):
        qk_norm_rope_op(*in_fp64(make_inputs((1, 1, 1, 1, 8), torch.float32, device)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_rope_equals_fp64_reference_at_full_size(dtype: torch.dtype) -> None:
    check_against_fp64(make_inputs((1, 512, 8192, 24, 128), dtype, "cuda", dense=False))
