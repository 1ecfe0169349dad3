"""`clora teach`: single-effect LoRAs by flow matching (Eq. 2), all effects side by side in one batched forward.

Each effect has its own slot in one stack of adapters, so that a step is one forward and one backward of the base
whatever the number of effects. `joint` trains ONE adapter on all pairs instead: the paper's "N-in-1 FM" baseline.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from clora.config import Config
from clora.data.examples import Example, collate
from clora.errors import InputError
from clora.flow import add_noise, shift_sigma
from clora.loop import LoopConfig, lr_factor, run_loop
from clora.lora_files import write_lora
from clora.losses import flow_matching_loss
from clora.optimizer import Group, apply_gradients, check_finite
from clora.routing import draw_effects, step_generator
from clora.workspace import (
    DTYPES,
    Workspace,
    averaged_weights,
    open_workspace,
    slot_to_cpu,
    trainable_group,
)

JOINT = "joint"


def teach(
    config: Config, joint: bool = False, resume: str | None = None, console: Console | None = None
) -> dict[str, Path]:
    """Teach every effect that has no LoRA file; returns effect -> file under `output_dir/teachers`.

    With `joint`, one adapter of the student's rank learns all effects from their teacher prompts and is written to
    `output_dir/joint.safetensors` (returned under "joint"). Raises `InputError` when there is nothing to teach.
    """
    console = console or Console(stderr=True)
    chosen = [effect for effect in config.effects if joint or effect.lora is None]
    if not chosen:
        raise InputError("effects: every effect has a LoRA file; there is nothing to teach")
    config = config.model_copy(update={"effects": chosen})
    workspace = open_workspace(config, console, general=False)
    if missing := [f"effect {name}" for name, ex in workspace.effects.items() if any(e.x0 is None for e in ex)]:
        raise InputError(f"{missing[0]}: its pairs have no targets; `teach` needs source and target images")
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
    group = trainable_group(workspace.adapters, ["teach"], config, settings.learning_rate)
    group.per_slot = True
    rows = [slot for slot in slots for _ in range(settings.batch_size)]

    def one_step(step: int) -> dict[str, Tensor]:
        rng = step_generator(config.seed, step, "teach/examples", "cpu")
        batch = [e for name in names for e in _draw(workspace.effects[name], settings.batch_size, rng)]
        loss, per_sample = _flow_step(workspace, batch, rows, step)
        # A sum over effects: every teacher learns as it would alone.
        _update(group, loss * len(names), step, settings.max_train_steps, config)
        per_effect = per_sample.view(len(names), -1).mean(1)
        return {"loss": loss.detach()} | {f"loss/{n}": v for n, v in zip(names, per_effect, strict=True)}

    run_loop(_loop(config, "teach", settings.max_train_steps, resume), {"teach": group}, one_step, console=console)
    files = {effect.name: config.teacher_path(effect) for effect in config.effects}
    for name, slot in zip(names, slots, strict=True):
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
    size = config.train.anchor_batch_size or config.train.batch_size
    generator = torch.Generator().manual_seed(config.seed)
    student = config.student
    workspace.adapters.add_stack(
        JOINT, [JOINT], student.rank, student.alpha, trainable=True, init="lora", generator=generator
    )
    group = trainable_group(workspace.adapters, [JOINT], config, settings.learning_rate, ema=True)

    def one_step(step: int) -> dict[str, Tensor]:
        rng = step_generator(config.seed, step, "joint/examples", "cpu")
        drawn = draw_effects(config.seed, step, len(names), size, 1.0)
        batch = [e for i in drawn for e in _draw(workspace.effects[names[i]], 1, rng)]
        batch = [e for e in batch if e.sizes == batch[0].sizes]
        loss, _ = _flow_step(workspace, batch, [JOINT], step)
        _update(group, loss, step, settings.max_train_steps, config)
        return {"loss": loss.detach()}

    run_loop(_loop(config, JOINT, settings.max_train_steps, resume), {JOINT: group}, one_step, console=console)
    path = config.output_dir / "joint.safetensors"
    with averaged_weights(group):
        write_lora(path, slot_to_cpu(workspace.adapters, JOINT), {"clora.effects": ", ".join(names)})
    workspace.adapters.remove_stack(JOINT)
    return {JOINT: path}


def _draw(examples: list[Example], count: int, rng: torch.Generator) -> list[Example]:
    return [examples[int(torch.randint(len(examples), (), generator=rng))] for _ in range(count)]


def _flow_step(workspace: Workspace, batch: list[Example], slots: list[str], step: int) -> tuple[Tensor, Tensor]:
    """Eq. 2 on one batch of pairs with the teacher prompts; the prompt is dropped for a share of the samples."""
    config, settings, backbone = workspace.config, workspace.config.teach, workspace.backbone
    rng = step_generator(config.seed, step, "teach/noise", backbone.device)
    dropped = torch.rand(len(batch), generator=rng, device=rng.device) < settings.caption_dropout
    roles = ["negative" if drop else "teacher" for drop in dropped.tolist()]
    cond = collate(batch, roles, backbone.device)
    x0 = torch.stack([e.x0 for e in batch if e.x0 is not None]).to(backbone.device, torch.float32)
    uniform = torch.rand(len(batch), generator=rng, device=rng.device)
    sigma = shift_sigma(uniform, settings.sigma_shift)
    eps = torch.randn(x0.shape, generator=rng, device=rng.device)
    velocity = backbone.velocity(add_noise(x0, eps, sigma), sigma, cond, slots)
    loss, figures = flow_matching_loss(velocity, x0, eps)
    return loss, figures["per_sample"]


def _update(group: Group, loss: Tensor, step: int, total: int, config: Config) -> None:
    where = f"teach step {step}"
    check_finite(loss, where).backward()
    settings = config.teach
    apply_gradients(group, lr_factor(step, total, settings.lr_warmup_steps, settings.lr_scheduler), where)


def _loop(config: Config, title: str, steps: int, resume: str | None) -> LoopConfig:
    return LoopConfig(
        title=title,
        max_steps=steps,
        folder=config.output_dir / title,
        checkpointing_steps=config.train.checkpointing_steps,
        fingerprint=config.fingerprint(),
        checkpoints_total_limit=config.train.checkpoints_total_limit,
        log_every=config.train.log_every,
        report_to=config.train.report_to,
        resume=resume,
    )
