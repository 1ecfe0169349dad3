"""What critic and teacher say of a noisy sample: one call for all that can be asked together.

Shapes: latents (B, T, C) packed tokens in fp32, sigma (B,) fp32 with 1 = noise and 0 = data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clora.method.given import Anchor, DistillBatch, Networks, Query
from clora.method.losses import guided_velocity
from clora.method.noise import DistillConfig


def ask_scores(
    nets: Networks, batch: DistillBatch, cfg: DistillConfig, x_sigma: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The velocities of critic, teacher, and teacher without its condition (None at guidance 1), without grad.

    The teacher's two are one call; all three are where `nets.scores` is given. A sample that is not guided is asked
    about once: without its condition its velocity counts as what it is with it, and guiding changes nothing.
    """
    critic = Query(x_sigma, sigma, batch.student_cond)
    teacher, rows = _teacher_query(nets, batch, cfg, x_sigma, sigma)
    with torch.no_grad():
        if nets.scores is not None:
            v_critic, v_teacher = nets.scores(critic, teacher)
        else:
            v_critic, v_teacher = nets.critic(*critic), nets.teacher(*teacher)
    v_cond, v_uncond = _branches(v_teacher, rows, cfg)
    return v_critic, v_cond, v_uncond


@torch.no_grad()
def ask_teacher(
    nets: Networks, batch: DistillBatch | Anchor, cfg: DistillConfig, x_sigma: Tensor, sigma: Tensor
) -> Tensor:
    """The teacher's velocity (B, T, C), guided as `objective` says, without grad: one call."""
    query, rows = _teacher_query(nets, batch, cfg, x_sigma, sigma)
    v_cond, v_uncond = _branches(nets.teacher(*query), rows, cfg)
    if v_uncond is None:
        return v_cond
    return guided_velocity(v_cond, v_uncond, cfg.objective.guidance, cfg.objective.guidance_rescale)


def _teacher_query(
    nets: Networks, batch: DistillBatch | Anchor, cfg: DistillConfig, x_sigma: Tensor, sigma: Tensor
) -> tuple[Query, Tensor]:
    """What the teacher is asked: every sample, then those `rows` that are guided without their condition."""
    guided = range(len(x_sigma)) if batch.guided is None else batch.guided
    rows = torch.tensor([] if cfg.objective.guidance == 1.0 else list(guided), dtype=torch.long, device=x_sigma.device)
    if not len(rows):
        return Query(x_sigma, sigma, batch.teacher_cond), rows
    if batch.uncond is None or nets.cat_conds is None:
        what = f"objective.guidance is {cfg.objective.guidance:g}, but there is no uncond or no cat_conds"
        raise ValueError(what)
    cond = nets.cat_conds([batch.teacher_cond, batch.uncond])
    return Query(torch.cat([x_sigma, x_sigma[rows]]), torch.cat([sigma, sigma[rows]]), cond), rows


def _branches(v_teacher: Tensor, rows: Tensor, cfg: DistillConfig) -> tuple[Tensor, Tensor | None]:
    """The teacher's answers with and without the condition, (B, T, C) each; the latter None at guidance 1."""
    if cfg.objective.guidance == 1.0:
        return v_teacher, None
    v_cond, v_guided = v_teacher.split([len(v_teacher) - len(rows), len(rows)])
    return v_cond, v_cond.index_copy(0, rows, v_guided)
