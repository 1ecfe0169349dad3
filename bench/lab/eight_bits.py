"""What do fp8 and int8 cost in quality? `python -m bench.lab.eight_bits [--figures F]`.

The base's own collection, merged and served as an engine would be, with the linears of its blocks rounded to eight bits
as `clora export --precision` chooses them, simulated in fp32: with the costliest tenth kept as it was, and with none
kept. Every effect is sampled on scenes that nothing was calibrated on, with the same noise in every row, and judged by
the truth; differences are to the same network without rounding, paired. `psnr_to_plain` is between the rows' images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from bench.lab.extend import SCENES, Images
from bench.lab.study import judge, machine, write_figures
from clora.backbones.base import Backbone
from clora.backbones.cond import Cond, make_cond
from clora.backbones.load import linear_shapes, load_backbone, rotary_positions, served_network
from clora.config import collection_lora
from clora.data.image_grid import to_uint8
from clora.data.images import load_image
from clora.evaluate.metrics.image import as_image, psnr
from clora.export.build import Source, find_source
from clora.export.calibration import calibrate
from clora.export.graph_velocity import GraphVelocity
from clora.export.manifest import LIMITS
from clora.export.merged import write_merged
from clora.export.quantize import NUMBERS, Numbers, Scale, simulated
from clora.inference.sampling import few_step_sampling, follow
from clora.lora.files import read_lora
from clora.method.flow import few_step_sigmas
from clora.tiny.dataset import write_eval_sources

BASE = "tiny"
PLAIN = "fp32"
CALIBRATION_SCENES = 16
BATCH = 25
Rounding = tuple[dict[str, Scale], Numbers] | None
Batch = tuple[list[tuple[str, int]], Cond]  # effects and scenes, and what is asked for them


def merged_network(source: Source, folder: Path) -> nn.Module:
    """The base with the collection merged into it, as it is served, in fp32."""
    modules = read_lora(source.lora, linear_shapes(source.base)).modules
    write_merged(source.folder, folder, modules, torch.float32, ("transformer",))
    schedule = source.catalogue.schedule
    backbone = load_backbone(folder, "cpu", torch.float32, ("transformer",))
    return served_network(backbone, few_step_sigmas(schedule.num_steps, schedule.shift))


def batches(backbone: Backbone, source: Source, scenes: Mapping[int, Path]) -> Iterator[Batch]:
    """Every effect of the catalogue on every scene."""
    effects = source.catalogue.effects
    for scene, path in scenes.items():
        image = load_image(path)
        refs, grid = backbone.encode_references([image])
        for start in range(0, len(effects), BATCH):
            some = effects[start : start + BATCH]
            texts = backbone.encode_prompts([effect.prompt for effect in some], [[image]] * len(some))
            cond = make_cond(
                texts, [(refs.expand(len(some), -1, -1), grid)], backbone.grid(backbone.output_size(image))
            )
            yield [(effect.name, scene) for effect in some], cond


def sample(backbone: Backbone, network: nn.Module, source: Source, examples: Sequence[Batch]) -> Images:
    schedule = source.catalogue.schedule
    sampling = few_step_sampling(schedule.num_steps, schedule.shift, source.catalogue.sampler)
    positions = partial(rotary_positions, source.base)
    velocity = GraphVelocity(network, BASE, positions, schedule.num_steps, schedule.shift, LIMITS, torch.float32)
    images: Images = {}
    for keys, cond in examples:
        x0 = follow(backbone, velocity, cond, sampling, [scene % 100_003 for _, scene in keys])
        made = backbone.decode(x0, cond.grid).permute(0, 2, 3, 1).numpy()
        images |= {key: [to_uint8(image)] for key, image in zip(keys, made, strict=True)}
    return images


def rows_of(network: nn.Module, source: Source, pictures: list[Image.Image]) -> tuple[dict[str, Rounding], Any]:
    """How every row is rounded, and what the choice of each format reports."""
    rows: dict[str, Rounding] = {PLAIN: None}
    choices = {}
    for name, numbers in NUMBERS.items():
        choice = calibrate(network, BASE, source.catalogue, pictures, LIMITS, torch.float32, numbers)
        rows[name], rows[f"{name}, none kept"] = (choice.rounded, numbers), (choice.scales, numbers)
        costs = {"cost": choice.cost, "cost_of_all": choice.cost_of_all, "worst": choice.worst}
        choices[name] = {"kept": choice.kept, **{key: round(value, 4) for key, value in costs.items()}}
    return rows, choices


@torch.no_grad()
def measure(folder: Path, num_scenes: int) -> dict[str, Any]:
    lora = collection_lora(BASE)
    assert lora is not None
    source = find_source(BASE, lora)
    network = merged_network(source, folder / "merged")
    tune = write_eval_sources(folder / "tune", CALIBRATION_SCENES, first=SCENES["tune"])
    rounded, choices = rows_of(network, source, [load_image(path) for path in tune.values()])
    backbone = load_backbone(BASE, "cpu", torch.float32)
    scenes = write_eval_sources(folder / "judge", num_scenes, first=SCENES["judge"])
    examples = list(batches(backbone, source, scenes))
    images: dict[str, Images] = {}
    for name, rounding in rounded.items():
        with nullcontext() if rounding is None else simulated(network, *rounding):
            images[name] = sample(backbone, network, source, examples)
    rows = judge(images, PLAIN)
    for row in rows:
        pairs = ((images[row["row"]][key][0], images[PLAIN][key][0]) for key in images[PLAIN])
        row["psnr_to_plain"] = round(float(np.mean([psnr(as_image(a), as_image(b)) for a, b in pairs])), 2)
    return {
        "collection": {"effects": len(source.catalogue.effects), "version": source.catalogue.version},
        "scenes": {"use": "judge", "count": num_scenes, "calibrated on": f"tune, {CALIBRATION_SCENES}"},
        "machine": machine(),
        "choices": choices,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-scenes", type=int, default=4)
    parser.add_argument("--figures", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        write_figures(options.figures, measure(Path(place), options.num_scenes))


if __name__ == "__main__":
    main()
