"""`clora teach`: single-effect LoRAs by flow matching (Eq. 2), all effects side by side in one batched forward.

Each effect has its own slot in one stack of adapters, so that a step is one forward and one backward of the base for
each size of its samples, whatever the number of effects. `joint` trains ONE adapter on all pairs instead: the paper's
"N-in-1 FM" baseline. A pair that has a caption is learned from with that, the others with their effect's prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from torch import Tensor

from clora.config import Config
from clora.data.examples import Example, collate, group_by_size
from clora.distill.check import check_teaching
from clora.distill.opened import Workspace
from clora.distill.workspace import open_workspace, trainable_group
from clora.errors import InputError
from clora.lora.adapters import slot_to_cpu
from clora.lora.files import write_lora
from clora.method.flow import add_noise, shift_sigma
from clora.method.losses import flow_matching_loss
from clora.method.noise import split_rows
from clora.method.routing import draw_effects, step_generator
from clora.training import distributed
from clora.training.device import DTYPES, determinism, quiet_console
from clora.training.loop import loop_config, run_loop
from clora.training.lr_schedule import lr_multiplier
from clora.training.optimizer import AdamW, apply_gradients, averaged_weights, check_finite
from clora.training.run_record import write_run

JOINT: Final = "joint"


def teach(
    config: Config, joint: bool = False, resume: str | None = None, console: Console | None = None
) -> dict[str, Path]:
    """Teach every effect that has no LoRA file; returns effect -> file under `output_dir/teachers`.

    With `joint`, one adapter of the student's rank learns all effects from their teacher prompts and is written to
    `output_dir/joint.safetensors` (returned under "joint"). Raises `InputError` when there is nothing to teach.
    """
    console = console or quiet_console()
    chosen = [effect for effect in config.effects if joint or effect.lora is None]
    if not chosen:
        raise InputError("effects: every effect has a LoRA file; there is nothing to teach")
    run = check_teaching(config, chosen)
    config = run.config
    with distributed.process_group(config.train.timeout_seconds), determinism(config.train.deterministic):
        workspace = open_workspace(run, console)
        return teach_joint(workspace, resume, console) if joint else teach_each(workspace, resume, console)


def teach_each(workspace: Workspace, resume: str | None, console: Console) -> dict[str, Path]:
    """One slot per effect. An effect's samples reach only its own slot, and gradients are clipped per slot."""
    config, settings = workspace.config, workspace.config.teach
    names = list(workspace.effects)
    slots = [f"teach/{name}" for name in names]
    generator = torch.Generator().manual_seed(config.seed)
    workspace.adapters.add_stack(
        "teach", slots, settings.rank, settings.alpha, trainable=True, init="lora", generator=generator
    )
    group = trainable_group(workspace.adapters, ["teach"], config, settings.learning_rate, per_slot=True)
    # Each process takes its own samples of every effect.
    size, world = settings.batch_size, distributed.world_size()
    rows = [slot for slot in slots for _ in range(size)]
    own = [[(i * world + rank) * size + k for i in range(len(names)) for k in range(size)] for rank in range(world)]

    def one_step(step: int) -> dict[str, Tensor]:
        rng = step_generator(config.seed, step, "teach/examples", "cpu")
        examples = [e for name in names for e in _draw(workspace.effects[name], size * world, rng)]
        batch = draw_batch(workspace, examples, step)
        # A sum over effects: every teacher learns as it would alone.
        loss, per_sample = _learn(workspace, group, batch, own, rows, len(names) / world, "teach", step)
        per_effect = per_sample.view(len(names), -1).mean(1)
        figures = {"loss": loss} | {f"loss/{n}": v for n, v in zip(names, per_effect, strict=True)}
        return distributed.sum_figures({name: value / world for name, value in figures.items()})

    loop = loop_config(config, "teach", settings.max_train_steps, workspace.hashes, resume)
    record = partial(write_run, config, "teach", workspace.hashes)
    run_loop(loop, {"teach": group}, one_step, console=console, on_start=record)
    files = {effect.name: config.teacher_path(effect) for effect in config.effects}
    with averaged_weights(group):
        for name, slot in zip(names, slots, strict=True) if distributed.is_main() else ():
            files[name].parent.mkdir(parents=True, exist_ok=True)
            write_lora(
                files[name],
                slot_to_cpu(workspace.adapters, slot),
                {"clora.effect": name},
                dtype=DTYPES[settings.save_dtype],
            )
    workspace.adapters.remove_stack("teach")
    return files


def teach_joint(workspace: Workspace, resume: str | None, console: Console) -> dict[str, Path]:
    """One adapter of the student's shape on all pairs, effects balanced, teacher prompts: "N-in-1 (FM)"."""
    config, settings = workspace.config, workspace.config.teach
    names = list(workspace.effects)
    world = distributed.world_size()
    size = world * (config.train.anchor_batch_size or config.train.batch_size)
    generator = torch.Generator().manual_seed(config.seed)
    student = config.student
    workspace.adapters.add_stack(
        JOINT, [JOINT], student.rank, student.alpha, trainable=True, init="lora", generator=generator
    )
    group = trainable_group(workspace.adapters, [JOINT], config, settings.learning_rate, ema=True)

    def one_step(step: int) -> dict[str, Tensor]:
        rng = step_generator(config.seed, step, "joint/examples", "cpu")
        drawn = draw_effects(config.seed, step, len(names), size, 1.0)
        batch = draw_batch(workspace, [e for i in drawn for e in _draw(workspace.effects[names[i]], 1, rng)], step)
        shares = [split_rows(size, rank, world) for rank in range(world)]
        own = [list(range(rows.start, rows.stop)) for rows in shares]
        share = shares[distributed.rank()].share
        slots = [JOINT] * len(own[distributed.rank()])
        loss, _ = _learn(workspace, group, batch, own, slots, share, JOINT, step)
        return distributed.sum_figures({"loss": loss * share})

    loop = loop_config(config, JOINT, settings.max_train_steps, workspace.hashes, resume)
    record = partial(write_run, config, JOINT, workspace.hashes)
    run_loop(loop, {JOINT: group}, one_step, console=console, on_start=record)
    path = config.output_dir / "joint.safetensors"
    with averaged_weights(group):
        if distributed.is_main():
            write_lora(path, slot_to_cpu(workspace.adapters, JOINT), {"clora.effects": ", ".join(names)})
    workspace.adapters.remove_stack(JOINT)
    return {JOINT: path}


def _draw(examples: list[Example], count: int, rng: torch.Generator) -> list[Example]:
    return [examples[int(torch.randint(len(examples), (), generator=rng))] for _ in range(count)]


@dataclass(frozen=True)
class Batch:
    """The N samples of a step, of all processes and of any sizes, with the random numbers of each."""

    examples: list[Example]
    dropped: list[bool]  # taught with the negative prompt
    sigma: Tensor  # (N,)
    eps: list[Tensor]  # (T, C) each


def draw_batch(workspace: Workspace, examples: list[Example], step: int) -> Batch:
    """Everything random of a step, drawn for the samples of all processes."""
    settings, backbone = workspace.config.teach, workspace.backbone
    rng = step_generator(workspace.config.seed, step, "teach/noise", backbone.device)
    dropped = torch.rand(len(examples), generator=rng, device=rng.device) < settings.caption_dropout
    sigma = shift_sigma(torch.rand(len(examples), generator=rng, device=rng.device), settings.sigma_shift)
    eps: dict[int, Tensor] = {}
    for group in group_by_size(examples):
        shape = (len(group), examples[group[0]].num_tokens, backbone.token_channels)
        eps |= zip(group, torch.randn(shape, generator=rng, device=rng.device), strict=True)
    return Batch(examples, dropped.tolist(), sigma, [eps[i] for i in range(len(examples))])


def _learn(
    workspace: Workspace,
    group: AdamW,
    batch: Batch,
    own: list[list[int]],
    slots: list[str],
    weight: float,
    job: str,
    step: int,
) -> tuple[Tensor, Tensor]:
    """One update from `weight` times the mean loss of this process's samples, a forward and a backward for each size.

    Args:
        own: for each process its samples of the batch. Processes that share the base must run equally many forwards:
            one that has fewer sizes runs some sample once more, for nothing.
        slots: of each of this process's samples.

    Returns:
        The mean loss of this process's samples, and that of each (n,), detached.
    """
    settings, mine, title = workspace.config.teach, own[distributed.rank()], f"{job} step {step}"
    device = workspace.backbone.device
    rounds = [group_by_size([batch.examples[i] for i in rows]) for rows in own]
    groups = rounds[distributed.rank()]
    mean, per_sample = torch.zeros((), device=device), torch.zeros(len(mine), device=device)
    for k in range(max(map(len, rounds))):
        some, share = (groups[k], len(groups[k]) / len(mine)) if k < len(groups) else (groups[0][:1], 0.0)
        loss, each = _flow_step(workspace, batch, [mine[i] for i in some], [slots[i] for i in some])
        check_finite(loss * share * weight, f"{title} ({_worst(batch, [mine[i] for i in some], each)})").backward()
        if share:
            mean = mean + loss.detach() * share
            per_sample[some] = each
    factor = lr_multiplier(step, settings.max_train_steps, settings.lr_warmup_steps, settings.lr_scheduler)
    apply_gradients(group, factor, f"{title} ({_worst(batch, mine, per_sample)})")
    return mean, per_sample


def _flow_step(workspace: Workspace, batch: Batch, own: list[int], slots: list[str]) -> tuple[Tensor, Tensor]:
    """Eq. 2 on the samples `own` of a batch, which are of one size, with their captions or else the teacher prompts; a
    share of them has neither. Returns their mean and the loss of each of them."""
    backbone = workspace.backbone
    mine = [batch.examples[i] for i in own]
    roles = ["negative" if batch.dropped[i] else _role(batch.examples[i]) for i in own]
    cond = collate(mine, roles, backbone.device)
    x0 = torch.stack([e.x0 for e in mine if e.x0 is not None]).to(backbone.device, torch.float32)
    sigma, eps = batch.sigma[own], torch.stack([batch.eps[i] for i in own])
    velocity = backbone.velocity(add_noise(x0, eps, sigma), sigma, cond, slots)
    loss, figures = flow_matching_loss(velocity, x0, eps)
    return loss, figures["per_sample"]


def _role(example: Example) -> str:
    return "caption" if "caption" in example.texts else "teacher"


def _worst(batch: Batch, own: list[int], per_sample: Tensor) -> str:
    """The samples whose loss is not finite, or all where each one is, for a message."""
    sound = per_sample.isfinite().tolist()
    chosen = [i for i, fine in zip(own, sound, strict=True) if not fine] or own
    examples = [batch.examples[i] for i in chosen]
    return ", ".join(dict.fromkeys(f"{e.effect} on {e.sources[-1].name}" for e in examples))
