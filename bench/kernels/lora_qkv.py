"""From a block's two streams to q, k and v of joint attention.

`python -m bench.kernels.lora_qkv [--json] [--rounds N]`.

The three projections with rank-128 adapters of image and text, `lora_qkv` each, then `qk_norm_rope`; forward alone
and forward with backward, at the width of Qwen-Image-Edit. The ways are "ours"; "separate", a `lora_linear` for each
projection; the references "compiled"; and "eager", PEFT's linears and then what diffusers does: RMSNorm modules,
complex rotary, three torch.cat. Results are checked against fp64 first. Bytes count each tensor once for each kernel
of ours that touches it. For shares, and for what is timed without a GPU, see `bench.kernels.timing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from bench.kernels.lora_linear import backward_bytes, forward_bytes, peft
from bench.kernels.timing import Case, check_accuracy, run
from clora.kernels.lora_gemm import best_way
from clora.kernels.lora_linear import lora_linear
from clora.kernels.lora_qkv import lora_qkv, lora_qkv_ref
from clora.kernels.qk_norm_rope import EPS, qk_norm_rope, qk_norm_rope_ref, rotary_tables

# Of qk_norm_rope, floating-point operations an element of q or k, counted in the equations: mean of squares 2, norm 1,
# weight 1, rotation 3. Backward: rotation 3, weight 1, statistics and norm again 3, mean of g n 2, dx 3.
NORM_FLOPS, NORM_BACKWARD_FLOPS = 7, 12
# Tensors (B, L_txt + L_img, H D) that it reads and writes: q, k, v; two gradients, q, k, and two gradients. The
# gradient of v is v's own.
NORM_TENSORS, NORM_BACKWARD_TENSORS = 6, 6

Outputs = tuple[Tensor, ...]
Shape = tuple[int, int, int, int, int]


class Stream(NamedTuple):
    """x, and the weights, biases, stacks and scales of its q, k and v."""

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    scale: tuple[Tensor, ...]


class Inputs(NamedTuple):
    """What a block's attention takes; norms of q, k, and of the text's q, k; the rotary's frequencies and tables."""

    img: Stream
    txt: Stream
    slot: Tensor
    norms: tuple[Tensor, ...]
    freqs: tuple[Tensor, Tensor]
    tables: tuple[Tensor, Tensor]

    def trained(self) -> list[Tensor]:
        return [tensor for stream in (self.img, self.txt) for tensor in (stream.x, *stream.A, *stream.B)]

    def in_fp64(self) -> Inputs:
        """The same values, of which those that are trained want gradients; scales and tables are fp32 by definition."""

        def exact(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(tensor.detach().double() for tensor in tensors)

        def exact_stream(stream: Stream) -> Stream:
            trained = [tuple(t.requires_grad_() for t in exact(ts)) for ts in ((stream.x,), stream.A, stream.B)]
            (x,), A, B = trained
            return Stream(x, exact(stream.weights), exact(stream.biases), A, B, stream.scale)

        return self._replace(img=exact_stream(self.img), txt=exact_stream(self.txt), norms=exact(self.norms))


Chain = Callable[[Inputs], Outputs]


def ours(inputs: Inputs) -> Outputs:
    projections = [lora_qkv(*stream, inputs.slot) for stream in (inputs.img, inputs.txt)]
    return qk_norm_rope(*projections[0], *projections[1], *inputs.norms, *inputs.tables)


def separate(inputs: Inputs) -> Outputs:
    streams = (zip(*stream[1:], strict=True) for stream in (inputs.img, inputs.txt))
    xs = (inputs.img.x, inputs.txt.x)
    projections = [
        lora_linear(x, *of_one, inputs.slot) for x, stream in zip(xs, streams, strict=True) for of_one in stream
    ]
    return qk_norm_rope(*projections, *inputs.norms, *inputs.tables)


def reference(inputs: Inputs) -> Outputs:
    projections = [lora_qkv_ref(*stream, inputs.slot) for stream in (inputs.img, inputs.txt)]
    return qk_norm_rope_ref(*projections[0], *projections[1], *inputs.norms, *inputs.tables)


def stock_norm(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' RMSNorm with a weight of x's dtype."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + EPS)).to(weight.dtype) * weight


def stock_rotary(x: Tensor, freqs: Tensor) -> Tensor:
    """diffusers' `apply_rotary_emb_qwen(use_real=False)`."""
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * freqs.unsqueeze(1)
    return torch.view_as_real(turned).flatten(3).type_as(x)


def stock(slots: list[int]) -> Chain:
    """PEFT's linears and diffusers' attention, but with the image first, for known slots."""
    linear = peft(slots)

    def chain(inputs: Inputs) -> Outputs:
        norm_q, norm_k, norm_added_q, norm_added_k = inputs.norms
        freqs_img, freqs_txt = inputs.freqs
        joint = []
        for place, (norm_img, norm_txt) in enumerate([(norm_q, norm_added_q), (norm_k, norm_added_k), (None, None)]):
            parts = []
            for stream, norm, freqs in ((inputs.img, norm_img, freqs_img), (inputs.txt, norm_txt, freqs_txt)):
                heads = linear(stream.x, *(three[place] for three in stream[1:])).unflatten(-1, (-1, len(norm_q)))
                parts.append(heads if norm is None else stock_rotary(stock_norm(heads, norm), freqs))
            joint.append(torch.cat(parts, dim=1))
        return tuple(joint)

    return chain


def make_inputs(shape: Shape, rank: int, slots: list[int], dtype: torch.dtype, device: str) -> Inputs:
    B, L_txt, L_img, H, D = shape
    width, num_slots = H * D, max(slots) + 1

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(size, device=device, dtype=dtype)

    def stream(L: int) -> Stream:
        x = normal(B, L, width).requires_grad_()
        weights, biases = (tuple(normal(*size, std=width**-0.5) for _ in "qkv") for size in ((width, width), (width,)))
        A = tuple(normal(num_slots, rank, width, std=width**-0.5).requires_grad_() for _ in "qkv")
        up = tuple(normal(num_slots, width, rank, std=rank**-0.5).requires_grad_() for _ in "qkv")
        return Stream(x, weights, biases, A, up, tuple(torch.rand(num_slots, device=device) for _ in "qkv"))

    angles = 10 * torch.randn(L_txt + L_img, D // 2, device=device)
    freqs_txt, freqs_img = torch.polar(torch.ones_like(angles), angles).split([L_txt, L_img])
    norms = tuple(1 + 0.1 * normal(D) for _ in range(4))
    slot = torch.tensor(slots, device=device)
    return Inputs(
        stream(L_img), stream(L_txt), slot, norms, (freqs_img, freqs_txt), rotary_tables(freqs_img, freqs_txt)
    )


def stream_bytes(stream: Stream, adapters: int) -> tuple[int, int]:
    """Of `lora_qkv`, forward and backward, by the counts of `lora_linear`: x is read once for three downs, and dx is
    written once; in place torch reads it for each product that it adds."""
    x, weight, A, B = stream.x, stream.weights[0], stream.A[0], stream.B[0]
    sizes = (x.shape[0] * x.shape[1], x.shape[2], weight.shape[0], A.shape[1], adapters, x.itemsize)
    way = best_way(x, weight, A, B)
    backward = 3 * backward_bytes(*sizes)[way] + (2 * x.nbytes if way == "in_place" else -2 * x.nbytes)
    return 3 * forward_bytes(*sizes)[way] - 2 * x.nbytes, backward


def make_cases(shape: Shape, rank: int, slots: list[int], dtype: torch.dtype, device: str) -> list[Case]:
    """Forward, and forward with backward, of (B, L_txt, L_img, H, D)."""
    B, L_txt, L_img, H, D = shape
    inputs = make_inputs(shape, rank, slots, dtype, device)
    gradients = [torch.randn(B, L_txt + L_img, H, D, device=device, dtype=dtype) for _ in "qkv"]

    def forward(chain: Chain) -> Callable[[], Outputs]:
        def call() -> Outputs:
            with torch.no_grad():
                return chain(inputs)

        return call

    def both(chain: Chain, inputs: Inputs = inputs, gradients: list[Tensor] = gradients) -> Callable[[], Outputs]:
        def call() -> Outputs:
            outputs = chain(inputs)
            return *outputs, *torch.autograd.grad(outputs, inputs.trained(), gradients)

        return call

    def gate() -> None:
        exact = both(reference, inputs.in_fp64(), [gradient.double() for gradient in gradients])()
        three = both(ours)(), both(stock(slots))(), exact
        for place, results in enumerate(zip(*three, strict=True)):
            check_accuracy(f"lora_qkv, result {place}", *results)

    compiled = torch.compile(reference, dynamic=False)
    ways: dict[str, Chain] = {"ours": ours, "separate": separate, "compiled": compiled, "eager": stock(slots)}
    what = (
        f"{B}x({L_txt}+{L_img})x{H}x{D} r{rank} slots {','.join(map(str, slots))} {str(dtype).removeprefix('torch.')}"
    )
    counts = [stream_bytes(stream, len(set(slots))) for stream in (inputs.img, inputs.txt)]
    forward_count, backward_count = (sum(count) for count in zip(*counts, strict=True))
    tokens, table_bytes = B * (L_txt + L_img), 2 * inputs.tables[0].nbytes
    numel, width = tokens * H * D, H * D
    forward_count += NORM_TENSORS * numel * dtype.itemsize + table_bytes
    backward_count += NORM_BACKWARD_TENSORS * numel * dtype.itemsize + table_bytes
    flops, small_flops = 3 * 2 * tokens * width**2, 3 * 2 * tokens * rank * 2 * width
    return [
        Case(
            f"{what} forward",
            gate,
            {way: forward(chain) for way, chain in ways.items()},
            forward_count,
            flops + small_flops + NORM_FLOPS * 2 * numel,
        ),
        Case(
            f"{what} forward and backward",
            gate,
            {way: both(chain) for way, chain in ways.items()},
            forward_count + backward_count,
            2 * flops + 3 * small_flops + (NORM_FLOPS + NORM_BACKWARD_FLOPS) * 2 * numel,
        ),
    ]


def all_cases(device: str, size: str) -> list[Case]:
    torch._functorch.config.donated_buffer = False  # else a compiled backward runs only once a forward
    tokens, rank = ((512, 8192, 24, 128), 128) if size == "full" else ((16, 256, 3, 128), 16)
    return [
        case
        for slots in ([0], [0, 1, 2])
        for case in make_cases((len(slots), *tokens), rank, slots, torch.bfloat16, device)
    ]


if __name__ == "__main__":
    run("lora_qkv", __doc__, all_cases)
