"""A sample grid while a distillation runs."""

from __future__ import annotations

import torch
from PIL import Image

from clora.backbones.base import Backbone
from clora.data.examples import collate
from clora.data.image_grid import grid_image
from clora.distill.batches import Batches
from clora.inference.sampling import few_step_sampling, follow
from clora.method.flow import Velocity
from clora.training import distributed


@torch.no_grad()
def sample_grid(velocity: Velocity, backbone: Backbone, batches: Batches, most: int = 8) -> Image.Image | None:
    """Source, teacher's and student's image of the first example of up to `most` effects.

    All processes sample (the base may be sharded); the first one, which has the decoder, gets the picture.
    """
    config = batches.config
    pools = list(batches.effects.values()) or [batches.general]
    picked = [pool[0] for pool in pools[:most] if pool[0].sizes == pools[0][0].sizes]
    sampling = few_step_sampling(config.schedule.num_steps, config.schedule.shift, config.schedule.sampler)
    cond = collate(picked, "student" if config.objective.aop else "teacher", backbone.device)
    x0 = follow(backbone, velocity, cond, sampling, [0] * len(picked))
    if not distributed.is_main():
        return None
    columns = ["source", "teacher", "student"] if picked[0].y else ["source", "student"]
    rows = []
    for example, student in zip(picked, backbone.decode(x0, picked[0].grid), strict=True):
        made = [backbone.decode(example.y[0][None], example.grid)[0]] if example.y else []
        source = backbone.decode(example.refs[-1][None], example.ref_grids[-1])[0]
        rows.append([image.permute(1, 2, 0).cpu().numpy() for image in (source, *made, student)])
    return grid_image(rows, columns, [example.effect or "general" for example in picked])
