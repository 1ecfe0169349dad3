"""A sample grid while a distillation runs."""

from __future__ import annotations

import torch
from PIL import Image

from clora.data.examples import collate
from clora.data.image_grid import grid_image
from clora.distill.step import Distillation, networks_at
from clora.method.flow import few_step_sigmas
from clora.method.samplers import few_step_sample
from clora.training import distributed
from clora.training.optimizer import averaged_weights


@torch.no_grad()
def sample_grid(d: Distillation, step: int, most: int = 8) -> Image.Image | None:
    """Source, teacher's and student's image, after `step` updates, of the first example of up to `most` effects.

    All processes sample (the base may be sharded); the first one, which has the decoder, gets the picture.
    """
    config, backbone = d.config, d.models.backbone
    pools = list(d.batches.effects.values()) or [d.batches.general]
    picked = [pool[0] for pool in pools[:most] if pool[0].sizes == pools[0][0].sizes]
    sigmas = few_step_sigmas(config.schedule.num_steps, config.schedule.shift)
    nets = networks_at(d, step - 1)
    shape = (picked[0].num_tokens, backbone.token_channels)
    role = "student" if config.objective.aop else "teacher"
    with averaged_weights(d.student):
        x0 = few_step_sample(
            nets.student,
            collate(picked, role, backbone.device),
            shape,
            sigmas,
            [0] * len(picked),
            backbone.device,
        )
    if not distributed.is_main():
        return None
    columns = ["source", "teacher", "student"] if picked[0].y else ["source", "student"]
    rows = []
    for example, student in zip(picked, backbone.decode(x0, picked[0].grid), strict=True):
        made = [backbone.decode(example.y[0][None], example.grid)[0]] if example.y else []
        source = backbone.decode(example.refs[-1][None], example.ref_grids[-1])[0]
        rows.append([image.permute(1, 2, 0).cpu().numpy() for image in (source, *made, student)])
    return grid_image(rows, columns, [example.effect or "general" for example in picked])
