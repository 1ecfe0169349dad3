"""Critic and teacher in one forward, or in two: `python -m bench.joint_scores [--json] [--rounds N]`.

What distribution matching asks of the base at once: critic, teacher, and teacher without its condition, each with its
own adapter and prompt. "ours" is one forward of three samples through per-sample slots, "eager" the critic's
and then the teacher's two, as `clora.distill` does above `JOINT_TOKENS` tokens; plain torch blocks on a CPU, the fused
ones on a GPU. On a CPU the sizes are two layers of full width in bf16 and the tiny base's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.cycle_counts import CRITIC_UPDATES
from bench.cycle_models import SIZES, Size, make_data, make_ours, steps_of
from bench.timing import Case, run
from bench.train_cycle import flops
from clora.distill import Distiller
from clora.objective import DistillBatch, Networks, ask_scores


def ask(nets: Networks, batch: DistillBatch, ours: Distiller, x_sigma: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return ask_scores(nets, batch, ours.config, x_sigma, torch.full((len(x_sigma),), 0.5, device=x_sigma.device))


def check(joint: Callable[[], tuple[Tensor | None, ...]], separate: Callable[[], tuple[Tensor | None, ...]]) -> None:
    """Raise AssertionError unless both ways give the same velocities, up to roundings."""
    for got, want in zip(joint(), separate(), strict=True):
        assert got is not None and want is not None
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def make_case(name: str, size: Size, device: str) -> Case:
    ours = make_ours(make_data(size, CRITIC_UPDATES), device)
    step = next(steps_of(ours, "effect"))
    batch, _ = ours.batch(step, "effect", "student")
    x_sigma = torch.randn(1, *batch.latent_shape, device=device)
    ours._joint_scores = True
    joint = partial(ask, ours.networks(step), batch, ours, x_sigma)
    separate = partial(ask, replace(ours.networks(step), scores=None), batch, ours, x_sigma)
    weights = sum(parameter.nbytes for parameter in ours.backbone.transformer.parameters())
    gate = partial(check, joint, separate)
    title = f"{name}, {size.sequence} tokens a sample"
    return Case(title, gate, {"ours": joint, "eager": separate}, weights, 3 * int(flops(size).forwards))


def all_cases(device: str) -> list[Case]:
    names = ["full-width-20"] if device == "cuda" else ["tiny", "full-width-2"]
    return [make_case(name, SIZES[name], device) for name in names]


if __name__ == "__main__":
    run("joint_scores", __doc__, all_cases)
