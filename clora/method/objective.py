"""The objectives of the method, in the paper's order: Eq. 9, 8, 6, 7, 1, and the critic's own loss.

Student, critic and teacher come in as velocities (`clora.method.flow.Velocity`), so that the same code runs on a
20B transformer and on a closed-form toy. All randomness comes from `draws`: one step is a pure function of the
weights, the batch and the generators' states. `docs/METHOD.md` maps every equation and preset to these lines.

Shapes: latents (B, T, C) packed tokens in fp32, sigma (B,) fp32 with 1 = noise and 0 = data.

Where several processes share a batch, each has its rows of it (`draws.rows`), and the loss and every figure are its
share: their sums over the processes are those of the whole batch. What decides how many forwards run (the exit step,
the critic's kind of sample) is drawn alike on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from clora.config import ObjectiveConfig
from clora.errors import InputError
from clora.method.flow import add_noise, shift_sigma
from clora.method.given import CriticSample, DistillBatch, Networks, Query, anchor_of, ask_scores, ask_teacher
from clora.method.losses import Figures, dmd_loss, flow_matching_loss, velocity_loss
from clora.method.noise import (
    DistillConfig,
    Draws,
    chance,
    draw_dmd_sigma,
    draw_schedule,
    draw_ta_fm_sigma,
    draw_ts_critic_sigma,
    draw_ts_gen_sigma,
    exit_step,
    fresh_noise,
    matched_steps,
    normal,
    own_share,
    uniform,
)
from clora.method.routing import Stream
from clora.method.simulate import backward_simulate, backward_simulate_together, target_simulate

Loss = tuple[Tensor, Figures]


# The student's losses. What stands in TA-FM's place takes the same arguments.
AnchorLoss = Callable[[Networks, DistillBatch, DistillConfig, Draws, Tensor | None], Loss]


def ta_fm_loss(
    nets: Networks, batch: DistillBatch, cfg: DistillConfig, draws: Draws, sigma_dmd: Tensor | None = None
) -> Loss:
    """Eq. 6, trajectory anchoring: flow matching of the student on the teacher's images. 1 forward.

    `sigma_dmd`, of the whole batch, is read only by `ta_fm_sigma: above_dmd`; None draws it anew.
    """
    anchor, draws = anchor_of(batch), draws.anchors()
    y = _targets(anchor.y, "TA-FM", batch)
    eps, query = noise_anchor(y, anchor.student_cond, cfg, draws, sigma_dmd)
    loss, _ = flow_matching_loss(nets.student(*query), y, eps)
    return own_share(loss, {"ta_fm_loss": loss.detach()}, draws)


def teacher_velocity_loss(
    nets: Networks, batch: DistillBatch, cfg: DistillConfig, draws: Draws, sigma_dmd: Tensor | None = None
) -> Loss:
    """In TA-FM's place, at the same points: the teacher's own velocity, not the one that leads to its image. In the
    mean over noise the two are one wherever the images are the teacher's, but this gradient has none of that noise.
    Student 1 forward, teacher 1 (2 guided).
    """
    anchor, draws = anchor_of(batch), draws.anchors()
    _, query = noise_anchor(_targets(anchor.y, "the coarse stage", batch), anchor.student_cond, cfg, draws, sigma_dmd)
    v_student = nets.student(*query)
    loss, _ = velocity_loss(v_student, ask_teacher(nets, anchor, cfg.objective, query.x_sigma, query.sigma))
    return own_share(loss, {"velocity_loss": loss.detach()}, draws)


def total_loss_terms(
    nets: Networks,
    batch: DistillBatch,
    cfg: DistillConfig,
    draws: Draws,
    x0_student: Tensor | None = None,
    anchor_loss: AnchorLoss = ta_fm_loss,
) -> Iterator[Loss]:
    """Eq. 9, the loss of one student step, a weighted term at a time.

    Each term is made when it is asked for: where the one before was walked back and let go, only one graph is in
    memory. A term of weight 0 is not computed.

    Args:
        x0_student: see `dmd_bs_loss`.
        anchor_loss: what stands in TA-FM's place.

    Yields:
        The 0-d term, weighted, and its detached 0-d figures without the weight.

    Raises:
        InputError: every weight of this stream is 0.
    """
    objective = cfg.objective
    if not has_terms(objective, batch.stream):
        raise InputError(
            f"objective: step {batch.step} is of the {batch.stream} stream, whose weights are all 0: raise one"
            " (dmd_bs_weight and imitation_weight serve both streams), or set p_switch so that this stream is not drawn"
        )
    if batch.stream == "effect":  # teacher = effect i
        yield from c2f_do_loss_terms(nets, batch, cfg, draws, x0_student, anchor_loss)
    else:  # teacher = the base, adapters off
        yield _weighted(objective.dmd_bs_weight, dmd_bs_loss(nets, batch, cfg, draws, None, x0_student))


def has_terms(objective: ObjectiveConfig, stream: Stream) -> bool:
    """Whether a term of Eq. 9 has a weight in this stream."""
    effect_weights = (objective.ta_fm_weight, objective.dmd_ts_weight) if stream == "effect" else ()
    return any((*effect_weights, objective.dmd_bs_weight))


def c2f_do_loss_terms(
    nets: Networks,
    batch: DistillBatch,
    cfg: DistillConfig,
    draws: Draws,
    x0_student: Tensor | None = None,
    anchor_loss: AnchorLoss = ta_fm_loss,
) -> Iterator[Loss]:
    """Eq. 8, with weights: TA-FM + DMD-TS + DMD-BS, as `total_loss_terms` yields them."""
    objective = cfg.objective
    sigma_dmd = draw_dmd_sigma(objective, draws.whole())
    if objective.ta_fm_weight:
        yield _weighted(objective.ta_fm_weight, anchor_loss(nets, batch, cfg, draws, sigma_dmd))
    if objective.dmd_ts_weight:
        yield _weighted(objective.dmd_ts_weight, dmd_ts_loss(nets, batch, cfg, draws))
    if objective.dmd_bs_weight:
        own = draws.own(sigma_dmd)
        yield _weighted(objective.dmd_bs_weight, dmd_bs_loss(nets, batch, cfg, draws, own, x0_student))


def dmd_ts_loss(nets: Networks, batch: DistillBatch, cfg: DistillConfig, draws: Draws) -> Loss:
    """Eq. 7, target-simulated distribution matching. Student 1, critic 1, teacher 1 forward (2 guided)."""
    y_hat = _target_simulated(nets, _targets(batch.y, "DMD-TS", batch), batch, cfg, draws)
    sigma_critic = draw_ts_critic_sigma(cfg.objective, draws)
    return _match_distributions("dmd_ts", y_hat, sigma_critic, nets, batch, cfg, draws)


def dmd_bs_loss(
    nets: Networks,
    batch: DistillBatch,
    cfg: DistillConfig,
    draws: Draws,
    sigma: Tensor | None = None,
    x0_student: Tensor | None = None,
) -> Loss:
    """Eq. 1, distribution matching of backward-simulated samples.

    Student k + 1 forwards for the drawn exit step k, critic 1, teacher 1 (2 guided). `sigma` (B,) is the
    critic's noise level; None draws it. `x0_student`: the batch's `student_sample`, with its grad, where it was made
    before.
    """
    if x0_student is None:
        x0_student = student_sample(nets, batch, cfg, draws)
    if sigma is None:
        sigma = draw_dmd_sigma(cfg.objective, draws)
    return _match_distributions("dmd_bs", x0_student, sigma, nets, batch, cfg, draws)


def critic_loss(
    nets: Networks, batch: DistillBatch, cfg: DistillConfig, draws: Draws, sample: CriticSample | None = None
) -> Loss:
    """The critic's update: flow matching (Eq. 2) on the student's samples, which carry no grad.

    `sample`: the batch's of `critic_samples`, where they were made before.

    Returns:
        The 0-d loss, and `{"critic_loss", "critic_on_target"}` (1 for an update on target-simulated samples).
    """
    x0, on_target = critic_samples(nets, [batch], cfg, [draws])[0] if sample is None else sample
    x0 = x0.detach()
    sigma = shift_sigma(uniform(0.0, 1.0, draws), cfg.objective.critic_sigma_shift)
    eps = normal(x0.shape[1:], draws)
    v_critic = nets.critic(add_noise(x0, eps, sigma), sigma, batch.student_cond)
    loss, _ = flow_matching_loss(v_critic, x0, eps)
    figures = {"critic_loss": loss.detach(), "critic_on_target": loss.new_tensor(float(on_target))}
    return own_share(loss, figures, draws)


# Their parts.


def noise_anchor(
    y: Tensor, cond: Any, cfg: DistillConfig, draws: Draws, sigma_dmd: Tensor | None
) -> tuple[Tensor, Query]:
    """Where TA-FM asks the student: the noise (B, T, C), and the images y noised with it, at drawn levels."""
    sigma = draw_ta_fm_sigma(cfg, draws, sigma_dmd)
    eps = normal(y.shape[1:], draws)
    return eps, Query(add_noise(y, eps, sigma), sigma, cond)


@torch.no_grad()
def critic_samples(
    nets: Networks, batches: Sequence[DistillBatch], cfg: DistillConfig, draws: Sequence[Draws]
) -> list[CriticSample]:
    """The student's samples x0 (B, T, C) that the critic learns from, for batches with random numbers each.

    They are backward simulated, all batches together; on effect steps a share `critic_target_share` of the batches has
    target-simulated ones (Eq. 7's y-hat) instead, for the critic is asked about those too.
    """
    share = cfg.objective.critic_target_share
    found: dict[int, CriticSample] = {}
    for i, (batch, own) in enumerate(zip(batches, draws, strict=True)):
        if batch.stream == "effect" and chance(share, own):
            y = _targets(batch.y, "critic_target_share", batch)
            found[i] = CriticSample(_target_simulated(nets, y, batch, cfg, own), True)
    left = [i for i in range(len(batches)) if i not in found]
    samples = student_samples(nets, [batches[i] for i in left], cfg, [draws[i] for i in left])
    found |= {i: CriticSample(x0, False) for i, x0 in zip(left, samples, strict=True)}
    return [found[i] for i in range(len(batches))]


def student_sample(nets: Networks, batch: DistillBatch, cfg: DistillConfig, draws: Draws) -> Tensor:
    """The batch's backward-simulated samples x0 (B, T, C) at a drawn exit step, the same for all; with grad."""
    sigmas = draw_schedule(cfg, draws)
    step = exit_step(matched_steps(cfg, sigmas), draws)
    first = normal(batch.latent_shape, draws)
    x0, _ = backward_simulate(
        nets.student, batch.student_cond, first, step, sigmas, fresh_noise(batch.latent_shape, cfg, draws)
    )
    return x0


def student_samples(
    nets: Networks, batches: Sequence[DistillBatch], cfg: DistillConfig, draws: Sequence[Draws]
) -> list[Tensor]:
    """`student_sample` of several batches with random numbers each, without grad; several in one forward a sampler
    step."""
    if len(batches) < 2 or nets.cat_conds is None:
        with torch.no_grad():
            return [student_sample(nets, batch, cfg, own) for batch, own in zip(batches, draws, strict=True)]
    sigmas = [draw_schedule(cfg, own) for own in draws]
    steps = [exit_step(matched_steps(cfg, levels), own) for levels, own in zip(sigmas, draws, strict=True)]
    return backward_simulate_together(
        nets.student,
        [batch.student_cond for batch in batches],
        nets.cat_conds,
        [normal(batch.latent_shape, own) for batch, own in zip(batches, draws, strict=True)],
        steps,
        sigmas,
        None if cfg.schedule.sampler == "euler" else lambda i, _: normal(batches[i].latent_shape, draws[i]),
    )


def _match_distributions(
    name: str,
    x0_student: Tensor,
    sigma: Tensor,
    nets: Networks,
    batch: DistillBatch,
    cfg: DistillConfig,
    draws: Draws,
) -> Loss:
    """Noise the student's sample, ask critic and teacher, and turn their difference into a loss."""
    objective = cfg.objective
    with torch.no_grad():
        x_sigma = add_noise(x0_student, normal(x0_student.shape[1:], draws), sigma)
    v_critic, v_cond, v_uncond = ask_scores(nets, batch, cfg.objective, x_sigma, sigma)
    loss, figures = dmd_loss(
        x_sigma, sigma, x0_student, v_critic, v_cond, v_uncond,
        guidance=objective.guidance, rescale=objective.guidance_rescale,
        norm=objective.dmd_norm, norm_floor=objective.dmd_norm_floor,
    )  # fmt: skip
    figures = {f"{name}_loss": loss.detach(), **{f"{name}_{key}": v for key, v in figures.items()}}
    return own_share(loss, figures, draws)


def _target_simulated(nets: Networks, y: Tensor, batch: DistillBatch, cfg: DistillConfig, draws: Draws) -> Tensor:
    sigma = draw_ts_gen_sigma(cfg, draws)
    return target_simulate(nets.student, y, batch.student_cond, sigma, normal(y.shape[1:], draws))


def _weighted(weight: float, term: Loss) -> Loss:
    loss, figures = term
    return weight * loss, figures


def _targets(y: Tensor | None, what: str, batch: DistillBatch) -> Tensor:
    if y is None:
        raise ValueError(f"{what} needs target images y, and the batch of step {batch.step} has none")
    return y
