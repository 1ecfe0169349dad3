"""A sample grid while a distillation runs."""

from __future__ import annotations

import torch
from PIL import Image

from clora.data.examples import collate
from clora.data.image_grid import grid_image
from clora.distill.step import Distiller
from clora.distill.workspace import Workspace
from clora.inference.sampling import few_step_sampling, follow
from clora.training import distributed
from clora.training.optimizer import averaged_weights


@torch.no_grad()
def sample_grid(workspace: Workspace, distiller: Distiller, step: int, most: int = 8) -> Image.Image | None:
    """Source, teacher's and student's image, after `step` updates, of the first example of up to `most` effects.

    All processes sample (the base may be sharded); the first one, which has the decoder, gets the picture.
    """
    config, backbone = workspace.config, workspace.backbone
    pools = list(workspace.effects.values()) or [workspace.general]
    picked = [pool[0] for pool in pools[:most] if pool[0].sizes == pools[0][0].sizes]
    sampling = few_step_sampling(config.schedule.num_steps, config.schedule.shift)
    cond = collate(picked, "student" if config.objective.aop else "teacher", backbone.device)
    with averaged_weights(distiller.student):
        x0 = follow(backbone, distiller.networks(step - 1).student, cond, sampling, [0] * len(picked))
    if not distributed.is_main():
        return None
    columns = ["source", "teacher", "student"] if picked[0].y else ["source", "student"]
    rows = []
    for example, student in zip(picked, backbone.decode(x0, picked[0].grid), strict=True):
        made = [backbone.decode(example.y[0][None], example.grid)[0]] if example.y else []
        source = backbone.decode(example.refs[-1][None], example.ref_grids[-1])[0]
        rows.append([image.permute(1, 2, 0).cpu().numpy() for image in (source, *made, student)])
    return grid_image(rows, columns, [example.effect or "general" for example in picked])
