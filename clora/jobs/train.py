"""`clora train`: distil N effect teachers and few-step sampling into ONE LoRA (the whole method, Eq. 9).

Without effects the same job trains the acceleration LoRA: distribution matching of the base on general data alone.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from clora.config import Config
from clora.distill.check import check_training
from clora.distill.run import distil, open_bank, targets_of
from clora.distill.workspace import open_workspace
from clora.training import distributed
from clora.training.device import determinism, quiet_console


def train(config: Config, resume: str | None = None, console: Console | None = None) -> Path:
    """Distil; returns `output_dir/collection.safetensors` (`acceleration.safetensors` without effects).

    Checkpoints and `log.jsonl` lie under `output_dir/train`. Raises `InputErrors` for faults of the input, before the
    base is loaded unless an image's or a tensor's content is at fault; `NonFiniteError`, `Interrupted`, `ProcessLost`
    and `OSError` as `loop.run_loop` does.
    Under torchrun all processes train together, and the first one writes.
    """
    console = console or quiet_console()
    run = check_training(config).first_pairs(config.targets.max_sources)
    with distributed.process_group(config.train.timeout_seconds), determinism(config.train.deterministic):
        workspace = open_workspace(run, console)
        bank = open_bank(workspace)
        if bank is not None:
            workspace = replace(workspace, effects=targets_of(workspace, bank, console))
        return distil(workspace, bank, resume, console)


def make_caches(config: Config, console: Console | None = None) -> dict[str, int]:
    """Encode everything and make the targets, without training; returns how many examples there are of each."""
    console = console or quiet_console()
    run = check_training(config).first_pairs(config.targets.max_sources)
    with distributed.process_group(config.train.timeout_seconds):
        workspace = open_workspace(run, console)
        effects, bank = workspace.effects, open_bank(workspace)
        if bank is not None:
            with closing(bank):
                effects = targets_of(workspace, bank, console)
    return {name: len(examples) for name, examples in effects.items()} | {"general": len(workspace.general)}
