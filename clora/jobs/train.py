"""`clora train`: distil N effect teachers and few-step sampling into ONE LoRA (the whole method, Eq. 9).

Without effects the same job trains the acceleration LoRA: distribution matching of the base on general data alone.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from rich.console import Console

from clora.config import Config
from clora.distill.run import distil, open_bank, targets_of
from clora.distill.workspace import open_workspace
from clora.training import distributed
from clora.training.device import determinism, quiet_console


def train(config: Config, resume: str | None = None, console: Console | None = None) -> Path:
    """Distil; returns `output_dir/collection.safetensors` (`acceleration.safetensors` without effects).

    Checkpoints and `log.jsonl` lie under `output_dir/train`. Raises `InputErrors` for faults of the input,
    `optimizer.NonFiniteError`, `loop.Interrupted`, `distributed.ProcessLost` and `OSError` as `loop.run_loop` does.
    Under torchrun all processes train together, and the first one writes.
    """
    console = console or quiet_console()
    with distributed.process_group(config.train.timeout_seconds), determinism(config.train.deterministic):
        workspace = open_workspace(config, console, max_pairs=config.targets.max_sources)
        bank = open_bank(workspace)
        if bank is not None:
            workspace.effects = targets_of(workspace, bank, console)
        return distil(workspace, bank, resume, console)


def make_caches(config: Config, console: Console | None = None) -> dict[str, int]:
    """Encode everything and make the targets, without training; returns how many examples there are of each."""
    console = console or quiet_console()
    with distributed.process_group(config.train.timeout_seconds):
        workspace = open_workspace(config, console, max_pairs=config.targets.max_sources)
        bank = open_bank(workspace)
        if bank is not None:
            with closing(bank):
                workspace.effects = targets_of(workspace, bank, console)
    counts = {name: len(examples) for name, examples in workspace.effects.items()}
    return counts | {"general": len(workspace.general)}
