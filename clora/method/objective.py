"""The objectives of the method, in the paper's order: Eq. 6, 7, 1, 8, 9, and the critic's own loss.

Student, critic and teacher come in as velocities (`clora.method.flow.Velocity`), so that the same code runs on a
20B transformer and on a closed-form toy. All randomness comes from `rng`: one step is a pure function of the
weights, the batch and the generators' states. `docs/METHOD.md` maps every equation and preset to these lines.

Shapes: latents (B, T, C) packed tokens in fp32, sigma (B,) fp32 with 1 = noise and 0 = data.

`rng` is a generator, or `routing.Draws` where several processes share a batch. Each then has its rows of it, and the
loss and every figure are its share: their sums over the processes are those of the whole batch. What decides how many
forwards run (the exit step, the critic's kind of sample) is drawn alike on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clora.errors import InputError
from clora.method.flow import Velocity, add_noise, few_step_sigmas, shift_sigma
from clora.method.losses import Figures, dmd_loss, flow_matching_loss
from clora.method.noise import (
    DistillConfig,
    Draws,
    Rng,
    as_draws,
    chance,
    draw_dmd_sigma,
    draw_ta_fm_sigma,
    draw_ts_critic_sigma,
    draw_ts_gen_sigma,
    exit_step,
    normal,
    uniform,
)
from clora.method.routing import Stream
from clora.method.simulate import backward_simulate, backward_simulate_together, target_simulate

Loss = tuple[Tensor, Figures]
Backward = Callable[[Tensor], None]


class CriticSample(NamedTuple):
    """What the critic learns from: x0 (B, T, C), and whether it was simulated from targets."""

    x0: Tensor
    on_target: bool


@dataclass(frozen=True)
class Networks:
    """The three velocities of one step. The teacher takes each sample's effect, or none, from its cond."""

    student: Velocity
    critic: Velocity
    teacher: Velocity
    # Joins conds along the batch, for the guided teacher's one call and for rollouts of several batches; needed only
    # when guidance is not 1.
    cat_conds: Callable[[Sequence[Any]], Any] | None = None
    # What TA-FM takes for y, and the samples' weights (B, 1, 1), from (y, eps, x_sigma, sigma, teacher's cond); needed
    # only to extend a collection.
    anchor: Callable[[Tensor, Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]] | None = None
    # scores(x_sigma, sigma, student_cond, teacher_conds): the critic's velocity and the teacher's for each of its
    # conds, in one call; None asks one after the other.
    scores: Callable[[Tensor, Tensor, Any, list[Any]], list[Tensor]] | None = None


@dataclass(frozen=True)
class DistillBatch:
    """One step's data. Student and critic see `student_cond`, the teacher its own prompt (Eq. 5)."""

    stream: Stream
    student_cond: Any
    teacher_cond: Any
    uncond: Any | None  # the teacher with the negative prompt; None when guidance is 1
    latent_shape: tuple[int, int]  # (T, C)
    batch_size: int
    samples: Sequence[str]  # what each is, for messages
    step: int
    y: Tensor | None = None  # (B, T, C), the teacher's images; None in the general stream
    # A batch of its own for TA-FM, usually larger (it costs one forward); y and student_cond when None.
    anchor_y: Tensor | None = None
    anchor_cond: Any | None = None
    anchor_teacher_cond: Any | None = None  # the same with the teacher's prompt; only `Networks.anchor` reads it


def total_loss(
    nets: Networks,
    batch: DistillBatch,
    cfg: DistillConfig,
    rng: Rng,
    backward: Backward | None = None,
    x0_student: Tensor | None = None,
) -> Loss:
    """Eq. 9: the loss of one student step.

    `backward` is called with each weighted term as soon as it is there, so that only one term's graph is in memory
    at a time; the loss returned is then without grad. `x0_student`: see `dmd_bs_loss`.

    Returns:
        The 0-d loss, and detached 0-d figures: `total_loss` and those of each term that ran.

    Raises:
        InputError: every weight of this stream is 0.
    """
    if batch.stream == "general":  # teacher = the base, adapters off
        weight = cfg.objective.dmd_bs_weight
        loss, figures = _weighted_sum(
            batch, backward, (weight, lambda: dmd_bs_loss(nets, batch, cfg, rng, None, x0_student))
        )
    else:  # teacher = effect i
        loss, figures = c2f_do_loss(nets, batch, cfg, rng, backward, x0_student)
    return loss, {"total_loss": loss.detach(), **figures}


def c2f_do_loss(
    nets: Networks,
    batch: DistillBatch,
    cfg: DistillConfig,
    rng: Rng,
    backward: Backward | None = None,
    x0_student: Tensor | None = None,
) -> Loss:
    """Eq. 8, with weights: TA-FM + DMD-TS + DMD-BS. A term of weight 0 is not computed.

    `backward` and `x0_student` as in `total_loss`.
    """
    objective = cfg.objective
    draws = as_draws(rng, batch.batch_size)
    sigma_all = draw_dmd_sigma(draws.rows.total, objective, draws.generator)
    sigma_dmd = draws.own(sigma_all)
    return _weighted_sum(
        batch,
        backward,
        (objective.ta_fm_weight, lambda: ta_fm_loss(nets, batch, cfg, rng, sigma_all)),
        (objective.dmd_ts_weight, lambda: dmd_ts_loss(nets, batch, cfg, rng)),
        (objective.dmd_bs_weight, lambda: dmd_bs_loss(nets, batch, cfg, rng, sigma_dmd, x0_student)),
    )


def ta_fm_loss(
    nets: Networks,
    batch: DistillBatch,
    cfg: DistillConfig,
    rng: Rng,
    sigma_dmd: Tensor | None = None,
) -> Loss:
    """Eq. 6, trajectory anchoring: flow matching of the student on the teacher's images. 1 forward.

    `sigma_dmd`, of the whole batch, is read only by `ta_fm_sigma: above_dmd`; None draws it anew.
    """
    if batch.anchor_y is None:
        y, cond, teacher_cond = _targets(batch, "TA-FM"), batch.student_cond, batch.teacher_cond
    else:
        y, cond, teacher_cond = batch.anchor_y, batch.anchor_cond, batch.anchor_teacher_cond
    draws = as_draws(rng, len(y)).anchors()
    sigma = draw_ta_fm_sigma(len(y), cfg, draws, sigma_dmd)
    eps = normal(y.shape, draws)
    x_sigma = add_noise(y, eps, sigma)
    v_student = nets.student(x_sigma, sigma, cond)
    if nets.anchor is not None:
        y, weight = nets.anchor(y, eps, x_sigma, sigma, teacher_cond)
        v_student, y, eps = (weight.sqrt() * part for part in (v_student, y, eps))
    loss, _ = flow_matching_loss(v_student, y, eps)
    return _own_share(loss, {"ta_fm_loss": loss.detach()}, draws)


def dmd_ts_loss(nets: Networks, batch: DistillBatch, cfg: DistillConfig, rng: Rng) -> Loss:
    """Eq. 7, target-simulated distribution matching. Student 1, critic 1, teacher 1 forward (2 guided)."""
    y = _targets(batch, "DMD-TS")
    sigma_gen = draw_ts_gen_sigma(len(y), cfg, rng)
    y_hat = target_simulate(nets.student, y, batch.student_cond, sigma_gen, normal(y.shape, rng))
    sigma_critic = draw_ts_critic_sigma(len(y), cfg.objective, rng)
    return _match_distributions("dmd_ts", y_hat, sigma_critic, nets, batch, cfg, rng)


def dmd_bs_loss(
    nets: Networks,
    batch: DistillBatch,
    cfg: DistillConfig,
    rng: Rng,
    sigma: Tensor | None = None,
    x0_student: Tensor | None = None,
) -> Loss:
    """Eq. 1, distribution matching of backward-simulated samples.

    Student k + 1 forwards for the drawn exit step k, critic 1, teacher 1 (2 guided). `sigma` (B,) is the
    critic's noise level; None draws it. `x0_student`: the batch's `student_sample`, with its grad, where it was made
    before.
    """
    if x0_student is None:
        x0_student = student_sample(nets, batch, cfg, rng)
    if sigma is None:
        sigma = draw_dmd_sigma(batch.batch_size, cfg.objective, rng)
    return _match_distributions("dmd_bs", x0_student, sigma, nets, batch, cfg, rng)


def critic_loss(
    nets: Networks,
    batch: DistillBatch,
    cfg: DistillConfig,
    rng: Rng,
    sample: CriticSample | None = None,
) -> Loss:
    """The critic's update: flow matching (Eq. 2) on the student's samples, which carry no grad.

    `sample`: the batch's of `critic_samples`, where they were made before.

    Returns:
        The 0-d loss, and `{"critic_loss", "critic_on_target"}` (1 for an update on target-simulated samples).
    """
    x0, on_target = critic_samples(nets, [batch], cfg, [rng])[0] if sample is None else sample
    x0 = x0.detach()
    sigma = shift_sigma(uniform(batch.batch_size, 0.0, 1.0, rng), cfg.objective.critic_sigma_shift)
    eps = normal(x0.shape, rng)
    v_critic = nets.critic(add_noise(x0, eps, sigma), sigma, batch.student_cond)
    loss, _ = flow_matching_loss(v_critic, x0, eps)
    figures = {"critic_loss": loss.detach(), "critic_on_target": loss.new_tensor(float(on_target))}
    return _own_share(loss, figures, as_draws(rng, batch.batch_size))


@torch.no_grad()
def critic_samples(
    nets: Networks, batches: Sequence[DistillBatch], cfg: DistillConfig, rngs: Sequence[Rng]
) -> list[CriticSample]:
    """The student's samples x0 (B, T, C) that the critic learns from, for batches with a source of numbers each.

    They are backward simulated, all batches together; on effect steps a share `critic_target_share` of the batches has
    target-simulated ones (Eq. 7's y-hat) instead, for the critic is asked about those too.
    """
    share = cfg.objective.critic_target_share
    found: dict[int, CriticSample] = {}
    for i, (batch, rng) in enumerate(zip(batches, rngs, strict=True)):
        if batch.stream == "effect" and chance(share, rng):
            y = _targets(batch, "critic_target_share")
            sigma_gen = draw_ts_gen_sigma(len(y), cfg, rng)
            eps = normal(y.shape, rng)
            found[i] = CriticSample(target_simulate(nets.student, y, batch.student_cond, sigma_gen, eps), True)
    left = [i for i in range(len(batches)) if i not in found]
    samples = student_samples(nets, [batches[i] for i in left], cfg, [rngs[i] for i in left])
    found |= {i: CriticSample(x0, False) for i, x0 in zip(left, samples, strict=True)}
    return [found[i] for i in range(len(batches))]


def ask_scores(
    nets: Networks, batch: DistillBatch, cfg: DistillConfig, x_sigma: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The velocities of critic, teacher, and teacher without its condition (None at guidance 1), without grad.

    The teacher's two are one call of twice the batch; all three are where `nets.scores` is given.
    """
    guided = cfg.objective.guidance != 1.0
    if guided and (batch.uncond is None or nets.cat_conds is None):
        raise ValueError(
            f"objective.guidance is {cfg.objective.guidance:g}, but the batch has no uncond or the networks no"
            " cat_conds"
        )
    teacher_conds = [batch.teacher_cond, batch.uncond] if guided else [batch.teacher_cond]
    with torch.no_grad():
        if nets.scores is not None:
            v_critic, *v_teacher = nets.scores(x_sigma, sigma, batch.student_cond, teacher_conds)
        else:
            v_critic = nets.critic(x_sigma, sigma, batch.student_cond)
            count = len(teacher_conds)
            cond = nets.cat_conds(teacher_conds) if guided and nets.cat_conds is not None else batch.teacher_cond
            v_teacher = list(nets.teacher(x_sigma.repeat(count, 1, 1), sigma.repeat(count), cond).chunk(count))
    return v_critic, v_teacher[0], v_teacher[1] if guided else None


def student_sample(nets: Networks, batch: DistillBatch, cfg: DistillConfig, rng: Rng) -> Tensor:
    """The batch's backward-simulated samples x0 (B, T, C) at a drawn exit step, the same for all; with grad."""
    sigmas = few_step_sigmas(cfg.schedule.num_steps, cfg.schedule.shift)
    step = exit_step(len(sigmas), rng)
    shape = (batch.batch_size, *batch.latent_shape)
    x0, _ = backward_simulate(
        nets.student, batch.student_cond, normal(shape, rng), step, sigmas, lambda _: normal(shape, rng)
    )
    return x0


def student_samples(
    nets: Networks, batches: Sequence[DistillBatch], cfg: DistillConfig, rngs: Sequence[Rng]
) -> list[Tensor]:
    """`student_sample` of several batches with a source of numbers each, without grad; several in one forward a
    sampler step."""
    if len(batches) < 2 or nets.cat_conds is None:
        with torch.no_grad():
            return [student_sample(nets, batch, cfg, rng) for batch, rng in zip(batches, rngs, strict=True)]
    sigmas = few_step_sigmas(cfg.schedule.num_steps, cfg.schedule.shift)
    shapes = [(batch.batch_size, *batch.latent_shape) for batch in batches]
    steps = [exit_step(len(sigmas), rng) for batch, rng in zip(batches, rngs, strict=True)]
    return backward_simulate_together(
        nets.student,
        [batch.student_cond for batch in batches],
        nets.cat_conds,
        [normal(shape, rng) for shape, rng in zip(shapes, rngs, strict=True)],
        steps,
        sigmas,
        lambda i, _: normal(shapes[i], rngs[i]),
    )


def _match_distributions(
    name: str,
    x0_student: Tensor,
    sigma: Tensor,
    nets: Networks,
    batch: DistillBatch,
    cfg: DistillConfig,
    rng: Rng,
) -> Loss:
    """Noise the student's sample, ask critic and teacher, and turn their difference into a loss."""
    objective = cfg.objective
    with torch.no_grad():
        x_sigma = add_noise(x0_student, normal(x0_student.shape, rng), sigma)
    v_critic, v_cond, v_uncond = ask_scores(nets, batch, cfg, x_sigma, sigma)
    loss, figures = dmd_loss(
        x0_student, x_sigma, sigma, v_critic, v_cond, v_uncond,
        guidance=objective.guidance, rescale=objective.guidance_rescale,
        norm=objective.dmd_norm, norm_floor=objective.dmd_norm_floor,
    )  # fmt: skip
    figures = {f"{name}_loss": loss.detach(), **{f"{name}_{key}": v for key, v in figures.items()}}
    return _own_share(loss, figures, as_draws(rng, batch.batch_size))


def _weighted_sum(batch: DistillBatch, backward: Backward | None, *terms: tuple[float, Callable[[], Loss]]) -> Loss:
    losses, figures = [], {}
    for weight, term in terms:
        if weight != 0:
            loss, figures_of_term = term()
            losses.append(weight * loss)
            figures.update(figures_of_term)
            if backward is not None:
                backward(losses[-1])
                del loss
                losses[-1] = losses[-1].detach()
    if not losses:
        raise InputError(
            f"objective: step {batch.step} is of the {batch.stream} stream, whose weights are all 0: raise"
            " one (dmd_bs_weight serves both streams), or set p_switch so that this stream is not drawn"
        )
    return torch.stack(losses).sum(), figures


def _targets(batch: DistillBatch, what: str) -> Tensor:
    if batch.y is None:
        raise ValueError(f"{what} needs target images y, and the batch of step {batch.step} has none")
    return batch.y


def _own_share(loss: Tensor, figures: Figures, draws: Draws) -> Loss:
    """A mean over this process's rows as its part of the whole batch's mean."""
    share = draws.rows.share
    return (loss, figures) if share == 1.0 else (loss * share, {name: v * share for name, v in figures.items()})
