"""The served network as a graph: its inputs, which of their sizes may change, and the check that it uses all of them.

Shape legend: B batch, T tokens of the result, R of the references, M text tokens, J = T + R + M, C latent channels per
token, W text width, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from clora.export.manifest import Limits

Run = Callable[..., Tensor]
"""(x, refs, text, cos, sin, step, text_len) -> velocity: an opened graph, or the network itself. Inputs may be on any
device, the velocity is on that of x."""

INPUTS = ("x", "refs", "text", "cos", "sin", "step", "text_len")
OUTPUT = "velocity"


def run_on(network: nn.Module, device: torch.device) -> Run:
    """A network whose weights are on `device` as a `Run`."""

    @torch.no_grad()
    def run(*inputs: Tensor) -> Tensor:
        velocity: Tensor = network(*(one.to(device) for one in inputs))
        return velocity.to(inputs[0].device)

    return run


@dataclass(frozen=True)
class Part:
    """One graph of an artefact: the name of its files, of its inputs and output, and which sizes may change."""

    file: str
    inputs: tuple[str, ...]
    output: str
    sizes: Callable[[Limits], tuple[dict[int, Any], ...]]


def example_inputs(channels: int, text_width: int, head_width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Inputs of small, distinct sizes, to trace the network with: B = 2, T = 12, R = 10, M = 8."""
    B, T, R, M = 2, 12, 10, 8
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    angle = torch.randn(T + R + M, head_width // 2, generator=generator)
    step, text_len = torch.zeros(B, dtype=torch.int64), torch.tensor([5, 8])
    x, refs, text = draw(B, T, channels), draw(B, R, channels), draw(B, M, text_width)
    return x, refs, text, angle.cos(), angle.sin(), step, text_len


def dynamic_sizes(limits: Limits) -> tuple[dict[int, Any], ...]:
    """For each input the sizes that may change, within the artefact's limits; J follows from the others."""
    batch = Dim("batch", min=1, max=limits.batch)
    tokens, ref_tokens = (Dim(name, min=2, max=limits.tokens) for name in ("tokens", "ref_tokens"))
    text = Dim("text_tokens", min=2, max=limits.text_buckets[-1])
    joint: dict[int, Any] = {0: Dim.AUTO}
    return {0: batch, 1: tokens}, {0: batch, 1: ref_tokens}, {0: batch, 1: text}, joint, joint, {0: batch}, {0: batch}


def image_sizes(limits: Limits) -> tuple[dict[int, Any], ...]:
    """Of pixels or latents, (B, C, H, W): batch, height and width may change."""
    return ({0: Dim("batch", min=1, max=limits.batch), 2: Dim.AUTO, 3: Dim.AUTO},)


NETWORK = Part("model", INPUTS, OUTPUT, dynamic_sizes)
ENCODER = Part("vae_encoder", ("pixels",), "latents", image_sizes)
DECODER = Part("vae_decoder", ("latents",), "pixels", image_sizes)


def trace(network: nn.Module, inputs: tuple[Tensor, ...], limits: Limits, part: Part = NETWORK) -> ExportedProgram:
    """The network as torch's graph. Raises ValueError where the graph leaves an input unused: padding would then be
    attended, or a step ignored, without any sign."""
    with torch.no_grad():
        program = torch.export.export(network, inputs, dynamic_shapes=part.sizes(limits))
    used = {node.name: bool(node.users) for node in program.graph.nodes if node.op == "placeholder"}
    if unused := [name for name in program.graph_signature.user_inputs if not used[str(name)]]:
        raise ValueError(f"the exported graph does not use {', '.join(map(str, unused))}")
    return program
