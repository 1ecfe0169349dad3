"""The training schedule of the paper's authors, in our own words.

It is what `bench.training.train_cycle` measures clora against.

Three copies of the transformer: the student and the critic (fake score), each with a PEFT adapter that learns, and the
real score, whose adapter takes an effect's teacher by loading its tensors and is switched off in the general stream.
Every rollout runs all steps and uses one state; general steps run target simulation and TA-FM and multiply them by 0,
so that all ranks do the same work; a text mask is always passed. One generator update is 16 forwards and 3 backwards,
one critic update 9 and 1. Only data (`DistillBatch`, `Cond`, `LoraModule`) comes from clora, no mathematics: that the
losses agree with clora's is a test of both.

What is not known of their code is chosen in their favour: the copies are not sharded, a teacher is loaded only when
the effect changes, latents stay on the device, and random numbers are drawn before they are needed.

Shapes: latents (B, T, C), sigma (B,) in [0, 1] with 1 = noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from clora.backbones.cond import Cond
from clora.lora.module import LoraModule
from clora.method.given import DistillBatch

# The eight steps, shifted by 3 and cut to thousandths as their code cuts them.
SIGMAS = (1.0, 0.954, 0.9, 0.833, 0.75, 0.642, 0.5, 0.3)
TARGET_STEPS = 5  # target simulation takes one of the last five
SHIFT = 3.0
GUIDANCE_ON_TOP = 4.0  # cond + 4 (cond - uncond)
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 10.0

Shape = tuple[int, int, int]
Lora = Mapping[str, LoraModule]


@dataclass(frozen=True)
class Noise:
    """A noise level (B,) and the noise (B, T, C) that goes with it."""

    sigma: Tensor
    eps: Tensor

    def add(self, x0: Tensor) -> Tensor:
        sigma = self.sigma.view(-1, 1, 1)
        return (1 - sigma) * x0 + sigma * self.eps


@dataclass(frozen=True)
class RolloutDraws:
    """The random numbers of one rollout: the step whose state is used, and the noise of every step."""

    step: int
    eps: tuple[Tensor, ...]


@dataclass(frozen=True)
class GeneratorDraws:
    """The random numbers of one generator update. `y` noises the target, `ts` what the student makes of it."""

    rollout: RolloutDraws
    bs: Noise
    y: Noise
    ts: Noise
    ta_fm: Noise


@dataclass(frozen=True)
class CriticDraws:
    """The random numbers of one critic update."""

    rollout: RolloutDraws
    noise: Noise


def draw_generator(shape: Shape, rng: torch.Generator) -> GeneratorDraws:
    """Their laws: DMD uniform and shifted; the critic of target simulation above .5 and then shifted; TA-FM uniform
    above the DMD sigma of the same step and shifted a second time."""
    bs = _noise(_shift(_uniform(shape, rng)), shape, rng)
    chosen = torch.randint(len(SIGMAS) - TARGET_STEPS, len(SIGMAS), shape[:1], generator=rng, device=rng.device)
    sigma_y = torch.tensor(SIGMAS, device=rng.device)[chosen]
    return GeneratorDraws(
        rollout=draw_rollout(shape, rng),
        bs=bs,
        y=_noise(sigma_y, shape, rng),
        ts=_noise(_shift(0.5 + 0.5 * _uniform(shape, rng)), shape, rng),
        ta_fm=_noise(_shift(bs.sigma + (1 - bs.sigma) * _uniform(shape, rng)), shape, rng),
    )


def draw_critic(shape: Shape, rng: torch.Generator) -> CriticDraws:
    return CriticDraws(draw_rollout(shape, rng), _noise(_shift(_uniform(shape, rng)), shape, rng))


def draw_rollout(shape: Shape, rng: torch.Generator) -> RolloutDraws:
    step = int(torch.randint(len(SIGMAS), (), generator=rng, device=rng.device))
    return RolloutDraws(step, tuple(_normal(shape, rng) for _ in SIGMAS))


class AuthorsSchedule:
    """Three copies of a transformer and two optimizers. `base` becomes the real score; two copies are made of it."""

    def __init__(
        self,
        base: Any,
        student: Lora,
        critic: Lora,
        teachers: Mapping[str, Lora],
        targets: Sequence[str],
        encode: Callable[[int], None] | None = None,
        checkpointing: bool = True,
    ) -> None:
        """`encode(n)` does the work of encoding n prompts and the images, which they do at every update; None leaves
        it out."""
        base.requires_grad_(False)
        rank = next(iter(student.values())).rank
        self.student, self.critic, self.real = copy.deepcopy(base), copy.deepcopy(base), base
        for model in (self.student, self.critic, self.real):
            # PEFT keeps the adapter in the base's own type: bf16 weights without an fp32 master, as theirs.
            model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
            if checkpointing:
                model.enable_gradient_checkpointing()
        self.real.requires_grad_(False)
        load_adapter(self.student, student)
        load_adapter(self.critic, critic)
        self.optimizers = {id(model): _adamw(model) for model in (self.student, self.critic)}
        self._teachers, self._loaded = teachers, ""
        self._encode = encode
        self.sigmas = SIGMAS

    def generator_update(self, batch: DistillBatch, draws: GeneratorDraws) -> None:
        """One update of the student."""
        if self._encode is not None:
            self._encode(3)  # the student's, the teacher's and the negative prompt
        self._update(self.student, self.generator_loss(batch, draws)[0])

    def generator_loss(self, batch: DistillBatch, draws: GeneratorDraws) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss, and its terms by name."""
        self._seat_teacher(batch)
        cond = batch.student_cond
        # A general sample has no target: the dummy branches take zeros.
        y = torch.zeros_like(draws.y.eps) if batch.y is None else batch.y
        x0 = self.rollout(cond, draws.rollout)
        y_sigma = draws.y.add(y)
        y_hat = y_sigma - draws.y.sigma.view(-1, 1, 1) * velocity(self.student, y_sigma, draws.y.sigma, cond)
        terms = {
            "dmd_bs": self._dmd(x0, draws.bs, batch),
            "dmd_ts": self._dmd(y_hat, draws.ts, batch),
            "ta_fm": _flow_matching(self.student, y, draws.ta_fm, cond),
        }
        # The general stream's target simulation and TA-FM count for nothing; they keep the ranks in step.
        weight = 1.0 if batch.stream == "effect" else 0.0
        return terms["dmd_bs"] + weight * (terms["dmd_ts"] + terms["ta_fm"]), terms

    def critic_update(self, batch: DistillBatch, draws: CriticDraws) -> None:
        """One update of the critic."""
        if self._encode is not None:
            self._encode(1)  # the critic reads the student's prompt alone
        self._update(self.critic, self.critic_loss(batch, draws))

    def critic_loss(self, batch: DistillBatch, draws: CriticDraws) -> Tensor:
        """Flow matching on a rollout of the critic update's own."""
        with torch.no_grad():
            x0 = self.rollout(batch.student_cond, draws.rollout)
        return _flow_matching(self.critic, x0, draws.noise, batch.student_cond)

    def rollout(self, cond: Cond, draws: RolloutDraws) -> Tensor:
        """x0 at the drawn step, with grad through its last forward: the states of all steps are made before."""
        states = [draws.eps[0]]
        sigmas = [torch.full_like(draws.eps[0][:, 0, 0], sigma) for sigma in self.sigmas]
        with torch.no_grad():
            for k, eps in enumerate(draws.eps[1:]):
                x0 = states[k] - sigmas[k].view(-1, 1, 1) * velocity(self.student, states[k], sigmas[k], cond)
                states.append(Noise(sigmas[k + 1], eps).add(x0))
        x_sigma, sigma = states[draws.step], sigmas[draws.step]
        return x_sigma - sigma.view(-1, 1, 1) * velocity(self.student, x_sigma, sigma, cond)

    def _dmd(self, x0: Tensor, noise: Noise, batch: DistillBatch) -> Tensor:
        """Distribution matching as in DMD2, with three forwards: critic, real score on its prompt and on none."""
        with torch.no_grad():
            x_sigma, sigma = noise.add(x0), noise.sigma.view(-1, 1, 1)
            fake = x_sigma - sigma * velocity(self.critic, x_sigma, noise.sigma, batch.student_cond)
            cond = x_sigma - sigma * velocity(self.real, x_sigma, noise.sigma, batch.teacher_cond)
            uncond = x_sigma - sigma * velocity(self.real, x_sigma, noise.sigma, batch.uncond)
            to_real = x0 - (cond + GUIDANCE_ON_TOP * (cond - uncond))
            grad = torch.nan_to_num((to_real - (x0 - fake)) / to_real.abs().mean((1, 2), keepdim=True))
        return 0.5 * F.mse_loss(x0, (x0 - grad).detach())

    def _seat_teacher(self, batch: DistillBatch) -> None:
        effect = batch.teacher_cond.effects[0]
        if effect is None:
            self.real.disable_adapters()
            return
        self.real.enable_adapters()
        if effect != self._loaded:
            load_adapter(self.real, self._teachers[effect])
            self._loaded = effect

    def _update(self, model: nn.Module, loss: Tensor) -> None:
        loss.backward()
        optimizer = self.optimizers[id(model)]
        parameters = optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def velocity(model: Any, x_BTC: Tensor, sigma_B: Tensor, cond: Any) -> Tensor:
    """eps - x0 as the transformer predicts it, with the text mask that is always passed, all ones or not."""
    dtype, text = model.dtype, cond.text_BLD
    mask = cond.text_mask_BL
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
    shapes = [(1, height, width) for height, width in (cond.grid, *cond.ref_grids)]
    v: Tensor = model(
        hidden_states=torch.cat([part.to(dtype) for part in (x_BTC, *cond.refs)], dim=1),
        timestep=(sigma_B * 1000).to(dtype) / 1000,
        encoder_hidden_states=text.to(dtype),
        encoder_hidden_states_mask=mask,
        img_shapes=[shapes] * len(x_BTC),
        return_dict=False,
    )[0]
    return v[:, : x_BTC.shape[1]].to(x_BTC.dtype)


@torch.no_grad()
def load_adapter(model: nn.Module, lora: Lora) -> None:
    """Copy a LoRA whose alpha is its rank, and which covers every adapted linear, into the PEFT adapter."""
    for name, module in lora.items():
        layer: Any = model.get_submodule(name)
        layer.lora_A["default"].weight.copy_(module.A)
        layer.lora_B["default"].weight.copy_(module.B)


def _flow_matching(model: nn.Module, x0: Tensor, noise: Noise, cond: Cond) -> Tensor:
    return F.mse_loss(velocity(model, noise.add(x0), noise.sigma, cond), noise.eps - x0)


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.999))


def _shift(u: Tensor) -> Tensor:
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def _noise(sigma: Tensor, shape: Shape, rng: torch.Generator) -> Noise:
    return Noise(sigma, _normal(shape, rng))


def _normal(shape: Shape, rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng, device=rng.device)


def _uniform(shape: Shape, rng: torch.Generator) -> Tensor:
    return torch.rand(shape[0], generator=rng, device=rng.device)
