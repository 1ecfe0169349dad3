"""What needs not wait for each other in one forward, or apart: `python -m bench.training.joint [--json] [--rounds N]`.

"scores": what distribution matching asks of the base at once: critic, teacher, and teacher without its condition, each
with its own adapter and prompt; one forward of three samples through per-sample slots, or the critic's and then the
teacher's two. "rollouts": the student's samples for a step's five critic updates, each to its own exit step; one
forward a sampler step for all, or each rollout by itself. "ours" is together, "eager" apart, as `clora.distill.step`
does above `JOINT_TOKENS` tokens; plain torch blocks on a CPU, the fused ones on a GPU. On a CPU the sizes are two
layers of full width in bf16 and the tiny base's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.kernels.timing import Case, run
from bench.training.cycle_counts import CRITIC_UPDATES
from bench.training.cycle_models import SIZES, Size, make_data, make_ours, steps_of
from bench.training.train_cycle import flops
from clora.distill.step import Distillation, networks_at
from clora.method.given import CriticSample, ask_scores
from clora.method.noise import Draws, exit_step
from clora.method.objective import critic_samples
from clora.method.routing import step_generator

STEPS = 8  # of preset authors
Way = Callable[[], Iterable[Tensor | None]]


def check(joint: Way, separate: Way) -> None:
    """Raise AssertionError unless both ways give the same, up to roundings."""
    for got, want in zip(joint(), separate(), strict=True):
        assert got is not None and want is not None
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def scores(ours: Distillation, step: int) -> tuple[Way, Way]:
    """Together and apart."""
    batch, _ = ours.batches.draw(step, "effect", "student")
    x_sigma = torch.randn(1, *batch.latent_shape, device=ours.batches.device)
    nets, sigma = networks_at(ours, step), torch.full((1,), 0.5, device=x_sigma.device)
    ways = [
        partial(ask_scores, one, batch, ours.config.objective, x_sigma, sigma)
        for one in (nets, replace(nets, scores=None))
    ]
    return ways[0], ways[1]


def rollout_draws(device: torch.device | str) -> list[Draws]:
    """What the rollouts draw from, their exit steps first."""
    return [Draws.alone(step_generator(0, 0, f"bench/{k}", device), 1) for k in range(CRITIC_UPDATES)]


def rollouts(ours: Distillation, step: int) -> tuple[Way, Way]:
    """Together and apart."""
    batches = [ours.batches.draw(step, "effect", "critic", k, CRITIC_UPDATES)[0] for k in range(CRITIC_UPDATES)]
    nets, device = networks_at(ours, step), ours.batches.device

    def samples(at_once: int) -> list[Tensor]:
        draws = rollout_draws(device)
        found: list[CriticSample] = []
        for first in range(0, CRITIC_UPDATES, at_once):
            these = slice(first, first + at_once)
            found += critic_samples(nets, batches[these], ours.config, draws[these])
        return [sample.x0 for sample in found]

    return partial(samples, CRITIC_UPDATES), partial(samples, 1)


def make_cases(name: str, size: Size, device: str) -> list[Case]:
    ours = replace(make_ours(make_data(size, CRITIC_UPDATES), device), joint_tokens=float("inf"))
    step = next(steps_of(ours.batches, "effect"))
    weights = sum(parameter.nbytes for parameter in ours.models.backbone.transformer.parameters())
    per_sample = int(flops(size).forwards)
    cases = []
    drawn = sum(exit_step(STEPS, draws) + 1 for draws in rollout_draws(device))
    for what, ways, samples in (("scores", scores, 3), ("rollouts", rollouts, drawn)):
        joint, separate = ways(ours, step)
        title = f"{what}, {name}, {size.sequence} tokens a sample"
        gate = partial(check, joint, separate)
        cases.append(Case(title, gate, {"ours": joint, "eager": separate}, weights, samples * per_sample))
    return cases


def all_cases(device: str) -> list[Case]:
    names = ["full-width-20"] if device == "cuda" else ["tiny", "full-width-2"]
    return [case for name in names for case in make_cases(name, SIZES[name], device)]


if __name__ == "__main__":
    run("joint", __doc__, all_cases)
